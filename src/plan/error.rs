//! The reasons why a tunnel cannot be made or joined, each with what the user can do about it.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use thiserror::Error;

use super::mtu::{MAX_MTU, MIN_IPV4_MTU, MIN_IPV6_MTU};
use crate::config::{Domain, HookKind};
use crate::failure::Failure;
use crate::names::TunnelName;

/// A reason why a tunnel cannot be made or joined. It displays as the reason; [`PlanError::advice`] is what to do.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum PlanError {
    /// The interface has no private key.
    #[error("there is no private key")]
    NoPrivateKey,
    /// The private key is all zeros, by which WireGuard's interfaces mean "none".
    #[error("the private key is all zeros, which is not a valid key")]
    ZeroPrivateKey,
    /// The file has no peer.
    #[error("there is no peer")]
    NoPeer,
    /// The only peer has the interface's own key. The kernel silently ignores such a peer.
    #[error("the only peer has the public key of this tunnel itself")]
    OnlyPeerIsSelf,
    /// The interface has no address.
    #[error("the tunnel has no address")]
    NoAddress,
    /// All addresses are IPv6 addresses, and the kernel has no IPv6.
    #[error("the tunnel has only IPv6 addresses, and this kernel has no IPv6")]
    KernelWithoutIpv6,
    /// All addresses are IPv6 addresses, and IPv6 is switched off in the namespace.
    #[error("the tunnel has only IPv6 addresses, and IPv6 is switched off in this network namespace")]
    Ipv6SwitchedOff,
    /// An address that no interface can have.
    #[error("the tunnel cannot have the address {address}: it is {what}")]
    UnusableAddress {
        /// The address.
        address: IpNet,
        /// What kind of address it is.
        what: &'static str,
    },
    /// No peer has AllowedIPs.
    #[error("nothing is routed into the tunnel: no peer has AllowedIPs")]
    NothingRouted,
    /// The AllowedIPs and the addresses are of different families.
    #[error("nothing is routed into the tunnel: it has only {addresses} addresses, and only {allowed} AllowedIPs")]
    FamiliesApart {
        /// The family of the addresses.
        addresses: &'static str,
        /// The family of the AllowedIPs.
        allowed: &'static str,
    },
    /// Neither side can ever begin a handshake.
    #[error("no peer has an endpoint, and there is no ListenPort at which a peer could reach this tunnel")]
    NoEndpoint,
    /// The MTU is too small or too large for any interface.
    #[error("the MTU of {mtu} bytes is not between {MIN_IPV4_MTU} and {MAX_MTU}")]
    MtuOutOfRange {
        /// The requested MTU in bytes.
        mtu: u32,
    },
    /// With this MTU the kernel switches IPv6 off.
    #[error("the MTU of {mtu} bytes is too small for IPv6, which needs {MIN_IPV6_MTU} (RFC 8200 section 5)")]
    MtuTooSmallForIpv6 {
        /// The requested MTU in bytes.
        mtu: u32,
    },
    /// No capability has this name.
    #[error("{name:?} is not a capability")]
    UnknownCapability {
        /// The requested name.
        name: String,
    },
    /// The capability is newer than the kernel.
    #[error("this kernel does not have {name}: that is capability number {number}, and its last one is number {last}")]
    CapabilityNotInKernel {
        /// The capability's name.
        name: &'static str,
        /// The capability's number.
        number: u8,
        /// The number of the kernel's last capability.
        last: u8,
    },
    /// The text would break out of its line in resolv.conf.
    #[error("{text:?} is not a valid {what} of resolv.conf: it is empty, or has white space or control characters")]
    ResolverText {
        /// The requested text.
        text: String,
        /// What the text was to be: "option".
        what: &'static str,
    },
    /// A resolver of a domain that is neither in a local network nor the tunnel's.
    #[error("cannot ask {address} for the names of {domain}: it is in no local network")]
    ForeignResolver {
        /// The address.
        address: IpAddr,
        /// The domain.
        domain: Domain,
    },
    /// A domain with resolvers in local networks and in the tunnel.
    #[error("some resolvers of {domain} are in a local network, and others are reached through the tunnel")]
    ResolversOnBothSides {
        /// The domain.
        domain: Domain,
    },
    /// A network of a kind that is not forwarded.
    #[error("{network} cannot be a local network: it is {what}")]
    LocalUnusable {
        /// The network.
        network: IpNet,
        /// What kind of network it is.
        what: &'static str,
    },
    /// A network that is larger than any private one.
    #[error(
        "{network} cannot be a local network: it is larger than any private network, and much of the Internet would be \
         reached outside the tunnel"
    )]
    LocalTooWide {
        /// The network.
        network: IpNet,
    },
    /// A network that is routed into the tunnel.
    #[error("{network} cannot be a local network: it is routed into the tunnel")]
    LocalIsTunnels {
        /// The network.
        network: IpNet,
    },
    /// An IPv6 network, while the link to the host has no IPv6.
    #[error("{network} cannot be a local network: the link to the host has no IPv6")]
    LocalWithoutIpv6 {
        /// The network.
        network: IpNet,
    },
    /// An IPv6 network to which the host could only forward by becoming a router for all interfaces.
    #[error(
        "{network} cannot be a local network: this host does not forward IPv6, and its kernel could only do so for all \
         interfaces at once"
    )]
    LocalIpv6NotForwarded {
        /// The network.
        network: IpNet,
    },
    /// Two published ports need the same socket.
    #[error("port {port} of the host is published twice")]
    PublishedTwice {
        /// The port.
        port: u16,
    },
    /// WireGuard listens on the published port.
    #[error(
        "cannot publish UDP port {port} of the host: WireGuard itself listens on it, as it is the file's ListenPort"
    )]
    PublishedForWireguard {
        /// The port.
        port: u16,
    },
    /// The kernel's WireGuard, which an ordinary user cannot give a socket of the host.
    #[error("the kernel's WireGuard needs root: its encrypted packets would not leave by the host's network")]
    RootlessKernel,
    /// A mark of the encrypted packets.
    #[error("the file's FwMark needs root: only a privileged process of the host marks packets")]
    RootlessMark,
    /// Another user or group for the program.
    #[error("another user or group for the program needs root")]
    RootlessUser,
    /// A capability for the program with which it controls its own tunnel.
    #[error("keeping {name} needs root: without, it is a capability over the tunnel's own namespaces")]
    RootlessCapability {
        /// The capability.
        name: &'static str,
    },
    /// A port of the host for which a process needs a privilege.
    #[error("port {port} of the host needs root: net.ipv4.ip_unprivileged_port_start reserves it")]
    RootlessPort {
        /// The port.
        port: u16,
    },
    /// A hook that is to be run.
    #[error("the file's {kind} needs root: hooks change the host's network")]
    RootlessHook {
        /// When it would be run.
        kind: HookKind,
    },
    /// A port of the host's loopback on which resolvers listen.
    #[error(
        "port {port} of the host cannot be reached by the program: the host's resolver would answer DNS queries \
         outside the tunnel"
    )]
    HostPortForNames {
        /// The port.
        port: u16,
    },
    /// A port of the host's loopback that is published, and so leads back to the program.
    #[error("port {port} of the host cannot be reached by the program: it is published, and leads back to the program")]
    HostPortPublished {
        /// The port.
        port: u16,
    },
    /// A hook would show a key in the list of processes.
    #[error(
        "the {kind} hook contains a secret key of this tunnel, which every user could read in the list of processes"
    )]
    SecretInHook {
        /// The hook.
        kind: HookKind,
    },
    /// All private networks are in use.
    #[error("no {family} addresses are free for the link to the host: its routes cover {pools}")]
    NoFreeAddresses {
        /// `IPv4` or `IPv6`.
        family: &'static str,
        /// The networks that were searched.
        pools: &'static str,
    },
    /// The running tunnel has a link to the host that this program could use as a way out.
    #[error(
        "the tunnel {tunnel} was made for programs without CAP_NET_RAW and CAP_NET_ADMIN: this program could leave \
         it by the link to the host, which has IPv6"
    )]
    OpenLink {
        /// The tunnel.
        tunnel: TunnelName,
    },
    /// All names that can be derived are taken.
    #[error("every interface name that can be derived for this tunnel (such as {last:?}) is taken on the host")]
    NoFreeInterfaceName {
        /// The last name that was tried.
        last: String,
    },
}

impl PlanError {
    /// Returns what to do about it, as an imperative phrase.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::NoPrivateKey => "add the provider's `PrivateKey = …` to [Interface]; `wg genkey` makes a new one",
            Self::ZeroPrivateKey => "use the key from the provider; `wg genkey` makes a new one",
            Self::NoPeer => "add the provider's [Peer] section with its PublicKey, AllowedIPs and Endpoint",
            Self::OnlyPeerIsSelf => "put the provider's public key into [Peer], not your own",
            Self::NoAddress => "add the provider's `Address = …` to [Interface]",
            Self::KernelWithoutIpv6 => {
                "start the kernel without `ipv6.disable=1`, or add the provider's IPv4 Address to [Interface]"
            }
            Self::Ipv6SwitchedOff => {
                "set the sysctl net.ipv6.conf.all.disable_ipv6=0 for the container or the pod, or add the provider's \
                 IPv4 Address to [Interface]"
            }
            Self::UnusableAddress { .. } => "use the address that the provider assigned to this tunnel",
            Self::NothingRouted => "add AllowedIPs to a peer; `AllowedIPs = 0.0.0.0/0, ::/0` routes everything",
            Self::FamiliesApart { .. } => {
                "add an Address of the same family as the AllowedIPs, or AllowedIPs of the family of the Address"
            }
            Self::NoEndpoint => {
                "add `Endpoint = HOST:PORT` to a peer, or a ListenPort if the peers connect to this tunnel"
            }
            Self::MtuOutOfRange { .. } => {
                "leave out MTU, so that it is computed, or use 1420, which fits most networks"
            }
            Self::MtuTooSmallForIpv6 { .. } => "use 1280 or more, or remove the tunnel's IPv6 addresses",
            Self::UnknownCapability { .. } => "use a name from capabilities(7), such as CAP_NET_RAW or net_raw",
            Self::CapabilityNotInKernel { .. } => "leave it out; no program needs it on this kernel",
            Self::ResolverText { .. } => "write each domain or option as an item of its own",
            Self::ForeignResolver { .. } => {
                "name its network, or its address alone, with --local (`local.networks` in a profile)"
            }
            Self::ResolversOnBothSides { .. } => {
                "name resolvers of one side; a failed question is never repeated on the other side"
            }
            Self::LocalUnusable { .. } => "name a network that the host is attached to, such as 192.168.1.0/24",
            Self::LocalTooWide { .. } => "name the networks that the program needs, such as 192.168.1.0/24",
            Self::LocalIsTunnels { .. } => {
                "remove it from the local networks, or from the file's AllowedIPs and Address"
            }
            Self::LocalWithoutIpv6 { .. } => {
                "leave it out, or give the tunnel an IPv6 address, and keep neither CAP_NET_RAW nor CAP_NET_ADMIN"
            }
            Self::LocalIpv6NotForwarded { .. } => {
                "leave it out, use Linux 6.17 or newer, or make the host a router: \
                 `sysctl net.ipv6.conf.all.forwarding=1`"
            }
            Self::PublishedTwice { .. } => "leave one out; a port on all addresses of the host is on each of them",
            Self::PublishedForWireguard { .. } => "publish another port, or remove ListenPort from the file",
            Self::RootlessKernel => "use --backend userspace, or run it with sudo",
            Self::RootlessMark => "remove FwMark from the file, or run it with sudo",
            Self::RootlessUser => "leave out --user and --group, or run it with sudo",
            Self::RootlessCapability { .. } => "leave out --keep-cap for it, or run it with sudo",
            Self::RootlessPort { .. } => {
                "choose a port of 1024 or more, run it with sudo, or lower net.ipv4.ip_unprivileged_port_start \
                 (sysctl(8)) to that port"
            }
            Self::RootlessHook { .. } => "leave out --allow-hooks, or run it with sudo",
            Self::HostPortForNames { .. } => "leave it out; the program asks the tunnel's resolvers",
            Self::HostPortPublished { .. } => "leave one out, or publish on another port or on one address of the host",
            Self::SecretInHook { .. } => "make the hook read the key from a file, or leave out --allow-hooks",
            Self::NoFreeAddresses { .. } => "narrow or remove a route of the host that covers unused private addresses",
            Self::OpenLink { .. } => {
                "add the capability to the tunnel's profile, and take the tunnel down and up again, \
                 or use another tunnel"
            }
            Self::NoFreeInterfaceName { .. } => "remove unused interfaces, or rename the tunnel",
        }
    }
}

/// All reasons why a tunnel cannot be made or joined; at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanErrors {
    /// What cannot be done: "make the tunnel mullvad".
    pub what: String,
    /// The reasons, in the order of the plan's parts.
    pub reasons: Vec<PlanError>,
}

impl fmt::Display for PlanErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}", self.what)?;
        for reason in &self.reasons {
            write!(f, "\n  {reason}\n    {}", reason.advice())?;
        }
        Ok(())
    }
}

impl std::error::Error for PlanErrors {}

impl From<PlanErrors> for Failure {
    /// A single reason becomes an ordinary failure with advice, several become a list.
    fn from(errors: PlanErrors) -> Self {
        match errors.reasons.as_slice() {
            [reason] => Self::new(format!("cannot {}: {reason}", errors.what)).advise(reason.advice()),
            _ => Self::new(errors),
        }
    }
}
