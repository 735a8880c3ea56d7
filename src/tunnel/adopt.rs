//! Takes over a tunnel whose keeper was killed, with the programs in it: the namespace as it stands, the kernel's WireGuard as it
//! stands, or the TUN that outlived its data path.
//!
//! Only what is certainly this tunnel is taken over, and only if it is as it was planned: its name leads to the namespace that is
//! written down, which bears the mark; what is in it can lead nowhere but into the tunnel and to the host.

use std::io;

use ipnet::IpNet;

use super::{DeviceEvents, Inner, RULES, Tunnel, device, local_networks, local_route};
use crate::failure::Doing;
use crate::failure::Failure;
use crate::linux::namespace::{self, NameLookup};
use crate::linux::netlink::link::Link;
use crate::linux::netlink::{Netlink, NetlinkRequest};
use crate::linux::nftables::Nftables;
use crate::plan::Plan;
use crate::registry::{Directory, State};
use crate::wireguard::{Backend, DeviceConfig};

impl Tunnel {
    /// Begins with a tunnel that is written down in its claimed directory. Nothing is touched yet.
    pub fn existing(plan: Plan, directory: Directory, state: &State) -> Result<Self, Failure> {
        Self::with_mark(plan, directory, state.mark.clone())
    }

    /// Takes the tunnel over. After an error it is as it was, and [`super::reclaim`] takes it away.
    ///
    /// `on_data_path_start` runs first in the thread of an embedded device.
    ///
    /// # Errors
    /// If it was not made to its end, or is not what was written down and planned.
    pub fn adopt(
        &mut self,
        state: State,
        config: &DeviceConfig,
        on_data_path_start: fn() -> io::Result<()>,
    ) -> Result<DeviceEvents, Failure> {
        let inner = self.find(&state)?;
        let namespace = inner.namespace.try_clone().doing("use the namespace")?;
        let Some(made) = state.made else {
            return Err(io::Error::other("it was killed while it was made")).doing("take the tunnel over");
        };
        let (device, events) = device::take_over(made, &self.plan, namespace, config, on_data_path_start)?;
        self.inner = Some(inner);
        self.device = Some(device);
        self.post_down_due = true;
        self.state = Some(state);
        // It is for people alone. A full disk is no reason to end what is inside.
        if let Err(error) = self.update_state(|state| state.keeper = std::process::id()) {
            tracing::warn!("{error}");
        }
        Ok(events)
    }

    /// Gives the claimed directory back, and forgets the tunnel.
    pub fn into_directory(self) -> Directory {
        self.directory
    }

    /// The namespace, if it is the one that was written down, and as it was planned.
    fn find(&mut self, state: &State) -> Result<Inner, Failure> {
        let path = self.plan.namespace.clone();
        let foreign = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{} {what}", path.display()));
        let doing = "take the tunnel over";
        let NameLookup::Namespace(namespace) = namespace::look_up(&path).doing(doing)? else {
            return Err(foreign("is no namespace any more")).doing(doing);
        };
        if namespace.id().doing(doing)? != state.namespace {
            return Err(foreign("is another namespace by now")).doing(doing);
        }
        let mut netlink = namespace.run(Netlink::open).doing(doing)?;
        let mark = state.mark.text();
        let host_end = self.host.link(self.plan.veth.host_interface.as_str()).doing(doing)?;
        let is_marked = |link: &Option<Link>| link.as_ref().and_then(|link| link.alias.as_deref()) == Some(mark);
        if !is_marked(&netlink.link("lo").doing(doing)?) || !is_marked(&host_end) {
            return Err(foreign("does not bear the tunnel's mark")).doing(doing);
        }
        match deviation(&mut netlink, &self.plan, state.made).doing(doing)? {
            Some(deviation) => return Err(foreign(&deviation)).doing(doing),
            None => complete(&mut netlink, &self.plan).doing(doing)?,
        }
        // Whatever has become of them.
        let mut rules = namespace.run(Nftables::open).doing(doing)?;
        rules.replace(&self.plan.firewall.inside, mark).doing(RULES).map_err(local_networks::lacking)?;
        self.host_part.open(&self.plan, &self.mark)?;
        Ok(Inner { namespace, netlink, rules })
    }
}

/// What in a namespace is not as it was planned, as far as it could lead out, or not work.
fn deviation(netlink: &mut Netlink, plan: &Plan, made: Option<Backend>) -> io::Result<Option<String>> {
    let (inner, wireguard) = (&plan.veth.inner_interface, &plan.wireguard.interface);
    let kind = match made {
        Some(Backend::Kernel) => "wireguard",
        _ => "tun",
    };
    let expected = [("lo", None), (inner.as_str(), Some("veth")), (wireguard.as_str(), Some(kind))];
    let links = netlink.links()?;
    for link in &links {
        match expected.iter().find(|(name, _)| *name == link.name) {
            Some((_, kind)) if kind.is_none() || link.kind.as_deref() == *kind => {}
            _ => return Ok(Some(format!("holds the interface {}, which is not the tunnel's", link.name))),
        }
    }
    let index = |name: &str| links.iter().find(|link| link.name == name && link.up).map(|link| link.index);
    let (Some(inner_index), Some(_)) = (index(inner.as_str()), index(wireguard.as_str())) else {
        return Ok(Some("has not all of the tunnel's interfaces".into()));
    };

    let addresses = netlink.addresses()?;
    let at = |index: u32| addresses.iter().filter(move |(of, _)| *of == index).map(|(_, address)| *address);
    let veth = veth_networks(plan);
    let is_local = |net: &IpNet| plan.local.networks.contains(net);
    if let Some(foreign) = at(inner_index).find(|address| !veth.contains(&address.trunc())) {
        return Ok(Some(format!("has the address {foreign} on {inner}")));
    }

    let routes = netlink.routes()?;
    let multicast = |net: &IpNet| net.addr().is_multicast();
    let strays = routes.iter().filter(|route| route.interface == Some(inner_index)).find(|route| {
        let destination = route.destination;
        !multicast(&destination) && !is_local(&destination) && !veth.iter().any(|net| net.contains(&destination))
    });
    Ok(strays.map(|stray| format!("routes {} by {inner}", stray.destination)))
}

/// Gives WireGuard's interface what it lacks of what was planned: a keeper that was killed while it applied a changed configuration
/// has written that down, and not yet done. Nothing of it leads out.
fn complete(netlink: &mut Netlink, plan: &Plan) -> io::Result<()> {
    let (wireguard, veth) = (&plan.wireguard, &plan.veth);
    let link = netlink.link_index(&veth.inner_interface)?;
    let (name, index) = (wireguard.interface.as_str(), netlink.link_index(&wireguard.interface)?);
    let (addresses, routes) = (netlink.addresses()?, netlink.routes()?);
    let lacks_address = |wanted: &&IpNet| !addresses.contains(&(index, **wanted));
    let lacks = |by: u32, wanted: &IpNet| {
        !routes.iter().any(|route| route.interface == Some(by) && route.destination == *wanted)
    };
    let mut requests: Vec<NetlinkRequest> = Vec::new();
    requests.extend(
        wireguard
            .addresses
            .iter()
            .filter(lacks_address)
            .map(|it| NetlinkRequest::add_address(index, name, *it).or_exists()),
    );
    requests.extend(
        wireguard
            .routes
            .iter()
            .filter(|it| lacks(index, it))
            .map(|it| NetlinkRequest::add_route(index, name, *it, None).or_exists()),
    );
    let local = plan.local.networks.iter().filter(|it| lacks(link, it));
    requests.extend(local.map(|it| local_route(link, veth, *it).or_exists()));
    Ok(netlink.execute(requests)?)
}

/// The networks of the veth's addresses.
fn veth_networks(plan: &Plan) -> Vec<IpNet> {
    let ipv4 = IpNet::new(plan.veth.inner_ipv4.into(), 31).ok();
    let ipv6 = plan.veth.inner_ipv6.and_then(|address| IpNet::new(address.into(), 127).ok());
    [ipv4, ipv6].into_iter().flatten().map(|net| net.trunc()).collect()
}
