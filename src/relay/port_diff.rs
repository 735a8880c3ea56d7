//! The difference between the ports that a relay serves and those of a new configuration.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use super::{AllowedClient, RelayedPort};
use crate::config::Protocol;
use crate::config::listen_addresses::ListenAddresses;

/// What changes when a relay gets another list of ports. A port that is in both lists is not part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortDiff {
    /// Ports to close.
    pub close: Vec<RelayedPort>,
    /// Ports whose target or protocol for it changes, old and new. The same socket continues to listen.
    pub retarget: Vec<(RelayedPort, RelayedPort)>,
    /// New ports that can be bound while the ports to close are still bound.
    pub open: Vec<RelayedPort>,
    /// New ports that can only be bound once conflicting ports are closed.
    pub open_after_close: Vec<RelayedPort>,
}

impl PortDiff {
    /// Returns the difference between two lists of ports. Runs in linear time, as a range may cover all 65535 ports.
    pub fn between(old: &[RelayedPort], new: &[RelayedPort]) -> Self {
        let (old_set, new_set): (HashSet<&RelayedPort>, HashSet<&RelayedPort>) =
            (old.iter().collect(), new.iter().collect());
        let removed = || old.iter().filter(|port| !new_set.contains(port));
        let removed_by_socket: HashMap<_, &RelayedPort> = removed().map(|port| (port.socket_key(), port)).collect();
        let mut retargeted: HashSet<&RelayedPort> = HashSet::new();
        let mut diff = Self::default();
        let mut added = Vec::new();
        for port in new.iter().filter(|port| !old_set.contains(port)) {
            match removed_by_socket.get(&port.socket_key()).filter(|former| retargeted.insert(former)) {
                Some(former) => diff.retarget.push(((*former).clone(), port.clone())),
                None => added.push(port.clone()),
            }
        }
        diff.close = removed().filter(|port| !retargeted.contains(port)).cloned().collect();
        let closed = listen_addresses(&diff.close);
        (diff.open_after_close, diff.open) = added.into_iter().partition(|port| port.conflicts_with(&closed));
        diff
    }

    /// Returns the ports to close that conflict with new ones.
    pub fn conflicting(&self) -> Vec<RelayedPort> {
        let new = listen_addresses(&self.open_after_close);
        self.close.iter().filter(|former| former.conflicts_with(&new)).cloned().collect()
    }
}

fn listen_addresses(ports: &[RelayedPort]) -> ListenAddresses {
    let mut addresses = ListenAddresses::default();
    for RelayedPort { port, protocol, address, .. } in ports {
        addresses.add(*protocol, *port, *address);
    }
    addresses
}

impl RelayedPort {
    /// Returns whether no socket can listen on this port while others listen on these addresses.
    fn conflicts_with(&self, others: &ListenAddresses) -> bool {
        others.conflict_with(self.protocol, self.port, self.address)
    }

    /// Returns what all ports have in common that one socket can serve.
    fn socket_key(&self) -> (Option<IpAddr>, Option<&AllowedClient>, u16, Protocol) {
        (self.address, self.allowed_client.as_ref(), self.port, self.protocol)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ports::parse_publish;

    fn ports(list: &[&str]) -> Vec<RelayedPort> {
        list.iter().flat_map(|text| parse_publish(text).expect("ports")).map(|port| RelayedPort::from(&port)).collect()
    }

    #[test]
    fn unchanged_ports_are_left_alone_and_the_rest_is_sorted() {
        let old = ports(&["1:1", "2:2", "3:3", "4:4/udp", "5:5"]);
        assert_eq!(PortDiff::between(&old, &old), PortDiff::default());
        let new = ports(&["1:1", "2:22", "127.0.0.1:3:3", "4:4", "6:6", "5:5,proxy-protocol=v2"]);
        let diff = PortDiff::between(&old, &new);
        assert_eq!(diff.close, ports(&["3:3", "4:4/udp"]));
        let retargeted = [("2:2", "2:22"), ("5:5", "5:5,proxy-protocol=v2")];
        let retargeted = retargeted.map(|(from, to)| (ports(&[from]).remove(0), ports(&[to]).remove(0)));
        assert_eq!(diff.retarget, retargeted);
        assert_eq!(diff.open, ports(&["4:4", "6:6"]), "the same number in another protocol is another port");
        assert_eq!(diff.open_after_close, ports(&["127.0.0.1:3:3"]));
        assert_eq!(diff.conflicting(), ports(&["3:3"]));
    }

    #[test]
    fn the_unspecified_address_conflicts_with_each_address_of_its_family() {
        for (old, new, conflicts) in [
            ("0.0.0.0:1:1", "127.0.0.1:1:1", true),
            ("127.0.0.1:1:1", "0.0.0.0:1:1", true),
            ("[::]:1:1", "[::1]:1:1", true),
            ("[::]:1:1", "127.0.0.1:1:1", false),
            ("0.0.0.0:1:1", "[::]:1:1", false),
            ("127.0.0.1:1:1", "127.0.0.2:1:1", false),
        ] {
            let diff = PortDiff::between(&ports(&[old]), &ports(&[new]));
            assert_eq!(!diff.open_after_close.is_empty(), conflicts, "from {old} to {new}");
            assert_eq!(diff.conflicting() == ports(&[old]), conflicts, "from {old} to {new}");
        }
    }
}
