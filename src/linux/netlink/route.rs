//! Routes: adding, listing and looking them up (rtnetlink(7)).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::RouteMessageBuilder;

use super::{Netlink, NetlinkRequest};

/// A route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The destination network.
    pub destination: IpNet,
    /// The index of the outgoing interface.
    pub interface: Option<u32>,
    /// The address of the next router.
    pub gateway: Option<IpAddr>,
    /// The preferred source address, if the kernel reports one.
    pub source: Option<IpAddr>,
    /// The MTU of the route in bytes, if it has one of its own.
    pub mtu: Option<u32>,
    /// The number of the routing table.
    pub table: u32,
    /// Whether the route leads to other hosts: it is not local, broadcast, multicast, blackhole or the like.
    pub unicast: bool,
}

impl Route {
    /// The table of the host's own addresses (`RT_TABLE_LOCAL` of rtnetlink(7)).
    pub const LOCAL: u32 = 255;
}

pub(super) fn family_of(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn parse(message: &RouteMessage) -> Option<Route> {
    let any: IpAddr = match message.header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let (mut destination, mut interface, mut gateway, mut source, mut mtu) = (any, None, None, None, None);
    let mut table = u32::from(message.header.table);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = parse_address(address)?,
            RouteAttribute::Gateway(address) => gateway = parse_address(address),
            // RTA_VIA names a router of the other family: an IPv6 router for an IPv4 network.
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some((*address).into()),
            RouteAttribute::Via(RouteVia::Inet(address)) => gateway = Some((*address).into()),
            RouteAttribute::PrefSource(address) => source = parse_address(address),
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

fn parse_address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

impl Netlink {
    /// Returns all IPv4 and IPv6 routes of all tables.
    ///
    /// # Errors
    /// Fails if the kernel refuses the request.
    pub fn routes(&mut self) -> io::Result<Vec<Route>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let answers = match self.dump(RouteNetlinkMessage::GetRoute(message)) {
                Ok(answers) => answers,
                // The answer of a kernel without IPv6.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)) => continue,
                Err(error) => return Err(error),
            };
            routes.extend(answers.iter().filter_map(|answer| match answer {
                RouteNetlinkMessage::NewRoute(message) => parse(message),
                _ => None,
            }));
        }
        Ok(routes)
    }

    /// Returns the route that a packet to `address` would take.
    ///
    /// # Errors
    /// Fails with `ENETUNREACH` or `EHOSTUNREACH` if there is no such route.
    pub fn route_to(&mut self, address: IpAddr) -> io::Result<Route> {
        let message = route(address.into()).build();
        match self.query(RouteNetlinkMessage::GetRoute(message))? {
            RouteNetlinkMessage::NewRoute(message) => parse(&message),
            _ => None,
        }
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ENETUNREACH))
    }
}

/// Builds a static unicast route of the main table.
fn route(destination: IpNet) -> RouteMessageBuilder<IpAddr> {
    RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(destination.network(), destination.prefix_len())
        .expect("the prefix length of an IpNet fits its address")
}

impl NetlinkRequest {
    /// Adds a route to the main table, by an interface and, if given, through a router.
    pub fn add_route(index: u32, name: &str, destination: IpNet, gateway: Option<IpAddr>) -> Self {
        let mut message = route(destination).output_interface(index);
        match gateway {
            Some(gateway) => message.get_mut().attributes.push(RouteAttribute::Gateway(gateway.into())),
            None if destination.addr().is_ipv4() => message = message.scope(RouteScope::Link),
            None => {}
        }
        Self::create(
            format!("add the route {destination} through {name}"),
            RouteNetlinkMessage::NewRoute(message.build()),
        )
    }

    /// Removes a route from the main table, unless it is gone already.
    pub fn delete_route(index: u32, name: &str, destination: IpNet) -> Self {
        // The kernel itself adds the route to the network of an address, so the protocol and the scope must not count.
        let message = route(destination).output_interface(index);
        let message = message.protocol(RouteProtocol::Unspec).scope(RouteScope::NoWhere).build();
        Self::remove(
            format!("remove the route {destination} through {name}"),
            RouteNetlinkMessage::DelRoute(message),
            libc::ESRCH,
        )
    }
}
