//! The kernel's WireGuard, through the `wireguard-control` crate.
//!
//! The interface is made inside the tunnel's namespace by a netlink socket of the host's: the kernel remembers where it was
//! asked, and keeps the UDP socket there, so the encrypted packets leave by the host's routes though the interface never was
//! in the host's namespace.
//!
//! What the crate does not do: wipe the keys that pass through it, and keep them out of its error messages. Only the number
//! and the kind of its errors are therefore passed on.

use std::io;
use std::net::SocketAddr;

use ipnet::IpNet;
use wireguard_control as control;

use super::{Backend, Device, DeviceConfig, PeerConfig, PeerStatus};
use crate::keys::PublicKey;
use crate::linux::capabilities::CapabilitySet;
use crate::linux::link::Place;
use crate::linux::namespace::{NetworkNamespace, Resident};
use crate::linux::netlink::{Netlink, Request, RequestError};
use crate::names::InterfaceName;
use std::os::fd::AsFd;

/// How many AllowedIPs go into one description of a peer, so that it fits into one netlink message.
const ALLOWED_IPS_PER_MESSAGE: usize = 100;

/// A WireGuard interface of the kernel's.
#[derive(Debug)]
pub struct KernelDevice {
    /// The thread in the tunnel's namespace, from where alone the kernel lets the interface be seen.
    resident: Resident,
    control_name: control::InterfaceName,
    /// Each peer and its keepalive interval.
    peers: Vec<(PublicKey, Option<u16>)>,
}

/// Makes a WireGuard interface in `namespace` whose UDP socket will be in the namespace of `host`.
///
/// # Errors
/// `EOPNOTSUPP` if the kernel has no WireGuard.
pub fn make(host: &mut Netlink, namespace: &NetworkNamespace, name: &InterfaceName) -> Result<(), RequestError> {
    host.execute_one(Request::add_wireguard(name, Place::Namespace(namespace.as_fd())))
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
        let control_name = interface.as_str().parse().map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let peers = config.peers.iter().map(|peer| (peer.public_key, peer.persistent_keepalive)).collect();
        let device =
            KernelDevice { resident: Resident::start(namespace, CapabilitySet::NET_ADMIN)?, control_name, peers };
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

    fn apply(&self, update: control::DeviceUpdate) -> io::Result<()> {
        // The crate asks for the interface to be made first, in the namespace of the calling thread. It exists there, so this
        // does nothing; elsewhere it would make a second one.
        let name = self.control_name;
        self.resident.run(move || update.apply(&name, control::Backend::Kernel))?.map_err(without_text)
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
    if let Some(preshared) = &peer.preshared_key {
        first = first.set_preshared_key(control::Key(*preshared.as_bytes()));
    }
    if let Some(endpoint) = peer.endpoint {
        first = first.set_endpoint(endpoint);
    }
    if let Some(interval) = peer.persistent_keepalive {
        first = first.set_persistent_keepalive_interval(interval);
    }
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
        // A keepalive interval that becomes non-zero makes the kernel send a keepalive at once, and so begin a handshake
        // (set_peer() in drivers/net/wireguard/netlink.c). Nothing else does without a packet.
        let interval = self.peers.iter().find(|(key, _)| key == peer).and_then(|(_, interval)| *interval);
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
        let name = self.control_name;
        let device =
            self.resident.run(move || control::Device::get(&name, control::Backend::Kernel))?.map_err(without_text)?;
        Ok(self
            .peers
            .iter()
            .filter_map(|(public_key, _)| {
                let info = device.peers.iter().find(|info| info.config.public_key.0 == *public_key.as_bytes())?;
                Some(PeerStatus {
                    public_key: *public_key,
                    endpoint: info.config.endpoint,
                    handshake_age: info.stats.last_handshake_time.map(|time| time.elapsed().unwrap_or_default()),
                    rx_bytes: info.stats.rx_bytes,
                    tx_bytes: info.stats.tx_bytes,
                })
            })
            .collect())
    }
}
