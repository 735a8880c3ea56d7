//! The addresses of the veth pair: an IPv4 /31 (RFC 3021) of private space and an IPv6 /127 (RFC 6164) of unique local
//! space (RFC 4193). They are derived from the tunnel's name, so that they are the same each time, and avoid all
//! addresses that the host or the tunnel uses.
//!
//! # The derivation
//!
//! A pool is a series of slots of two addresses each. IPv4 has four pools, tried in this order: 10.0.0.0/8,
//! 172.16.0.0/12 and 192.168.0.0/16 (RFC 1918) and 100.64.0.0/10 (RFC 6598); each of their /31 networks is a slot. IPv6
//! has one pool: the /127 that begins with `::2` in subnet 0 of each of the 2^40 global IDs of fd00::/8. (Not `::0`:
//! RFC 6164 section 5.2 reserves addresses whose last 64 bits are zero for the subnet routers' anycast.)
//!
//! The slot's number is [`name_hash::number`] for the purpose `veth-ipv4` or `veth-ipv6`, modulo the number of slots.
//! The attempt counts from 0 to 63 while the slot is taken. After that, the first free slot after that of attempt 0 is
//! used, wrapping around at the end of the pool. So a pool only counts as full when it is. The hash comes first because
//! the slot right after a network that is in use is the most likely to be in use later.
//!
//! # Which slots are taken
//!
//! A slot shadows its destinations: packets of the host or the program to these two addresses take the veth. So slots
//! are never used that overlap a route of the host (its own addresses are among them, in its local table), or an
//! address of the tunnel, its resolvers or its endpoints. Default routes do not count, and neither do routes that
//! replace one, such as 0.0.0.0/1 and 128.0.0.0/1: a prefix shorter than that of the largest private block (/8 in IPv4,
//! /7 in IPv6) means the Internet, not a private network that contains the slot. Such routes of the host are still
//! avoided if another pool is free.
//!
//! AllowedIPs, the networks of the tunnel's addresses and local networks are avoided in the same way. But they may
//! cover all private space, and the tunnel must still work. Then the largest of them are given up first, and a note
//! says which two addresses lead to the host instead.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::error::PlanError;
use super::facts::Facts;
use super::{Findings, name_hash};
use crate::config::{Config, Endpoint};
use crate::names::TunnelName;

/// How many slots of a pool are derived by the hash before the next free one is used.
const ATTEMPTS: u32 = 64;

/// A series of slots of two addresses each.
struct Pool {
    /// The first address of the first slot.
    first: u128,
    /// The distance between the first addresses of two slots.
    stride: u128,
    /// The number of slots: a power of two.
    slots: u64,
}

/// The address space of a family, from which slots are taken.
struct AddressSpace {
    name: &'static str,
    purpose: &'static str,
    pools: &'static [Pool],
    pools_text: &'static str,
    /// For each pass over the pools: the shortest prefix length that is avoided among the host's routes, and among the
    /// tunnel's.
    passes: &'static [(u8, u8)],
}

const fn ipv4_pool(network: [u8; 4], length: u8) -> Pool {
    Pool { first: u32::from_be_bytes(network) as u128, stride: 2, slots: 1 << (31 - length) }
}

const IPV4: AddressSpace = AddressSpace {
    name: "IPv4",
    purpose: "veth-ipv4",
    pools: &[
        ipv4_pool([10, 0, 0, 0], 8),
        ipv4_pool([172, 16, 0, 0], 12),
        ipv4_pool([192, 168, 0, 0], 16),
        ipv4_pool([100, 64, 0, 0], 10),
    ],
    pools_text: "10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16 and 100.64.0.0/10",
    // Given up in this order: networks as large as a pool, as the smaller blocks of RFC 1918, as a LAN, and then all.
    passes: &[(1, 8), (8, 8), (8, 13), (8, 17), (8, 25), (8, 33)],
};

const IPV6: AddressSpace = AddressSpace {
    name: "IPv6",
    purpose: "veth-ipv6",
    pools: &[Pool { first: (0xfd << 120) + 2, stride: 1 << 80, slots: 1 << 40 }],
    pools_text: "fd00::/8",
    // Given up in this order: all unique local space, networks as large as a site, as a LAN, and then all.
    passes: &[(1, 7), (7, 7), (7, 9), (7, 49), (7, 65), (7, 129)],
};

/// The veth's addresses of each family: the host's, then the namespace's.
pub(super) struct Addresses {
    pub(super) ipv4: (Ipv4Addr, Ipv4Addr),
    pub(super) ipv6: Option<(Ipv6Addr, Ipv6Addr)>,
}

/// The networks and addresses that the veth must avoid.
struct Taken {
    /// The host's routes, which are given up only where they replace a default route.
    host: Vec<IpNet>,
    /// Single addresses, which are never given up.
    single: Vec<IpNet>,
    /// Networks that are routed into the tunnel or are local, given up from the largest.
    tunnel: Vec<IpNet>,
}

/// Derives the addresses, avoiding those that the host or the tunnel uses.
pub(super) fn derive(
    config: &Config,
    facts: &Facts,
    servers: &[IpAddr],
    ipv6: bool,
    findings: &mut Findings,
) -> Option<Addresses> {
    let taken = Taken::collect(config, facts, servers);
    let low_ipv4 = slot(&IPV4, &config.name, &taken, findings).map(|low| Ipv4Addr::from(low as u32));
    let low_ipv6 = ipv6.then(|| slot(&IPV6, &config.name, &taken, findings).map(Ipv6Addr::from));
    let ipv6 = match low_ipv6 {
        Some(low) => low.map(|low| Some((low, Ipv6Addr::from(u128::from(low) + 1))))?,
        None => None,
    };
    let low = low_ipv4?;
    Some(Addresses { ipv4: (low, Ipv4Addr::from(u32::from(low) + 1)), ipv6 })
}

impl Taken {
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

    /// Returns the ranges of addresses to avoid in a pass: both ends included, sorted and disjoint.
    fn ranges(&self, space: &AddressSpace, (host, tunnel): (u8, u8)) -> Vec<(u128, u128)> {
        let host = self.host.iter().filter(|net| net.prefix_len() >= host);
        let tunnel = self.tunnel.iter().filter(|net| net.prefix_len() >= tunnel);
        let mut ranges: Vec<_> =
            host.chain(&self.single).chain(tunnel).filter(|net| space.contains(net)).map(range).collect();
        ranges.sort_unstable();
        let mut disjoint: Vec<(u128, u128)> = Vec::with_capacity(ranges.len());
        for (start, end) in ranges {
            match disjoint.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => disjoint.push((start, end)),
            }
        }
        disjoint
    }
}

impl AddressSpace {
    fn contains(&self, net: &IpNet) -> bool {
        matches!(net, IpNet::V6(_)) == (self.name == IPV6.name)
    }
}

/// Returns the lower address of a tunnel's slot.
fn slot(space: &AddressSpace, name: &TunnelName, taken: &Taken, findings: &mut Findings) -> Option<u128> {
    let hashes: Vec<u64> = (0..ATTEMPTS).map(|attempt| name_hash::number(space.purpose, name, attempt)).collect();
    for (pass, limits) in space.passes.iter().enumerate() {
        let ranges = taken.ranges(space, *limits);
        let Some(low) = space.pools.iter().find_map(|pool| pool.free_slot(&hashes, &ranges)) else { continue };
        // The first two passes avoid all private networks.
        if pass > 1 {
            note_shadow(space, low, taken, findings);
        }
        return Some(low);
    }
    findings.refuse(PlanError::NoFreeAddresses { family: space.name, pools: space.pools_text });
    None
}

/// Adds a note that names the two addresses of the tunnel's networks that lead to the host.
fn note_shadow(space: &AddressSpace, low: u128, taken: &Taken, findings: &mut Findings) {
    let smallest = taken
        .tunnel
        .iter()
        .filter(|net| space.contains(net) && range(net).0 <= low + 1 && low <= range(net).1)
        .max_by_key(|net| net.prefix_len());
    if let Some(net) = smallest {
        let address = |number: u128| match net {
            IpNet::V4(_) => IpAddr::from(Ipv4Addr::from(number as u32)),
            IpNet::V6(_) => IpAddr::from(Ipv6Addr::from(number)),
        };
        findings.note(format!(
            "{} and {} lead to the host although {net} is routed into the tunnel: the host or the tunnel uses every \
             private {} network.",
            address(low),
            address(low + 1),
            space.name,
        ));
    }
}

impl Pool {
    /// Returns the lower address of the first free slot: one of the hashes, else the first after that of the first
    /// hash.
    fn free_slot(&self, hashes: &[u64], taken: &[(u128, u128)]) -> Option<u128> {
        let derived = hashes.iter().map(|hash| hash % self.slots);
        if let Some(free) = derived.clone().find(|slot| self.obstacle(*slot, taken).is_none()) {
            return Some(self.address(free));
        }
        let first = derived.into_iter().next().unwrap_or(0);
        let free = self.search(first, self.slots, taken).or_else(|| self.search(0, first, taken));
        free.map(|slot| self.address(slot))
    }

    /// Returns the first free slot from `from` to before `end`. Skips each range that is taken in one step.
    fn search(&self, from: u64, end: u64, taken: &[(u128, u128)]) -> Option<u64> {
        let mut slot = from;
        while slot < end {
            let Some(last) = self.obstacle(slot, taken) else { return Some(slot) };
            // An obstacle ends at or after the slot's first address, so this is a later slot.
            let next = (last - self.first) / self.stride + 1;
            slot = u64::try_from(next).ok()?;
        }
        None
    }

    /// Returns the last address of a range that overlaps the slot. It is never below the slot's first address.
    fn obstacle(&self, slot: u64, taken: &[(u128, u128)]) -> Option<u128> {
        let low = self.address(slot);
        let (start, end) = taken.get(taken.partition_point(|(_, end)| *end < low))?;
        (*start <= low + 1).then_some(*end)
    }

    fn address(&self, slot: u64) -> u128 {
        self.first + u128::from(slot) * self.stride
    }
}

/// Returns the first and last address of a network.
fn range(net: &IpNet) -> (u128, u128) {
    match net {
        IpNet::V4(net) => (u32::from(net.network()).into(), u32::from(net.broadcast()).into()),
        IpNet::V6(net) => (net.network().into(), net.broadcast().into()),
    }
}
