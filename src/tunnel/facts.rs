//! Reads the facts about the host that a plan needs. Changes nothing, and needs no privileges.

use std::io;

use ipnet::IpNet;

use super::forwarding;
use crate::config::{Config, Endpoint};
use crate::linux::capabilities;
use crate::linux::iptables;
use crate::linux::netlink::Netlink;
use crate::linux::netlink::link::Link;
use crate::linux::netlink::route::{Route, RouteKind};
use crate::linux::nftables::{DroppingChain, Nftables};
use crate::linux::sysctl;
use crate::plan::{EndpointRoute, Facts, ForeignChain, ForwardDrop, HostInterface, HostRoute, RootlessFacts};
use crate::registry::{self, Scope};

/// Reads the facts. `host` is a netlink socket in the host's namespace.
///
/// The facts exclude what belongs to a running tunnel of this name, so that planning it again gives the same plan. They
/// include what other tunnels have chosen and may not have created yet.
///
/// # Errors
/// If the kernel cannot be queried.
pub fn read(host: &mut Netlink, config: &Config) -> io::Result<Facts> {
    let Config { name, wireguard, local, .. } = config;
    // A state that cannot be read is reported when the tunnel is created.
    let own = registry::read(name).unwrap_or(None);
    let is_own = |link: &Link| own.as_ref().is_some_and(|state| link.alias.as_deref() == Some(state.mark.text()));
    let (own, others): (Vec<Link>, Vec<Link>) = host.links()?.into_iter().partition(is_own);
    let mut interfaces: Vec<HostInterface> =
        others.into_iter().map(|link| HostInterface { name: link.name, index: link.index, mtu: link.mtu }).collect();
    let mut routes: Vec<HostRoute> = host
        .routes()?
        .into_iter()
        .filter(|route| !own.iter().any(|link| Some(link.index) == route.interface))
        .map(|route| HostRoute {
            attached: is_attached(&route),
            destination: route.destination,
            interface: route.interface,
            mtu: route.mtu,
        })
        .collect();
    // A user who may not read the plans of others cannot create a tunnel either.
    for veth in registry::reservations_of_others(name).unwrap_or_default().into_iter().filter_map(|other| other.veth) {
        if !interfaces.iter().any(|interface| interface.name == veth.host_interface.as_str()) {
            interfaces.push(HostInterface { name: veth.host_interface.to_string(), index: 0, mtu: 0 });
        }
        let ipv4 = IpNet::new(veth.host_ipv4.into(), 31).ok();
        let ipv6 = veth.host_ipv6.and_then(|address| IpNet::new(address.into(), 127).ok());
        let link = |net: IpNet| HostRoute { destination: net.trunc(), interface: None, mtu: None, attached: false };
        routes.extend([ipv4, ipv6].into_iter().flatten().map(link));
    }
    let mut endpoint_routes = Vec::new();
    for peer in &wireguard.peers {
        let Some(Endpoint::Address { address, .. }) = &peer.endpoint else { continue };
        // An endpoint without a route now may have one later. It only says nothing about the MTU.
        if let Ok(route) = host.route_to(address.ip()) {
            let (interface, mtu) = (route.interface, route.mtu);
            endpoint_routes.push(EndpointRoute { address: address.ip(), interface, mtu });
        }
    }
    let (last_capability, ipv6_forwarding) = (capabilities::last()?, forwarding::of_ipv6()?);
    let forward_drops =
        if !local.has_networks() || Scope::current() == Scope::User { Vec::new() } else { forward_drops() };
    let without_ipv6 = sysctl::get_if_present("net/ipv6/conf/all/disable_ipv6")?.is_none();
    let rootless = match Scope::current() {
        Scope::System => None,
        Scope::User => {
            let first = sysctl::get_if_present("net/ipv4/ip_unprivileged_port_start")?;
            let first_port = first.and_then(|first| first.parse().ok()).unwrap_or(1024);
            Some(RootlessFacts { first_port })
        }
    };
    Ok(Facts {
        interfaces,
        routes,
        endpoint_routes,
        last_capability,
        forward_drops,
        without_ipv6,
        ipv6_forwarding,
        rootless,
    })
}

/// Returns the firewall chains of other programs that may drop forwarded packets. Returns none if the user may not read
/// them or the kernel has no firewall.
fn forward_drops() -> Vec<ForwardDrop> {
    let found = Nftables::open().and_then(|mut rules| rules.dropping_forward_chains());
    let found = found.inspect_err(|error| tracing::debug!(%error, "cannot read the host's firewall rules"));
    let drop = |DroppingChain { family, table, name, interfaces }| {
        let chain = ForeignChain::Nftables { family, table, name };
        ForwardDrop { chain, interfaces }
    };
    let legacy = [false, true].into_iter().filter_map(|ipv6| {
        let forward = iptables::forward_chain(ipv6).ok().filter(|forward| forward.drops)?;
        Some(ForwardDrop { chain: ForeignChain::Legacy { ipv6 }, interfaces: forward.interfaces })
    });
    found.unwrap_or_default().into_iter().map(drop).chain(legacy).collect()
}

/// Returns whether a route leads to a network that one of the host's interfaces is in.
fn is_attached(route: &Route) -> bool {
    let is_network = (1..route.destination.max_prefix_len()).contains(&route.destination.prefix_len());
    route.kind == RouteKind::Unicast && route.gateway.is_none() && route.table != Route::LOCAL && is_network
}
