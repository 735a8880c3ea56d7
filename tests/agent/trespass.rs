//! Acts of a hostile program: it sends by another interface than the tunnel's, changes the network, and enters other
//! namespaces.

use std::fs::File;
use std::io;
use std::io::IoSlice;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, connect, sendmsg,
    setsockopt, socket, sockopt,
};
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};

use crate::acts::{parsed, reply_time};
use crate::shared::sending::{bound, send_storm, unspecified};
use crate::syscalls;

/// The interface of a socket's unicast datagrams (ip(7)): its index in network byte order.
#[derive(Clone, Copy, Debug)]
struct UnicastInterface;
nix::setsockopt_impl!(
    UnicastInterface,
    libc::IPPROTO_IP,
    libc::IP_UNICAST_IF,
    u32,
    nix::sys::socket::sockopt::SetStruct<'_, u32>
);

/// The options in a socket's IPv4 headers (ip(7)): here a source route over one router (RFC 791 section 3.1).
#[derive(Clone, Copy, Debug)]
struct SourceRoute;
nix::setsockopt_impl!(
    SourceRoute,
    libc::IPPROTO_IP,
    libc::IP_OPTIONS,
    [u8; 12],
    nix::sys::socket::sockopt::SetStruct<'_, [u8; 12]>
);

/// The time for which an act waits for an answer. It is short: the capture finds packets that leave, and acts are many.
const PATIENCE: Duration = Duration::from_millis(20);

/// The type of the option "loose source and record route" (RFC 791 section 3.1).
const LOOSE_SOURCE_ROUTE: u8 = 131;

pub(crate) fn perform(words: &[&str]) -> io::Result<String> {
    match words {
        ["send", to] => exchange(&UdpSocket::bind((unspecified(parsed(to)?), 0))?, parsed(to)?),
        ["bound-send", interface, to] => {
            exchange(&bound(interface, parsed(to)?, SockType::Datagram)?.into(), parsed(to)?)
        }
        ["bound-connect", interface, to] => bound_connect(interface, parsed(to)?),
        ["packetinfo-send", interface, to] => {
            answered(&packetinfo_send(interface, parsed(to)?, &payload_for(parsed(to)?))?)
        }
        ["unicast-interface-send", interface, to] => exchange(&unicast(interface, parsed(to)?)?, parsed(to)?),
        ["unrouted-send", to] => {
            let socket = UdpSocket::bind((unspecified(parsed(to)?), 0))?;
            setsockopt(&socket, sockopt::DontRoute, &true)?;
            exchange(&socket, parsed(to)?)
        }
        ["source-routed-send", via, to] => source_routed_send(parsed(via)?, parsed(to)?),
        ["raw-socket", family] => raw_socket(family),
        ["add-route", interface, destination] => {
            let index = index_of(interface)?;
            change(NetlinkRequest::add_route(index, interface, parsed(destination)?, None))
        }
        ["add-address", interface, address] => {
            let index = index_of(interface)?;
            change(NetlinkRequest::add_address(index, interface, parsed(address)?))
        }
        ["set-mtu", interface, mtu] => change(NetlinkRequest::set_mtu(index_of(interface)?, interface, parsed(mtu)?)),
        ["join", path] => NetworkNamespace::from(OwnedFd::from(File::open(path)?)).run(|| Ok("joined".into())),
        ["new-network"] => NetworkNamespace::create(|| Ok("made".into())).map(|(_, text)| text),
        ["run", program, arguments @ ..] => run(program, arguments),
        ["storm", targets @ ..] => storm(targets),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("unknown act {words:?}"))),
    }
}

fn index_of(interface: &str) -> io::Result<u32> {
    Ok(nix::net::if_::if_nametoindex(interface)?)
}

/// Sends a datagram that contains its destination, and waits for an answer.
fn exchange(socket: &UdpSocket, to: SocketAddr) -> io::Result<String> {
    socket.set_broadcast(true)?;
    socket.send_to(&payload_for(to), to)?;
    answered(socket)
}

/// Returns the payload of a datagram: its destination.
fn payload_for(to: SocketAddr) -> Vec<u8> {
    format!("to {to}").into_bytes()
}

fn answered(socket: &UdpSocket) -> io::Result<String> {
    socket.set_read_timeout(Some(reply_time(PATIENCE)))?;
    let mut buffer = [0; 1500];
    let (length, from) = socket.recv_from(&mut buffer)?;
    Ok(format!("{length} bytes from {from}"))
}

/// Returns a socket whose datagrams leave by an interface (IP_UNICAST_IF).
pub(crate) fn unicast(interface: &str, like: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((unspecified(like), 0))?;
    setsockopt(&socket, UnicastInterface, &index_of(interface)?.to_be())?;
    Ok(socket)
}

fn bound_connect(interface: &str, to: SocketAddr) -> io::Result<String> {
    let socket = bound(interface, to, SockType::Stream)?;
    match connect(socket.as_raw_fd(), &SockaddrStorage::from(to)) {
        Err(nix::Error::EINPROGRESS) => {}
        other => other?,
    }
    let timeout = PollTimeout::try_from(reply_time(PATIENCE)).map_err(io::Error::other)?;
    let mut entries = [PollFd::new(std::os::fd::AsFd::as_fd(&socket), PollFlags::POLLOUT)];
    if poll(&mut entries, timeout)? == 0 {
        return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
    }
    match nix::sys::socket::getsockopt(&socket, sockopt::SocketError)? {
        0 => Ok("connected".into()),
        number => Err(io::Error::from_raw_os_error(number)),
    }
}

/// Sends by an interface that a control message names (IP_PKTINFO of ip(7), IPV6_PKTINFO of ipv6(7)).
pub(crate) fn packetinfo_send(interface: &str, to: SocketAddr, text: &[u8]) -> io::Result<UdpSocket> {
    let index = index_of(interface)?;
    let socket = UdpSocket::bind((unspecified(to), 0))?;
    let payload = [IoSlice::new(text)];
    let address = SockaddrStorage::from(to);
    let send = |message: ControlMessage<'_>| {
        sendmsg(socket.as_raw_fd(), &payload, &[message], MsgFlags::empty(), Some(&address))
    };
    match to {
        SocketAddr::V4(_) => {
            let nowhere = libc::in_addr { s_addr: 0 };
            let ipi_ifindex = i32::try_from(index).map_err(io::Error::other)?;
            let info = libc::in_pktinfo { ipi_ifindex, ipi_spec_dst: nowhere, ipi_addr: nowhere };
            send(ControlMessage::Ipv4PacketInfo(&info))?
        }
        SocketAddr::V6(_) => {
            let info = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr { s6_addr: [0; 16] },
                ipi6_ifindex: index.cast_signed() as _,
            };
            send(ControlMessage::Ipv6PacketInfo(&info))?
        }
    };
    Ok(socket)
}

/// Broadcasts an IP packet on an interface, by a packet socket (packet(7)).
pub(crate) fn packet_send(interface: &str, packet: &[u8]) -> io::Result<()> {
    let socket = socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
    syscalls::send_to_all_on(&socket, index_of(interface)?, packet)
}

/// Sends to `via` with a source route, which asks it to forward the packet.
fn source_routed_send(via: Ipv4Addr, to: SocketAddr) -> io::Result<String> {
    let SocketAddr::V4(last) = to else { return Err(io::ErrorKind::InvalidInput.into()) };
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // One router; the packet's destination comes last, and the kernel reorders both.
    let [a, b, c, d] = via.octets();
    setsockopt(&socket, SourceRoute, &[LOOSE_SOURCE_ROUTE, 7, 4, a, b, c, d, 0, 0, 0, 0, 0])?;
    exchange(&socket, last.into())
}

fn raw_socket(family: &str) -> io::Result<String> {
    let (family, kind, protocol) = match family {
        "ipv4" => (AddressFamily::Inet, SockType::Raw, SockProtocol::Raw),
        "ipv6" => (AddressFamily::Inet6, SockType::Raw, SockProtocol::Raw),
        "packet" => (AddressFamily::Packet, SockType::Raw, SockProtocol::EthAll),
        "packets" => (AddressFamily::Packet, SockType::Datagram, SockProtocol::EthAll),
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    Ok(socket(family, kind, SockFlag::SOCK_CLOEXEC, protocol).map(|_| "opened".into())?)
}

fn change(request: NetlinkRequest) -> io::Result<String> {
    // The error number tells the test which error it is.
    let number = |error: vpn_exec::linux::netlink::NetlinkError| match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => error.into(),
    };
    Netlink::open()?.execute_one(request).map_err(number)?;
    Ok("changed".into())
}

/// Runs a program until it ends. Fails if the program does.
fn run(program: &str, arguments: &[&str]) -> io::Result<String> {
    let output = Command::new(program).args(arguments).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    Err(io::Error::other(format!("{}: {}", output.status, text(&output.stderr))))
}

/// Sends to all targets without a pause until the agent ends: see [`send_storm`].
fn storm(targets: &[&str]) -> io::Result<String> {
    let targets: Vec<SocketAddr> = targets.iter().map(|target| parsed(target)).collect::<io::Result<_>>()?;
    std::thread::spawn(move || send_storm(&targets, || true));
    Ok("sending".into())
}
