//! Local networks: networks that the program reaches through the host instead of the tunnel (split tunnelling).
//!
//! Routes into the tunnel win: the tunnel's own addresses, and AllowedIPs that are narrower than a local network, are
//! reached through the tunnel even inside a local network, as the longest prefix wins in any routing table. A resolver
//! usually has no route of its own, so it is given one. Otherwise DNS queries would go to the local network just
//! because a user's `10.0.0.0/8` contains the provider's `10.64.0.1`. Only a local network that is exactly the
//! resolver's address overrides that.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::error::PlanError;
use super::facts::{Facts, ForeignChain, ForwardDrop, Ipv6Forwarding};
use super::wireguard::Routing;
use super::{Findings, interface_names};
use crate::config::Config;
use crate::names::InterfaceName;

/// The networks that are reached through the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalNetworksPlan {
    /// The networks.
    pub networks: Vec<IpNet>,
    /// The interfaces of the host by which they are reached. None if the tunnel is rootless: the host's connections to
    /// them are the keeper's own, and nothing is forwarded.
    pub interfaces: Vec<InterfaceName>,
    /// Networks within them that a rootless tunnel does not reach: links to the namespaces of other tunnels. These
    /// accept connections from the host's address.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub except: Vec<IpNet>,
}

/// Returns the shortest prefix length of a local network: that of the largest private ones, 10.0.0.0/8 (RFC 1918) and
/// fc00::/7 (RFC 4193).
pub(super) fn min_prefix_len(net: &IpNet) -> u8 {
    if net.addr().is_ipv4() { 8 } else { 7 }
}

/// Decides which networks are local, and adds the routes to `routing` by which resolvers stay in the tunnel.
/// `link_ipv6` says whether the link to the host has IPv6.
pub(super) fn decide(
    config: &Config,
    facts: &Facts,
    servers: &[IpAddr],
    routing: &mut Routing,
    link_ipv6: bool,
    findings: &mut Findings,
) -> LocalNetworksPlan {
    let mut networks: BTreeSet<IpNet> = BTreeSet::new();
    for net in &config.local.networks {
        match refusal(*net, facts, routing, link_ipv6) {
            None => drop(networks.insert(*net)),
            Some(error) => findings.refuse(error),
        }
    }
    if config.local.lan {
        let attached = attached_networks(facts);
        if attached.is_empty() {
            findings.note("The host is not attached to a private network, so there is no local network.".into());
        }
        for net in attached {
            match refusal(net, facts, routing, link_ipv6) {
                None => drop(networks.insert(net)),
                Some(error) => findings.note(format!("{error}.")),
            }
        }
    }
    let networks: Vec<IpNet> = networks.into_iter().collect();
    keep_in_tunnel(&networks, servers, routing, findings);
    for net in networks.iter().filter(|net| !is_private(net)) {
        findings.note(format!("The local network {net} is public: it sees the program under the host's address."));
    }
    let interfaces = interfaces_to(&networks, facts, findings);
    match facts.rootless {
        Some(_) => LocalNetworksPlan { interfaces: Vec::new(), except: links_to_tunnels(&networks, facts), networks },
        None => LocalNetworksPlan { networks, interfaces, except: Vec::new() },
    }
}

/// Returns why a network cannot be reached through the host.
fn refusal(net: IpNet, facts: &Facts, routing: &Routing, link_ipv6: bool) -> Option<PlanError> {
    if let Some(error) = unusable(net, routing) {
        return Some(error);
    }
    if net.addr().is_ipv6() {
        if !link_ipv6 {
            return Some(PlanError::LocalWithoutIpv6 { network: net });
        }
        if facts.rootless.is_none() && facts.ipv6_forwarding == Ipv6Forwarding::Never {
            return Some(PlanError::LocalIpv6NotForwarded { network: net });
        }
    }
    None
}

/// Returns why a network cannot be local, whatever the way to it.
pub(super) fn unusable(net: IpNet, routing: &Routing) -> Option<PlanError> {
    let address = net.addr();
    let unusable = match address {
        _ if address.is_loopback() => Some("a loopback network"),
        _ if address.is_multicast() => Some("a multicast network"),
        IpAddr::V4(address) if address.is_link_local() || address.is_broadcast() => Some("link-local"),
        IpAddr::V6(address) if address.is_unicast_link_local() => Some("link-local"),
        _ => None,
    };
    if let Some(what) = unusable {
        return Some(PlanError::LocalUnusable { network: net, what });
    }
    if net.prefix_len() < min_prefix_len(&net) {
        return Some(PlanError::LocalTooWide { network: net });
    }
    tunnel_routes(routing).any(|route| route == net).then_some(PlanError::LocalIsTunnels { network: net })
}

/// Returns the networks that are routed into the tunnel: by AllowedIPs, or as the network of an address.
pub(super) fn tunnel_routes(routing: &Routing) -> impl Iterator<Item = IpNet> {
    routing.routes.iter().copied().chain(routing.addresses.iter().map(IpNet::trunc))
}

/// Returns the private networks that the host is attached to, except the links to tunnels' namespaces.
fn attached_networks(facts: &Facts) -> BTreeSet<IpNet> {
    let routes = facts.routes.iter().filter(|route| route.attached);
    routes
        .filter(|route| route.interface.and_then(|index| facts.interface(index)).is_some_and(is_external))
        .map(|route| route.destination)
        .filter(is_private)
        .collect()
}

/// Returns the links to the namespaces of other tunnels that are within some networks.
fn links_to_tunnels(networks: &[IpNet], facts: &Facts) -> Vec<IpNet> {
    let is_link = |interface: &super::HostInterface| interface.name.starts_with(interface_names::HOST_PREFIX);
    let routes = facts.routes.iter().filter(|route| {
        route.attached && route.interface.and_then(|index| facts.interface(index)).is_some_and(is_link)
    });
    let links: BTreeSet<IpNet> = routes.map(|route| route.destination).collect();
    links.into_iter().filter(|link| networks.iter().any(|net| net.contains(link))).collect()
}

/// Returns whether an interface leads out of the host: it is neither the loopback nor a link to a tunnel's namespace.
fn is_external(interface: &super::HostInterface) -> bool {
    interface.name != "lo" && !interface.name.starts_with(interface_names::HOST_PREFIX)
}

/// Returns whether a network is in private space (RFC 1918, RFC 4193).
pub(super) fn is_private(net: &IpNet) -> bool {
    let blocks: [(IpAddr, u8); 4] = [
        (Ipv4Addr::new(10, 0, 0, 0).into(), 8),
        (Ipv4Addr::new(172, 16, 0, 0).into(), 12),
        (Ipv4Addr::new(192, 168, 0, 0).into(), 16),
        (Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0).into(), 7),
    ];
    blocks.into_iter().filter_map(|(address, length)| IpNet::new(address, length).ok()).any(|block| block.contains(net))
}

/// Adds notes about the parts of local networks that are reached through the tunnel, and adds routes for resolvers in
/// them.
pub(super) fn keep_in_tunnel(networks: &[IpNet], servers: &[IpAddr], routing: &mut Routing, findings: &mut Findings) {
    for net in networks {
        let inside: BTreeSet<IpNet> = tunnel_routes(routing).filter(|route| net.contains(route)).collect();
        if !inside.is_empty() {
            let list: Vec<String> = inside.iter().map(IpNet::to_string).collect();
            findings.note(format!("In the local network {net}, {} is reached through the tunnel.", list.join(", ")));
        }
    }
    for server in servers {
        let alone = IpNet::from(*server);
        if networks.contains(&alone) {
            findings.note(format!(
                "DNS queries to {server} leave outside the tunnel, because it is itself listed as a local network."
            ));
        } else if let Some(net) =
            longest(networks.iter().copied(), server).filter(|_| leads_to_host(networks, routing, server))
        {
            if routing.routes.iter().any(|route| route.contains(server)) {
                findings
                    .note(format!("The DNS server {server} in the local network {net} is reached through the tunnel."));
                routing.routes.push(alone);
                routing.routes.sort_unstable();
            } else {
                findings.note(format!(
                    "DNS queries to {server} go to the local network {net}, because the tunnel has no route to it."
                ));
            }
        }
    }
}

/// Returns whether packets to an address leave by the link to the host.
fn leads_to_host(networks: &[IpNet], routing: &Routing, address: &IpAddr) -> bool {
    is_local(networks, &tunnel_routes(routing).collect::<Vec<_>>(), address)
}

/// Returns whether an address is in a local network: whether the longest prefix that contains it is local, not the
/// tunnel's.
pub(super) fn is_local(networks: &[IpNet], tunnel: &[IpNet], address: &IpAddr) -> bool {
    let length = |nets: &[IpNet]| longest(nets.iter().copied(), address).map(|net| net.prefix_len());
    length(networks).is_some_and(|local| length(tunnel).is_none_or(|tunnel| tunnel < local))
}

/// Returns the network with the longest prefix that contains an address.
fn longest(nets: impl Iterator<Item = IpNet>, address: &IpAddr) -> Option<IpNet> {
    nets.filter(|net| net.contains(address)).max_by_key(IpNet::prefix_len)
}

/// Returns the interfaces of the host by which it reaches the networks.
fn interfaces_to(networks: &[IpNet], facts: &Facts, findings: &mut Findings) -> Vec<InterfaceName> {
    let name = |index: Option<u32>| -> Option<InterfaceName> {
        let interface = index.and_then(|index| facts.interface(index)).filter(|interface| is_external(interface))?;
        interface.name.parse().ok()
    };
    let mut found = BTreeSet::new();
    for net in networks {
        let within = facts.routes.iter().filter(|route| net.contains(&route.destination));
        let mut interfaces: BTreeSet<InterfaceName> = within.filter_map(|route| name(route.interface)).collect();
        let around = facts.routes.iter().filter(|route| route.destination.contains(net));
        let around = around.max_by_key(|route| route.destination.prefix_len());
        interfaces.extend(around.and_then(|route| name(route.interface)));
        if interfaces.is_empty() {
            findings.note(format!("The host currently has no route to the local network {net}."));
        }
        found.extend(interfaces);
    }
    found.into_iter().collect()
}

/// Adds a note for each other firewall of the host that would drop packets to the local networks, with what to do. A
/// firewall with a rule about the link's interface is considered configured.
pub(super) fn note_firewalls(local: &LocalNetworksPlan, link: &InterfaceName, facts: &Facts, findings: &mut Findings) {
    for ForwardDrop { chain, interfaces } in &facts.forward_drops {
        let concerns = |net: &IpNet| match chain {
            ForeignChain::Nftables { family: "ip", .. } | ForeignChain::Legacy { ipv6: false } => net.addr().is_ipv4(),
            ForeignChain::Nftables { family: "ip6", .. } | ForeignChain::Legacy { ipv6: true } => net.addr().is_ipv6(),
            ForeignChain::Nftables { .. } => true,
        };
        let is_configured = interfaces.iter().any(|name| match name.strip_suffix('*') {
            Some(prefix) => !prefix.is_empty() && link.as_str().starts_with(prefix),
            None => name == link.as_str(),
        });
        if !local.networks.iter().any(concerns) || is_configured {
            continue;
        }
        let (shown, commands) = match chain {
            ForeignChain::Nftables { family, table, name } => (
                format!("chain {name} of table {family} {table}"),
                ["iifname", "oifname"]
                    .map(|match_on| format!("nft 'insert rule {family} {table} {name} {match_on} \"{link}\" accept'")),
            ),
            ForeignChain::Legacy { ipv6 } => {
                let tool = if *ipv6 { "ip6tables-legacy" } else { "iptables-legacy" };
                (
                    format!("chain FORWARD of {tool}"),
                    ["-i", "-o"].map(|option| format!("{tool} -I FORWARD {option} {link} -j ACCEPT")),
                )
            }
        };
        findings.note(format!(
            "A firewall of the host drops packets between the tunnel and its local networks: {shown}, as Docker, ufw \
             and firewalld create it, only accepts packets that a rule matches. To accept these, run `{}` and `{}`.",
            commands[0], commands[1]
        ));
    }
}
