//! Network interfaces: creating, configuring and listing them (rtnetlink(7)).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{DefaultNla, NLA_F_NESTED};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoVeth, LinkAttribute, LinkExtentMask,
    LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, LinkWireguard};

use super::{Netlink, NetlinkRequest};
use crate::names::InterfaceName;

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// The index of the interface in its namespace.
    pub index: u32,
    /// The name.
    pub name: String,
    /// The MTU in bytes.
    pub mtu: u32,
    /// The alias, a free text (`ip link set alias`).
    pub alias: Option<String>,
    /// Whether the interface is up.
    pub up: bool,
    /// The kind: "veth", "tun", "wireguard". None for an interface of the kernel's own, such as `lo`.
    pub kind: Option<String>,
    /// The kernel's number of the network namespace to which the interface leads, such as that of a veth's other end.
    /// None for the same namespace.
    pub leads_to: Option<i32>,
}

/// The traffic of an interface since it was created, as the programs of its namespace see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// The number of bytes received.
    pub rx_bytes: u64,
    /// The number of packets received.
    pub rx_packets: u64,
    /// The number of bytes sent.
    pub tx_bytes: u64,
    /// The number of packets sent.
    pub tx_packets: u64,
}

impl Netlink {
    /// Returns the interface of a name, or none if there is no such interface.
    ///
    /// # Errors
    /// Fails if the kernel refuses the request.
    pub fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        match self.link_message(name) {
            Ok(message) => Ok(Some(parse(&message))),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns the MTU of the interface with an index, in bytes.
    ///
    /// # Errors
    /// Fails with `ENODEV` without such an interface, or if the kernel refuses the request.
    pub fn mtu_of(&mut self, index: Option<u32>) -> io::Result<u32> {
        let index = index.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
        Ok(parse(&self.without_counters(LinkUnspec::new_with_index(index))?).mtu)
    }

    /// Returns the index of an interface.
    ///
    /// # Errors
    /// Fails with `ENODEV` if there is no such interface.
    pub fn link_index(&mut self, name: &InterfaceName) -> io::Result<u32> {
        Ok(self.without_counters(LinkUnspec::new_with_name(name.as_str()))?.header.index)
    }

    /// Returns the traffic counters of an interface.
    ///
    /// # Errors
    /// Fails with `ENODEV` if there is no such interface.
    pub fn counters(&mut self, name: &InterfaceName) -> io::Result<LinkCounters> {
        let counters = self.link_message(name.as_str())?.attributes.into_iter().find_map(|attribute| match attribute {
            LinkAttribute::Stats64(stats) => Some(LinkCounters {
                rx_bytes: stats.rx_bytes,
                rx_packets: stats.rx_packets,
                tx_bytes: stats.tx_bytes,
                tx_packets: stats.tx_packets,
            }),
            _ => None,
        });
        Ok(counters.unwrap_or_default())
    }

    /// Returns whether an interface cannot have IPv6 addresses: because of its `disable_ipv6` parameter, or because the
    /// kernel has no IPv6 for it at all.
    ///
    /// # Errors
    /// Fails with `ENODEV` if there is no such interface.
    pub fn is_ipv6_disabled(&mut self, name: &str) -> io::Result<bool> {
        let families = self.link_message(name)?.attributes.into_iter().find_map(|attribute| match attribute {
            LinkAttribute::AfSpecUnspec(families) => Some(families),
            _ => None,
        });
        let parameters = families.unwrap_or_default().into_iter().find_map(|family| match family {
            AfSpecUnspec::Inet6(parts) => parts.into_iter().find_map(|part| match part {
                AfSpecInet6::DevConf(parameters) => Some(parameters),
                _ => None,
            }),
            _ => None,
        });
        Ok(parameters.is_none_or(|parameters| parameters.disable_ipv6 != 0))
    }

    fn link_message(&mut self, name: &str) -> io::Result<LinkMessage> {
        self.one_link(LinkUnspec::new_with_name(name).build())
    }

    fn without_counters(&mut self, link: LinkMessageBuilder<LinkUnspec>) -> io::Result<LinkMessage> {
        self.one_link(link.append_extra_attribute(skip_counters()).build())
    }

    fn one_link(&mut self, link: LinkMessage) -> io::Result<LinkMessage> {
        match self.query(RouteNetlinkMessage::GetLink(link))? {
            RouteNetlinkMessage::NewLink(message) => Ok(message),
            _ => Err(io::Error::from_raw_os_error(libc::ENODEV)),
        }
    }

    /// Returns all interfaces.
    ///
    /// # Errors
    /// Fails if the kernel refuses the request.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let message = LinkMessageBuilder::<LinkUnspec>::new().append_extra_attribute(skip_counters()).build();
        let answers = self.dump(RouteNetlinkMessage::GetLink(message))?;
        let link = |answer| match answer {
            RouteNetlinkMessage::NewLink(message) => Some(parse(&message)),
            _ => None,
        };
        Ok(answers.into_iter().filter_map(link).collect())
    }
}

/// Returns the attribute of a question that leaves the counters out of the answer. They are per CPU, make up half of an
/// answer, and take most of the kernel's time.
fn skip_counters() -> LinkAttribute {
    LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])
}

fn parse(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mtu: 0,
        alias: None,
        up: message.header.flags.contains(LinkFlags::Up),
        kind: None,
        leads_to: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::LinkNetNsId(number) => link.leads_to = Some(*number),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    link
}

/// The network namespace of a new interface.
#[derive(Clone, Copy, Debug)]
pub enum TargetNamespace<'a> {
    /// The namespace of the netlink socket.
    Current,
    /// The namespace of a descriptor.
    Other(BorrowedFd<'a>),
}

/// A parameter of an interface, `net.ipv4.conf.NAME.*` (the kernel's Documentation/networking/ip-sysctl.rst), by its
/// number (`IPV4_DEVCONF_*` of linux/ip.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "they have the names of the kernel's parameters")]
#[repr(u16)]
pub enum Ipv4Parameter {
    Forwarding = 1,
    ProxyArp = 3,
    AcceptRedirects = 4,
    SendRedirects = 6,
    AcceptSourceRoute = 9,
    MediumId = 14,
    ArpIgnore = 19,
}

/// The attribute of a link's IPv4 parameters (`IFLA_INET_CONF` of linux/if_link.h).
const IFLA_INET_CONF: u16 = 1;

fn in_namespace<T>(link: LinkMessageBuilder<T>, namespace: TargetNamespace<'_>) -> LinkMessageBuilder<T> {
    match namespace {
        TargetNamespace::Current => link,
        TargetNamespace::Other(namespace) => link.setns_by_fd(namespace.as_raw_fd()),
    }
}

fn one_queue<T>(link: LinkMessageBuilder<T>) -> LinkMessageBuilder<T> {
    link.append_extra_attribute(LinkAttribute::NumTxQueues(1)).append_extra_attribute(LinkAttribute::NumRxQueues(1))
}

impl NetlinkRequest {
    /// Creates a veth pair (veth(4)): one end in the namespace of the socket, the other in `namespace`. Each end has
    /// one queue. The kernel would make one for each processor, each with its own directories in sysfs. It uses them
    /// only with XDP or with generic receive offload, which nothing switches on here.
    pub fn add_veth(name: &InterfaceName, peer: &InterfaceName, namespace: TargetNamespace<'_>) -> Self {
        Self::add_veth_with_index((name, 0), peer, namespace)
    }

    /// Creates a veth pair as [`Self::add_veth`]. Its first end gets an index, or one that the kernel chooses if that
    /// is 0. The request fails with `EEXIST` if there is an interface of that index or name.
    pub fn add_veth_with_index(
        (name, index): (&InterfaceName, u32),
        peer: &InterfaceName,
        namespace: TargetNamespace<'_>,
    ) -> Self {
        let peer_link = in_namespace(one_queue(LinkUnspec::new_with_name(peer.as_str())), namespace).build();
        let link = one_queue(LinkVeth::new(name.as_str(), peer.as_str())).index(index);
        let link = link.set_info_data(InfoData::Veth(InfoVeth::Peer(peer_link)));
        Self::create(format!("create the veth pair {name} and {peer}"), RouteNetlinkMessage::NewLink(link.build()))
    }

    /// Creates a WireGuard interface in `namespace`.
    ///
    /// Its UDP socket stays in the namespace of the netlink socket, wherever the interface is (`wg_newlink()` in the
    /// kernel's drivers/net/wireguard/device.c).
    pub fn add_wireguard(name: &InterfaceName, namespace: TargetNamespace<'_>) -> Self {
        let link = in_namespace(LinkWireguard::new(name.as_str()), namespace);
        Self::create(format!("create the WireGuard interface {name}"), RouteNetlinkMessage::NewLink(link.build()))
    }

    /// Brings an interface up.
    pub fn set_up(index: u32, name: &str) -> Self {
        Self::set_link(format!("bring {name} up"), LinkUnspec::new_with_index(index).up())
    }

    /// Clears the multicast flag of an interface, which the kernel's WireGuard interfaces do not have.
    pub fn clear_multicast(index: u32, name: &str) -> Self {
        Self::set_link(format!("disable multicast on {name}"), LinkUnspec::new_with_index(index).multicast(false))
    }

    /// Sets IPv4 parameters of an interface.
    pub fn set_ipv4_parameters(index: u32, name: &str, parameters: &[(Ipv4Parameter, i32)]) -> Self {
        // The library leaves out zeros, so the list is encoded here.
        let encode = |(parameter, value): &(Ipv4Parameter, i32)| {
            let (length, kind) = (8_u16.to_ne_bytes(), (*parameter as u16).to_ne_bytes());
            [length.as_slice(), &kind, &value.to_ne_bytes()].concat()
        };
        let list = DefaultNla::new(IFLA_INET_CONF | NLA_F_NESTED, parameters.iter().flat_map(encode).collect());
        let families = vec![AfSpecUnspec::Inet(vec![AfSpecInet::Other(list)])];
        Self::set_families(format!("set the IPv4 parameters of {name}"), index, families)
    }

    /// Keeps the kernel from giving an interface link-local IPv6 addresses (`net.ipv6.conf.NAME.addr_gen_mode`). Does
    /// nothing if the kernel has no IPv6.
    pub fn forbid_link_local_addresses(index: u32, name: &str) -> Self {
        let families = vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)])];
        let request = Self::set_families(format!("forbid link-local addresses on {name}"), index, families);
        Self { tolerated: &[libc::EAFNOSUPPORT], ..request }
    }

    fn set_families(what: String, index: u32, families: Vec<AfSpecUnspec>) -> Self {
        let families = LinkAttribute::AfSpecUnspec(families);
        Self::set_link(what, LinkUnspec::new_with_index(index).append_extra_attribute(families))
    }

    /// Sets the alias of an interface.
    pub fn set_alias(index: u32, name: &str, alias: &str) -> Self {
        Self::set_link(format!("set the alias of {name}"), LinkUnspec::new_with_index(index).alias(alias))
    }

    /// Sets the MTU of an interface in bytes.
    pub fn set_mtu(index: u32, name: &str, mtu: u32) -> Self {
        Self::set_link(format!("set the MTU of {name} to {mtu}"), LinkUnspec::new_with_index(index).mtu(mtu))
    }

    fn set_link(what: String, link: LinkMessageBuilder<LinkUnspec>) -> Self {
        Self::change(what, RouteNetlinkMessage::SetLink(link.build()))
    }

    /// Removes an interface, unless it is gone already.
    pub fn delete_link(index: u32, name: &str) -> Self {
        let link = LinkUnspec::new_with_index(index).build();
        Self::remove(format!("remove {name}"), RouteNetlinkMessage::DelLink(link), &[libc::ENODEV])
    }
}
