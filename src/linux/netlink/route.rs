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
    /// The metric. Of the routes to a destination, the kernel uses the one with the lowest metric.
    pub metric: u32,
    /// The kind.
    pub kind: RouteKind,
}

/// The kind of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteKind {
    /// It leads to other hosts.
    Unicast,
    /// It refuses packets with `EHOSTUNREACH`.
    Unreachable,
    /// It is local, broadcast, multicast, blackhole or the like.
    Other,
}

impl Route {
    /// The table of the host's own addresses (`RT_TABLE_LOCAL` of rtnetlink(7)).
    pub const LOCAL: u32 = 255;
    /// The table that the kernel uses unless a policy rule names another (`RT_TABLE_MAIN` of rtnetlink(7)).
    pub const MAIN: u32 = 254;
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
    let mut metric = 0;
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
            RouteAttribute::Priority(number) => metric = *number,
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
    let kind = match message.header.kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::Unreachable => RouteKind::Unreachable,
        _ => RouteKind::Other,
    };
    Some(Route { destination, interface, gateway, source, mtu, table, metric, kind })
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
        in_each_family(|family| {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let answers = self.dump(RouteNetlinkMessage::GetRoute(message))?;
            let route = |answer| match answer {
                RouteNetlinkMessage::NewRoute(message) => parse(&message),
                _ => None,
            };
            Ok(answers.into_iter().filter_map(route).collect())
        })
    }

    /// Returns the IPv4 and IPv6 routes of a table.
    ///
    /// # Errors
    /// Fails if the kernel refuses the request.
    pub fn routes_of(&mut self, table: u32) -> io::Result<Vec<Route>> {
        Ok(self.routes()?.into_iter().filter(|route| route.table == table).collect())
    }

    /// Returns the route that a packet to `address` would take.
    ///
    /// # Errors
    /// Fails with `ENETUNREACH` or `EHOSTUNREACH` if there is no such route.
    pub fn route_to(&mut self, address: IpAddr) -> io::Result<Route> {
        self.find_route(route(address.into()).build())
    }

    /// Returns the route that a packet to `address` with a mark would take (`SO_MARK` of socket(7)).
    ///
    /// # Errors
    /// Fails with `ENETUNREACH` or `EHOSTUNREACH` if there is no such route.
    pub fn route_of_marked(&mut self, address: IpAddr, mark: u32) -> io::Result<Route> {
        self.find_route(route(address.into()).mark(mark).build())
    }

    fn find_route(&mut self, message: RouteMessage) -> io::Result<Route> {
        match self.query(RouteNetlinkMessage::GetRoute(message))? {
            RouteNetlinkMessage::NewRoute(message) => parse(&message),
            _ => None,
        }
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ENETUNREACH))
    }
}

/// Returns what `list` returns for IPv4, and after it what it returns for IPv6 unless the kernel lacks IPv6.
pub(super) fn in_each_family<T>(mut list: impl FnMut(AddressFamily) -> io::Result<Vec<T>>) -> io::Result<Vec<T>> {
    let mut all = list(AddressFamily::Inet)?;
    match list(AddressFamily::Inet6) {
        Ok(more) => all.extend(more),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)) => {}
        Err(error) => return Err(error),
    }
    Ok(all)
}

/// Builds a static unicast route of the main table.
fn route(destination: IpNet) -> RouteMessageBuilder<IpAddr> {
    RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(destination.network(), destination.prefix_len())
        .expect("the prefix length of an IpNet fits its address")
}

/// Builds a route that refuses packets.
fn unreachable(table: u32, destination: IpNet, metric: u32) -> RouteMessageBuilder<IpAddr> {
    route(destination).table_id(table).priority(metric).kind(RouteType::Unreachable)
}

/// Builds a route that delivers a network's packets to the namespace itself. `lo` is its first interface.
fn local(destination: IpNet) -> RouteMessageBuilder<IpAddr> {
    route(destination).table_id(Route::LOCAL).kind(RouteType::Local).output_interface(1)
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

    /// Adds a route by an interface to a table.
    pub fn add_route_in(table: u32, index: u32, name: &str, destination: IpNet) -> Self {
        let scope = if destination.addr().is_ipv4() { RouteScope::Link } else { RouteScope::Universe };
        let message = route(destination).table_id(table).output_interface(index).scope(scope);
        Self::create(
            format!("add the route {destination} through {name} to table {table}"),
            RouteNetlinkMessage::NewRoute(message.build()),
        )
    }

    /// Adds a route that makes all addresses of a network local, as if `lo` had them (`RTN_LOCAL` of rtnetlink(7)).
    pub fn add_local_route(destination: IpNet) -> Self {
        let what = format!("make the addresses of {destination} local");
        Self::create(what, RouteNetlinkMessage::NewRoute(local(destination).scope(RouteScope::Host).build()))
    }

    /// Removes a route that [`Self::add_local_route`] has added, unless it is gone already.
    pub fn delete_local_route(destination: IpNet) -> Self {
        Self::remove_route(format!("make the addresses of {destination} foreign"), local(destination))
    }

    /// Adds a route to a table that refuses packets with `EHOSTUNREACH`. `metric` decides between it and other routes
    /// to the destination: the lowest wins.
    pub fn add_unreachable_route(table: u32, destination: IpNet, metric: u32) -> Self {
        Self::create(
            format!("add the unreachable route {destination} to table {table}"),
            RouteNetlinkMessage::NewRoute(unreachable(table, destination, metric).build()),
        )
    }

    /// Removes a route from the main table, unless it is gone already.
    pub fn delete_route(index: u32, name: &str, destination: IpNet) -> Self {
        let message = route(destination).output_interface(index);
        Self::remove_route(format!("remove the route {destination} through {name}"), message)
    }

    /// Removes a route by an interface from a table, unless it is gone already.
    pub fn delete_route_in(table: u32, index: u32, name: &str, destination: IpNet) -> Self {
        let message = route(destination).table_id(table).output_interface(index);
        Self::remove_route(format!("remove the route {destination} through {name} from table {table}"), message)
    }

    /// Removes a route that [`Self::add_unreachable_route`] has added, unless it is gone already.
    pub fn delete_unreachable_route(table: u32, destination: IpNet, metric: u32) -> Self {
        let what = format!("remove the unreachable route {destination} from table {table}");
        Self::remove_route(what, unreachable(table, destination, metric))
    }

    fn remove_route(what: String, message: RouteMessageBuilder<IpAddr>) -> Self {
        // The kernel itself adds the route to the network of an address, so the protocol and the scope must not count.
        let message = message.protocol(RouteProtocol::Unspec).scope(RouteScope::NoWhere).build();
        // In place of a missing default route, IPv6 finds its built-in route that refuses (`__ip6_del_rt()` in the
        // kernel's net/ipv6/route.c) and answers ENOENT.
        Self::remove(what, RouteNetlinkMessage::DelRoute(message), &[libc::ESRCH, libc::ENOENT])
    }
}
