//! A closed pod: what programs in it try to send past its rules, without capabilities and with CAP_NET_RAW, and judged
//! at the host's end of its interface. There is no tunnel, so each packet to the Internet is a leak.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::launcher::errors_of;
use lab::{CLUSTER_SERVICE, Lab, POD, POD_GATEWAY, PROVIDER, Packet, Peer, Pod, Reach, WEB};
use nix::sys::socket::sockopt::BindToDevice;
use rustix::net::{AddressFamily, SocketType, sockopt};
use vpn_exec::config::{self, Config, Endpoint, Interface, WgQuick};
use vpn_exec::keys::{PrivateKey, PublicKey};
use vpn_exec::linux::capabilities::{self, CapabilitySet};
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::linux::nftables::Nftables;
use vpn_exec::plan::RULES_TABLE;
use vpn_exec::plan::shared_namespace::{Placement, SharedNamespaceFacts, SharedNamespacePlan, interface, plan};
use vpn_exec::tunnel::shared_namespace;

use crate::support::sidecar_runs;

/// The time in which a packet arrives that arrives at all.
const PATIENCE: Duration = Duration::from_secs(5);

/// A port on which no server listens.
const PORT: u16 = 7777;

/// The payload of packets that must not leave the pod.
const SECRET: &[u8] = b"a packet that must not leave";

/// Closes a pod as `vpn-exec attach --closed` does.
fn close(pod: &Pod) -> Result<SharedNamespacePlan> {
    let wireguard = WgQuick {
        interface: Interface {
            private_key: Some(PrivateKey::from([0x42; 32])),
            addresses: vec!["10.66.1.2/32".parse()?, "fc00:bbbb::2/128".parse()?],
            dns_servers: vec!["10.64.0.1".parse()?],
            ..Interface::default()
        },
        peers: vec![config::Peer {
            public_key: PublicKey::from([7; 32]),
            preshared_key: None,
            allowed_ips: vec!["0.0.0.0/0".parse()?, "::/0".parse()?],
            endpoint: Some(Endpoint::Address { address: (PROVIDER.ipv4, 51820).into(), zone: None }),
            persistent_keepalive: None,
        }],
    };
    let mut config = Config::new("closed".parse()?, wireguard);
    config.local.networks = vec!["10.43.0.0/24".parse()?, "fd2b::/64".parse()?];
    let plan = pod.namespace.run(|| {
        let (mut netlink, mut rules) = (Netlink::open()?, Nftables::open()?);
        let addresses = shared_namespace::container_addresses(&mut netlink, &interface())?;
        let facts = SharedNamespaceFacts { addresses, ..SharedNamespaceFacts::default() };
        let placement = Placement::Attached { endpoints: Vec::new(), resolvers: Vec::new(), nameservers: Vec::new() };
        let plan = plan(&config, &facts, placement).map_err(|errors| io::Error::other(errors.to_string()))?;
        shared_namespace::close(&mut netlink, &mut rules, &plan, "vpn-exec", |_| ())
            .map_err(|error| io::Error::other(error.to_string()))?;
        Ok(plan)
    })?;
    Ok(plan)
}

/// Undoes [`close`].
fn reopen(pod: &Pod, plan: &SharedNamespacePlan) -> Result<()> {
    pod.namespace.run(|| {
        Netlink::open()?.execute(plan.routing_rules.iter().map(NetlinkRequest::delete_rule).collect())?;
        Nftables::open()?.delete(RULES_TABLE)
    })?;
    Ok(())
}

/// Runs a part of a program in the pod, on a thread with these capabilities.
fn inside<T: Send>(pod: &Pod, kept: CapabilitySet, program: impl FnOnce() -> io::Result<T> + Send) -> Result<T> {
    Ok(pod.namespace.run(|| {
        capabilities::limit(kept, kept)?;
        program()
    })?)
}

/// Returns the packets with [`SECRET`] that have left the pod.
fn leaked(lab: &Lab) -> Result<Vec<Packet>> {
    let index = lab.host.run(|| Netlink::open()?.link_index(&"pod0".parse().expect("a name")))?;
    let mut packets = lab.capture.on(index)?;
    packets.retain(|it| !it.outgoing && it.flow.as_ref().is_some_and(|flow| flow.payload.starts_with(SECRET)));
    Ok(packets)
}

fn expect_none(lab: &Lab, what: &str) -> Result<()> {
    let leaked = leaked(lab)?;
    ensure!(leaked.is_empty(), "{what}: {leaked:#?}");
    Ok(())
}

/// Makes the connection tracker of the pod believe that `far` has sent a datagram to `near`, by sending it over `lo`.
/// IPv6 needs no capability for this (`IPV6_FREEBIND` of linux/in6.h), IPv4 a raw socket.
fn pretend_inbound(far: SocketAddr, near: SocketAddr) -> io::Result<()> {
    match (far, near) {
        (SocketAddr::V6(_), _) => {
            let socket = rustix::net::socket(AddressFamily::INET6, SocketType::DGRAM, None)?;
            sockopt::set_ipv6_freebind(&socket, true)?;
            rustix::net::bind(&socket, &far)?;
            rustix::net::sendto(&socket, b"hello", rustix::net::SendFlags::empty(), &near)?;
        }
        (SocketAddr::V4(far), SocketAddr::V4(near)) => {
            let raw = rustix::net::RawProtocol::new(255).map(rustix::net::Protocol::from_raw);
            let socket = rustix::net::socket(AddressFamily::INET, SocketType::RAW, raw)?;
            let mut packet = vec![0x45, 0, 0, 33, 0, 0, 0, 0, 64, 17, 0, 0];
            packet.extend(far.ip().octets());
            packet.extend(near.ip().octets());
            for number in [far.port(), near.port(), 13, 0] {
                packet.extend(number.to_be_bytes());
            }
            packet.extend(b"hello");
            rustix::net::sendto(&socket, &packet, rustix::net::SendFlags::empty(), &near)?;
        }
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    }
    Ok(())
}

/// Local networks are reached from the pod's own addresses alone: they would answer to any other on the Internet.
#[test]
fn local_networks_see_no_foreign_source() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        close(&pod)?;
        let service = SocketAddr::new(CLUSTER_SERVICE.ipv6.into(), PORT);
        let sent = inside(&pod, CapabilitySet::empty(), || {
            let socket = rustix::net::socket(AddressFamily::INET6, SocketType::DGRAM, None)?;
            sockopt::set_ipv6_freebind(&socket, true)?;
            rustix::net::bind(&socket, &SocketAddr::new(WEB.ipv6.into(), PORT))?;
            Ok(rustix::net::sendto(&socket, SECRET, rustix::net::SendFlags::empty(), &service))
        })?;
        expect_none(lab, "a datagram in the name of another host")?;
        ensure!(sent.is_err(), "the rules drop it: {sent:?}");
        inside(&pod, CapabilitySet::empty(), || UdpSocket::bind("[::]:0")?.send_to(SECRET, service))?;
        lab::wait_until(PATIENCE, "the pod's own datagram does not arrive", || Ok(leaked(lab)?.len() == 1))
    });
}

/// A "reply" to a datagram that the pod itself has sent in the name of another host does not leave.
#[test]
fn replies_answer_other_hosts_alone() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        close(&pod)?;
        let ends = [(WEB.ipv6.into(), POD.ipv6.into()), (WEB.ipv4.into(), POD.ipv4.into())];
        for ((far, near), kept) in ends.into_iter().zip([CapabilitySet::empty(), CapabilitySet::NET_RAW]) {
            let (far, near): (IpAddr, IpAddr) = (far, near);
            let (far, near) = (SocketAddr::new(far, PORT), SocketAddr::new(near, PORT));
            inside(&pod, kept, || {
                let socket = UdpSocket::bind(near)?;
                socket.set_read_timeout(Some(PATIENCE))?;
                pretend_inbound(far, near)?;
                let (_, from) = socket.recv_from(&mut [0; 16])?;
                assert_eq!(from, far, "the datagram came over the loopback interface");
                // By the pod's own routes, and bound to the interface.
                let _ = socket.send_to(SECRET, far);
                nix::sys::socket::setsockopt(&socket, BindToDevice, &"eth0".into())?;
                let _ = socket.send_to(SECRET, far);
                Ok(())
            })?;
            expect_none(lab, "a reply to the pod itself")?;
        }
        Ok(())
    });
}

/// TCP connections to the Internet from before the pod was closed do not go on, though the other end sends and the
/// kernel cannot end them.
#[test]
fn tcp_connections_from_before_do_not_go_on() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        for to in WEB.both() {
            let to = SocketAddr::new(to, PORT);
            let listener = lab.web_site.run(|| TcpListener::bind(to))?;
            let mut stream = inside(&pod, CapabilitySet::empty(), || TcpStream::connect_timeout(&to, PATIENCE))?;
            let (mut accepted, _) = listener.accept()?;
            let plan = close(&pod)?;
            for _ in 0..3 {
                // The first packet of the pod's end that is dropped resets it.
                let _ = accepted.write_all(b"hello");
                std::thread::sleep(Duration::from_millis(50));
                let _ = stream.write_all(SECRET);
            }
            std::thread::sleep(Duration::from_millis(300));
            expect_none(lab, "a connection from before")?;
            let error =
                stream.take_error()?.or_else(|| stream.write_all(SECRET).err()).context("the connection goes on")?;
            ensure!([io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe].contains(&error.kind()), "{error}");
            reopen(&pod, &plan)?;
        }
        Ok(())
    });
}

/// A connection that would leave by the pod's interface is refused at once, in either family.
#[test]
fn connections_past_the_tunnel_are_refused_at_once() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        close(&pod)?;
        for (near, far) in POD.both().into_iter().zip(WEB.both()) {
            let family = if near.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
            let refused = inside(&pod, CapabilitySet::empty(), || {
                let socket = rustix::net::socket(family, SocketType::STREAM, None)?;
                sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(Duration::from_secs(20)))?;
                rustix::net::bind(&socket, &SocketAddr::new(near, 0))?;
                Ok(rustix::net::connect(&socket, &SocketAddr::new(far, 80)))
            })?;
            ensure!(refused == Err(rustix::io::Errno::CONNREFUSED), "{far}: {refused:?}");
        }
        let index = lab.host.run(|| Netlink::open()?.link_index(&"pod0".parse().expect("a name")))?;
        let far = WEB.both();
        let is_far = |packet: &Packet| packet.flow.as_ref().is_some_and(|flow| far.contains(&flow.destination.ip()));
        let leaked: Vec<Packet> = lab.capture.on(index)?.into_iter().filter(is_far).collect();
        ensure!(leaked.is_empty(), "{leaked:#?}");
        Ok(())
    });
}

/// Neighbor discovery stays on the link, also if a program with CAP_NET_RAW writes its packets.
#[test]
fn neighbor_discovery_carries_nothing_to_the_internet() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        close(&pod)?;
        let send = |kind: u8, hops: u8, to: IpAddr| {
            inside(&pod, CapabilitySet::NET_RAW, || {
                let socket =
                    rustix::net::socket(AddressFamily::INET6, SocketType::RAW, Some(rustix::net::ipproto::ICMPV6))?;
                sockopt::set_ipv6_unicast_hops(&socket, Some(hops))?;
                sockopt::set_ipv6_multicast_hops(&socket, hops.into())?;
                rustix::net::bind(&socket, &SocketAddr::new(POD.ipv6.into(), 0))?;
                let packet = [&[kind, 0, 0, 0, 0, 0, 0, 0], SECRET].concat();
                Ok(rustix::net::sendto(&socket, &packet, rustix::net::SendFlags::empty(), &SocketAddr::new(to, 0))
                    .is_ok())
            })
        };
        let (far, gateway) = (IpAddr::from(WEB.ipv6), IpAddr::from(POD_GATEWAY.ipv6));
        let routers = "ff02::2".parse()?;
        // The types of router and neighbor solicitation, of a neighbor advertisement, and of an echo request.
        for (kind, hops, to, passes) in [
            (133, 255, far, false),
            (133, 255, routers, true),
            (133, 64, routers, false),
            (135, 64, far, false),
            (135, 64, gateway, false),
            (135, 255, gateway, true),
            (136, 254, far, false),
            (136, 255, gateway, true),
            (128, 255, far, false),
        ] {
            ensure!(send(kind, hops, to)? == passes, "type {kind} with the hop limit {hops} to {to}");
        }
        Ok(())
    });
}

/// Sockets from before the pod was closed are ended, except those that stay in it or in local networks. The twin shows
/// that the rules alone would not be enough.
#[test]
fn datagrams_of_sockets_from_before_do_not_leave() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        for (is_ended, to) in [(false, WEB.ipv4.into()), (true, WEB.ipv4.into()), (true, IpAddr::from(WEB.ipv6))] {
            let to = SocketAddr::new(to, PORT);
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let (listener, remote) = lab.web_site.run(|| Ok((TcpListener::bind(to)?, UdpSocket::bind(to)?)))?;
            remote.set_read_timeout(Some(PATIENCE))?;
            let service = SocketAddr::new(CLUSTER_SERVICE.ipv4.into(), 80);
            let (stream, mut local, connected, free, server) = inside(&pod, CapabilitySet::empty(), || {
                let (connected, free) = (UdpSocket::bind(any)?, UdpSocket::bind(any)?);
                connected.connect(to)?;
                connected.send(b"hello")?;
                free.send_to(b"hello", to)?;
                let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
                let local = TcpStream::connect_timeout(&service, PATIENCE)?;
                Ok((stream, local, connected, free, UdpSocket::bind(SocketAddr::new(POD.ipv4.into(), PORT))?))
            })?;
            let (_accepted, _) = listener.accept()?;
            let mut from = [remote.recv_from(&mut [0; 16])?.1, remote.recv_from(&mut [0; 16])?.1];
            from.sort_unstable();
            let plan = close(&pod)?;
            if is_ended {
                let ended = pod.namespace.run(|| shared_namespace::end_connections(&mut Netlink::open()?, &plan))?;
                ensure!(ended == 3, "{ended}");
                let error = stream.take_error()?.context("the connection has ended")?;
                ensure!(error.kind() == io::ErrorKind::ConnectionAborted, "{error}");
            }
            for _ in 0..3 {
                for from in from {
                    remote.send_to(b"hello", from)?;
                }
                std::thread::sleep(Duration::from_millis(50));
                let _ = (connected.send(SECRET), connected.send_to(SECRET, to), free.send_to(SECRET, to));
            }
            let leaked = leaked(lab)?.len();
            ensure!(is_ended == (leaked == 0), "{leaked} packets; ended: {is_ended}");
            lab.capture.forget()?;
            // The rest is untouched.
            local.set_read_timeout(Some(PATIENCE))?;
            ensure!(server.take_error()?.is_none() && local.take_error()?.is_none());
            reopen(&pod, &plan)?;
            local.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            ensure!(local.read(&mut [0; 16])? > 0, "the local connection goes on");
        }
        Ok(())
    });
}

/// The command ends the connections of programs that ran before, but only when it closes the namespace.
#[test]
fn attaching_ends_connections_from_before_once() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let attach = || sidecar_runs(&pod, &["attach", file.to_str().context("a path")?, "--closed"]);
        let to = SocketAddr::new(WEB.ipv4.into(), PORT);
        let remote = lab.web_site.run(|| UdpSocket::bind(to))?;
        let socket = inside(&pod, CapabilitySet::empty(), || {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(to)?;
            socket.send(b"hello")?;
            Ok(socket)
        })?;
        let (_, from) = remote.recv_from(&mut [0; 16])?;
        let output = attach()?;
        let text = errors_of(&output);
        ensure!(output.status.success() && text.contains("programs that ran here before (1)"), "{text}");
        remote.send_to(b"hello", from)?;
        std::thread::sleep(Duration::from_millis(100));
        let _ = (socket.send(SECRET), socket.send_to(SECRET, to));
        expect_none(lab, "a datagram of a socket from before")?;

        // A server's connection stays when the command is repeated.
        let server = pod.namespace.run(|| UdpSocket::bind("0.0.0.0:0"))?;
        let text = errors_of(&attach()?);
        ensure!(server.take_error()?.is_none() && !text.contains("ran here before"), "{text}");
        Ok(())
    });
}

/// A datagram from a resolver's port opens no way for queries to it: it may be the answer to one from before.
#[test]
fn queries_do_not_pass_as_replies() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        close(&pod)?;
        for (resolver, near) in WEB.both().into_iter().zip(POD.both()) {
            for port in [53, 853, 5353] {
                let (far, near) = (SocketAddr::new(resolver, port), SocketAddr::new(near, PORT));
                let socket = pod.namespace.run(|| UdpSocket::bind(near))?;
                socket.set_read_timeout(Some(PATIENCE))?;
                let answering = lab.web_site.run(|| UdpSocket::bind(far))?;
                answering.send_to(b"answer", near)?;
                let (_, from) = socket.recv_from(&mut [0; 16]).context("an inbound datagram")?;
                let _ = socket.send_to(SECRET, from);
            }
            expect_none(lab, "a query as a reply")?;
        }
        Ok(())
    });
}

/// Docker's resolver listens on a loopback address of the container, and asks the host's resolvers.
#[test]
fn dockers_resolver_is_not_asked() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let resolver: SocketAddr = "127.0.0.11:53".parse()?;
        let (udp, tcp) = pod.namespace.run(|| Ok((UdpSocket::bind(resolver)?, TcpListener::bind(resolver)?)))?;
        udp.set_nonblocking(true)?;
        let ask = || {
            inside(&pod, CapabilitySet::empty(), || {
                let sent = UdpSocket::bind("127.0.0.1:0")?.send_to(SECRET, resolver).is_ok();
                Ok((sent, TcpStream::connect_timeout(&resolver, Duration::from_millis(500)).is_ok()))
            })
        };
        ensure!(ask()? == (true, true) && udp.recv(&mut [0; 64]).is_ok(), "the twin: before the pod is closed");
        close(&pod)?;
        ensure!(ask()? == (false, false) && udp.recv(&mut [0; 64]).is_err());
        drop(tcp);
        Ok(())
    });
}

/// The pod serves clients on the Internet and in the cluster, and reaches the cluster: the judge can see packets.
#[test]
fn a_closed_pod_serves_and_reaches_the_cluster() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        close(&pod)?;
        for (near, far) in POD.both().into_iter().zip(CLUSTER_SERVICE.both()) {
            let near = SocketAddr::new(near, PORT);
            let (tcp, udp) = pod.namespace.run(|| Ok((TcpListener::bind(near)?, UdpSocket::bind(near)?)))?;
            udp.set_read_timeout(Some(PATIENCE))?;
            lab.web_site.run(|| {
                let mut stream = TcpStream::connect_timeout(&near, PATIENCE)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                let (mut accepted, _) = tcp.accept()?;
                accepted.write_all(SECRET)?;
                let mut buffer = vec![0; SECRET.len()];
                stream.read_exact(&mut buffer)?;
                stream.write_all(b"more")?;
                accepted.read_exact(&mut buffer[..4])?;
                let client = UdpSocket::bind(if near.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
                client.set_read_timeout(Some(PATIENCE))?;
                client.send_to(b"hello", near)?;
                let (_, from) = udp.recv_from(&mut buffer)?;
                udp.send_to(SECRET, from)?;
                client.recv_from(&mut buffer)?;
                Ok(())
            })?;
            ensure!(leaked(lab)?.len() >= 2, "the judge sees the replies");
            inside(&pod, CapabilitySet::empty(), || TcpStream::connect_timeout(&SocketAddr::new(far, 80), PATIENCE))
                .context("a service of the cluster")?;
        }
        Ok(())
    });
}
