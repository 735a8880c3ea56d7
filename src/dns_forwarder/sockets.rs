//! The sockets of a forwarder. All are opened before its thread starts, which may open none, in the namespace and with
//! CAP_NET_ADMIN: setting a mark needs it. So the thread can neither send anything elsewhere nor mark anything else.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, sockopt};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::plan::{DNS_PORT, ForwarderPlan, RESOLVER_MARK, ResolverPlan, Side};

/// How many questions of a kind are sent over UDP at the same time. Others wait.
const UDP_SOCKETS: usize = 24;

/// The same over TCP.
const TCP_SOCKETS: usize = 6;

/// The sockets on which a forwarder listens.
#[derive(Debug)]
pub struct Listeners {
    pub(super) udp: Vec<UdpSocket>,
    pub(super) tcp: Vec<TcpListener>,
}

impl Listeners {
    /// Binds to addresses of the calling thread's network namespace. Leaves an IPv6 address out if the namespace does
    /// not have it. With port 0, UDP and TCP get the same free port.
    ///
    /// # Errors
    ///
    /// Returns an error if an address cannot be bound: `PermissionDenied` for a port that needs a privilege, and
    /// `AddrInUse` if another process listens there.
    pub fn bind(addresses: &[SocketAddr]) -> io::Result<Self> {
        let mut listeners = Self { udp: Vec::new(), tcp: Vec::new() };
        for address in addresses {
            match bind_both(*address) {
                Ok((udp, tcp)) => {
                    listeners.udp.push(udp);
                    listeners.tcp.push(tcp);
                }
                Err(error) if address.is_ipv6() && has_no_such_address(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(listeners)
    }

    /// Returns the bound addresses.
    ///
    /// # Errors
    ///
    /// Returns an error if the kernel does.
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.udp.iter().map(UdpSocket::local_addr).collect()
    }
}

fn bind_both(address: SocketAddr) -> io::Result<(UdpSocket, TcpListener)> {
    let udp = UdpSocket::bind(address)?;
    let tcp = TcpListener::bind(udp.local_addr()?)?;
    udp.set_nonblocking(true)?;
    tcp.set_nonblocking(true)?;
    Ok((udp, tcp))
}

/// Returns whether the namespace, or the kernel, has no IPv6.
fn has_no_such_address(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT))
}

/// What the sockets of a pool have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Kind {
    /// Whether the sockets are marked.
    side: Side,
    is_ipv4: bool,
    pub(super) transport: Transport,
}

/// The transport protocol of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

impl Kind {
    /// Returns the kind of socket for a resolver.
    pub(super) fn of(resolver: &ResolverPlan, transport: Transport) -> Self {
        Self { side: resolver.side, is_ipv4: resolver.address.is_ipv4(), transport }
    }
}

/// Unused sockets for questions to resolvers.
#[derive(Debug)]
pub struct ResolverSockets(BTreeMap<Kind, Vec<OwnedFd>>);

impl ResolverSockets {
    /// Opens the sockets that a plan needs in the calling thread's network namespace. A plan with resolvers in local
    /// networks needs CAP_NET_ADMIN there.
    ///
    /// # Errors
    ///
    /// Returns an error if the kernel refuses a socket or its mark.
    pub fn open(plan: &ForwarderPlan) -> io::Result<Self> {
        let mut pools = BTreeMap::new();
        let both = |resolver| [Transport::Udp, Transport::Tcp].map(|transport| Kind::of(&resolver, transport));
        for kind in plan.resolvers().flat_map(both).collect::<BTreeSet<Kind>>() {
            let count = match kind.transport {
                Transport::Udp => UDP_SOCKETS,
                Transport::Tcp => TCP_SOCKETS,
            };
            pools.insert(kind, (0..count).map(|_| open(kind)).collect::<io::Result<Vec<_>>>()?);
        }
        Ok(Self(pools))
    }

    /// Returns whether there is an unused socket.
    pub(super) fn has(&self, kind: Kind) -> bool {
        self.0.get(&kind).is_some_and(|pool| !pool.is_empty())
    }

    /// Takes an unused socket.
    pub(super) fn take(&mut self, kind: Kind) -> Option<OwnedFd> {
        self.0.get_mut(&kind)?.pop()
    }

    /// Returns a socket that is not needed any more. Its connection ends, and its next one will have another port.
    pub(super) fn put_back(&mut self, kind: Kind, socket: OwnedFd) {
        let Some(pool) = self.0.get_mut(&kind) else { return };
        if rustix::net::connect_unspec(&socket).is_err() {
            return tracing::warn!("cannot use a socket for DNS questions again");
        }
        if kind.transport == Transport::Udp {
            // Messages that came too late. No more arrive, as the socket has no port now.
            while rustix::net::recv(&socket, &mut [0_u8; 1][..], RecvFlags::DONTWAIT) != Err(Errno::AGAIN) {}
        }
        pool.push(socket);
    }
}

fn open(kind: Kind) -> io::Result<OwnedFd> {
    let family = if kind.is_ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket_type = match kind.transport {
        Transport::Udp => SockType::Datagram,
        Transport::Tcp => SockType::Stream,
    };
    let socket = socket::socket(family, socket_type, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    if kind.side == Side::Local {
        socket::setsockopt(&socket, sockopt::Mark, &RESOLVER_MARK)?;
    }
    Ok(socket)
}

/// Connects a socket to a resolver. A TCP connection may still be in progress when this returns.
pub(super) fn connect(socket: &OwnedFd, resolver: IpAddr) -> io::Result<()> {
    match rustix::net::connect(socket, &SocketAddr::new(resolver, DNS_PORT)) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn pool() -> (ResolverSockets, ResolverPlan) {
        let resolver = ResolverPlan { address: Ipv4Addr::LOCALHOST.into(), side: Side::Tunnel };
        let plan = ForwarderPlan { domains: Vec::new(), others: vec![resolver], port: 0 };
        (ResolverSockets::open(&plan).expect("sockets"), resolver)
    }

    fn port(socket: &OwnedFd) -> u16 {
        SocketAddr::try_from(rustix::net::getsockname(socket).expect("a name")).expect("an address").port()
    }

    #[test]
    fn each_question_has_another_port() {
        let (mut sockets, resolver) = pool();
        let kind = Kind::of(&resolver, Transport::Udp);
        let mut ports = BTreeSet::new();
        for _ in 0..100 {
            let socket = sockets.take(kind).expect("a socket");
            assert_eq!(port(&socket), 0, "an unused socket has no port");
            connect(&socket, resolver.address).expect("a route");
            ports.insert(port(&socket));
            sockets.put_back(kind, socket);
        }
        // The kernel chooses among 28,232 ports by default, so few are equal.
        assert!(ports.len() > 90, "{ports:?}");
    }

    #[test]
    fn an_unused_socket_holds_no_late_answers() {
        let (mut sockets, resolver) = pool();
        let kind = Kind::of(&resolver, Transport::Udp);
        let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
        let socket = sockets.take(kind).expect("a socket");
        rustix::net::connect(&socket, &server.local_addr().expect("an address")).expect("a route");
        for _ in 0..3 {
            server.send_to(b"late", (Ipv4Addr::LOCALHOST, port(&socket))).expect("room");
        }
        sockets.put_back(kind, socket);
        let socket = sockets.take(kind).expect("a socket");
        let received = rustix::net::recv(&socket, &mut [0_u8; 4][..], RecvFlags::DONTWAIT).map(|(length, _)| length);
        assert_eq!(received, Err(Errno::AGAIN));
    }

    #[test]
    fn a_pool_has_an_end() {
        let (mut sockets, resolver) = pool();
        let kind = Kind::of(&resolver, Transport::Tcp);
        let taken: Vec<OwnedFd> = std::iter::from_fn(|| sockets.take(kind)).collect();
        assert_eq!((taken.len(), sockets.has(kind)), (TCP_SOCKETS, false));
        let none = Kind::of(&ResolverPlan { side: Side::Local, ..resolver }, Transport::Tcp);
        assert!(sockets.take(none).is_none(), "no resolver is in a local network");
    }

    #[test]
    fn udp_and_tcp_listen_at_the_same_port() {
        let listeners = Listeners::bind(&[SocketAddr::from((Ipv4Addr::LOCALHOST, 0))]).expect("a port");
        let addresses = listeners.addresses().expect("addresses");
        assert_eq!(addresses, [listeners.tcp[0].local_addr().expect("an address")]);
        assert_ne!(addresses[0].port(), 0);
    }
}
