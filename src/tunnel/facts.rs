//! Reads the facts about the host that a plan needs, once. Changes nothing and needs no privilege.

use std::io;

use crate::config::{Endpoint, WgQuick};
use crate::linux::capabilities;
use crate::linux::netlink::Netlink;
use crate::plan::{EndpointRoute, Facts, HostInterface, HostRoute};

/// Reads the facts. `host` is a netlink socket in the host's namespace.
pub fn read(host: &mut Netlink, wireguard: &WgQuick) -> io::Result<Facts> {
    let interfaces = host
        .links()?
        .into_iter()
        .map(|link| HostInterface { name: link.name, index: link.index, mtu: link.mtu })
        .collect();
    let routes = host
        .routes()?
        .into_iter()
        .map(|route| HostRoute { destination: route.destination, interface: route.interface, mtu: route.mtu })
        .collect();
    let mut endpoint_routes = Vec::new();
    for peer in &wireguard.peers {
        let Some(Endpoint::Address { address, .. }) = &peer.endpoint else { continue };
        // An endpoint that cannot be reached yet says nothing about the MTU; it is no error here.
        if let Ok(route) = host.route_to(address.ip()) {
            let (interface, mtu) = (route.interface, route.mtu);
            endpoint_routes.push(EndpointRoute { address: address.ip(), interface, mtu });
        }
    }
    Ok(Facts { interfaces, routes, endpoint_routes, last_capability: capabilities::last()? })
}
