//! How a tunnel is: what its keeper tells, and who is inside.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Event, Request};
use crate::config::{HostPort, OpenPorts, Publish};
use crate::linux::namespace;
use crate::linux::process;
use crate::names::{InterfaceName, TunnelName};
use crate::registry;
use crate::wireguard::Backend;

/// In which state a tunnel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Condition {
    /// No handshake with any peer yet.
    Connecting,
    /// The last handshake with some peer is at most 135 s old.
    Up,
    /// The last handshake is older: nothing was sent, or nobody answers.
    Stale,
    /// Its keeper lives, and has no time for this user now.
    Busy,
    /// Its keeper was killed, or does not answer. Programs inside are cut off; the next start takes the tunnel over, or takes it away.
    Failed,
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Connecting => "connecting",
            Self::Up => "up",
            Self::Stale => "stale",
            Self::Busy => "busy",
            Self::Failed => "failed",
        })
    }
}

/// How a tunnel is. Nothing in it is secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The tunnel's name.
    pub name: TunnelName,
    /// In which state it is.
    pub state: Condition,
    /// Whether it stays when nobody uses it.
    pub standing: bool,
    /// Which WireGuard it has. None if it was killed before it was made.
    pub backend: Option<Backend>,
    /// The path of its namespace's name.
    pub namespace: PathBuf,
    /// The process that holds it, or held it.
    pub keeper: u32,
    /// How many launchers hold a lease on it.
    pub leases: usize,
    /// What only a living keeper can tell.
    #[serde(flatten)]
    pub living: Option<Living>,
    /// Who is inside, as far as whoever asks may see them.
    #[serde(default)]
    pub programs: Vec<RunningProgram>,
}

/// What a living keeper tells of its tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Living {
    /// WireGuard's interface.
    pub interface: Interface,
    /// The peers.
    pub peers: Vec<Peer>,
    /// Resolvers of the programs inside, and their search domains.
    pub dns: Dns,
    /// The host's addresses as seen from inside, and the inner ones as seen from the host.
    pub link: HostLink,
    /// Networks that are reached through the host instead of the tunnel.
    pub local_networks: Vec<IpNet>,
    /// Ports inside that are reached through the tunnel.
    pub open_ports: Vec<OpenPorts>,
    /// Ports of the host that lead inside.
    pub published_ports: Vec<Publish>,
    /// Ports of the host's loopback that are reached from inside.
    #[serde(default)]
    pub host_ports: Vec<HostPort>,
    /// How many connections of the programs to processes outside the tunnel were refused.
    #[serde(default)]
    pub refused_connections: u64,
    /// What last went wrong, unless it has gone well since.
    pub problem: Option<String>,
}

/// WireGuard's interface, as the kernel sees it: the programs' own packets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: InterfaceName,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// Bytes received by programs.
    pub rx_bytes: u64,
    /// Packets received by programs.
    pub rx_packets: u64,
    /// Bytes sent by programs.
    pub tx_bytes: u64,
    /// Packets sent by programs.
    pub tx_packets: u64,
}

/// A peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its key.
    pub public_key: String,
    /// Where it is reached, as the file says.
    pub configured_endpoint: Option<String>,
    /// The endpoint in use.
    pub endpoint: Option<SocketAddr>,
    /// How long ago the last handshake was completed, in seconds.
    pub handshake_age: Option<u64>,
    /// Bytes received from it, encrypted.
    pub rx_bytes: u64,
    /// Bytes sent to it, encrypted.
    pub tx_bytes: u64,
}

/// How names are resolved inside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// The resolvers.
    pub servers: Vec<IpAddr>,
    /// The search domains.
    pub search: Vec<String>,
}

/// The link between the host and the tunnel's namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLink {
    /// The end on the host.
    pub interface: InterfaceName,
    /// The host's address on it.
    pub host_ipv4: Ipv4Addr,
    /// The inner address.
    pub inner_ipv4: Ipv4Addr,
    /// The host's address on it.
    pub host_ipv6: Option<Ipv6Addr>,
    /// The inner address.
    pub inner_ipv6: Option<Ipv6Addr>,
}

/// A process inside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningProgram {
    /// Its number.
    pub pid: i32,
    /// Who it runs as: a name, or a number that has none.
    pub user: String,
    /// Its command line; in brackets the name of one that has none.
    pub command: String,
}

/// How the tunnel of a name is. None if there is none, living or killed.
///
/// # Errors
/// If it cannot be asked, or what is written down of it cannot be read.
pub fn of(name: &TunnelName) -> io::Result<Option<Status>> {
    let answer = match super::ask(name, Request::Report, None) {
        // One that hangs shall not keep all others from being listed.
        Err(error) if error.kind() == io::ErrorKind::TimedOut => None,
        other => other?,
    };
    let is_public = super::is_public(name);
    let status = match answer {
        Some((Event::Done, file)) => Some(super::read_answer(file)?),
        Some((Event::Refused { reason, .. }, _)) => return Err(io::Error::other(reason)),
        _ => registry::read(name)?.map(|state| Status {
            name: name.clone(),
            // A keeper that does not answer another user, because others keep it busy, is not dead for that.
            state: if is_public && !process::is_ending(state.keeper.cast_signed()) {
                Condition::Busy
            } else {
                Condition::Failed
            },
            standing: state.standing,
            backend: state.made,
            namespace: namespace::path_of(name.as_str()),
            keeper: state.keeper,
            leases: 0,
            living: None,
            programs: Vec::new(),
        }),
    };
    Ok(status)
}

/// How all tunnels are, in the order of their names; or those of some names.
///
/// # Errors
/// `NotFound` if a name has no tunnel.
pub fn of_all(names: Option<&[TunnelName]>) -> io::Result<Vec<Status>> {
    let all;
    let asked = match names {
        Some(names) => names,
        None => {
            all = registry::names()?;
            &all
        }
    };
    let mut found = Vec::with_capacity(asked.len());
    for name in asked {
        match of(name) {
            Ok(Some(status)) => found.push(status),
            Ok(None) if names.is_some() => {
                return Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no tunnel {name}")));
            }
            // It has ended since it was listed.
            Ok(None) => {}
            Err(error) if names.is_some() => return Err(error),
            // One that cannot be asked shall not keep all others from being listed.
            Err(error) => tracing::warn!("{error}"),
        }
    }
    // All of /proc is read once, for however many tunnels.
    let mut inside = process::group_by_namespace()?;
    for status in &mut found {
        let Ok(Some(state)) = registry::read(&status.name) else { continue };
        let programs = inside.remove(&state.namespace).unwrap_or_default();
        status.programs = programs.into_iter().filter_map(describe).collect();
    }
    Ok(found)
}

/// A process for people; none if it has ended.
pub(crate) fn describe(pid: i32) -> Option<RunningProgram> {
    let seen = process::describe(pid)?;
    let user = nix::unistd::User::from_uid(seen.user).ok().flatten();
    let user = user.map_or_else(|| seen.user.to_string(), |user| user.name);
    Some(RunningProgram { pid, user, command: seen.command })
}
