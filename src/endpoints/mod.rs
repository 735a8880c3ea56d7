//! The endpoint of each peer. [`Endpoints`] resolves names, sets the device's endpoints, fits the MTU to the route, and
//! searches again when a peer does not answer or the network changes.
//!
//! It knows the tunnel only as a [`Carrier`], so that it serves every placement of a tunnel.

mod resolver;
mod search;

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use crate::config::{Config, Endpoint};
use crate::keys::PublicKey;
use crate::lease::status::Condition;
use crate::linux::clock::boot_time;
use crate::linux::netlink::route::Route;
use crate::wireguard::{Backend, Device, PeerStatus};
use resolver::Resolver;
pub use resolver::look_up;
pub use search::stale_after;
use search::{Health, Search, SearchAction};

/// How long the search tries one address with an embedded device. Three initiations fit: REKEY_TIMEOUT is 5 s, but a
/// new address gets an initiation at once.
const TRY_USERSPACE: Duration = Duration::from_secs(3);

/// How long the search tries one address with the kernel's device, which sends at most one initiation per REKEY_TIMEOUT
/// (5 s), whatever the address.
const TRY_KERNEL: Duration = Duration::from_millis(5500);

/// How long after an endpoint was set the kernel's device is first polled for a handshake. It does not report
/// handshakes by itself. Each further delay is twice as long, up to [`POLL_LAST`], until [`POLL_EAGERLY_FOR`] is over.
const POLL_FIRST: Duration = Duration::from_millis(5);

/// The longest delay between two polls while a handshake is expected.
const POLL_LAST: Duration = Duration::from_millis(250);

/// How long a handshake is expected after an endpoint was set.
const POLL_EAGERLY_FOR: Duration = Duration::from_secs(10);

/// The delay between two polls at all other times.
const POLL_IDLE: Duration = Duration::from_secs(10);

/// A function that looks up an endpoint. It runs on a thread of its own, and may take long.
pub type LookUp = Arc<dyn Fn(&Endpoint) -> io::Result<Vec<SocketAddr>> + Send + Sync>;

/// What carries the encrypted packets of a tunnel: its WireGuard device, and the network of the device's UDP socket.
pub trait Carrier {
    /// Returns the WireGuard device, once it exists.
    fn device(&self) -> Option<&dyn Device>;

    /// Returns the route of encrypted packets to an address.
    ///
    /// # Errors
    /// If there is no route.
    fn route_to(&mut self, address: IpAddr) -> io::Result<Route>;

    /// Returns the MTU of the interface with an index, in bytes.
    ///
    /// # Errors
    /// If there is no such interface.
    fn link_mtu(&mut self, index: Option<u32>) -> io::Result<u32>;

    /// Lets encrypted packets to exactly these addresses pass, where packet rules decide about them.
    ///
    /// # Errors
    /// If the rules cannot be changed.
    fn admit(&mut self, addresses: &[SocketAddr]) -> io::Result<()>;

    /// Sets the MTU of WireGuard's interface, in bytes.
    ///
    /// # Errors
    /// If the kernel refuses.
    fn set_mtu(&mut self, mtu: u32) -> io::Result<()>;

    /// Returns whether WireGuard's interface has IPv6.
    fn has_ipv6(&self) -> bool;
}

/// The endpoints of all peers.
pub struct Endpoints {
    peers: HashMap<PublicKey, PeerPath>,
    resolver: Resolver,
    backend: Backend,
    try_for: Duration,
    poll: PollSchedule,
    /// The peers that have completed a handshake, including those without an endpoint in the file.
    connected: HashSet<PublicKey>,
    /// The number of first handshakes that were not reported yet.
    new_handshakes: usize,
    /// The time since boot of the last handshake with any peer.
    handshake_at: Option<Duration>,
    /// Whether the MTU follows from the routes to the endpoints, instead of the configuration.
    fits_mtu: bool,
    /// The MTU of WireGuard's interface, in bytes.
    pub mtu: u32,
    /// The last problem, until a handshake is completed.
    problem: Option<String>,
}

/// The way to one peer.
struct PeerPath {
    endpoint: Endpoint,
    search: Search,
    /// The address in use.
    address: Option<SocketAddr>,
    /// The host's route to the address, if it has one.
    route: Option<Route>,
    /// The MTU of the route in bytes, if it is known.
    mtu: Option<u32>,
}

/// When the kernel's device is polled. Times are since boot.
struct PollSchedule {
    next: Duration,
    delay: Duration,
    eager_until: Duration,
}

impl PollSchedule {
    /// Starts to poll eagerly, because an endpoint was set.
    fn start(now: Duration) -> Self {
        Self { next: now + POLL_FIRST, delay: POLL_FIRST * 2, eager_until: now + POLL_EAGERLY_FOR }
    }

    /// Schedules the next poll after one at this time.
    fn advance(&mut self, now: Duration) {
        let is_eager = now < self.eager_until;
        self.next = now + if is_eager { self.delay } else { POLL_IDLE };
        self.delay = if is_eager { (self.delay * 2).min(POLL_LAST) } else { POLL_IDLE };
    }
}

/// The state of the tunnel as a whole, for reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Its condition.
    pub condition: Condition,
    /// The time since the last handshake with any peer.
    pub handshake_age: Option<Duration>,
    /// The last problem, until a handshake is completed.
    pub problem: Option<String>,
}

impl Endpoints {
    /// Starts to look for the peers of a configuration. `mtu` is that of WireGuard's interface in bytes.
    ///
    /// # Errors
    /// If the resolver's descriptor cannot be created.
    pub fn new(carrier: &dyn Carrier, config: &Config, mtu: u32, look_up: LookUp) -> io::Result<Self> {
        let backend = carrier.device().map_or(Backend::Userspace, |device| device.backend());
        let try_for = match backend {
            Backend::Kernel => TRY_KERNEL,
            Backend::Userspace => TRY_USERSPACE,
        };
        let now = boot_time();
        let mut endpoints = Self {
            peers: HashMap::new(),
            resolver: Resolver::new(look_up)?,
            backend,
            try_for,
            poll: PollSchedule { next: now, delay: POLL_FIRST, eager_until: now + POLL_EAGERLY_FOR },
            connected: HashSet::new(),
            new_handshakes: 0,
            handshake_at: None,
            fits_mtu: true,
            mtu,
            problem: None,
        };
        endpoints.configure(config);
        Ok(endpoints)
    }

    /// Switches to another configuration. The search for a peer goes on if its endpoint is unchanged.
    pub fn configure(&mut self, config: &Config) {
        self.fits_mtu = config.mtu().is_none();
        let mut before = std::mem::take(&mut self.peers);
        for peer in &config.wireguard.peers {
            let Some(endpoint) = peer.endpoint.clone() else { continue };
            let path = match before.remove(&peer.public_key) {
                Some(path) if path.endpoint == endpoint => path,
                _ => PeerPath {
                    search: Search::new(known_addresses(&endpoint), self.try_for, boot_time()),
                    endpoint,
                    address: None,
                    route: None,
                    mtu: None,
                },
            };
            self.peers.insert(peer.public_key, path);
        }
        let is_peer = |key: &PublicKey| config.wireguard.peers.iter().any(|peer| peer.public_key == *key);
        self.connected.retain(is_peer);
    }

    /// Returns a descriptor that is readable when the resolver may have an answer.
    pub fn resolver(&self) -> BorrowedFd<'_> {
        self.resolver.as_fd()
    }

    /// Returns whether any peer has completed a handshake.
    pub fn is_connected(&self) -> bool {
        !self.connected.is_empty()
    }

    /// Returns the number of peers that have completed their first handshake since the last call.
    pub fn take_new_handshakes(&mut self) -> usize {
        std::mem::take(&mut self.new_handshakes)
    }

    /// Returns whether a peer's search has not come to its last known address, or waits for a lookup.
    pub fn has_alternatives(&self) -> bool {
        self.peers.values().any(|path| path.search.has_alternatives())
    }

    /// Returns the time since boot of the next work that does not depend on a descriptor.
    pub fn due(&self) -> Option<Duration> {
        let poll = (self.backend == Backend::Kernel).then_some(self.poll.next);
        self.peers.values().filter_map(|path| path.search.due()).chain(poll).min()
    }

    /// Does the work that is due for each peer.
    pub fn work(&mut self, carrier: &mut dyn Carrier) {
        let now = boot_time();
        if self.due().is_some_and(|due| due <= now) {
            self.read_device(carrier);
        }
        let attempts = self.next_attempts(now);
        if !attempts.is_empty() {
            let in_use: Vec<SocketAddr> = self.peers.values().filter_map(|path| path.address).collect();
            if let Err(error) = carrier.admit(&in_use) {
                tracing::warn!("cannot let packets to the endpoints pass: {error}");
            }
        }
        for (peer, address) in attempts {
            tracing::info!("trying the endpoint {address}");
            self.poll = PollSchedule::start(now);
            self.follow_route(peer, address.ip(), carrier);
            let Some(device) = carrier.device() else { continue };
            // Setting an address of a family that the host lacks fails. The search goes on with the next one.
            if let Err(error) = device.set_endpoint(&peer, address).and_then(|()| device.initiate_handshake(&peer)) {
                tracing::warn!("cannot try the endpoint {address}: {error}");
            }
        }
    }

    /// Starts the lookups that are due, and returns the addresses that are to be tried now.
    fn next_attempts(&mut self, now: Duration) -> Vec<(PublicKey, SocketAddr)> {
        let mut attempts = Vec::new();
        for (peer, path) in &mut self.peers {
            while let Some(action) = path.search.next_action(now) {
                match action {
                    SearchAction::Try(address) => {
                        path.address = Some(address);
                        attempts.push((*peer, address));
                    }
                    SearchAction::Resolve => {
                        if let Err(error) = self.resolver.resolve(*peer, path.endpoint.clone()) {
                            self.problem = Some(unresolved(&path.endpoint, &error));
                            path.search.resolved(None, now);
                        }
                    }
                }
            }
        }
        attempts
    }

    /// Takes the resolver's answers.
    pub fn take_answers(&mut self) {
        while let Some(answer) = self.resolver.next_answer() {
            let Some(path) = self.peers.get_mut(&answer.peer) else { continue };
            let addresses = match answer.addresses {
                Ok(addresses) => Some(addresses),
                Err(error) => {
                    let problem = unresolved(&path.endpoint, &error);
                    // The lookup is repeated often, and the warning is not.
                    if self.problem.as_ref() == Some(&problem) {
                        tracing::debug!("{problem}");
                    } else {
                        tracing::warn!("{problem}");
                    }
                    self.problem = Some(problem);
                    None
                }
            };
            path.search.resolved(addresses, boot_time());
        }
    }

    /// Reads the peers' status from the device, and returns it. There is none if the device cannot be read.
    pub fn read_device(&mut self, carrier: &dyn Carrier) -> Vec<PeerStatus> {
        let now = boot_time();
        self.poll.advance(now);
        let Some(device) = carrier.device() else { return Vec::new() };
        let statuses = device.peers().unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot read the device's status");
            Vec::new()
        });
        for status in &statuses {
            self.observe(status, now);
        }
        statuses
    }

    /// Starts a handshake with each peer to which nothing was sent since its last handshake became stale. So the status
    /// soon tells an idle tunnel from one whose peer does not answer.
    pub fn renew_stale(&self, carrier: &dyn Carrier) {
        let now = boot_time();
        for (peer, _) in self.peers.iter().filter(|(_, path)| path.search.is_idle(now)) {
            let Some(device) = carrier.device() else { return };
            if let Err(error) = device.initiate_handshake(peer) {
                tracing::debug!(%error, "cannot start a handshake");
            }
        }
    }

    fn observe(&mut self, status: &PeerStatus, now: Duration) {
        self.handshake_at = self.handshake_at.max(status.handshake_age.map(|age| now.saturating_sub(age)));
        if let Some(path) = self.peers.get_mut(&status.public_key) {
            path.search.observe(status, now);
            path.address = status.endpoint.or(path.address);
        }
        // A peer without an endpoint in the file initiates the handshake itself, and counts as well.
        if status.handshake_age.is_some() && self.connected.insert(status.public_key) {
            tracing::info!("completed a handshake with the peer {}", status.public_key);
            self.problem = None;
            self.new_handshakes += 1;
        }
    }

    /// Searches again for each peer to which the host's route has changed.
    pub fn network_changed(&mut self, carrier: &mut dyn Carrier) {
        let now = boot_time();
        for path in self.peers.values_mut() {
            let route = path.address.and_then(|address| carrier.route_to(address.ip()).ok());
            if path.address.is_none() || route != path.route {
                tracing::info!("the host's route to {} has changed", path.endpoint);
                path.route = route;
                path.search.network_changed(now);
            }
        }
    }

    /// Searches again for all peers. After a sleep, the machine may be in another network.
    pub fn search_again(&mut self) {
        let now = boot_time();
        for path in self.peers.values_mut() {
            path.search.network_changed(now);
        }
    }

    /// Returns the state of the tunnel as a whole, which is that of its best peer.
    pub fn summary(&self) -> Summary {
        let now = boot_time();
        let health: Vec<Health> = self.peers.values().map(|path| path.search.health(now)).collect();
        let condition = match () {
            () if health.contains(&Health::Up) => Condition::Up,
            () if health.contains(&Health::Stale) => Condition::Stale,
            // No peer has an endpoint, so only the peers that connected by themselves count.
            () if health.is_empty() && self.is_connected() => Condition::Up,
            () => Condition::Connecting,
        };
        let handshake_age = self.handshake_at.map(|at| now.saturating_sub(at));
        Summary { condition, handshake_age, problem: self.problem.clone() }
    }

    /// Notes the route to an address, and fits the MTU to it. The route was unknown when the plan was made, or has
    /// changed.
    fn follow_route(&mut self, peer: PublicKey, address: IpAddr, carrier: &mut dyn Carrier) {
        let Some(path) = self.peers.get_mut(&peer) else { return };
        path.route = carrier.route_to(address).ok();
        let Some(route) = &path.route else { return };
        let Some(mtu) = route.mtu.or_else(|| carrier.link_mtu(route.interface).ok()) else { return };
        path.mtu = Some(mtu);
        if !self.fits_mtu {
            return;
        }
        let narrowest = self.peers.values().filter_map(|path| path.mtu).min().unwrap_or(mtu);
        let mtu = crate::plan::wireguard_mtu(narrowest, carrier.has_ipv6());
        if mtu == self.mtu {
            return;
        }
        tracing::info!("setting the MTU to {mtu}: the narrowest route to an endpoint has {narrowest}");
        match carrier.set_mtu(mtu) {
            Ok(()) => self.mtu = mtu,
            Err(error) => tracing::warn!("cannot change the MTU from {}: {error}", self.mtu),
        }
    }
}

/// Returns the addresses of an endpoint that are known without a lookup.
fn known_addresses(endpoint: &Endpoint) -> Vec<SocketAddr> {
    match endpoint {
        Endpoint::Address { address, zone: None } => vec![*address],
        _ => Vec::new(),
    }
}

fn unresolved(endpoint: &Endpoint, error: &io::Error) -> String {
    format!("cannot resolve the endpoint {endpoint}: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_polled_eagerly_while_a_handshake_is_expected() {
        let begin = Duration::from_secs(1000);
        let mut poll = PollSchedule::start(begin);
        let mut delays = Vec::new();
        let mut now = begin;
        for _ in 0..9 {
            delays.push((poll.next - now).as_millis());
            now = poll.next;
            poll.advance(now);
        }
        assert_eq!(delays, [5, 10, 20, 40, 80, 160, 250, 250, 250]);
        poll.advance(begin + POLL_EAGERLY_FOR);
        assert_eq!(poll.next, begin + POLL_EAGERLY_FOR + POLL_IDLE);
    }
}
