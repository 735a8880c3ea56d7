//! The ports that a relay listens on, and the sockets for them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{self, SockType, SockaddrStorage, sockopt};

use super::{new_socket, udp};
use crate::config::{HostPort, Protocol, ProxyProtocol, Publish};
use crate::failure::Failure;
use crate::names::InterfaceName;

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 1024;

/// A port to listen on, and the port to which its clients are relayed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RelayedPort {
    /// The host's address to listen on; `None`: all addresses.
    pub address: Option<IpAddr>,
    /// The only client that may connect; `None`: any client.
    pub allowed_client: Option<AllowedClient>,
    /// The port to listen on.
    pub port: u16,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The port that clients are relayed to.
    pub target_port: u16,
    /// How the target is told the client's address; `None`: not at all. TCP only.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Whether packets to other hosts arrive here, by a packet rule ([`crate::ruleset::Verdict::RelayBy`]), and are
    /// relayed there instead of to the target port.
    pub is_transparent: bool,
}

/// The only client that may connect to a port: the other end of a link.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AllowedClient {
    /// The host's interface of the link.
    pub interface: InterfaceName,
    /// The client's address on the link.
    pub address: IpAddr,
}

impl RelayedPort {
    /// Returns the port by which the client at the other end of a link reaches a port of the host's loopback. `address`
    /// is the host's address on that link.
    ///
    /// A service that listens on the loopback alone must not be reachable from the host's networks. Packets from there
    /// to `address` arrive by another interface, so the socket is bound to the link's. Packets from programs of the
    /// host do not: the kernel delivers packets to a local address by the interface that has it
    /// (`ip_route_output_key_hash_rcu()`). They are told apart by their source address.
    pub fn of_host(port: HostPort, address: IpAddr, client: AllowedClient) -> Self {
        let HostPort { port, protocol } = port;
        let (address, allowed_client) = (Some(address), Some(client));
        Self { address, allowed_client, port, protocol, target_port: port, proxy_protocol: None, is_transparent: false }
    }

    /// Returns the port at which the packets of the client at the other end of a link to other hosts arrive.
    pub fn transparent(protocol: Protocol, address: SocketAddr, client: AllowedClient) -> Self {
        Self {
            address: Some(address.ip()),
            allowed_client: Some(client),
            port: address.port(),
            protocol,
            target_port: 0,
            proxy_protocol: None,
            is_transparent: true,
        }
    }

    /// Sorts the addresses at which the program may listen by the order in which to try them.
    ///
    /// Clients of a port that is published on the host's loopback alone reach the program from 127.0.0.1 or ::1, as if
    /// it ran on the host. By these addresses some programs tell their own user from strangers (Transmission's
    /// `rpc-whitelist`). All other clients reach it from the address of the link, and from its loopback only if it
    /// listens there alone.
    pub(super) fn sort_targets(&self, targets: &[IpAddr]) -> Vec<IpAddr> {
        let mut sorted = targets.to_vec();
        if let Some(own) = self.address.filter(IpAddr::is_loopback) {
            // The sort is stable, so other addresses keep their order.
            sorted.sort_by_key(
                |target| if !target.is_loopback() { 2 } else { u8::from(target.is_ipv4() != own.is_ipv4()) },
            );
        }
        sorted
    }

    /// Returns whether a client may connect.
    pub(super) fn allows(&self, client: &SocketAddr) -> bool {
        self.allowed_client.as_ref().is_none_or(|allowed| allowed.address == client.ip())
    }
}

impl From<&Publish> for RelayedPort {
    fn from(port: &Publish) -> Self {
        let Publish { address, host_port, inner_port, protocol, proxy_protocol } = *port;
        Self {
            address,
            allowed_client: None,
            port: host_port,
            protocol,
            target_port: inner_port,
            proxy_protocol,
            is_transparent: false,
        }
    }
}

/// A socket that listens on a port.
#[derive(Debug)]
pub struct ListenSocket {
    pub(super) port: RelayedPort,
    pub(super) socket: OwnedFd,
}

/// Listens on ports in the calling thread's network namespace.
///
/// # Errors
///
/// Returns the first failure; then the process listens on none of the ports. The failure's error number is that of the
/// system call: EADDRINUSE if another socket uses the port.
pub fn bind(ports: &[RelayedPort]) -> Result<Vec<ListenSocket>, Failure> {
    let bind_one = |port: &RelayedPort| match open(port) {
        Ok(socket) => Ok(ListenSocket { port: port.clone(), socket }),
        Err(error) => Err(failure(port, &error)),
    };
    ports.iter().map(bind_one).collect()
}

/// Returns the failure to listen on a port.
fn failure(port: &RelayedPort, error: &io::Error) -> Failure {
    let protocol = match port.protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
    };
    let address = port.address.map_or_else(|| "the host".into(), |address| address.to_string());
    let what = format!("listen on {protocol} port {} of {address}", port.port);
    let is_host_port = port.allowed_client.is_some();
    let failure = Failure::of(&what, error);
    let advice = match error.raw_os_error() {
        Some(libc::EACCES) => {
            let missing = io::Error::other("the keeper lacks the capability for ports below 1024, or has dropped it");
            let advice = format!("take the tunnel down and up again as root, or use another port than {}", port.port);
            return Failure { errno: failure.errno, ..Failure::of(&what, &missing).advise(advice) };
        }
        Some(libc::EADDRINUSE) if is_host_port => "stop the program that uses the port (`ss -tuapn` shows it)",
        Some(libc::EADDRINUSE) => "stop the program that uses the port (`ss -tulpn` shows it), or publish another port",
        Some(libc::EPERM) if is_host_port => "use Linux 5.7 or newer, which allows SO_BINDTODEVICE without CAP_NET_RAW",
        Some(libc::EMFILE) => {
            "name fewer ports, or raise the hard limit of open files (`ulimit -Hn`, LimitNOFILE= of a service): each \
             port needs one"
        }
        Some(libc::EADDRNOTAVAIL) => "publish on an address that the host has, or on all by leaving it out",
        _ => return failure,
    };
    failure.advise(advice)
}

fn open(port: &RelayedPort) -> io::Result<OwnedFd> {
    let any = [IpAddr::from(Ipv6Addr::UNSPECIFIED), IpAddr::from(Ipv4Addr::UNSPECIFIED)];
    let addresses = port.address.as_ref().map_or(any.as_slice(), std::slice::from_ref);
    for address in addresses {
        match open_at(*address, port) {
            // The host has no IPv6, so IPv4 is tried next.
            Err(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL) if port.address.is_none() && address.is_ipv6() => {}
            other => return Ok(other?),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EADDRNOTAVAIL))
}

fn open_at(address: IpAddr, port: &RelayedPort) -> nix::Result<OwnedFd> {
    let kind = match port.protocol {
        Protocol::Tcp => SockType::Stream,
        Protocol::Udp => SockType::Datagram,
    };
    let address = SocketAddr::new(address, port.port);
    let opened = new_socket(address, kind)?;
    if address.is_ipv6() {
        socket::setsockopt(&opened, sockopt::Ipv6V6Only, &port.address.is_some())?;
    }
    if let Some(AllowedClient { interface, .. }) = &port.allowed_client {
        // Before bind(2), so that no client can connect by another interface meanwhile.
        socket::setsockopt(&opened, sockopt::BindToDevice, &interface.as_str().into())?;
    }
    if port.is_transparent {
        // IPv6 sockets have the same flag.
        socket::setsockopt(&opened, sockopt::IpTransparent, &true)?;
    }
    match port.protocol {
        Protocol::Tcp => {
            // The next keeper can bind while connections of this one are still closing (tcp(7)).
            socket::setsockopt(&opened, sockopt::ReuseAddr, &true)?;
            // Accepted sockets inherit this: urgent data (tcp(7)) stays in order with the rest, and none of it is lost.
            socket::setsockopt(&opened, sockopt::OobInline, &true)?;
        }
        Protocol::Udp => udp::report_destinations(&opened, address, port.is_transparent)?,
    }
    socket::bind(opened.as_raw_fd(), &SockaddrStorage::from(address))?;
    if port.protocol == Protocol::Tcp {
        // The kernel lowers the backlog to its own limit (somaxconn). nix's wrapper is not used as it refuses more than
        // the C library's SOMAXCONN, which is 128 in musl.
        rustix::net::listen(&opened, BACKLOG).map_err(|error| Errno::from_raw(error.raw_os_error()))?;
    }
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_to_listen_says_what_to_do_and_keeps_its_error_number() {
        let publish = Publish {
            address: Some(Ipv4Addr::LOCALHOST.into()),
            host_port: 80,
            inner_port: 8080,
            protocol: Protocol::Tcp,
            proxy_protocol: None,
        };
        let port = RelayedPort::from(&publish);
        for (errno, reason, advice) in [
            (libc::EADDRINUSE, "in use", "publish another port"),
            (libc::EACCES, "below 1024", "another port than 80"),
            (libc::EMFILE, "open files", "LimitNOFILE="),
            (libc::EADDRNOTAVAIL, "assign requested address", "an address that the host has"),
        ] {
            let failure = failure(&port, &io::Error::from_raw_os_error(errno));
            assert!(failure.message.starts_with("cannot listen on TCP port 80 of 127.0.0.1: "), "{failure}");
            assert!(failure.message.contains(reason), "{failure}");
            assert!(failure.advice.as_deref().is_some_and(|text| text.contains(advice)), "{failure:?}");
            assert_eq!(failure.errno, Some(errno));
        }
    }
}
