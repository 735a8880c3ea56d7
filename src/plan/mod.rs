//! What will be done: a pure function of [`Config`] and of [`Facts`] read once from the host. All decisions are made here,
//! and none of this touches the system, so all decisions are tested without root.
//!
//! [`plan()`] is the entry. A module for each subject decides about it: `wireguard`, `mtu`, `interfaces` (their names),
//! `addresses` (of the veth), `local` (what is reached by it beyond the host), `firewall`, `names` (what the program can look up),
//! `privileges` and `hooks`. What they cannot accept, and
//! what the user may not expect, is collected, so that everything is reported at once. `render` prints a plan for people.
//! [`mod@unit`] decides apart from all this how a systemd service is put into a tunnel.

mod addresses;
mod change;
mod error;
mod facts;
mod firewall;
mod hidden;
mod hooks;
mod interfaces;
mod local;
mod mtu;
mod names;
mod privileges;
mod render;
pub mod sockets;
mod stable;
pub mod unit;
mod wireguard;

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use change::{Change, change};
pub use error::{PlanError, PlanErrors};
pub use facts::{EndpointRoute, Facts, ForeignChain, ForwardDrop, HostInterface, HostRoute, Ipv6Forwarding};
pub use firewall::{FirewallPlan, NAME_PORTS, SwitchedOn};
pub use hidden::hidden_paths;
pub use hooks::HookPlan;
pub use local::LocalPlan;
pub use mtu::wireguard_mtu;
pub use names::NamesPlan;
pub use privileges::PrivilegesPlan;
pub use sockets::SocketsPlan;
pub use wireguard::{PeerPlan, WireguardPlan};

use crate::config::listen_addresses::ListenAddresses;
use crate::config::{BackendChoice, Config, HostPort, Local, OpenPorts, ProgramOptions, Protocol, Publish};
use crate::keys::PrivateKey;
use crate::names::{InterfaceName, TunnelName};

/// Where named namespaces are, as ip-netns(8) has them.
const NAMESPACES: &str = "/run/netns";

/// All that will be done, without any secret. Serializes to what `vpn-exec plan --json` prints; its [`Display`] is what
/// `vpn-exec plan` prints.
///
/// [`Display`]: std::fmt::Display
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The tunnel's name.
    pub name: TunnelName,
    /// The path of the named namespace: `/run/netns/NAME`.
    pub namespace: PathBuf,
    /// Which implementation of WireGuard to use.
    pub backend: BackendChoice,
    /// WireGuard's interface.
    pub wireguard: WireguardPlan,
    /// The pair that joins the namespace to the host.
    pub veth: VethPlan,
    /// What is reached by it beyond the host.
    pub local: LocalPlan,
    /// The ports of the host that lead inside.
    pub publish: Vec<Publish>,
    /// The ports of the host's loopback that are reached from inside, in order, each once.
    #[serde(default)]
    pub host_ports: Vec<HostPort>,
    /// The ports inside that are reached through the tunnel.
    pub open: Vec<OpenPorts>,
    /// The rules for packets.
    pub firewall: FirewallPlan,
    /// The kernel parameters of the namespace that programs may expect: [`parameters`].
    #[serde(default)]
    pub parameters: Vec<Parameter>,
    /// What the program sees of names.
    pub names: NamesPlan,
    /// The paths that the program does not see: [`hidden_paths`].
    pub hidden: Vec<PathBuf>,
    /// The unix sockets of the host that the program may connect to.
    #[serde(default)]
    pub sockets: SocketsPlan,
    /// What the program may do.
    pub privileges: PrivilegesPlan,
    /// The hooks of the file, which are run only where that is asked for.
    pub hooks: Vec<HookPlan>,
    /// Decisions that the user may not expect, each a sentence.
    pub notes: Vec<String>,
}

/// A kernel parameter (sysctl(8)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// What it is inside.
    pub value: String,
}

/// What programs may expect of a namespace's kernel parameters: every port may be listened at, as in a container, where nobody has the
/// capability for those below 1024; and every group may send echo requests (ping(8)), which needs no capability then.
pub fn parameters() -> Vec<Parameter> {
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0\t2147483647")]
        .map(|(name, value)| Parameter { name: name.into(), value: value.into() })
        .into()
}

/// The pair of interfaces that joins the namespace to the host. It carries local traffic only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VethPlan {
    /// The end on the host: `ve-…`.
    pub host_interface: InterfaceName,
    /// The end inside: `host0`.
    pub inner_interface: InterfaceName,
    /// The host's IPv4 address on it: the lower one of a /31 (RFC 3021).
    pub host_ipv4: Ipv4Addr,
    /// The inner IPv4 address: the upper one of that /31.
    pub inner_ipv4: Ipv4Addr,
    /// The host's IPv6 address on it, the lower one of a /127 (RFC 6164) of a unique local prefix (RFC 4193); none where the
    /// tunnel has no IPv6.
    pub host_ipv6: Option<Ipv6Addr>,
    /// The inner IPv6 address: the upper one of that /127.
    pub inner_ipv6: Option<Ipv6Addr>,
}

/// What the stages of a plan find: reasons to refuse, and what is worth a note.
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

/// Decides all that will be done.
///
/// # Errors
///
/// All reasons at once why no tunnel can be made.
pub fn plan(config: &Config, facts: &Facts) -> Result<Plan, PlanErrors> {
    let mut findings = Findings::default();
    let file = &config.wireguard;

    wireguard::check(config, &mut findings);
    let mut reach = wireguard::reach(file, facts, &mut findings);
    let mtu = mtu::decide(config.mtu(), reach.ipv6, facts, &mut findings);
    let interfaces = interfaces::derive(&config.name, facts, &mut findings);
    let servers = names::servers(config);
    let veth_ipv6 = reach.ipv6 && !privileges::could_use_host_as_router(&config.program, &mut findings);
    let veth = addresses::derive(config, facts, &servers, veth_ipv6, &mut findings);
    let local = local::decide(config, facts, &servers, &mut reach, veth_ipv6, &mut findings);
    if let (Some(names), false) = (&interfaces, local.networks.is_empty()) {
        local::note_firewalls(&local, &names.host, facts, &mut findings);
    }
    let names = names::decide(config, servers, &reach.routes, &local.networks, veth.as_ref(), &mut findings);
    check_published(&config.local.publish, file.interface.listen_port, &mut findings);
    let host_ports = host_ports(&config.local, &mut findings);
    let sockets = sockets::decide(&config.program, &mut findings);
    let privileges = privileges::decide(&config.program, facts.last_capability, &mut findings);
    let hooks =
        interfaces.as_ref().map(|names| hooks::decide(file, &names.wireguard, config.allow_hooks, &mut findings));

    let (Some(interfaces), Some(veth), Some(hooks), []) = (interfaces, veth, hooks, findings.errors.as_slice()) else {
        return Err(PlanErrors { name: config.name.clone(), what: "made", reasons: findings.errors });
    };
    let wireguard = WireguardPlan {
        interface: interfaces.wireguard,
        mtu: mtu.bytes,
        mtu_reason: mtu.reason,
        addresses: reach.addresses,
        routes: reach.routes,
        ipv6: reach.ipv6,
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
    let firewall = FirewallPlan::new(&firewall::Basis {
        name: &config.name,
        wireguard: &wireguard,
        veth: &veth,
        local: &local,
        servers: &names.servers,
        open: &config.open,
    });
    Ok(Plan {
        name: config.name.clone(),
        namespace: Path::new(NAMESPACES).join(config.name.as_str()),
        backend: config.backend,
        wireguard,
        veth,
        local,
        publish: config.local.publish.clone(),
        host_ports,
        open: config.open.clone(),
        firewall,
        names,
        parameters: parameters(),
        hidden: hidden_paths(config.program.buses.system),
        sockets,
        privileges,
        hooks,
        notes: findings.notes,
    })
}

/// Decides about a program that joins a living tunnel: what it may do, and what there is to be said about that.
///
/// # Errors
///
/// All reasons at once why it cannot be so. One is that it could leave by the link to the host, which was made for programs without
/// such capabilities.
pub fn join(living: &Plan, program: &ProgramOptions, last_capability: u8) -> Result<Vec<String>, PlanErrors> {
    let mut findings = Findings::default();
    if living.veth.host_ipv6.is_some() && privileges::could_use_host_as_router(program, &mut findings) {
        findings.refuse(PlanError::OpenLink { tunnel: living.name.clone() });
    }
    findings.notes.clear();
    privileges::decide(program, last_capability, &mut findings);
    sockets::decide(program, &mut findings);
    if findings.errors.is_empty() {
        Ok(findings.notes)
    } else {
        Err(PlanErrors { name: living.name.clone(), what: "joined so", reasons: findings.errors })
    }
}

/// Refuses ports that cannot be listened on both, and the one at which WireGuard listens.
fn check_published(ports: &[Publish], listen_port: Option<u16>, findings: &mut Findings) {
    let mut places = ListenAddresses::default();
    for Publish { address, host_port, protocol, .. } in ports {
        if places.conflict_with(*protocol, *host_port, *address) {
            findings.refuse(PlanError::PublishedTwice { port: *host_port });
        }
        places.add(*protocol, *host_port, *address);
    }
    if let Some(port) = listen_port.filter(|port| places.has(Protocol::Udp, *port)) {
        findings.refuse(PlanError::PublishedForWireguard { port });
    }
}

/// The ports of the host's loopback that are reached from inside.
fn host_ports(local: &Local, findings: &mut Findings) -> Vec<HostPort> {
    let ports: BTreeSet<HostPort> = local.host_ports.iter().copied().collect();
    let for_names: BTreeSet<u16> =
        ports.iter().map(|port| port.port).filter(|port| NAME_PORTS.contains(port)).collect();
    for port in for_names {
        findings.refuse(PlanError::HostPortForNames { port });
    }
    // What is published on all addresses is listened on at that of the link, too; what is on the loopback would lead back inside.
    let leads_back =
        |port: &Publish| port.address.is_none_or(|address| address.is_loopback() || address.is_unspecified());
    let published = local.publish.iter().filter(|port| leads_back(port));
    for port in published.filter(|port| ports.contains(&HostPort { port: port.host_port, protocol: port.protocol })) {
        findings.refuse(PlanError::HostPortPublished { port: port.host_port });
    }
    ports.into_iter().collect()
}
