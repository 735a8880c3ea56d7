//! Which client holds how many connections or flows, and which of them is evicted when there is no room for another.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Instant;

/// How often a connection or flow is evicted for one new client. Once is enough, unless another relay of the process
/// takes the descriptors that became free.
pub(super) const EVICTION_ATTEMPTS: usize = 16;

/// A client, identified by its IPv4 address or by the /64 network of its IPv6 address. A single host or household is
/// usually given a /64 (RFC 6177 section 2), and can use any of its 2^64 addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Client(IpAddr);

impl From<SocketAddr> for Client {
    fn from(address: SocketAddr) -> Self {
        // An IPv6 socket that also accepts IPv4 reports IPv4-mapped addresses.
        Self(match address.ip().to_canonical() {
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
            ipv4 => ipv4,
        })
    }
}

impl std::fmt::Display for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            IpAddr::V4(ip) => ip.fmt(f),
            IpAddr::V6(ip) => write!(f, "{ip}/64"),
        }
    }
}

/// All connections or flows, by client.
///
/// The time of last use is kept with each connection, since it changes with every packet. The times here are copies
/// that can only be too early. So the entry that sorts first is refreshed before it counts.
pub(super) struct Clients<K> {
    entries: HashMap<K, Entry>,
    by_client: HashMap<Client, Holdings<K>>,
    /// The clients, sorted by how many entries they hold, then by how long the longest-idle of these has been idle. The
    /// first to evict from is last.
    ranking: BTreeSet<(usize, Reverse<Instant>, Client)>,
}

/// A connection or flow.
#[derive(Clone, Copy)]
struct Entry {
    client: Client,
    /// The token of its port.
    port: u64,
    /// A copy of the time of its last use.
    used: Instant,
}

/// The connections or flows of a client.
struct Holdings<K> {
    /// By port, sorted by the copies of the time of last use.
    by_port: HashMap<u64, BTreeSet<(Instant, K)>>,
    /// The client's position in the ranking.
    rank: (usize, Reverse<Instant>),
}

impl<K: Ord> Holdings<K> {
    fn current_rank(&self) -> Option<(usize, Reverse<Instant>)> {
        let count = self.by_port.values().map(BTreeSet::len).sum();
        let oldest = self.by_port.values().filter_map(|entries| entries.first()).map(|(used, _)| *used).min()?;
        Some((count, Reverse(oldest)))
    }
}

impl<K: Copy + Eq + std::hash::Hash + Ord> Clients<K> {
    pub(super) fn new() -> Self {
        Self { entries: HashMap::new(), by_client: HashMap::new(), ranking: BTreeSet::new() }
    }

    /// Adds a connection or flow.
    pub(super) fn add(&mut self, key: K, client: Client, port: u64, used: Instant) {
        self.remove(&key);
        self.entries.insert(key, Entry { client, port, used });
        let holdings = self
            .by_client
            .entry(client)
            .or_insert_with(|| Holdings { by_port: HashMap::new(), rank: (0, Reverse(used)) });
        holdings.by_port.entry(port).or_default().insert((used, key));
        self.rank(client);
    }

    /// Removes a connection or flow that has ended.
    pub(super) fn remove(&mut self, key: &K) {
        let Some(Entry { client, port, used }) = self.entries.remove(key) else { return };
        let Some(holdings) = self.by_client.get_mut(&client) else { return };
        if let Some(entries) = holdings.by_port.get_mut(&port) {
            entries.remove(&(used, *key));
            if entries.is_empty() {
                holdings.by_port.remove(&port);
            }
        }
        self.rank(client);
    }

    /// Updates the position of a client in the ranking.
    fn rank(&mut self, client: Client) {
        let Some(holdings) = self.by_client.get_mut(&client) else { return };
        let (count, oldest) = holdings.rank;
        self.ranking.remove(&(count, oldest, client));
        match holdings.current_rank() {
            Some(rank) => {
                holdings.rank = rank;
                self.ranking.insert((rank.0, rank.1, client));
            }
            None => drop(self.by_client.remove(&client)),
        }
    }

    /// Chooses the connection or flow to evict for a new client: the longest-idle one of the client that holds most.
    /// The new client itself comes first among clients that hold equally many.
    ///
    /// `may_evict` returns whether entries of a port may be evicted, `last_use` when an entry was last used.
    pub(super) fn choose_to_evict(
        &mut self,
        newcomer: Client,
        may_evict: impl Fn(u64) -> bool,
        last_use: impl Fn(&K) -> Option<Instant>,
    ) -> Option<(K, Client)> {
        let first = loop {
            let eligible = |client: &Client| {
                let ports = self.by_client.get(client).map(|holdings| &holdings.by_port);
                ports.is_some_and(|ports| ports.keys().any(|port| may_evict(*port)))
            };
            let first = self.ranking.iter().rev().map(|(_, _, client)| *client).find(eligible)?;
            // Its position is only certain once the times of its longest-idle entries are up to date.
            if !self.refresh(first, &last_use) {
                break first;
            }
        };
        let count = |client: &Client| self.by_client.get(client).map_or(0, |holdings| holdings.rank.0);
        let candidates = if count(&newcomer) == count(&first) { [newcomer, first] } else { [first, newcomer] };
        candidates.into_iter().find_map(|client| {
            self.refresh(client, &last_use);
            let ports = &self.by_client.get(&client)?.by_port;
            let oldest = ports.iter().filter(|(port, _)| may_evict(**port)).filter_map(|(_, entries)| entries.first());
            oldest.min().map(|(_, key)| (*key, client))
        })
    }

    /// Updates the times of a client's entries until the longest-idle one of each port is certain. Returns whether the
    /// client's position in the ranking has changed.
    fn refresh(&mut self, client: Client, last_use: impl Fn(&K) -> Option<Instant>) -> bool {
        let Some(holdings) = self.by_client.get_mut(&client) else { return false };
        let former = holdings.rank;
        for entries in holdings.by_port.values_mut() {
            while let Some((known, key)) = entries.first().copied()
                && let Some(used) = last_use(&key).filter(|used| *used > known)
            {
                entries.remove(&(known, key));
                entries.insert((used, key));
                if let Some(entry) = self.entries.get_mut(&key) {
                    entry.used = used;
                }
            }
        }
        self.rank(client);
        self.by_client.get(&client).is_some_and(|holdings| holdings.rank != former)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn client(address: &str) -> Client {
        SocketAddr::new(address.parse().expect("an address"), 1).into()
    }

    /// Connections by number, and when each was last used.
    struct Fixture {
        begin: Instant,
        clients: Clients<u64>,
        used: HashMap<u64, Instant>,
    }

    impl Fixture {
        fn new() -> Self {
            Self { begin: Instant::now(), clients: Clients::new(), used: HashMap::new() }
        }

        fn at(&self, seconds: u64) -> Instant {
            self.begin + Duration::from_secs(seconds)
        }

        fn add(&mut self, key: u64, address: &str, port: u64, seconds: u64) {
            self.clients.add(key, client(address), port, self.at(seconds));
            self.used.insert(key, self.at(seconds));
        }

        fn choose_to_evict(&mut self, newcomer: &str, ports: &[u64]) -> Option<u64> {
            let chosen = self.clients.choose_to_evict(
                client(newcomer),
                |port| ports.contains(&port),
                |key| self.used.get(key).copied(),
            );
            chosen.map(|(key, _)| key)
        }
    }

    #[test]
    fn the_longest_idle_connection_of_the_client_that_holds_most_is_evicted() {
        let mut fixture = Fixture::new();
        fixture.add(1, "192.0.2.1", 0, 0);
        for (key, seconds) in [(2, 3), (3, 1), (4, 2)] {
            fixture.add(key, "192.0.2.2", 0, seconds);
        }
        assert_eq!(fixture.choose_to_evict("192.0.2.3", &[0]), Some(3), "not the longest-idle of all");
        // Two connections are used meanwhile.
        fixture.used.insert(3, fixture.at(9));
        fixture.used.insert(4, fixture.at(8));
        assert_eq!(fixture.choose_to_evict("192.0.2.3", &[0]), Some(2));
        fixture.clients.remove(&2);
        assert_eq!(fixture.choose_to_evict("192.0.2.3", &[0]), Some(4));
        fixture.clients.remove(&4);
        // Each client holds one: the longest-idle of all, unless the new client itself has one.
        assert_eq!(fixture.choose_to_evict("192.0.2.3", &[0]), Some(1));
        assert_eq!(fixture.choose_to_evict("192.0.2.2", &[0]), Some(3));
        fixture.used.insert(1, fixture.at(10));
        assert_eq!(fixture.choose_to_evict("192.0.2.3", &[0]), Some(3));
        for key in [1, 3] {
            fixture.clients.remove(&key);
        }
        assert_eq!(fixture.choose_to_evict("192.0.2.3", &[0]), None);
        let Clients { entries, by_client, ranking } = fixture.clients;
        assert!(
            entries.is_empty() && by_client.is_empty() && ranking.is_empty(),
            "ended connections leave nothing behind"
        );
    }

    #[test]
    fn only_connections_of_eligible_ports_are_evicted() {
        let mut fixture = Fixture::new();
        for key in 0..4 {
            fixture.add(key, "192.0.2.1", 0, key);
        }
        fixture.add(4, "192.0.2.1", 1, 9);
        fixture.add(5, "192.0.2.2", 1, 5);
        // A client's connections are counted over all ports.
        assert_eq!(fixture.choose_to_evict("192.0.2.3", &[1]), Some(4));
        assert_eq!(fixture.choose_to_evict("192.0.2.3", &[0, 1]), Some(0));
        assert_eq!(fixture.choose_to_evict("192.0.2.3", &[2]), None);
        fixture.clients.remove(&4);
        assert_eq!(fixture.choose_to_evict("192.0.2.3", &[1]), Some(5), "the other client has none on this port");
    }

    #[test]
    fn a_client_is_an_ipv4_address_or_an_ipv6_network() {
        for (one, other, is_same) in [
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "192.0.2.2", false),
            ("192.0.2.1", "::ffff:192.0.2.1", true),
            ("::ffff:192.0.2.1", "::ffff:192.0.2.2", false),
            ("2001:db8::1", "2001:db8::ffff:1", true),
            ("2001:db8::1", "2001:db8:0:0:ffff:ffff:ffff:ffff", true),
            ("2001:db8:0:1::1", "2001:db8:0:2::1", false),
        ] {
            assert_eq!(client(one) == client(other), is_same, "{one} and {other}");
        }
        assert_eq!(client("2001:db8::1").to_string(), "2001:db8::/64");
        assert_eq!(client("::ffff:192.0.2.1").to_string(), "192.0.2.1");
    }
}
