//! The kernel's WireGuard, configured with the `wireguard-control` crate.
//!
//! The interface is created inside the tunnel's namespace by a netlink socket of the host's. The kernel keeps the UDP
//! socket in the namespace where it was requested. So encrypted packets use the host's routes although the interface
//! has never been in the host's namespace.
//!
//! The crate neither wipes keys nor keeps them out of its error messages. So only the number and the kind of its errors
//! are passed on.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use wireguard_control as control;

use super::{Backend, Device, DeviceConfig, PeerConfig, PeerStatus};
use crate::keys::{KEY_LENGTH, PublicKey};
use crate::linux::capabilities::CapabilitySet;
use crate::linux::clock::boot_time;
use crate::linux::namespace::{NamespaceThread, NetworkNamespace};
use crate::linux::netlink::link::TargetNamespace;
use crate::linux::netlink::{Netlink, NetlinkError, NetlinkRequest};
use crate::names::InterfaceName;
use std::os::fd::AsFd;

/// How many AllowedIPs one update of a peer contains, so that it fits into a netlink message.
const ALLOWED_IPS_PER_MESSAGE: usize = 100;

/// How long after its handshake a session can be used (REJECT_AFTER_TIME of the WireGuard paper, section 6.1).
const SESSION_LIFETIME: Duration = Duration::from_secs(180);

/// A WireGuard interface of the kernel.
#[derive(Debug)]
pub struct KernelDevice {
    /// A thread in the tunnel's namespace, which is the only place where the kernel shows the interface.
    resident: NamespaceThread,
    control_name: control::InterfaceName,
    /// The peers as configured. The kernel knows their current endpoints.
    peers: Vec<PeerConfig>,
    /// What the kernel does not report about them, or has forgotten.
    observed: Mutex<Observations>,
}

/// What was observed of the peers.
#[derive(Debug, Default)]
struct Observations {
    last_handshake: HashMap<PublicKey, HandshakeTime>,
    /// The bytes received from and sent to each peer before it was last removed and added again.
    former_bytes: HashMap<PublicKey, (u64, u64)>,
    /// When the device was last read, since boot.
    read_at: Option<Duration>,
}

/// The time of a handshake. The kernel reports the time of day, which may jump.
#[derive(Clone, Copy, Debug)]
struct HandshakeTime {
    time_of_day: SystemTime,
    /// Since boot.
    at: Duration,
}

impl HandshakeTime {
    /// Returns the time of the handshake that the kernel reports with the time of day `reported`. A handshake that was
    /// reported before keeps the time that was computed then. A new one happened after the last read, if there was one,
    /// whatever the time of day is.
    fn update(before: Option<Self>, reported: SystemTime, last_read: Option<Duration>, now: Duration) -> Self {
        match before {
            Some(before) if before.time_of_day == reported => before,
            _ => {
                let age = reported.elapsed().unwrap_or_default();
                let at = now.saturating_sub(age).max(last_read.unwrap_or_default());
                Self { time_of_day: reported, at }
            }
        }
    }
}

/// Creates a WireGuard interface in `namespace` whose UDP socket will be in the namespace of `host`.
///
/// # Errors
///
/// Returns `EOPNOTSUPP` if the kernel has no WireGuard.
pub fn make(host: &mut Netlink, namespace: &NetworkNamespace, name: &InterfaceName) -> Result<(), NetlinkError> {
    host.execute_one(NetlinkRequest::add_wireguard(name, TargetNamespace::Other(namespace.as_fd())))
}

impl KernelDevice {
    /// Configures the interface that [`make`] has created.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error, without the text of the request, which contains keys.
    pub fn configure(
        namespace: NetworkNamespace,
        interface: &InterfaceName,
        config: &DeviceConfig,
    ) -> io::Result<KernelDevice> {
        let device = Self::open(namespace, interface, config)?;
        let mut update = control::DeviceUpdate::new()
            .set_private_key(control::Key(*config.private_key.as_bytes()))
            .replace_peers()
            .set_listen_port(config.listen_port)
            .set_fwmark(config.fwmark);
        for peer in &config.peers {
            for peer_update in peer_updates(peer) {
                update = update.add_peer(peer_update);
            }
        }
        device.apply(update)?;
        Ok(device)
    }

    /// Takes over an interface that is configured already.
    ///
    /// # Errors
    ///
    /// Returns `InvalidData` if the interface has another private key than `config`.
    pub fn attach(
        namespace: NetworkNamespace,
        interface: &InterfaceName,
        config: &DeviceConfig,
    ) -> io::Result<KernelDevice> {
        let device = Self::open(namespace, interface, config)?;
        let found = device.read()?;
        let own = found.public_key.map(|key| key.0);
        if own != Some(*config.private_key.public_key().as_bytes()) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the interface has a different private key"));
        }
        Ok(device)
    }

    fn open(namespace: NetworkNamespace, interface: &InterfaceName, config: &DeviceConfig) -> io::Result<KernelDevice> {
        Ok(KernelDevice {
            resident: NamespaceThread::start(namespace, CapabilitySet::NET_ADMIN)?,
            control_name: interface.as_str().parse().map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?,
            peers: config.peers.clone(),
            observed: Mutex::default(),
        })
    }

    fn read(&self) -> io::Result<control::Device> {
        let name = self.control_name;
        self.resident.run(move || control::Device::get(&name, control::Backend::Kernel))?.map_err(without_text)
    }

    fn apply(&self, update: control::DeviceUpdate) -> io::Result<()> {
        // The crate first requests to create the interface in the namespace of the calling thread. In the tunnel's
        // namespace it exists already; elsewhere this would create a second one.
        let name = self.control_name;
        self.resident.run(move || update.apply(&name, control::Backend::Kernel))?.map_err(without_text)
    }

    /// Returns whether the kernel may have a session with a peer, judging by the last handshake.
    fn has_session(&self, peer: &PublicKey, found: &control::PeerInfo) -> bool {
        let Some(reported) = found.stats.last_handshake_time else { return false };
        let (now, mut observed) = (boot_time(), self.observed.lock().unwrap_or_else(PoisonError::into_inner));
        let last_handshake = observed.last_handshake.get(peer).copied();
        let handshake = HandshakeTime::update(last_handshake, reported, observed.read_at, now);
        observed.last_handshake.insert(*peer, handshake);
        now.saturating_sub(handshake.at) < SESSION_LIFETIME
    }

    /// Makes the kernel forget a peer's session, which it would use instead of a handshake: removes the peer and adds
    /// it again in one request. The only other way is to take the interface down, and its routes with it.
    fn reset_session(&self, peer: &PeerConfig, found: &control::PeerInfo) -> io::Result<()> {
        let others = self.peers.iter().skip_while(|other| other.public_key != peer.public_key).skip(1);
        let of_later_peers: HashSet<&IpNet> = others.flat_map(|other| &other.allowed_ips).collect();
        // A network that several peers have belongs to the last of them.
        let allowed_ips = peer.allowed_ips.iter().filter(|net| !of_later_peers.contains(net)).copied().collect();
        let again =
            PeerConfig { allowed_ips, endpoint: found.config.endpoint, persistent_keepalive: None, ..peer.clone() };
        let mut update = control::DeviceUpdate::new().remove_peer_by_key(&found.config.public_key);
        for peer_update in peer_updates(&again) {
            update = update.add_peer(peer_update);
        }
        self.apply(update)?;
        let mut observed = self.observed.lock().unwrap_or_else(PoisonError::into_inner);
        let former = observed.former_bytes.entry(peer.public_key).or_default();
        *former = (former.0 + found.stats.rx_bytes, former.1 + found.stats.tx_bytes);
        Ok(())
    }

    fn update_peer(
        &self,
        change: impl FnOnce(control::PeerConfigBuilder) -> control::PeerConfigBuilder,
        peer: &PublicKey,
    ) -> io::Result<()> {
        let peer_update = change(control::PeerConfigBuilder::new(&control::Key(*peer.as_bytes())));
        self.apply(control::DeviceUpdate::new().add_peer(peer_update))
    }
}

/// Returns a peer's configuration as one or more updates, each small enough for a netlink message. The first replaces
/// the former configuration.
fn peer_updates(peer: &PeerConfig) -> Vec<control::PeerConfigBuilder> {
    let key = control::Key(*peer.public_key.as_bytes());
    let mut first = control::PeerConfigBuilder::new(&key).replace_allowed_ips();
    // A key of all zeros means none, and removes a former key.
    let preshared = peer.preshared_key.as_ref().map_or([0; KEY_LENGTH], |key| *key.as_bytes());
    first = first.set_preshared_key(control::Key(preshared));
    if let Some(endpoint) = peer.endpoint {
        first = first.set_endpoint(endpoint);
    }
    first = first.set_persistent_keepalive_interval(peer.persistent_keepalive.unwrap_or(0));
    let mut chunks = peer.allowed_ips.chunks(ALLOWED_IPS_PER_MESSAGE);
    let mut updates = vec![allow(first, chunks.next().unwrap_or_default())];
    updates.extend(chunks.map(|chunk| allow(control::PeerConfigBuilder::new(&key), chunk)));
    updates
}

fn allow(mut update: control::PeerConfigBuilder, networks: &[IpNet]) -> control::PeerConfigBuilder {
    for network in networks {
        update = update.add_allowed_ip(network.addr(), network.prefix_len());
    }
    update
}

/// Removes the text of an error, which may contain the request with its keys.
fn without_text(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => io::Error::new(error.kind(), "cannot configure the kernel's WireGuard"),
    }
}

impl Device for KernelDevice {
    fn backend(&self) -> Backend {
        Backend::Kernel
    }

    fn set_endpoint(&self, peer: &PublicKey, endpoint: SocketAddr) -> io::Result<()> {
        self.update_peer(|update| update.set_endpoint(endpoint), peer)
    }

    fn initiate_handshake(&self, peer: &PublicKey) -> io::Result<()> {
        let configured = self.peers.iter().find(|configured| configured.public_key == *peer);
        if let Some(configured) = configured
            && let Some(found) = self.read()?.peers.iter().find(|info| info.config.public_key.0 == *peer.as_bytes())
            && self.has_session(peer, found)
        {
            self.reset_session(configured, found)?;
        }
        // When the keepalive interval becomes non-zero, the kernel sends a keepalive at once, and without a session
        // begins a handshake (set_peer() in drivers/net/wireguard/netlink.c). There is no other way without a packet.
        let interval = configured.and_then(|configured| configured.persistent_keepalive);
        self.update_peer(|update| update.set_persistent_keepalive_interval(0), peer)?;
        self.update_peer(|update| update.set_persistent_keepalive_interval(interval.unwrap_or(u16::MAX)), peer)?;
        match interval {
            Some(_) => Ok(()),
            None => self.update_peer(|update| update.set_persistent_keepalive_interval(0), peer),
        }
    }

    fn peers(&self) -> io::Result<Vec<PeerStatus>> {
        let device = self.read()?;
        let now = boot_time();
        let mut observed = self.observed.lock().unwrap_or_else(PoisonError::into_inner);
        let last_read = observed.read_at.replace(now);
        Ok(self
            .peers
            .iter()
            .filter_map(|PeerConfig { public_key, .. }| {
                let info = device.peers.iter().find(|info| info.config.public_key.0 == *public_key.as_bytes())?;
                if let Some(reported) = info.stats.last_handshake_time {
                    let last_handshake = observed.last_handshake.get(public_key).copied();
                    let handshake = HandshakeTime::update(last_handshake, reported, last_read, now);
                    observed.last_handshake.insert(*public_key, handshake);
                }
                let (rx_before, tx_before) = observed.former_bytes.get(public_key).copied().unwrap_or_default();
                Some(PeerStatus {
                    public_key: *public_key,
                    endpoint: info.config.endpoint,
                    handshake_age: observed
                        .last_handshake
                        .get(public_key)
                        .map(|handshake| now.saturating_sub(handshake.at)),
                    rx_bytes: rx_before + info.stats.rx_bytes,
                    tx_bytes: tx_before + info.stats.tx_bytes,
                    unanswered_for: None,
                })
            })
            .collect())
    }

    fn reconfigure(&mut self, config: &DeviceConfig) -> io::Result<()> {
        let found = self.read()?;
        let mut update = control::DeviceUpdate::new();
        // Setting a key ends all sessions, so it is only set if it has changed.
        if found.public_key.map(|key| key.0) != Some(*config.private_key.public_key().as_bytes()) {
            update = update.set_private_key(control::Key(*config.private_key.as_bytes()));
        }
        for peer in &found.peers {
            let key = &peer.config.public_key;
            if !config.peers.iter().any(|configured| *configured.public_key.as_bytes() == key.0) {
                update = update.remove_peer_by_key(key);
            }
        }
        for peer in &config.peers {
            for peer_update in peer_updates(peer) {
                update = update.add_peer(peer_update);
            }
        }
        self.apply(update)?;
        self.peers.clone_from(&config.peers);
        let observed = self.observed.get_mut().unwrap_or_else(PoisonError::into_inner);
        let is_peer = |key: &PublicKey| config.peers.iter().any(|peer| peer.public_key == *key);
        observed.last_handshake.retain(|key, _| is_peer(key));
        observed.former_bytes.retain(|key, _| is_peer(key));
        Ok(())
    }

    fn rebind(&mut self, listen_port: u16, fwmark: u32) -> io::Result<()> {
        // The port is set first and alone: in one request, the kernel would set the mark before it refuses the port.
        if listen_port != 0 {
            self.apply(control::DeviceUpdate::new().set_listen_port(listen_port))?;
        }
        self.apply(control::DeviceUpdate::new().set_fwmark(fwmark))
    }

    fn take_interface_along(&self) -> io::Result<bool> {
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handshake_times_do_not_move_when_the_clock_jumps() {
        let seconds = Duration::from_secs;
        let now = seconds(1000);
        // At the first read, only the time of day is known.
        let first = HandshakeTime::update(None, SystemTime::now() - seconds(60), None, now);
        assert!((seconds(939)..=seconds(941)).contains(&first.at), "{first:?}");
        // The same handshake keeps its time, whatever the time of day is later.
        let later = HandshakeTime::update(Some(first), first.time_of_day, Some(now), now + seconds(500));
        assert_eq!(later.at, first.at);
        // Another handshake, a day ago because the clock was set forward since: it was after the last read.
        let jumped = SystemTime::now() - seconds(86_400);
        let second = HandshakeTime::update(Some(first), jumped, Some(now + seconds(500)), now + seconds(510));
        assert_eq!(second.at, now + seconds(500));
        // A handshake in the future, because the clock was set back: it counts as now.
        let ahead = SystemTime::now() + seconds(86_400);
        let third = HandshakeTime::update(Some(second), ahead, Some(now + seconds(510)), now + seconds(520));
        assert_eq!(third.at, now + seconds(520));
    }
}
