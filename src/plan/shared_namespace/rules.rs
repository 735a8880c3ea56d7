//! The packet rules of an attached tunnel. They say the same as its routes, and more: they also cover sockets that are
//! bound to an interface or an address, inbound packets, and queries to resolvers. They hold before WireGuard's
//! interface exists and after it is gone.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

use super::{MARK, Placement, SharedNamespacePlan};
use crate::plan::dns_forwarding::{DNS_PORT, FORWARDER_ADDRESSES, ForwarderPlan};
use crate::plan::firewall::{self, AllowedResolvers, NAME_PORTS, NEIGHBOR_DISCOVERY, ON_LINK_HOPS};
use crate::ruleset::{Chain, Hook, Interface, Match, Policy, Rule, Table, Transport};

/// The address of Docker's resolver in every container of a network that the user has made.
const DOCKER_RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

/// Router solicitation (RFC 4861 section 4.1). The kernel sends it for the container's own IPv6 routes.
const ROUTER_SOLICITATION: u8 = 133;

/// The multicast address of all routers of a link (RFC 4291 section 2.7.1).
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);

/// Returns the packet rules.
pub(super) fn decide(plan: &SharedNamespacePlan) -> Table {
    let closed = [(Hook::Input, input(plan)), (Hook::Forward, Vec::new()), (Hook::Output, output(plan))];
    let mut chains = marking(plan);
    chains.extend(plan.dns.forwarder.as_ref().and_then(redirection));
    chains.extend(closed.into_iter().map(|(hook, rules)| Chain::closed(hook, rules)));
    Table { name: firewall::RULES_TABLE.into(), chains }
}

/// Returns the chains that mark connections which come in by the container's interfaces, and the replies to them.
/// Replies leave by the container's own routes, whatever address they come from.
///
/// The kernel also takes a TCP connection to the Internet from before the rules for an inbound one, if the first packet
/// that it tracks comes from the other end. So only the packet that opens a TCP connection counts.
fn marking(plan: &SharedNamespacePlan) -> Vec<Chain> {
    let inbound = |kind| {
        let matches = [
            Match::NotFrom(Interface::Loopback),
            Match::NotFrom(Interface::Named(plan.wireguard.interface.clone())),
            Match::NewConnection,
            kind,
        ];
        Rule::set_connection_mark(MARK, matches)
    };
    let inbound = vec![inbound(Match::OpensTcp), inbound(Match::NotTransport(Transport::Tcp))];
    let replies = vec![Rule::set_mark(MARK, replies())];
    let chain = |hook, rules| Chain { hook, policy: Policy::Accept, rules };
    vec![chain(Hook::Prerouting, inbound), chain(Hook::Reroute, replies)]
}

/// Returns what the replies to inbound connections have in common. The direction alone says too little: a program may
/// send the first packet of a connection to itself in the name of another host (`IPV6_FREEBIND` of linux/in6.h).
fn replies() -> [Match; 2] {
    [Match::ConnectionMark(MARK), Match::ReplyDirection]
}

/// Returns the chain that redirects questions to a forwarder which may not listen at the port of resolvers.
fn redirection(forwarder: &ForwarderPlan) -> Option<Chain> {
    let redirect = |address: IpAddr| {
        [Match::UdpPort(DNS_PORT..=DNS_PORT), Match::TcpPort(DNS_PORT..=DNS_PORT)]
            .map(|port| Rule::redirect_to(forwarder.port, [Match::Destination(address.into()), port]))
    };
    let rules = FORWARDER_ADDRESSES.into_iter().flat_map(redirect).collect();
    let chain = Chain { hook: Hook::OutputNat, policy: Policy::Accept, rules };
    (forwarder.port != DNS_PORT).then_some(chain)
}

fn input(plan: &SharedNamespacePlan) -> Vec<Rule> {
    let tunnel = Interface::Named(plan.wireguard.interface.clone());
    let mut rules = vec![
        Rule::accept([Match::From(Interface::Loopback)]),
        Rule::accept([Match::From(tunnel.clone()), Match::Replies]),
    ];
    rules.extend(firewall::open_rules(&tunnel, &plan.open));
    rules.push(Rule::drop([Match::From(tunnel)]));
    // A neighbor must not reach the tunnel's own addresses by the container's interfaces.
    rules.extend(own_addresses(plan).map(|address| Rule::drop([Match::Destination(address)])));
    rules.push(Rule::accept([]));
    rules
}

fn output(plan: &SharedNamespacePlan) -> Vec<Rule> {
    let tunnel = || Interface::Named(plan.wireguard.interface.clone());
    let (endpoints, resolvers) = match &plan.placement {
        Placement::Attached { endpoints, resolvers, .. } => (endpoints.as_slice(), resolvers.as_slice()),
        Placement::Container => (&[][..], &[][..]),
    };
    let mut rules = docker_rules(resolvers);
    rules.push(Rule::accept([Match::To(Interface::Loopback)]));
    rules.extend(firewall::forwarder_rule(&tunnel(), &plan.dns));
    rules.push(Rule::accept([Match::To(tunnel())]));
    rules.extend(endpoints.iter().map(encrypted));
    rules.extend(NAME_PORTS.map(query_as_reply));
    rules.extend(resolvers.iter().flat_map(endpoint_queries));
    // No packet of the tunnel leaves by the container's interfaces, not even as a reply.
    rules.extend(own_addresses(plan).map(|address| Rule::drop([Match::Source(address)])));
    rules.push(Rule::accept([replies().as_slice(), &[Match::Replies]].concat()));
    rules.extend(neighbor_discovery());
    rules.push(firewall::other_transports(Match::NotTo(tunnel())));
    rules.extend([true, false].into_iter().filter_map(|is_ipv4| foreign_sources(plan, is_ipv4)));
    let resolvers = AllowedResolvers::of(&plan.dns, |server| plan.is_local(server));
    rules.extend(firewall::name_rules(&resolvers, |_| Vec::new()));
    let networks = firewall::by_prefix(&plan.local_networks, firewall::tunnel_routes(&plan.wireguard));
    rules.extend(firewall::network_rules(networks, |net, _| vec![Match::Destination(net)]));
    rules
}

/// Returns the rule that drops the packets of a family from an address that is not the container's, if the container
/// has a known one. A program may choose any source in IPv6 (`IPV6_FREEBIND` of linux/in6.h): a local network would
/// answer to that address on the Internet, or bring the packet back as an inbound connection from there.
fn foreign_sources(plan: &SharedNamespacePlan, is_ipv4: bool) -> Option<Rule> {
    let own = plan.container_addresses.iter().filter(|address| address.is_ipv4() == is_ipv4);
    let others: Vec<Match> = own.map(|address| Match::NotSource((*address).into())).collect();
    (!others.is_empty()).then(|| Rule::drop(others))
}

/// Returns the rules that accept what neighbor discovery needs. A solicited neighbor, or one that has solicited, may
/// have any address: routers announce the networks of a link at any time (RFC 4861 section 6.3.4).
fn neighbor_discovery() -> impl Iterator<Item = Rule> {
    let to_routers = [Match::Icmpv6(ROUTER_SOLICITATION), Match::Destination(IpAddr::from(ALL_ROUTERS).into())];
    let kinds = NEIGHBOR_DISCOVERY.map(|kind| vec![Match::Icmpv6(kind)]);
    let on_link = |mut matches: Vec<Match>| {
        matches.push(Match::HopLimit(ON_LINK_HOPS));
        Rule::accept(matches)
    };
    std::iter::once(to_routers.into()).chain(kinds).map(on_link)
}

/// Returns the rule that accepts encrypted packets to an endpoint.
fn encrypted(endpoint: &SocketAddr) -> Rule {
    let port = endpoint.port();
    Rule::accept([Match::Mark(MARK), Match::Destination(endpoint.ip().into()), Match::UdpPort(port..=port)])
}

/// Returns the rules for Docker's resolver, which listens in the container and asks the host's resolvers: only the
/// process that looks up the names of endpoints may use it. Docker has redirected the queries to another port before.
fn docker_rules(resolvers: &[IpAddr]) -> Vec<Rule> {
    let is_it = || Match::Destination(IpAddr::from(DOCKER_RESOLVER).into());
    let allowed = resolvers.contains(&DOCKER_RESOLVER.into()).then(|| Rule::accept([Match::Mark(MARK), is_it()]));
    allowed.into_iter().chain([Rule::drop([is_it()])]).collect()
}

/// Returns the rule that drops a query which passes for a reply: to a resolver whose answer to a query from before the
/// rules seems to open a connection.
fn query_as_reply(port: u16) -> Rule {
    Rule::drop([replies().as_slice(), &[Match::UdpPort(port..=port)]].concat())
}

/// Returns the rules that accept the queries for the names of endpoints to a resolver. The mark needs
/// CAP_NET_ADMIN or CAP_NET_RAW.
fn endpoint_queries(resolver: &IpAddr) -> [Rule; 2] {
    [Match::UdpPort(DNS_PORT..=DNS_PORT), Match::TcpPort(DNS_PORT..=DNS_PORT)]
        .map(|port| Rule::accept([Match::Mark(MARK), Match::Destination((*resolver).into()), port]))
}

/// Returns the tunnel's own addresses.
fn own_addresses(plan: &SharedNamespacePlan) -> impl Iterator<Item = IpNet> {
    plan.wireguard.addresses.iter().map(|address| address.addr().into())
}
