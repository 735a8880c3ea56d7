//! Configurations and hosts to plan with: an ordinary tunnel and an ordinary host, which each test modifies.

use std::net::IpAddr;

use ipnet::IpNet;
use vpn_exec::config::{Config, Endpoint, Interface, Peer, WgQuick};
use vpn_exec::keys::{PrivateKey, PublicKey};
use vpn_exec::plan::{EndpointRoute, Facts, HostInterface, HostRoute, Ipv6Forwarding, Plan, PlanError, plan};

/// `/proc/sys/kernel/cap_last_cap` of kernels since 5.9.
pub(crate) const LAST_CAPABILITY: u8 = 40;

pub(crate) fn nets(list: &[&str]) -> Vec<IpNet> {
    list.iter().map(|net| net.parse().expect("a network")).collect()
}

pub(crate) fn ips(list: &[&str]) -> Vec<IpAddr> {
    list.iter().map(|address| address.parse().expect("an address")).collect()
}

pub(crate) fn peer(number: u8, allowed_ips: &[&str], endpoint: Option<&str>) -> Peer {
    Peer {
        public_key: PublicKey::from([number; 32]),
        preshared_key: None,
        allowed_ips: nets(allowed_ips),
        endpoint: endpoint.map(|text| match text.parse() {
            Ok(address) => Endpoint::Address { address, zone: None },
            Err(_) => {
                let (host, port) = text.rsplit_once(':').expect("a port");
                Endpoint::Name { host: host.into(), port: port.parse().expect("a port") }
            }
        }),
        persistent_keepalive: None,
    }
}

/// A tunnel named `mullvad` with one peer at 192.0.2.1.
pub(crate) fn config(addresses: &[&str], dns: &[&str], allowed_ips: &[&str]) -> Config {
    let wireguard = WgQuick {
        interface: Interface {
            private_key: Some(PrivateKey::from([0x42; 32])),
            addresses: nets(addresses),
            dns_servers: ips(dns),
            ..Interface::default()
        },
        peers: vec![peer(7, allowed_ips, Some("192.0.2.1:51820"))],
    };
    Config::new("mullvad".parse().expect("a name"), wireguard)
}

/// An IPv4-only tunnel that routes everything.
pub(crate) fn ipv4() -> Config {
    config(&["10.66.1.2/32"], &["10.64.0.1"], &["0.0.0.0/0"])
}

/// A tunnel with both families that routes everything.
pub(crate) fn both() -> Config {
    config(&["10.66.1.2/32", "fc00:bbbb:bbbb:bb01::3:102/128"], &["10.64.0.1"], &["0.0.0.0/0", "::/0"])
}

pub(crate) fn route(destination: &str, interface: u32) -> HostRoute {
    HostRoute {
        destination: destination.parse().expect("a network"),
        interface: Some(interface),
        mtu: None,
        attached: false,
    }
}

/// A network that the host is attached to.
pub(crate) fn attached(network: &str, interface: u32) -> HostRoute {
    HostRoute { attached: true, ..route(network, interface) }
}

/// A host with both families on Ethernet, by which it reaches the endpoint.
pub(crate) fn host() -> Facts {
    Facts {
        interfaces: vec![
            HostInterface { name: "lo".into(), index: 1, mtu: 65536 },
            HostInterface { name: "eth0".into(), index: 2, mtu: 1500 },
        ],
        routes: vec![
            route("0.0.0.0/0", 2),
            attached("198.51.100.0/24", 2),
            route("198.51.100.7/32", 2),
            route("127.0.0.0/8", 1),
            route("::/0", 2),
            attached("2001:db8:1::/64", 2),
            route("fe80::/64", 2),
            route("ff00::/8", 2),
            route("::1/128", 1),
        ],
        endpoint_routes: vec![EndpointRoute {
            address: "192.0.2.1".parse().expect("an address"),
            interface: Some(2),
            mtu: None,
        }],
        last_capability: LAST_CAPABILITY,
        without_ipv6: false,
        rootless: None,
        ipv6_forwarding: Ipv6Forwarding::Each,
        forward_drops: vec![],
    }
}

/// Plans a tunnel, and panics if it is refused.
pub(crate) fn planned(config: &Config, facts: &Facts) -> Plan {
    plan(config, facts).unwrap_or_else(|errors| panic!("{errors}"))
}

/// Plans a tunnel, and returns the reasons why it is refused.
pub(crate) fn refused(config: &Config, facts: &Facts) -> Vec<PlanError> {
    plan(config, facts).expect_err("a refusal").reasons
}
