//! Reads the facts about the namespace that the plan of an attached tunnel needs. Changes nothing.

use std::io;
use std::net::SocketAddr;

use rustix::fs::{Access, access};

use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::netlink::Netlink;
use crate::linux::sysctl;
use crate::linux::tun;
use crate::plan::shared_namespace::{self, MARK, SharedNamespaceFacts, TABLE};
use crate::plan::{DNS_PORT, EndpointRoute, Facts, HostInterface, HostRoute};
use crate::tunnel::shared_namespace::container_addresses;

/// Reads the facts. `netlink` is a socket in the namespace, and `endpoints` are the known addresses of endpoints.
///
/// The facts exclude what belongs to an attached tunnel, so that attaching it again gives the same plan.
pub(super) fn read(netlink: &mut Netlink, endpoints: &[SocketAddr]) -> io::Result<SharedNamespaceFacts> {
    let wireguard = shared_namespace::interface();
    let (own, others): (Vec<_>, Vec<_>) =
        netlink.links()?.into_iter().partition(|link| link.name == wireguard.as_str());
    let own = own.first().map(|link| link.index);
    let routes = netlink.routes()?.into_iter().filter(|route| route.table != TABLE && route.interface != own);
    let routes = routes.map(|route| HostRoute {
        destination: route.destination,
        interface: route.interface,
        mtu: route.mtu,
        attached: false,
    });
    let routes = routes.collect();
    let mut endpoint_routes = Vec::new();
    for address in endpoints {
        // An endpoint without a route now may have one later. It only says nothing about the MTU.
        if let Ok(route) = netlink.route_of_marked(address.ip(), MARK) {
            endpoint_routes.push(EndpointRoute { address: address.ip(), interface: route.interface, mtu: route.mtu });
        }
    }
    let interfaces =
        others.into_iter().map(|link| HostInterface { name: link.name, index: link.index, mtu: link.mtu }).collect();
    let underlay = Facts {
        interfaces,
        routes,
        endpoint_routes,
        without_ipv6: sysctl::get_if_present("net/ipv6/conf/all/disable_ipv6")?.is_none(),
        ..Facts::default()
    };
    let addresses = container_addresses(netlink, &wireguard)?;
    Ok(SharedNamespaceFacts {
        underlay,
        addresses,
        ipv6_is_off: ipv6_is_off(wireguard.as_str())?,
        has_tun: access(tun::DEVICE, Access::READ_OK | Access::WRITE_OK).is_ok(),
        dns_port_is_privileged: dns_port_is_privileged()?,
    })
}

/// Returns whether this process may not bind to the port of resolvers (`ip_unprivileged_port_start` of the kernel's
/// ip-sysctl.rst).
fn dns_port_is_privileged() -> io::Result<bool> {
    let first = sysctl::get_if_present("net/ipv4/ip_unprivileged_port_start")?;
    let is_privileged = first.and_then(|first| first.parse().ok()).is_none_or(|first: u16| first > DNS_PORT);
    Ok(is_privileged && !capabilities::effective()?.contains(CapabilitySet::NET_BIND_SERVICE))
}

/// Returns whether IPv6 is switched off for WireGuard's interface and cannot be switched on.
fn ipv6_is_off(wireguard: &str) -> io::Result<bool> {
    for interface in [wireguard, "default"] {
        let parameter = format!("net/ipv6/conf/{interface}/disable_ipv6");
        if let Some(value) = sysctl::get_if_present(&parameter)? {
            return Ok(value != "0" && access(format!("/proc/sys/{parameter}"), Access::WRITE_OK).is_err());
        }
    }
    Ok(false)
}
