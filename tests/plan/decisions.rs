//! Decisions about MTU, routes, address families and DNS in unusual cases.

use vpn_exec::plan::{EndpointRoute, Facts, HostInterface, PlanError, plan};

use crate::world::{both, config, host, ips, ipv4, nets, peer, planned, refused, route};

fn endpoint_route(address: &str, interface: u32, mtu: Option<u32>) -> EndpointRoute {
    EndpointRoute { address: address.parse().expect("an address"), interface: Some(interface), mtu }
}

fn mtu(facts: &Facts) -> (u32, String) {
    let wireguard = planned(&ipv4(), facts).wireguard;
    (wireguard.mtu, wireguard.mtu_reason)
}

/// As `set_mtu_up` in linux.bash of wg-quick(8): the smallest of the routes' own MTUs, else of their interfaces' MTUs.
#[test]
fn the_mtu_is_the_smallest_path_mtu_to_an_endpoint() {
    let mut facts = host();
    facts.interfaces.push(HostInterface { name: "ppp0".into(), index: 3, mtu: 1492 });
    facts.endpoint_routes = vec![endpoint_route("192.0.2.1", 2, None), endpoint_route("192.0.2.2", 3, None)];
    assert_eq!(mtu(&facts), (1412, "1492, the MTU of ppp0 to 192.0.2.2, minus 80 for WireGuard".into()));
    facts.endpoint_routes.push(endpoint_route("2001:db8::1", 2, Some(1400)));
    assert_eq!(mtu(&facts), (1320, "1400, the MTU of eth0 to 2001:db8::1, minus 80 for WireGuard".into()));
    // The route's own MTU counts, even if it is larger than the interface's.
    facts.endpoint_routes = vec![endpoint_route("192.0.2.1", 3, Some(1500))];
    assert_eq!(mtu(&facts).0, 1420);
    facts.endpoint_routes = vec![endpoint_route("127.0.0.1", 1, None)];
    assert_eq!(mtu(&facts), (65456, "65536, the MTU of lo to 127.0.0.1, minus 80 for WireGuard".into()));
}

#[test]
fn without_a_known_endpoint_the_mtu_is_that_of_the_default_route() {
    let mut facts = host();
    facts.endpoint_routes.clear();
    assert_eq!(mtu(&facts), (1420, "1500, the MTU of the default route by eth0, minus 80 for WireGuard".into()));
    facts.routes[0].mtu = Some(1400);
    assert_eq!(mtu(&facts), (1320, "1400, the MTU of the default route by eth0, minus 80 for WireGuard".into()));
    // An unreachable default route, as kernels show it, does not count.
    facts.routes = vec![route("::/0", 1), route("10.0.0.0/24", 2)];
    assert_eq!(mtu(&facts).0, 1420);
    assert_eq!(
        mtu(&Facts::default()),
        (1420, "1500, the MTU of Ethernet, as no route to an endpoint is known, minus 80 for WireGuard".into())
    );
}

#[test]
fn a_path_mtu_that_is_too_small_for_the_tunnel_is_noted() {
    for (path, config, expected) in
        [(1300, both(), 1280), (1300, ipv4(), 1220), (1360, both(), 1280), (60, ipv4(), 576), (0, ipv4(), 1420)]
    {
        let mut facts = host();
        facts.endpoint_routes = vec![endpoint_route("192.0.2.1", 2, Some(path))];
        if path == 0 {
            // The MTU 0 of a route means that it is not set, so that of its interface counts.
            facts.interfaces[1].mtu = 1500;
        }
        let plan = planned(&config, &facts);
        assert_eq!(plan.wireguard.mtu, expected, "{path}");
        let noted = plan.notes.iter().any(|note| note.contains("fragments"));
        assert_eq!(noted, path != 0 && expected + 80 > path, "{path}: {:?}", plan.notes);
    }
}

#[test]
fn the_mtu_of_the_file_takes_precedence() {
    let mut config = ipv4();
    config.wireguard.interface.mtu = Some(1300);
    assert_eq!(planned(&config, &host()).wireguard.mtu, 1300);
}

#[test]
fn without_an_ipv6_address_there_is_no_ipv6() {
    let plan = planned(&config(&["10.66.1.2/32"], &["10.64.0.1"], &["0.0.0.0/0", "::/0"]), &host());
    assert!(!plan.wireguard.ipv6);
    assert_eq!(plan.wireguard.routes, nets(&["0.0.0.0/0"]));
    assert_eq!(
        (plan.veth.as_ref().expect("a link").host_ipv6, plan.veth.as_ref().expect("a link").inner_ipv6),
        (None, None)
    );
    assert_eq!(plan.dns.hosts.lines().count(), 1);
    assert_eq!(plan.notes, ["The tunnel has no IPv6 address, so ::/0 is not routed."]);
    // WireGuard still accepts all packets from the peer that the file allows.
    assert_eq!(plan.wireguard.peers[0].allowed_ips, nets(&["0.0.0.0/0", "::/0"]));
}

#[test]
fn without_an_ipv4_address_only_the_link_has_ipv4() {
    let plan = planned(&config(&["fd00:6::2/128"], &["fd00:6::1"], &["0.0.0.0/0", "::/0"]), &host());
    assert!(plan.wireguard.ipv6);
    assert_eq!(plan.wireguard.routes, nets(&["::/0"]));
    assert_eq!(plan.dns.hosts.lines().count(), 2);
    assert_eq!(plan.notes, ["The tunnel has no IPv4 address, so 0.0.0.0/0 is not routed."]);
}

#[test]
fn routes_are_the_union_of_allowed_ips() {
    let mut config = config(&["10.66.1.2/32", "fd00:6::2/64"], &[], &["128.0.0.0/1", "0.0.0.0/1", "8000::/1", "::/1"]);
    config.wireguard.peers.push(peer(8, &["192.168.7.0/24", "128.0.0.0/1"], Some("192.0.2.2:1")));
    let plan = planned(&config, &host());
    assert_eq!(plan.wireguard.routes, nets(&["0.0.0.0/1", "128.0.0.0/1", "192.168.7.0/24", "::/1", "8000::/1"]));
    assert!(
        plan.notes.iter().any(|note| note.starts_with("Two peers have AllowedIPs 128.0.0.0/1;")),
        "{:?}",
        plan.notes
    );
}

#[test]
fn addresses_are_kept_as_given_without_duplicates() {
    let plan = planned(
        &config(&["10.2.0.2/24", "10.2.0.2/24", "10.2.0.2/32", "fd00:2::2/64", "fd00:2::2/128"], &[], &["0.0.0.0/0"]),
        &host(),
    );
    assert_eq!(plan.wireguard.addresses, nets(&["10.2.0.2/24", "10.2.0.2/32", "fd00:2::2/64"]));
}

#[test]
fn dns_of_the_profile_replaces_that_of_the_file() {
    let mut config = ipv4();
    config.wireguard.interface.dns_search = vec!["file.example".into()];
    assert_eq!(planned(&config, &host()).dns.servers, ips(&["10.64.0.1"]));
    config.dns.servers = Some(ips(&["9.9.9.9", "9.9.9.9"]));
    config.dns.search = Some(vec!["a.example".into(), "b.example".into()]);
    config.dns.options = vec!["edns0".into(), "timeout:2".into()];
    let dns = planned(&config, &host()).dns;
    assert_eq!(
        dns.resolv_conf,
        "# Written by vpn-exec: the resolvers of this tunnel.\nnameserver 9.9.9.9\nsearch a.example b.example\n\
         options edns0 timeout:2\n"
    );
}

#[test]
fn without_dns_servers_there_is_no_nameserver() {
    let mut config = ipv4();
    config.dns.servers = Some(vec![]);
    let plan = planned(&config, &host());
    assert!(!plan.dns.resolv_conf.contains("nameserver"), "{}", plan.dns.resolv_conf);
    assert_eq!(plan.notes.len(), 1);
    assert!(plan.notes[0].starts_with("There is no DNS server"));
}

#[test]
fn dns_servers_that_cannot_answer_are_noted() {
    let config = config(&["10.2.0.2/24"], &["10.2.0.1", "10.3.0.1", "fd00::1", "127.0.0.53"], &["10.3.0.0/16"]);
    let notes = planned(&config, &host()).notes;
    // The network of the address is a route, but WireGuard has no peer for it.
    let expected = [
        "only contain a part of IPv4",
        "only uses the first 3 DNS servers, not 127.0.0.53",
        "10.2.0.1 is unreachable",
        "fd00::1 is unreachable",
        "127.0.0.53",
    ];
    for (note, what) in notes.iter().zip(expected) {
        assert!(note.contains(what), "{note}");
    }
    assert_eq!(notes.len(), expected.len(), "{notes:?}");
    // These are not the address of a single resolver, whatever is routed into the tunnel.
    for (address, server) in [("10.2.0.2/24", "0.0.0.0"), ("10.2.0.2/24", "224.0.0.251"), ("fd00::2/64", "fe80::1")] {
        let everything = ["0.0.0.0/0", "::/0"];
        let config = crate::world::config(&[address], &[server], &everything[usize::from(server.contains(':'))..][..1]);
        let notes = planned(&config, &host()).notes;
        assert!(notes.iter().any(|note| note.contains(&format!("The DNS server {server} cannot answer"))), "{notes:?}");
    }
}

#[test]
fn partial_routes_are_noted() {
    let notes = |addresses: &[&str], allowed: &[&str]| planned(&config(addresses, &[], allowed), &host()).notes;
    let of = |notes: &[String]| notes.iter().filter(|note| note.starts_with("AllowedIPs")).cloned().collect::<Vec<_>>();
    let both = ["10.2.0.2/32", "fd00::2/128"];
    assert_eq!(of(&notes(&both, &["0.0.0.0/0", "::/0"])), [""; 0]);
    // As users of wg-quick write it.
    assert_eq!(of(&notes(&both, &["0.0.0.0/1", "128.0.0.0/1", "8000::/1", "::/1"])), [""; 0]);
    let part = of(&notes(&both, &["10.0.0.0/8", "::/0"]));
    assert_eq!(part, ["AllowedIPs only contain a part of IPv4: the tunnel leads to no other IPv4 address."]);
    let nothing = of(&notes(&both, &["0.0.0.0/0"]));
    assert_eq!(nothing, ["AllowedIPs contain no IPv6 network, so the tunnel leads to no IPv6 address."]);
    assert_eq!(of(&notes(&both[..1], &["0.0.0.0/0"])), [""; 0]);
}

#[test]
fn on_a_kernel_without_ipv6_a_tunnel_has_no_ipv6() {
    let facts = Facts { without_ipv6: true, ..host() };
    let planned = planned(&both(), &facts);
    assert!(!planned.wireguard.ipv6 && planned.veth.expect("a link").host_ipv6.is_none());
    let all = planned.wireguard.addresses.iter().chain(&planned.wireguard.routes);
    assert!(all.clone().count() > 0 && all.clone().all(|net| net.addr().is_ipv4()));
    assert!(planned.notes.iter().any(|note| note.contains("This kernel has no IPv6")), "{:?}", planned.notes);
    assert_eq!(refused(&config(&["fd00::2/64"], &[], &["::/0"]), &facts)[0], PlanError::KernelWithoutIpv6);
}

#[test]
fn a_plan_depends_only_on_its_input() {
    let planned = || plan(&both(), &host());
    assert_eq!(planned(), planned());
}
