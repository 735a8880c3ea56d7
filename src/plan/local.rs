//! The local networks: what is reached through the host instead of the tunnel, and which of its addresses stay in the tunnel all the
//! same.
//!
//! What the tunnel routes wins: an address of the tunnel's, or AllowedIPs that are narrower than a local network, are reached through
//! the tunnel although the local network has them, as the longest prefix wins in any table of routes. A resolver has no route of its
//! own in most files, so it is given one. Names shall not be asked of the local network because somebody's `10.0.0.0/8` has the
//! provider's `10.64.0.1` in it. Only a local network that is that resolver and nothing else says that it is meant.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::error::PlanError;
use super::facts::{Facts, ForeignChain, ForwardDrop, Ipv6Forwarding};
use super::wireguard::Reach;
use super::{Findings, interfaces};
use crate::config::Config;
use crate::names::InterfaceName;

/// What is reached through the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalPlan {
    /// The networks beyond the host.
    pub networks: Vec<IpNet>,
    /// The host's interfaces that they are behind.
    pub interfaces: Vec<InterfaceName>,
}

/// The shortest prefix that a local network may have: those of the widest private ones, 10.0.0.0/8 (RFC 1918) and fc00::/7 (RFC 4193).
fn shortest(net: &IpNet) -> u8 {
    if net.addr().is_ipv4() { 8 } else { 7 }
}

/// Decides which networks are local, and adds to `reach` the routes by which resolvers stay in the tunnel. `link_ipv6` says whether the
/// link to the host has IPv6.
pub(super) fn decide(
    config: &Config,
    facts: &Facts,
    servers: &[IpAddr],
    reach: &mut Reach,
    link_ipv6: bool,
    findings: &mut Findings,
) -> LocalPlan {
    let mut networks: BTreeSet<IpNet> = BTreeSet::new();
    for net in &config.local.networks {
        match refusal(*net, facts, reach, link_ipv6) {
            None => drop(networks.insert(*net)),
            Some(error) => findings.refuse(error),
        }
    }
    if config.local.lan {
        let of_the_host = attached(facts);
        if of_the_host.is_empty() {
            findings.note("The host is attached to no private network, so there is no local one.".into());
        }
        for net in of_the_host {
            match refusal(net, facts, reach, link_ipv6) {
                None => drop(networks.insert(net)),
                Some(error) => findings.note(format!("{net} is not among the local networks: {error}.")),
            }
        }
    }
    let networks: Vec<IpNet> = networks.into_iter().collect();
    keep_in_tunnel(&networks, servers, reach, findings);
    for net in networks.iter().filter(|net| !is_private(net)) {
        findings.note(format!("{net} is local but public: there, the program is seen under the host's address."));
    }
    let interfaces = ways(&networks, facts, findings);
    LocalPlan { networks, interfaces }
}

/// Why a network cannot be local.
fn refusal(net: IpNet, facts: &Facts, reach: &Reach, link_ipv6: bool) -> Option<PlanError> {
    let address = net.addr();
    let unusable = match address {
        _ if address.is_loopback() => Some("the loopback's"),
        _ if address.is_multicast() => Some("multicast"),
        IpAddr::V4(address) if address.is_link_local() || address.is_broadcast() => Some("of a single link"),
        IpAddr::V6(address) if address.is_unicast_link_local() => Some("of a single link"),
        _ => None,
    };
    if let Some(what) = unusable {
        return Some(PlanError::LocalUnusable { network: net, what });
    }
    if net.prefix_len() < shortest(&net) {
        return Some(PlanError::LocalTooWide { network: net });
    }
    if claims(reach).any(|claim| claim == net) {
        return Some(PlanError::LocalIsTunnels { network: net });
    }
    if address.is_ipv6() {
        if !link_ipv6 {
            return Some(PlanError::LocalWithoutIpv6 { network: net });
        }
        if facts.ipv6_forwarding == Ipv6Forwarding::Never {
            return Some(PlanError::LocalIpv6NotForwarded { network: net });
        }
    }
    None
}

/// What is routed into the tunnel, be it by AllowedIPs or by the network of an address.
fn claims(reach: &Reach) -> impl Iterator<Item = IpNet> {
    reach.routes.iter().copied().chain(reach.addresses.iter().map(IpNet::trunc))
}

/// The private networks that the host is attached to, the links to other tunnels' namespaces excepted.
fn attached(facts: &Facts) -> BTreeSet<IpNet> {
    let routes = facts.routes.iter().filter(|route| route.attached);
    routes
        .filter(|route| route.interface.and_then(|index| facts.interface(index)).is_some_and(is_beyond))
        .map(|route| route.destination)
        .filter(is_private)
        .collect()
}

fn is_beyond(interface: &super::HostInterface) -> bool {
    interface.name != "lo" && !interface.name.starts_with(interfaces::HOST_PREFIX)
}

/// Whether a network is in private space (RFC 1918, RFC 4193).
fn is_private(net: &IpNet) -> bool {
    let blocks: [(IpAddr, u8); 4] = [
        (Ipv4Addr::new(10, 0, 0, 0).into(), 8),
        (Ipv4Addr::new(172, 16, 0, 0).into(), 12),
        (Ipv4Addr::new(192, 168, 0, 0).into(), 16),
        (Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0).into(), 7),
    ];
    blocks.into_iter().filter_map(|(address, length)| IpNet::new(address, length).ok()).any(|block| block.contains(net))
}

/// Says what of the local networks stays in the tunnel, and routes the resolvers there that would not.
fn keep_in_tunnel(networks: &[IpNet], servers: &[IpAddr], reach: &mut Reach, findings: &mut Findings) {
    for net in networks {
        let inside: BTreeSet<IpNet> = claims(reach).filter(|claim| net.contains(claim)).collect();
        if !inside.is_empty() {
            let list: Vec<String> = inside.iter().map(IpNet::to_string).collect();
            findings.note(format!("Of the local network {net}, {} stays in the tunnel.", list.join(", ")));
        }
    }
    for server in servers {
        let alone = IpNet::from(*server);
        if networks.contains(&alone) {
            findings.note(format!(
                "Names are asked of {server} in the local network, past the tunnel, as it is named itself."
            ));
        } else if let Some(net) =
            longest(networks.iter().copied(), server).filter(|_| leads_to_host(networks, reach, server))
        {
            if reach.routes.iter().any(|route| route.contains(server)) {
                findings
                    .note(format!("The DNS server {server} is in the local network {net}, and stays in the tunnel."));
                reach.routes.push(alone);
                reach.routes.sort_unstable();
            } else {
                findings.note(format!(
                    "Names are asked of {server} in the local network {net}, as the tunnel does not reach it."
                ));
            }
        }
    }
}

/// Whether a packet to an address leaves by the link to the host.
fn leads_to_host(networks: &[IpNet], reach: &Reach, address: &IpAddr) -> bool {
    is_local(networks, &claims(reach).collect::<Vec<_>>(), address)
}

/// Whether, of these networks and what is routed into the tunnel, a network has the longer prefix that covers an address.
pub(super) fn is_local(networks: &[IpNet], tunnel: &[IpNet], address: &IpAddr) -> bool {
    let length = |nets: &[IpNet]| longest(nets.iter().copied(), address).map(|net| net.prefix_len());
    length(networks).is_some_and(|local| length(tunnel).is_none_or(|tunnel| tunnel < local))
}

fn longest(nets: impl Iterator<Item = IpNet>, address: &IpAddr) -> Option<IpNet> {
    nets.filter(|net| net.contains(address)).max_by_key(IpNet::prefix_len)
}

/// The host's interfaces behind which the networks are.
fn ways(networks: &[IpNet], facts: &Facts, findings: &mut Findings) -> Vec<InterfaceName> {
    let name = |index: Option<u32>| -> Option<InterfaceName> {
        let interface = index.and_then(|index| facts.interface(index)).filter(|interface| is_beyond(interface))?;
        interface.name.parse().ok()
    };
    let mut found = BTreeSet::new();
    for net in networks {
        let within = facts.routes.iter().filter(|route| net.contains(&route.destination));
        let mut ways: BTreeSet<InterfaceName> = within.filter_map(|route| name(route.interface)).collect();
        let around = facts.routes.iter().filter(|route| route.destination.contains(net));
        let around = around.max_by_key(|route| route.destination.prefix_len());
        ways.extend(around.and_then(|route| name(route.interface)));
        if ways.is_empty() {
            findings.note(format!("The host has no route to the local network {net} now."));
        }
        found.extend(ways);
    }
    found.into_iter().collect()
}

/// Says where another firewall of the host would drop what goes to the local networks, and what to do about it. One that has a rule about
/// this very interface has been told already.
pub(super) fn note_firewalls(local: &LocalPlan, link: &InterfaceName, facts: &Facts, findings: &mut Findings) {
    for ForwardDrop { chain, interfaces } in &facts.forward_drops {
        let concerns = |net: &IpNet| match chain {
            ForeignChain::Nftables { family: "ip", .. } | ForeignChain::Legacy { ipv6: false } => net.addr().is_ipv4(),
            ForeignChain::Nftables { family: "ip6", .. } | ForeignChain::Legacy { ipv6: true } => net.addr().is_ipv6(),
            ForeignChain::Nftables { .. } => true,
        };
        let knows = interfaces.iter().any(|known| match known.strip_suffix('*') {
            Some(begin) => !begin.is_empty() && link.as_str().starts_with(begin),
            None => known == link.as_str(),
        });
        if !local.networks.iter().any(concerns) || knows {
            continue;
        }
        let (which, remedy) = match chain {
            ForeignChain::Nftables { family, table, name } => (
                format!("the chain {name} of the table {family} {table}"),
                ["iifname", "oifname"]
                    .map(|way| format!("nft 'insert rule {family} {table} {name} {way} \"{link}\" accept'")),
            ),
            ForeignChain::Legacy { ipv6 } => {
                let tool = if *ipv6 { "ip6tables-legacy" } else { "iptables-legacy" };
                (
                    format!("the chain FORWARD of {tool}"),
                    ["-i", "-o"].map(|way| format!("{tool} -I FORWARD {way} {link} -j ACCEPT")),
                )
            }
        };
        findings.note(format!(
            "The host's firewall drops what goes to the local networks and back: {which} (as Docker, ufw and firewalld have it) lets pass only what \
             its rules say. Have it let this pass by `{}` and `{}`.",
            remedy[0], remedy[1]
        ));
    }
}
