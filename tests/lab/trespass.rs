//! What a hostile program tries, without any privilege or with those that it should not have: to leave by another interface
//! than the tunnel's, to change the network, to get into another one.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::io::IoSlice;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, connect, sendmsg,
    setsockopt, socket, sockopt,
};
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};

use crate::agent::{parsed, reply_time, unspecified};
use crate::syscalls;

/// The interface of a socket's unicast datagrams (ip(7)), its number in the network's byte order.
#[derive(Clone, Copy, Debug)]
struct UnicastInterface;
nix::setsockopt_impl!(
    UnicastInterface,
    libc::IPPROTO_IP,
    libc::IP_UNICAST_IF,
    u32,
    nix::sys::socket::sockopt::SetStruct<'_, u32>
);

/// The options of a socket's IPv4 headers (ip(7)): here a route with one station in between (RFC 791 section 3.1).
#[derive(Clone, Copy, Debug)]
struct SourceRoute;
nix::setsockopt_impl!(
    SourceRoute,
    libc::IPPROTO_IP,
    libc::IP_OPTIONS,
    [u8; 12],
    nix::sys::socket::sockopt::SetStruct<'_, [u8; 12]>
);

/// How long an answer is waited for: not long, as what gets out is found by the capture, and there are many acts.
const PATIENCE: Duration = Duration::from_millis(20);

/// The type of the option "loose source and record route" (RFC 791 section 3.1).
const LOOSE_SOURCE_ROUTE: u8 = 131;

/// What storms send, so that a test can tell it.
const STORM: &[u8] = b"storm";

pub(crate) fn perform(words: &[&str]) -> io::Result<String> {
    match words {
        ["send", to] => exchange(&UdpSocket::bind((unspecified(parsed(to)?), 0))?, parsed(to)?),
        ["bound-send", device, to] => exchange(&bound(device, parsed(to)?, SockType::Datagram)?.into(), parsed(to)?),
        ["bound-connect", device, to] => bound_connect(device, parsed(to)?),
        ["packetinfo-send", device, to] => answered(&packetinfo_send(device, parsed(to)?, &call(parsed(to)?))?),
        ["unicast-interface-send", device, to] => exchange(&unicast(device, parsed(to)?)?, parsed(to)?),
        ["unrouted-send", to] => {
            let socket = UdpSocket::bind((unspecified(parsed(to)?), 0))?;
            setsockopt(&socket, sockopt::DontRoute, &true)?;
            exchange(&socket, parsed(to)?)
        }
        ["source-routed-send", via, to] => source_routed_send(parsed(via)?, parsed(to)?),
        ["raw-socket", family] => raw_socket(family),
        ["add-route", device, destination] => {
            let index = index_of(device)?;
            change(NetlinkRequest::add_route(index, device, parsed(destination)?, None))
        }
        ["add-address", device, address] => {
            let index = index_of(device)?;
            change(NetlinkRequest::add_address(index, device, parsed(address)?))
        }
        ["set-mtu", device, mtu] => change(NetlinkRequest::set_mtu(index_of(device)?, device, parsed(mtu)?)),
        ["join", path] => NetworkNamespace::from(OwnedFd::from(File::open(path)?)).run(|| Ok("joined".into())),
        ["new-network"] => NetworkNamespace::create(|| Ok("made".into())).map(|(_, text)| text),
        ["run", program, arguments @ ..] => run(program, arguments),
        ["storm", targets @ ..] => storm(targets),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("the agent knows no {words:?}"))),
    }
}

fn index_of(device: &str) -> io::Result<u32> {
    Ok(nix::net::if_::if_nametoindex(device)?)
}

/// Sends where to it sends, and waits for an answer.
fn exchange(socket: &UdpSocket, to: SocketAddr) -> io::Result<String> {
    socket.set_broadcast(true)?;
    socket.send_to(&call(to), to)?;
    answered(socket)
}

/// What is sent: where to.
fn call(to: SocketAddr) -> Vec<u8> {
    format!("to {to}").into_bytes()
}

fn answered(socket: &UdpSocket) -> io::Result<String> {
    socket.set_read_timeout(Some(reply_time(PATIENCE)))?;
    let mut buffer = [0; 1500];
    let (length, from) = socket.recv_from(&mut buffer)?;
    Ok(format!("{length} bytes from {from}"))
}

/// A socket whose datagrams leave by a device (IP_UNICAST_IF).
pub fn unicast(device: &str, like: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((unspecified(like), 0))?;
    setsockopt(&socket, UnicastInterface, &index_of(device)?.to_be())?;
    Ok(socket)
}

/// A socket bound to a device, as an ordinary user may have it since Linux 5.7.
pub fn bound(device: &str, like: SocketAddr, kind: SockType) -> io::Result<OwnedFd> {
    let family = if like.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = if kind == SockType::Stream { SockFlag::SOCK_NONBLOCK } else { SockFlag::empty() };
    let socket = socket(family, kind, flags | SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::BindToDevice, &OsString::from(device))?;
    Ok(socket)
}

fn bound_connect(device: &str, to: SocketAddr) -> io::Result<String> {
    let socket = bound(device, to, SockType::Stream)?;
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

/// Chooses the interface by a control message (IP_PKTINFO of ip(7), IPV6_PKTINFO of ipv6(7)).
pub fn packetinfo_send(device: &str, to: SocketAddr, text: &[u8]) -> io::Result<UdpSocket> {
    let index = index_of(device)?;
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

/// Sends an IP packet of one's own making to everybody on a device, by a packet socket (packet(7)).
pub fn packet_send(device: &str, packet: &[u8]) -> io::Result<()> {
    let socket = socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
    syscalls::send_to_all_on(&socket, index_of(device)?, packet)
}

/// Sends to `via`, with the wish that it passes the packet on.
fn source_routed_send(via: Ipv4Addr, to: SocketAddr) -> io::Result<String> {
    let SocketAddr::V4(last) = to else { return Err(io::ErrorKind::InvalidInput.into()) };
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // One station; the packet's own destination comes last, and the kernel puts both in their places.
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
    // By its number, so that a test sees which error it is.
    let number = |error: vpn_exec::linux::netlink::NetlinkError| match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => error.into(),
    };
    Netlink::open()?.execute_one(request).map_err(number)?;
    Ok("changed".into())
}

/// Runs a program to its end; fails if it does.
fn run(program: &str, arguments: &[&str]) -> io::Result<String> {
    let output = Command::new(program).args(arguments).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    Err(io::Error::other(format!("{}: {}", output.status, text(&output.stderr))))
}

/// Sends to all targets, plainly and by every interface that there is, without a pause, until the agent ends.
fn storm(targets: &[&str]) -> io::Result<String> {
    let targets: Vec<SocketAddr> = targets.iter().map(|target| parsed(target)).collect::<io::Result<_>>()?;
    std::thread::spawn(move || send_storm(&targets, || true));
    Ok("raging".into())
}

/// Sends to all targets, plainly and by every interface that the calling thread's namespace has, while it `goes_on`; how many
/// datagrams were tried.
pub fn send_storm(targets: &[SocketAddr], goes_on: impl Fn() -> bool) -> u64 {
    let mut tried = 0;
    while goes_on() {
        let begin = Instant::now();
        for target in targets {
            if let Ok(socket) = UdpSocket::bind((unspecified(*target), 0)) {
                // That it fails is what is hoped for.
                let _ = socket.send_to(STORM, target);
            }
            for device in ["host0", "wg0", "eth0", "lan0"] {
                if let Ok(socket) = bound(device, *target, SockType::Datagram) {
                    let _ = UdpSocket::from(socket).send_to(STORM, target);
                }
            }
            tried += 5;
        }
        // On a small machine, whoever is to be disturbed must have a turn, too.
        std::thread::sleep(begin.elapsed().max(Duration::from_micros(200)));
    }
    tried
}
