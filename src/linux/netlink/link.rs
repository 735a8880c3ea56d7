//! Network interfaces: making, moving, configuring and listing them (rtnetlink(7)).

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};

use super::{Netlink, NetlinkRequest};
use crate::names::InterfaceName;

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its alias: a free text.
    pub alias: Option<String>,
    /// Whether it is up.
    pub up: bool,
    /// What it is: "veth", "tun", "wireguard". None for one that is the kernel's own, as `lo` is.
    pub kind: Option<String>,
}

/// What has gone through an interface since it was made. Received is what came in by it, for the programs of its namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
}

impl Netlink {
    /// The interface of a name, if there is one.
    pub fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        match self.query(RouteNetlinkMessage::GetLink(message)) {
            Ok(RouteNetlinkMessage::NewLink(message)) => Ok(Some(link_of(&message))),
            Ok(_) => Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The number of an interface.
    ///
    /// # Errors
    /// `ENODEV` if there is none of that name.
    pub fn link_index(&mut self, name: &InterfaceName) -> io::Result<u32> {
        self.link(name.as_str())?.map(|link| link.index).ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }

    /// What has gone through an interface.
    ///
    /// # Errors
    /// `ENODEV` if there is none of that name.
    pub fn counters(&mut self, name: &InterfaceName) -> io::Result<LinkCounters> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_string()));
        let RouteNetlinkMessage::NewLink(message) = self.query(RouteNetlinkMessage::GetLink(message))? else {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        };
        let counters = message.attributes.iter().find_map(|attribute| match attribute {
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

    /// All interfaces.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let mut message = LinkMessage::default();
        // The counters of all CPUs make up half of an answer, and most of the time that it takes.
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let answers = self.dump(RouteNetlinkMessage::GetLink(message))?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewLink(message) => Some(link_of(&message)),
                _ => None,
            })
            .collect())
    }
}

fn link_of(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mtu: 0,
        alias: None,
        up: message.header.flags.contains(LinkFlags::Up),
        kind: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
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

/// Where a new interface is to be.
#[derive(Clone, Copy, Debug)]
pub enum TargetNamespace<'a> {
    /// In the namespace of the socket.
    Current,
    /// In another one.
    Other(BorrowedFd<'a>),
}

fn new_link(name: &InterfaceName, place: TargetNamespace<'_>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_string()));
    if let TargetNamespace::Other(namespace) = place {
        message.attributes.push(LinkAttribute::NetNsFd(namespace.as_raw_fd()));
    }
    message
}

impl NetlinkRequest {
    /// Makes a veth pair (veth(4)), one end here, the other in `place`.
    pub fn add_veth(name: &InterfaceName, peer: &InterfaceName, place: TargetNamespace<'_>) -> Self {
        let mut message = new_link(name, TargetNamespace::Current);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(new_link(peer, place)))),
        ]));
        Self {
            what: format!("make the veth pair {name} and {peer}"),
            message: RouteNetlinkMessage::NewLink(message),
            flags: NLM_F_CREATE | NLM_F_EXCL,
            tolerated: None,
        }
    }

    /// Makes a WireGuard interface in `place`. Its UDP socket belongs to the namespace of the netlink socket that makes it,
    /// wherever the interface itself is (`wg_newlink()` in the kernel's drivers/net/wireguard/device.c).
    pub fn add_wireguard(name: &InterfaceName, place: TargetNamespace<'_>) -> Self {
        let mut message = new_link(name, place);
        message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Wireguard)]));
        Self {
            what: format!("make the WireGuard interface {name}"),
            message: RouteNetlinkMessage::NewLink(message),
            flags: NLM_F_CREATE | NLM_F_EXCL,
            tolerated: None,
        }
    }

    /// Takes an interface up.
    pub fn set_up(index: u32, name: &str) -> Self {
        Self::change_flags(index, LinkFlags::Up, LinkFlags::Up, format!("take {name} up"))
    }

    /// Has an interface say that it takes part in no multicast, as the kernel's WireGuard does.
    pub fn clear_multicast(index: u32, name: &str) -> Self {
        Self::change_flags(index, LinkFlags::Multicast, LinkFlags::empty(), format!("take {name} out of multicast"))
    }

    /// Gives the flags of an interface that `mask` names the values that they have in `flags`.
    fn change_flags(index: u32, mask: LinkFlags, flags: LinkFlags, what: String) -> Self {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = flags;
        message.header.change_mask = mask;
        Self { what, message: RouteNetlinkMessage::SetLink(message), flags: 0, tolerated: None }
    }

    /// Sets an interface's alias.
    pub fn set_alias(index: u32, name: &str, alias: &str) -> Self {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::IfAlias(alias.to_owned()));
        Self {
            what: format!("set the alias of {name}"),
            message: RouteNetlinkMessage::SetLink(message),
            flags: 0,
            tolerated: None,
        }
    }

    /// Sets an interface's MTU, in bytes.
    pub fn set_mtu(index: u32, name: &str, mtu: u32) -> Self {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::Mtu(mtu));
        Self {
            what: format!("set the MTU of {name} to {mtu}"),
            message: RouteNetlinkMessage::SetLink(message),
            flags: 0,
            tolerated: None,
        }
    }

    /// Removes an interface. That it is gone already is no error.
    pub fn delete_link(index: u32, name: &str) -> Self {
        let mut message = LinkMessage::default();
        message.header.index = index;
        Self {
            what: format!("remove {name}"),
            message: RouteNetlinkMessage::DelLink(message),
            flags: 0,
            tolerated: Some(libc::ENODEV),
        }
    }

    /// Gives an interface an address. An IPv6 address is usable at once: there is nobody on these links to be a duplicate
    /// of, and duplicate address detection (RFC 4862 section 5.4) would take a second.
    pub fn add_address(index: u32, name: &str, address: IpNet) -> Self {
        let mut message = AddressMessage::default();
        message.header.index = index;
        message.header.prefix_len = address.prefix_len();
        message.header.family = super::route::family_of(address.addr());
        if address.addr().is_ipv6() {
            message.header.flags = AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        } else {
            message.attributes.push(AddressAttribute::Local(address.addr()));
        }
        message.attributes.push(AddressAttribute::Address(address.addr()));
        Self {
            what: format!("add the address {address} to {name}"),
            message: RouteNetlinkMessage::NewAddress(message),
            flags: NLM_F_CREATE | NLM_F_EXCL,
            tolerated: None,
        }
    }
}

impl NetlinkRequest {
    /// Takes an address away. That it is gone already is no error.
    pub fn delete_address(index: u32, name: &str, address: IpNet) -> Self {
        let add = Self::add_address(index, name, address);
        let RouteNetlinkMessage::NewAddress(message) = add.message else { return add };
        Self {
            what: format!("remove the address {address} from {name}"),
            message: RouteNetlinkMessage::DelAddress(message),
            flags: 0,
            tolerated: Some(libc::EADDRNOTAVAIL),
        }
    }
}

impl Netlink {
    /// All addresses: the number of the interface and the address.
    pub fn addresses(&mut self) -> io::Result<Vec<(u32, IpNet)>> {
        let answers = self.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| {
                let RouteNetlinkMessage::NewAddress(message) = answer else { return None };
                let mut found: Option<IpAddr> = None;
                for attribute in &message.attributes {
                    match attribute {
                        // On a point-to-point link IFA_ADDRESS is the other end's, so IFA_LOCAL goes first.
                        AddressAttribute::Local(address) => found = Some(*address),
                        AddressAttribute::Address(address) if found.is_none() => found = Some(*address),
                        _ => {}
                    }
                }
                Some((message.header.index, IpNet::new(found?, message.header.prefix_len).ok()?))
            })
            .collect())
    }
}
