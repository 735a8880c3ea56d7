//! WireGuard devices: one trait, two implementations. This module knows nothing of files, plans or namespaces.
//!
//! - `kernel`: the kernel's WireGuard.
//! - `userspace`: the WireGuard that is embedded in vpn-exec.

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
    /// The kernel's: [`kernel`].
    Kernel,
    /// The embedded one: [`userspace`].
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

/// The configuration of a WireGuard device.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// The device's private key.
    pub private_key: PrivateKey,
    /// The UDP port to listen on; 0: any free port.
    pub listen_port: u16,
    /// The firewall mark of the encrypted packets (`SO_MARK`, socket(7)); 0: none.
    pub fwmark: u32,
    /// The interface's MTU in bytes, beyond which packets are not padded; 0: unknown.
    pub mtu: u32,
    /// The peers; all public keys are different.
    pub peers: Vec<PeerConfig>,
}

/// The configuration of a peer.
#[derive(Clone, Debug)]
pub struct PeerConfig {
    /// The peer's public key, which identifies it.
    pub public_key: PublicKey,
    /// The preshared key.
    pub preshared_key: Option<PresharedKey>,
    /// The networks that are routed to this peer, and whose packets are accepted from it. The longest prefix decides
    /// among peers.
    pub allowed_ips: Vec<IpNet>,
    /// The seconds between persistent keepalives.
    pub persistent_keepalive: Option<u16>,
    /// The peer's endpoint, if it is known yet.
    pub endpoint: Option<SocketAddr>,
}

/// The status of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerStatus {
    /// The peer's public key.
    pub public_key: PublicKey,
    /// The endpoint that its packets come from or go to.
    pub endpoint: Option<SocketAddr>,
    /// The time since the last completed handshake.
    pub handshake_age: Option<Duration>,
    /// The encrypted bytes received from it.
    pub rx_bytes: u64,
    /// The encrypted bytes sent to it.
    pub tx_bytes: u64,
    /// How long the peer has not answered handshakes; `None` below 5 s. The kernel's device does not report it.
    pub unanswered_for: Option<Duration>,
}

/// A running WireGuard device. Dropping it stops an embedded device, whose interface may stay. A device of the kernel
/// exists until its namespace ends.
pub trait Device: Send {
    /// Returns the device's implementation.
    fn backend(&self) -> Backend;

    /// Replaces the endpoint of a peer.
    ///
    /// # Errors
    ///
    /// Returns an error if the device has ended or does not have the peer.
    fn set_endpoint(&self, peer: &PublicKey, endpoint: SocketAddr) -> std::io::Result<()>;

    /// Begins a handshake with a peer now, as if there were a packet for it. A peer without an endpoint is no error.
    ///
    /// # Errors
    ///
    /// Returns an error if the device has ended or does not have the peer.
    fn initiate_handshake(&self, peer: &PublicKey) -> std::io::Result<()>;

    /// Returns the status of each peer, in the order of [`DeviceConfig::peers`].
    ///
    /// # Errors
    ///
    /// Returns an error if the device has ended.
    fn peers(&self) -> std::io::Result<Vec<PeerStatus>>;

    /// Applies another configuration: the private key, the peers, their preshared keys, AllowedIPs and keepalives. A
    /// peer whose keys are unchanged keeps its session. Endpoints, the port and the mark stay as they are.
    ///
    /// # Errors
    ///
    /// Returns an error if the configuration is not valid. An embedded device is then unchanged.
    fn reconfigure(&mut self, config: &DeviceConfig) -> std::io::Result<()>;

    /// Changes the UDP port and the mark. Port 0 means any port, so the device keeps the one it has.
    ///
    /// # Errors
    ///
    /// Returns `EADDRINUSE` if the port is in use. The device is then unchanged.
    fn rebind(&mut self, listen_port: u16, fwmark: u32) -> std::io::Result<()>;

    /// Makes the interface end when the device is dropped, instead of staying for a successor. Returns false if it
    /// stays nevertheless: an interface of the kernel exists independently of this process.
    ///
    /// # Errors
    ///
    /// Returns an error if the kernel refuses it.
    fn take_interface_along(&self) -> std::io::Result<bool>;
}
