//! The TCP and UDP sockets of a network namespace, listed and ended (sock_diag(7), linux/inet_diag.h).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::netlink::channel::{AnswerHeader, HEADER_LENGTH, Messages, NLMSG_DONE, NLMSG_ERROR, refusal};

/// `NETLINK_SOCK_DIAG` of linux/netlink.h.
const SOCK_DIAG: u32 = 4;
/// `SOCK_DIAG_BY_FAMILY` and `SOCK_DESTROY` of linux/sock_diag.h.
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;

/// The length of `struct inet_diag_sockid` in bytes, and its place in `struct inet_diag_msg`.
const ID_LENGTH: usize = 48;
const ID: usize = 4;

/// The states of listening TCP sockets and of unconnected UDP sockets (`TCP_LISTEN` and `TCP_CLOSE` of the kernel's
/// include/net/tcp_states.h).
const LISTENING: u8 = 10;
const UNCONNECTED: u8 = 7;

/// The size of the receive buffer in bytes. The kernel's datagrams are at most 32 KiB.
const BUFFER: usize = 64 << 10;

/// A netlink socket for the TCP and UDP sockets of the network namespace in which it was opened.
#[derive(Debug)]
pub struct InternetSockets(OwnedFd);

/// The protocol of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InternetSocket {
    /// The protocol.
    pub protocol: SocketProtocol,
    /// The local address. A socket for both families has an IPv6 address, and an IPv4 one if it is connected by IPv4.
    pub local: SocketAddr,
    /// The other end, or none for a TCP socket that listens and a UDP socket that is not connected.
    pub remote: Option<SocketAddr>,
    family: u8,
    /// The kernel's identification (`struct inet_diag_sockid`), which no later socket has.
    id: [u8; ID_LENGTH],
}

impl InternetSockets {
    /// Opens a netlink socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Fails as socket(2) does.
    pub fn open() -> io::Result<Self> {
        let protocol = Protocol::from_raw(SOCK_DIAG.try_into().map_err(io::Error::other)?);
        let flags = SocketFlags::CLOEXEC;
        Ok(Self(rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(protocol))?))
    }

    /// Returns all TCP and UDP sockets.
    ///
    /// # Errors
    /// Fails with `NotFound` on a kernel without inet_diag, tcp_diag or udp_diag.
    pub fn all(&self) -> io::Result<Vec<InternetSocket>> {
        let mut found = Vec::new();
        for protocol in [SocketProtocol::Tcp, SocketProtocol::Udp] {
            for family in [libc::AF_INET, libc::AF_INET6] {
                let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
                self.ask(&request(BY_FAMILY, flags, family as u8, protocol, &[0; ID_LENGTH]), |message| {
                    found.extend(parse(protocol, message));
                })?;
            }
        }
        Ok(found)
    }

    /// Ends a socket, unless it is gone already. TCP connections are aborted. UDP sockets are disconnected, and lose
    /// their port unless the program has chosen it (`udp_abort()` in the kernel's net/ipv4/udp.c). The program gets
    /// `ECONNABORTED`.
    ///
    /// # Errors
    /// Fails with `EPERM` without CAP_NET_ADMIN, and with `EOPNOTSUPP` on a kernel without `CONFIG_INET_DIAG_DESTROY`.
    pub fn end(&self, socket: &InternetSocket) -> io::Result<()> {
        let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
        match self.ask(&request(DESTROY, flags, socket.family, socket.protocol, &socket.id), |_| ()) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }

    /// Sends a request, and passes the messages of its answer to `take`.
    fn ask(&self, request: &[u8], mut take: impl FnMut(&[u8])) -> io::Result<()> {
        rustix::net::send(&self.0, request, SendFlags::empty())?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = rustix::io::retry_on_intr(|| rustix::net::recv(&self.0, &mut buffer, RecvFlags::empty()))?.0;
            for message in Messages(buffer.get(..length).unwrap_or_default()) {
                match AnswerHeader::of(message).kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => return refusal(message).map_or(Ok(()), |(error, _)| Err(error)),
                    _ => take(message),
                }
            }
        }
    }
}

/// Builds a request about sockets in all states (`struct inet_diag_req_v2`).
fn request(kind: u16, flags: i32, family: u8, protocol: SocketProtocol, id: &[u8; ID_LENGTH]) -> Vec<u8> {
    let number = match protocol {
        SocketProtocol::Tcp => libc::IPPROTO_TCP,
        SocketProtocol::Udp => libc::IPPROTO_UDP,
    };
    let body = [&[family, number as u8, 0, 0][..], &u32::MAX.to_ne_bytes(), id].concat();
    let length = (HEADER_LENGTH + body.len()) as u32;
    [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &(flags as u16).to_ne_bytes(), &[0; 8], &body].concat()
}

/// Parses a socket (`struct inet_diag_msg`).
fn parse(protocol: SocketProtocol, message: &[u8]) -> Option<InternetSocket> {
    let [family, state, ..] = *message.get(HEADER_LENGTH..HEADER_LENGTH + ID)? else { return None };
    let id: [u8; ID_LENGTH] = message.get(HEADER_LENGTH + ID..)?.get(..ID_LENGTH)?.try_into().ok()?;
    let end = |port: usize, address: usize| {
        Some(SocketAddr::new(
            read_address(family, &id[address..address + 16])?,
            u16::from_be_bytes([id[port], id[port + 1]]),
        ))
    };
    let (local, remote) = (end(0, 4)?, end(2, 20)?);
    let is_open = match protocol {
        SocketProtocol::Tcp => state == LISTENING,
        SocketProtocol::Udp => state == UNCONNECTED,
    };
    Some(InternetSocket { protocol, local, remote: (!is_open).then_some(remote), family, id })
}

fn read_address(family: u8, bytes: &[u8]) -> Option<IpAddr> {
    match i32::from(family) {
        libc::AF_INET => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(..4)?).ok()?).into()),
        libc::AF_INET6 => Some(IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)).to_canonical()),
        _ => None,
    }
}

/// Parses the messages of a datagram, for a fuzzer.
#[cfg(any(test, fuzzing))]
pub(super) fn inspect_datagram(datagram: &[u8]) {
    for message in Messages(datagram) {
        let _ = parse(SocketProtocol::Udp, message);
    }
}
