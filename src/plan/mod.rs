//! Plans: what a tunnel will look like, decided before anything is changed.
//!
//! [`plan()`] is a pure function of the [`Config`] and of [`Facts`] that were read once from the host. It decides
//! everything and touches nothing, so all decisions are tested without root. Each module decides about one subject:
//!
//! - [`shared_namespace`]: the plan of a tunnel in a namespace that is not the tunnel's own. `container`: the same for
//!   a keeper's tunnel.
//! - `wireguard`: the interface's addresses, routes and peers.
//! - `mtu`: the interface's MTU.
//! - `interface_names`: the names of the interfaces.
//! - `veth_addresses`: the addresses of the veth pair, which links the namespace to the host.
//! - `host_index`: the index of the veth pair's end on the host.
//! - `local_networks`: networks that the program reaches through the host.
//! - `firewall`: the packet rules.
//! - `gateway`: the packet rules at the other end of a rootless tunnel's link.
//! - `dns`: the resolvers, and the files in `/etc` that name them.
//! - `dns_forwarding`: domains whose names have resolvers of their own.
//! - `host_sockets` and `hidden_paths`: which unix sockets of the host the program may use.
//! - `privileges`: the program's capabilities.
//! - `hooks`: which hooks of the file are run.
//! - `rootless`: what a tunnel cannot have that an ordinary user makes.
//!
//! Errors and notes of all of these are collected and reported together. `render` prints a plan as text. [`diff()`]
//! compares two plans for a reload. [`mod@drop_in`] is separate from plans: it writes a systemd drop-in that puts a
//! service into a tunnel.

mod container;
mod diff;
mod dns;
mod dns_forwarding;
pub mod drop_in;
mod error;
mod facts;
mod firewall;
mod gateway;
mod hidden_paths;
mod hooks;
mod host_index;
pub mod host_sockets;
mod interface_names;
mod local_networks;
mod mtu;
mod name_hash;
mod privileges;
mod render;
mod rootless;
pub mod shared_namespace;
mod veth_addresses;
mod wireguard;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use container::plan_in_container;
pub use diff::{PlanDiff, diff};
pub use dns::DnsPlan;
pub use dns_forwarding::{DNS_PORT, DomainPlan, FORWARDER_ADDRESSES, ForwarderPlan, RESOLVER_MARK, ResolverPlan, Side};
pub use error::{PlanError, PlanErrors};
pub use facts::{EndpointRoute, Facts, ForeignChain, ForwardDrop, HostInterface, HostRoute, Ipv6Forwarding};
pub use firewall::{FirewallPlan, ForwardingInterface, NAME_PORTS, RULES_TABLE};
pub use gateway::RELAY_ADDRESSES;
pub use hidden_paths::hidden_paths;
pub use hooks::HookPlan;
pub use host_index::links_of_others;
pub use host_sockets::SocketsPlan;
pub use local_networks::LocalNetworksPlan;
pub use mtu::wireguard_mtu;
pub use privileges::PrivilegesPlan;
pub use rootless::RootlessFacts;
pub use wireguard::{PeerPlan, WireguardPlan};

use shared_namespace::SharedNamespacePlan;

use crate::config::listen_addresses::ListenAddresses;
use crate::config::{BackendChoice, Config, HostPort, Local, OpenPorts, ProgramOptions, Protocol, Publish};
use crate::keys::PrivateKey;
use crate::names::{InterfaceName, TunnelName};

/// The directory of named network namespaces (ip-netns(8)).
const NAMESPACES: &str = "/run/netns";

/// A tunnel as it will be made, without any secret.
///
/// `vpn-exec plan --json` prints its serialization, `vpn-exec plan` its [`Display`](std::fmt::Display).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The tunnel's name.
    pub name: TunnelName,
    /// The path of the named namespace: `/run/netns/NAME`. None if the tunnel is rootless: a user cannot mount anything
    /// that others see, so its namespace has no name.
    pub namespace: Option<PathBuf>,
    /// Whether an ordinary user makes the tunnel, in a user namespace (user_namespaces(7)).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rootless: bool,
    /// The WireGuard implementation to use.
    pub backend: BackendChoice,
    /// The WireGuard interface.
    pub wireguard: WireguardPlan,
    /// The pair of interfaces that links the namespace to the host. A container's namespace has none: it keeps its own
    /// interfaces.
    pub veth: Option<VethPlan>,
    /// The networks that are reached through the host.
    pub local: LocalNetworksPlan,
    /// The ports of the host that are published: relayed to the program.
    pub publish: Vec<Publish>,
    /// The ports of the host's loopback that the program can reach, sorted and without duplicates.
    #[serde(default)]
    pub host_ports: Vec<HostPort>,
    /// The program's ports that are reachable through the tunnel.
    pub open: Vec<OpenPorts>,
    /// The packet rules.
    pub firewall: FirewallPlan,
    /// The kernel parameters of the namespace: [`parameters`].
    #[serde(default)]
    pub parameters: Vec<Parameter>,
    /// How the program resolves names.
    #[serde(rename = "names")]
    pub dns: DnsPlan,
    /// The paths that are hidden from the program: [`hidden_paths()`].
    pub hidden: Vec<PathBuf>,
    /// The unix sockets of the host that the program may connect to.
    #[serde(default)]
    pub sockets: SocketsPlan,
    /// The program's privileges.
    pub privileges: PrivilegesPlan,
    /// The hooks of the file, with whether they are run.
    pub hooks: Vec<HookPlan>,
    /// Decisions that the user may not expect; each is a sentence.
    pub notes: Vec<String>,
    /// The rules and routes of a container's namespace, if the tunnel is made in one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_namespace: Option<SharedNamespacePlan>,
}

/// A kernel parameter (sysctl(8)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Its value in the namespace.
    pub value: String,
}

/// Returns the kernel parameters of every tunnel's namespace.
///
/// As in a container, no program has CAP_NET_BIND_SERVICE there, so every program may bind to every port. Every group
/// may send echo requests (ping(8)), which then needs no capability.
pub fn parameters() -> Vec<Parameter> {
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0\t2147483647")]
        .map(|(name, value)| Parameter { name: name.into(), value: value.into() })
        .into()
}

/// The veth pair: two interfaces that link the namespace to the host. It carries local traffic only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VethPlan {
    /// The host's end: `ve-…`.
    pub host_interface: InterfaceName,
    /// The end in the namespace: `host0`.
    pub inner_interface: InterfaceName,
    /// The host's IPv4 address on the link: the lower address of a /31 (RFC 3021).
    pub host_ipv4: Ipv4Addr,
    /// The namespace's IPv4 address on the link: the upper address of that /31.
    pub inner_ipv4: Ipv4Addr,
    /// The host's IPv6 address on the link: the lower address of a /127 (RFC 6164) of a unique local prefix (RFC 4193).
    /// `None` if the tunnel has no IPv6.
    pub host_ipv6: Option<Ipv6Addr>,
    /// The namespace's IPv6 address on the link: the upper address of that /127.
    pub inner_ipv6: Option<Ipv6Addr>,
}

impl VethPlan {
    /// Returns the addresses of both ends.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let ipv4 = [self.host_ipv4, self.inner_ipv4].map(IpAddr::from);
        let ipv6 = [self.host_ipv6, self.inner_ipv6].into_iter().flatten().map(IpAddr::from);
        ipv4.into_iter().chain(ipv6).collect()
    }

    /// Returns the addresses of the end in the namespace.
    pub fn inner_addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        [Some(IpAddr::from(self.inner_ipv4)), self.inner_ipv6.map(IpAddr::from)].into_iter().flatten()
    }
}

/// The errors and notes that the modules of a plan collect.
#[derive(Debug, Default)]
struct Findings {
    errors: Vec<PlanError>,
    notes: Vec<String>,
}

impl Findings {
    fn refuse(&mut self, error: PlanError) {
        self.errors.push(error);
    }

    fn note(&mut self, note: String) {
        self.notes.push(note);
    }
}

/// Plans a tunnel.
///
/// # Errors
///
/// Returns all reasons why the tunnel cannot be made.
pub fn plan(config: &Config, facts: &Facts) -> Result<Plan, PlanErrors> {
    let mut findings = Findings::default();
    let file = &config.wireguard;

    wireguard::check(config, "the host", &mut findings);
    wireguard::note_mark(config, &mut findings);
    if let Some(facts) = facts.rootless {
        rootless::check(config, facts, &mut findings);
    }
    let without_ipv6 = facts.without_ipv6.then_some(wireguard::WithoutIpv6::Kernel);
    let mut routing = wireguard::routing(file, without_ipv6, &mut findings);
    let mtu = mtu::decide(config.mtu(), routing.ipv6, facts, &mut findings);
    let interfaces = interface_names::derive(&config.name, facts, &mut findings);
    let servers = dns::servers(config);
    let veth_ipv6 = routing.ipv6 && !privileges::could_use_host_as_router(&config.program, &mut findings);
    let resolvers = dns::all_resolvers(config, &servers);
    let veth = veth_addresses::derive(config, facts, &resolvers, veth_ipv6, &mut findings);
    let local = local_networks::decide(config, facts, &servers, &mut routing, veth_ipv6, &mut findings);
    if let (Some(names), false) = (&interfaces, local.networks.is_empty() || facts.rootless.is_some()) {
        local_networks::note_firewalls(&local, &names.host, facts, &mut findings);
    }
    let dns = dns::decide(config, servers, &routing, &local.networks, veth.as_ref(), &mut findings);
    check_published_ports(&config.local.publish, file.interface.listen_port, &mut findings);
    let host_ports = decide_host_ports(&config.local, &mut findings);
    let sockets = host_sockets::decide(&config.program, &mut findings);
    let privileges = privileges::decide(&config.program, facts.last_capability, &mut findings);
    let hooks =
        interfaces.as_ref().map(|names| hooks::decide(file, &names.wireguard, config.allow_hooks, &mut findings));
    if let (Some(_), Some(hooks)) = (facts.rootless, &hooks) {
        rootless::check_hooks(hooks, &mut findings);
    }

    let (Some(interfaces), Some(veth), Some(hooks), []) = (interfaces, veth, hooks, findings.errors.as_slice()) else {
        return Err(PlanErrors { what: format!("make the tunnel {}", config.name), reasons: findings.errors });
    };
    let wireguard = WireguardPlan {
        interface: interfaces.wireguard,
        mtu: mtu.bytes,
        mtu_reason: mtu.reason,
        addresses: routing.addresses,
        routes: routing.routes,
        ipv6: routing.ipv6,
        listen_port: file.interface.listen_port.unwrap_or(0),
        fwmark: file.interface.fwmark.unwrap_or(0),
        public_key: file.interface.private_key.as_ref().map(PrivateKey::public_key),
        peers: wireguard::peers(file),
    };
    let veth = VethPlan {
        host_interface: interfaces.host,
        inner_interface: interfaces.inner,
        host_ipv4: veth.ipv4.0,
        inner_ipv4: veth.ipv4.1,
        host_ipv6: veth.ipv6.map(|(host, _)| host),
        inner_ipv6: veth.ipv6.map(|(_, inner)| inner),
    };
    let firewall = FirewallPlan::new(&firewall::Inputs {
        name: &config.name,
        wireguard: &wireguard,
        veth: &veth,
        local: &local,
        dns: &dns,
        open: &config.open,
        rootless: facts.rootless.is_some(),
    });
    Ok(Plan {
        name: config.name.clone(),
        namespace: facts.rootless.is_none().then(|| Path::new(NAMESPACES).join(config.name.as_str())),
        rootless: facts.rootless.is_some(),
        backend: if facts.rootless.is_some() { BackendChoice::Userspace } else { config.backend },
        wireguard,
        veth: Some(veth),
        local,
        publish: config.local.publish.clone(),
        host_ports,
        open: config.open.clone(),
        firewall,
        parameters: parameters(),
        dns,
        hidden: hidden_paths(config.program.buses.system),
        sockets,
        privileges,
        hooks,
        notes: findings.notes,
        shared_namespace: None,
    })
}

/// Checks whether a program may join a running tunnel with its privileges, and returns the notes about them.
///
/// # Errors
///
/// Returns all reasons why it may not. One is that it could use the host as a router, over a link that was made for
/// programs without such capabilities.
pub fn join(running: &Plan, program: &ProgramOptions, last_capability: u8) -> Result<Vec<String>, PlanErrors> {
    let mut findings = Findings::default();
    let has_ipv6 = running.veth.as_ref().is_some_and(|veth| veth.host_ipv6.is_some());
    if has_ipv6 && privileges::could_use_host_as_router(program, &mut findings) {
        findings.refuse(PlanError::OpenLink { tunnel: running.name.clone() });
    }
    if running.rootless {
        rootless::check_program(program, &mut findings);
    }
    findings.notes.clear();
    privileges::decide(program, last_capability, &mut findings);
    host_sockets::decide(program, &mut findings);
    if findings.errors.is_empty() {
        Ok(findings.notes)
    } else {
        Err(PlanErrors { what: format!("join the tunnel {}", running.name), reasons: findings.errors })
    }
}

/// Refuses published ports that conflict with each other or with the port of WireGuard.
fn check_published_ports(ports: &[Publish], listen_port: Option<u16>, findings: &mut Findings) {
    let mut taken = ListenAddresses::default();
    for Publish { address, host_port, protocol, .. } in ports {
        if taken.conflict_with(*protocol, *host_port, *address) {
            findings.refuse(PlanError::PublishedTwice { port: *host_port });
        }
        taken.add(*protocol, *host_port, *address);
    }
    if let Some(port) = listen_port.filter(|port| taken.has(Protocol::Udp, *port)) {
        findings.refuse(PlanError::PublishedForWireguard { port });
    }
}

/// Decides which ports of the host's loopback the program can reach.
fn decide_host_ports(local: &Local, findings: &mut Findings) -> Vec<HostPort> {
    let ports: BTreeSet<HostPort> = local.host_ports.iter().copied().collect();
    let for_names: BTreeSet<u16> =
        ports.iter().map(|port| port.port).filter(|port| NAME_PORTS.contains(port)).collect();
    for port in for_names {
        findings.refuse(PlanError::HostPortForNames { port });
    }
    // A port that is published on all addresses occupies that of the link, too. One that is published on the loopback
    // would lead back to the program.
    let leads_back =
        |port: &Publish| port.address.is_none_or(|address| address.is_loopback() || address.is_unspecified());
    let published = local.publish.iter().filter(|port| leads_back(port));
    for port in published.filter(|port| ports.contains(&HostPort { port: port.host_port, protocol: port.protocol })) {
        findings.refuse(PlanError::HostPortPublished { port: port.host_port });
    }
    ports.into_iter().collect()
}
