//! The keeper: the process that owns a tunnel. It makes the tunnel, runs its data path, finds its endpoints, and takes it down
//! when nobody wants it any more.
//!
//! Whoever wants the tunnel holds a *lease*: an open connection to the keeper. The kernel closes it however its holder ends, so
//! the keeper learns of every end, and cleans up, with nobody's help. A lease that ends without a word takes with it what still
//! runs in the namespace.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use super::endpoints::{Resolver, Search, Step};
use super::error::Doing;
use super::lease::{Command, Event, Lease, receive, send};
use super::state::Directory;
use super::{DeviceEvents, Tunnel, TunnelError};
use crate::config::{Endpoint, Peer, WgQuick};
use crate::keys::PublicKey;
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::poll::wait_for;
use crate::linux::process::{self, Forked};
use crate::linux::signals;
use crate::plan::Plan;
use crate::wireguard::{Backend, DeviceConfig, PeerConfig};

/// How long an embedded device tries one address of an endpoint: three initiations fit (REKEY_TIMEOUT is 5 s, but a new address
/// gets one at once).
const PATIENCE_USERSPACE: Duration = Duration::from_secs(3);

/// The same for the kernel's, which sends no more than one initiation in REKEY_TIMEOUT (5 s), whatever the address.
const PATIENCE_KERNEL: Duration = Duration::from_millis(5500);

/// How soon after an endpoint was set the kernel's device is asked for the first time whether a handshake has been completed. It
/// tells nobody by itself. Each further time waits for twice as long, up to [`ASK_KERNEL_LAST`].
const ASK_KERNEL_FIRST: Duration = Duration::from_millis(5);

/// The longest time between two such questions.
const ASK_KERNEL_LAST: Duration = Duration::from_millis(250);

/// What a keeper is made for.
pub struct Mission {
    /// What is to be made.
    pub plan: Plan,
    /// The name claimed for it.
    pub directory: Directory,
    /// The keys and the peers.
    pub wireguard: WgQuick,
    /// How many descriptors, from 3 on, belong to the program: the keeper closes them.
    pub listen_fds: i32,
}

/// Starts a keeper, which begins at once. The caller's copies of the claimed name and of the keys are gone when this returns.
///
/// # Errors
/// Only if there can be no process; all other failures come as [`Event::Failed`].
pub fn start(mission: Mission) -> io::Result<Lease> {
    let launcher = std::process::id();
    let begun = Lease::pair().and_then(|pair| Ok((pair, process::fork()?)));
    let ((lease, keepers), side) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            // There is nobody else to give the name back.
            let _ = mission.directory.release();
            return Err(error);
        }
    };
    match side {
        Forked::Parent(_) => Ok(lease),
        Forked::Child => {
            drop(lease);
            let code = match keep(mission, launcher, &keepers) {
                Ok(()) => 0,
                Err(error) => {
                    // It is for the launcher to tell, who also cleans up.
                    let _ = send(&keepers, &Event::failed(&error));
                    1
                }
            };
            // Not by returning: the caller's stack belongs to the parent. Nothing is left to be dropped that matters.
            process::exit_now(code)
        }
    }
}

/// The keeper's life.
fn keep(mission: Mission, launcher: u32, lease: &OwnedFd) -> Result<(), TunnelError> {
    let Mission { plan, directory, wireguard, listen_fds } = mission;
    let hooks = plan.hooks.iter().any(|hook| hook.run);
    // What fails here leaves the name claimed until this process ends; then the launcher gives it back.
    let making = needed_capabilities() | capabilities_for_port(wireguard.interface.listen_port);
    become_keeper(listen_fds, hooks, making).doing("make the keeper's process")?;
    tracing::debug!("the keeper has begun");
    let mut tunnel = Tunnel::begin(plan, directory, launcher)?;
    let made = device_config(&wireguard, tunnel.plan().wireguard.mtu)
        .and_then(|config| tunnel.make(&config, drop_all_privileges, || drop(send(lease, &Event::Named))));
    let mut keeper = match made {
        Ok(events) => Keeper::new(tunnel, events, wireguard).doing("watch the tunnel")?,
        Err(error) => {
            // The error that matters is the first one.
            let _ = tunnel.take_down();
            let remains = tunnel.release();
            let gone = remains.is_ok().then_some(Event::Gone);
            say_goodbye(lease, [Event::failed(&error)].into_iter().chain(gone));
            return remains?.settle();
        }
    };
    // What is left to do until the end is to fit the MTU, and to point the kernel's device at endpoints.
    capabilities::limit(needed_capabilities(), CapabilitySet::NET_ADMIN).doing("drop privileges")?;
    let _ = send(lease, &Event::Made);
    let ended = keeper.watch(lease).doing("watch the tunnel");
    // Before programs are killed, which takes them their time: a start of the same name shall wait for it.
    let _ = keeper.tunnel.announce_stop();
    let reason = match &ended {
        Ok(End::Failed) => Some(Event::Failed { reason: "its device has failed".into(), advice: None }),
        Ok(End::Left | End::Abandoned) => None,
        Err(error) => Some(Event::failed(error)),
    };
    if let Some(reason) = reason {
        // Before programs are killed, so that whoever sees one die knows why.
        let _ = send(lease, &reason);
    }
    capabilities::raise(needed_capabilities()).doing("take the tunnel down")?;
    let killed = match ended {
        Ok(End::Left) => Ok(()),
        _ => keeper.tunnel.kill_programs().doing("end what still runs in the tunnel"),
    };
    let taken_down = keeper.tunnel.take_down();
    for error in [killed, taken_down].into_iter().filter_map(Result::err) {
        tracing::error!("{error}");
    }
    let remains = keeper.tunnel.release()?;
    say_goodbye(lease, [Event::Gone]);
    remains.settle()
}

/// The last words to a lease. Whoever waits for all output to end shall not wait for the kernel, so that is closed first.
fn say_goodbye(lease: &OwnedFd, events: impl IntoIterator<Item = Event>) {
    let _ = process::redirect_to_null(&[2]);
    for event in events {
        let _ = send(lease, &event);
    }
}

/// Which capabilities it takes to make, watch and remove a tunnel: the namespace and its mounts, the network in it, and finding and
/// ending what still runs there.
pub fn needed_capabilities() -> CapabilitySet {
    CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN | CapabilitySet::KILL | CapabilitySet::SYS_PTRACE
}

/// Which capabilities it takes besides to make a tunnel with this UDP port: one below 1024 is privileged (ip(7)).
pub fn capabilities_for_port(listen_port: Option<u16>) -> CapabilitySet {
    match listen_port {
        Some(1..1024) => CapabilitySet::NET_BIND_SERVICE,
        _ => CapabilitySet::empty(),
    }
}

/// Makes the calling process one that only a tunnel holds: no terminal, no descriptors of the program's, and no more
/// capabilities than are needed.
fn become_keeper(listen_fds: i32, hooks: bool, needed: CapabilitySet) -> io::Result<()> {
    rustix::process::setsid()?;
    process::redirect_to_null(&[0, 1])?;
    process::close(3, 2 + listen_fds)?;
    // The launcher's signals are not the keeper's: it ends when its leases do.
    signals::set_mask(&nix::sys::signal::SigSet::all())?;
    // What a hook could gain by being executed as root is what configures a network, and no more.
    let gained = if hooks { CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW } else { CapabilitySet::empty() };
    capabilities::bound(gained, capabilities::last()?)?;
    capabilities::limit(needed, needed)
}

/// What the data path's thread may do: move packets between descriptors that are open already.
fn drop_all_privileges() -> io::Result<()> {
    capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty())
}

/// What a device is made from. Endpoints come later, by [`Search`].
fn device_config(wireguard: &WgQuick, mtu: u32) -> Result<DeviceConfig, TunnelError> {
    let interface = &wireguard.interface;
    let private_key = interface.private_key.clone().ok_or_else(|| io::Error::other("the file has no PrivateKey"));
    Ok(DeviceConfig {
        private_key: private_key.doing("make a WireGuard device")?,
        listen_port: interface.listen_port.unwrap_or(0),
        fwmark: interface.fwmark.unwrap_or(0),
        mtu,
        peers: wireguard.peers.iter().map(peer_config).collect(),
    })
}

fn peer_config(peer: &Peer) -> PeerConfig {
    PeerConfig {
        public_key: peer.public_key,
        preshared_key: peer.preshared_key.clone(),
        allowed_ips: peer.allowed_ips.clone(),
        persistent_keepalive: peer.persistent_keepalive,
        endpoint: None,
    }
}

/// Why a keeper ends.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// Its lease has said so.
    Left,
    /// Its lease was closed without a word.
    Abandoned,
    /// The data path has ended.
    Failed,
}

struct Keeper {
    tunnel: Tunnel,
    events: DeviceEvents,
    resolver: Resolver,
    searches: HashMap<PublicKey, (Endpoint, Search)>,
    backend: Backend,
    /// When the kernel's device is asked next whether a handshake has been completed, and how long after that again.
    ask_kernel: (Instant, Duration),
    /// The peers with which a handshake has been completed.
    connected: HashSet<PublicKey>,
    /// The MTU of the way to each peer's endpoint, as far as it is known. None if the MTU was not left to us.
    path_mtus: Option<HashMap<PublicKey, u32>>,
    /// The MTU of WireGuard's interface.
    mtu: u32,
}

impl Keeper {
    fn new(tunnel: Tunnel, events: DeviceEvents, wireguard: WgQuick) -> io::Result<Self> {
        let backend = tunnel.device().map_or(Backend::Userspace, |device| device.backend());
        let patience = match backend {
            Backend::Kernel => PATIENCE_KERNEL,
            Backend::Userspace => PATIENCE_USERSPACE,
        };
        let now = Instant::now();
        let path_mtus = wireguard.interface.mtu.is_none().then(HashMap::new);
        let mtu = tunnel.plan().wireguard.mtu;
        let searches = wireguard
            .peers
            .into_iter()
            .filter_map(|peer| {
                let endpoint = peer.endpoint?;
                let known = match &endpoint {
                    Endpoint::Address { address, zone: None } => vec![*address],
                    _ => Vec::new(),
                };
                Some((peer.public_key, (endpoint, Search::new(known, patience, now))))
            })
            .collect();
        Ok(Self {
            tunnel,
            events,
            resolver: Resolver::new()?,
            searches,
            backend,
            ask_kernel: (now, ASK_KERNEL_FIRST),
            connected: HashSet::new(),
            path_mtus,
            mtu,
        })
    }

    /// Watches the tunnel until it ends.
    fn watch(&mut self, lease: &OwnedFd) -> io::Result<End> {
        loop {
            self.search();
            let mut descriptors = vec![lease.as_fd(), self.resolver.as_fd()];
            descriptors.extend(self.events.failed.as_ref().map(AsFd::as_fd));
            descriptors.extend(self.events.handshakes.as_ref().map(AsFd::as_fd));
            let ready = wait_for(&descriptors, self.next_wake())?;
            let embedded = self.events.failed.is_some();
            if ready[0] {
                return Ok(match receive(lease) {
                    Ok(Some(Command::Leave)) => End::Left,
                    _ => End::Abandoned,
                });
            }
            if ready[1] {
                self.take_answers();
            }
            if embedded && ready[2] {
                tracing::debug!("the tunnel's device has ended");
                return Ok(End::Failed);
            }
            if embedded && ready[3] || self.is_kernel_due() {
                self.take_handshakes(lease)?;
            }
        }
    }

    /// Whether a handshake is awaited of which only asking tells.
    fn is_asking(&self) -> bool {
        let awaited = self.connected.is_empty() || self.searches.values().any(|(_, search)| !search.is_done());
        self.backend == Backend::Kernel && awaited
    }

    /// Whether the kernel is to be asked now; if so, the next time is settled.
    fn is_kernel_due(&mut self) -> bool {
        let now = Instant::now();
        let (at, delay) = self.ask_kernel;
        let due = self.is_asking() && at <= now;
        if due {
            self.ask_kernel = (now + delay, (delay * 2).min(ASK_KERNEL_LAST));
        }
        due
    }

    fn next_wake(&self) -> Option<Duration> {
        let now = Instant::now();
        let asking = self.is_asking().then_some(self.ask_kernel.0);
        let due = self.searches.values().filter_map(|(_, search)| search.due()).chain(asking).min();
        due.map(|due| due.saturating_duration_since(now))
    }

    /// Does what is due for each peer.
    fn search(&mut self) {
        let now = Instant::now();
        let mut tried = Vec::new();
        for (peer, (endpoint, search)) in &mut self.searches {
            while let Some(step) = search.step(now) {
                match step {
                    Step::Try(address) => tried.push((*peer, address)),
                    Step::Resolve => {
                        if let Err(error) = self.resolver.ask(*peer, endpoint.clone()) {
                            tracing::warn!("the endpoint {endpoint} cannot be resolved yet: {error}");
                            search.resolved(None, now);
                        }
                    }
                }
            }
        }
        for (peer, address) in tried {
            tracing::info!("trying the endpoint {address}");
            self.ask_kernel = (now + ASK_KERNEL_FIRST, ASK_KERNEL_FIRST * 2);
            self.adapt_mtu(peer, address);
            let Some(device) = self.tunnel.device() else { continue };
            // An address of a family that the host lacks may be refused; the next one has its turn.
            if let Err(error) = device.set_endpoint(&peer, address).and_then(|()| device.initiate_handshake(&peer)) {
                tracing::warn!("the endpoint {address} cannot be tried: {error}");
            }
        }
    }

    fn take_answers(&mut self) {
        while let Some(answer) = self.resolver.next() {
            let Some((endpoint, search)) = self.searches.get_mut(&answer.peer) else { continue };
            let addresses = match answer.addresses {
                Ok(addresses) => Some(addresses),
                Err(error) => {
                    tracing::warn!("the endpoint {endpoint} cannot be resolved yet: {error}");
                    None
                }
            };
            search.resolved(addresses, Instant::now());
        }
    }

    fn take_handshakes(&mut self, lease: &OwnedFd) -> io::Result<()> {
        if let Some(handshakes) = &self.events.handshakes {
            let _ = rustix::io::read(handshakes, &mut [0_u8; 8]);
        }
        let Some(device) = self.tunnel.device() else { return Ok(()) };
        for status in device.peers()?.into_iter().filter(|status| status.handshake_age.is_some()) {
            if let Some((_, search)) = self.searches.get_mut(&status.public_key) {
                search.succeeded();
            }
            // A peer without an endpoint in the file begins by itself, and counts as well.
            if self.connected.insert(status.public_key) {
                tracing::info!("the handshake with the peer {} is completed", status.public_key);
                let _ = send(lease, &Event::Connected);
            }
        }
        Ok(())
    }

    /// Fits the MTU to the way to a peer's endpoint, which was not known when the plan was made, or has changed.
    fn adapt_mtu(&mut self, peer: PublicKey, address: std::net::SocketAddr) {
        let Some(path_mtus) = &mut self.path_mtus else { return };
        let Ok(path) = super::facts::path_mtu(self.tunnel.host(), address.ip()) else { return };
        path_mtus.insert(peer, path);
        let narrowest = path_mtus.values().copied().min().unwrap_or(path);
        let mtu = crate::plan::wireguard_mtu(narrowest, self.tunnel.plan().wireguard.ipv6);
        if mtu == self.mtu {
            return;
        }
        tracing::info!("the MTU is {mtu}, as the narrowest way to an endpoint has {narrowest}");
        match self.tunnel.set_mtu(mtu) {
            Ok(()) => self.mtu = mtu,
            Err(error) => tracing::warn!("the MTU stays at {}: {error}", self.mtu),
        }
    }
}
