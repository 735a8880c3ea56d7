//! What a plan must know of the host. Reading it is left to the callers, so that every plan can be made from made-up facts.

use std::net::IpAddr;

use ipnet::IpNet;

/// What is read from the host, once, before a plan is made.
///
/// Whoever reads it leaves out what is this tunnel's own: its veth and the routes of that. Otherwise a plan for a tunnel that
/// is already up would take its own name and addresses for another's.
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
    /// Others' chains that drop what the host forwards, unless a rule lets it pass; as far as they were looked for.
    pub forward_drops: Vec<ForwardDrop>,
    /// Whether the kernel has no IPv6 at all, as when it was started with `ipv6.disable=1`.
    pub without_ipv6: bool,
    /// Whether the host could forward IPv6 for one interface alone.
    pub ipv6_forwarding: Ipv6Forwarding,
}

/// A chain of a firewall of the host's that drops what is forwarded unless a rule lets it pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardDrop {
    /// Which one.
    pub chain: ForeignChain,
    /// The interfaces that rules of its table are about. One that ends with `*` stands for all names that begin so.
    pub interfaces: Vec<String>,
}

/// A chain of somebody else's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForeignChain {
    /// As nft(8) shows it.
    Nftables {
        /// The family of its table.
        family: &'static str,
        /// Its table.
        table: String,
        /// Its name.
        name: String,
    },
    /// The chain FORWARD as iptables-legacy(8) and ip6tables-legacy(8) show it.
    Legacy {
        /// Of which of the two.
        ipv6: bool,
    },
}

/// Whether a host can forward IPv6 packets from some of its interfaces and from no others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ipv6Forwarding {
    /// It cannot: Linux before 6.17 forwards from all interfaces or from none, and this host does from none.
    #[default]
    Never,
    /// It can, by `force_forwarding` of an interface (the kernel's ip-sysctl.rst).
    Each,
    /// It forwards from all interfaces anyway.
    All,
}

impl Facts {
    /// The interface with this number.
    pub(super) fn interface(&self, index: u32) -> Option<&HostInterface> {
        self.interfaces.iter().find(|interface| interface.index == index)
    }

    /// Whether an interface of the host has this name.
    pub(super) fn has_interface(&self, name: &str) -> bool {
        self.interfaces.iter().any(|interface| interface.name == name)
    }
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
    /// Whether the host is attached to that network: it goes through no router, and is no address of the host's own.
    pub attached: bool,
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
