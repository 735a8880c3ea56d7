//! Where one comes in: the ports that are listened on, and how they are taken.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{self, SockType, SockaddrStorage, sockopt};
use thiserror::Error;

use super::{datagram, new_socket};
use crate::config::{HostPort, Protocol, ProxyProtocol, Publish};
use crate::names::InterfaceName;

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Where one comes in, and to which port that leads.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Entrance {
    /// The host's address to listen on; `None`: all.
    pub address: Option<IpAddr>,
    /// Who may come: all, unless it is only the one at the other end of a link.
    pub only: Option<OtherEnd>,
    /// The port to listen on.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The port that it leads to.
    pub to: u16,
    /// How who is there is told who comes. Of TCP only.
    pub proxy_protocol: Option<ProxyProtocol>,
}

/// Who is at the other end of a link.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct OtherEnd {
    /// The host's interface that is this end.
    pub interface: InterfaceName,
    /// The address at the other.
    pub address: IpAddr,
}

impl Entrance {
    /// The way to a port of the host's loopback for who is at the other end of a link, from an address of the host's on that link.
    ///
    /// What listens on the loopback alone is meant for nobody in the host's networks. Who asks for that address there comes by another
    /// interface. The host's own programs do not: for the kernel, what is sent to an address of one's own comes by the interface that has
    /// it (`ip_route_output_key_hash_rcu()`). These are told by where they come from.
    pub fn of_host(port: HostPort, address: IpAddr, only: OtherEnd) -> Self {
        let HostPort { port, protocol } = port;
        Self { address: Some(address), only: Some(only), port, protocol, to: port, proxy_protocol: None }
    }

    /// Where to connect to, best first, given the addresses at which the program may listen.
    ///
    /// What is published on the host's loopback alone is reached by the host alone, as if the program ran there: from 127.0.0.1 or ::1. By
    /// that many a program's default tells its own user from strangers (`rpc-whitelist` of Transmission). All others come by the link, and
    /// never from the program's own loopback, unless it listens there alone.
    pub(super) fn order(&self, targets: &[IpAddr]) -> Vec<IpAddr> {
        let mut ordered = targets.to_vec();
        if let Some(own) = self.address.filter(IpAddr::is_loopback) {
            // Stable, so the rest stays in its order.
            ordered.sort_by_key(
                |target| if !target.is_loopback() { 2 } else { u8::from(target.is_ipv4() != own.is_ipv4()) },
            );
        }
        ordered
    }

    /// Whether somebody may come.
    pub(super) fn admits(&self, client: &SocketAddr) -> bool {
        self.only.as_ref().is_none_or(|only| only.address == client.ip())
    }
}

impl From<&Publish> for Entrance {
    fn from(port: &Publish) -> Self {
        let Publish { address, host_port, inner_port, protocol, proxy_protocol } = *port;
        Self { address, only: None, port: host_port, protocol, to: inner_port, proxy_protocol }
    }
}

/// A port of the host that cannot be had.
#[derive(Debug, Error)]
#[error("cannot {}: {error}", self.what())]
pub struct BindError {
    entrance: Entrance,
    error: io::Error,
}

impl BindError {
    /// What could not be done.
    pub fn what(&self) -> String {
        let Entrance { address, port, protocol, .. } = &self.entrance;
        format!("listen on {} port {port} of {}", protocol_name(*protocol), host_name(*address))
    }

    /// Whether somebody else has the port.
    pub fn is_taken(&self) -> bool {
        self.error.raw_os_error() == Some(libc::EADDRINUSE)
    }

    /// The port, if it takes a privilege that the caller has not.
    pub fn privileged(&self) -> Option<u16> {
        (self.error.raw_os_error() == Some(libc::EACCES)).then_some(self.entrance.port)
    }

    /// What can be done about it.
    pub fn advice(&self) -> Option<&'static str> {
        let of_host = self.entrance.only.is_some();
        match self.error.raw_os_error() {
            Some(libc::EADDRINUSE) if of_host => Some("another program has it (see `ss -tuapn`): end that"),
            Some(libc::EADDRINUSE) => {
                Some("another program has it (see `ss -tulpn`): end that, or publish another port")
            }
            Some(libc::EPERM) if of_host => Some("this takes Linux 5.7 or newer (SO_BINDTODEVICE without CAP_NET_RAW)"),
            Some(libc::EMFILE) => Some(
                "a process may not have as many files open as there are ports: name fewer, or raise the hard limit (`ulimit -Hn`, \
                 LimitNOFILE= of a service)",
            ),
            Some(libc::EADDRNOTAVAIL) => Some("publish an address that the host has, or leave it out for all"),
            _ => None,
        }
    }
}

impl From<BindError> for io::Error {
    fn from(error: BindError) -> Self {
        error.error
    }
}

fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
    }
}

fn host_name(address: Option<IpAddr>) -> String {
    address.map_or_else(|| "the host".into(), |address| address.to_string())
}

/// A port that is taken.
#[derive(Debug)]
pub struct Bound {
    pub(super) entrance: Entrance,
    pub(super) socket: OwnedFd,
}

/// Takes ports, in the calling thread's network namespace.
///
/// # Errors
/// The first that cannot be had. Then none is.
pub fn bind(entrances: &[Entrance]) -> Result<Vec<Bound>, BindError> {
    let bound = |entrance: &Entrance| match open(entrance) {
        Ok(socket) => Ok(Bound { entrance: entrance.clone(), socket }),
        Err(error) => Err(BindError { entrance: entrance.clone(), error }),
    };
    entrances.iter().map(bound).collect()
}

fn open(entrance: &Entrance) -> io::Result<OwnedFd> {
    let any = [IpAddr::from(Ipv6Addr::UNSPECIFIED), IpAddr::from(Ipv4Addr::UNSPECIFIED)];
    let addresses = entrance.address.as_ref().map_or(any.as_slice(), std::slice::from_ref);
    for address in addresses {
        match open_at(*address, entrance) {
            // A host without IPv6.
            Err(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL) if entrance.address.is_none() && address.is_ipv6() => {}
            other => return Ok(other?),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EADDRNOTAVAIL))
}

fn open_at(address: IpAddr, entrance: &Entrance) -> nix::Result<OwnedFd> {
    let kind = match entrance.protocol {
        Protocol::Tcp => SockType::Stream,
        Protocol::Udp => SockType::Datagram,
    };
    let address = SocketAddr::new(address, entrance.port);
    let opened = new_socket(address, kind)?;
    if address.is_ipv6() {
        socket::setsockopt(&opened, sockopt::Ipv6V6Only, &entrance.address.is_some())?;
    }
    if let Some(OtherEnd { interface, .. }) = &entrance.only {
        // Before it has an address, so that nobody can come by another interface meanwhile.
        socket::setsockopt(&opened, sockopt::BindToDevice, &interface.as_str().into())?;
    }
    match entrance.protocol {
        Protocol::Tcp => {
            // A successor takes the port although connections of the former keeper's are still coming to their end (tcp(7)).
            socket::setsockopt(&opened, sockopt::ReuseAddr, &true)?;
            // For who is accepted: urgent data (tcp(7)) stays where it is among the rest, so that nothing of it is lost.
            socket::setsockopt(&opened, sockopt::OobInline, &true)?;
        }
        Protocol::Udp => datagram::tell_destinations(&opened, address)?,
    }
    socket::bind(opened.as_raw_fd(), &SockaddrStorage::from(address))?;
    if entrance.protocol == Protocol::Tcp {
        // The kernel cuts it to its own limit (somaxconn). The wrapper of nix refuses more than the C library's SOMAXCONN, which is 128 in musl.
        rustix::net::listen(&opened, BACKLOG).map_err(|error| Errno::from_raw(error.raw_os_error()))?;
    }
    Ok(opened)
}
