//! Routes: adding, listing and asking for them (rtnetlink(7)).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
    RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Netlink, NetlinkRequest};

/// A route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where it leads.
    pub destination: IpNet,
    /// The interface that it leaves by.
    pub interface: Option<u32>,
    /// The router that it goes through.
    pub gateway: Option<IpAddr>,
    /// The host's own address that is used on it, where the kernel says.
    pub source: Option<IpAddr>,
    /// Its own MTU, where it has one.
    pub mtu: Option<u32>,
    /// Its table.
    pub table: u32,
    /// Whether it leads to single others: not to the host itself, to a group, or nowhere.
    pub unicast: bool,
}

impl Route {
    /// The table of the host's own addresses (`RT_TABLE_LOCAL` of rtnetlink(7)).
    pub const LOCAL: u32 = 255;
}

pub(super) fn family_of(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn route_of(message: &RouteMessage) -> Option<Route> {
    let any: IpAddr = match message.header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let (mut destination, mut interface, mut gateway, mut source, mut mtu) = (any, None, None, None, None);
    let mut table = u32::from(message.header.table);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip_of(address)?,
            RouteAttribute::Gateway(address) => gateway = ip_of(address),
            // A router of IPv6 for a network of IPv4.
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some((*address).into()),
            RouteAttribute::Via(RouteVia::Inet(address)) => gateway = Some((*address).into()),
            RouteAttribute::PrefSource(address) => source = ip_of(address),
            RouteAttribute::Oif(index) => interface = Some(*index),
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    let destination = IpNet::new(destination, message.header.destination_prefix_length).ok()?;
    let unicast = message.header.kind == RouteType::Unicast;
    Some(Route { destination, interface, gateway, source, mtu, table, unicast })
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

impl Netlink {
    /// All routes of all tables and of both families.
    pub fn routes(&mut self) -> io::Result<Vec<Route>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let answers = match self.dump(RouteNetlinkMessage::GetRoute(message)) {
                Ok(answers) => answers,
                // A kernel without IPv6 answers so.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)) => continue,
                Err(error) => return Err(error),
            };
            routes.extend(answers.iter().filter_map(|answer| match answer {
                RouteNetlinkMessage::NewRoute(message) => route_of(message),
                _ => None,
            }));
        }
        Ok(routes)
    }

    /// The route that a packet to `address` would take.
    ///
    /// # Errors
    /// `ENETUNREACH` or `EHOSTUNREACH` if there is none.
    pub fn route_to(&mut self, address: IpAddr) -> io::Result<Route> {
        let mut message = RouteMessage::default();
        message.header.address_family = family_of(address);
        message.header.destination_prefix_length = if address.is_ipv4() { 32 } else { 128 };
        message.attributes.push(RouteAttribute::Destination(address.into()));
        match self.query(RouteNetlinkMessage::GetRoute(message))? {
            RouteNetlinkMessage::NewRoute(message) => route_of(&message),
            _ => None,
        }
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ENETUNREACH))
    }
}

impl NetlinkRequest {
    /// Adds a route to the main table, by an interface and, if given, through a router.
    pub fn add_route(index: u32, name: &str, destination: IpNet, gateway: Option<IpAddr>) -> Self {
        let mut message = RouteMessage::default();
        message.header.address_family = family_of(destination.addr());
        message.header.destination_prefix_length = destination.prefix_len();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.kind = RouteType::Unicast;
        message.header.scope =
            if gateway.is_some() || destination.addr().is_ipv6() { RouteScope::Universe } else { RouteScope::Link };
        message.attributes.push(RouteAttribute::Destination(destination.network().into()));
        if let Some(gateway) = gateway {
            message.attributes.push(RouteAttribute::Gateway(gateway.into()));
        }
        message.attributes.push(RouteAttribute::Oif(index));
        Self {
            what: format!("add the route {destination} by {name}"),
            message: RouteNetlinkMessage::NewRoute(message),
            flags: NLM_F_CREATE | NLM_F_EXCL,
            tolerated: None,
        }
    }

    /// Takes a route of the main table away. That it is gone already is no error.
    pub fn delete_route(index: u32, name: &str, destination: IpNet) -> Self {
        let add = Self::add_route(index, name, destination, None);
        let RouteNetlinkMessage::NewRoute(mut message) = add.message else { return add };
        // Whoever has made it: the kernel makes the one to an address's own network.
        message.header.protocol = RouteProtocol::Unspec;
        message.header.scope = RouteScope::NoWhere;
        Self {
            what: format!("remove the route {destination} by {name}"),
            message: RouteNetlinkMessage::DelRoute(message),
            flags: 0,
            tolerated: Some(libc::ESRCH),
        }
    }
}
