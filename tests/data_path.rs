//! The embedded WireGuard's data path against other implementations, with each offload missing, over a path that loses,
//! repeats and reorders datagrams, and with small and large MTUs. The keeper's filter of system calls limits the data
//! path.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use lab::{Addresses, Lab, PROVIDER, PROVIDER_PORT, Peer, ROUTER, TUNNEL_CLIENT, TUNNEL_RESOLVER, patience};
use vpn_exec::keeper::limit_data_path;
use vpn_exec::linux::datagrams::{Ecn, Outbox};
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::linux::poll::wait_for;
use vpn_exec::wireguard::userspace::{Levels, Sockets, UserspaceDevice};
use vpn_exec::wireguard::{Device, DeviceConfig};

/// The time after which a transfer hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// The port of the servers behind the tunnel, and that of the rough path.
const PORT: u16 = 5000;
const ROUGH_PORT: u16 = 51821;

/// The length of the header before each packet of a TUN (linux/virtio_net.h).
const HEADER: usize = 10;

/// Bytes that depend on a number and never repeat in an obvious way.
fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut numbers = Numbers(seed.wrapping_mul(2) + 1);
    (0..length.div_ceil(8)).flat_map(|_| numbers.next().to_le_bytes()).take(length).collect()
}

/// A generator of numbers that look random (xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Returns true in some percent of the calls.
    fn percent(&mut self, percent: u64) -> bool {
        (self.next() >> 33) % 100 < percent
    }
}

/// A thread that ends with this value.
struct Running(Arc<AtomicBool>, Option<std::thread::JoinHandle<io::Result<()>>>);

impl Running {
    fn start(mut step: impl FnMut() -> io::Result<()> + Send + 'static) -> Self {
        let go_on = Arc::new(AtomicBool::new(true));
        let seen = Arc::clone(&go_on);
        let body = move || {
            while seen.load(Ordering::Relaxed) {
                step()?;
            }
            Ok(())
        };
        Self(go_on, Some(std::thread::spawn(body)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
        if let Some(Err(error)) = self.1.take().and_then(|thread| thread.join().ok()) {
            eprintln!("a helper of the test failed: {error}");
        }
    }
}

/// Passes datagrams between the client and the provider, and loses, repeats and reorders some.
fn rough_path(lab: &Lab, to: Addresses, is_ipv6: bool) -> Result<Running> {
    let provider = SocketAddr::new(if is_ipv6 { to.ipv6.into() } else { to.ipv4.into() }, PROVIDER_PORT);
    let (near, far) = lab.router.run(|| {
        let far = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
        let near = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, ROUGH_PORT))?;
        [&near, &far].into_iter().try_for_each(|socket| socket.set_nonblocking(true))?;
        Ok((near, far))
    })?;
    let provider = match provider.ip() {
        IpAddr::V4(address) => SocketAddr::new(address.to_ipv6_mapped().into(), provider.port()),
        IpAddr::V6(_) => provider,
    };
    let (mut numbers, mut buffer) = (Numbers(7), vec![0; 65_536]);
    let mut client = None;
    let mut late: [Option<Vec<u8>>; 2] = [None, None];
    Ok(Running::start(move || {
        wait_for(&[near.as_fd(), far.as_fd()], Some(Duration::from_millis(2)))?;
        for (number, socket) in [&near, &far].into_iter().enumerate() {
            let mut is_quiet = true;
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                is_quiet = false;
                if number == 0 {
                    client = Some(from);
                }
                let (out, to) = if number == 0 { (&far, Some(provider)) } else { (&near, client) };
                let Some(to) = to else { continue };
                // A full queue loses a datagram, as in a network.
                let send = |datagram: &[u8]| drop(out.send_to(datagram, to));
                if numbers.percent(1) {
                    continue;
                }
                if late[number].is_none() && numbers.percent(4) {
                    late[number] = Some(buffer[..length].to_vec());
                    continue;
                }
                send(&buffer[..length]);
                if numbers.percent(2) {
                    send(&buffer[..length]);
                }
                if numbers.percent(20)
                    && let Some(datagram) = late[number].take()
                {
                    send(&datagram);
                }
            }
            if is_quiet && let Some(datagram) = late[number].take() {
                let (out, to) = if number == 0 { (&far, Some(provider)) } else { (&near, client) };
                to.into_iter().for_each(|to| drop(out.send_to(&datagram, to)));
            }
        }
        Ok(())
    }))
}

/// Starts servers behind the tunnel that send back what they receive: over TCP once all is there, datagrams at once.
fn start_servers(site: &NetworkNamespace) -> Result<Running> {
    let (listener, socket) = site.run(|| {
        let any = (Ipv6Addr::UNSPECIFIED, PORT);
        Ok((TcpListener::bind(any)?, UdpSocket::bind(any)?))
    })?;
    std::thread::spawn(move || {
        for mut connection in listener.incoming().map_while(io::Result::ok) {
            std::thread::spawn(move || {
                let mut all = Vec::new();
                connection.read_to_end(&mut all)?;
                connection.write_all(&all)
            });
        }
    });
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mut buffer = vec![0; 65_536];
    Ok(Running::start(move || {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
        Ok(())
    }))
}

/// The client's end of a tunnel: a namespace whose only way out is the device.
struct Client {
    inside: NetworkNamespace,
    device: UserspaceDevice,
}

impl Client {
    fn start(config: &DeviceConfig, levels: Levels, mtu: u32) -> Result<Self> {
        let sockets = Sockets::bind(0, 0)?;
        let (inside, tun) = NetworkNamespace::create(|| {
            let wg0 = "wg0".parse().map_err(io::Error::other)?;
            let tun = lab::passing_tun(&wg0)?;
            let mut netlink = Netlink::open()?;
            let index = netlink.link_index(&wg0)?;
            let mut requests = vec![NetlinkRequest::set_mtu(index, "wg0", mtu), NetlinkRequest::set_up(index, "wg0")];
            let mut add = |client: IpAddr, everything: &str| {
                requests.push(NetlinkRequest::add_address(index, "wg0", client.into()));
                let everything = everything.parse().map_err(io::Error::other)?;
                requests.push(NetlinkRequest::add_route(index, "wg0", everything, None));
                io::Result::Ok(())
            };
            add(TUNNEL_CLIENT.ipv4.into(), "0.0.0.0/0")?;
            if mtu >= 1280 {
                add(TUNNEL_CLIENT.ipv6.into(), "::/0")?;
            }
            netlink.execute(requests)?;
            Ok(tun)
        })?;
        let config = DeviceConfig { mtu, ..config.clone() };
        Ok(Self { inside, device: UserspaceDevice::start_with(levels, &config, tun, sockets, limit_data_path)? })
    }

    /// Sends bytes over TCP, which must come back.
    fn transfer(&self, to: IpAddr, length: usize) -> Result<()> {
        let sent = bytes(length as u64, length);
        let to = SocketAddr::new(to, PORT);
        let mut stream = self.inside.run(|| TcpStream::connect_timeout(&to, patience(PATIENCE)))?;
        stream.set_read_timeout(Some(patience(PATIENCE)))?;
        stream.set_write_timeout(Some(patience(PATIENCE)))?;
        stream.write_all(&sent)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut received = Vec::new();
        stream.read_to_end(&mut received)?;
        ensure!(received == sent, "TCP to {to}: {} of {length} bytes, or others, came back", received.len());
        Ok(())
    }

    /// Sends datagrams of a length, several as one message, until a number has come back. None may have changed, and
    /// none may come twice.
    fn exchange(&self, to: IpAddr, length: usize, wanted: usize) -> Result<()> {
        const TOGETHER: u64 = 8;
        let to = SocketAddr::new(to, PORT);
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = self.inside.run(|| UdpSocket::bind(any))?;
        socket.set_nonblocking(true)?;
        let (mut came, mut buffer, mut next) = (BTreeSet::new(), vec![0; 65_536], 0);
        let datagram = |number: u64| [&number.to_le_bytes()[..], &bytes(number, length - 8)].concat();
        let begin = std::time::Instant::now();
        while came.len() < wanted {
            ensure!(begin.elapsed() < patience(PATIENCE), "UDP to {to}: {} of {next} came back", came.len());
            let mut outbox = Outbox::new(length * TOGETHER as usize, true, true);
            for number in next..next + TOGETHER {
                outbox.room(length).context("room")?.copy_from_slice(&datagram(number));
                outbox.push(to, Ecn::NOT_CAPABLE, length);
            }
            next += TOGETHER;
            outbox.flush(|_| Some(socket.as_fd()));
            while wait_for(&[socket.as_fd()], Some(Duration::from_millis(20)))?.iter().any(|ready| *ready) {
                let Ok((received, _)) = socket.recv_from(&mut buffer) else { continue };
                let number = buffer[..received].first_chunk().copied().map(u64::from_le_bytes).context("a number")?;
                ensure!(buffer[..received] == datagram(number), "UDP to {to}: the datagram {number} has changed");
                ensure!(came.insert(number), "UDP to {to}: the datagram {number} came twice");
            }
        }
        Ok(())
    }

    fn check_all(&self, what: &str, mtu: u32, tcp: usize) -> Result<()> {
        for to in TUNNEL_RESOLVER.both().into_iter().filter(|to| to.is_ipv4() || mtu >= 1280) {
            let headers = if to.is_ipv4() { 28 } else { 48 };
            self.transfer(to, tcp).with_context(|| what.to_owned())?;
            self.exchange(to, mtu as usize - headers, 40).with_context(|| what.to_owned())?;
        }
        let status = self.device.peers()?.remove(0);
        ensure!(status.tx_bytes > tcp as u64 && status.rx_bytes > tcp as u64, "{what}: {status:?}");
        Ok(())
    }
}

/// With each offload missing, over a rough path.
fn works_at_each_level(lab: &Lab, config: &DeviceConfig) -> Result<()> {
    let _servers = start_servers(lab.provider.site())?;
    for (number, (what, levels)) in Levels::cases().into_iter().enumerate() {
        let is_ipv6 = number % 2 == 1;
        let _path = rough_path(lab, PROVIDER, is_ipv6)?;
        let router: IpAddr = if is_ipv6 { ROUTER.ipv6.into() } else { ROUTER.ipv4.into() };
        let mut config = config.clone();
        config.peers[0].endpoint = Some((router, ROUGH_PORT).into());
        Client::start(&config, levels, 1420)?.check_all(what, 1420, 300_000)?;
    }
    Ok(())
}

/// With the smallest and large MTUs, with all offloads and with none. Datagrams longer than the path's MTU are
/// fragmented.
fn works_with_each_mtu(lab: &Lab, config: &DeviceConfig) -> Result<()> {
    let _servers = start_servers(lab.provider.site())?;
    // The smallest comes last: with it, the kernel takes IPv6 from the provider's interface for good.
    for mtu in [1280, 1420, 9000, 576] {
        lab.provider.site().run(|| {
            let mut netlink = Netlink::open()?;
            let index = netlink.link_index(&"provider0".parse().map_err(io::Error::other)?)?;
            Ok(netlink.execute_one(NetlinkRequest::set_mtu(index, "provider0", mtu))?)
        })?;
        for (to, levels) in PROVIDER.both().into_iter().zip([Levels::ALL, Levels::NONE]) {
            let mut config = config.clone();
            config.peers[0].endpoint = Some((to, PROVIDER_PORT).into());
            Client::start(&config, levels, mtu)?.check_all(&format!("an MTU of {mtu}"), mtu, 500_000)?;
        }
    }
    Ok(())
}

#[test]
fn each_offload_can_be_missing_with_our_own_peer() {
    lab::test(Peer::Ours, |lab| works_at_each_level(lab, &lab.provider.customers_device()));
}

#[test]
fn each_offload_can_be_missing_with_wireguard_go() {
    lab::test(Peer::WireguardGo, |lab| works_at_each_level(lab, &lab.provider.customers_device()));
}

/// It has offloads of its own, unlike the one of Debian 12.
#[test]
fn each_offload_can_be_missing_with_the_newest_wireguard_go() {
    lab::test(Peer::NewestWireguardGo, |lab| works_at_each_level(lab, &lab.provider.customers_device()));
}

#[test]
fn each_offload_can_be_missing_with_boringtun() {
    lab::test(Peer::Ours, |lab| {
        let (config, _boringtun) = boringtun(lab)?;
        works_at_each_level(lab, &config)
    });
}

#[test]
fn packets_of_any_mtu_pass_with_our_own_peer() {
    lab::test(Peer::Ours, |lab| works_with_each_mtu(lab, &lab.provider.customers_device()));
}

#[test]
fn packets_of_any_mtu_pass_with_wireguard_go() {
    lab::test(Peer::WireguardGo, |lab| works_with_each_mtu(lab, &lab.provider.customers_device()));
}

#[test]
fn packets_of_any_mtu_pass_with_the_newest_wireguard_go() {
    lab::test(Peer::NewestWireguardGo, |lab| works_with_each_mtu(lab, &lab.provider.customers_device()));
}

#[test]
fn packets_of_any_mtu_pass_with_boringtun() {
    lab::test(Peer::Ours, |lab| {
        let (config, _boringtun) = boringtun(lab)?;
        works_with_each_mtu(lab, &config)
    });
}

/// Replaces the provider's WireGuard by boringtun, and returns the client's configuration.
fn boringtun(lab: &Lab) -> Result<(DeviceConfig, Running)> {
    lab.provider.stop()?;
    let (theirs, preshared) = ([2; 32], [5; 32]);
    let mut config = lab.provider.customers_device();
    config.peers[0].public_key = vpn_exec::keys::PrivateKey::from(theirs).public_key();
    config.peers[0].preshared_key = Some(preshared.into());
    let ours = x25519::PublicKey::from(*config.private_key.public_key().as_bytes());
    let mut tunn = Tunn::new(x25519::StaticSecret::from(theirs), ours, Some(preshared), None, 1, None);
    let (tun, socket) = lab.provider.site().run(|| {
        let name = "provider0".parse().map_err(io::Error::other)?;
        let tun: OwnedFd = lab::passing_tun(&name)?;
        let mut netlink = Netlink::open()?;
        let index = netlink.link_index(&name)?;
        let mut requests =
            vec![NetlinkRequest::set_mtu(index, "provider0", 1420), NetlinkRequest::set_up(index, "provider0")];
        let routes = TUNNEL_CLIENT.both().map(|to| NetlinkRequest::add_route(index, "provider0", to.into(), None));
        requests.extend(routes);
        netlink.execute(requests)?;
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PROVIDER_PORT))?;
        socket.set_nonblocking(true)?;
        Ok((tun, socket))
    })?;
    let (mut packet, mut out, mut client) = (vec![0; HEADER + 65_535], vec![0; 66_000], None);
    Ok((
        config,
        Running::start(move || {
            wait_for(&[tun.as_fd(), socket.as_fd()], Some(Duration::from_millis(100)))?;
            while let Ok(length) = rustix::io::read(&tun, &mut *packet) {
                if let (TunnResult::WriteToNetwork(datagram), Some(to)) =
                    (tunn.encapsulate(&packet[HEADER..length], &mut out), client)
                {
                    let _ = socket.send_to(datagram, to);
                }
            }
            while let Ok((length, from)) = socket.recv_from(&mut packet) {
                let mut datagram = &packet[..length];
                loop {
                    match tunn.decapsulate(Some(from.ip()), datagram, &mut out) {
                        TunnResult::WriteToNetwork(answer) => {
                            client = Some(from);
                            let _ = socket.send_to(answer, from);
                            // What waited for the session.
                            datagram = &[];
                        }
                        TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                            client = Some(from);
                            let _ = rustix::io::write(&tun, &[&[0; HEADER], &*packet].concat());
                            break;
                        }
                        TunnResult::Done | TunnResult::Err(_) => break,
                    }
                }
            }
            Ok(())
        }),
    ))
}
