//! The status of tunnels: what their keepers report, and the processes inside.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::client::{self, StatusQuery};
use super::messages::{ClientRequest, KeeperEvent, read_answer};
use crate::config::{HostPort, OpenPorts, Publish};
use crate::linux::namespace;
use crate::linux::netlink::link::LinkCounters;
use crate::linux::process;
use crate::names::{ContainerId, InterfaceName, TunnelName};
use crate::plan::{DomainPlan, PeerPlan};
use crate::registry::{self, Container, Scope, TunnelState};
use crate::wireguard::{Backend, PeerStatus};

/// The condition of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Condition {
    /// No handshake with any peer yet.
    Connecting,
    /// The last handshake with some peer is at most 135 s old.
    Up,
    /// The last handshake is older: no packet was sent, or no peer answers.
    Stale,
    /// The keeper serves other users' requests and has not answered this one.
    Busy,
    /// The keeper was killed, or does not answer. Programs inside are cut off. The next start takes the tunnel over or
    /// removes it.
    Failed,
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Connecting => "connecting",
            Self::Up => "up",
            Self::Stale => "stale",
            Self::Busy => "busy",
            Self::Failed => "failed",
        })
    }
}

/// The status of a tunnel. It contains no secrets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The tunnel's name.
    pub name: TunnelName,
    /// The tunnel's condition.
    pub state: Condition,
    /// Whether the tunnel stays up when no lease is left.
    pub standing: bool,
    /// The WireGuard implementation. None if the keeper was killed before the tunnel was up.
    pub backend: Option<Backend>,
    /// The path of the namespace's name. None if the tunnel is rootless.
    pub namespace: Option<PathBuf>,
    /// The process ID of the keeper, which may have been killed.
    pub keeper: u32,
    /// The number of launchers that hold a lease.
    pub leases: usize,
    /// The container, or the pod, whose network namespace the tunnel is in.
    #[serde(default)]
    pub container: Option<ContainerReport>,
    /// The part that only a running keeper can report.
    #[serde(flatten)]
    pub living: Option<LiveStatus>,
    /// The processes inside that the calling user may see.
    #[serde(default)]
    pub programs: Vec<RunningProgram>,
}

/// A container, or a pod, that has a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerReport {
    /// Its engine's identifier of the container or of the pod's sandbox.
    pub id: ContainerId,
    /// The process ID of the container's first process. None for a pod.
    pub pid: Option<i32>,
    /// The network of a pod.
    pub network: Option<String>,
    /// The interface of a pod in its network.
    pub interface: Option<String>,
}

impl From<&Container> for ContainerReport {
    fn from(container: &Container) -> Self {
        let attachment = container.attachment.as_ref();
        Self {
            id: container.id.clone(),
            pid: container.process.map(|process| process.pid),
            network: attachment.map(|attachment| attachment.network.clone()),
            interface: attachment.map(|attachment| attachment.interface.clone()),
        }
    }
}

impl fmt::Display for ContainerReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.network, &self.interface) {
            (Some(network), Some(interface)) => write!(f, "pod {} ({interface} in {network})", self.id),
            _ => write!(f, "{}", self.id),
        }
    }
}

/// The part of a status that only a running keeper can report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveStatus {
    /// WireGuard's interface.
    pub interface: InterfaceReport,
    /// The peers.
    pub peers: Vec<PeerReport>,
    /// How the programs inside resolve names.
    pub dns: DnsReport,
    /// The link between the host and the namespace. None for a container's, which keeps its own interfaces.
    pub link: Option<HostLink>,
    /// Networks that are reached through the host instead of the tunnel.
    pub local_networks: Vec<IpNet>,
    /// Ports inside that peers reach through the tunnel.
    pub open_ports: Vec<OpenPorts>,
    /// Ports of the host that are relayed to programs inside.
    pub published_ports: Vec<Publish>,
    /// Ports of the host's loopback that programs inside reach.
    #[serde(default)]
    pub host_ports: Vec<HostPort>,
    /// The number of connections to processes outside the tunnel that were refused to programs.
    #[serde(default)]
    pub refused_connections: u64,
    /// The last problem, until a handshake is completed.
    pub problem: Option<String>,
}

/// WireGuard's interface, with the counters of the programs' own packets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceReport {
    /// Its name.
    pub name: InterfaceName,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// Bytes received by programs.
    pub rx_bytes: u64,
    /// Packets received by programs.
    pub rx_packets: u64,
    /// Bytes sent by programs.
    pub tx_bytes: u64,
    /// Packets sent by programs.
    pub tx_packets: u64,
}

impl InterfaceReport {
    /// Reports an interface with the kernel's counters of it.
    pub(crate) fn new(name: InterfaceName, mtu: u32, addresses: Vec<IpNet>, counters: LinkCounters) -> Self {
        Self {
            name,
            mtu,
            addresses,
            rx_bytes: counters.rx_bytes,
            rx_packets: counters.rx_packets,
            tx_bytes: counters.tx_bytes,
            tx_packets: counters.tx_packets,
        }
    }
}

/// A peer of a running tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerReport {
    /// Its public key in base64.
    pub public_key: String,
    /// The endpoint in the file.
    pub configured_endpoint: Option<String>,
    /// The endpoint in use.
    pub endpoint: Option<SocketAddr>,
    /// The age of the last handshake in seconds.
    pub handshake_age: Option<u64>,
    /// Bytes received from it, encrypted.
    pub rx_bytes: u64,
    /// Bytes sent to it, encrypted.
    pub tx_bytes: u64,
}

impl PeerReport {
    /// Reports a device's status of a peer. `configured_endpoint` is that in the file.
    pub(crate) fn new(status: &PeerStatus, configured_endpoint: Option<String>) -> Self {
        Self {
            public_key: status.public_key.to_string(),
            configured_endpoint,
            endpoint: status.endpoint,
            handshake_age: status.handshake_age.map(|age| age.as_secs()),
            rx_bytes: status.rx_bytes,
            tx_bytes: status.tx_bytes,
        }
    }

    /// Reports a device's status of the planned peers.
    pub(crate) fn of_all(statuses: &[PeerStatus], planned: &[PeerPlan]) -> Vec<Self> {
        let endpoint = |key| planned.iter().find(|peer| peer.public_key == key)?.endpoint.clone();
        statuses.iter().map(|status| Self::new(status, endpoint(status.public_key))).collect()
    }
}

/// How programs inside resolve names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsReport {
    /// The addresses of the resolvers.
    pub servers: Vec<IpAddr>,
    /// The search domains.
    pub search: Vec<String>,
    /// The domains with resolvers of their own.
    #[serde(default)]
    pub domains: Vec<DomainPlan>,
}

/// The link between the host and the tunnel's namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLink {
    /// The host's interface.
    pub interface: InterfaceName,
    /// The host's IPv4 address on the link.
    pub host_ipv4: Ipv4Addr,
    /// The namespace's IPv4 address on the link.
    pub inner_ipv4: Ipv4Addr,
    /// The host's IPv6 address on the link.
    pub host_ipv6: Option<Ipv6Addr>,
    /// The namespace's IPv6 address on the link.
    pub inner_ipv6: Option<Ipv6Addr>,
}

/// A process inside a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningProgram {
    /// Its process ID.
    pub pid: i32,
    /// Its user: a name, or the user ID if the user has no name.
    pub user: String,
    /// Its command line, or its name in brackets if it has none.
    pub command: String,
}

/// The number of keepers that are asked at the same time. Each takes two descriptors, of the 1024 that a process may
/// have as a rule.
const ASKED_AT_ONCE: usize = 256;

/// Queries the status of a tunnel, without the processes inside. Returns None if no tunnel of that name exists.
///
/// # Errors
/// If the keeper refuses, or the state of a killed keeper's tunnel cannot be read.
pub fn of(name: &TunnelName) -> io::Result<Option<Status>> {
    answer_to(name, StatusQuery::send(name))
}

/// Waits for the answer to a query.
fn answer_to(name: &TunnelName, query: io::Result<Option<StatusQuery>>) -> io::Result<Option<Status>> {
    let answer = match query.and_then(|query| query.map_or(Ok(None), StatusQuery::answer)) {
        Err(error) if error.kind() == io::ErrorKind::TimedOut => None,
        other => other?,
    };
    match answer {
        Some((KeeperEvent::Done, file)) => Ok(Some(read_answer(file)?)),
        Some((KeeperEvent::Refused(failure), _)) => Err(io::Error::other(failure)),
        _ => Ok(registry::read(name)?.map(|state| without_keeper(name, &state))),
    }
}

/// Queries the status of the tunnel whose process listens at the other end of a connection. Returns None if the process
/// ends first.
///
/// # Errors
/// `WouldBlock` if the process is busy with others. If it refuses, or does not answer in time.
pub fn over(connection: OwnedFd) -> io::Result<Option<Status>> {
    match client::request_over(connection, ClientRequest::Report)? {
        Some((KeeperEvent::Done, file)) => Ok(Some(read_answer(file)?)),
        Some((KeeperEvent::Refused(failure), _)) => Err(io::Error::other(failure)),
        Some((KeeperEvent::Busy, _)) => Err(io::Error::new(io::ErrorKind::WouldBlock, "it is busy with other clients")),
        _ => Ok(None),
    }
}

/// Returns the status of a tunnel whose keeper does not answer, from the state that it has written down.
fn without_keeper(name: &TunnelName, state: &TunnelState) -> Status {
    // A keeper does not answer another user either while it is busy with others.
    let is_busy = client::is_public(name) && !process::is_ending(state.keeper.cast_signed());
    Status {
        name: name.clone(),
        state: if is_busy { Condition::Busy } else { Condition::Failed },
        standing: state.standing,
        backend: state.made,
        namespace: (Scope::current() == Scope::System).then(|| namespace::path_of(name.as_str())),
        keeper: state.keeper,
        leases: 0,
        container: state.container.as_ref().map(ContainerReport::from),
        living: None,
        programs: Vec::new(),
    }
}

/// Queries the status of some tunnels, or of all tunnels in the order of their names, with the processes inside.
///
/// # Errors
/// `NotFound` if a tunnel in `names` does not exist.
pub fn of_all(names: Option<&[TunnelName]>) -> io::Result<Vec<Status>> {
    if names.is_some() {
        return of_scope(names);
    }
    // The user's own, and the machine's.
    let scope = Scope::current();
    let found = [Scope::System, Scope::User].map(|scope| {
        scope.enter();
        of_scope(None)
    });
    scope.enter();
    let [machine, own] = found;
    if let (Scope::System, Ok(_), Err(error)) = (scope, &machine, &own) {
        // Root in another user's session, whose `XDG_RUNTIME_DIR` it has.
        tracing::debug!("{error}");
        return machine;
    }
    match if scope == Scope::System { (machine, own) } else { (own, machine) } {
        (Ok(first), Ok(second)) => Ok([first, second].concat()),
        (Err(error), Err(_)) => Err(error),
        (Ok(found), Err(error)) | (Err(error), Ok(found)) => {
            tracing::warn!("{error}");
            Ok(found)
        }
    }
}

/// [`of_all`] in the present scope.
fn of_scope(names: Option<&[TunnelName]>) -> io::Result<Vec<Status>> {
    let all;
    let queried = match names {
        Some(names) => names,
        None => {
            all = registry::names()?;
            &all
        }
    };
    let mut found = Vec::with_capacity(queried.len());
    for some in queried.chunks(ASKED_AT_ONCE) {
        // All are asked before the first answer is waited for: they work, or let this process wait, at the same time.
        let queries: Vec<_> = some.iter().map(StatusQuery::send).collect();
        for (name, query) in some.iter().zip(queries) {
            match answer_to(name, query) {
                Ok(Some(status)) => found.push(status),
                Ok(None) if names.is_some() => {
                    return Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no tunnel {name}")));
                }
                // It has ended since it was listed.
                Ok(None) => {}
                Err(error) if names.is_some() => return Err(error),
                // One tunnel that cannot be queried does not keep the others from being listed.
                Err(error) => tracing::warn!("cannot query the tunnel {name}: {error}"),
            }
        }
    }
    // Reads all of /proc once, however many tunnels there are.
    let mut inside = process::group_by_namespace()?;
    for status in &mut found {
        let Ok(Some(state)) = registry::read(&status.name) else { continue };
        let processes = inside.remove(&state.namespace).unwrap_or_default();
        status.programs = processes.into_iter().filter_map(describe).collect();
    }
    Ok(found)
}

/// Describes a process. Returns None if it has ended.
pub(crate) fn describe(pid: i32) -> Option<RunningProgram> {
    let seen = process::describe(pid)?;
    let user = nix::unistd::User::from_uid(seen.user).ok().flatten();
    let user = user.map_or_else(|| seen.user.to_string(), |user| user.name);
    Some(RunningProgram { pid, user, command: seen.command })
}
