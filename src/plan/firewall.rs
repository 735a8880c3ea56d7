//! The packet rules of a tunnel: those of its namespace, which let only intended packets pass, and those of the host if
//! there are local networks.
//!
//! The routes in the namespace lead to the same places. The rules also cover sockets that bypass routes, such as one
//! that is bound to an interface; incoming packets; and DNS queries, which must not be answered outside the tunnel,
//! least of all by the host, where resolvers listen on all addresses.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::dns_forwarding::{DNS_PORT, RESOLVER_MARK};
use super::local_networks::{self, LocalNetworksPlan};
use super::{DnsPlan, Plan, VethPlan, WireguardPlan, gateway, interface_names};
use crate::config::{OpenPorts, Protocol};
use crate::names::{InterfaceName, TunnelName};
use crate::ruleset::{Chain, Family, Hook, Interface, Match, Policy, Rule, Table, Transport, Verdict};

/// The ports of resolvers: DNS (RFC 1035), DNS over TLS and QUIC (RFC 7858, RFC 9250), mDNS (RFC 6762) and LLMNR (RFC
/// 4795).
pub const NAME_PORTS: [u16; 4] = [53, 853, 5353, 5355];

/// The ports on which programs query a configured resolver.
const RESOLVER_PORTS: [u16; 2] = [53, 853];

/// Neighbor solicitation and advertisement (RFC 4861 section 4), which IPv6 needs on a link.
pub(super) const NEIGHBOR_DISCOVERY: [u8; 2] = [135, 136];

/// The hop limit of neighbor discovery (RFC 4861 sections 4.1 to 4.5): a packet that a router has forwarded has less.
pub(super) const ON_LINK_HOPS: u8 = 255;

/// The name of the table in the namespace, and the prefix of that on the host.
pub const RULES_TABLE: &str = "vpn-exec";

/// The packet rules of a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirewallPlan {
    /// The rules of the tunnel's namespace.
    pub inside: Table,
    /// The rules at the host's end of the link: those of the host, if there are local networks; or those of a rootless
    /// tunnel's gateway.
    pub host: Option<Table>,
}

/// An interface of the host that forwards the packets of a family only because tunnels need it. The other family may be
/// forwarded for any purpose: a host that routes IPv4 need not route IPv6.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardingInterface {
    /// The interface.
    pub interface: InterfaceName,
    /// The family whose packets it forwards.
    pub family: Family,
}

/// The decisions from which the rules follow.
pub(super) struct Inputs<'a> {
    pub(super) name: &'a TunnelName,
    pub(super) wireguard: &'a WireguardPlan,
    pub(super) veth: &'a VethPlan,
    pub(super) local: &'a LocalNetworksPlan,
    pub(super) dns: &'a DnsPlan,
    pub(super) open: &'a [OpenPorts],
    pub(super) rootless: bool,
}

impl FirewallPlan {
    /// Returns the rules for a plan whose other parts are decided. Those of a container do not follow from a link.
    pub(super) fn of(plan: &Plan) -> Self {
        let Plan { name, wireguard, veth, local, dns, open, firewall, rootless, .. } = plan;
        let Some(veth) = veth else { return firewall.clone() };
        Self::new(&Inputs { name, wireguard, veth, local, dns, open, rootless: *rootless })
    }

    pub(super) fn new(inputs: &Inputs<'_>) -> Self {
        let host = match inputs.rootless {
            true => Some(gateway::rules(inputs)),
            false => (!inputs.local.networks.is_empty()).then(|| inputs.host_rules()),
        };
        Self { inside: inputs.inside_rules(), host }
    }

    /// Returns the host's table with rules for interfaces that forward only because tunnels need it. From these, only
    /// replies to tunnels are forwarded. The table of each tunnel decides which replies it accepts.
    pub fn host_with(&self, interfaces: &[ForwardingInterface]) -> Option<Table> {
        let mut table = self.host.clone()?;
        let closed = interfaces.iter().flat_map(|ForwardingInterface { interface, family }| {
            let from = || [Match::From(Interface::Named(interface.clone())), Match::Of(*family)];
            let tunnels = Match::To(Interface::Prefix(interface_names::HOST_PREFIX.into()));
            let replies = from().into_iter().chain([tunnels, Match::Replies]).collect::<Vec<_>>();
            [Rule::accept(replies), Rule::drop(from())]
        });
        if let Some(chain) = table.chains.iter_mut().find(|chain| chain.hook == Hook::Forward) {
            chain.rules.extend(closed);
        }
        Some(table)
    }
}

impl Inputs<'_> {
    /// Returns the rules of the namespace.
    fn inside_rules(&self) -> Table {
        let link = || Interface::Named(self.veth.inner_interface.clone());
        let tunnel = || Interface::Named(self.wireguard.interface.clone());
        let ipv6 = self.veth.host_ipv6.is_some();

        let mut input = vec![
            Rule::accept([Match::From(Interface::Loopback)]),
            other_transports(Match::From(link())),
            Rule::accept([Match::Replies]),
        ];
        input.extend(self.local_rules(|net, _| vec![Match::From(link()), Match::Source(net)]));
        let mut output = vec![Rule::accept([Match::To(Interface::Loopback)])];
        output.extend(forwarder_rule(&tunnel(), self.dns));
        output.push(Rule::accept([Match::To(tunnel())]));
        output.push(other_transports(Match::To(link())));
        // Only from the link's own address: replies to one of the tunnel's addresses would leave by the host's default
        // route, in the clear.
        let from_link = |to: IpAddr| [Match::To(link())].into_iter().chain(self.inner_address(to).map(Match::Source));
        let resolvers = AllowedResolvers::of(self.dns, |server| self.is_on_link(server));
        let on_link = |to: Option<IpAddr>| to.map_or_else(|| vec![Match::To(link())], |to| from_link(to).collect());
        output.extend(name_rules(&resolvers, on_link));
        output.extend(self.local_rules(|net, is_local| {
            let source = if is_local { from_link(net.addr()).collect() } else { vec![Match::To(link())] };
            [source, vec![Match::Destination(net)]].concat()
        }));
        for kind in NEIGHBOR_DISCOVERY.into_iter().filter(|_| ipv6) {
            let discovery = |by| Rule::accept([by, Match::Icmpv6(kind), Match::HopLimit(ON_LINK_HOPS)]);
            input.push(discovery(Match::From(link())));
            output.push(discovery(Match::To(link())));
        }
        input.extend(open_rules(&tunnel(), self.open));
        let chains = [(Hook::Input, input), (Hook::Forward, Vec::new()), (Hook::Output, output)];
        Table {
            name: RULES_TABLE.into(),
            chains: chains.into_iter().map(|(hook, rules)| Chain::closed(hook, rules)).collect(),
        }
    }

    /// Returns rules that accept packets on the link for the host's addresses and the local networks. Networks that are
    /// routed into the tunnel are excepted: their packets must not take the link when the WireGuard interface is gone,
    /// and its routes with it. `matches` returns what the packets of a network have in common, which is local or not.
    fn local_rules(&self, matches: impl Fn(IpNet, bool) -> Vec<Match>) -> Vec<Rule> {
        let host = self.host_addresses().map(|address| (IpNet::from(address), true));
        network_rules(host.chain(local_destinations(self.local, self.wireguard)), matches)
    }

    /// Returns the namespace's address on the link, of the family of another address.
    fn inner_address(&self, like: IpAddr) -> Option<IpNet> {
        let inner = [Some(IpAddr::from(self.veth.inner_ipv4)), self.veth.inner_ipv6.map(IpAddr::from)];
        inner.into_iter().flatten().find(|address| address.is_ipv4() == like.is_ipv4()).map(IpNet::from)
    }

    /// Returns the host's addresses on the link.
    pub(super) fn host_addresses(&self) -> impl Iterator<Item = IpAddr> {
        [Some(IpAddr::from(self.veth.host_ipv4)), self.veth.host_ipv6.map(IpAddr::from)].into_iter().flatten()
    }

    fn is_on_link(&self, server: &IpAddr) -> bool {
        let is_host = self.host_addresses().any(|address| address == *server);
        let tunnel: Vec<IpNet> = tunnel_routes(self.wireguard).collect();
        is_host || local_networks::is_local(&self.local.networks, &tunnel, server)
    }

    /// Returns the rules of the host: it forwards packets between the tunnel and the local networks under its own
    /// address, and no other packets from or to the link.
    fn host_rules(&self) -> Table {
        let link = || Interface::Named(self.veth.host_interface.clone());
        let inner = [Some(IpAddr::from(self.veth.inner_ipv4)), self.veth.inner_ipv6.map(IpAddr::from)];
        let inner = inner.into_iter().flatten();

        let from_tunnel = |to: IpAddr| {
            let source = inner.clone().find(|address| address.is_ipv4() == to.is_ipv4());
            [Some(Match::From(link())), source.map(|source| Match::Source(source.into()))]
                .into_iter()
                .flatten()
                .collect::<Vec<_>>()
        };
        let mut forward = vec![other_transports(Match::From(link())), other_transports(Match::To(link()))];
        // Marks do not leave the namespace, whose rules have checked them.
        let resolvers = AllowedResolvers::of(self.dns, |server| self.is_on_link(server)).with_any_mark();
        forward.extend(name_rules(&resolvers, |to| to.map_or_else(|| vec![Match::From(link())], from_tunnel)));
        forward.extend(self.local.networks.iter().map(|net| {
            let mut matches = from_tunnel(net.addr());
            matches.push(Match::Destination(*net));
            Rule::accept(matches)
        }));
        forward.push(Rule::drop([Match::From(link())]));
        forward.push(Rule::accept([Match::To(link()), Match::Replies]));
        forward.push(Rule::drop([Match::To(link())]));
        // Other tunnels accept packets from the host's address on their links. So packets of this tunnel must not be
        // masqueraded there.
        let tunnels = || Interface::Prefix(interface_names::HOST_PREFIX.into());
        let masquerade = |source: IpAddr| Rule {
            matches: vec![Match::Source(source.into()), Match::NotTo(tunnels())],
            verdict: Verdict::Masquerade,
        };
        let chain = |hook, rules| Chain { hook, policy: Policy::Accept, rules };
        Table {
            name: format!("{RULES_TABLE}-{}", self.name),
            chains: vec![chain(Hook::Forward, forward), chain(Hook::Postrouting, inner.map(masquerade).collect())],
        }
    }
}

/// Returns the networks that are routed into the tunnel.
pub(super) fn tunnel_routes(wireguard: &WireguardPlan) -> impl Iterator<Item = IpNet> {
    wireguard.routes.iter().copied().chain(wireguard.addresses.iter().map(IpNet::trunc))
}

/// Returns the local networks, and the networks within them that are not reached through the host, as [`by_prefix`]
/// does.
pub(super) fn local_destinations(local: &LocalNetworksPlan, wireguard: &WireguardPlan) -> Vec<(IpNet, bool)> {
    by_prefix(&local.networks, tunnel_routes(wireguard).chain(local.except.iter().copied()))
}

/// Returns the local networks, and the networks within them that are routed into the tunnel, each with whether it is
/// local. The longest prefix comes first, which decides as in a routing table.
pub(super) fn by_prefix(local: &[IpNet], tunnel: impl Iterator<Item = IpNet>) -> Vec<(IpNet, bool)> {
    let is_within = |route: &IpNet| local.iter().any(|net| net.contains(route));
    let routed: BTreeSet<IpNet> = tunnel.filter(is_within).collect();
    let mut networks: Vec<(IpNet, bool)> = local.iter().map(|net| (*net, true)).collect();
    networks.extend(routed.into_iter().map(|route| (route, false)));
    networks.sort_by_key(|(net, _)| std::cmp::Reverse(net.prefix_len()));
    networks
}

/// Returns rules that accept the packets of local networks and drop those of others. `matches` returns what the packets
/// of a network have in common, which is local or not.
pub(super) fn network_rules(
    networks: impl IntoIterator<Item = (IpNet, bool)>,
    matches: impl Fn(IpNet, bool) -> Vec<Match>,
) -> Vec<Rule> {
    let rule = |(net, is_local)| {
        let matches = matches(net, is_local);
        if is_local { Rule::accept(matches) } else { Rule::drop(matches) }
    };
    networks.into_iter().map(rule).collect()
}

/// The resolvers outside the tunnel that may be asked.
pub(super) struct AllowedResolvers {
    servers: Vec<IpAddr>,
    ports: &'static [u16],
    /// The mark that queries to them carry.
    mark: Option<u32>,
}

impl AllowedResolvers {
    /// Returns those of a plan. `is_outside` says whether a resolver is reached outside the tunnel. If there is a
    /// forwarder, only its queries are allowed.
    pub(super) fn of(dns: &DnsPlan, is_outside: impl Fn(&IpAddr) -> bool) -> Self {
        match &dns.forwarder {
            Some(forwarder) => {
                Self { servers: forwarder.local_resolvers(), ports: &[DNS_PORT], mark: Some(RESOLVER_MARK) }
            }
            None => {
                let servers = dns.servers.iter().copied().filter(is_outside).collect();
                Self { servers, ports: &RESOLVER_PORTS, mark: None }
            }
        }
    }

    /// Returns the addresses and ports at which the resolvers may be asked.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        let of = |server: &IpAddr| self.ports.iter().map(|port| SocketAddr::new(*server, *port)).collect::<Vec<_>>();
        self.servers.iter().flat_map(of).collect()
    }

    /// Allows queries without a mark.
    pub(super) fn with_any_mark(self) -> Self {
        Self { mark: None, ..self }
    }
}

/// Returns rules that accept queries outside the tunnel to these resolvers, and drop all other queries there. `outside`
/// returns what packets outside the tunnel have in common, to an address if there is one.
pub(super) fn name_rules(resolvers: &AllowedResolvers, outside: impl Fn(Option<IpAddr>) -> Vec<Match>) -> Vec<Rule> {
    let both = |port| [Match::TcpPort(port..=port), Match::UdpPort(port..=port)];
    let AllowedResolvers { servers, ports, mark } = resolvers;
    let allowed = servers.iter().flat_map(|server| ports.iter().copied().flat_map(both).map(|port| (*server, port)));
    let allow = |(server, port): (IpAddr, Match)| {
        let mut matches = outside(Some(server));
        matches.extend([Match::Destination(server.into()), port]);
        matches.extend(mark.map(Match::Mark));
        Rule::accept(matches)
    };
    let others = NAME_PORTS.into_iter().flat_map(both);
    let drop = |port| Rule::drop([outside(None), vec![port]].concat());
    allowed.map(allow).chain(others.map(drop)).collect()
}

/// Returns the rule that keeps the forwarder's questions for resolvers in local networks out of the tunnel, also while
/// the route to their network is missing.
pub(super) fn forwarder_rule(tunnel: &Interface, dns: &DnsPlan) -> Option<Rule> {
    dns.forwarder.is_some().then(|| Rule::drop([Match::To(tunnel.clone()), Match::Mark(RESOLVER_MARK)]))
}

/// Returns rules that accept packets which arrive through the tunnel at the program's open ports.
pub(super) fn open_rules(tunnel: &Interface, open: &[OpenPorts]) -> Vec<Rule> {
    let mut rules = Vec::new();
    for OpenPorts { first, last, protocol } in open {
        let ports = [(Protocol::Tcp, Match::TcpPort(*first..=*last)), (Protocol::Udp, Match::UdpPort(*first..=*last))];
        let open = ports.into_iter().filter(|(of, _)| protocol.is_none_or(|only| only == *of));
        rules.extend(open.map(|(_, port)| Rule::accept([Match::From(tunnel.clone()), port])));
    }
    rules
}

/// Returns a rule that drops all transport protocols outside the tunnel except TCP, UDP and ICMP. The DNS rules only
/// match ports of TCP and UDP, so another protocol with ports (UDP-Lite, SCTP, DCCP) could carry a query past them.
/// `outside` is what packets outside the tunnel have in common.
pub(super) fn other_transports(outside: Match) -> Rule {
    let others = Transport::ALL.map(Match::NotTransport);
    Rule::drop([vec![outside], others.to_vec()].concat())
}
