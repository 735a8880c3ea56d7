//! The addresses of the veth: a /31 (RFC 3021) of private IPv4 space and a /127 (RFC 6164) of unique local IPv6 space
//! (RFC 4193), derived from the tunnel's name, so that they are the same each time, and moved out of the way of everything
//! that the host or the tunnel reaches.
//!
//! # The derivation
//!
//! A pool is a row of places, each of two addresses. IPv4 has four pools, tried in turn: 10.0.0.0/8, 172.16.0.0/12 and
//! 192.168.0.0/16 (RFC 1918) and 100.64.0.0/10 (RFC 6598), every /31 of them a place. IPv6 has one: the /127 that begins with
//! `::2` in subnet 0 of each of the 2^40 global IDs of fd00::/8. (Not `::0`: RFC 6164 section 5.2 keeps the addresses whose
//! last 64 bits are zero for the subnet routers' anycast.)
//!
//! The place is [`stable::number`] for the purpose `veth-ipv4` or `veth-ipv6` modulo the number of places, with the attempt
//! counting from 0 to 63 while the place is taken; after these the first free place that follows that of attempt 0, around the
//! end of the pool. So a pool counts as full only when it is. Guesses come first because the place right behind a network
//! that is in use is the likeliest to be in use tomorrow.
//!
//! # What is out of bounds
//!
//! A place shadows a destination: what the host or the program sends to these two addresses takes the veth. Never taken are
//! places that overlap a route of the host (its own addresses are among them, by its local table), or an address of the
//! tunnel, its resolvers or its endpoints. Default routes are no reason, nor are routes that stand in for one, such as
//! 0.0.0.0/1 and 128.0.0.0/1: a prefix shorter than the widest private block (/8 in IPv4, /7 in IPv6) speaks of the
//! Internet, not of a private network that holds our place. Those of the host are still avoided where another pool is free.
//!
//! AllowedIPs, the networks of the tunnel's addresses and local networks are avoided in the same way. But they may cover all private
//! space, and the tunnel must still work: then the longest of them are kept clear as long as that can be, the shortest given
//! up first, and a note says which two addresses lead to the host instead.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::error::PlanError;
use super::facts::Facts;
use super::{Findings, stable};
use crate::config::{Config, Endpoint};
use crate::names::TunnelName;

/// How many places of a pool are guessed before the next free one is searched for.
const GUESSES: u32 = 64;

/// A row of places of two addresses each.
struct Pool {
    /// The first address of the first place.
    first: u128,
    /// How many addresses lie between the beginnings of two places.
    stride: u128,
    /// How many places there are: a power of two.
    places: u64,
}

/// What sets the two families apart.
struct Family {
    name: &'static str,
    purpose: &'static str,
    pools: &'static [Pool],
    pools_text: &'static str,
    /// For each pass over the pools: the shortest prefix that is kept clear among the host's routes, and among the tunnel's.
    passes: &'static [(u8, u8)],
}

const fn ipv4_pool(network: [u8; 4], length: u8) -> Pool {
    Pool { first: u32::from_be_bytes(network) as u128, stride: 2, places: 1 << (31 - length) }
}

const IPV4: Family = Family {
    name: "IPv4",
    purpose: "veth-ipv4",
    pools: &[
        ipv4_pool([10, 0, 0, 0], 8),
        ipv4_pool([172, 16, 0, 0], 12),
        ipv4_pool([192, 168, 0, 0], 16),
        ipv4_pool([100, 64, 0, 0], 10),
    ],
    pools_text: "10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16 and 100.64.0.0/10",
    // Given up in turn: what is as wide as a pool, as one of RFC 1918's smaller blocks, as a LAN, and then anything.
    passes: &[(1, 8), (8, 8), (8, 13), (8, 17), (8, 25), (8, 33)],
};

const IPV6: Family = Family {
    name: "IPv6",
    purpose: "veth-ipv6",
    pools: &[Pool { first: (0xfd << 120) + 2, stride: 1 << 80, places: 1 << 40 }],
    pools_text: "fd00::/8",
    // Given up in turn: all unique local space, a site, a LAN, and then anything.
    passes: &[(1, 7), (7, 7), (7, 9), (7, 49), (7, 65), (7, 129)],
};

/// The veth's addresses: the host's, then the inner one, of each family.
pub(super) struct Addresses {
    pub(super) ipv4: (Ipv4Addr, Ipv4Addr),
    pub(super) ipv6: Option<(Ipv6Addr, Ipv6Addr)>,
}

/// Everything that the veth must stay clear of.
struct Claims {
    /// The host's routes, which are given up only where they stand in for a default route.
    host: Vec<IpNet>,
    /// Single addresses, never given up.
    single: Vec<IpNet>,
    /// What is routed into the tunnel or is local, given up last.
    tunnel: Vec<IpNet>,
}

/// Derives the addresses, moved out of the way of the host's routes and of what the tunnel is for.
pub(super) fn derive(
    config: &Config,
    facts: &Facts,
    servers: &[IpAddr],
    ipv6: bool,
    findings: &mut Findings,
) -> Option<Addresses> {
    let claims = Claims::collect(config, facts, servers);
    let low_ipv4 = place(&IPV4, &config.name, &claims, findings).map(|low| Ipv4Addr::from(low as u32));
    let low_ipv6 = ipv6.then(|| place(&IPV6, &config.name, &claims, findings).map(Ipv6Addr::from));
    let ipv6 = match low_ipv6 {
        Some(low) => low.map(|low| Some((low, Ipv6Addr::from(u128::from(low) + 1))))?,
        None => None,
    };
    let low = low_ipv4?;
    Some(Addresses { ipv4: (low, Ipv4Addr::from(u32::from(low) + 1)), ipv6 })
}

impl Claims {
    fn collect(config: &Config, facts: &Facts, servers: &[IpAddr]) -> Self {
        let addresses = &config.wireguard.interface.addresses;
        let endpoints = config.wireguard.peers.iter().filter_map(|peer| match peer.endpoint {
            Some(Endpoint::Address { address, .. }) => Some(address.ip()),
            _ => None,
        });
        let single = addresses
            .iter()
            .map(IpNet::addr)
            .chain(servers.iter().copied())
            .chain(endpoints)
            .chain(facts.endpoint_routes.iter().map(|route| route.address));
        let allowed = config.wireguard.peers.iter().flat_map(|peer| &peer.allowed_ips);
        Self {
            host: facts.routes.iter().map(|route| route.destination).collect(),
            single: single.map(IpNet::from).collect(),
            tunnel: addresses.iter().chain(allowed).chain(&config.local.networks).map(IpNet::trunc).collect(),
        }
    }

    /// What is out of bounds in a pass: ranges of addresses, both ends included, in order and apart from each other.
    fn taken(&self, family: &Family, (host, tunnel): (u8, u8)) -> Vec<(u128, u128)> {
        let host = self.host.iter().filter(|net| net.prefix_len() >= host);
        let tunnel = self.tunnel.iter().filter(|net| net.prefix_len() >= tunnel);
        let mut ranges: Vec<_> =
            host.chain(&self.single).chain(tunnel).filter(|net| family.has(net)).map(range).collect();
        ranges.sort_unstable();
        let mut apart: Vec<(u128, u128)> = Vec::with_capacity(ranges.len());
        for (start, end) in ranges {
            match apart.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => apart.push((start, end)),
            }
        }
        apart
    }
}

impl Family {
    fn has(&self, net: &IpNet) -> bool {
        matches!(net, IpNet::V6(_)) == (self.name == IPV6.name)
    }
}

/// The lower address of the place for a tunnel.
fn place(family: &Family, name: &TunnelName, claims: &Claims, findings: &mut Findings) -> Option<u128> {
    let guesses: Vec<u64> = (0..GUESSES).map(|attempt| stable::number(family.purpose, name, attempt)).collect();
    for (pass, limits) in family.passes.iter().enumerate() {
        let taken = claims.taken(family, *limits);
        let Some(low) = family.pools.iter().find_map(|pool| pool.free_place(&guesses, &taken)) else { continue };
        // The first two passes keep clear of all that speaks of private networks.
        if pass > 1 {
            note_shadow(family, low, claims, findings);
        }
        return Some(low);
    }
    findings.refuse(PlanError::NoFreeAddresses { family: family.name, pools: family.pools_text });
    None
}

/// Says which two addresses of the tunnel's networks are not reached through the tunnel.
fn note_shadow(family: &Family, low: u128, claims: &Claims, findings: &mut Findings) {
    let narrowest = claims
        .tunnel
        .iter()
        .filter(|net| family.has(net) && range(net).0 <= low + 1 && low <= range(net).1)
        .max_by_key(|net| net.prefix_len());
    if let Some(net) = narrowest {
        let address = |number: u128| match net {
            IpNet::V4(_) => IpAddr::from(Ipv4Addr::from(number as u32)),
            IpNet::V6(_) => IpAddr::from(Ipv6Addr::from(number)),
        };
        findings.note(format!(
            "{} and {} lead to the host although {net} is routed into the tunnel: every private {} network is in use by the \
             host or the tunnel.",
            address(low),
            address(low + 1),
            family.name,
        ));
    }
}

impl Pool {
    /// The lower address of the first free place: of the guesses, else of those that follow the first guess.
    fn free_place(&self, guesses: &[u64], taken: &[(u128, u128)]) -> Option<u128> {
        let guesses = guesses.iter().map(|guess| guess % self.places);
        if let Some(free) = guesses.clone().find(|place| self.obstacle(*place, taken).is_none()) {
            return Some(self.address(free));
        }
        let first = guesses.into_iter().next().unwrap_or(0);
        let free = self.search(first, self.places, taken).or_else(|| self.search(0, first, taken));
        free.map(|place| self.address(place))
    }

    /// The first free place from `from` on and before `end`, leaping over what is taken.
    fn search(&self, from: u64, end: u64, taken: &[(u128, u128)]) -> Option<u64> {
        let mut place = from;
        while place < end {
            let Some(last) = self.obstacle(place, taken) else { return Some(place) };
            // An obstacle ends at or behind the beginning of this place, so this is a later one.
            let next = (last - self.first) / self.stride + 1;
            place = u64::try_from(next).ok()?;
        }
        None
    }

    /// The last address of a range that overlaps the place; never below the place's first.
    fn obstacle(&self, place: u64, taken: &[(u128, u128)]) -> Option<u128> {
        let low = self.address(place);
        let (start, end) = taken.get(taken.partition_point(|(_, end)| *end < low))?;
        (*start <= low + 1).then_some(*end)
    }

    fn address(&self, place: u64) -> u128 {
        self.first + u128::from(place) * self.stride
    }
}

/// A network as its first and last address.
fn range(net: &IpNet) -> (u128, u128) {
    match net {
        IpNet::V4(net) => (u32::from(net.network()).into(), u32::from(net.broadcast()).into()),
        IpNet::V6(net) => (net.network().into(), net.broadcast().into()),
    }
}
