//! What will be done: a pure function of [`Config`] and of [`Facts`] read once from the host. All decisions are made here,
//! and none of this touches the system, so all decisions are tested without root.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use ipnet::IpNet;
use serde::Serialize;

use crate::config::{BackendChoice, Config, HookKind};
use crate::keys::PublicKey;
use crate::names::{InterfaceName, TunnelName};

/// What is read from the host, once, before a plan is made.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The host's interfaces.
    pub interfaces: Vec<HostInterface>,
    /// Every route of the host, of all tables, the local ones (the host's own addresses) included; default routes too.
    pub routes: Vec<HostRoute>,
    /// For each endpoint whose address is known, the route that leads there.
    pub endpoint_routes: Vec<EndpointRoute>,
    /// The highest capability that the kernel knows: `/proc/sys/kernel/cap_last_cap`.
    pub last_capability: u8,
}

/// An interface of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostInterface {
    /// Its name.
    pub name: String,
    /// Its number.
    pub index: u32,
    /// Its MTU in bytes.
    pub mtu: u32,
}

/// A route of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRoute {
    /// Where it leads.
    pub destination: IpNet,
    /// The interface that it leaves by.
    pub interface: Option<u32>,
    /// Its own MTU, where it has one.
    pub mtu: Option<u32>,
}

/// The route of the host to an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointRoute {
    /// The endpoint's address.
    pub address: IpAddr,
    /// The interface that it leaves by.
    pub interface: Option<u32>,
    /// The route's own MTU, where it has one.
    pub mtu: Option<u32>,
}

/// All that will be done, without any secret. Serializes to what `vpn-exec plan --json` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The tunnel's name.
    pub name: TunnelName,
    /// The path of the named namespace: `/run/netns/NAME`.
    pub namespace: PathBuf,
    /// Which implementation of WireGuard to use.
    pub backend: BackendChoice,
    /// WireGuard's interface.
    pub wireguard: WireguardPlan,
    /// The pair that joins the namespace to the host.
    pub veth: VethPlan,
    /// What the program sees of names.
    pub names: NamesPlan,
    /// What the program may do.
    pub privileges: PrivilegesPlan,
    /// The hooks of the file, which are run only where that is asked for.
    pub hooks: Vec<HookPlan>,
    /// Decisions that the user may not expect, each a sentence.
    pub notes: Vec<String>,
}

/// WireGuard's interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WireguardPlan {
    /// Its name in the namespace: `wg0`.
    pub interface: InterfaceName,
    /// The name that a kernel interface has in the host's namespace, for the instant before it is moved.
    pub birth_name: InterfaceName,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Where [`Self::mtu`] comes from, as a phrase.
    pub mtu_reason: String,
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// What is routed into it.
    pub routes: Vec<IpNet>,
    /// Whether there is IPv6 in the namespace at all (but for lo).
    pub ipv6: bool,
    /// The UDP port on the host; 0: any free one.
    pub listen_port: u16,
    /// The mark of the encrypted packets; 0: none.
    pub fwmark: u32,
    /// The peers.
    pub peers: Vec<PeerPlan>,
}

/// A peer, without its secrets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PeerPlan {
    /// Its key.
    pub public_key: PublicKey,
    /// Whether there is a preshared key.
    pub preshared_key: bool,
    /// Where it is reached, as the file has it.
    pub endpoint: Option<String>,
    /// What is sent to it.
    pub allowed_ips: Vec<IpNet>,
    /// Seconds between keepalives.
    pub persistent_keepalive: Option<u16>,
}

/// The pair of interfaces that joins the namespace to the host. It carries local traffic only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VethPlan {
    /// The end on the host: `ve-…`.
    pub host_interface: InterfaceName,
    /// The end inside: `host0`.
    pub inner_interface: InterfaceName,
    /// The host's IPv4 address on it: the lower one of a /31 (RFC 3021).
    pub host_ipv4: Ipv4Addr,
    /// The inner IPv4 address: the upper one of that /31.
    pub inner_ipv4: Ipv4Addr,
    /// The host's IPv6 address on it, the lower one of a /127 (RFC 6164) of a unique local prefix (RFC 4193); none where the
    /// tunnel has no IPv6.
    pub host_ipv6: Option<Ipv6Addr>,
    /// The inner IPv6 address: the upper one of that /127.
    pub inner_ipv6: Option<Ipv6Addr>,
}

/// What the program sees of names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NamesPlan {
    /// The resolvers.
    pub servers: Vec<IpAddr>,
    /// The search domains.
    pub search: Vec<String>,
    /// The options.
    pub options: Vec<String>,
    /// The text of `/etc/resolv.conf` (resolv.conf(5)).
    pub resolv_conf: String,
    /// The lines that `/etc/hosts` has besides the host's: `host.internal`.
    pub hosts: String,
    /// The text of `/etc/nsswitch.conf`'s `hosts:` line.
    pub nsswitch_hosts: String,
}

/// What the program may do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PrivilegesPlan {
    /// The user that was asked for.
    pub user: Option<String>,
    /// The group that was asked for.
    pub group: Option<String>,
    /// The capabilities kept, in the order of their numbers, as `CAP_NET_RAW`.
    pub capabilities: Vec<String>,
    /// Whether `no_new_privs` is set (prctl(2)).
    pub no_new_privileges: bool,
}

/// A command of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HookPlan {
    /// When.
    pub kind: HookKind,
    /// The shell command, `%i` replaced by the interface's name.
    pub command: String,
    /// Whether it will be run (`--allow-hooks`).
    pub run: bool,
}
