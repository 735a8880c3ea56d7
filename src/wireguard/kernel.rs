//! The kernel's WireGuard, configured through the `wireguard-control` crate.
//!
//! A netlink socket of the host creates the interface inside the tunnel's namespace. The kernel keeps the UDP socket in
//! the namespace of the request, so encrypted packets take the host's routes although the interface never was in the
//! host's namespace.
//!
//! The crate does not wipe keys, and includes them in its error messages. So only the number and the kind of its errors
//! are passed on.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
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

/// The maximum number of AllowedIPs in one description of a peer, which must fit into one netlink message.
const ALLOWED_IPS_PER_MESSAGE: usize = 100;

/// The lifetime of a session after its handshake (REJECT_AFTER_TIME of the WireGuard paper, section 6.1).
const SESSION: Duration = Duration::from_secs(180);

/// A WireGuard interface of the kernel.
#[derive(Debug)]
pub struct KernelDevice {
    /// The thread in the tunnel's namespace. The kernel shows the interface only there.
    thread: NamespaceThread,
    control_name: control::InterfaceName,
    /// The peers as configured. The kernel knows their current endpoints.
    peers: Vec<PeerConfig>,
    /// Observations about the peers that the kernel does not report, or has forgotten.
    observed: Mutex<Observations>,
}

/// Observations about the peers.
#[derive(Debug, Default)]
struct Observations {
    last_handshakes: HashMap<PublicKey, ObservedHandshake>,
    /// The bytes received from and sent to each peer before it was last recreated.
    carried: HashMap<PublicKey, (u64, u64)>,
    /// The time since boot when the device was last queried.
    queried_at: Option<Duration>,
}

/// The time of a handshake. The kernel reports the time of day, which may jump.
#[derive(Clone, Copy, Debug)]
struct ObservedHandshake {
    time_of_day: SystemTime,
    /// The time since boot.
    at: Duration,
}

impl ObservedHandshake {
    /// Returns the observation of a handshake that the kernel reports. One that was observed before keeps its time. A
    /// new one was after the last query, if there was one, whatever the time of day says.
    fn update(before: Option<Self>, reported: SystemTime, last_query: Option<Duration>, now: Duration) -> Self {
        match before {
            Some(before) if before.time_of_day == reported => before,
            _ => {
                let age = reported.elapsed().unwrap_or_default();
                let at = now.saturating_sub(age).max(last_query.unwrap_or_default());
                Self { time_of_day: reported, at }
            }
        }
    }
}

/// Creates a WireGuard interface in `namespace` whose UDP socket is in the namespace of `host`.
///
/// # Errors
/// Fails with `EOPNOTSUPP` if the kernel has no WireGuard.
pub fn create(host: &mut Netlink, namespace: &NetworkNamespace, name: &InterfaceName) -> Result<(), NetlinkError> {
    host.execute_one(NetlinkRequest::add_wireguard(name, TargetNamespace::Other(namespace.as_fd())))
}

/// Returns the status of the peers of an interface in the calling thread's namespace. The ages of handshakes follow the
/// time of day, which may jump.
///
/// # Errors
/// Fails without CAP_NET_ADMIN, or if the interface is not WireGuard's.
pub fn peers_of(name: &InterfaceName) -> io::Result<Vec<PeerStatus>> {
    let control_name = name.as_str().parse().map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let device = control::Device::get(&control_name, control::Backend::Kernel).map_err(without_text)?;
    let peer = |info: &control::PeerInfo| PeerStatus {
        public_key: PublicKey::from(info.config.public_key.0),
        endpoint: info.config.endpoint,
        handshake_age: info.stats.last_handshake_time.map(|at| at.elapsed().unwrap_or_default()),
        rx_bytes: info.stats.rx_bytes,
        tx_bytes: info.stats.tx_bytes,
        unanswered_for: None,
    };
    Ok(device.peers.iter().map(peer).collect())
}

/// Starts a handshake with the peers of an interface in the calling thread's namespace whose last handshake is older
/// than `age`, or that have not completed one. Leaves peers alone that have a persistent keepalive: the kernel starts
/// their handshakes by itself. Within a session that the other end has started, the kernel sends a keepalive instead.
///
/// # Errors
/// Fails without CAP_NET_ADMIN, or if the interface is not WireGuard's.
pub fn renew_older(name: &InterfaceName, age: Duration) -> io::Result<()> {
    let control_name = name.as_str().parse().map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let device = control::Device::get(&control_name, control::Backend::Kernel).map_err(without_text)?;
    for info in device.peers {
        let is_old = info.stats.last_handshake_time.is_none_or(|at| at.elapsed().unwrap_or_default() > age);
        // The largest interval is that of a process that was killed between the two updates below.
        let interval = info.config.persistent_keepalive_interval;
        let is_kept_alive = interval.is_some_and(|seconds| seconds > 0 && seconds < u16::MAX);
        if !is_old || is_kept_alive {
            continue;
        }
        // An interval that becomes non-zero, as in `initiate_handshake`.
        for seconds in [u16::MAX, 0] {
            let peer = control::PeerConfigBuilder::new(&info.config.public_key);
            let update = control::DeviceUpdate::new().add_peer(peer.set_persistent_keepalive_interval(seconds));
            update.apply(&control_name, control::Backend::Kernel).map_err(without_text)?;
        }
    }
    Ok(())
}

impl KernelDevice {
    /// Configures an interface from [`create`].
    ///
    /// # Errors
    /// Fails if the kernel refuses the configuration. The error does not contain the request, which has keys.
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
            for description in describe(peer) {
                update = update.add_peer(description);
            }
        }
        device.apply(update)?;
        Ok(device)
    }

    /// Takes over a configured interface without changing it.
    ///
    /// # Errors
    /// Fails with `InvalidData` if the private key of the interface is not that of `config`.
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
            thread: NamespaceThread::start(namespace, CapabilitySet::NET_ADMIN)?,
            control_name: interface.as_str().parse().map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?,
            peers: config.peers.clone(),
            observed: Mutex::default(),
        })
    }

    fn read(&self) -> io::Result<control::Device> {
        let name = self.control_name;
        self.thread.run(move || control::Device::get(&name, control::Backend::Kernel))?.map_err(without_text)
    }

    fn apply(&self, update: control::DeviceUpdate) -> io::Result<()> {
        // The crate first requests that the interface be created in the namespace of the calling thread. There it
        // exists, so nothing happens. In another namespace, the crate would create a second one.
        let name = self.control_name;
        self.thread.run(move || update.apply(&name, control::Backend::Kernel))?.map_err(without_text)
    }

    /// Returns whether the kernel may have a session with a peer, according to the last handshake.
    fn has_session(&self, peer: &PublicKey, found: &control::PeerInfo) -> bool {
        let Some(reported) = found.stats.last_handshake_time else { return false };
        let (now, mut observed) = (boot_time(), self.observed.lock().unwrap_or_else(PoisonError::into_inner));
        let known = observed.last_handshakes.get(peer).copied();
        let handshake = ObservedHandshake::update(known, reported, observed.queried_at, now);
        observed.last_handshakes.insert(*peer, handshake);
        now.saturating_sub(handshake.at) < SESSION
    }

    /// Makes the kernel drop a peer's session, which it would use instead of a new handshake: one request removes the
    /// peer and adds it again. The only other way is to bring the interface down, which removes its routes.
    fn renew(&self, peer: &PeerConfig, found: &control::PeerInfo) -> io::Result<()> {
        let others = self.peers.iter().skip_while(|other| other.public_key != peer.public_key).skip(1);
        let claimed: HashSet<&IpNet> = others.flat_map(|other| &other.allowed_ips).collect();
        // A network in the AllowedIPs of several peers belongs to the last one.
        let allowed_ips = peer.allowed_ips.iter().filter(|net| !claimed.contains(net)).copied().collect();
        let again =
            PeerConfig { allowed_ips, endpoint: found.config.endpoint, persistent_keepalive: None, ..peer.clone() };
        let mut update = control::DeviceUpdate::new().remove_peer_by_key(&found.config.public_key);
        for description in describe(&again) {
            update = update.add_peer(description);
        }
        self.apply(update)?;
        let mut observed = self.observed.lock().unwrap_or_else(PoisonError::into_inner);
        let carried = observed.carried.entry(peer.public_key).or_default();
        *carried = (carried.0 + found.stats.rx_bytes, carried.1 + found.stats.tx_bytes);
        Ok(())
    }

    fn update_peer(
        &self,
        change: impl FnOnce(control::PeerConfigBuilder) -> control::PeerConfigBuilder,
        peer: &PublicKey,
    ) -> io::Result<()> {
        let description = change(control::PeerConfigBuilder::new(&control::Key(*peer.as_bytes())));
        self.apply(control::DeviceUpdate::new().add_peer(description))
    }
}

/// Describes a peer in one or more parts, each small enough for a message. The first replaces the peer's AllowedIPs.
fn describe(peer: &PeerConfig) -> Vec<control::PeerConfigBuilder> {
    let key = control::Key(*peer.public_key.as_bytes());
    let mut first = control::PeerConfigBuilder::new(&key).replace_allowed_ips();
    // A key of zeros removes the preshared key.
    let preshared = peer.preshared_key.as_ref().map_or([0; KEY_LENGTH], |key| *key.as_bytes());
    first = first.set_preshared_key(control::Key(preshared));
    if let Some(endpoint) = peer.endpoint {
        first = first.set_endpoint(endpoint);
    }
    first = first.set_persistent_keepalive_interval(peer.persistent_keepalive.unwrap_or(0));
    let mut chunks = peer.allowed_ips.chunks(ALLOWED_IPS_PER_MESSAGE);
    let mut descriptions = vec![allow(first, chunks.next().unwrap_or_default())];
    descriptions.extend(chunks.map(|chunk| allow(control::PeerConfigBuilder::new(&key), chunk)));
    descriptions
}

fn allow(mut description: control::PeerConfigBuilder, networks: &[IpNet]) -> control::PeerConfigBuilder {
    for network in networks {
        description = description.add_allowed_ip(network.addr(), network.prefix_len());
    }
    description
}

/// Removes the text of an error, which may contain the request with its keys.
fn without_text(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => io::Error::new(error.kind(), "the kernel's WireGuard cannot be configured"),
    }
}

impl Device for KernelDevice {
    fn backend(&self) -> Backend {
        Backend::Kernel
    }

    fn set_endpoint(&self, peer: &PublicKey, endpoint: SocketAddr) -> io::Result<()> {
        self.update_peer(|description| description.set_endpoint(endpoint), peer)
    }

    fn initiate_handshake(&self, peer: &PublicKey) -> io::Result<()> {
        let configured = self.peers.iter().find(|configured| configured.public_key == *peer);
        if let Some(configured) = configured
            && let Some(found) = self.read()?.peers.iter().find(|info| info.config.public_key.0 == *peer.as_bytes())
            && self.has_session(peer, found)
        {
            self.renew(configured, found)?;
        }
        // When the keepalive interval becomes non-zero, the kernel sends a keepalive at once, and so, without a
        // session, starts a handshake (set_peer() in drivers/net/wireguard/netlink.c). There is no other way without a
        // packet.
        let interval = configured.and_then(|configured| configured.persistent_keepalive);
        self.update_peer(|description| description.set_persistent_keepalive_interval(0), peer)?;
        self.update_peer(
            |description| description.set_persistent_keepalive_interval(interval.unwrap_or(u16::MAX)),
            peer,
        )?;
        match interval {
            Some(_) => Ok(()),
            None => self.update_peer(|description| description.set_persistent_keepalive_interval(0), peer),
        }
    }

    fn peers(&self) -> io::Result<Vec<PeerStatus>> {
        let device = self.read()?;
        let now = boot_time();
        let mut observed = self.observed.lock().unwrap_or_else(PoisonError::into_inner);
        let last_query = observed.queried_at.replace(now);
        Ok(self
            .peers
            .iter()
            .filter_map(|PeerConfig { public_key, .. }| {
                let info = device.peers.iter().find(|info| info.config.public_key.0 == *public_key.as_bytes())?;
                if let Some(reported) = info.stats.last_handshake_time {
                    let known = observed.last_handshakes.get(public_key).copied();
                    let handshake = ObservedHandshake::update(known, reported, last_query, now);
                    observed.last_handshakes.insert(*public_key, handshake);
                }
                let (rx_before, tx_before) = observed.carried.get(public_key).copied().unwrap_or_default();
                Some(PeerStatus {
                    public_key: *public_key,
                    endpoint: info.config.endpoint,
                    handshake_age: observed
                        .last_handshakes
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
        // Setting the private key ends all sessions, so it is set only if it is different.
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
            for description in describe(peer) {
                update = update.add_peer(description);
            }
        }
        self.apply(update)?;
        self.peers.clone_from(&config.peers);
        let observed = self.observed.get_mut().unwrap_or_else(PoisonError::into_inner);
        let is_peer = |key: &PublicKey| config.peers.iter().any(|peer| peer.public_key == *key);
        observed.last_handshakes.retain(|key, _| is_peer(key));
        observed.carried.retain(|key, _| is_peer(key));
        Ok(())
    }

    fn rebind(&mut self, listen_port: u16, fwmark: u32) -> io::Result<()> {
        // The port is set first, by itself. In one request, the kernel would set the mark before it refuses the port.
        if listen_port != 0 {
            self.apply(control::DeviceUpdate::new().set_listen_port(listen_port))?;
        }
        self.apply(control::DeviceUpdate::new().set_fwmark(fwmark))
    }

    fn stop(&mut self) {}

    fn remove_interface_on_drop(&self) -> io::Result<bool> {
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_of_the_clock_does_not_move_handshakes() {
        let seconds = Duration::from_secs;
        let now = seconds(1000);
        // For the first observation, only the time of day is known.
        let first = ObservedHandshake::update(None, SystemTime::now() - seconds(60), None, now);
        assert!((seconds(939)..=seconds(941)).contains(&first.at), "{first:?}");
        // A known handshake keeps its time, whatever the time of day is now.
        let later = ObservedHandshake::update(Some(first), first.time_of_day, Some(now), now + seconds(500));
        assert_eq!(later.at, first.at);
        // A new one that seems to be old, because the clock was moved forward: it was after the last query.
        let jumped = SystemTime::now() - seconds(86_400);
        let second = ObservedHandshake::update(Some(first), jumped, Some(now + seconds(500)), now + seconds(510));
        assert_eq!(second.at, now + seconds(500));
        // One that seems to be in the future, because the clock was moved back: it is now.
        let ahead = SystemTime::now() + seconds(86_400);
        let third = ObservedHandshake::update(Some(second), ahead, Some(now + seconds(510)), now + seconds(520));
        assert_eq!(third.at, now + seconds(520));
    }
}
