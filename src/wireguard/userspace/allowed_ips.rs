//! Cryptokey routing (WireGuard paper, section 2): the longest prefix that contains an inner address determines its
//! peer, for packets to send and to check the source of received packets.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

/// The index of a peer in its device.
pub(super) type PeerIndex = usize;

/// The AllowedIPs of all peers. A prefix belongs to the last peer that claimed it, as in the kernel.
#[derive(Default)]
pub(super) struct AllowedIps {
    ipv4: PrefixMap<Ipv4Net, PeerIndex>,
    ipv6: PrefixMap<Ipv6Net, PeerIndex>,
}

impl AllowedIps {
    /// Assigns a prefix to a peer. Bits beyond the prefix are ignored.
    pub(super) fn claim(&mut self, prefix: IpNet, peer: PeerIndex) {
        match prefix {
            IpNet::V4(prefix) => self.ipv4.insert(prefix, peer),
            IpNet::V6(prefix) => self.ipv6.insert(prefix, peer),
        };
    }

    /// Returns the peer of an address.
    pub(super) fn peer_of(&self, address: IpAddr) -> Option<PeerIndex> {
        match address {
            IpAddr::V4(address) => self.ipv4.get_lpm(&Ipv4Net::from(address)).map(|(_, peer)| *peer),
            IpAddr::V6(address) => self.ipv6.get_lpm(&Ipv6Net::from(address)).map(|(_, peer)| *peer),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(claims: &[(&str, PeerIndex)]) -> AllowedIps {
        let mut table = AllowedIps::default();
        for (prefix, peer) in claims {
            table.claim(prefix.parse().expect("a prefix"), *peer);
        }
        table
    }

    fn peer_of(table: &AllowedIps, address: &str) -> Option<PeerIndex> {
        table.peer_of(address.parse().expect("an address"))
    }

    #[test]
    fn the_longest_prefix_wins_whatever_the_order() {
        for claims in [
            [("0.0.0.0/0", 0), ("10.0.0.0/8", 1), ("10.1.0.0/16", 2)],
            [("10.1.0.0/16", 2), ("10.0.0.0/8", 1), ("0.0.0.0/0", 0)],
        ] {
            let table = table(&claims);
            assert_eq!(peer_of(&table, "10.1.2.3"), Some(2));
            assert_eq!(peer_of(&table, "10.2.0.1"), Some(1));
            assert_eq!(peer_of(&table, "192.0.2.1"), Some(0));
            assert_eq!(peer_of(&table, "2001:db8::1"), None);
        }
    }

    #[test]
    fn a_prefix_belongs_to_the_last_peer_that_claims_it() {
        let table = table(&[("2001:db8::/32", 0), ("2001:db8::1/32", 1), ("2001:db8::1/128", 0)]);
        assert_eq!(peer_of(&table, "2001:db8::2"), Some(1));
        assert_eq!(peer_of(&table, "2001:db8::1"), Some(0));
        assert_eq!(peer_of(&table, "2001:db9::1"), None);
    }

    proptest! {
        #[test]
        fn the_table_agrees_with_a_linear_search(
            claims in prop::collection::vec((any::<u32>(), 0u8..=32, 0usize..4), 0..24),
            addresses in prop::collection::vec(any::<u32>(), 1..24),
        ) {
            // The addresses share high bits, so that prefixes overlap.
            let near = |bits: u32| std::net::Ipv4Addr::from(bits & 0x0303_0303);
            let mut table = AllowedIps::default();
            let mut list: Vec<(Ipv4Net, PeerIndex)> = Vec::new();
            for (bits, length, peer) in claims {
                let prefix = Ipv4Net::new(near(bits), length).expect("a prefix").trunc();
                table.claim(prefix.into(), peer);
                list.retain(|(other, _)| *other != prefix);
                list.push((prefix, peer));
            }
            for bits in addresses {
                let address = near(bits);
                let matching = list.iter().filter(|(prefix, _)| prefix.contains(&address));
                let expected = matching.max_by_key(|(prefix, _)| prefix.prefix_len()).map(|(_, peer)| *peer);
                prop_assert_eq!(table.peer_of(address.into()), expected);
            }
        }
    }
}
