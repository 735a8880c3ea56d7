//! The plan of a tunnel in a container's namespace: whole plans, and what its packet rules and policy rules let pass.

use std::net::{IpAddr, SocketAddr};

use insta::assert_snapshot;
use ipnet::IpNet;
use vpn_exec::config::{Config, Hook, HookKind, OpenPorts};
use vpn_exec::linux::netlink::rule::Selector;
use vpn_exec::plan::PlanError;
use vpn_exec::plan::shared_namespace::{
    MARK, PRIORITIES, Placement, SharedNamespaceFacts, SharedNamespacePlan, TABLE, TableRoute, known_endpoints, plan,
};
use vpn_exec::ruleset::{Family, Hook as RuleHook, Match, Rule, Transport, Verdict};

use crate::world::{both, config, host, ips, ipv4, nets, peer};

/// A pod with an address of each family.
fn pod() -> SharedNamespaceFacts {
    SharedNamespaceFacts {
        underlay: host(),
        addresses: ips(&["10.42.0.7", "fd00:42::7"]),
        ipv6_is_off: false,
        ..SharedNamespaceFacts::default()
    }
}

/// The placement in a pod whose resolvers these are.
fn in_pod(endpoints: Vec<SocketAddr>, resolvers: &[&str]) -> Placement {
    Placement::Attached { endpoints, resolvers: ips(resolvers), nameservers: ips(resolvers) }
}

fn attached(config: &Config) -> SharedNamespacePlan {
    let placement = in_pod(known_endpoints(config), &[]);
    plan(config, &pod(), placement).unwrap_or_else(|errors| panic!("{errors}"))
}

fn refused(config: &Config, facts: &SharedNamespaceFacts) -> Vec<PlanError> {
    plan(config, facts, Placement::Container).expect_err("a refusal").reasons
}

/// A pod's tunnel with local networks: those of the cluster, one of which contains the tunnel's own address.
fn in_cluster() -> Config {
    let mut config = both();
    config.local.networks = nets(&["10.0.0.0/8", "10.66.0.0/16", "10.43.0.10/32", "fd00:42::/48"]);
    config.dns.servers = Some(ips(&["10.64.0.1", "10.43.0.10"]));
    config.open = vec![OpenPorts { first: 51413, last: 51413, protocol: None }];
    config
}

#[test]
fn a_pod_without_local_networks() {
    assert_snapshot!(attached(&both()));
}

#[test]
fn a_pod_in_a_cluster() {
    assert_snapshot!(attached(&in_cluster()));
}

#[test]
fn a_pod_in_a_cluster_as_json() {
    assert_snapshot!(serde_json::to_string_pretty(&attached(&in_cluster())).expect("JSON"));
}

#[test]
fn a_container_whose_addresses_are_unknown() {
    let facts = SharedNamespaceFacts { addresses: Vec::new(), ..pod() };
    assert_snapshot!(plan(&ipv4(), &facts, Placement::Container).expect("a plan"));
}

#[test]
fn settings_that_do_not_apply_are_named() {
    let mut config = ipv4();
    config.wireguard.interface.table = Some("off".into());
    config.wireguard.interface.fwmark = Some(1);
    config.wireguard.interface.save_config = Some(true);
    config.wireguard.interface.hooks = vec![Hook { kind: HookKind::PostUp, command: "iptables -F".into() }];
    config.local.lan = true;
    let plan = attached(&config);
    assert_eq!(plan.wireguard.fwmark, MARK);
    assert_snapshot!(plan.notes.join("\n"));
}

#[test]
fn without_ipv6_in_the_namespace_the_tunnel_has_ipv4_and_says_so_once() {
    let facts = SharedNamespaceFacts { ipv6_is_off: true, ..pod() };
    let off = plan(&both(), &facts, Placement::Container).expect("a plan");
    assert!(!off.wireguard.ipv6 && off.wireguard.addresses == nets(&["10.66.1.2/32"]));
    let said: Vec<_> = off.notes.iter().filter(|note| note.contains("IPv6 is switched off here")).collect();
    assert_eq!(said.len(), 1, "{:?}", off.notes);
    // IPv6 stays closed.
    assert!(off.routes.contains(&TableRoute::Unreachable(nets(&["::/0"])[0])), "{:?}", off.routes);
    let only = config(&["fd00:6::2/128"], &[], &["::/0"]);
    assert_eq!(refused(&only, &facts), [PlanError::Ipv6SwitchedOff]);
}

#[test]
fn a_kernel_without_ipv6_gets_no_rules_of_it() {
    let mut facts = pod();
    facts.underlay.without_ipv6 = true;
    let plan = plan(&both(), &facts, Placement::Container).expect("a plan");
    assert!(plan.routing_rules.iter().all(|rule| rule.family == Family::Ipv4), "{:?}", plan.routing_rules);
    assert_eq!(plan.routes[0], TableRoute::Unreachable(nets(&["0.0.0.0/0"])[0]));
    assert!(!plan.routes.contains(&TableRoute::Unreachable(nets(&["::/0"])[0])), "{:?}", plan.routes);
}

#[test]
fn networks_that_cannot_be_local_are_refused() {
    let mut config = both();
    config.local.networks = nets(&["0.0.0.0/1", "127.0.0.0/8", "10.66.1.2/32"]);
    assert!(
        matches!(
            refused(&config, &pod()).as_slice(),
            [PlanError::LocalTooWide { .. }, PlanError::LocalUnusable { .. }, PlanError::LocalIsTunnels { .. }]
        ),
        "{:?}",
        refused(&config, &pod())
    );
}

/// What the policy rules do with a packet: the table of the first rule that selects it.
fn table_of(plan: &SharedNamespacePlan, from: Option<IpAddr>, to: IpAddr, mark: u32) -> u32 {
    let mut rules = plan.routing_rules.clone();
    rules.sort_by_key(|rule| rule.priority);
    let selects = |selector: &Selector| match selector {
        // These plans are made without knowledge of the main table.
        Selector::NotByDefault => false,
        Selector::All => true,
        Selector::Mark(own) => *own == mark,
        Selector::From(net) => from.is_some_and(|from| net.contains(&from)),
        Selector::To(net) => net.contains(&to),
    };
    let is_family = |family: Family| (family == Family::Ipv4) == to.is_ipv4();
    let found = rules.iter().find(|rule| is_family(rule.family) && selects(&rule.selector));
    found.expect("a rule for all packets").table
}

#[test]
fn the_longest_prefix_decides_between_the_tunnel_and_local_networks() {
    let mut config = in_cluster();
    config.wireguard.peers.push(peer(8, &["10.66.7.0/24"], None));
    let plan = attached(&config);
    let main = 254;
    for (to, table) in [
        ("203.0.113.80", TABLE),
        ("2001:db8:2::80", TABLE),
        ("10.43.0.1", main),
        ("10.66.3.1", main),
        ("10.66.7.1", TABLE),
        // The tunnel's own address and its resolver.
        ("10.66.1.2", TABLE),
        ("10.64.0.1", TABLE),
        ("fd00:42::1", main),
        ("fd00:43::1", TABLE),
    ] {
        let to: IpAddr = to.parse().expect("an address");
        assert_eq!(table_of(&plan, None, to, 0), table, "{to}");
        assert_eq!(table_of(&plan, None, to, MARK), main, "{to} with the mark");
    }
    let own = "10.42.0.7".parse().expect("an address");
    assert_eq!(table_of(&plan, Some(own), ips(&["203.0.113.80"])[0], 0), main, "from the pod's own address");
    let priorities: Vec<u32> = plan.routing_rules.iter().map(|rule| rule.priority).collect();
    assert!(priorities.iter().all(|priority| PRIORITIES.contains(priority)), "{priorities:?}");
}

/// A packet on its way out, of a program or of WireGuard.
struct Packet {
    source: IpAddr,
    destination: SocketAddr,
    tcp: bool,
    mark: u32,
    /// The mark of the connection.
    connection: u32,
    is_reply: bool,
    to: &'static str,
}

/// Returns whether the output rules let a packet pass.
fn passes(plan: &SharedNamespacePlan, packet: &Packet) -> bool {
    let chain = plan.rules.chains.iter().find(|chain| chain.hook == RuleHook::Output).expect("a chain");
    let is_named = |interface: &vpn_exec::ruleset::Interface| interface.to_string().trim_matches('"') == packet.to;
    let own_transport = if packet.tcp { Transport::Tcp } else { Transport::Udp };
    let holds = |condition: &Match| match condition {
        Match::To(interface) => is_named(interface),
        Match::NotTo(interface) => !is_named(interface),
        Match::Source(net) => net.contains(&packet.source),
        Match::NotSource(net) => net.addr().is_ipv4() == packet.source.is_ipv4() && !net.contains(&packet.source),
        Match::Destination(net) => net.contains(&packet.destination.ip()),
        Match::TcpPort(ports) => packet.tcp && ports.contains(&packet.destination.port()),
        Match::UdpPort(ports) => !packet.tcp && ports.contains(&packet.destination.port()),
        Match::Transport(transport) => *transport == own_transport,
        Match::NotTransport(transport) => *transport != own_transport,
        Match::Mark(mark) => packet.mark == *mark,
        Match::ConnectionMark(mark) => packet.connection == *mark,
        Match::ReplyDirection | Match::Replies => packet.is_reply,
        Match::Icmpv6(_) => false,
        other => panic!("{other}"),
    };
    let decides = |rule: &&Rule| rule.matches.iter().all(holds);
    let rule = chain.rules.iter().find(decides).expect("a last rule");
    rule.verdict == Verdict::Accept
}

fn packet(to: &'static str, source: &str, destination: &str) -> Packet {
    let (source, destination) = (source.parse().expect("an address"), destination.parse().expect("an address"));
    Packet { source, destination, tcp: true, mark: 0, connection: 0, is_reply: false, to }
}

#[test]
fn only_intended_packets_leave_by_the_pods_interface() {
    let plan = attached(&in_cluster());
    let pod = |destination| packet("eth0", "10.42.0.7", destination);
    let udp = |packet: Packet| Packet { tcp: false, ..packet };
    let marked = |packet: Packet| Packet { mark: MARK, ..packet };
    let unmarked_reply = |packet: Packet| Packet { is_reply: true, ..packet };
    let reply = |packet: Packet| Packet { is_reply: true, connection: MARK, ..packet };
    for (what, packet, passes_rules) in [
        ("the Internet", pod("203.0.113.80:80"), false),
        ("the Internet, marked", marked(pod("203.0.113.80:80")), false),
        ("the Internet, as a reply", reply(pod("203.0.113.80:80")), true),
        ("a reply to a connection that did not come from outside", unmarked_reply(pod("203.0.113.80:80")), false),
        ("the other direction of an inbound connection", Packet { connection: MARK, ..pod("203.0.113.80:80") }, false),
        ("a query as a reply", reply(udp(pod("203.0.113.80:53"))), false),
        ("the Internet from the tunnel's address", packet("eth0", "10.66.1.2", "203.0.113.80:80"), false),
        ("a reply from the tunnel's address", reply(packet("eth0", "10.66.1.2", "203.0.113.80:80")), false),
        ("the tunnel", packet("wg0", "10.66.1.2", "203.0.113.80:80"), true),
        ("the endpoint, without the mark", udp(pod("192.0.2.1:51820")), false),
        ("the endpoint, marked", marked(udp(pod("192.0.2.1:51820"))), true),
        ("the endpoint's TCP, marked", marked(pod("192.0.2.1:51820")), false),
        ("the endpoint's other port, marked", marked(udp(pod("192.0.2.1:53"))), false),
        ("a local network", pod("10.43.0.1:443"), true),
        ("a local network from the tunnel's address", packet("eth0", "10.66.1.2", "10.43.0.1:443"), false),
        ("the tunnel's address in a local network", pod("10.66.1.2:80"), false),
        ("the configured local resolver", udp(pod("10.43.0.10:53")), true),
        ("the configured local resolver, TLS", pod("10.43.0.10:853"), true),
        ("the configured local resolver, mDNS", udp(pod("10.43.0.10:5353")), false),
        ("another local resolver", udp(pod("10.42.0.1:53")), false),
        ("another local resolver, TCP", pod("10.42.0.1:53"), false),
        ("the tunnel's resolver by the pod's interface", udp(pod("10.64.0.1:53")), false),
        ("an IPv6 neighbor", packet("eth0", "fd00:42::7", "[fd00:42::1]:80"), true),
        ("the IPv6 Internet", packet("eth0", "fd00:42::7", "[2001:db8:2::80]:80"), false),
        ("loopback", packet("lo", "127.0.0.1", "127.0.0.1:53"), true),
        ("Docker's resolver", udp(packet("lo", "127.0.0.1", "127.0.0.11:40123")), false),
    ] {
        assert_eq!(passes(&plan, &packet), passes_rules, "{what}");
    }
}

#[test]
fn resolvers_of_endpoint_names_may_be_asked_with_the_mark_only() {
    let mut config = ipv4();
    config.wireguard.peers = vec![peer(7, &["0.0.0.0/0"], Some("vpn.example:51820"))];
    let placement = in_pod(known_endpoints(&config), &["10.43.0.10"]);
    let mut plan = plan(&config, &pod(), placement).expect("a plan");
    let query = packet("eth0", "10.42.0.7", "10.43.0.10:53");
    assert!(!passes(&plan, &query));
    assert!(passes(&plan, &Packet { mark: MARK, ..query }));
    assert!(!passes(&plan, &packet("lo", "127.0.0.1", "127.0.0.11:40123")));
    let docker = in_pod(Vec::new(), &["127.0.0.11"]);
    let in_docker = vpn_exec::plan::shared_namespace::plan(&config, &pod(), docker).expect("a plan");
    assert!(!passes(&in_docker, &packet("lo", "127.0.0.1", "127.0.0.11:40123")));
    assert!(passes(&in_docker, &Packet { mark: MARK, ..packet("lo", "127.0.0.1", "127.0.0.11:40123") }));
    // The rules follow the endpoint.
    let endpoint = || Packet { mark: MARK, tcp: false, ..packet("eth0", "10.42.0.7", "192.0.2.9:51820") };
    assert!(!passes(&plan, &endpoint()));
    let moved: SocketAddr = "192.0.2.9:51820".parse().expect("an address");
    assert!(plan.admit(&[moved]) && !plan.admit(&[moved, moved]));
    assert!(passes(&plan, &endpoint()));
    assert!(plan.admit(&["192.0.2.10:51820".parse().expect("an address")]));
    assert!(!passes(&plan, &endpoint()), "the former address is closed");
}

#[test]
fn a_containers_namespace_carries_no_encrypted_packets() {
    let plan = plan(&ipv4(), &pod(), Placement::Container).expect("a plan");
    let endpoint = Packet { mark: MARK, tcp: false, ..packet("eth0", "10.42.0.7", "192.0.2.1:51820") };
    assert!(!passes(&plan, &endpoint));
    assert_eq!(plan.wireguard.fwmark, 0);
}

#[test]
fn the_networks_of_addresses_are_routed_into_the_tunnel() {
    let plan = attached(&config(&["10.2.0.2/24"], &[], &["0.0.0.0/0"]));
    let routes: Vec<IpNet> = nets(&["0.0.0.0/0", "10.2.0.0/24"]);
    assert_eq!(plan.routes[2..], routes.into_iter().map(TableRoute::Tunnel).collect::<Vec<_>>());
}
