//! The original destinations of a transparent port: addresses of other hosts, to which its clients are relayed.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use ipnet::IpNet;
use nix::sys::socket::{self, SockType, SockaddrStorage, sockopt};

use super::new_socket;
use crate::linux::namespace::NamespaceThread;

/// The destinations that are allowed.
#[derive(Clone, Debug, Default)]
pub struct AllowedDestinations {
    /// The first network that contains an address decides whether it is allowed.
    pub networks: Vec<(IpNet, bool)>,
    /// The ports of name resolution, where only the resolvers are allowed.
    pub name_ports: &'static [u16],
    /// The resolvers that are allowed, with the port at which each is asked.
    pub resolvers: Vec<SocketAddr>,
}

/// The destinations to which a transparent port relays, and the means to reply from them.
#[derive(Debug)]
pub struct Destinations {
    allowed: AllowedDestinations,
    /// A thread in the namespace of the clients, where these addresses are local.
    clients: NamespaceThread,
}

impl Destinations {
    /// Returns the allowed destinations. `clients` is a thread in the namespace of the clients.
    pub fn new(allowed: AllowedDestinations, clients: NamespaceThread) -> Self {
        Self { allowed, clients }
    }

    pub(super) fn set_allowed(&mut self, allowed: AllowedDestinations) {
        self.allowed = allowed;
    }

    /// Returns whether clients are relayed to an address.
    pub(super) fn allow(&self, destination: &SocketAddr) -> bool {
        if self.allowed.name_ports.contains(&destination.port()) {
            return self.allowed.resolvers.contains(destination);
        }
        let mut networks = self.allowed.networks.iter();
        networks.find(|(net, _)| net.contains(&destination.ip())).is_some_and(|(_, is_allowed)| *is_allowed)
    }

    /// Returns a UDP socket whose datagrams come from a destination. It stays unconnected: the datagrams to a connected
    /// one would not reach the port (`nf_tproxy_get_sock_v4()` in the kernel's net/ipv4/netfilter/nf_tproxy_ipv4.c).
    ///
    /// # Errors
    /// Fails as socket(2) and bind(2) do.
    pub(super) fn reply_from(&self, destination: SocketAddr) -> io::Result<OwnedFd> {
        let open = move || -> nix::Result<OwnedFd> {
            let replies = new_socket(destination, SockType::Datagram)?;
            // Several clients may send to one destination.
            socket::setsockopt(&replies, sockopt::ReuseAddr, &true)?;
            // IPv6 takes only addresses of interfaces for its own, not those of local routes.
            socket::setsockopt(&replies, sockopt::IpFreebind, &true)?;
            socket::bind(replies.as_raw_fd(), &SockaddrStorage::from(destination))?;
            Ok(replies)
        };
        Ok(self.clients.run(open)??)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::capabilities::CapabilitySet;
    use crate::linux::namespace::NetworkNamespace;

    #[test]
    fn the_first_network_that_contains_an_address_decides_except_at_the_ports_of_name_resolution() {
        let here = NetworkNamespace::current().expect("a namespace");
        let clients = NamespaceThread::start(here, CapabilitySet::empty()).expect("a thread");
        let networks = [("10.1.2.0/24", true), ("10.1.0.0/16", false), ("10.0.0.0/8", true), ("fd07::/64", true)];
        let networks = networks.map(|(net, is_allowed)| (net.parse().expect("a network"), is_allowed));
        let resolvers =
            vec!["10.1.2.53:53".parse().expect("an address"), "[fd08::53]:853".parse().expect("an address")];
        let destinations = Destinations::new(
            AllowedDestinations { networks: networks.into(), name_ports: &[53, 853, 5353, 5355], resolvers },
            clients,
        );
        for (address, is_allowed) in [
            ("10.1.2.3:80", true),
            ("10.1.3.3:80", false),
            ("10.2.0.1:80", true),
            ("127.0.0.1:80", false),
            ("[fd07::1]:80", true),
            ("[fd08::1]:80", false),
            ("[::ffff:10.2.0.1]:80", false),
            ("[::1]:80", false),
            ("10.1.2.53:53", true),
            ("10.1.2.53:853", false),
            ("10.1.2.3:53", false),
            ("10.1.2.3:5353", false),
            ("[fd08::53]:853", true),
            ("[fd07::1]:5355", false),
        ] {
            assert_eq!(destinations.allow(&address.parse().expect("an address")), is_allowed, "{address}");
        }
    }
}
