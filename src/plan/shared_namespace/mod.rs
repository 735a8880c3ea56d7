//! The plan of a tunnel in a shared network namespace: one that is not the tunnel's own, but a pod's or a container's.
//! `vpn-exec attach` carries it out from inside, and the keeper of a container's tunnel from the host.
//!
//! There is no link to the host. The container keeps its own interfaces, and packet rules and policy routing decide
//! which packets may leave by them. The rules come first, and hold without any route or WireGuard interface:
//!
//! - `rules`: the packet rules.
//! - `routing`: the policy rules, and the routes of the tunnel's own table.
//! - `render`: prints the plan as text.
//!
//! Nothing needs to be known about the container's interfaces: they are all interfaces except `lo` and WireGuard's.

mod render;
mod routing;
mod rules;

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::error::PlanErrors;
use super::{DnsPlan, WireguardPlan};
use super::{Facts, Findings, dns, firewall, interface_names, local_networks, mtu, wireguard};
use crate::config::{BackendChoice, Config, Endpoint, OpenPorts};
use crate::keys::PrivateKey;
use crate::linux::netlink::rule::PolicyRule;
use crate::names::{InterfaceName, TunnelName};
use crate::ruleset::{Family, Table};
pub use routing::{PRIORITIES, TABLE, TableRoute};

/// The mark of packets that take the container's own routes: WireGuard's encrypted packets, and replies to inbound
/// connections. In ASCII it reads "ve".
pub const MARK: u32 = 0x7665;

/// Where the UDP socket of the encrypted packets is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// In the same namespace (`vpn-exec attach`). The encrypted packets carry [`MARK`].
    Attached {
        /// The addresses of the endpoints to which encrypted packets may be sent.
        endpoints: Vec<SocketAddr>,
        /// The resolvers that look up the names of endpoints, if an endpoint is a name.
        resolvers: Vec<IpAddr>,
        /// The nameservers of the container before a tunnel was attached to it, which a later process may need.
        nameservers: Vec<IpAddr>,
    },
    /// In the host's namespace. The container's namespace carries no encrypted packets.
    Container,
}

/// What is read from the namespace, once, before the tunnel is planned.
#[derive(Clone, Debug, Default)]
pub struct SharedNamespaceFacts {
    /// The interfaces and the routes by which encrypted packets leave, without those of this tunnel. For
    /// [`Placement::Container`], they are the host's.
    pub underlay: Facts,
    /// The addresses of the container's interfaces, except loopback and link-local ones. They may be unknown.
    pub addresses: Vec<IpAddr>,
    /// Whether IPv6 is switched off in the namespace and cannot be switched on.
    pub ipv6_is_off: bool,
    /// Whether the namespace's own process can open a TUN device. It shows that the process is meant to stay, as the
    /// embedded WireGuard needs.
    pub has_tun: bool,
    /// Whether a privilege that vpn-exec lacks is needed to listen at the port of resolvers.
    pub dns_port_is_privileged: bool,
}

/// A tunnel as it will be made in a shared namespace, without any secret.
///
/// `vpn-exec plan --attach --json` prints its serialization, `vpn-exec plan --attach` its
/// [`Display`](std::fmt::Display).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedNamespacePlan {
    /// The tunnel's name.
    pub name: TunnelName,
    /// Where the UDP socket of the encrypted packets is.
    pub placement: Placement,
    /// The WireGuard implementation to use.
    pub backend: BackendChoice,
    /// The WireGuard interface.
    pub wireguard: WireguardPlan,
    /// The networks that are reached outside the tunnel.
    pub local_networks: Vec<IpNet>,
    /// The addresses of the container's interfaces, as far as they are known. Only these reach the local networks.
    pub container_addresses: Vec<IpAddr>,
    /// The program's ports that are reachable through the tunnel.
    pub open: Vec<OpenPorts>,
    /// The packet rules.
    pub rules: Table,
    /// The policy rules, in the order in which the kernel tries them.
    pub routing_rules: Vec<PolicyRule>,
    /// The routes of the tunnel's own table, [`TABLE`].
    pub routes: Vec<TableRoute>,
    /// How programs resolve names.
    #[serde(rename = "names")]
    pub dns: DnsPlan,
    /// Decisions that the user may not expect; each is a sentence.
    pub notes: Vec<String>,
}

impl SharedNamespacePlan {
    /// Replaces the addresses to which encrypted packets may be sent, and the packet rules that follow from them.
    /// Returns whether anything has changed.
    pub fn admit(&mut self, addresses: &[SocketAddr]) -> bool {
        let Placement::Attached { endpoints, .. } = &mut self.placement else { return false };
        let mut sorted = addresses.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        if *endpoints == sorted {
            return false;
        }
        *endpoints = sorted;
        self.rules = rules::decide(self);
        true
    }

    /// Replaces the addresses of the container's interfaces, and the rules that follow from them. Returns whether
    /// anything has changed.
    pub fn follow(&mut self, addresses: Vec<IpAddr>) -> bool {
        if self.container_addresses == addresses {
            return false;
        }
        self.container_addresses = addresses;
        self.rules = rules::decide(self);
        let has_ipv6 = self.routing_rules.iter().any(|rule| rule.family == Family::Ipv6);
        self.routing_rules = routing::rules(self, has_ipv6);
        true
    }

    /// Returns whether an address is reached outside the tunnel.
    pub fn is_local(&self, address: &IpAddr) -> bool {
        let tunnel: Vec<IpNet> = firewall::tunnel_routes(&self.wireguard).collect();
        local_networks::is_local(&self.local_networks, &tunnel, address)
    }
}

/// Plans a tunnel for a namespace that is not its own.
///
/// # Errors
///
/// Returns all reasons why the tunnel cannot be attached.
pub fn plan(
    config: &Config,
    facts: &SharedNamespaceFacts,
    placement: Placement,
) -> Result<SharedNamespacePlan, PlanErrors> {
    let mut findings = Findings::default();
    let file = &config.wireguard;
    let is_attached = matches!(placement, Placement::Attached { .. });

    wireguard::check(config, if is_attached { "the container" } else { "the host" }, &mut findings);
    if !is_attached {
        wireguard::note_mark(config, &mut findings);
    }
    let without_ipv6 = match facts {
        SharedNamespaceFacts { underlay, .. } if underlay.without_ipv6 => Some(wireguard::WithoutIpv6::Kernel),
        SharedNamespaceFacts { ipv6_is_off: true, .. } => Some(wireguard::WithoutIpv6::SwitchedOff),
        _ => None,
    };
    let mut routing = wireguard::routing(file, without_ipv6, &mut findings);
    let mtu = mtu::decide(config.mtu(), routing.ipv6, &facts.underlay, &mut findings);
    let servers = dns::servers(config);
    let local_networks = decide_local_networks(config, &servers, &mut routing, &mut findings);
    let mut dns = dns::decide(config, servers, &routing, &local_networks, None, &mut findings);
    if let Some(forwarder) = dns.forwarder.as_mut().filter(|_| facts.dns_port_is_privileged) {
        forwarder.use_unprivileged_port();
    }
    note_ignored(config, is_attached, &mut findings);
    if !findings.errors.is_empty() {
        return Err(PlanErrors { what: format!("attach the tunnel {}", config.name), reasons: findings.errors });
    }

    let wireguard = WireguardPlan {
        interface: interface_names::wireguard(),
        mtu: mtu.bytes,
        mtu_reason: mtu.reason,
        addresses: routing.addresses,
        routes: routing.routes,
        ipv6: routing.ipv6,
        listen_port: file.interface.listen_port.unwrap_or(0),
        fwmark: if is_attached { MARK } else { file.interface.fwmark.unwrap_or(0) },
        public_key: file.interface.private_key.as_ref().map(PrivateKey::public_key),
        peers: wireguard::peers(file),
    };
    let mut plan = SharedNamespacePlan {
        name: config.name.clone(),
        placement,
        backend: match config.backend {
            BackendChoice::Auto if facts.has_tun => BackendChoice::Userspace,
            backend => backend,
        },
        wireguard,
        local_networks,
        container_addresses: facts.addresses.clone(),
        open: config.open.clone(),
        rules: Table { name: firewall::RULES_TABLE.into(), chains: Vec::new() },
        routing_rules: Vec::new(),
        routes: Vec::new(),
        dns,
        notes: findings.notes,
    };
    plan.rules = rules::decide(&plan);
    let has_ipv6 = !facts.underlay.without_ipv6;
    plan.routing_rules = routing::rules(&plan, has_ipv6);
    plan.routes = routing::routes(&plan, has_ipv6);
    Ok(plan)
}

/// Returns the name of the WireGuard interface of every attached tunnel.
pub fn interface() -> InterfaceName {
    interface_names::wireguard()
}

/// Returns the addresses of the endpoints that need no look-up.
pub fn known_endpoints(config: &Config) -> Vec<SocketAddr> {
    let endpoints = config.wireguard.peers.iter().filter_map(|peer| peer.endpoint.as_ref());
    let known = endpoints.filter_map(|endpoint| match endpoint {
        Endpoint::Address { address, .. } => Some(*address),
        Endpoint::Name { .. } => None,
    });
    known.collect()
}

/// Decides which networks are reached outside the tunnel: exactly those that the user names. Adds the routes to
/// `routing` by which resolvers stay in the tunnel.
fn decide_local_networks(
    config: &Config,
    servers: &[IpAddr],
    routing: &mut wireguard::Routing,
    findings: &mut Findings,
) -> Vec<IpNet> {
    let mut networks: Vec<IpNet> = Vec::new();
    for net in &config.local.networks {
        match local_networks::unusable(*net, routing) {
            None if networks.contains(net) => {}
            None => networks.push(*net),
            Some(error) => findings.refuse(error),
        }
    }
    networks.sort_unstable();
    local_networks::keep_in_tunnel(&networks, servers, routing, findings);
    for net in networks.iter().filter(|net| !local_networks::is_private(net)) {
        findings.note(format!("The local network {net} is public: it sees the program under the container's address."));
    }
    networks
}

/// Adds a note that names the settings which do not apply to a namespace that is not the tunnel's own.
fn note_ignored(config: &Config, is_attached: bool, findings: &mut Findings) {
    let interface = &config.wireguard.interface;
    let is_table = |table: &String| !table.eq_ignore_ascii_case("auto");
    let ignored = [
        (interface.table.as_ref().is_some_and(is_table), "Table (the tunnel has a routing table of its own)"),
        (
            is_attached && interface.fwmark.is_some_and(|mark| mark != 0),
            "FwMark (the encrypted packets carry a mark of their own)",
        ),
        (interface.save_config == Some(true), "SaveConfig (the file is never written)"),
        (!interface.hooks.is_empty(), "PreUp, PostUp, PreDown and PostDown (a container's tunnel runs no hooks)"),
        (config.local.lan, "lan (name each local network)"),
        (!config.local.publish.is_empty(), "publish (the container engine publishes ports)"),
        (!config.local.host_ports.is_empty(), "host-ports (a container has no link to the host's loopback)"),
    ];
    let ignored: Vec<&str> = ignored.into_iter().filter(|(is_set, _)| *is_set).map(|(_, what)| what).collect();
    if !ignored.is_empty() {
        findings.note(format!("Ignored settings: {}.", ignored.join("; ")));
    }
}
