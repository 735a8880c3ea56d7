//! The kernel's WireGuard, through the `wireguard-control` crate.
//!
//! The interface is made inside the tunnel's namespace by a netlink socket of the host's: the kernel remembers where it was
//! asked, and keeps the UDP socket there, so the encrypted packets leave by the host's routes though the interface never was
//! in the host's namespace.
//!
//! What the crate does not do: wipe the keys that pass through it, and keep them out of its error messages. Only the number
//! and the kind of its errors are therefore passed on.

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

/// How many AllowedIPs go into one description of a peer, so that it fits into one netlink message.
const ALLOWED_IPS_PER_MESSAGE: usize = 100;

/// How long after its handshake a session may be used (REJECT_AFTER_TIME of the WireGuard paper, section 6.1).
const SESSION: Duration = Duration::from_secs(180);

/// A WireGuard interface of the kernel's.
#[derive(Debug)]
pub struct KernelDevice {
    /// The thread in the tunnel's namespace, from where alone the kernel lets the interface be seen.
    resident: NamespaceThread,
    control_name: control::InterfaceName,
    /// The peers as they were configured. Where they are is the kernel's to know.
    peers: Vec<PeerConfig>,
    /// What is known of them that the kernel does not say, or has forgotten.
    seen: Mutex<Sightings>,
}

/// What was seen of the peers.
#[derive(Debug, Default)]
struct Sightings {
    last_of: HashMap<PublicKey, Sighting>,
    /// The bytes received from and sent to each peer that was made anew, until then.
    carried: HashMap<PublicKey, (u64, u64)>,
    /// When the device was last looked at, since boot.
    looked_at: Option<Duration>,
}

/// When a handshake was, as it was seen: the kernel says at which time of day, which may jump.
#[derive(Clone, Copy, Debug)]
struct Sighting {
    time_of_day: SystemTime,
    /// Since boot.
    at: Duration,
}

impl Sighting {
    /// Takes note of what the kernel says now. What it has said before was at the time when it was first seen. What is new has been since
    /// the last look, if there was one, whatever the time of day says.
    fn update(before: Option<Self>, said: SystemTime, last_look: Option<Duration>, now: Duration) -> Self {
        match before {
            Some(before) if before.time_of_day == said => before,
            _ => {
                let age = said.elapsed().unwrap_or_default();
                let at = now.saturating_sub(age).max(last_look.unwrap_or_default());
                Self { time_of_day: said, at }
            }
        }
    }
}

/// Makes a WireGuard interface in `namespace` whose UDP socket will be in the namespace of `host`.
///
/// # Errors
/// `EOPNOTSUPP` if the kernel has no WireGuard.
pub fn make(host: &mut Netlink, namespace: &NetworkNamespace, name: &InterfaceName) -> Result<(), NetlinkError> {
    host.execute_one(NetlinkRequest::add_wireguard(name, TargetNamespace::Other(namespace.as_fd())))
}

impl KernelDevice {
    /// Configures the interface that [`make`] has made.
    ///
    /// # Errors
    /// What the kernel refuses, without the text of the request: it holds keys.
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

    /// Takes over an interface that is configured, as it stands.
    ///
    /// # Errors
    /// `InvalidData` if its key or its peers are not those of `config`.
    pub fn attach(
        namespace: NetworkNamespace,
        interface: &InterfaceName,
        config: &DeviceConfig,
    ) -> io::Result<KernelDevice> {
        let device = Self::open(namespace, interface, config)?;
        let found = device.read()?;
        let own = found.public_key.map(|key| key.0);
        if own != Some(*config.private_key.public_key().as_bytes()) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "its key is another tunnel's"));
        }
        Ok(device)
    }

    fn open(namespace: NetworkNamespace, interface: &InterfaceName, config: &DeviceConfig) -> io::Result<KernelDevice> {
        Ok(KernelDevice {
            resident: NamespaceThread::start(namespace, CapabilitySet::NET_ADMIN)?,
            control_name: interface.as_str().parse().map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?,
            peers: config.peers.clone(),
            seen: Mutex::default(),
        })
    }

    fn read(&self) -> io::Result<control::Device> {
        let name = self.control_name;
        self.resident.run(move || control::Device::get(&name, control::Backend::Kernel))?.map_err(without_text)
    }

    fn apply(&self, update: control::DeviceUpdate) -> io::Result<()> {
        // The crate asks for the interface to be made first, in the namespace of the calling thread. It exists there, so this
        // does nothing; elsewhere it would make a second one.
        let name = self.control_name;
        self.resident.run(move || update.apply(&name, control::Backend::Kernel))?.map_err(without_text)
    }

    /// Whether the kernel may have a session with a peer, by the last handshake.
    fn has_session(&self, peer: &PublicKey, found: &control::PeerInfo) -> bool {
        let Some(said) = found.stats.last_handshake_time else { return false };
        let (now, mut seen) = (boot_time(), self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        let sighting = Sighting::update(seen.last_of.get(peer).copied(), said, seen.looked_at, now);
        seen.last_of.insert(*peer, sighting);
        now.saturating_sub(sighting.at) < SESSION
    }

    /// Has the kernel forget a peer's session, which it would use in place of a handshake: the peer is taken out and put back in one
    /// request. Nothing else does that but to take the interface down, and with it its routes.
    fn renew(&self, peer: &PeerConfig, found: &control::PeerInfo) -> io::Result<()> {
        let others = self.peers.iter().skip_while(|other| other.public_key != peer.public_key).skip(1);
        let taken: HashSet<&IpNet> = others.flat_map(|other| &other.allowed_ips).collect();
        // Of peers with the same network, the last one has it.
        let allowed_ips = peer.allowed_ips.iter().filter(|net| !taken.contains(net)).copied().collect();
        let again =
            PeerConfig { allowed_ips, endpoint: found.config.endpoint, persistent_keepalive: None, ..peer.clone() };
        let mut update = control::DeviceUpdate::new().remove_peer_by_key(&found.config.public_key);
        for description in describe(&again) {
            update = update.add_peer(description);
        }
        self.apply(update)?;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let carried = seen.carried.entry(peer.public_key).or_default();
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

/// A peer as one or more descriptions, each small enough for a message. The first replaces what there was.
fn describe(peer: &PeerConfig) -> Vec<control::PeerConfigBuilder> {
    let key = control::Key(*peer.public_key.as_bytes());
    let mut first = control::PeerConfigBuilder::new(&key).replace_allowed_ips();
    // A key of zeros is none, and takes away the one that there was.
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

/// An error without its text, which may hold the request with its keys.
fn without_text(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => io::Error::new(error.kind(), "the kernel's WireGuard could not be configured"),
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
        // A keepalive interval that becomes non-zero makes the kernel send a keepalive at once, and so, without a session, begin a
        // handshake (set_peer() in drivers/net/wireguard/netlink.c). Nothing else does without a packet.
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
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let last_look = seen.looked_at.replace(now);
        Ok(self
            .peers
            .iter()
            .filter_map(|PeerConfig { public_key, .. }| {
                let info = device.peers.iter().find(|info| info.config.public_key.0 == *public_key.as_bytes())?;
                if let Some(said) = info.stats.last_handshake_time {
                    let sighting = Sighting::update(seen.last_of.get(public_key).copied(), said, last_look, now);
                    seen.last_of.insert(*public_key, sighting);
                }
                let (rx_before, tx_before) = seen.carried.get(public_key).copied().unwrap_or_default();
                Some(PeerStatus {
                    public_key: *public_key,
                    endpoint: info.config.endpoint,
                    handshake_age: seen.last_of.get(public_key).map(|sighting| now.saturating_sub(sighting.at)),
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
        // Setting a key ends all sessions, so it is set only where it is another.
        if found.public_key.map(|key| key.0) != Some(*config.private_key.public_key().as_bytes()) {
            update = update.set_private_key(control::Key(*config.private_key.as_bytes()));
        }
        for peer in &found.peers {
            let key = &peer.config.public_key;
            if !config.peers.iter().any(|wanted| *wanted.public_key.as_bytes() == key.0) {
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
        let seen = self.seen.get_mut().unwrap_or_else(PoisonError::into_inner);
        let is_peer = |key: &PublicKey| config.peers.iter().any(|peer| peer.public_key == *key);
        seen.last_of.retain(|key, _| is_peer(key));
        seen.carried.retain(|key, _| is_peer(key));
        Ok(())
    }

    fn rebind(&mut self, listen_port: u16, fwmark: u32) -> io::Result<()> {
        // The port first, by itself: the kernel would have set the mark already when the port is refused.
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
    fn a_clock_that_jumps_moves_no_handshake() {
        let seconds = Duration::from_secs;
        let now = seconds(1000);
        // Seen for the first time, the time of day is all there is.
        let first = Sighting::update(None, SystemTime::now() - seconds(60), None, now);
        assert!((seconds(939)..=seconds(941)).contains(&first.at), "{first:?}");
        // It is when it was, whatever the time of day is by now.
        let later = Sighting::update(Some(first), first.time_of_day, Some(now), now + seconds(500));
        assert_eq!(later.at, first.at);
        // Another one, long ago by a clock that was put forward since: it was after the last look.
        let jumped = SystemTime::now() - seconds(86_400);
        let second = Sighting::update(Some(first), jumped, Some(now + seconds(500)), now + seconds(510));
        assert_eq!(second.at, now + seconds(500));
        // One in the future by a clock that was put back is now.
        let ahead = SystemTime::now() + seconds(86_400);
        let third = Sighting::update(Some(second), ahead, Some(now + seconds(510)), now + seconds(520));
        assert_eq!(third.at, now + seconds(520));
    }
}
