//! One attempt by each vector. The tests hope that it fails; the judge of the leak tests decides whether it got
//! anywhere.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use libc::AF_INET;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, send, sendto, setsockopt, socket,
    sockopt,
};
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::Netlink;

use crate::dns_client;
use crate::shared::addresses::{Addresses, CLUSTER_RESOLVER, HOST, LAN, PRIVATE_LAN, ROUTER, WEB};
use crate::shared::patience::patience;
use crate::shared::sending::{INTERFACES, bound};
use crate::shared::stamp::{ABSTRACT_SOCKET, Stamp};
use crate::shared::variables;
use crate::syscalls::send_by_io_uring;
use crate::trespass::{packet_send, packetinfo_send, unicast};

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
pub(crate) const CLUSTER4: IpAddr = IpAddr::V4(CLUSTER_RESOLVER.ipv4);
pub(crate) const CLUSTER6: IpAddr = IpAddr::V6(CLUSTER_RESOLVER.ipv6);
/// The stub resolver of systemd-resolved, on a host's loopback interface.
pub(crate) const STUB: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53));

/// The time for which an attempt waits for an answer.
const PATIENCE: Duration = Duration::from_millis(300);

/// The time that another program may take. It sends its first question at its start, and then repeats it.
const RUNTIME: Duration = Duration::from_millis(1500);

/// The discard port (RFC 863), on which no process listens.
const DISCARD: u16 = 9;

fn any(like: IpAddr) -> SocketAddr {
    let any = if like.is_ipv4() { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    (any, 0).into()
}

pub(crate) fn udp(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    UdpSocket::bind(any(to))?.send_to(&stamp.payload(), (to, DISCARD)).map(drop)
}

pub(crate) fn tcp(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&(to, 80).into(), patience(PATIENCE))?;
    stream.set_read_timeout(Some(patience(PATIENCE)))?;
    stream.write_all(&[b"GET /", &stamp.payload()[..], b" HTTP/1.1\r\n\r\n"].concat())?;
    stream.read(&mut [0; 100]).map(drop)
}

pub(crate) fn dns_udp(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    dns_udp_at(stamp, to, 53)
}

pub(crate) fn dns_udp_at(stamp: &Stamp, to: IpAddr, port: u16) -> io::Result<()> {
    let socket = UdpSocket::bind(any(to))?;
    socket.set_read_timeout(Some(patience(PATIENCE)))?;
    socket.connect((to, port))?;
    socket.send(&dns_client::query(&stamp.host_name())?)?;
    socket.recv(&mut [0; 100]).map(drop)
}

/// Asks by UDP-Lite (RFC 3828), whose ports the rules for UDP do not match.
pub(crate) fn dns_udplite(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};

    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(ipproto::UDPLITE))?;
    let socket = UdpSocket::from(socket);
    socket.connect((to, 53))?;
    socket.send(&dns_client::query(&stamp.host_name())?).map(drop)
}

pub(crate) fn dns_tcp(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    dns_tcp_at(stamp, to, 53)
}

pub(crate) fn dns_tcp_at(stamp: &Stamp, to: IpAddr, port: u16) -> io::Result<()> {
    let query = dns_client::query(&stamp.host_name())?;
    let mut stream = TcpStream::connect_timeout(&(to, port).into(), patience(PATIENCE))?;
    stream.set_read_timeout(Some(patience(PATIENCE)))?;
    stream.write_all(&[&(query.len() as u16).to_be_bytes()[..], &query].concat())?;
    stream.read(&mut [0; 100]).map(drop)
}

/// Returns the host's address on the veth: the other address of the link's network of two, or the default gateway of a
/// pod or container. On the host itself, returns the loopback address.
pub(crate) fn gateway(family: i32) -> io::Result<IpAddr> {
    let mut netlink = Netlink::open()?;
    if let Some(gateway) = container_gateway(&mut netlink, family == AF_INET)? {
        return Ok(gateway);
    }
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

/// Returns the default gateway in the main table, unless this namespace is a tunnel's or the host's.
fn container_gateway(netlink: &mut Netlink, ipv4: bool) -> io::Result<Option<IpAddr>> {
    let is_host = netlink.addresses()?.iter().any(|(_, net)| net.addr() == HOST4);
    if is_host || netlink.link("host0")?.is_some() {
        return Ok(None);
    }
    let gateways = netlink
        .routes()?
        .into_iter()
        .filter(|route| route.table == u32::from(libc::RT_TABLE_MAIN) && route.destination.prefix_len() == 0);
    Ok(gateways.filter_map(|route| route.gateway).find(|gateway| gateway.is_ipv4() == ipv4))
}

/// Sends from each address of this namespace's interfaces.
pub(crate) fn from_each_address(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    let addresses = Netlink::open()?.addresses()?.into_iter().map(|(_, net)| net.addr());
    let usable = addresses.filter(|own| own.is_ipv4() == to.is_ipv4() && !own.is_loopback() && !is_link_local(*own));
    let sent = |own| UdpSocket::bind((own, 0))?.send_to(&stamp.payload(), (to, DISCARD)).map(drop);
    let mut result = Err(io::ErrorKind::AddrNotAvailable.into());
    for own in usable {
        result = result.or(sent(own));
    }
    result
}

/// Sends itself a datagram in the name of another host, which needs no capability in IPv6 (`IPV6_FREEBIND` of
/// linux/in6.h), and answers it: by the routes, and by each interface.
pub(crate) fn reply_to_pretended_host(stamp: &Stamp) -> io::Result<()> {
    let addresses = Netlink::open()?.addresses()?.into_iter().map(|(_, net)| net.addr());
    let usable = addresses.filter(|own| own.is_ipv6() && !own.is_loopback() && !is_link_local(*own));
    let mut result = Err(io::ErrorKind::AddrNotAvailable.into());
    for own in usable {
        let answering = UdpSocket::bind((own, 0))?;
        let pretending = rustix::net::socket(rustix::net::AddressFamily::INET6, rustix::net::SocketType::DGRAM, None)?;
        rustix::net::sockopt::set_ipv6_freebind(&pretending, true)?;
        // A port for each address, as the one of a former socket may still be in use.
        let port = answering.local_addr()?.port();
        rustix::net::bind(&pretending, &SocketAddr::new(WEB6, port))?;
        UdpSocket::from(pretending).send_to(b"hello", answering.local_addr()?)?;
        result = result.or(answering.send_to(&stamp.payload(), (WEB6, port)).map(drop));
        let by_interface = |interface: &str| {
            setsockopt(&answering, sockopt::BindToDevice, &interface.into())?;
            answering.send_to(&stamp.payload(), (WEB6, port)).map(drop)
        };
        result = result.or(with_each_interface(by_interface));
    }
    result
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

/// Runs another program for at most [`RUNTIME`].
fn run(command: &mut Command) -> io::Result<()> {
    // Ends a lookup soon if no server answers.
    command.env("RES_OPTIONS", "timeout:1 attempts:1");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let deadline = Instant::now() + patience(RUNTIME);
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
    run(Command::new("getent").args(["ahosts", &stamp.host_name()]))
}

pub(crate) fn python(stamp: &Stamp) -> io::Result<()> {
    // Debian's Python starts faster than one that a user may have installed.
    let debians = "/usr/bin/python3";
    let python = if Path::new(debians).exists() { debians } else { "python3" };
    let script = "import socket, sys; socket.getaddrinfo(sys.argv[1], 80)";
    run(Command::new(python).args(["-I", "-S", "-c", script, &stamp.host_name()]))
}

pub(crate) fn curl(stamp: &Stamp) -> io::Result<()> {
    run(Command::new("curl").args(["--silent", "--max-time", "3", &format!("http://{}/", stamp.host_name())]))
}

/// Sends messages to a socket below `/run` or `/var/run`, and waits for an answer to each.
fn send_to(path: &str, messages: &[&[u8]]) -> io::Result<()> {
    let stream = UnixStream::connect(Path::new("/run").join(path));
    converse(stream.or_else(|_| UnixStream::connect(Path::new("/var/run").join(path)))?, messages)
}

fn converse(mut stream: UnixStream, messages: &[&[u8]]) -> io::Result<()> {
    stream.set_read_timeout(Some(patience(PATIENCE)))?;
    for message in messages {
        stream.write_all(message)?;
        let _ = stream.read(&mut [0; 1000])?;
    }
    Ok(())
}

/// Asks nscd for addresses in glibc's protocol (nscd/nscd-client.h).
pub(crate) fn nscd(stamp: &Stamp) -> io::Result<()> {
    send_to("nscd/socket", &[&nscd_question(stamp)])
}

fn nscd_question(stamp: &Stamp) -> Vec<u8> {
    const VERSION: u32 = 2;
    const GETAI: u32 = 14;
    let name = [stamp.host_name().as_bytes(), b"\0"].concat();
    let header = [VERSION, GETAI, name.len() as u32].map(u32::to_ne_bytes).concat();
    [header, name].concat()
}

/// Looks for nscd's socket by `/proc/PID/root` of every process.
pub(crate) fn nscd_by_proc(stamp: &Stamp) -> io::Result<()> {
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
        stamp.host_name()
    );
    send_to("systemd/resolve/io.systemd.Resolve", &[&[call.as_bytes(), b"\0"].concat()])
}

pub(crate) fn dbus(stamp: &Stamp) -> io::Result<()> {
    // The user ID as text, in hexadecimal digits.
    let user: String = nix::unistd::getuid().to_string().bytes().map(|byte| format!("{byte:02x}")).collect();
    let manager = "org.freedesktop.resolve1";
    let hello = dbus_call(1, "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello", "", &[]);
    let mut body = 0_i32.to_le_bytes().to_vec();
    dbus_string(&mut body, &stamp.host_name());
    body.resize(body.len().next_multiple_of(4), 0);
    body.extend(2_i32.to_le_bytes());
    body.resize(body.len().next_multiple_of(8), 0);
    body.extend(0_u64.to_le_bytes());
    let path = "/org/freedesktop/resolve1";
    let resolve = dbus_call(2, manager, path, "org.freedesktop.resolve1.Manager", "ResolveHostname", "isit", &body);
    let authentication = format!("\0AUTH EXTERNAL {user}\r\n");
    send_to("dbus/system_bus_socket", &[authentication.as_bytes(), &[b"BEGIN\r\n", &hello[..]].concat(), &resolve])
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
    send_to("avahi-daemon/socket", &[format!("RESOLVE-HOSTNAME {}\n", stamp.host_name()).as_bytes()])
}

/// A server that executes requests, as tmux's does, at a socket in a directory that the program's view shows.
pub(crate) fn server(stamp: &Stamp) -> io::Result<()> {
    send_to("leaks/server", &[&stamp.payload()])
}

pub(crate) fn server_by_link(stamp: &Stamp) -> io::Result<()> {
    converse(UnixStream::connect("/proc/self/root/run/leaks/server")?, &[&stamp.payload()])
}

/// The daemon of a container engine.
pub(crate) fn engine(stamp: &Stamp) -> io::Result<()> {
    send_to("docker.sock", &[&stamp.payload()])
}

/// The user's session bus itself, in place of the filter that the environment names.
pub(crate) fn session_bus(stamp: &Stamp) -> io::Result<()> {
    send_to("user/0/bus", &[format!("\0AUTH EXTERNAL 30\r\n{}", stamp.host_name()).as_bytes()])
}

pub(crate) fn abstract_socket(stamp: &Stamp) -> io::Result<()> {
    let address = std::os::unix::net::SocketAddr::from_abstract_name(ABSTRACT_SOCKET)?;
    UnixStream::connect_addr(&address)?.write_all(&stamp.payload())
}

/// Sends by multicast or broadcast, by the routes and by each interface.
fn send_to_all(text: &[u8], to: &str) -> io::Result<()> {
    let to: SocketAddr = to.parse().map_err(io::Error::other)?;
    let call = |socket: io::Result<UdpSocket>| {
        let socket = socket?;
        socket.set_broadcast(true)?;
        socket.send_to(text, to).map(drop)
    };
    let sent = INTERFACES.map(|interface| call(bound(interface, to, SockType::Datagram).map(UdpSocket::from)));
    call(UdpSocket::bind(any(to.ip()))).or(sent.into_iter().find(Result::is_ok).unwrap_or(Ok(())))
}

pub(crate) fn multicast_question(stamp: &Stamp, to: &str) -> io::Result<()> {
    send_to_all(&dns_client::query(&stamp.host_name())?, to)
}

pub(crate) fn multicast(stamp: &Stamp, to: &str) -> io::Result<()> {
    send_to_all(&stamp.payload(), to)
}

/// Tries something with each interface. Succeeds if one attempt does.
fn with_each_interface(one: impl Fn(&str) -> io::Result<()>) -> io::Result<()> {
    let mut last = Err(io::ErrorKind::NotFound.into());
    for interface in INTERFACES {
        match one(interface) {
            Ok(()) => last = Ok(()),
            Err(error) if last.is_err() => last = Err(error),
            Err(_) => {}
        }
    }
    last
}

pub(crate) fn by_each_interface(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    let to = SocketAddr::new(to, DISCARD);
    with_each_interface(|interface| {
        UdpSocket::from(bound(interface, to, SockType::Datagram)?).send_to(&stamp.payload(), to).map(drop)
    })
}

pub(crate) fn packet_information(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    with_each_interface(|interface| packetinfo_send(interface, (to, DISCARD).into(), &stamp.payload()).map(drop))
}

pub(crate) fn unicast_interface(stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    let to = SocketAddr::new(to, DISCARD);
    with_each_interface(|interface| unicast(interface, to)?.send_to(&stamp.payload(), to).map(drop))
}

/// Sends to a router without a route: the next one, which is on the same link.
pub(crate) fn unrouted(stamp: &Stamp) -> io::Result<()> {
    let to = container_gateway(&mut Netlink::open()?, true)?.unwrap_or(ROUTER4);
    let socket = UdpSocket::bind(any(to))?;
    setsockopt(&socket, sockopt::DontRoute, &true)?;
    socket.send_to(&stamp.payload(), (to, DISCARD)).map(drop)
}

/// Sends an echo request by an unprivileged ICMP socket (icmp(7)), as ping(8) does.
fn ping(family: AddressFamily, protocol: SockProtocol, kind: u8, stamp: &Stamp, to: IpAddr) -> io::Result<()> {
    let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol)?;
    let packet = [&[kind, 0, 0, 0, 0, 1, 0, 1][..], &stamp.payload()].concat();
    Ok(sendto(socket.as_raw_fd(), &packet, &SockaddrStorage::from(SocketAddr::new(to, 0)), MsgFlags::empty())
        .map(drop)?)
}

pub(crate) fn ping4(stamp: &Stamp) -> io::Result<()> {
    ping(AddressFamily::Inet, SockProtocol::Icmp, 8, stamp, WEB4)
}

pub(crate) fn ping6(stamp: &Stamp) -> io::Result<()> {
    ping(AddressFamily::Inet6, SockProtocol::IcmpV6, 128, stamp, WEB6)
}

/// Returns a UDP packet with all its headers, without a UDP checksum.
fn packet_to(to: Addresses, ipv6: bool, stamp: &Stamp) -> Vec<u8> {
    let text = stamp.payload();
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

/// Sends by a raw socket, by the routes and by each interface.
fn raw(family: AddressFamily, protocol: SockProtocol, packet: &[u8], to: IpAddr) -> io::Result<()> {
    let to = SockaddrStorage::from(SocketAddr::new(to, 0));
    let send = |interface: Option<&str>| -> io::Result<()> {
        let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        if let Some(interface) = interface {
            setsockopt(&socket, sockopt::BindToDevice, &interface.into())?;
        }
        Ok(sendto(socket.as_raw_fd(), packet, &to, MsgFlags::empty()).map(drop)?)
    };
    let plainly = send(None);
    with_each_interface(|interface| send(Some(interface))).or(plainly)
}

pub(crate) fn raw4(stamp: &Stamp) -> io::Result<()> {
    raw(AddressFamily::Inet, SockProtocol::Raw, &packet_to(WEB, false, stamp), WEB4)
}

pub(crate) fn raw6(stamp: &Stamp) -> io::Result<()> {
    raw(AddressFamily::Inet6, SockProtocol::Raw, &packet_to(WEB, true, stamp), WEB6)
}

/// Sends a router solicitation (RFC 4861 section 4.1).
pub(crate) fn router_solicitation(stamp: &Stamp) -> io::Result<()> {
    let mut option = vec![253, 0];
    option.extend(stamp.payload());
    option.resize(option.len().next_multiple_of(8), 0);
    option[1] = (option.len() / 8) as u8;
    let packet = [&[133, 0, 0, 0, 0, 0, 0, 0][..], &option].concat();
    let all_routers = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
    raw(AddressFamily::Inet6, SockProtocol::IcmpV6, &packet, all_routers.into())
}

pub(crate) fn packet(stamp: &Stamp) -> io::Result<()> {
    with_each_interface(|interface| packet_send(interface, &packet_to(WEB, false, stamp)))
}

pub(crate) fn io_uring(stamp: &Stamp) -> io::Result<()> {
    send_by_io_uring((WEB4, DISCARD).into(), &stamp.payload())
}

pub(crate) fn inherited(stamp: &Stamp) -> io::Result<()> {
    let number: Option<RawFd> = std::env::var(variables::INHERITED_SOCKET).ok().and_then(|number| number.parse().ok());
    Ok(send(number.ok_or(io::ErrorKind::NotFound)?, &stamp.payload(), MsgFlags::MSG_NOSIGNAL).map(drop)?)
}

/// Enters the network namespace of PID 1, which is the host's, and sends there.
pub(crate) fn join_host(stamp: &Stamp) -> io::Result<()> {
    let host = NetworkNamespace::from(std::os::fd::OwnedFd::from(std::fs::File::open("/proc/1/ns/net")?));
    host.run(|| udp(stamp, WEB4))
}

/// A program has all capabilities in a user namespace of its own. Another agent in one tries the vectors that need
/// some, and sends wherever it got to.
pub(crate) fn user_namespace(stamp: &Stamp) -> io::Result<()> {
    let mut command = Command::new("unshare");
    command.args(["--user", "--keep-caps"]).arg(std::env::current_exe()?).arg("act");
    command.env_remove(variables::STAGE);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let mut orders = child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
    for vector in ["join-host", "raw4", "raw6", "packet", "udp4-internet"] {
        writeln!(orders, "try-vector {vector} {}", stamp.label)?;
    }
    drop(orders);
    child.wait().map(drop)
}
