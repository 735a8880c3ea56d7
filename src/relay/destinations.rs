//! The original destinations of a transparent port: addresses of other hosts, to which its clients are relayed.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use ipnet::IpNet;
use nix::sys::socket::{self, SockType, SockaddrStorage, sockopt};

use super::new_socket;
use crate::linux::namespace::NamespaceThread;

/// The destinations to which a transparent port relays, and the means to reply from them.
#[derive(Debug)]
pub struct Destinations {
    /// The first network that contains an address decides whether it is allowed.
    networks: Vec<(IpNet, bool)>,
    /// A thread in the namespace of the clients, where these addresses are local.
    clients: NamespaceThread,
}

impl Destinations {
    /// Returns the allowed ones of these networks. Of those that contain an address, the first decides. `clients` is a
    /// thread in the namespace of the clients.
    pub fn new(networks: Vec<(IpNet, bool)>, clients: NamespaceThread) -> Self {
        Self { networks, clients }
    }

    pub(super) fn set_networks(&mut self, networks: Vec<(IpNet, bool)>) {
        self.networks = networks;
    }

    /// Returns whether clients are relayed to an address.
    pub(super) fn allow(&self, destination: &SocketAddr) -> bool {
        let mut networks = self.networks.iter();
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
    fn the_first_network_that_contains_an_address_decides() {
        let here = NetworkNamespace::current().expect("a namespace");
        let clients = NamespaceThread::start(here, CapabilitySet::empty()).expect("a thread");
        let networks = [("10.1.2.0/24", true), ("10.1.0.0/16", false), ("10.0.0.0/8", true), ("fd07::/64", true)];
        let networks = networks.map(|(net, is_allowed)| (net.parse().expect("a network"), is_allowed));
        let destinations = Destinations::new(networks.into(), clients);
        for (address, is_allowed) in [
            ("10.1.2.3:80", true),
            ("10.1.3.3:80", false),
            ("10.2.0.1:80", true),
            ("127.0.0.1:80", false),
            ("[fd07::1]:80", true),
            ("[fd08::1]:80", false),
            ("[::ffff:10.2.0.1]:80", false),
            ("[::1]:80", false),
        ] {
            assert_eq!(destinations.allow(&address.parse().expect("an address")), is_allowed, "{address}");
        }
    }
}
