//! Bookkeeping of the addresses and ports that sockets listen on.

use std::collections::HashMap;
use std::net::IpAddr;

use super::Protocol;

/// A set of listening sockets, indexed by port. It may contain all ports of both protocols.
#[derive(Default)]
pub struct ListenAddresses(HashMap<(Protocol, u16), Vec<Option<IpAddr>>>);

impl ListenAddresses {
    /// Adds a socket. An address of `None` means all addresses of both families.
    pub fn add(&mut self, protocol: Protocol, port: u16, address: Option<IpAddr>) {
        self.0.entry((protocol, port)).or_default().push(address);
    }

    /// Returns whether a socket listens on a port, at any address.
    pub fn has(&self, protocol: Protocol, port: u16) -> bool {
        self.0.contains_key(&(protocol, port))
    }

    /// Returns whether a socket of the set prevents another one from listening at an address and port.
    pub fn conflict_with(&self, protocol: Protocol, port: u16, address: Option<IpAddr>) -> bool {
        self.0.get(&(protocol, port)).is_some_and(|all| all.iter().any(|other| overlap(*other, address)))
    }
}

/// Returns whether two sockets cannot listen on the same port at these addresses.
fn overlap(one: Option<IpAddr>, other: Option<IpAddr>) -> bool {
    let (Some(one), Some(other)) = (one, other) else { return true };
    // 0.0.0.0 stands for all IPv4 addresses, and :: for all IPv6 addresses.
    let covers = |some: IpAddr| some.is_unspecified() && one.is_ipv4() == other.is_ipv4();
    one == other || covers(one) || covers(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_conflict_where_their_addresses_overlap() {
        let address = |text: &str| (!text.is_empty()).then(|| text.parse().expect("an address"));
        for (one, other, expected) in [
            ("", "192.0.2.1", true),
            ("0.0.0.0", "192.0.2.1", true),
            ("0.0.0.0", "::1", false),
            ("::", "::1", true),
            ("192.0.2.1", "192.0.2.2", false),
            ("192.0.2.1", "192.0.2.1", true),
        ] {
            let mut set = ListenAddresses::default();
            set.add(Protocol::Tcp, 80, address(one));
            assert_eq!(set.conflict_with(Protocol::Tcp, 80, address(other)), expected, "{one:?} and {other:?}");
            assert!(set.has(Protocol::Tcp, 80) && !set.has(Protocol::Udp, 80));
            assert!(!set.conflict_with(Protocol::Tcp, 81, address(other)));
        }
    }
}
