//! The packet rules of a rootless tunnel's gateway: what the program sends to local networks goes to the relay's
//! sockets there, and nothing goes anywhere else.
//!
//! The relay connects from the host's network namespace, where it can reach everything that the user can reach. So
//! these rules decide once more, besides those of the tunnel's namespace, which packets get to it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

use super::firewall::{AllowedResolvers, Inputs, NEIGHBOR_DISCOVERY, RULES_TABLE, name_rules, other_transports};
use super::{DnsPlan, LocalNetworksPlan, Plan, WireguardPlan, firewall};
use crate::ruleset::{Chain, Hook, Interface, Match, Rule, Table, Verdict};

/// The addresses of the gateway at which the relay listens for packets to local networks. No packet from the link can
/// have them as its destination (`ip_route_input_slow()` in the kernel's net/ipv4/route.c, RFC 4291 section 2.5.3), and
/// host ports are bound to other addresses, so the number is of no importance.
pub const RELAY_ADDRESSES: [SocketAddr; 2] = {
    const PORT: u16 = 40_000;
    [SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), PORT), SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), PORT)]
};

impl Plan {
    /// Returns the local networks, and the networks within them that are not reached through the host, each with
    /// whether it is local. The first network that contains an address decides.
    pub fn local_destinations(&self) -> Vec<(IpNet, bool)> {
        firewall::local_destinations(&self.local, &self.wireguard)
    }

    /// Returns the configured resolvers in local networks, with the ports at which the program may ask them.
    pub fn local_resolvers(&self) -> Vec<SocketAddr> {
        allowed_resolvers(&self.dns, &self.local, &self.wireguard).addresses()
    }
}

/// Returns the rules of the gateway.
pub(super) fn rules(inputs: &Inputs<'_>) -> Table {
    let Inputs { veth, local, wireguard, .. } = inputs;
    let link = || Match::From(Interface::Named(veth.host_interface.clone()));
    let from_tunnel = |to: IpAddr| {
        let inner = veth.inner_addresses().find(|inner| inner.is_ipv4() == to.is_ipv4());
        [Some(link()), inner.map(|inner| Match::Source(inner.into()))].into_iter().flatten().collect::<Vec<_>>()
    };
    let to = |net: IpNet| [from_tunnel(net.addr()), vec![Match::Destination(net)]].concat();

    let own: Vec<Rule> = inputs.host_addresses().map(|address| Rule::accept(to(address.into()))).collect();
    let neighbors = || NEIGHBOR_DISCOVERY.map(|kind| Rule::accept([link(), Match::Icmpv6(kind)]));
    let destinations = firewall::local_destinations(local, wireguard);
    let resolvers = allowed_resolvers(inputs.dns, local, wireguard);
    let names = name_rules(&resolvers, |server| server.map_or_else(|| vec![link()], from_tunnel));

    let mut prerouting = vec![other_transports(link())];
    prerouting.extend(names.into_iter().map(|rule| match rule.verdict {
        Verdict::Accept => relay(rule.matches),
        _ => rule,
    }));
    prerouting.extend(own.clone());
    let mut input = own;
    for (net, is_local) in destinations {
        if is_local {
            let ports = [Match::TcpPort(1..=u16::MAX), Match::UdpPort(1..=u16::MAX)];
            prerouting.extend(ports.map(|ports| relay([to(net), vec![ports]].concat())));
            input.push(Rule::accept(to(net)));
        } else {
            prerouting.push(Rule::drop(to(net)));
            input.push(Rule::drop(to(net)));
        }
    }
    if veth.host_ipv6.is_some() {
        prerouting.extend(neighbors());
        input.extend(neighbors());
    }
    let chains = [(Hook::Prerouting, prerouting), (Hook::Input, input), (Hook::Forward, Vec::new())];
    Table { name: RULES_TABLE.into(), chains: chains.map(|(hook, rules)| Chain::closed(hook, rules)).into() }
}

/// Returns the configured resolvers in local networks.
fn allowed_resolvers(dns: &DnsPlan, local: &LocalNetworksPlan, wireguard: &WireguardPlan) -> AllowedResolvers {
    let destinations = firewall::local_destinations(local, wireguard).into_iter();
    let tunnel: Vec<IpNet> = destinations.filter(|(_, is_local)| !is_local).map(|(net, _)| net).collect();
    let is_local = |server: &IpAddr| super::local_networks::is_local(&local.networks, &tunnel, server);
    // Marks do not leave the tunnel's namespace, whose rules have checked them.
    AllowedResolvers::of(dns, is_local).with_any_mark()
}

/// Returns a rule that passes packets to the relay.
fn relay(matches: Vec<Match>) -> Rule {
    let is_ipv6 = matches.iter().any(|condition| matches!(condition, Match::Destination(net) if net.addr().is_ipv6()));
    Rule { matches, verdict: Verdict::RelayBy(RELAY_ADDRESSES[usize::from(is_ipv6)]) }
}
