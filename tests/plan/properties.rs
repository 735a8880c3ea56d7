//! Properties that hold for all names, routes and networks.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proptest::collection::vec;
use proptest::prelude::*;
use vpn_exec::names::InterfaceName;
use vpn_exec::plan::{HostInterface, PlanError, plan};

use crate::world::{config, host, nets, planned, route};

fn name() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9_=+][a-zA-Z0-9_=+.-]{0,63}"
}

/// Any network, more often one of private space.
fn network() -> impl Strategy<Value = IpNet> {
    let private =
        prop::sample::select(nets(&["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fd00::/8"]));
    prop_oneof![
        (any::<u32>(), 0..=32u8).prop_map(|(address, length)| ipv4(address, length)),
        (any::<u128>(), 0..=128u8).prop_map(|(address, length)| ipv6(address, length)),
        (private, any::<u128>(), 0..=30u8).prop_map(|(pool, random, more)| match pool {
            IpNet::V4(pool) => {
                let address = u32::from(pool.network()) | (random as u32 >> pool.prefix_len());
                ipv4(address, (pool.prefix_len() + more).min(32))
            }
            IpNet::V6(pool) => ipv6(u128::from(pool.network()) | random >> 8, 8 + more * 4),
        }),
    ]
}

fn ipv4(address: u32, length: u8) -> IpNet {
    Ipv4Net::new(Ipv4Addr::from(address), length).expect("a length").trunc().into()
}

fn ipv6(address: u128, length: u8) -> IpNet {
    Ipv6Net::new(Ipv6Addr::from(address), length.min(128)).expect("a length").trunc().into()
}

fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn derived_addresses_never_overlap_a_route_of_the_host(
        name in name(),
        routes in vec(network(), 0..40),
        allowed in vec(network(), 0..10),
    ) {
        let mut config = config(&["10.66.1.2/32", "fd00:6::2/128"], &["10.64.0.1"], &["0.0.0.0/0", "::/0"]);
        config.name = name.parse().expect("a name");
        config.wireguard.peers[0].allowed_ips.extend(allowed);
        let mut facts = host();
        facts.routes.extend(routes.iter().map(|net| route(&net.to_string(), 2)));
        match plan(&config, &facts) {
            Ok(plan) => {
                let ipv4 = IpNet::new(plan.veth.as_ref().expect("a link").host_ipv4.into(), 31).expect("a length");
                let ipv6 = IpNet::new(plan.veth.as_ref().expect("a link").host_ipv6.expect("IPv6").into(), 127).expect("a length");
                for net in routes.iter().chain(&nets(&["10.66.1.2/32", "fd00:6::2/128", "10.64.0.1/32"])) {
                    // A route that is larger than any private block replaces a default route.
                    let wide = net.prefix_len() < if net.addr().is_ipv4() { 8 } else { 7 };
                    prop_assert!(wide || !(overlap(net, &ipv4) || overlap(net, &ipv6)), "{net}: {ipv4}, {ipv6}");
                }
                prop_assert_eq!(ipv4, ipv4.trunc());
                prop_assert_eq!(ipv6, ipv6.trunc());
                let again = planned(&config, &facts);
                prop_assert_eq!(plan, again);
            }
            // Forty routes only use up a pool if they are this large.
            Err(errors) => for reason in errors.reasons {
                let PlanError::NoFreeAddresses { family, .. } = reason else {
                    return Err(TestCaseError::fail(format!("{reason}")));
                };
                let pools: &[&str] = if family == "IPv6" { &["fd00::/8"] } else {
                    &["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"]
                };
                let covered = IpNet::aggregate(&routes.iter().filter(|net| net.prefix_len() >= 7).copied().collect());
                for pool in nets(pools) {
                    prop_assert!(covered.iter().any(|net| net.contains(&pool)), "{pool} has free addresses");
                }
            }
        }
    }

    #[test]
    fn interface_names_are_valid_free_and_stable(name in name(), taken in 0..4usize) {
        let mut config = config(&["10.66.1.2/32"], &[], &["0.0.0.0/0"]);
        config.name = name.parse().expect("a name");
        let mut facts = host();
        let mut seen: Vec<InterfaceName> = Vec::new();
        for round in 0..=taken {
            let first = planned(&config, &facts);
            prop_assert_eq!(&first, &planned(&config, &facts));
            let derived = &first.veth.as_ref().expect("a link").host_interface;
            prop_assert!(derived.as_str().starts_with("ve-"));
            if round == 0 && name.len() <= 12 {
                prop_assert_eq!(derived.as_str(), format!("ve-{name}"));
            }
            prop_assert!(!seen.contains(derived), "{derived} was taken");
            facts.interfaces.push(HostInterface { name: derived.to_string(), index: 9, mtu: 1500 });
            seen.push(derived.clone());
        }
    }

    #[test]
    fn planning_never_panics(
        addresses in vec(network(), 0..4),
        allowed in vec(network(), 0..4),
        mtu in any::<Option<u32>>(),
        path in any::<Option<u32>>(),
        texts in vec(".{0,12}", 0..4),
        last_capability in any::<u8>(),
        allow_hooks in any::<bool>(),
    ) {
        let mut config = config(&[], &[], &[]);
        config.wireguard.interface.addresses = addresses;
        config.wireguard.interface.mtu = mtu;
        config.wireguard.interface.dns_servers = allowed.iter().map(IpNet::addr).collect();
        config.wireguard.peers[0].allowed_ips = allowed;
        config.program.capabilities = texts.clone();
        config.dns.search = Some(texts);
        let mut facts = host();
        facts.endpoint_routes[0].mtu = path;
        facts.last_capability = last_capability;
        config.allow_hooks = allow_hooks;
        match plan(&config, &facts) {
            Ok(plan) => {
                prop_assert!(!plan.to_string().is_empty());
                let least = if plan.wireguard.ipv6 { 1280 } else { 576 };
                prop_assert!(plan.wireguard.mtu >= least);
                prop_assert!(plan.wireguard.mtu <= 65535);
            }
            Err(errors) => prop_assert!(!errors.reasons.is_empty()),
        }
    }
}
