//! WireGuard itself: one trait, two implementations. Knows nothing of files, plans or namespaces.

use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;
use serde::Serialize;

use crate::keys::{PresharedKey, PrivateKey, PublicKey};

pub mod kernel;
pub mod userspace;

/// Which implementation a device is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The kernel's module.
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

/// What a WireGuard device is made from.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// The device's key.
    pub private_key: PrivateKey,
    /// The UDP port to listen on; 0: any free one.
    pub listen_port: u16,
    /// The mark of the encrypted packets (`SO_MARK`, socket(7)); 0: none.
    pub fwmark: u32,
    /// The interface's MTU in bytes, beyond which no packet is padded; 0: not known.
    pub mtu: u32,
    /// The peers, no two with the same public key.
    pub peers: Vec<PeerConfig>,
}

/// What a peer of a WireGuard device is made from.
#[derive(Clone, Debug)]
pub struct PeerConfig {
    /// The peer's key, and its name.
    pub public_key: PublicKey,
    /// The key shared besides.
    pub preshared_key: Option<PresharedKey>,
    /// Which inner addresses are sent to this peer, and accepted from it. Longest prefix first wins among peers.
    pub allowed_ips: Vec<IpNet>,
    /// Seconds between keepalives that are sent whether or not there is traffic.
    pub persistent_keepalive: Option<u16>,
    /// Where the peer is, if that is known yet.
    pub endpoint: Option<SocketAddr>,
}

/// What a peer is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerStatus {
    /// The peer's key.
    pub public_key: PublicKey,
    /// Where its packets come from or go to.
    pub endpoint: Option<SocketAddr>,
    /// How long ago the last handshake was completed.
    pub handshake_age: Option<Duration>,
    /// Bytes received from it, encrypted.
    pub rx_bytes: u64,
    /// Bytes sent to it, encrypted.
    pub tx_bytes: u64,
    /// For how long handshakes were begun that nobody has answered, from 5 s on. The kernel's device does not tell.
    pub unanswered_for: Option<Duration>,
}

/// A living WireGuard device. Dropping it ends an embedded one, whose interface may stay; the kernel's lives on until its namespace
/// ends.
pub trait Device: Send {
    /// Which implementation it is of.
    fn backend(&self) -> Backend;

    /// Points a peer at an endpoint, and forgets the former one.
    fn set_endpoint(&self, peer: &PublicKey, endpoint: SocketAddr) -> std::io::Result<()>;

    /// Begins a handshake with a peer now, as if there were a packet for it. No error if the peer has no endpoint yet.
    fn initiate_handshake(&self, peer: &PublicKey) -> std::io::Result<()>;

    /// What each peer is doing, in the order of [`DeviceConfig::peers`].
    fn peers(&self) -> std::io::Result<Vec<PeerStatus>>;

    /// Becomes what a configuration says: the private key, the peers, their preshared keys, AllowedIPs and keepalives. A peer whose keys
    /// are the same goes on with its session. Endpoints, the port and the mark stay as they are.
    ///
    /// # Errors
    /// If no device can be made from it. An embedded one is then as it was.
    fn reconfigure(&mut self, config: &DeviceConfig) -> std::io::Result<()>;

    /// Takes another UDP port (0: any, so the one it has will do) and another mark.
    ///
    /// # Errors
    /// `EADDRINUSE` if the port is taken. Then nothing has changed.
    fn rebind(&mut self, listen_port: u16, fwmark: u32) -> std::io::Result<()>;

    /// Has the interface end when this is dropped, instead of waiting for a successor. False if it stays all the same: the kernel's is
    /// a link as any other.
    fn take_interface_along(&self) -> std::io::Result<bool>;
}
