//! Binds to the ports of a plan: the published ones, and those by which a program reaches the host's loopback.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};

use super::super::KeeperStart;
use crate::config::{Protocol, Publish};
use crate::failure::{Doing, Failure};
use crate::linux::listening_sockets;
use crate::plan::Plan;
use crate::relay::{self, AllowedClient, Budget, ListenSocket, RelayedPort};

/// How long a keeper that hands over, or was killed, may take to close its ports.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(2);

/// The delay between two attempts to bind to its ports.
const RETRY_DELAY: Duration = Duration::from_millis(5);

/// Returns an allowance of descriptors if a plan has so many ports that the process may need to raise its limit of open
/// files. Otherwise the limit stays low, since hooks inherit it.
pub(super) fn descriptor_budget(plan: &Plan) -> Result<Option<Budget>, Failure> {
    let ports = plan.publish.len() + 2 * plan.host_ports.len();
    let soft_limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let is_many = ports as u64 > soft_limit / 2;
    is_many.then(Budget::of_process).transpose().doing("open as many files as there are ports")
}

/// Binds to the published ports. If the keeper takes a tunnel over, waits until the former keeper has closed them.
pub(super) fn bind_published(ports: &[Publish], start: &KeeperStart) -> Result<Vec<ListenSocket>, Failure> {
    let ports: Vec<RelayedPort> = ports.iter().map(RelayedPort::from).collect();
    let begin = Instant::now();
    loop {
        match relay::bind(&ports) {
            Err(_) if matches!(start, KeeperStart::TakeOver(_)) && begin.elapsed() < HANDOVER_TIMEOUT => {
                std::thread::sleep(RETRY_DELAY);
            }
            Ok(bound) => return Ok(bound),
            Err(error) => return Err(error),
        }
    }
}

/// Binds to the ports of a new tunnel's link by which the host's loopback is reached.
pub(super) fn bind_host_ports(plan: &Plan) -> Result<Vec<ListenSocket>, Failure> {
    let bound = relayed_host_ports(plan).iter().map(bind_unless_reachable).collect::<Result<Vec<_>, _>>()?;
    Ok(bound.into_iter().flatten().collect())
}

/// Binds to these ports of a tunnel that is taken over. A port that cannot be bound is logged: it is no reason to end
/// the programs inside.
pub(super) fn rebind_host_ports(plan: &Plan) -> Vec<ListenSocket> {
    let begin = Instant::now();
    let rebind = |port: &RelayedPort| loop {
        match relay::bind(std::slice::from_ref(port)) {
            // The former keeper may still have it.
            Err(error)
                if error.errno == Some(libc::EADDRINUSE)
                    && begin.elapsed() < HANDOVER_TIMEOUT
                    && !is_reachable(port, Listening::OnAllAddresses) =>
            {
                std::thread::sleep(RETRY_DELAY);
            }
            Ok(bound) => return bound,
            Err(error) if error.errno == Some(libc::EADDRINUSE) && is_reachable(port, Listening::OnThisAddressToo) => {
                return Vec::new();
            }
            Err(error) => {
                tracing::error!("{error}");
                return Vec::new();
            }
        }
    };
    relayed_host_ports(plan).iter().flat_map(rebind).collect()
}

/// Returns the addresses and ports at which a program reaches the host's loopback.
pub(super) fn relayed_host_ports(plan: &Plan) -> Vec<RelayedPort> {
    let Some(veth) = &plan.veth else { return Vec::new() };
    let ipv4 = (IpAddr::from(veth.host_ipv4), IpAddr::from(veth.inner_ipv4));
    let ipv6 = veth.host_ipv6.zip(veth.inner_ipv6).map(|(host, inner)| (host.into(), inner.into()));
    let of_port = |port| {
        [Some(ipv4), ipv6].into_iter().flatten().map(move |(host, inner)| {
            let client = AllowedClient { interface: veth.host_interface.clone(), address: inner };
            RelayedPort::of_host(port, host, client)
        })
    };
    plan.host_ports.iter().flat_map(|port| of_port(*port)).collect()
}

/// Binds to a port, unless the program already reaches the service that listens there.
///
/// A service that listens on all addresses also listens on the link's, so the program reaches it without a relay. That
/// is not a failure: which addresses a service listens on is its own configuration, and may change at any time. A
/// process that has bound the port without listening is a failure, because the program would reach nothing.
pub(super) fn bind_unless_reachable(port: &RelayedPort) -> Result<Option<ListenSocket>, Failure> {
    match relay::bind(std::slice::from_ref(port)) {
        Ok(mut bound) => Ok(bound.pop()),
        Err(error) if error.errno == Some(libc::EADDRINUSE) && is_reachable(port, Listening::OnThisAddressToo) => {
            tracing::info!("port {} of the host is reached without a relay: a service listens there", port.port);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The services that make a port reachable.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Listening {
    /// Services that listen on all addresses.
    OnAllAddresses,
    /// These, and services that listen on the port's own address.
    OnThisAddressToo,
}

/// Returns whether a service of the host listens where a port was to be.
fn is_reachable(port: &RelayedPort, listening: Listening) -> bool {
    let addresses = match port.protocol {
        Protocol::Tcp => listening_sockets::tcp(port.port),
        Protocol::Udp => listening_sockets::udp(port.port),
    };
    let counts = |address: &IpAddr| {
        let is_own = listening == Listening::OnThisAddressToo && Some(*address) == port.address;
        address.is_unspecified() || is_own
    };
    addresses.is_ok_and(|addresses| addresses.iter().any(counts))
}
