//! How each peer is reached: has names resolved, points the device at addresses, fits the MTU to the way there, and looks again when
//! a peer does not answer or the host's network has changed.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::endpoint_search::{Health, Resolver, Search, Step};
use crate::config::{Config, Endpoint};
use crate::keys::PublicKey;
use crate::lease::status::Condition;
use crate::linux::clock::boot_time;
use crate::linux::netlink::route::Route;
use crate::tunnel::{Tunnel, facts};
use crate::wireguard::{Backend, PeerStatus};

/// How long an embedded device tries one address of an endpoint: three initiations fit (REKEY_TIMEOUT is 5 s, but a new address
/// gets one at once).
const PATIENCE_USERSPACE: Duration = Duration::from_secs(3);

/// The same for the kernel's, which sends no more than one initiation in REKEY_TIMEOUT (5 s), whatever the address.
const PATIENCE_KERNEL: Duration = Duration::from_millis(5500);

/// How soon after an endpoint was set the kernel's device is asked for the first time whether a handshake has been completed: it
/// tells nobody by itself. Each further time waits for twice as long, up to [`ASK_KERNEL_LAST`], until [`ASK_KERNEL_FOR`] is over.
const ASK_KERNEL_FIRST: Duration = Duration::from_millis(5);

/// The longest time between two such questions.
const ASK_KERNEL_LAST: Duration = Duration::from_millis(250);

/// How long after an endpoint was set a handshake is waited for so impatiently.
const ASK_KERNEL_FOR: Duration = Duration::from_secs(10);

/// How often the kernel's device is asked otherwise.
const ASK_KERNEL_IDLE: Duration = Duration::from_secs(10);

/// How each peer is reached.
pub(super) struct Endpoints {
    peers: HashMap<PublicKey, Way>,
    resolver: Resolver,
    backend: Backend,
    patience: Duration,
    /// When the kernel's device is asked next, how long after that again, and until when impatiently.
    ask_kernel: (Duration, Duration, Duration),
    /// The peers with which a handshake has been completed, those without an endpoint in the file among them.
    connected: HashSet<PublicKey>,
    /// How many of these nobody has been told of.
    untold: usize,
    /// When the last handshake with any peer was completed.
    handshake_at: Option<Duration>,
    /// Whether the MTU is left to us.
    fits_mtu: bool,
    /// The MTU of WireGuard's interface, in bytes.
    pub(super) mtu: u32,
    /// What last went wrong, unless it has gone well since.
    pub(super) problem: Option<String>,
}

/// The way to one peer.
struct Way {
    endpoint: Endpoint,
    search: Search,
    /// The address in use.
    address: Option<SocketAddr>,
    /// The host's route there. None if there is none.
    route: Option<Route>,
    /// The MTU of that way, as far as it is known.
    mtu: Option<u32>,
}

impl Endpoints {
    pub(super) fn new(tunnel: &Tunnel, config: &Config) -> io::Result<Self> {
        let backend = tunnel.device().map_or(Backend::Userspace, |device| device.backend());
        let patience = match backend {
            Backend::Kernel => PATIENCE_KERNEL,
            Backend::Userspace => PATIENCE_USERSPACE,
        };
        let now = boot_time();
        let mut endpoints = Self {
            peers: HashMap::new(),
            resolver: Resolver::new()?,
            backend,
            patience,
            ask_kernel: (now, ASK_KERNEL_FIRST, now + ASK_KERNEL_FOR),
            connected: HashSet::new(),
            untold: 0,
            handshake_at: None,
            fits_mtu: true,
            mtu: tunnel.plan().wireguard.mtu,
            problem: None,
        };
        endpoints.configure(config);
        endpoints.look(tunnel);
        Ok(endpoints)
    }

    /// Takes another configuration. Peers whose endpoint is the same are reached as they were.
    pub(super) fn configure(&mut self, config: &Config) {
        self.fits_mtu = config.mtu().is_none();
        let mut before = std::mem::take(&mut self.peers);
        for peer in &config.wireguard.peers {
            let Some(endpoint) = peer.endpoint.clone() else { continue };
            let way = match before.remove(&peer.public_key) {
                Some(way) if way.endpoint == endpoint => way,
                _ => Way {
                    search: Search::new(known(&endpoint), self.patience, boot_time()),
                    endpoint,
                    address: None,
                    route: None,
                    mtu: None,
                },
            };
            self.peers.insert(peer.public_key, way);
        }
        let is_peer = |key: &PublicKey| config.wireguard.peers.iter().any(|peer| peer.public_key == *key);
        self.connected.retain(is_peer);
    }

    /// Readable when there may be an answer to be taken.
    pub(super) fn resolver(&self) -> BorrowedFd<'_> {
        self.resolver.as_fd()
    }

    /// Whether there has been a handshake with any peer.
    pub(super) fn is_connected(&self) -> bool {
        !self.connected.is_empty()
    }

    /// How long ago the last handshake with any peer was completed.
    pub(super) fn handshake_age(&self) -> Option<Duration> {
        self.handshake_at.map(|at| boot_time().saturating_sub(at))
    }

    /// How many peers have had their first handshake since this was asked.
    pub(super) fn take_connected(&mut self) -> usize {
        std::mem::take(&mut self.untold)
    }

    /// When there is something to do, whatever happens until then.
    pub(super) fn due(&self) -> Option<Duration> {
        let asking = (self.backend == Backend::Kernel).then_some(self.ask_kernel.0);
        self.peers.values().filter_map(|way| way.search.due()).chain(asking).min()
    }

    /// Does what is due for each peer.
    pub(super) fn work(&mut self, tunnel: &mut Tunnel) {
        let now = boot_time();
        if self.due().is_some_and(|due| due <= now) {
            self.look(tunnel);
        }
        let mut tried = Vec::new();
        for (peer, way) in &mut self.peers {
            while let Some(step) = way.search.step(now) {
                match step {
                    Step::Try(address) => {
                        way.address = Some(address);
                        tried.push((*peer, address));
                    }
                    Step::Resolve => {
                        if let Err(error) = self.resolver.ask(*peer, way.endpoint.clone()) {
                            self.problem = Some(unresolved(&way.endpoint, &error));
                            way.search.resolved(None, now);
                        }
                    }
                }
            }
        }
        for (peer, address) in tried {
            tracing::info!("trying the endpoint {address}");
            self.ask_kernel = (now + ASK_KERNEL_FIRST, ASK_KERNEL_FIRST * 2, now + ASK_KERNEL_FOR);
            self.follow(peer, address.ip(), tunnel);
            let Some(device) = tunnel.device() else { continue };
            // An address of a family that the host lacks may be refused; the next one has its turn.
            if let Err(error) = device.set_endpoint(&peer, address).and_then(|()| device.initiate_handshake(&peer)) {
                tracing::warn!("the endpoint {address} cannot be tried: {error}");
            }
        }
    }

    /// Takes the resolver's answers.
    pub(super) fn take_answers(&mut self) {
        while let Some(answer) = self.resolver.next() {
            let Some(way) = self.peers.get_mut(&answer.peer) else { continue };
            let addresses = match answer.addresses {
                Ok(addresses) => Some(addresses),
                Err(error) => {
                    let problem = unresolved(&way.endpoint, &error);
                    // It is asked for again and again, and said once.
                    if self.problem.as_ref() == Some(&problem) {
                        tracing::debug!("{problem}");
                    } else {
                        tracing::warn!("{problem}");
                    }
                    self.problem = Some(problem);
                    None
                }
            };
            way.search.resolved(addresses, boot_time());
        }
    }

    /// Looks at what the device says of its peers.
    pub(super) fn look(&mut self, tunnel: &Tunnel) {
        let now = boot_time();
        let (_, delay, until) = self.ask_kernel;
        self.ask_kernel = match now < until {
            true => (now + delay, (delay * 2).min(ASK_KERNEL_LAST), until),
            false => (now + ASK_KERNEL_IDLE, ASK_KERNEL_IDLE, until),
        };
        let Some(device) = tunnel.device() else { return };
        let statuses = match device.peers() {
            Ok(statuses) => statuses,
            Err(error) => {
                tracing::debug!(%error, "the device does not answer");
                return;
            }
        };
        for status in statuses {
            self.observe(&status, now);
        }
    }

    fn observe(&mut self, status: &PeerStatus, now: Duration) {
        self.handshake_at = self.handshake_at.max(status.handshake_age.map(|age| now.saturating_sub(age)));
        if let Some(way) = self.peers.get_mut(&status.public_key) {
            way.search.observe(status, now);
            way.address = status.endpoint.or(way.address);
        }
        // A peer without an endpoint in the file begins by itself, and counts as well.
        if status.handshake_age.is_some() && self.connected.insert(status.public_key) {
            tracing::info!("the handshake with the peer {} is completed", status.public_key);
            self.problem = None;
            self.untold += 1;
        }
    }

    /// The host's network has changed: looks whether the ways to the peers have.
    pub(super) fn network_changed(&mut self, tunnel: &mut Tunnel) {
        let now = boot_time();
        for way in self.peers.values_mut() {
            let route = way.address.and_then(|address| tunnel.host().route_to(address.ip()).ok());
            if way.address.is_none() || route != way.route {
                tracing::info!("the host's network has changed on the way to {}", way.endpoint);
                way.route = route;
                way.search.network_changed(now);
            }
        }
    }

    /// The machine has slept, and may be elsewhere.
    pub(super) fn has_slept(&mut self) {
        let now = boot_time();
        for way in self.peers.values_mut() {
            way.search.network_changed(now);
        }
    }

    /// In which state the tunnel is, by its best peer.
    pub(super) fn condition(&self) -> Condition {
        let now = boot_time();
        let health: Vec<Health> = self.peers.values().map(|way| way.search.health(now)).collect();
        match () {
            () if health.contains(&Health::Up) => Condition::Up,
            () if health.contains(&Health::Stale) => Condition::Stale,
            // Where nobody is to be reached, those who have come are all there is.
            () if health.is_empty() && self.is_connected() => Condition::Up,
            () => Condition::Connecting,
        }
    }

    /// Takes note of the way to an address, and fits the MTU to it, which was not known when the plan was made, or has changed.
    fn follow(&mut self, peer: PublicKey, address: IpAddr, tunnel: &mut Tunnel) {
        let Some(way) = self.peers.get_mut(&peer) else { return };
        way.route = tunnel.host().route_to(address).ok();
        let Ok(mtu) = facts::path_mtu(tunnel.host(), address) else { return };
        way.mtu = Some(mtu);
        if !self.fits_mtu {
            return;
        }
        let narrowest = self.peers.values().filter_map(|way| way.mtu).min().unwrap_or(mtu);
        let mtu = crate::plan::wireguard_mtu(narrowest, tunnel.plan().wireguard.ipv6);
        if mtu == self.mtu {
            return;
        }
        tracing::info!("the MTU is {mtu}, as the narrowest way to an endpoint has {narrowest}");
        match tunnel.set_mtu(mtu) {
            Ok(()) => self.mtu = mtu,
            Err(error) => tracing::warn!("the MTU stays at {}: {error}", self.mtu),
        }
    }
}

/// The addresses of an endpoint that are known without a question.
fn known(endpoint: &Endpoint) -> Vec<SocketAddr> {
    match endpoint {
        Endpoint::Address { address, zone: None } => vec![*address],
        _ => Vec::new(),
    }
}

fn unresolved(endpoint: &Endpoint, error: &io::Error) -> String {
    format!("the endpoint {endpoint} cannot be resolved yet: {error}")
}
