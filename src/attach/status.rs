//! The status of an attached tunnel. The process of the embedded WireGuard answers queries at an abstract unix socket
//! of the network namespace, since it has no directory to write to. The kernel's WireGuard is asked itself.
//!
//! Any process of the namespace can listen under any abstract name, and connect to any. So the name is a random one,
//! which clients find in the kernel's list, and nothing follows from it: a client asks the listener that the kernel
//! says to be a process of its own user and container.

use std::io;
use std::time::{Duration, Instant};

use super::carrier::Attached;
use super::{OWNER, Site};
use crate::endpoints::{Endpoints, stale_after};
use crate::failure::{Doing, Failure};
use crate::keeper::PublicClients;
use crate::lease::status::{self, Condition, DnsReport, InterfaceReport, LiveStatus, PeerReport, Status};
use crate::lease::{ClientRequest, KeeperEvent, Received};
use crate::linux::local_socket::{self, LocalListener};
use crate::linux::netlink::Netlink;
use crate::plan::shared_namespace;
use crate::tunnel::shared_namespace::{Protection, protection};
use crate::wireguard::{Backend, kernel};

/// The beginning of the socket's abstract name. A random number follows.
const PREFIX: &str = "vpn-exec-";

/// The path of the network namespace of any process that reads it.
const NAMESPACE: &str = "/proc/self/ns/net";

/// How long the process may be busy with other clients.
const PATIENCE: Duration = Duration::from_secs(1);

/// The delay between two attempts to query a busy process. Other containers may keep its backlog full.
const RETRY_DELAY: Duration = Duration::from_millis(1);

/// Listens for queries of the status.
///
/// # Errors
/// If the kernel refuses the socket.
pub(super) fn listen() -> io::Result<PublicClients> {
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random[..], rustix::rand::GetRandomFlags::empty())?;
    let name = format!("{PREFIX}{:016x}", u64::from_ne_bytes(random));
    PublicClients::listen_on(LocalListener::bind_abstract(&name)?)
}

/// Returns the answer to a client's request: only the status is reported.
pub(super) fn answer(request: &Received, attached: &mut Attached, endpoints: &mut Endpoints) -> (KeeperEvent, Vec<u8>) {
    match request {
        Received::Known(ClientRequest::Report) => match serde_json::to_vec(&report(attached, endpoints)) {
            Ok(text) => (KeeperEvent::Done, text),
            Err(error) => {
                (KeeperEvent::refused(Failure::new(format!("cannot report the status: {error}"))), Vec::new())
            }
        },
        _ => (KeeperEvent::refused(Failure::new("an attached tunnel only reports its status")), Vec::new()),
    }
}

fn report(attached: &mut Attached, endpoints: &mut Endpoints) -> Status {
    let statuses = endpoints.read_device(attached);
    // An idle tunnel looks like one whose peer is gone, until there is something to answer.
    endpoints.renew_stale(attached);
    let summary = endpoints.summary();
    let plan = &attached.plan;
    let counters = attached.site.netlink.counters(&plan.wireguard.interface).unwrap_or_default();
    let living = LiveStatus {
        interface: InterfaceReport::new(
            plan.wireguard.interface.clone(),
            endpoints.mtu,
            plan.wireguard.addresses.clone(),
            counters,
        ),
        peers: PeerReport::of_all(&statuses, &plan.wireguard.peers),
        dns: DnsReport {
            servers: plan.dns.servers.clone(),
            search: plan.dns.search.clone(),
            domains: plan.dns.forwarder.iter().flat_map(|forwarder| forwarder.domains.clone()).collect(),
        },
        link: None,
        local_networks: plan.local_networks.clone(),
        open_ports: plan.open.clone(),
        published_ports: Vec::new(),
        host_ports: Vec::new(),
        refused_connections: 0,
        problem: summary.problem,
    };
    Status {
        name: plan.name.clone(),
        state: summary.condition,
        standing: true,
        backend: Some(attached.device.backend()),
        namespace: Some(NAMESPACE.into()),
        keeper: std::process::id(),
        leases: 0,
        container: None,
        living: Some(living),
        programs: Vec::new(),
    }
}

/// Returns the status of the tunnel that is attached to the namespace of this process. Returns None if there is none
/// that this process may see.
///
/// # Errors
/// If the process that serves the tunnel does not answer, or the kernel cannot be queried.
pub fn of_this_namespace() -> Result<Option<Status>, Failure> {
    // The process is asked only where its interface is: on a host, a stranger may listen there.
    if has_tun().doing("list the interfaces")?
        && let Some(status) = ask_process().doing("query the attached tunnel")?
    {
        return Ok(Some(status));
    }
    // Reading the rules and the kernel's WireGuard needs CAP_NET_ADMIN.
    let Ok(mut site) = Site::open() else { return Ok(None) };
    match protection(&mut site.netlink, &mut site.rules, OWNER)? {
        Protection::Open => Ok(None),
        Protection::Closed | Protection::Damaged => ask_kernel(&mut site).doing("query the kernel's WireGuard"),
    }
}

/// Asks the process that serves the tunnel. Returns None if there is none. Repeats the query for a while if the process
/// is busy with other clients, or is missing in the list though it has its interface: the kernel's list of sockets may
/// lack one while others come and go.
///
/// # Errors
/// `WouldBlock` if it stays busy, and if it does not answer in time.
pub(super) fn ask_process() -> io::Result<Option<Status>> {
    let begin = Instant::now();
    loop {
        match ask_once() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && begin.elapsed() < PATIENCE => {
                std::thread::sleep(RETRY_DELAY);
            }
            Ok(None) if begin.elapsed() < PATIENCE && has_tun()? => std::thread::sleep(RETRY_DELAY),
            other => return other,
        }
    }
}

/// Returns whether the tunnel has the interface of the embedded WireGuard, which ends with its process.
fn has_tun() -> io::Result<bool> {
    let link = Netlink::open()?.link(shared_namespace::interface().as_str())?;
    Ok(link.is_some_and(|link| link.kind.as_deref() == Some("tun")))
}

/// Asks the first process of the same user and of a visible PID namespace that listens. No other is believed.
fn ask_once() -> io::Result<Option<Status>> {
    let mut result = Ok(None);
    for name in local_socket::listening_abstract_names(PREFIX)? {
        let socket = match local_socket::connect_abstract(&name) {
            Ok(socket) => socket,
            // The kernel does not tell whose socket it is.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                result = Err(io::Error::new(error.kind(), "too many clients wait for it"));
                continue;
            }
            // The process has ended since, or the name in the list was not a whole one.
            Err(_) => continue,
        };
        let peer = local_socket::peer_credentials(&socket)?;
        if peer.pid == 0 || peer.uid != nix::unistd::geteuid().as_raw() {
            tracing::debug!("ignoring a process of another user or container at the abstract socket @{name}");
            continue;
        }
        if let Some(status) = status::over(socket)? {
            return Ok(Some(status));
        }
    }
    result
}

/// Starts handshakes of the kernel's WireGuard, so that its next status tells an idle tunnel from one whose peer does
/// not answer. The process that serves a tunnel does so by itself.
pub(super) fn renew_kernel() -> io::Result<()> {
    kernel::renew_older(&shared_namespace::interface(), stale_after())
}

/// Returns the status of the kernel's WireGuard, which no process serves. Returns None if there is none.
pub(super) fn ask_kernel(site: &mut Site) -> io::Result<Option<Status>> {
    let name = shared_namespace::interface();
    let link = site.netlink.link(name.as_str())?;
    let Some(link) = link.filter(|link| link.kind.as_deref() == Some("wireguard")) else { return Ok(None) };
    let peers = kernel::peers_of(&name)?;
    let addresses = site.netlink.addresses()?.into_iter().filter(|(of, _)| *of == link.index);
    let living = LiveStatus {
        interface: InterfaceReport::new(
            name.clone(),
            link.mtu,
            addresses.map(|(_, address)| address).collect(),
            site.netlink.counters(&name).unwrap_or_default(),
        ),
        peers: PeerReport::of_all(&peers, &[]),
        dns: DnsReport { servers: Vec::new(), search: Vec::new(), domains: Vec::new() },
        link: None,
        local_networks: Vec::new(),
        open_ports: Vec::new(),
        published_ports: Vec::new(),
        host_ports: Vec::new(),
        refused_connections: 0,
        problem: None,
    };
    let state = match peers.iter().filter_map(|peer| peer.handshake_age).min() {
        None => Condition::Connecting,
        Some(age) if age <= stale_after() => Condition::Up,
        Some(_) => Condition::Stale,
    };
    Ok(Some(Status {
        name: name.as_str().parse().map_err(io::Error::other)?,
        state,
        standing: true,
        backend: Some(Backend::Kernel),
        namespace: Some(NAMESPACE.into()),
        keeper: 0,
        leases: 0,
        container: None,
        living: Some(living),
        programs: Vec::new(),
    }))
}
