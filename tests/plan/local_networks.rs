//! Local networks, and which packets the rules accept.

use std::net::IpAddr;

use insta::assert_snapshot;
use ipnet::IpNet;
use proptest::prelude::*;
use vpn_exec::config::{Config, OpenPorts, Protocol};
use vpn_exec::names::InterfaceName;
use vpn_exec::plan::{
    Facts, ForeignChain, ForwardDrop, ForwardingInterface, HostInterface, Ipv6Forwarding, NAME_PORTS, Plan, PlanError,
    RootlessFacts,
};
use vpn_exec::ruleset::{Family, Hook, Interface, Match, Policy, Table, Transport, Verdict};

use super::world::{attached, both, config, host, ips, ipv4, nets, planned, refused, route};

/// A host in a private network that also runs containers and another tunnel.
fn at_home() -> Facts {
    let mut facts = host();
    facts.interfaces.push(HostInterface { name: "docker0".into(), index: 3, mtu: 1500 });
    facts.interfaces.push(HostInterface { name: "ve-other".into(), index: 4, mtu: 1500 });
    facts.routes.extend([
        attached("192.168.1.0/24", 2),
        route("192.168.1.5/32", 2),
        attached("172.17.0.0/16", 3),
        attached("10.9.8.6/31", 4),
        attached("fd12:3456::/64", 2),
        route("10.20.0.0/16", 2),
    ]);
    facts
}

fn with_local(mut config: Config, networks: &[&str]) -> Config {
    config.local.networks = nets(networks);
    config
}

fn networks(plan: &Plan) -> Vec<String> {
    plan.local.networks.iter().map(IpNet::to_string).collect()
}

fn notes(plan: &Plan) -> String {
    plan.notes.join("\n")
}

#[test]
fn a_local_network_is_reached_by_the_interface_of_its_route() {
    for (network, interfaces) in [
        ("192.168.1.0/24", &["eth0"][..]),
        ("172.17.0.0/16", &["docker0"]),
        ("172.16.0.0/12", &["docker0", "eth0"]),
        ("10.20.30.0/24", &["eth0"]),
        ("192.168.77.0/24", &["eth0"]),
    ] {
        let plan = planned(&with_local(ipv4(), &[network]), &at_home());
        assert_eq!(networks(&plan), [network]);
        let found: Vec<String> = plan.local.interfaces.iter().map(ToString::to_string).collect();
        assert_eq!(found, interfaces, "{network}");
    }
    let mut without_routes = at_home();
    without_routes.routes.clear();
    let plan = planned(&with_local(ipv4(), &["192.168.1.0/24"]), &without_routes);
    assert!(plan.local.interfaces.is_empty() && notes(&plan).contains("no route to the local network 192.168.1.0/24"));
}

#[test]
fn the_lan_option_means_the_private_networks_that_the_host_is_attached_to() {
    let mut config = both();
    config.local.lan = true;
    let plan = planned(&config, &at_home());
    assert_eq!(networks(&plan), ["172.17.0.0/16", "192.168.1.0/24", "fd12:3456::/64"]);
    // IPv6 networks are left out if the tunnel has no IPv6, and so are networks that are routed into the tunnel.
    let mut config = super::world::config(&["10.66.1.2/32"], &[], &["0.0.0.0/0", "192.168.1.0/24"]);
    config.local.lan = true;
    let plan = planned(&config, &at_home());
    assert_eq!(networks(&plan), ["172.17.0.0/16"]);
    assert!(notes(&plan).contains("192.168.1.0/24 cannot be a local network"), "{}", notes(&plan));
    assert!(notes(&plan).contains("fd12:3456::/64 cannot be a local network"), "{}", notes(&plan));
    let plan = planned(&config, &host());
    assert!(networks(&plan).is_empty() && notes(&plan).contains("not attached to a private network"));
    assert_eq!(plan.firewall.host, None);
}

#[test]
fn networks_that_cannot_be_local_are_refused() {
    let refusal = |network: &str, config: Config| refused(&with_local(config, &[network]), &at_home());
    let is_only = |reasons: &[PlanError], want: fn(&PlanError) -> bool| {
        assert!(matches!(reasons, [one] if want(one)), "{reasons:?}")
    };
    for network in ["127.0.0.0/8", "224.0.0.0/4", "169.254.0.0/16", "fe80::/10", "ff00::/8", "::1/128"] {
        is_only(&refusal(network, both()), |error| matches!(error, PlanError::LocalUnusable { .. }));
    }
    is_only(&refusal("10.0.0.0/7", both()), |error| matches!(error, PlanError::LocalTooWide { .. }));
    is_only(&refusal("10.66.1.2/32", both()), |error| matches!(error, PlanError::LocalIsTunnels { .. }));
    is_only(&refusal("fd12::/16", ipv4()), |error| matches!(error, PlanError::LocalWithoutIpv6 { .. }));
    let mut old_kernel = at_home();
    old_kernel.ipv6_forwarding = Ipv6Forwarding::Never;
    let reasons = refused(&with_local(both(), &["fd12::/16"]), &old_kernel);
    is_only(&reasons, |error| matches!(error, PlanError::LocalIpv6NotForwarded { .. }));
    old_kernel.ipv6_forwarding = Ipv6Forwarding::All;
    assert_eq!(networks(&planned(&with_local(both(), &["fd12::/16"]), &old_kernel)), ["fd12::/16"]);
}

#[test]
fn a_resolver_in_a_local_network_stays_in_the_tunnel() {
    let plan = planned(&with_local(ipv4(), &["10.0.0.0/8"]), &at_home());
    assert!(plan.wireguard.routes.contains(&"10.64.0.1/32".parse().expect("a network")), "{:?}", plan.wireguard.routes);
    assert!(
        notes(&plan)
            .contains("The DNS server 10.64.0.1 in the local network 10.0.0.0/8 is reached through the tunnel.")
    );
    assert!(notes(&plan).contains("10.66.1.2/32 is reached through the tunnel"), "{}", notes(&plan));
    // Exceptions: it is itself listed as a local network, or the tunnel has no route to it.
    let plan = planned(&with_local(ipv4(), &["10.64.0.1/32"]), &at_home());
    assert_eq!(plan.wireguard.routes, nets(&["0.0.0.0/0"]));
    assert!(notes(&plan).contains("outside the tunnel"), "{}", notes(&plan));
    let narrow = config(&["10.66.1.2/32"], &["192.168.1.1"], &["10.66.0.0/16"]);
    let plan = planned(&with_local(narrow, &["192.168.1.0/24"]), &at_home());
    assert_eq!(plan.wireguard.routes, nets(&["10.66.0.0/16"]));
    assert!(notes(&plan).contains("the tunnel has no route to it"), "{}", notes(&plan));
}

#[test]
fn a_firewall_of_the_host_that_drops_the_packets_is_named() {
    let drops = |family, interfaces: &[&str]| {
        let mut facts = at_home();
        let interfaces = interfaces.iter().map(ToString::to_string).collect();
        let chain = ForeignChain::Nftables { family, table: "filter".into(), name: "FORWARD".into() };
        facts.forward_drops = vec![ForwardDrop { chain, interfaces }];
        facts
    };
    let config = with_local(both(), &["192.168.1.0/24"]);
    let is_noted = |facts: &Facts| {
        notes(&planned(&config, facts)).contains("nft 'insert rule ip filter FORWARD iifname \"ve-mullvad\" accept'")
    };
    assert!(is_noted(&drops("ip", &["docker0", "ve-mullvad2", "*"])));
    assert!(!is_noted(&drops("ip", &["ve-mullvad"])) && !is_noted(&drops("ip", &["ve-*"])));
    assert!(!notes(&planned(&config, &drops("ip6", &[]))).contains("firewall"), "the local network is IPv4");
    assert!(notes(&planned(&config, &drops("inet", &[]))).contains("table inet filter"));
    assert!(!notes(&planned(&both(), &drops("ip", &[]))).contains("firewall"), "there is no local network");
}

#[test]
fn packet_rules_are_printed() {
    let mut config = with_local(both(), &["10.0.0.0/8", "fd12:3456::/64", "10.64.7.0/24"]);
    config.wireguard.peers[0].allowed_ips.extend(nets(&["10.64.0.0/16"]));
    config.dns.servers = Some(ips(&["10.64.0.1", "10.64.7.1"]));
    config.open = vec![
        OpenPorts { first: 51413, last: 51413, protocol: None },
        OpenPorts { first: 6881, last: 6889, protocol: Some(Protocol::Udp) },
    ];
    let plan = planned(&config, &at_home());
    let host = plan.firewall.host_with(&forwarding_interfaces(&plan)).expect("there are local networks");
    assert_snapshot!(format!("{}\n{host}", plan.firewall.inside));
}

/// The forwarding interfaces of a host that is not a router.
/// The keeper connects to the networks itself, so nothing is forwarded.
#[test]
fn a_rootless_tunnel_relays_local_networks_at_the_other_end_of_its_link() {
    let mut facts = at_home();
    facts.rootless = Some(RootlessFacts { first_port: 1024 });
    facts.ipv6_forwarding = Ipv6Forwarding::Never;
    let mut config = with_local(both(), &["10.0.0.0/8", "fd12:3456::/64"]);
    config.dns.servers = Some(ips(&["10.77.0.1"]));
    config.local.networks.extend(nets(&["10.77.0.1/32"]));
    let plan = planned(&config, &facts);
    assert!(plan.local.interfaces.is_empty());
    assert_eq!(plan.local.except, nets(&["10.9.8.6/31"]), "another tunnel's link");
    let rules = plan.firewall.host.expect("rules");
    assert_snapshot!("rootless_rules", rules.to_string());
    let without = planned(&both(), &facts).firewall.host.expect("rules without local networks");
    assert!(!without.to_string().contains("tproxy"), "{without}");
}

fn forwarding_interfaces(plan: &Plan) -> Vec<ForwardingInterface> {
    let of = |interface: &InterfaceName| {
        [Family::Ipv4, Family::Ipv6].map(|family| ForwardingInterface { interface: interface.clone(), family })
    };
    plan.local.interfaces.iter().flat_map(of).collect()
}

/// What rules match on an unmarked packet of an unmarked connection. `from` and `to` are interfaces; an empty name
/// means that there is none.
#[derive(Clone, Debug)]
struct Packet {
    from: &'static str,
    to: &'static str,
    source: IpAddr,
    destination: IpAddr,
    protocol: Protocol,
    port: u16,
    is_reply: bool,
}

/// Returns whether a table accepts a packet; a second implementation of what the kernel does.
fn accepts(table: &Table, hook: Hook, packet: &Packet) -> bool {
    let chain = table.chains.iter().find(|chain| chain.hook == hook).expect("a chain");
    let is = |interface: &Interface, name: &str| match interface {
        Interface::Named(expected) => expected.as_str() == name,
        Interface::Prefix(prefix) => name.starts_with(prefix.as_str()),
        Interface::Loopback => name == "lo",
    };
    let transport = match packet.protocol {
        Protocol::Tcp => Transport::Tcp,
        Protocol::Udp => Transport::Udp,
    };
    let holds = |condition: &Match| match condition {
        Match::From(interface) => is(interface, packet.from),
        Match::NotFrom(interface) => !is(interface, packet.from),
        Match::To(interface) => is(interface, packet.to),
        Match::NotTo(interface) => !is(interface, packet.to),
        Match::Source(net) => net.contains(&packet.source),
        Match::NotSource(net) => net.addr().is_ipv4() == packet.source.is_ipv4() && !net.contains(&packet.source),
        Match::Destination(net) => net.contains(&packet.destination),
        Match::TcpPort(ports) => packet.protocol == Protocol::Tcp && ports.contains(&packet.port),
        Match::OpensTcp => packet.protocol == Protocol::Tcp && !packet.is_reply,
        Match::UdpPort(ports) => packet.protocol == Protocol::Udp && ports.contains(&packet.port),
        Match::Transport(protocol) => *protocol == transport,
        Match::NotTransport(protocol) => *protocol != transport,
        Match::Icmpv6(_) | Match::HopLimit(_) => false,
        Match::Of(family) => (*family == Family::Ipv4) == packet.source.is_ipv4(),
        Match::Replies | Match::ReplyDirection => packet.is_reply,
        Match::NewConnection => !packet.is_reply,
        Match::Mark(mark) | Match::ConnectionMark(mark) => *mark == 0,
    };
    let decisive = chain.rules.iter().find(|rule| rule.matches.iter().all(&holds));
    match decisive {
        Some(rule) => ![Verdict::Drop, Verdict::Reset].contains(&rule.verdict),
        None => chain.policy == Policy::Accept,
    }
}

/// Returns the interface by which a packet leaves the namespace: that of the longest prefix.
fn route_to(plan: &Plan, destination: &IpAddr) -> Option<&'static str> {
    let link = [
        Some(IpNet::new(plan.veth.as_ref().expect("a link").host_ipv4.into(), 31)),
        plan.veth.as_ref().expect("a link").host_ipv6.map(|address| IpNet::new(address.into(), 127)),
    ];
    let link = link.into_iter().flatten().flatten().map(|net| (net.trunc(), "host0"));
    let local = plan.local.networks.iter().map(|net| (*net, "host0"));
    let tunnel = plan.wireguard.routes.iter().chain(&plan.wireguard.addresses).map(|net| (net.trunc(), "wg0"));
    let all = link.chain(local).chain(tunnel).filter(|(net, _)| net.contains(destination));
    all.max_by_key(|(net, _)| net.prefix_len()).map(|(_, by)| by)
}

fn some_network() -> impl Strategy<Value = IpNet> {
    let ipv4 = (0_u8..4, any::<u16>(), 8_u8..=32).prop_map(|(block, rest, length)| {
        let [b, c] = rest.to_be_bytes();
        let first = [10, 172, 192, 100][usize::from(block)];
        IpNet::new(std::net::Ipv4Addr::new(first, b, c, 8).into(), length).expect("a length")
    });
    let ipv6 = (any::<u16>(), 7_u8..=128).prop_map(|(rest, length)| {
        IpNet::new(std::net::Ipv6Addr::new(0xfd00, rest, 0, 0, 0, 0, 0, 1).into(), length).expect("a length")
    });
    prop_oneof![3 => ipv4, 1 => ipv6].prop_map(|net| net.trunc())
}

proptest! {
    #[test]
    fn rules_and_routes_agree(
        local in proptest::collection::vec(some_network(), 0..5),
        allowed in proptest::collection::vec(some_network(), 0..3),
        to in some_network(),
        everything: bool,
        port in prop_oneof![proptest::sample::select(&NAME_PORTS[..]), any::<u16>()],
        udp: bool,
    ) {
        let mut config = both();
        config.local.networks = local;
        if !everything {
            config.wireguard.peers[0].allowed_ips.clear();
        }
        config.wireguard.peers[0].allowed_ips.extend(allowed);
        let Ok(plan) = vpn_exec::plan::plan(&config, &at_home()) else { return Ok(()) };
        let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
        let source = if to.addr().is_ipv4() {
            IpAddr::from(plan.veth.as_ref().expect("a link").inner_ipv4)
        } else {
            plan.veth.as_ref().expect("a link").inner_ipv6.map_or(to.addr(), IpAddr::from)
        };
        let destination = to.addr();
        let packet = |from, to| Packet { from, to, source, destination, protocol, port, is_reply: false };
        let hosts = [Some(IpAddr::from(plan.veth.as_ref().expect("a link").host_ipv4)), plan.veth.as_ref().expect("a link").host_ipv6.map(IpAddr::from)];
        let is_host = hosts.contains(&Some(destination));
        let by = route_to(&plan, &destination);
        let is_in_local_network = plan.local.networks.iter().any(|net| net.contains(&destination));
        let is_local = by == Some("host0") && (is_host || is_in_local_network);
        let is_resolver = plan.dns.servers.contains(&destination) && [53, 853].contains(&port);
        let is_allowed = is_local && (!NAME_PORTS.contains(&port) || is_resolver);
        let is_accepted = accepts(&plan.firewall.inside, Hook::Output, &packet("", "host0"));
        prop_assert_eq!(is_accepted, is_allowed, "by host0, {:?}", by);
        prop_assert!(accepts(&plan.firewall.inside, Hook::Output, &packet("", "wg0")));
        prop_assert!(!accepts(&plan.firewall.inside, Hook::Output, &packet("", "eth0")));
        prop_assert!(!accepts(&plan.firewall.inside, Hook::Forward, &packet("wg0", "host0")));
        // The host forwards the packets that the namespace lets out, if they come from the namespace's address.
        let link = plan.veth.as_ref().expect("a link").host_interface.as_str();
        let link: &'static str = if link == "ve-mullvad" { "ve-mullvad" } else { return Ok(()) };
        if let Some(host) = plan.firewall.host_with(&forwarding_interfaces(&plan)) {
            let is_allowed = is_in_local_network && (!NAME_PORTS.contains(&port) || is_resolver && is_local);
            prop_assert_eq!(accepts(&host, Hook::Forward, &packet(link, "eth0")), is_allowed);
            let spoofed = Packet { source: destination, ..packet(link, "eth0") };
            prop_assert!(!accepts(&host, Hook::Forward, &spoofed), "with a source that is not the tunnel's");
            prop_assert!(!accepts(&host, Hook::Forward, &packet("eth0", link)), "unsolicited inbound packets");
            let reply = Packet { is_reply: true, ..packet("eth0", link) };
            prop_assert!(accepts(&host, Hook::Forward, &reply));
            let forwards = plan.local.interfaces.iter().any(|name| name.as_str() == "eth0");
            prop_assert_eq!(accepts(&host, Hook::Forward, &packet("eth0", "docker0")), !forwards);
            // Links with the same prefix may belong to other programs.
            prop_assert_eq!(accepts(&host, Hook::Forward, &packet("eth0", "ve-other")), !forwards);
            let reply = Packet { is_reply: true, ..packet("eth0", "ve-other") };
            prop_assert!(accepts(&host, Hook::Forward, &reply), "to another tunnel");
            // If the host routes one family anyway, the rules of the other must not affect it.
            for family in [Family::Ipv4, Family::Ipv6] {
                let mut only = forwarding_interfaces(&plan);
                only.retain(|interface| interface.family == family);
                let host = plan.firewall.host_with(&only).expect("as above");
                let concerned = (family == Family::Ipv4) == source.is_ipv4();
                prop_assert_eq!(accepts(&host, Hook::Forward, &packet("eth0", "docker0")), !(forwards && concerned));
            }
        }
    }

    #[test]
    fn only_replies_and_open_ports_are_accepted(
        from in some_network(),
        port: u16,
        udp: bool,
        is_reply: bool,
        first: u16,
        count in 0_u16..9,
    ) {
        let mut config = with_local(both(), &["192.168.1.0/24"]);
        let last = first.saturating_add(count);
        config.open = vec![OpenPorts { first, last, protocol: Some(Protocol::Tcp) }];
        let plan = planned(&config, &at_home());
        let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
        let by = |interface| {
            let (source, destination) = (from.addr(), from.addr());
            let packet = Packet { from: interface, to: "", source, destination, protocol, port, is_reply };
            accepts(&plan.firewall.inside, Hook::Input, &packet)
        };
        prop_assert!(by("lo"));
        prop_assert_eq!(by("wg0"), is_reply || !udp && (first..=last).contains(&port));
        let is_host = from.addr() == IpAddr::from(plan.veth.as_ref().expect("a link").host_ipv4);
        let neighbour = is_host || nets(&["192.168.1.0/24"])[0].contains(&from.addr());
        prop_assert_eq!(by("host0"), is_reply || neighbour);
        prop_assert_eq!(by("eth0"), is_reply);
    }
}
