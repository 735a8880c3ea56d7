//! What the user asked for: the provider's `wg-quick` file and the TOML profile, parsed and checked. Touches nothing but
//! the text that it is handed.

pub mod capability;
pub mod diagnostic;
mod difference;
mod fragment;
pub mod host_access;
mod mtu;
pub mod network;
pub mod ports;
pub mod profile;
mod redact;
mod stray_character;
pub mod wg_quick;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use difference::{Difference, difference};
pub use host_access::{Buses, SessionBus};
pub use mtu::{Mtu, MtuSource, parse_mtu};

use crate::keys::{PresharedKey, PrivateKey, PublicKey};
use crate::names::TunnelName;

/// The most bytes that a configuration may have: 1 MiB. Real ones have a few hundred.
pub const MAX_BYTES: usize = 1 << 20;

/// All that a tunnel and the program inside are made from: the `wg-quick` file, the profile and the command line, merged.
#[derive(Clone, Debug)]
pub struct Config {
    /// The tunnel's name.
    pub name: TunnelName,
    /// The `wg-quick` file.
    pub wireguard: WgQuick,
    /// Which implementation of WireGuard to use.
    pub backend: BackendChoice,
    /// The MTU of WireGuard's interface, instead of the file's.
    pub mtu: Option<Mtu>,
    /// Names: resolvers, search domains, options.
    pub dns: Dns,
    /// What is reached through the host instead of the tunnel.
    pub local: Local,
    /// What is open to those who reach the tunnel's address.
    pub open: Vec<OpenPorts>,
    /// Whether to run the hooks of the `wg-quick` file (`--allow-hooks`).
    pub allow_hooks: bool,
    /// Under what identity and with which capabilities the program runs.
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

    /// The MTU that was set: by the command line, else by the profile, else by the file.
    pub fn mtu(&self) -> Option<Mtu> {
        let of_file = self.wireguard.interface.mtu.map(|bytes| Mtu { bytes, source: MtuSource::File });
        self.mtu.or(of_file)
    }

    /// The ports of the host that are listened on.
    pub fn listened_ports(&self) -> impl Iterator<Item = u16> {
        let published = self.local.publish.iter().map(|port| port.host_port);
        let host_ports = self.local.host_ports.iter().map(|port| port.port);
        self.wireguard.interface.listen_port.into_iter().chain(published).chain(host_ports)
    }
}

/// Which implementation of WireGuard to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum BackendChoice {
    /// The kernel's if it has WireGuard, else the embedded one.
    #[default]
    Auto,
    /// The kernel's.
    Kernel,
    /// The embedded one, which needs no more than `/dev/net/tun`.
    Userspace,
}

/// A `wg-quick` file: see wg-quick(8) and wg(8).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WgQuick {
    /// The `[Interface]` sections, merged.
    pub interface: Interface,
    /// The `[Peer]` sections, in order, those of one public key merged.
    pub peers: Vec<Peer>,
}

/// The `[Interface]` section of a [`WgQuick`] file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// `PrivateKey`.
    pub private_key: Option<PrivateKey>,
    /// `ListenPort`; 0 and absent both mean any free port.
    pub listen_port: Option<u16>,
    /// `FwMark`: the mark of the encrypted packets; `off` is 0.
    pub fwmark: Option<u32>,
    /// `Address`, of all lines. The host part is kept.
    pub addresses: Vec<IpNet>,
    /// `DNS`, of all lines: those that are addresses.
    pub dns_servers: Vec<IpAddr>,
    /// `DNS`, of all lines: those that are not addresses, so search domains.
    pub dns_search: Vec<String>,
    /// `MTU`.
    pub mtu: Option<u32>,
    /// `Table`, which has no meaning in a namespace of its own.
    pub table: Option<String>,
    /// `SaveConfig`, which is never honoured: vpn-exec writes to no file of the user's.
    pub save_config: Option<bool>,
    /// `PreUp`, `PostUp`, `PreDown` and `PostDown`, in order.
    pub hooks: Vec<Hook>,
}

/// A command in the `wg-quick` file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// When `wg-quick` would run it.
    pub kind: HookKind,
    /// The shell command.
    pub command: String,
}

/// When `wg-quick` would run a [`Hook`].
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
    /// `AllowedIPs`, of all lines, host parts cut off, in order and without repetition.
    pub allowed_ips: Vec<IpNet>,
    /// `Endpoint`.
    pub endpoint: Option<Endpoint>,
    /// `PersistentKeepalive` in seconds; `off` and 0 are `None`.
    pub persistent_keepalive: Option<u16>,
}

/// Where a peer is reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// An address and a port, with the zone of a link-local IPv6 address kept apart, since only the host knows its number.
    Address {
        /// The address and the port; a numeric zone is in its scope id.
        address: SocketAddr,
        /// A zone by name, such as `eth0`.
        zone: Option<String>,
    },
    /// A host name and a port, to be resolved in the host's namespace.
    Name {
        /// The host's name.
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

/// How names are resolved inside. `None` of servers: those of the `wg-quick` file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// The resolvers' addresses.
    pub servers: Option<Vec<IpAddr>>,
    /// The search domains. `None`: those of the `wg-quick` file.
    pub search: Option<Vec<String>>,
    /// Options of resolv.conf(5), such as `edns0`.
    pub options: Vec<String>,
}

/// What is reached through the host instead of the tunnel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Local {
    /// Networks beyond the host.
    pub networks: Vec<IpNet>,
    /// Whether those that the host itself is attached to are among them, as far as they are private.
    pub lan: bool,
    /// Ports of the host that lead to the program.
    pub publish: Vec<Publish>,
    /// Ports of the host's loopback that the program reaches.
    #[serde(default)]
    pub host_ports: Vec<HostPort>,
}

/// A port of the host that leads to a port inside.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Publish {
    /// The host's address to listen on; `None`: all.
    pub address: Option<IpAddr>,
    /// The port on the host.
    pub host_port: u16,
    /// The port inside.
    pub inner_port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// How the program is told who its client is. Of TCP only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
}

/// How a program is told who its client is, before anything that the client says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProxyProtocol {
    /// By a header of HAProxy's PROXY protocol, version 2.
    V2,
}

impl fmt::Display for Publish {
    /// As it is written in a profile, but always with its protocol.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            None => {}
        }
        write!(f, "{}:{}/{}", self.host_port, self.inner_port, self.protocol)?;
        match self.proxy_protocol {
            Some(ProxyProtocol::V2) => f.write_str(",proxy-protocol=v2"),
            None => Ok(()),
        }
    }
}

/// A port of the host's loopback that the program reaches at the host's address on the link, `host.internal`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HostPort {
    /// The port, there and here.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
}

impl fmt::Display for HostPort {
    /// As it is written in a profile, but always with its protocol.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.port, self.protocol)
    }
}

/// Ports that are open inside to what comes through the tunnel, such as those that a provider forwards.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct OpenPorts {
    /// The first.
    pub first: u16,
    /// The last, which may be the first.
    pub last: u16,
    /// TCP or UDP; `None`: both.
    pub protocol: Option<Protocol>,
}

impl fmt::Display for OpenPorts {
    /// As it is written in a profile.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, last, protocol } = self;
        write!(f, "{first}")?;
        if last != first {
            write!(f, "-{last}")?;
        }
        match protocol {
            Some(protocol) => write!(f, "/{protocol}"),
            None => Ok(()),
        }
    }
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// Under what identity and with which capabilities the program runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProgramOptions {
    /// A user's name or number.
    pub user: Option<String>,
    /// A group's name or number.
    pub group: Option<String>,
    /// Capabilities kept, as `CAP_NET_RAW` or `net_raw`; all others are dropped.
    pub capabilities: Vec<String>,
    /// Whether the program may gain privileges by set-user-ID programs (no `no_new_privs`).
    pub new_privileges: bool,
    /// Which message buses of the host's the program can reach.
    pub buses: Buses,
    /// The unix sockets of the host that it can connect to, besides those that are open by default: paths, which may end with `*`, or
    /// `any`.
    pub sockets: Vec<String>,
}

/// Which message buses of the host's a service can reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DbusAccess {
    /// Its user's own alone.
    #[default]
    Session,
    /// The system's, too, by which it can have systemd-resolved, Avahi or NetworkManager look names up, past the tunnel.
    System,
}

/// A parsed profile: `/etc/vpn-exec/NAME.toml`. Each `None` is the default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// Where the `wg-quick` file is. A `~/` at its beginning stands for a home: root's in a profile of the machine, the
    /// user's own in one of a user. A relative path begins at the profile's folder.
    pub wireguard: PathBuf,
    /// Which implementation of WireGuard to use.
    pub backend: BackendChoice,
    /// The MTU of WireGuard's interface in bytes. `None`: the file's, else computed.
    pub mtu: Option<u32>,
    /// How names are resolved.
    pub dns: Dns,
    /// What is local.
    pub local: Local,
    /// What is open to those who reach the tunnel's address.
    pub open: Vec<OpenPorts>,
    /// The program's identity and privileges.
    pub program: ProgramOptions,
    /// How long to wait for the first handshake before the program starts. `None`: not at all.
    pub wait: Option<Duration>,
}
