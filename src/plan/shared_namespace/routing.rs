//! The policy rules (ip-rule(8)) and the routes of an attached tunnel.
//!
//! Every packet is looked up in the tunnel's own table, whose last route is unreachable, except for packets that a rule
//! before it sends to the container's own routes:
//!
//! - packets with the mark: encrypted packets, and replies to inbound connections;
//! - packets from an address of the container's own, which are replies to inbound connections as well. The reverse path
//!   filter (`rp_filter` of the kernel's ip-sysctl.rst) looks inbound packets up by these rules, and so accepts them
//!   without `src_valid_mark`;
//! - packets to local networks. The longest prefix decides between these and the tunnel's routes;
//! - in a container whose network an engine makes, packets to the networks of its interfaces, except those to the
//!   tunnel's resolvers and narrower networks. The engine looks up the interface of the default route's gateway in that
//!   way, which is not the tunnel's.
//!
//! The packet rules drop all other packets that these rules let past the tunnel.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{MARK, Placement, SharedNamespacePlan};
use crate::linux::netlink::route::Route;
use crate::linux::netlink::rule::{PolicyRule, Selector};
use crate::plan::{firewall, local_networks};
use crate::ruleset::Family;

/// The number of the tunnel's own routing table.
pub const TABLE: u32 = 30309;

/// The priorities of the rules. Each prefix length of IPv6 has one, and that of the longest prefix is the first.
const MARKED: u32 = 30300;
const OWN: u32 = 30301;
const LONGEST: u32 = 30302;
const ALL: u32 = LONGEST + 129;

/// The priority of the rule for the networks of a container's interfaces. It is that of IPv6's prefix length 0, which
/// no local network has.
const CONNECTED: u32 = ALL - 1;

/// The priorities at which an attached tunnel has rules.
pub const PRIORITIES: RangeInclusive<u32> = MARKED..=ALL;

/// A route of the tunnel's table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TableRoute {
    /// The last resort of a family: packets to any other address fail at once.
    Unreachable(IpNet),
    /// A network that is reached through WireGuard's interface.
    Tunnel(IpNet),
}

/// Returns the policy rules.
pub(super) fn rules(plan: &SharedNamespacePlan, has_ipv6: bool) -> Vec<PolicyRule> {
    let mut networks = firewall::by_prefix(&plan.local_networks, firewall::tunnel_routes(&plan.wireguard));
    if plan.placement == Placement::Container {
        let others: Vec<IpNet> = narrow_routes(plan).filter(|net| !networks.contains(&(*net, false))).collect();
        networks.extend(others.into_iter().map(|net| (net, false)));
    }
    let mut rules = Vec::new();
    for family in families(has_ipv6) {
        let mut add = |priority, selector, table| rules.push(PolicyRule { family, priority, selector, table });
        add(MARKED, Selector::Mark(MARK), Route::MAIN);
        for address in plan.container_addresses.iter().filter(|address| is_of(family, address)) {
            add(OWN, Selector::From((*address).into()), Route::MAIN);
        }
        for (net, is_local) in networks.iter().filter(|(net, _)| is_of(family, &net.addr())) {
            let priority = LONGEST + u32::from(net.max_prefix_len() - net.prefix_len());
            let table = if *is_local { Route::MAIN } else { TABLE };
            add(priority, Selector::To(*net), table);
        }
        if plan.placement == Placement::Container {
            add(CONNECTED, Selector::NotByDefault, Route::MAIN);
        }
        add(ALL, Selector::All, TABLE);
    }
    rules
}

/// Returns the networks that are reached through the tunnel even if the container has a route to them: those of the
/// tunnel's resolvers, and its routes that do not stand for the Internet. They rarely contain an engine's gateway.
fn narrow_routes(plan: &SharedNamespacePlan) -> impl Iterator<Item = IpNet> {
    let routes: Vec<IpNet> = firewall::tunnel_routes(&plan.wireguard).collect();
    let is_reached = |server: &IpAddr| routes.iter().any(|route| route.contains(server));
    let is_local = |server: &IpAddr| local_networks::is_local(&plan.local_networks, &routes, server);
    let resolvers = plan.dns.servers.iter().filter(|server| is_reached(server) && !is_local(server));
    let mut narrow: BTreeSet<IpNet> = resolvers.map(|server| IpNet::from(*server)).collect();
    narrow.extend(routes.iter().filter(|route| route.prefix_len() >= local_networks::min_prefix_len(route)));
    narrow.into_iter()
}

/// Returns the routes of the tunnel's table.
pub(super) fn routes(plan: &SharedNamespacePlan, has_ipv6: bool) -> Vec<TableRoute> {
    let mut tunnel: Vec<IpNet> = firewall::tunnel_routes(&plan.wireguard).collect();
    tunnel.sort_unstable();
    tunnel.dedup();
    let last = families(has_ipv6).map(|family| match family {
        Family::Ipv4 => IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0),
        Family::Ipv6 => IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0),
    });
    last.map(TableRoute::Unreachable).chain(tunnel.into_iter().map(TableRoute::Tunnel)).collect()
}

fn families(has_ipv6: bool) -> impl Iterator<Item = Family> {
    [Some(Family::Ipv4), has_ipv6.then_some(Family::Ipv6)].into_iter().flatten()
}

fn is_of(family: Family, address: &IpAddr) -> bool {
    address.is_ipv4() == (family == Family::Ipv4)
}
