//! Which client holds how many connections or flows, and which of them gives way when there is no room for another.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Instant;

/// How often something gives way for one newcomer. Once is enough, unless another relay of the process takes what has become free.
pub(super) const ATTEMPTS: usize = 16;

/// A client, as far as its address tells: an IPv4 address, or the /64 network of an IPv6 address. A /64 is what a single host or household
/// is given (RFC 6177 section 2), and such a host can use any of its 2^64 addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Client(IpAddr);

impl From<SocketAddr> for Client {
    fn from(address: SocketAddr) -> Self {
        // A socket of IPv6 that accepts IPv4 as well reports IPv4-mapped addresses.
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

/// All connections, or all flows, by client.
///
/// The time of last use of each is kept where it is used, since that changes with every packet. What is sorted here is the time that was
/// known when it was last looked at. It can only be too early, so whatever comes first is looked at again before it counts.
pub(super) struct Clients<K> {
    held: HashMap<K, Entry>,
    by_client: HashMap<Client, Holdings<K>>,
    /// The clients, the one that holds most last; among equals the one whose longest-idle connection has been idle for longest.
    ranking: BTreeSet<(usize, Reverse<Instant>, Client)>,
}

/// One connection or flow.
#[derive(Clone, Copy)]
struct Entry {
    client: Client,
    /// The token of the port that it came by.
    port: u64,
    /// When it was last used, as far as is known here.
    used: Instant,
}

/// What one client holds.
struct Holdings<K> {
    /// By port, in the order of use as far as known.
    by_port: HashMap<u64, BTreeSet<(Instant, K)>>,
    /// Its place in the ranking.
    rank: (usize, Reverse<Instant>),
}

impl<K: Ord> Holdings<K> {
    fn current_rank(&self) -> Option<(usize, Reverse<Instant>)> {
        let count = self.by_port.values().map(BTreeSet::len).sum();
        let oldest = self.by_port.values().filter_map(|held| held.first()).map(|(used, _)| *used).min()?;
        Some((count, Reverse(oldest)))
    }
}

impl<K: Copy + Eq + std::hash::Hash + Ord> Clients<K> {
    pub(super) fn new() -> Self {
        Self { held: HashMap::new(), by_client: HashMap::new(), ranking: BTreeSet::new() }
    }

    /// Notes what a client holds from now on.
    pub(super) fn add(&mut self, key: K, client: Client, port: u64, used: Instant) {
        self.remove(&key);
        self.held.insert(key, Entry { client, port, used });
        let holdings = self
            .by_client
            .entry(client)
            .or_insert_with(|| Holdings { by_port: HashMap::new(), rank: (0, Reverse(used)) });
        holdings.by_port.entry(port).or_default().insert((used, key));
        self.rank(client);
    }

    /// Notes that a connection or flow has ended.
    pub(super) fn remove(&mut self, key: &K) {
        let Some(Entry { client, port, used }) = self.held.remove(key) else { return };
        let Some(holdings) = self.by_client.get_mut(&client) else { return };
        if let Some(held) = holdings.by_port.get_mut(&port) {
            held.remove(&(used, *key));
            if held.is_empty() {
                holdings.by_port.remove(&port);
            }
        }
        self.rank(client);
    }

    /// Puts a client into its place of the ranking.
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

    /// The connection or flow that gives way to a newcomer: of the client that holds most, the one that has been idle for longest. Among
    /// clients that hold as many, the newcomer itself comes first. `may_give_way` tells of a port whether what came by it may be ended, and
    /// `last_use` when something was last used.
    pub(super) fn giving_way(
        &mut self,
        newcomer: Client,
        may_give_way: impl Fn(u64) -> bool,
        last_use: impl Fn(&K) -> Option<Instant>,
    ) -> Option<(K, Client)> {
        let first = loop {
            let eligible = |client: &Client| {
                let ports = self.by_client.get(client).map(|holdings| &holdings.by_port);
                ports.is_some_and(|ports| ports.keys().any(|port| may_give_way(*port)))
            };
            let first = self.ranking.iter().rev().map(|(_, _, client)| *client).find(eligible)?;
            // Its place among those that hold as many is not certain before its longest-idle connections have been looked at.
            if !self.look_again(first, &last_use) {
                break first;
            }
        };
        let count = |client: &Client| self.by_client.get(client).map_or(0, |holdings| holdings.rank.0);
        let chosen = if count(&newcomer) == count(&first) { [newcomer, first] } else { [first, newcomer] };
        chosen.into_iter().find_map(|client| {
            self.look_again(client, &last_use);
            let ports = &self.by_client.get(&client)?.by_port;
            let oldest = ports.iter().filter(|(port, _)| may_give_way(**port)).filter_map(|(_, held)| held.first());
            oldest.min().map(|(_, key)| (*key, client))
        })
    }

    /// Looks at the longest-idle connections of a client again, one for each port, until they are. True if its place has changed.
    fn look_again(&mut self, client: Client, last_use: impl Fn(&K) -> Option<Instant>) -> bool {
        let Some(holdings) = self.by_client.get_mut(&client) else { return false };
        let former = holdings.rank;
        for held in holdings.by_port.values_mut() {
            while let Some((known, key)) = held.first().copied()
                && let Some(used) = last_use(&key).filter(|used| *used > known)
            {
                held.remove(&(known, key));
                held.insert((used, key));
                if let Some(entry) = self.held.get_mut(&key) {
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

    /// Connections by number, each with its client, its port, and when it was last used in fact.
    struct World {
        begin: Instant,
        clients: Clients<u64>,
        used: HashMap<u64, Instant>,
    }

    impl World {
        fn new() -> Self {
            Self { begin: Instant::now(), clients: Clients::new(), used: HashMap::new() }
        }

        fn at(&self, seconds: u64) -> Instant {
            self.begin + Duration::from_secs(seconds)
        }

        fn add(&mut self, key: u64, of: &str, port: u64, seconds: u64) {
            self.clients.add(key, client(of), port, self.at(seconds));
            self.used.insert(key, self.at(seconds));
        }

        fn giving_way(&mut self, newcomer: &str, ports: &[u64]) -> Option<u64> {
            let chosen = self.clients.giving_way(
                client(newcomer),
                |port| ports.contains(&port),
                |key| self.used.get(key).copied(),
            );
            chosen.map(|(key, _)| key)
        }
    }

    #[test]
    fn the_longest_idle_connection_of_the_client_that_holds_most_gives_way() {
        let mut world = World::new();
        world.add(1, "192.0.2.1", 0, 0);
        for (key, seconds) in [(2, 3), (3, 1), (4, 2)] {
            world.add(key, "192.0.2.2", 0, seconds);
        }
        assert_eq!(world.giving_way("192.0.2.3", &[0]), Some(3), "and not the one that is idle for longest of all");
        // It was used meanwhile, and so was the next.
        world.used.insert(3, world.at(9));
        world.used.insert(4, world.at(8));
        assert_eq!(world.giving_way("192.0.2.3", &[0]), Some(2));
        world.clients.remove(&2);
        assert_eq!(world.giving_way("192.0.2.3", &[0]), Some(4));
        world.clients.remove(&4);
        // Both hold one: the longest-idle of all, unless the newcomer itself has one.
        assert_eq!(world.giving_way("192.0.2.3", &[0]), Some(1));
        assert_eq!(world.giving_way("192.0.2.2", &[0]), Some(3));
        world.used.insert(1, world.at(10));
        assert_eq!(world.giving_way("192.0.2.3", &[0]), Some(3));
        for key in [1, 3] {
            world.clients.remove(&key);
        }
        assert_eq!(world.giving_way("192.0.2.3", &[0]), None);
        let Clients { held, by_client, ranking } = world.clients;
        assert!(held.is_empty() && by_client.is_empty() && ranking.is_empty(), "something is kept of what has ended");
    }

    #[test]
    fn only_what_came_by_certain_ports_gives_way() {
        let mut world = World::new();
        for key in 0..4 {
            world.add(key, "192.0.2.1", 0, key);
        }
        world.add(4, "192.0.2.1", 1, 9);
        world.add(5, "192.0.2.2", 1, 5);
        // Who holds most is counted over all ports.
        assert_eq!(world.giving_way("192.0.2.3", &[1]), Some(4));
        assert_eq!(world.giving_way("192.0.2.3", &[0, 1]), Some(0));
        assert_eq!(world.giving_way("192.0.2.3", &[2]), None);
        world.clients.remove(&4);
        assert_eq!(world.giving_way("192.0.2.3", &[1]), Some(5), "the other has nothing there");
    }

    #[test]
    fn a_client_is_an_address_of_ipv4_or_a_network_of_ipv6() {
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
