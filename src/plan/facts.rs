//! The facts about the host that a plan depends on. Callers read them, so that tests can make up any host.

use std::net::IpAddr;

use ipnet::IpNet;

use super::rootless::RootlessFacts;

/// What is read from the host, once, before a tunnel is planned.
///
/// The reader leaves out the tunnel's own veth and its routes. Otherwise a plan for a tunnel that is already up would
/// treat its own name and addresses as taken.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The host's interfaces.
    pub interfaces: Vec<HostInterface>,
    /// All routes of all tables of the host, including default routes and local routes (the host's own addresses).
    pub routes: Vec<HostRoute>,
    /// The route to each endpoint whose address is known.
    pub endpoint_routes: Vec<EndpointRoute>,
    /// The number of the kernel's highest capability: `/proc/sys/kernel/cap_last_cap`.
    pub last_capability: u8,
    /// Chains of other firewalls that drop forwarded packets by default. Empty if they were not looked for.
    pub forward_drops: Vec<ForwardDrop>,
    /// Whether the kernel has no IPv6, for example because of `ipv6.disable=1`.
    pub without_ipv6: bool,
    /// Whether the host can forward IPv6 for a single interface.
    pub ipv6_forwarding: Ipv6Forwarding,
    /// The facts about an ordinary user's tunnels, if this is to be one. None if root makes it.
    pub rootless: Option<RootlessFacts>,
}

/// A firewall chain of the host that drops forwarded packets unless a rule accepts them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardDrop {
    /// The chain.
    pub chain: ForeignChain,
    /// The interfaces that rules of its table mention. A trailing `*` matches any rest of a name.
    pub interfaces: Vec<String>,
}

/// A firewall chain that vpn-exec did not create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForeignChain {
    /// A chain of nf_tables, as nft(8) shows it.
    Nftables {
        /// The family of its table.
        family: &'static str,
        /// Its table.
        table: String,
        /// Its name.
        name: String,
    },
    /// The chain FORWARD of iptables-legacy(8) or ip6tables-legacy(8).
    Legacy {
        /// Whether it is that of ip6tables-legacy(8).
        ipv6: bool,
    },
}

/// Whether a host can forward IPv6 packets from some interfaces and not from others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ipv6Forwarding {
    /// It cannot, and forwards from no interface. Linux before 6.17 forwards from all interfaces or from none.
    #[default]
    Never,
    /// It can, by the `force_forwarding` parameter of an interface (the kernel's ip-sysctl.rst).
    Each,
    /// It forwards from all interfaces already.
    All,
}

impl Facts {
    /// Returns the interface with an index.
    pub(super) fn interface(&self, index: u32) -> Option<&HostInterface> {
        self.interfaces.iter().find(|interface| interface.index == index)
    }

    /// Returns whether the host has an interface with a name.
    pub(super) fn has_interface(&self, name: &str) -> bool {
        self.interfaces.iter().any(|interface| interface.name == name)
    }
}

/// An interface of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostInterface {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Its MTU in bytes.
    pub mtu: u32,
}

/// A route of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRoute {
    /// Its destination.
    pub destination: IpNet,
    /// The index of the interface that packets leave by.
    pub interface: Option<u32>,
    /// Its own MTU in bytes, if it has one.
    pub mtu: Option<u32>,
    /// Whether the host is attached to the network: the route has no gateway, and is not an address of the host.
    pub attached: bool,
}

/// The host's route to an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointRoute {
    /// The endpoint's address.
    pub address: IpAddr,
    /// The index of the interface that packets leave by.
    pub interface: Option<u32>,
    /// The route's own MTU in bytes, if it has one.
    pub mtu: Option<u32>,
}
