//! The rules for packets: those of the tunnel's namespace, which let nothing pass but what the tunnel is for, and, where there are local
//! networks, those of the host.
//!
//! The routes inside lead to the same places. The rules hold besides against what passes routes by, such as a socket that is bound to an
//! interface, against what comes in, and against questions for names, which are not to be asked of anybody local: of the host least,
//! where resolvers listen on all addresses.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::local::{self, LocalPlan};
use super::{Plan, VethPlan, WireguardPlan, interfaces};
use crate::config::{OpenPorts, Protocol};
use crate::names::{InterfaceName, TunnelName};
use crate::ruleset::{Chain, Family, Hook, Interface, Match, Policy, Rule, Table, Transport, Verdict};

/// The ports at which names are asked for: DNS (RFC 1035), DNS over TLS and QUIC (RFC 7858, RFC 9250), mDNS (RFC 6762) and LLMNR
/// (RFC 4795).
pub const NAME_PORTS: [u16; 4] = [53, 853, 5353, 5355];

/// Of these, the ones at which a resolver is asked that is configured.
const RESOLVER_PORTS: [u16; 2] = [53, 853];

/// Neighbor solicitation and advertisement (RFC 4861 section 4), which IPv6 needs on a link.
const NEIGHBOR_DISCOVERY: [u8; 2] = [135, 136];

/// The name of the table inside.
const INSIDE: &str = "vpn-exec";

/// The rules for packets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirewallPlan {
    /// Those of the tunnel's namespace.
    pub inside: Table,
    /// Those of the host, where there are local networks.
    pub host: Option<Table>,
}

/// An interface of the host's that forwards the packets of a family for tunnels' sake alone. The other family's may be everybody's: a host
/// that is a router of IPv4 need not be one of IPv6.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwitchedOn {
    /// Which.
    pub interface: InterfaceName,
    /// What it forwards.
    pub family: Family,
}

/// What the rules are made from.
pub(super) struct Basis<'a> {
    pub(super) name: &'a TunnelName,
    pub(super) wireguard: &'a WireguardPlan,
    pub(super) veth: &'a VethPlan,
    pub(super) local: &'a LocalPlan,
    pub(super) servers: &'a [IpAddr],
    pub(super) open: &'a [OpenPorts],
}

impl FirewallPlan {
    /// The rules of a plan whose other parts are decided.
    pub(super) fn of(plan: &Plan) -> Self {
        let Plan { name, wireguard, veth, local, names, open, .. } = plan;
        Self::new(&Basis { name, wireguard, veth, local, servers: &names.servers, open })
    }

    pub(super) fn new(basis: &Basis<'_>) -> Self {
        let has_networks = !basis.local.networks.is_empty();
        Self { inside: basis.inside(), host: has_networks.then(|| basis.host()) }
    }

    /// The host's table, where these interfaces of the host forward for tunnels' sake alone: nothing is forwarded from them but what
    /// answers a tunnel. To which one, the others' tables say.
    pub fn host_with(&self, switched_on: &[SwitchedOn]) -> Option<Table> {
        let mut table = self.host.clone()?;
        let closed = switched_on.iter().flat_map(|SwitchedOn { interface, family }| {
            let from = || [Match::From(Interface::Named(interface.clone())), Match::Of(*family)];
            let tunnels = Match::To(Interface::Prefix(interfaces::HOST_PREFIX.into()));
            let answers = from().into_iter().chain([tunnels, Match::Answers]).collect::<Vec<_>>();
            [Rule::accept(answers), Rule::drop(from())]
        });
        if let Some(chain) = table.chains.iter_mut().find(|chain| chain.hook == Hook::Forward) {
            chain.rules.extend(closed);
        }
        Some(table)
    }
}

impl Basis<'_> {
    fn inside(&self) -> Table {
        let link = || Interface::Named(self.veth.inner_interface.clone());
        let tunnel = || Interface::Named(self.wireguard.interface.clone());
        let ipv6 = self.veth.host_ipv6.is_some();

        let mut input = vec![
            Rule::accept([Match::From(Interface::Loopback)]),
            other_transports(Match::From(link())),
            Rule::accept([Match::Answers]),
        ];
        input.extend(self.neighbours(|net, _| vec![Match::From(link()), Match::Source(net)]));
        let mut output = vec![
            Rule::accept([Match::To(Interface::Loopback)]),
            Rule::accept([Match::To(tunnel())]),
            other_transports(Match::To(link())),
        ];
        // From the address on the link alone: whoever is asked from one of the tunnel's would answer it by the host's own way, in the clear.
        let from_link = |to: IpAddr| [Match::To(link())].into_iter().chain(self.inner_address(to).map(Match::Source));
        output.extend(self.names(|to| to.map_or_else(|| vec![Match::To(link())], |to| from_link(to).collect())));
        output.extend(self.neighbours(|net, is_local| {
            let whence = if is_local { from_link(net.addr()).collect() } else { vec![Match::To(link())] };
            [whence, vec![Match::Destination(net)]].concat()
        }));
        for kind in NEIGHBOR_DISCOVERY.into_iter().filter(|_| ipv6) {
            input.push(Rule::accept([Match::From(link()), Match::Icmpv6(kind)]));
            output.push(Rule::accept([Match::To(link()), Match::Icmpv6(kind)]));
        }
        for OpenPorts { first, last, protocol } in self.open {
            let ports =
                [(Protocol::Tcp, Match::TcpPort(*first..=*last)), (Protocol::Udp, Match::UdpPort(*first..=*last))];
            let wanted = ports.into_iter().filter(|(of, _)| protocol.is_none_or(|only| only == *of));
            input.extend(wanted.map(|(_, port)| Rule::accept([Match::From(tunnel()), port])));
        }
        let chains = [(Hook::Input, input), (Hook::Forward, Vec::new()), (Hook::Output, output)];
        Table {
            name: INSIDE.into(),
            chains: chains.into_iter().map(|(hook, rules)| Chain::closed(hook, rules)).collect(),
        }
    }

    /// Lets pass by the link what is the host's address on it or in a local network; but not what of that is the tunnel's, as the routes
    /// have it, too: it shall not take this way when the tunnel's interface is gone, and its routes with it.
    fn neighbours(&self, of: impl Fn(IpNet, bool) -> Vec<Match>) -> Vec<Rule> {
        let local = &self.local.networks;
        let is_within = |claim: &IpNet| local.iter().any(|net| net.contains(claim));
        let tunnels: BTreeSet<IpNet> = self.tunnels().filter(is_within).collect();
        let mut known: Vec<(IpNet, bool)> = local.iter().map(|net| (*net, true)).collect();
        known.extend(tunnels.into_iter().map(|claim| (claim, false)));
        // As in a table of routes, the longest prefix decides.
        known.sort_by_key(|(net, _)| std::cmp::Reverse(net.prefix_len()));
        let host = self.host_addresses().map(|address| (IpNet::from(address), true));
        let rule = |(net, is_local)| {
            let matches = of(net, is_local);
            if is_local { Rule::accept(matches) } else { Rule::drop(matches) }
        };
        host.chain(known).map(rule).collect()
    }

    /// The inner address on the link, of the family of another.
    fn inner_address(&self, like: IpAddr) -> Option<IpNet> {
        let inner = [Some(IpAddr::from(self.veth.inner_ipv4)), self.veth.inner_ipv6.map(IpAddr::from)];
        inner.into_iter().flatten().find(|address| address.is_ipv4() == like.is_ipv4()).map(IpNet::from)
    }

    /// The host's addresses on the link.
    fn host_addresses(&self) -> impl Iterator<Item = IpAddr> {
        [Some(IpAddr::from(self.veth.host_ipv4)), self.veth.host_ipv6.map(IpAddr::from)].into_iter().flatten()
    }

    /// What is routed into the tunnel.
    fn tunnels(&self) -> impl Iterator<Item = IpNet> {
        self.wireguard.routes.iter().copied().chain(self.wireguard.addresses.iter().map(IpNet::trunc))
    }

    /// Lets names be asked of configured resolvers, where these are not reached through the tunnel, and of nobody else. `way` is what packets
    /// have in common that go by the link, to an address where there is one.
    fn names(&self, way: impl Fn(Option<IpAddr>) -> Vec<Match>) -> Vec<Rule> {
        let both = |port| [Match::TcpPort(port..=port), Match::UdpPort(port..=port)];
        let servers = self.servers.iter().filter(|server| self.is_on_link(server));
        let asked =
            servers.flat_map(|server| RESOLVER_PORTS.into_iter().flat_map(both).map(|port| (Some(*server), port)));
        let others = NAME_PORTS.into_iter().flat_map(both).map(|port| (None, port));
        let rule = |(server, port): (Option<IpAddr>, Match)| {
            let mut matches = way(server);
            matches.extend(server.map(|server| Match::Destination(server.into())));
            matches.push(port);
            if server.is_some() { Rule::accept(matches) } else { Rule::drop(matches) }
        };
        asked.chain(others).map(rule).collect()
    }

    fn is_on_link(&self, server: &IpAddr) -> bool {
        let is_host = self.host_addresses().any(|address| address == *server);
        is_host || local::is_local(&self.local.networks, &self.tunnels().collect::<Vec<_>>(), server)
    }

    /// What the host forwards for the tunnel, and hides behind its own address. Everything else that comes from the link or is to go to
    /// it is not forwarded.
    fn host(&self) -> Table {
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
        forward.extend(self.names(|to| to.map_or_else(|| vec![Match::From(link())], from_tunnel)));
        forward.extend(self.local.networks.iter().map(|net| {
            let mut matches = from_tunnel(net.addr());
            matches.push(Match::Destination(*net));
            Rule::accept(matches)
        }));
        forward.push(Rule::drop([Match::From(link())]));
        forward.push(Rule::accept([Match::To(link()), Match::Answers]));
        forward.push(Rule::drop([Match::To(link())]));
        // Another tunnel lets in who comes from the host's address on its link. Who comes from this one is not to be taken for the host.
        let tunnels = || Interface::Prefix(interfaces::HOST_PREFIX.into());
        let hide = |source: IpAddr| Rule {
            matches: vec![Match::Source(source.into()), Match::NotTo(tunnels())],
            verdict: Verdict::Masquerade,
        };
        let chain = |hook, rules| Chain { hook, policy: Policy::Accept, rules };
        Table {
            name: format!("{INSIDE}-{}", self.name),
            chains: vec![chain(Hook::Forward, forward), chain(Hook::Postrouting, inner.map(hide).collect())],
        }
    }
}

/// Drops on the link to the host every transport protocol but TCP, UDP and ICMP. The rules for name look-ups know the
/// ports of TCP and UDP only, so another protocol with ports (UDP-Lite, SCTP, DCCP) could carry a look-up past them.
fn other_transports(on_link: Match) -> Rule {
    let others = Transport::ALL.map(Match::NotTransport);
    Rule::drop([vec![on_link], others.to_vec()].concat())
}
