//! The user's configuration: the provider's `wg-quick` file and the TOML profile, parsed and checked.
//!
//! Nothing here reads a file or asks the system: the parsers get text, and return a value or all diagnostics of the
//! file.

pub mod capability;
pub mod diagnostic;
mod difference;
pub mod dns_for;
mod fragment;
pub mod host_access;
pub mod listen_addresses;
mod mtu;
pub mod network;
pub mod ports;
pub mod profile;
mod redact;
mod stray_character;
mod value;
pub mod wg_quick;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use difference::{Difference, difference};
pub use dns_for::{Domain, DomainResolvers};
pub use host_access::{Buses, DbusAccess, SessionBus};
pub use mtu::{Mtu, MtuSource, parse_mtu};
pub use ports::{HostPort, OpenPorts, Protocol, ProxyProtocol, Publish};

use crate::keys::{PresharedKey, PrivateKey, PublicKey};
use crate::names::TunnelName;

/// The maximum size of a configuration file in bytes: 1 MiB. Typical files have a few hundred bytes.
pub const MAX_BYTES: usize = 1 << 20;

/// The merged settings of a tunnel and its program, from the `wg-quick` file, the profile and the command line.
#[derive(Clone, Debug)]
pub struct Config {
    /// The tunnel's name.
    pub name: TunnelName,
    /// The `wg-quick` file.
    pub wireguard: WgQuick,
    /// The WireGuard implementation to use.
    pub backend: BackendChoice,
    /// The MTU of the WireGuard interface. Overrides that of the file.
    pub mtu: Option<Mtu>,
    /// Resolvers, search domains and resolver options.
    pub dns: Dns,
    /// Networks and ports that are reached through the host instead of the tunnel.
    pub local: Local,
    /// Ports that accept inbound connections from the tunnel.
    pub open: Vec<OpenPorts>,
    /// Whether to run the hooks of the `wg-quick` file (`--allow-hooks`).
    pub allow_hooks: bool,
    /// The identity and privileges of the program.
    pub program: ProgramOptions,
}

impl Config {
    /// Creates a configuration from a `wg-quick` file alone, with the defaults for everything else.
    pub fn new(name: TunnelName, wireguard: WgQuick) -> Self {
        Self {
            name,
            wireguard,
            backend: BackendChoice::default(),
            mtu: None,
            dns: Dns::default(),
            local: Local::default(),
            open: Vec::new(),
            allow_hooks: false,
            program: ProgramOptions::default(),
        }
    }

    /// Returns the configured MTU: that of the command line, else of the profile, else of the file.
    pub fn mtu(&self) -> Option<Mtu> {
        let from_file = self.wireguard.interface.mtu.map(|bytes| Mtu { bytes, source: MtuSource::File });
        self.mtu.or(from_file)
    }

    /// Returns the ports on the host that a tunnel with this configuration listens on.
    pub fn listened_ports(&self) -> impl Iterator<Item = u16> {
        let published = self.local.publish.iter().map(|port| port.host_port);
        let host_ports = self.local.host_ports.iter().map(|port| port.port);
        self.wireguard.interface.listen_port.into_iter().chain(published).chain(host_ports)
    }
}

/// The choice of a WireGuard implementation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum BackendChoice {
    /// The kernel's if it has WireGuard, else the embedded one.
    #[default]
    Auto,
    /// The kernel's.
    Kernel,
    /// The embedded one, which needs only `/dev/net/tun`.
    Userspace,
}

/// A parsed `wg-quick` file: see wg-quick(8) and wg(8).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WgQuick {
    /// The `[Interface]` sections, merged.
    pub interface: Interface,
    /// The `[Peer]` sections in order. Those with the same public key are merged.
    pub peers: Vec<Peer>,
}

/// The `[Interface]` section of a [`WgQuick`] file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// `PrivateKey`.
    pub private_key: Option<PrivateKey>,
    /// `ListenPort`; 0 and `None` both mean any free port.
    pub listen_port: Option<u16>,
    /// `FwMark`: the mark of encrypted packets; `off` is 0.
    pub fwmark: Option<u32>,
    /// `Address`, of all lines, with host parts.
    pub addresses: Vec<IpNet>,
    /// The addresses in `DNS`, of all lines: resolvers.
    pub dns_servers: Vec<IpAddr>,
    /// The other words in `DNS`, of all lines: search domains.
    pub dns_search: Vec<String>,
    /// `MTU` in bytes.
    pub mtu: Option<u32>,
    /// `Table`. Ignored, because the tunnel has a routing table of its own in its namespace.
    pub table: Option<String>,
    /// `SaveConfig`. Ignored: vpn-exec never writes to the user's files.
    pub save_config: Option<bool>,
    /// `PreUp`, `PostUp`, `PreDown` and `PostDown`, in order.
    pub hooks: Vec<Hook>,
}

/// A shell command in the `wg-quick` file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// When `wg-quick` runs it.
    pub kind: HookKind,
    /// The command.
    pub command: String,
}

/// The time when `wg-quick` runs a [`Hook`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum HookKind {
    /// Before the interface is up.
    PreUp,
    /// After the interface is up.
    PostUp,
    /// Before the interface is down.
    PreDown,
    /// After the interface is down.
    PostDown,
}

impl fmt::Display for HookKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HookKind::PreUp => "PreUp",
            HookKind::PostUp => "PostUp",
            HookKind::PreDown => "PreDown",
            HookKind::PostDown => "PostDown",
        })
    }
}

/// A `[Peer]` section of a [`WgQuick`] file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// `PublicKey`.
    pub public_key: PublicKey,
    /// `PresharedKey`.
    pub preshared_key: Option<PresharedKey>,
    /// `AllowedIPs`, of all lines, in order, without host parts and repetitions.
    pub allowed_ips: Vec<IpNet>,
    /// `Endpoint`.
    pub endpoint: Option<Endpoint>,
    /// `PersistentKeepalive` in seconds; `off` and 0 are `None`.
    pub persistent_keepalive: Option<u16>,
}

/// The address of a peer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// An IP address and a port.
    Address {
        /// The address and the port. A numeric zone is its scope ID.
        address: SocketAddr,
        /// The zone of a link-local IPv6 address, if it is a name such as `eth0`. Only the host knows its number.
        zone: Option<String>,
    },
    /// A host name and a port. The name is resolved in the host's namespace.
    Name {
        /// The host name.
        host: String,
        /// The UDP port.
        port: u16,
    },
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Address { address, zone: None } => write!(f, "{address}"),
            Endpoint::Address { address, zone: Some(zone) } => {
                write!(f, "[{}%{zone}]:{}", address.ip(), address.port())
            }
            Endpoint::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// The settings of name resolution in the tunnel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// The addresses of the resolvers. `None`: those of the `wg-quick` file.
    pub servers: Option<Vec<IpAddr>>,
    /// The search domains. `None`: those of the `wg-quick` file.
    pub search: Option<Vec<String>>,
    /// Options of resolv.conf(5), such as `edns0`.
    pub options: Vec<String>,
    /// Domains whose names have resolvers of their own; each domain once.
    #[serde(default)]
    pub domains: Vec<DomainResolvers>,
}

/// The networks and ports that are reached through the host instead of the tunnel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Local {
    /// Networks that the program reaches through the host.
    pub networks: Vec<IpNet>,
    /// Whether to add the private networks that the host is attached to.
    pub lan: bool,
    /// Ports of the host that are forwarded to the program.
    pub publish: Vec<Publish>,
    /// Ports of the host's loopback interface that the program reaches.
    #[serde(default)]
    pub host_ports: Vec<HostPort>,
}

impl Local {
    /// Returns whether networks are reached through the host, if it is attached to any.
    pub fn has_networks(&self) -> bool {
        self.lan || !self.networks.is_empty()
    }
}

/// The identity and privileges of the program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProgramOptions {
    /// A user name or ID.
    pub user: Option<String>,
    /// A group name or ID.
    pub group: Option<String>,
    /// The capabilities to keep, such as `CAP_NET_RAW` or `net_raw`. All others are dropped.
    pub capabilities: Vec<String>,
    /// Whether the program may gain privileges from set-user-ID programs (no `no_new_privs`).
    pub new_privileges: bool,
    /// The message buses of the host that the program can reach.
    pub buses: Buses,
    /// The unix sockets of the host that the program can connect to, besides the default ones. Each is a path, which
    /// may end with `*`, or `any`.
    pub sockets: Vec<String>,
}

/// A parsed profile, `/etc/vpn-exec/NAME.toml`. A `None` means the default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// The path of the `wg-quick` file. It is relative to the profile's directory. `~/` at its beginning is the home
    /// directory of root in a profile of the machine, and of the user in a user's profile.
    pub wireguard: PathBuf,
    /// The WireGuard implementation to use.
    pub backend: BackendChoice,
    /// The MTU of the WireGuard interface in bytes. `None`: that of the file, else computed.
    pub mtu: Option<u32>,
    /// The settings of name resolution.
    pub dns: Dns,
    /// The networks and ports that are reached through the host.
    pub local: Local,
    /// Ports that accept inbound connections from the tunnel.
    pub open: Vec<OpenPorts>,
    /// The identity and privileges of the program.
    pub program: ProgramOptions,
    /// How long to wait for the first handshake before the program starts. `None`: not at all.
    pub wait: Option<Duration>,
    /// Whether the tunnel is for containers: users who may create containers may use it.
    pub containers: bool,
}
