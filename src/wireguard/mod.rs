//! WireGuard devices: one trait with two implementations. They know nothing of configuration files and plans.

use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;
use serde::Serialize;

use crate::keys::{PresharedKey, PrivateKey, PublicKey};

pub mod kernel;
pub mod userspace;

/// The implementation of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The kernel's module.
    Kernel,
    /// The embedded implementation, [`userspace`].
    Userspace,
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Backend::Kernel => "kernel",
            Backend::Userspace => "userspace",
        })
    }
}

/// The configuration of a device.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// The private key of the device.
    pub private_key: PrivateKey,
    /// The UDP port to listen on. 0 means any free port.
    pub listen_port: u16,
    /// The mark of the encrypted packets (`SO_MARK` of socket(7)). 0 means none.
    pub fwmark: u32,
    /// The MTU of the interface in bytes, up to which packets are padded. 0 means unknown.
    pub mtu: u32,
    /// The peers, which have different public keys.
    pub peers: Vec<PeerConfig>,
}

/// The configuration of a peer.
#[derive(Clone, Debug)]
pub struct PeerConfig {
    /// The public key, which identifies the peer.
    pub public_key: PublicKey,
    /// The preshared key.
    pub preshared_key: Option<PresharedKey>,
    /// The inner addresses that are sent to this peer and accepted from it. Among peers, the longest prefix wins.
    pub allowed_ips: Vec<IpNet>,
    /// The interval of persistent keepalives in seconds.
    pub persistent_keepalive: Option<u16>,
    /// The endpoint, if it is known yet.
    pub endpoint: Option<SocketAddr>,
}

/// The status of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerStatus {
    /// The public key of the peer.
    pub public_key: PublicKey,
    /// The current endpoint.
    pub endpoint: Option<SocketAddr>,
    /// The time since the last completed handshake.
    pub handshake_age: Option<Duration>,
    /// The number of encrypted bytes received from the peer.
    pub rx_bytes: u64,
    /// The number of encrypted bytes sent to the peer.
    pub tx_bytes: u64,
    /// The time since the first handshake that the peer has not answered, from 5 s on. The kernel's device does not
    /// report it.
    pub unanswered_for: Option<Duration>,
}

/// A running WireGuard device.
///
/// Dropping it ends an embedded device, whose interface may stay. A device of the kernel lives until its namespace
/// ends.
pub trait Device: Send {
    /// Returns the implementation of the device.
    fn backend(&self) -> Backend;

    /// Replaces the endpoint of a peer.
    ///
    /// # Errors
    /// Fails if the device has no such peer, or has ended.
    fn set_endpoint(&self, peer: &PublicKey, endpoint: SocketAddr) -> std::io::Result<()>;

    /// Starts a handshake with a peer now, as a packet for it would. Does nothing if the peer has no endpoint yet.
    ///
    /// # Errors
    /// Fails if the device has no such peer, or has ended.
    fn initiate_handshake(&self, peer: &PublicKey) -> std::io::Result<()>;

    /// Returns the status of each peer, in the order of [`DeviceConfig::peers`].
    ///
    /// # Errors
    /// Fails if the device has ended.
    fn peers(&self) -> std::io::Result<Vec<PeerStatus>>;

    /// Applies a configuration: the private key, the peers, their preshared keys, AllowedIPs and keepalives. A peer
    /// whose keys are the same keeps its session. Endpoints, the port and the mark stay as they are.
    ///
    /// # Errors
    /// Fails if the configuration is invalid. An embedded device is unchanged then.
    fn reconfigure(&mut self, config: &DeviceConfig) -> std::io::Result<()>;

    /// Replaces the UDP port and the mark. Port 0 means any port, so the device keeps its own.
    ///
    /// # Errors
    /// Fails with `EADDRINUSE` if the port is taken. Then nothing has changed.
    fn rebind(&mut self, listen_port: u16, fwmark: u32) -> std::io::Result<()>;

    /// Stops sending and receiving, and frees the UDP port. The interface stays. The kernel's device does nothing: its
    /// port becomes free with the interface.
    fn stop(&mut self);

    /// Makes the interface end with this value, instead of waiting for a successor. Returns false for the kernel's
    /// device, whose interface stays in any case.
    ///
    /// # Errors
    /// Fails if the interface is gone already.
    fn remove_interface_on_drop(&self) -> std::io::Result<bool>;
}
