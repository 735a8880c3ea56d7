//! Takes over a tunnel whose keeper was killed, with the programs in it: the namespace, and the WireGuard device that
//! outlived the keeper.
//!
//! Two conditions must hold. It must be this tunnel: its name leads to the namespace that the state names, and both
//! ends carry the tunnel's mark. And it must be as planned: nothing inside leads anywhere but into the tunnel and to
//! the host.

use std::io;

use ipnet::IpNet;

use super::{DeviceEvents, LOADING_RULES, OpenNamespace, Tunnel, container, device, host_rules, local_route};
use crate::failure::{Doing, Failure};
use crate::linux::namespace::{self, NameLookup};
use crate::linux::netlink::link::Link;
use crate::linux::netlink::{Netlink, NetlinkRequest};
use crate::linux::nftables::Nftables;
use crate::plan::{Plan, VethPlan};
use crate::registry::TunnelState;
use crate::wireguard::{Backend, DeviceConfig};

/// The operation that a failure names.
const TAKING_OVER: &str = "take the tunnel over";

impl Tunnel {
    /// Takes the tunnel over. After a failure it is as it was; [`super::reclaim`] removes it.
    ///
    /// `on_data_path_start` runs first in the thread of an embedded device.
    ///
    /// # Errors
    /// If the tunnel was not completely created, or differs from its state or its plan.
    pub fn adopt(
        &mut self,
        state: TunnelState,
        config: &DeviceConfig,
        on_data_path_start: fn() -> io::Result<()>,
    ) -> Result<DeviceEvents, Failure> {
        let inner = self.find(&state)?;
        let namespace = inner.namespace.try_clone().doing("use the namespace")?;
        let Some(backend) = state.made else {
            return Err(io::Error::other("its keeper was killed while it created the tunnel")).doing(TAKING_OVER);
        };
        let (device, events) =
            device::take_over(backend, &self.plan.wireguard.interface, namespace, config, on_data_path_start)?;
        self.inner = Some(inner);
        self.device = Some(device);
        self.post_down_due = true;
        self.state = Some(state);
        // Only people read the keeper's process ID. A full disk must not end the programs inside.
        if let Err(failure) = self.update_state(|state| state.keeper = std::process::id()) {
            tracing::warn!("{failure}");
        }
        Ok(events)
    }

    /// Opens the namespace, if it is the one in the state and as planned.
    fn find(&mut self, state: &TunnelState) -> Result<OpenNamespace, Failure> {
        let path = self.plan.namespace.clone();
        let shown = path.as_ref().map_or_else(|| "the namespace".to_owned(), |path| path.display().to_string());
        let foreign = |what: &str| {
            let error = io::Error::new(io::ErrorKind::InvalidData, format!("{shown} {what}"));
            Failure::of(TAKING_OVER, &error)
        };
        let found = match &path {
            Some(path) => match namespace::look_up(path).doing(TAKING_OVER)? {
                NameLookup::Namespace(namespace) => Some(namespace),
                NameLookup::Free | NameLookup::File(_) => None,
            },
            None => self.place.take(),
        };
        let Some(mut namespace) = found else { return Err(foreign("is not there any more")) };
        if namespace.id().doing(TAKING_OVER)? != state.namespace {
            return Err(foreign("is a different namespace now"));
        }
        let mut netlink = namespace.run(Netlink::open).doing(TAKING_OVER)?;
        let mark = state.mark.text();
        let is_marked = |link: &Option<Link>| link.as_ref().and_then(|link| link.alias.as_deref()) == Some(mark);
        let mut has_marks = is_marked(&netlink.link("lo").doing(TAKING_OVER)?);
        if let Some(veth) = self.plan.veth.as_ref().filter(|_| !self.plan.rootless) {
            has_marks &= is_marked(&self.host.link(veth.host_interface.as_str()).doing(TAKING_OVER)?);
        }
        if !has_marks {
            return Err(foreign("does not carry the tunnel's mark"));
        }
        if self.plan.rootless {
            // Whatever has become of it, its other end was in the former keeper's gateway.
            let rules = namespace.run(Nftables::open).doing(TAKING_OVER)?;
            self.inner = Some(OpenNamespace { namespace, netlink, rules });
            self.renew_link()?;
            OpenNamespace { namespace, netlink, .. } = self.inner.take().ok_or_else(|| foreign("is gone"))?;
        }
        let deviation = match &self.plan.veth {
            Some(veth) => deviation(&mut netlink, &self.plan, veth, state.made),
            None => container::deviation(&mut netlink, &self.plan, state.made),
        };
        if let Some(deviation) = deviation.doing(TAKING_OVER)? {
            return Err(foreign(&deviation));
        }
        // Another program may have changed the rules.
        let mut rules = namespace.run(Nftables::open).doing(TAKING_OVER)?;
        match &self.plan.veth {
            Some(veth) => {
                complete(&mut netlink, &self.plan, veth).doing(TAKING_OVER)?;
                let loaded = rules.replace(&self.plan.firewall.inside, mark);
                loaded.doing(LOADING_RULES).map_err(host_rules::advise_on_kernel)?;
            }
            None => container::complete(&mut netlink, &mut rules, &self.plan, Some(self.plan.wireguard.mtu))?,
        }
        if !self.plan.rootless {
            self.host_rules.open(&self.plan, &self.mark)?;
        }
        Ok(OpenNamespace { namespace, netlink, rules })
    }
}

/// Returns the kind of WireGuard's interface, as the kernel names it.
pub(super) fn kind_of(made: Option<Backend>) -> &'static str {
    match made {
        Some(Backend::Kernel) => "wireguard",
        _ => "tun",
    }
}

/// Returns how a namespace differs from its plan, if packets could leave by the difference, or the tunnel could not
/// work.
fn deviation(netlink: &mut Netlink, plan: &Plan, veth: &VethPlan, made: Option<Backend>) -> io::Result<Option<String>> {
    let (inner, wireguard) = (&veth.inner_interface, &plan.wireguard.interface);
    let kind = kind_of(made);
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
        return Ok(Some("lacks one of the tunnel's interfaces".into()));
    };

    let addresses = netlink.addresses()?;
    let at = |index: u32| addresses.iter().filter(move |(of, _)| *of == index).map(|(_, address)| *address);
    let veth = veth_networks(veth);
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
    Ok(strays.map(|stray| format!("routes {} through {inner}", stray.destination)))
}

/// Adds the planned addresses and routes that are missing. A keeper that was killed while it applied a change had
/// written the changed plan first. None of them leads out of the tunnel.
fn complete(netlink: &mut Netlink, plan: &Plan, veth: &VethPlan) -> io::Result<()> {
    let wireguard = &plan.wireguard;
    let link = netlink.link_index(&veth.inner_interface)?;
    let (name, index) = (wireguard.interface.as_str(), netlink.link_index(&wireguard.interface)?);
    let (addresses, routes) = (netlink.addresses()?, netlink.routes()?);
    let lacks_address = |planned: &&IpNet| !addresses.contains(&(index, **planned));
    let lacks_route = |interface: u32, planned: &IpNet| {
        !routes.iter().any(|route| route.interface == Some(interface) && route.destination == *planned)
    };
    let mut requests: Vec<NetlinkRequest> = Vec::new();
    let missing = wireguard.addresses.iter().filter(lacks_address);
    requests.extend(missing.map(|net| NetlinkRequest::add_address(index, name, *net).or_exists()));
    let missing = wireguard.routes.iter().filter(|net| lacks_route(index, net));
    requests.extend(missing.map(|net| NetlinkRequest::add_route(index, name, *net, None).or_exists()));
    let missing = plan.local.networks.iter().filter(|net| lacks_route(link, net));
    requests.extend(missing.map(|net| local_route(link, veth, *net).or_exists()));
    Ok(netlink.execute(requests)?)
}

/// Returns the networks of the veth's addresses.
fn veth_networks(veth: &VethPlan) -> Vec<IpNet> {
    let ipv4 = IpNet::new(veth.inner_ipv4.into(), 31).ok();
    let ipv6 = veth.inner_ipv6.and_then(|address| IpNet::new(address.into(), 127).ok());
    [ipv4, ipv6].into_iter().flatten().map(|net| net.trunc()).collect()
}
