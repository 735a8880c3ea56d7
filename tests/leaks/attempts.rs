//! One attempt by each vector. That it fails is what is hoped for; whether it got anywhere is for the judge to say.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::agent::ARGUMENTS;
use lab::trespass::{bound, packet_send, packetinfo_send, unicast};
use lab::{Addresses, HOST, LAN, PRIVATE_LAN, ROUTER, WEB, dns};
use libc::AF_INET;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, send, sendto, setsockopt, socket,
    sockopt,
};
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::Netlink;

use crate::vectors::{ABSTRACT, AT_ONCE, LEFT_OPEN, Stamp};

pub(crate) const WEB4: IpAddr = IpAddr::V4(WEB.ipv4);
pub(crate) const WEB6: IpAddr = IpAddr::V6(WEB.ipv6);
pub(crate) const LAN4: IpAddr = IpAddr::V4(LAN.ipv4);
pub(crate) const LAN6: IpAddr = IpAddr::V6(LAN.ipv6);
pub(crate) const ROUTER4: IpAddr = IpAddr::V4(ROUTER.ipv4);
pub(crate) const ROUTER6: IpAddr = IpAddr::V6(ROUTER.ipv6);
pub(crate) const HOST4: IpAddr = IpAddr::V4(HOST.ipv4);
pub(crate) const HOST6: IpAddr = IpAddr::V6(HOST.ipv6);
pub(crate) const PRIVATE4: IpAddr = IpAddr::V4(PRIVATE_LAN.ipv4);
pub(crate) const PRIVATE6: IpAddr = IpAddr::V6(PRIVATE_LAN.ipv6);
/// systemd-resolved's, on a host's loopback.
pub(crate) const STUB: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53));

/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_millis(300);

/// How long another program may take: it sends its first question when it has begun, and what comes after is the same.
const RUNS: Duration = Duration::from_millis(1500);

/// Every interface that there may be, inside or outside.
const DEVICES: [&str; 4] = ["host0", "wg0", "eth0", "lan0"];

/// A port where nobody is (RFC 863).
const DISCARD: u16 = 9;

fn any(like: IpAddr) -> SocketAddr {
    let any = if like.is_ipv4() { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    (any, 0).into()
}

pub(crate) fn udp(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    UdpSocket::bind(any(to))?.send_to(&stamp.text(), (to, DISCARD)).map(drop)
}

pub(crate) fn tcp(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&(to, 80).into(), lab::patience(PATIENCE))?;
    stream.set_read_timeout(Some(lab::patience(PATIENCE)))?;
    stream.write_all(&[b"GET /", &stamp.text()[..], b" HTTP/1.1\r\n\r\n"].concat())?;
    stream.read(&mut [0; 100]).map(drop)
}

pub(crate) fn dns_udp(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    dns_udp_at(stamp, to, 53)
}

pub(crate) fn dns_udp_at(stamp: &Stamp, to: IpAddr, port: u16) -> io::Result<()> {
    let socket = UdpSocket::bind(any(to))?;
    socket.set_read_timeout(Some(lab::patience(PATIENCE)))?;
    socket.connect((to, port))?;
    socket.send(&dns::query(&stamp.name(), dns::A)?)?;
    socket.recv(&mut [0; 100]).map(drop)
}

/// A look-up by UDP-Lite (RFC 3828), whose ports rules for UDP do not see.
pub(crate) fn dns_udplite(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};

    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(ipproto::UDPLITE))?;
    let socket = UdpSocket::from(socket);
    socket.connect((to, 53))?;
    socket.send(&dns::query(&stamp.name(), dns::A)?).map(drop)
}

pub(crate) fn dns_tcp(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    dns_tcp_at(stamp, to, 53)
}

pub(crate) fn dns_tcp_at(stamp: &Stamp, to: IpAddr, port: u16) -> io::Result<()> {
    let query = dns::query(&stamp.name(), dns::A)?;
    let mut stream = TcpStream::connect_timeout(&(to, port).into(), lab::patience(PATIENCE))?;
    stream.set_read_timeout(Some(lab::patience(PATIENCE)))?;
    stream.write_all(&[&(query.len() as u16).to_be_bytes()[..], &query].concat())?;
    stream.read(&mut [0; 100]).map(drop)
}

/// The host's address on the link to it: the other one of the two that there are. On the host itself, its loopback.
pub(crate) fn gateway(family: i32) -> io::Result<IpAddr> {
    let mut netlink = Netlink::open()?;
    let Some(link) = netlink.link("host0")? else {
        return Ok(if family == AF_INET { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
    };
    let of_link = netlink.addresses()?.into_iter().filter(|(index, _)| *index == link.index).map(|(_, net)| net);
    let mut pairs = of_link.filter(|net| net.prefix_len() + 1 == net.max_prefix_len()).map(|net| net.addr());
    let own = pairs.find(|address| address.is_ipv4() == (family == AF_INET));
    Ok(match own.ok_or(io::ErrorKind::NotFound)? {
        IpAddr::V4(own) => Ipv4Addr::from_bits(own.to_bits() ^ 1).into(),
        IpAddr::V6(own) => Ipv6Addr::from_bits(own.to_bits() ^ 1).into(),
    })
}

/// Runs another program, for a while.
fn run(command: &mut Command) -> io::Result<()> {
    // One look-up is soon over, whoever does not answer.
    command.env("RES_OPTIONS", "timeout:1 attempts:1");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let deadline = Instant::now() + lab::patience(RUNS);
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

pub(crate) fn getent(stamp: &Stamp) -> io::Result<()> {
    run(Command::new("getent").args(["ahosts", &stamp.name()]))
}

pub(crate) fn python(stamp: &Stamp) -> io::Result<()> {
    // Debian's own before one of the user's that may take its time.
    let debians = "/usr/bin/python3";
    let python = if Path::new(debians).exists() { debians } else { "python3" };
    let script = "import socket, sys; socket.getaddrinfo(sys.argv[1], 80)";
    run(Command::new(python).args(["-I", "-S", "-c", script, &stamp.name()]))
}

pub(crate) fn curl(stamp: &Stamp) -> io::Result<()> {
    run(Command::new("curl").args(["--silent", "--max-time", "3", &format!("http://{}/", stamp.name())]))
}

/// Tells somebody who listens at a path below `/run` or `/var/run`, and waits for an answer.
fn tell(path: &str, messages: &[&[u8]]) -> io::Result<()> {
    let stream = UnixStream::connect(Path::new("/run").join(path));
    converse(stream.or_else(|_| UnixStream::connect(Path::new("/var/run").join(path)))?, messages)
}

fn converse(mut stream: UnixStream, messages: &[&[u8]]) -> io::Result<()> {
    stream.set_read_timeout(Some(lab::patience(PATIENCE)))?;
    for message in messages {
        stream.write_all(message)?;
        let _ = stream.read(&mut [0; 1000])?;
    }
    Ok(())
}

/// A question for addresses in the protocol of the C library (glibc's nscd/nscd-client.h).
pub(crate) fn nscd(stamp: &Stamp) -> io::Result<()> {
    tell("nscd/socket", &[&nscd_question(stamp)])
}

fn nscd_question(stamp: &Stamp) -> Vec<u8> {
    const VERSION: u32 = 2;
    const GETAI: u32 = 14;
    let name = [stamp.name().as_bytes(), b"\0"].concat();
    let header = [VERSION, GETAI, name.len() as u32].map(u32::to_ne_bytes).concat();
    [header, name].concat()
}

/// Looks for the socket as every other process sees it, the host's among them.
pub(crate) fn nscd_of_others(stamp: &Stamp) -> io::Result<()> {
    let mut last = Err(io::ErrorKind::NotFound.into());
    for entry in std::fs::read_dir("/proc")?.flatten() {
        match UnixStream::connect(entry.path().join("root/run/nscd/socket")) {
            Ok(stream) => return converse(stream, &[&nscd_question(stamp)]),
            Err(error) => last = Err(error),
        }
    }
    last
}

pub(crate) fn varlink(stamp: &Stamp) -> io::Result<()> {
    let call = format!(
        r#"{{"method":"io.systemd.Resolve.ResolveHostname","parameters":{{"name":"{}","family":2,"flags":0}}}}"#,
        stamp.name()
    );
    tell("systemd/resolve/io.systemd.Resolve", &[&[call.as_bytes(), b"\0"].concat()])
}

pub(crate) fn dbus(stamp: &Stamp) -> io::Result<()> {
    // The number of the user, as text, in hexadecimal digits.
    let user: String = nix::unistd::getuid().to_string().bytes().map(|byte| format!("{byte:02x}")).collect();
    let manager = "org.freedesktop.resolve1";
    let hello = dbus_call(1, "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello", "", &[]);
    let mut body = 0_i32.to_le_bytes().to_vec();
    dbus_string(&mut body, &stamp.name());
    body.resize(body.len().next_multiple_of(4), 0);
    body.extend(2_i32.to_le_bytes());
    body.resize(body.len().next_multiple_of(8), 0);
    body.extend(0_u64.to_le_bytes());
    let path = "/org/freedesktop/resolve1";
    let resolve = dbus_call(2, manager, path, "org.freedesktop.resolve1.Manager", "ResolveHostname", "isit", &body);
    let authentication = format!("\0AUTH EXTERNAL {user}\r\n");
    tell("dbus/system_bus_socket", &[authentication.as_bytes(), &[b"BEGIN\r\n", &hello[..]].concat(), &resolve])
}

fn dbus_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u32).to_le_bytes());
    bytes.extend(text.bytes());
    bytes.push(0);
}

/// A method call in D-Bus's wire format.
fn dbus_call(
    serial: u32,
    to: &str,
    path: &str,
    interface: &str,
    member: &str,
    signature: &str,
    body: &[u8],
) -> Vec<u8> {
    let mut fields = Vec::new();
    for (code, kind, text) in [(1, b'o', path), (2, b's', interface), (3, b's', member), (6, b's', to)] {
        fields.resize(fields.len().next_multiple_of(8), 0);
        fields.extend([code, 1, kind, 0]);
        dbus_string(&mut fields, text);
    }
    if !signature.is_empty() {
        fields.resize(fields.len().next_multiple_of(8), 0);
        fields.extend([8, 1, b'g', 0, signature.len() as u8]);
        fields.extend(signature.bytes());
        fields.push(0);
    }
    let mut call = vec![b'l', 1, 0, 1];
    call.extend((body.len() as u32).to_le_bytes());
    call.extend(serial.to_le_bytes());
    call.extend((fields.len() as u32).to_le_bytes());
    call.extend(fields);
    call.resize(call.len().next_multiple_of(8), 0);
    call.extend(body);
    call
}

pub(crate) fn avahi(stamp: &Stamp) -> io::Result<()> {
    tell("avahi-daemon/socket", &[format!("RESOLVE-HOSTNAME {}\n", stamp.name()).as_bytes()])
}

/// A server that runs what it is told, as tmux's does, at a socket that is in no directory which is copied.
pub(crate) fn server(stamp: &Stamp) -> io::Result<()> {
    tell("leaks/server", &[&stamp.text()])
}

pub(crate) fn server_by_link(stamp: &Stamp) -> io::Result<()> {
    converse(UnixStream::connect("/proc/self/root/run/leaks/server")?, &[&stamp.text()])
}

/// A container engine's daemon.
pub(crate) fn engine(stamp: &Stamp) -> io::Result<()> {
    tell("docker.sock", &[&stamp.text()])
}

/// The user's own bus, past the filter that the environment names.
pub(crate) fn session_bus(stamp: &Stamp) -> io::Result<()> {
    tell("user/0/bus", &[format!("\0AUTH EXTERNAL 30\r\n{}", stamp.name()).as_bytes()])
}

pub(crate) fn abstract_socket(stamp: &Stamp) -> io::Result<()> {
    let address = std::os::unix::net::SocketAddr::from_abstract_name(ABSTRACT)?;
    UnixStream::connect_addr(&address)?.write_all(&stamp.text())
}

/// Multicast and broadcast: as the routes have it, and by each device.
fn to_all(text: &[u8], to: &str) -> io::Result<()> {
    let to: SocketAddr = to.parse().map_err(io::Error::other)?;
    let call = |socket: io::Result<UdpSocket>| {
        let socket = socket?;
        socket.set_broadcast(true)?;
        socket.send_to(text, to).map(drop)
    };
    let sent = DEVICES.map(|device| call(bound(device, to, SockType::Datagram).map(UdpSocket::from)));
    call(UdpSocket::bind(any(to.ip()))).or(sent.into_iter().find(Result::is_ok).unwrap_or(Ok(())))
}

pub(crate) fn question_to_all(stamp: &Stamp, to: &str) -> io::Result<()> {
    to_all(&dns::query(&stamp.name(), dns::A)?, to)
}

pub(crate) fn call_to_all(stamp: &Stamp, to: &str) -> io::Result<()> {
    to_all(&stamp.text(), to)
}

/// Tries something with each device; it has succeeded if it has once.
fn with_each_device(one: impl Fn(&str) -> io::Result<()>) -> io::Result<()> {
    let mut last = Err(io::ErrorKind::NotFound.into());
    for device in DEVICES {
        match one(device) {
            Ok(()) => last = Ok(()),
            Err(error) if last.is_err() => last = Err(error),
            Err(_) => {}
        }
    }
    last
}

pub(crate) fn by_each_device(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    let to = SocketAddr::new(to, DISCARD);
    with_each_device(|device| {
        UdpSocket::from(bound(device, to, SockType::Datagram)?).send_to(&stamp.text(), to).map(drop)
    })
}

pub(crate) fn packet_information(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    with_each_device(|device| packetinfo_send(device, (to, DISCARD).into(), &stamp.text()).map(drop))
}

pub(crate) fn unicast_interface(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    let to = SocketAddr::new(to, DISCARD);
    with_each_device(|device| unicast(device, to)?.send_to(&stamp.text(), to).map(drop))
}

pub(crate) fn unrouted(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    let socket = UdpSocket::bind(any(to))?;
    setsockopt(&socket, sockopt::DontRoute, &true)?;
    socket.send_to(&stamp.text(), (to, DISCARD)).map(drop)
}

/// Asks for an echo by a socket as ping(8) has it, which takes no privilege (icmp(7)).
fn ping(family: AddressFamily, protocol: SockProtocol, kind: u8, stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol)?;
    let packet = [&[kind, 0, 0, 0, 0, 1, 0, 1][..], &stamp.text()].concat();
    Ok(sendto(socket.as_raw_fd(), &packet, &SockaddrStorage::from(SocketAddr::new(to, 0)), MsgFlags::empty())
        .map(drop)?)
}

pub(crate) fn ping4(stamp: &Stamp) -> io::Result<()> {
    ping(AddressFamily::Inet, SockProtocol::Icmp, 8, stamp, WEB4)
}

pub(crate) fn ping6(stamp: &Stamp) -> io::Result<()> {
    ping(AddressFamily::Inet6, SockProtocol::IcmpV6, 128, stamp, WEB6)
}

/// A UDP packet with all its headers, and no checksum over the payload.
fn packet_to(to: Addresses, ipv6: bool, stamp: &Stamp) -> Vec<u8> {
    let text = stamp.text();
    let udp_length = (8 + text.len()) as u16;
    let ports = [DISCARD.to_be_bytes(), DISCARD.to_be_bytes(), udp_length.to_be_bytes(), [0, 0]].concat();
    let header = if ipv6 {
        let begin = [&[0x60, 0, 0, 0][..], &udp_length.to_be_bytes(), &[libc::IPPROTO_UDP as u8, 64]].concat();
        [begin, HOST.ipv6.octets().to_vec(), to.ipv6.octets().to_vec()].concat()
    } else {
        let length = (28 + text.len()) as u16;
        let begin = [&[0x45, 0][..], &length.to_be_bytes(), &[0, 0, 0, 0, 64, libc::IPPROTO_UDP as u8, 0, 0]].concat();
        let mut header = [begin, HOST.ipv4.octets().to_vec(), to.ipv4.octets().to_vec()].concat();
        let sum: u32 = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header
    };
    [header, ports, text].concat()
}

/// Sends by a raw socket, as the routes have it and by each device.
fn raw(family: AddressFamily, protocol: SockProtocol, packet: &[u8], to: IpAddr) -> io::Result<()> {
    let to = SockaddrStorage::from(SocketAddr::new(to, 0));
    let send = |device: Option<&str>| -> io::Result<()> {
        let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        if let Some(device) = device {
            setsockopt(&socket, sockopt::BindToDevice, &device.into())?;
        }
        Ok(sendto(socket.as_raw_fd(), packet, &to, MsgFlags::empty()).map(drop)?)
    };
    let plainly = send(None);
    with_each_device(|device| send(Some(device))).or(plainly)
}

pub(crate) fn raw4(stamp: &Stamp) -> io::Result<()> {
    raw(AddressFamily::Inet, SockProtocol::Raw, &packet_to(WEB, false, stamp), WEB4)
}

pub(crate) fn raw6(stamp: &Stamp) -> io::Result<()> {
    raw(AddressFamily::Inet6, SockProtocol::Raw, &packet_to(WEB, true, stamp), WEB6)
}

/// Asks all routers on the link to say who they are (RFC 4861 section 4.1).
pub(crate) fn router_solicitation(stamp: &Stamp) -> io::Result<()> {
    let mut option = vec![253, 0];
    option.extend(stamp.text());
    option.resize(option.len().next_multiple_of(8), 0);
    option[1] = (option.len() / 8) as u8;
    let packet = [&[133, 0, 0, 0, 0, 0, 0, 0][..], &option].concat();
    let all_routers = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
    raw(AddressFamily::Inet6, SockProtocol::IcmpV6, &packet, all_routers.into())
}

pub(crate) fn packet(stamp: &Stamp) -> io::Result<()> {
    with_each_device(|device| packet_send(device, &packet_to(WEB, false, stamp)))
}

pub(crate) fn io_uring(stamp: &Stamp) -> io::Result<()> {
    lab::send_by_io_uring((WEB4, DISCARD).into(), &stamp.text())
}

pub(crate) fn inherited(stamp: &Stamp) -> io::Result<()> {
    let number: Option<RawFd> = std::env::var(LEFT_OPEN).ok().and_then(|number| number.parse().ok());
    Ok(send(number.ok_or(io::ErrorKind::NotFound)?, &stamp.text(), MsgFlags::MSG_NOSIGNAL).map(drop)?)
}

/// Goes where the world's first process is, which is on the host, and sends there.
pub(crate) fn join_host(stamp: &Stamp) -> io::Result<()> {
    let host = NetworkNamespace::from(std::os::fd::OwnedFd::from(std::fs::File::open("/proc/1/ns/net")?));
    host.run(|| udp(stamp, WEB4))
}

/// In a user namespace of its own a program has all capabilities. Another copy of this one tries there what takes some, and sends
/// then, wherever it has got to.
pub(crate) fn user_namespace(stamp: &Stamp) -> io::Result<()> {
    let mut command = Command::new("unshare");
    command.args(["--user", "--keep-caps"]).arg(std::env::current_exe()?).args(ARGUMENTS);
    command.env_remove(AT_ONCE);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let mut orders = child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
    for vector in ["join-host", "raw4", "raw6", "packet", "udp4-internet"] {
        writeln!(orders, "stamped {vector} {}", stamp.label)?;
    }
    drop(orders);
    child.wait().map(drop)
}
