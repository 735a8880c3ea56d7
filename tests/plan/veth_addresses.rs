//! The veth's addresses: always the same for a name, and never in use elsewhere.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use vpn_exec::config::Config;
use vpn_exec::plan::{Facts, PlanError};

use crate::world::{both, config, host, ipv4, nets, planned, refused, route};

fn with_routes(routes: &[&str]) -> Facts {
    let mut facts = host();
    facts.routes.extend(routes.iter().map(|net| route(net, 2)));
    facts
}

fn veth_ipv4(config: &Config, facts: &Facts) -> Ipv4Addr {
    let veth = planned(config, facts).veth.expect("a link");
    assert_eq!(u32::from(veth.inner_ipv4), u32::from(veth.host_ipv4) + 1);
    assert_eq!(u32::from(veth.host_ipv4) % 2, 0);
    veth.host_ipv4
}

fn veth_ipv6(config: &Config, facts: &Facts) -> Ipv6Addr {
    let veth = planned(config, facts).veth.expect("a link");
    let host = veth.host_ipv6.expect("IPv6");
    assert_eq!(u128::from(veth.inner_ipv6.expect("IPv6")), u128::from(host) + 1);
    assert_eq!(u128::from(host) % 2, 0);
    host
}

/// A tunnel to the Internet without any private network, so that only the host's routes matter.
fn plain() -> Config {
    config(&["198.18.0.2/32", "2001:db8:2::2/128"], &[], &["0.0.0.0/0", "::/0"])
}

// All versions must derive these values. They were computed with another implementation (Python's hashlib).
#[test]
fn addresses_never_change() {
    let long = "x".repeat(64);
    for (name, ipv4, ipv6) in [
        ("a", "10.236.209.28", "fd90:f24b:9c62::2"),
        ("mullvad", "10.89.60.16", "fdb0:ab2a:7ad7::2"),
        ("thirteen-char", "10.38.72.52", "fde3:8be2:b87f::2"),
        (long.as_str(), "10.35.115.254", "fd07:633d:63e::2"),
    ] {
        let mut config = plain();
        config.name = name.parse().expect("a name");
        assert_eq!(veth_ipv4(&config, &host()).to_string(), ipv4, "{name}");
        assert_eq!(veth_ipv6(&config, &host()).to_string(), ipv6, "{name}");
    }
}

#[test]
fn routes_of_the_host_are_avoided() {
    for (routes, expected) in [
        (&["10.89.60.17/32"] as &[&str], "10.241.199.238"),
        (&["10.89.0.0/16"], "10.241.199.238"),
        (&["10.0.0.0/8"], "172.25.60.16"),
        (&["10.0.0.0/8", "172.16.0.0/12"], "192.168.60.16"),
        (&["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"], "100.89.60.16"),
        // Routes that replace a default route are avoided if another pool is free, and ignored otherwise.
        (&["0.0.0.0/1"], "172.25.60.16"),
        (&["0.0.0.0/1", "128.0.0.0/1"], "10.89.60.16"),
    ] {
        let facts = with_routes(routes);
        assert_eq!(veth_ipv4(&plain(), &facts).to_string(), expected, "{routes:?}");
        assert_eq!(planned(&plain(), &facts).notes.len(), 1, "only the note about the missing DNS server");
    }
    let facts = with_routes(&["fdb0:ab2a:7ad7::/48"]);
    assert_eq!(veth_ipv6(&plain(), &facts).to_string(), "fd02:73c0:5b30::2");
}

#[test]
fn networks_of_the_tunnel_are_avoided() {
    for (address, dns, allowed, expected) in [
        ("10.89.60.17/32", "10.64.0.1", "0.0.0.0/0", "10.241.199.238"),
        ("10.89.60.99/24", "10.64.0.1", "0.0.0.0/0", "10.241.199.238"),
        ("198.18.0.2/32", "10.89.60.16", "0.0.0.0/0", "10.241.199.238"),
        ("198.18.0.2/32", "10.64.0.1", "10.89.60.0/24", "10.241.199.238"),
        ("198.18.0.2/32", "10.64.0.1", "10.0.0.0/8", "172.25.60.16"),
        ("198.18.0.2/32", "198.18.0.1", "0.0.0.0/1", "10.89.60.16"),
    ] {
        let plan = planned(&config(&[address], &[dns], &[allowed]), &host());
        assert_eq!(plan.veth.as_ref().expect("a link").host_ipv4.to_string(), expected, "{address} {dns} {allowed}");
        assert!(!plan.notes.iter().any(|note| note.contains("lead to the host")), "{:?}", plan.notes);
    }
}

#[test]
fn endpoints_are_avoided() {
    let mut config = plain();
    config.wireguard.peers[0].endpoint =
        Some(vpn_exec::config::Endpoint::Address { address: "10.89.60.16:1".parse().expect("an address"), zone: None });
    assert_eq!(veth_ipv4(&config, &host()).to_string(), "10.241.199.238");
    let mut facts = host();
    facts.endpoint_routes[0].address = "10.89.60.17".parse().expect("an address");
    assert_eq!(veth_ipv4(&plain(), &facts).to_string(), "10.241.199.238");
}

/// A company's tunnel may route all private space. It must work, with a note about the addresses that are lost.
#[test]
fn if_the_tunnel_routes_all_private_space_the_largest_networks_are_given_up() {
    let all = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "10.89.60.0/24", "fc00::/7"];
    let plan = planned(&config(&["10.1.1.1/32", "fd00::1/128"], &[], &all), &host());
    assert_eq!(
        plan.veth.as_ref().expect("a link").host_ipv4.to_string(),
        "10.241.199.238",
        "the /24 is avoided although the /8 is given up"
    );
    assert_eq!(plan.veth.as_ref().expect("a link").host_ipv6.expect("IPv6").to_string(), "fdb0:ab2a:7ad7::2");
    let noted: Vec<_> = plan.notes.iter().filter(|note| note.contains("lead to the host")).collect();
    assert_eq!(noted.len(), 2, "{:?}", plan.notes);
    assert!(
        noted[0].starts_with("10.241.199.238 and 10.241.199.239 lead to the host although 10.0.0.0/8 is"),
        "{}",
        noted[0]
    );
    assert!(noted[1].contains("although fc00::/7 is"), "{}", noted[1]);
}

#[test]
fn it_is_an_error_only_if_no_address_is_free() {
    let pools = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"];
    let reasons = refused(&plain(), &with_routes(&pools));
    assert!(matches!(reasons[..], [PlanError::NoFreeAddresses { family: "IPv4", .. }]), "{reasons:?}");
    let reasons = refused(&both(), &with_routes(&["fc00::/7"]));
    assert!(matches!(reasons[..], [PlanError::NoFreeAddresses { family: "IPv6", .. }]), "{reasons:?}");

    // All but one /31 of one pool is taken. It may be before the slot of the hash, so the search has to wrap around.
    for free in ["172.16.0.0/31", "172.31.255.254/31", "172.20.0.6/31"] {
        let free: IpNet = free.parse().expect("a network");
        let around = (12..31).map(|length| {
            let own = IpNet::new(free.addr(), length + 1).expect("a length").trunc();
            let both: Vec<IpNet> = IpNet::new(free.addr(), length)
                .expect("a length")
                .trunc()
                .subnets(length + 1)
                .expect("halves")
                .collect();
            both.into_iter().find(|half| *half != own).expect("the other half")
        });
        let mut facts = with_routes(&[pools[0], pools[2], pools[3]]);
        facts.routes.extend(around.map(|net| route(&net.to_string(), 2)));
        assert_eq!(veth_ipv4(&ipv4(), &facts), free.addr(), "{free}");
        // The last /31 is taken by a single address.
        facts.routes.push(route(&format!("{}/32", free.broadcast()), 2));
        assert!(matches!(refused(&ipv4(), &facts)[..], [PlanError::NoFreeAddresses { .. }]));
    }
}

#[test]
fn a_tunnel_without_ipv6_needs_no_ipv6_addresses() {
    let plan = planned(&ipv4(), &with_routes(&["fc00::/7"]));
    assert_eq!(plan.veth.as_ref().expect("a link").host_ipv6, None);
    assert!(
        nets(&["10.0.0.0/8"])[0]
            .contains(&IpNet::from(std::net::IpAddr::from(plan.veth.as_ref().expect("a link").host_ipv4)))
    );
}
