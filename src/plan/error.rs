//! Why no tunnel can be made from what was asked: each reason a sentence, with what to do about it.

use std::fmt;

use ipnet::IpNet;
use thiserror::Error;

use super::mtu::{MAX_MTU, MIN_IPV4_MTU, MIN_IPV6_MTU};
use crate::config::HookKind;
use crate::names::TunnelName;

/// One reason why no tunnel can be made. Its text is the reason; [`PlanError::remedy`] is what to do.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum PlanError {
    /// The interface has no key.
    #[error("there is no private key")]
    NoPrivateKey,
    /// The interface's key is all zero, which is how WireGuard says "none".
    #[error("the private key is all zero, which is no key")]
    ZeroPrivateKey,
    /// There is nobody to talk to.
    #[error("there is no peer")]
    NoPeer,
    /// The only peer is the tunnel itself, and the kernel silently drops such a peer.
    #[error("the only peer has the public key of this tunnel itself")]
    OnlyPeerIsSelf,
    /// The interface has no address.
    #[error("the tunnel has no address")]
    NoAddress,
    /// All addresses are of IPv6, and there is none.
    #[error("the tunnel's addresses are all IPv6, and this kernel has none")]
    KernelWithoutIpv6,
    /// An address that no interface can have.
    #[error("{address} is {what}, which cannot be the tunnel's address")]
    UnusableAddress {
        /// The address.
        address: IpNet,
        /// What sort of address it is.
        what: &'static str,
    },
    /// No peer has AllowedIPs.
    #[error("nothing is routed into the tunnel: no peer has AllowedIPs")]
    NothingRouted,
    /// AllowedIPs and addresses have no family in common.
    #[error("nothing is routed into the tunnel: its addresses are all {addresses}, its AllowedIPs all {allowed}")]
    FamiliesApart {
        /// The family of the addresses.
        addresses: &'static str,
        /// The family of the AllowedIPs.
        allowed: &'static str,
    },
    /// No handshake can ever begin, from either side.
    #[error("no peer has an endpoint, and there is no ListenPort at which a peer could reach this tunnel")]
    NoEndpoint,
    /// An MTU that no interface should have.
    #[error("an MTU of {mtu} bytes is not between {MIN_IPV4_MTU} and {MAX_MTU}")]
    MtuOutOfRange {
        /// The MTU that was asked for.
        mtu: u32,
    },
    /// An MTU with which the kernel switches IPv6 off.
    #[error("an MTU of {mtu} bytes is too small for IPv6, which needs {MIN_IPV6_MTU} (RFC 8200 section 5)")]
    MtuTooSmallForIpv6 {
        /// The MTU that was asked for.
        mtu: u32,
    },
    /// Not the name of a capability.
    #[error("{name:?} is no capability")]
    UnknownCapability {
        /// What was asked for.
        name: String,
    },
    /// A capability that is newer than the kernel.
    #[error("this kernel has no {name}: it knows the capabilities up to number {last}, and that is number {number}")]
    CapabilityNotInKernel {
        /// Its name.
        name: &'static str,
        /// Its number.
        number: u8,
        /// The kernel's last one.
        last: u8,
    },
    /// Text that would break out of its line in resolv.conf.
    #[error("{text:?} cannot be {what} in resolv.conf: it is empty, or has white space or control characters")]
    ResolverText {
        /// What was asked for.
        text: String,
        /// What it was to be.
        what: &'static str,
    },
    /// A local network of a kind that has no hosts of its own, or not beyond the host.
    #[error("{network} is {what}, which cannot be a local network")]
    LocalUnusable {
        /// Which.
        network: IpNet,
        /// What it is.
        what: &'static str,
    },
    /// A local network that would take more than any private one has.
    #[error(
        "the local network {network} is wider than any private one: much of the Internet would be reached past the tunnel"
    )]
    LocalTooWide {
        /// Which.
        network: IpNet,
    },
    /// A local network that the tunnel is for.
    #[error("{network} is to be local, but is routed into the tunnel")]
    LocalIsTunnels {
        /// Which.
        network: IpNet,
    },
    /// A local IPv6 network where the link to the host has no IPv6.
    #[error("{network} cannot be local: the link to the host has no IPv6")]
    LocalWithoutIpv6 {
        /// Which.
        network: IpNet,
    },
    /// A local IPv6 network where the host could not forward to it without becoming a router for all.
    #[error(
        "{network} cannot be local: this host forwards no IPv6, and its kernel could only do so for all interfaces at once"
    )]
    LocalIpv6NotForwarded {
        /// Which.
        network: IpNet,
    },
    /// Two ports that cannot be listened on both.
    #[error("port {port} of the host is published twice")]
    PublishedTwice {
        /// Which.
        port: u16,
    },
    /// A published port at which WireGuard itself is to listen.
    #[error("UDP port {port} of the host is published, but is the file's ListenPort: WireGuard itself listens there")]
    PublishedForWireguard {
        /// Which.
        port: u16,
    },
    /// A port of the host's loopback at which names are asked for.
    #[error(
        "port {port} of the host cannot be reached from inside: names would be asked of the host's resolver, past the tunnel"
    )]
    HostPortForNames {
        /// Which.
        port: u16,
    },
    /// A port of the host's loopback that leads inside.
    #[error("port {port} of the host is to be reached from inside, but is published: it leads inside itself")]
    HostPortPublished {
        /// Which.
        port: u16,
    },
    /// A hook that would show a key to everyone who lists processes.
    #[error(
        "the {kind} hook holds a secret key of this tunnel, which every user could read from the list of processes"
    )]
    SecretInHook {
        /// Which hook.
        kind: HookKind,
    },
    /// Every private network is taken.
    #[error("no free {family} addresses are left for the link to the host: its routes cover {pools}")]
    NoFreeAddresses {
        /// `IPv4` or `IPv6`.
        family: &'static str,
        /// Where free ones were looked for.
        pools: &'static str,
    },
    /// A living tunnel whose link to the host was made for programs that cannot use it as a router.
    #[error(
        "the tunnel {tunnel} was made for programs without CAP_NET_RAW and CAP_NET_ADMIN: its link to the host has IPv6, by which \
         this one could leave"
    )]
    OpenLink {
        /// The tunnel.
        tunnel: TunnelName,
    },
    /// Every name that could be derived is taken.
    #[error("every interface name that can be derived for this tunnel (such as {last:?}) is taken on the host")]
    NoFreeInterfaceName {
        /// The last one that was tried.
        last: String,
    },
}

impl PlanError {
    /// What to do about it, as an imperative phrase.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NoPrivateKey => "add the provider's `PrivateKey = …` to [Interface]; `wg genkey` makes a new one",
            Self::ZeroPrivateKey => "put the provider's key there; `wg genkey` makes a new one",
            Self::NoPeer => "add the provider's [Peer] section with its PublicKey, AllowedIPs and Endpoint",
            Self::OnlyPeerIsSelf => "put the provider's public key into [Peer], not your own",
            Self::NoAddress => "add the provider's `Address = …` to [Interface]",
            Self::KernelWithoutIpv6 => {
                "start the kernel without `ipv6.disable=1`, or add the provider's IPv4 Address to [Interface]"
            }
            Self::UnusableAddress { .. } => "put the address there that the provider gave to this tunnel",
            Self::NothingRouted => "add AllowedIPs to a peer; `AllowedIPs = 0.0.0.0/0, ::/0` is everything",
            Self::FamiliesApart { .. } => "add an Address of the family of the AllowedIPs, or the other way round",
            Self::NoEndpoint => "add `Endpoint = HOST:PORT` to a peer, or a ListenPort if the peers are to begin",
            Self::MtuOutOfRange { .. } => "leave MTU out to have it computed, or use 1420, which fits most networks",
            Self::MtuTooSmallForIpv6 { .. } => "use 1280 or more, or remove the tunnel's IPv6 addresses",
            Self::UnknownCapability { .. } => "use a name of capabilities(7), such as CAP_NET_RAW or net_raw",
            Self::CapabilityNotInKernel { .. } => "leave it out; no process of this kernel needs it",
            Self::ResolverText { .. } => "write each name or option as an item of its own",
            Self::LocalUnusable { .. } => "name a network of the host's neighbours, such as 192.168.1.0/24",
            Self::LocalTooWide { .. } => "name the networks that are meant, such as 192.168.1.0/24",
            Self::LocalIsTunnels { .. } => {
                "leave it out of the local networks, or out of the file's AllowedIPs and Address"
            }
            Self::LocalWithoutIpv6 { .. } => {
                "leave it out, or give the tunnel an IPv6 address and let the program keep neither CAP_NET_RAW nor CAP_NET_ADMIN"
            }
            Self::LocalIpv6NotForwarded { .. } => {
                "leave it out, use Linux 6.17 or newer, or make the host a router: `sysctl net.ipv6.conf.all.forwarding=1`"
            }
            Self::PublishedTwice { .. } => "leave one out: a port on all addresses of the host is on each of them",
            Self::PublishedForWireguard { .. } => "publish another port, or leave ListenPort out of the file",
            Self::HostPortForNames { .. } => "leave it out: the program asks the tunnel's resolvers",
            Self::HostPortPublished { .. } => {
                "leave one out, or publish it under another port or at one address of the host"
            }
            Self::SecretInHook { .. } => "let the hook read the key from a file, or leave out --allow-hooks",
            Self::NoFreeAddresses { .. } => {
                "narrow or remove a route of the host that covers private addresses it does not use"
            }
            Self::OpenLink { .. } => {
                "put the capability into the tunnel's profile, and take it down and up again, or choose another name"
            }
            Self::NoFreeInterfaceName { .. } => "remove unused interfaces, or choose another tunnel name",
        }
    }
}

/// All reasons at once why a tunnel cannot be made, or not joined; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanErrors {
    /// The tunnel.
    pub name: TunnelName,
    /// What cannot be done with it: "made".
    pub what: &'static str,
    /// The reasons, in the order of the stages of the plan.
    pub reasons: Vec<PlanError>,
}

impl fmt::Display for PlanErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the tunnel `{}` cannot be {}", self.name, self.what)?;
        for reason in &self.reasons {
            write!(f, "\n  {reason}\n    {}", reason.remedy())?;
        }
        Ok(())
    }
}

impl std::error::Error for PlanErrors {}
