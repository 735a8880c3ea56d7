//! Configurations with which no tunnel can work are refused, with all reasons at once and what to do about each.

use vpn_exec::config::{Endpoint, Hook, HookKind, HostPort, Protocol, Publish};
use vpn_exec::keys::PrivateKey;
use vpn_exec::plan::{NAME_PORTS, PlanError, plan};

use crate::world::{both, config, host, ipv4, nets, peer, planned, refused};

#[test]
fn all_reasons_are_reported_at_once() {
    let mut config = config(&[], &[], &[]);
    config.wireguard.interface.private_key = None;
    config.wireguard.interface.mtu = Some(100);
    config.wireguard.peers[0].endpoint = None;
    config.local.networks = nets(&["10.0.0.0/8"]);
    let port =
        |address| Publish { address, host_port: 8080, inner_port: 80, protocol: Protocol::Tcp, proxy_protocol: None };
    config.local.publish = vec![port(None), port(Some("192.0.2.1".parse().expect("an address")))];
    config.program.capabilities = vec!["net_raww".into()];
    config.dns.options = vec!["edns0\nnameserver".into()];
    let errors = plan(&config, &host()).expect_err("a refusal");
    insta::assert_snapshot!(errors);
}

/// Ports by which names would be resolved outside the tunnel, or that lead back to the program.
#[test]
fn host_ports_that_cannot_be_reached_are_refused() {
    let of_host = |port, protocol| HostPort { port, protocol };
    let mut config = ipv4();
    config.local.host_ports = NAME_PORTS
        .iter()
        .flat_map(|port| [of_host(*port, Protocol::Udp), of_host(*port, Protocol::Tcp)])
        .chain([of_host(5432, Protocol::Tcp), of_host(5432, Protocol::Tcp)])
        .collect();
    let expected: Vec<_> = NAME_PORTS.iter().map(|port| PlanError::HostPortForNames { port: *port }).collect();
    assert_eq!(refused(&config, &host()), expected);
    config.local.host_ports = vec![of_host(5432, Protocol::Tcp), of_host(5432, Protocol::Tcp)];
    assert_eq!(planned(&config, &host()).host_ports, [of_host(5432, Protocol::Tcp)], "without duplicates");

    for (address, leads_back) in [
        (None, true),
        (Some("127.0.0.1"), true),
        (Some("::1"), true),
        (Some("0.0.0.0"), true),
        (Some("192.0.2.1"), false),
    ] {
        let address = address.map(|address| address.parse().expect("an address"));
        config.local.publish =
            vec![Publish { address, host_port: 5432, inner_port: 80, protocol: Protocol::Tcp, proxy_protocol: None }];
        let planned = plan(&config, &host()).map_err(|errors| errors.reasons);
        let expected = [PlanError::HostPortPublished { port: 5432 }];
        assert_eq!(planned.err().as_deref(), leads_back.then_some(&expected[..]), "{address:?}");
        config.local.publish[0].protocol = Protocol::Udp;
        assert!(plan(&config, &host()).is_ok(), "the same number in another protocol is another port");
    }
}

#[test]
fn conflicting_published_ports_are_refused() {
    let publish = |address: Option<&str>, protocol| Publish {
        address: address.map(|address| address.parse().expect("an address")),
        host_port: 8080,
        inner_port: 80,
        protocol,
        proxy_protocol: None,
    };
    let mut config = ipv4();
    for (one, other, conflicts) in [
        (None, Some("192.0.2.1"), true),
        (Some("0.0.0.0"), Some("127.0.0.1"), true),
        (Some("::1"), Some("::"), true),
        (Some("::"), Some("0.0.0.0"), false),
        (Some("::"), Some("127.0.0.1"), false),
        (Some("192.0.2.1"), Some("127.0.0.1"), false),
    ] {
        config.local.publish = vec![publish(one, Protocol::Tcp), publish(other, Protocol::Tcp)];
        let refused = plan(&config, &host()).map_err(|errors| errors.reasons).err();
        let expected = [PlanError::PublishedTwice { port: 8080 }];
        assert_eq!(refused.as_deref(), conflicts.then_some(&expected[..]), "{one:?} and {other:?}");
    }
    // The port of WireGuard itself.
    config.wireguard.interface.listen_port = Some(8080);
    config.local.publish = vec![publish(None, Protocol::Tcp)];
    assert!(plan(&config, &host()).is_ok(), "WireGuard only listens on the UDP port");
    config.local.publish = vec![publish(Some("127.0.0.1"), Protocol::Udp)];
    assert_eq!(refused(&config, &host()), [PlanError::PublishedForWireguard { port: 8080 }]);
}

#[test]
fn a_missing_or_zero_key_is_refused() {
    let mut config = ipv4();
    config.wireguard.interface.private_key = None;
    assert_eq!(refused(&config, &host()), [PlanError::NoPrivateKey]);
    config.wireguard.interface.private_key = Some(PrivateKey::from([0; 32]));
    assert_eq!(refused(&config, &host()), [PlanError::ZeroPrivateKey]);
}

#[test]
fn a_missing_peer_is_refused() {
    let mut config = ipv4();
    config.wireguard.peers.clear();
    assert_eq!(refused(&config, &host()), [PlanError::NoPeer]);
}

#[test]
fn a_tunnel_whose_only_peer_is_itself_is_refused() {
    let mut config = ipv4();
    let own = config.wireguard.interface.private_key.as_ref().expect("a key").public_key();
    config.wireguard.peers[0].public_key = own;
    assert_eq!(refused(&config, &host()), [PlanError::OnlyPeerIsSelf]);
    config.wireguard.peers.push(peer(8, &[], Some("192.0.2.2:1")));
    assert!(planned(&config, &host()).notes.iter().any(|note| note.contains("has the key of this tunnel itself")));
}

#[test]
fn no_address() {
    let mut config = ipv4();
    config.wireguard.interface.addresses.clear();
    assert_eq!(refused(&config, &host()), [PlanError::NoAddress]);
}

#[test]
fn addresses_that_no_interface_can_have() {
    for (bad, what) in [("0.0.0.0/0", "unspecified"), ("ff02::1/128", "multicast"), ("127.0.0.1/8", "loopback")] {
        let mut config = both();
        config.wireguard.interface.addresses.extend(nets(&[bad]));
        let reasons = refused(&config, &host());
        assert!(matches!(reasons[..], [PlanError::UnusableAddress { .. }]), "{reasons:?}");
        assert!(reasons[0].to_string().contains(what), "{}", reasons[0]);
    }
}

#[test]
fn nothing_routed() {
    assert_eq!(refused(&config(&["10.1.1.1/32"], &[], &[]), &host()), [PlanError::NothingRouted]);
    assert_eq!(
        refused(&config(&["10.1.1.1/32"], &[], &["::/0"]), &host()),
        [PlanError::FamiliesApart { addresses: "IPv4", allowed: "IPv6" }]
    );
    assert_eq!(
        refused(&config(&["fd00::1/128"], &[], &["0.0.0.0/0"]), &host()),
        [PlanError::FamiliesApart { addresses: "IPv6", allowed: "IPv4" }]
    );
}

#[test]
fn a_tunnel_without_endpoints_needs_a_listen_port() {
    let mut config = ipv4();
    config.wireguard.peers[0].endpoint = None;
    assert_eq!(refused(&config, &host()), [PlanError::NoEndpoint]);
    // Port 0 means any free port, which peers cannot know.
    config.wireguard.interface.listen_port = Some(0);
    assert_eq!(refused(&config, &host()), [PlanError::NoEndpoint]);
    config.wireguard.interface.listen_port = Some(51820);
    assert!(planned(&config, &host()).notes.iter().any(|note| note.starts_with("No peer has an endpoint")));
    // A name that does not resolve yet is an endpoint.
    config.wireguard.interface.listen_port = None;
    config.wireguard.peers[0].endpoint = Some(Endpoint::Name { host: "vpn.example".into(), port: 1 });
    assert!(planned(&config, &host()).notes.is_empty());
}

#[test]
fn an_mtu_that_is_too_small_or_too_large_is_refused() {
    for (mtu, ipv4_fits, ipv6_fits) in
        [(0, false, false), (575, false, false), (576, true, false), (1279, true, false), (1280, true, true)]
            .into_iter()
            .chain([(65535, true, true), (65536, false, false), (u32::MAX, false, false)])
    {
        for (mut config, fits) in [(ipv4(), ipv4_fits), (both(), ipv6_fits)] {
            config.wireguard.interface.mtu = Some(mtu);
            let planned = plan(&config, &host());
            assert_eq!(planned.is_ok(), fits, "{mtu}: {planned:?}");
        }
    }
}

#[test]
fn unknown_capabilities_are_refused() {
    let mut config = ipv4();
    config.program.capabilities = ["all", "CAP_", "", "cap_cap_chown"].map(String::from).to_vec();
    let reasons = refused(&config, &host());
    assert_eq!(reasons.len(), 4, "{reasons:?}");
    assert!(reasons.iter().all(|reason| matches!(reason, PlanError::UnknownCapability { .. })), "{reasons:?}");
}

#[test]
fn text_that_would_add_a_line_to_resolv_conf_is_refused() {
    for text in ["a\nnameserver 192.0.2.1", "a b", "", "a\0"] {
        let mut config = ipv4();
        config.wireguard.interface.dns_search = vec![text.into()];
        let reasons = refused(&config, &host());
        assert!(matches!(reasons[..], [PlanError::ResolverText { .. }]), "{text:?}: {reasons:?}");
    }
}

/// A plan contains no key of the file, even if a hook does. Such a hook is never run.
#[test]
fn a_plan_contains_no_secret() {
    const PRIVATE: &str = "QkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkI=";
    const PRESHARED: &str = "CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=";
    let mut config = ipv4();
    config.wireguard.interface.private_key = Some(PRIVATE.parse().expect("a key"));
    config.wireguard.peers[0].preshared_key = Some(PRESHARED.parse().expect("a key"));
    let command = format!("wg set %i private-key <(echo {PRIVATE}) peer x preshared-key <(echo {PRESHARED})");
    config.wireguard.interface.hooks = vec![Hook { kind: HookKind::PostUp, command }];

    let shown_plan = planned(&config, &host());
    assert_eq!(
        shown_plan.hooks[0].command,
        "wg set wg0 private-key <(echo (secret)) peer x preshared-key <(echo (secret))"
    );
    config.allow_hooks = true;
    let errors = plan(&config, &host()).expect_err("a refusal");
    assert_eq!(errors.reasons, [PlanError::SecretInHook { kind: HookKind::PostUp }]);

    let json = serde_json::to_string(&shown_plan).expect("JSON");
    for text in [json, format!("{shown_plan:?}"), shown_plan.to_string(), format!("{errors} {errors:?}")] {
        // Neither as base64, nor as the bytes that a derived Debug or Serialize would print.
        for secret in [PRIVATE, PRESHARED, "66, 66, 66", "66,66,66", "9, 9, 9", "9,9,9", "424242", "090909"] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
    }
}
