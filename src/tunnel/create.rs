//! Creates a tunnel. The order of the steps is the reason why nothing can leave it but through WireGuard (see
//! [`super`]).

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;

use ipnet::IpNet;

use super::{DeviceEvents, LOADING_RULES, OpenNamespace, Tunnel, device, host_rules, local_route, parameters};
use crate::config::HookKind;
use crate::failure::{Doing, Failure};
use crate::fault;
use crate::linux::namespace::{self, NetworkNamespace};
use crate::linux::netlink::link::TargetNamespace;
use crate::linux::netlink::route::Route;
use crate::linux::netlink::{Netlink, NetlinkRequest};
use crate::linux::nftables::Nftables;
use crate::names::InterfaceName;
use crate::plan::Plan;
use crate::registry::{Holder, TunnelState};
use crate::wireguard::DeviceConfig;

/// The operation that a failure to open WireGuard's interface names.
pub(super) const OPENING: &str = "configure WireGuard's interface";

impl Tunnel {
    /// Creates the tunnel. After a failure the parts that were created remain: call [`Tunnel::take_down`].
    ///
    /// `on_data_path_start` runs first in the thread of an embedded device, and `on_named` when processes can enter the
    /// namespace. `standing` and `holders` are written down.
    ///
    /// # Errors
    /// If the kernel refuses a step, or a hook fails.
    pub fn create(
        &mut self,
        config: &DeviceConfig,
        standing: bool,
        holders: Vec<Holder>,
        on_data_path_start: fn() -> io::Result<()>,
        on_named: impl FnOnce(&NetworkNamespace),
    ) -> Result<DeviceEvents, Failure> {
        match self.place.take() {
            Some(namespace) if self.container.is_some() => self.close_container(namespace)?,
            new => self.create_namespace(new)?,
        }
        fault::point("after the namespace")?;
        self.write_first_state(standing, holders)?;
        fault::point("after the state")?;
        self.directory.prepare_names().doing(format!("prepare {}", namespace::NAMES_DIRECTORY))?;
        fault::point("after the directory of names")?;
        self.name_namespace()?;
        on_named(&self.inner()?.namespace);
        fault::point("after the name")?;
        self.create_gateway()?;
        self.create_link()?;
        fault::point("after the veth pair")?;
        self.refresh_host_rules()?;
        fault::point("after the host's rules")?;
        let events = self.create_device(config, on_data_path_start)?;
        fault::point("after the WireGuard device")?;
        self.run_hooks(HookKind::PreUp)?;
        self.post_down_due = true;
        match self.container {
            Some(_) => self.open_container()?,
            None => self.open_wireguard()?,
        }
        fault::point("after the routes")?;
        self.run_hooks(HookKind::PostUp)?;
        let backend = self.device.as_ref().map(|device| device.backend());
        self.update_state(|state| state.made = backend)?;
        fault::point("at the end")?;
        Ok(events)
    }

    /// Creates the namespace, unless there is a `new` one, with its mark, its packet rules and `lo`.
    fn create_namespace(&mut self, new: Option<NetworkNamespace>) -> Result<(), Failure> {
        let ipv6 = self.plan.wireguard.ipv6;
        let prepare = || {
            parameters::prepare_ipv4()?;
            parameters::prepare_ipv6(ipv6)?;
            Ok((Netlink::open()?, Nftables::open()?))
        };
        let created = match new {
            Some(namespace) => namespace.run(prepare).map(|sockets| (namespace, sockets)),
            None => NetworkNamespace::create(prepare),
        };
        let (namespace, (mut netlink, mut rules)) = created.doing("create a network namespace")?;
        let mark = self.mark.text();
        if !fault::is_broken("rules") {
            rules
                .create(&self.plan.firewall.inside, mark)
                .doing(LOADING_RULES)
                .map_err(host_rules::advise_on_kernel)?;
        }
        // `lo` is the first interface of every network namespace (LOOPBACK_IFINDEX in the kernel's include/net/flow.h).
        let lo = vec![NetlinkRequest::set_alias(1, "lo", mark), NetlinkRequest::set_up(1, "lo")];
        netlink.execute(lo).doing("create a network namespace")?;
        self.inner = Some(OpenNamespace { namespace, netlink, rules });
        tracing::debug!("created the namespace");
        Ok(())
    }

    /// Writes the state down before anything exists that could outlive the keeper.
    fn write_first_state(&mut self, standing: bool, holders: Vec<Holder>) -> Result<(), Failure> {
        let namespace = self.inner()?.namespace.id().doing("identify the namespace")?;
        let (mark, keeper, container) = (self.mark.clone(), std::process::id(), self.container.clone());
        self.write_state(TunnelState { mark, namespace, keeper, made: None, standing, holders, container })
    }

    fn name_namespace(&mut self) -> Result<(), Failure> {
        let Some(path) = self.plan.namespace.clone() else { return Ok(()) };
        let mark = self.mark.clone();
        let named = namespace::bind_name(&self.inner()?.namespace, &path, mark.text());
        let is_taken = matches!(&named, Err(error) if error.kind() == io::ErrorKind::AlreadyExists);
        named.doing(format!("name the namespace {}", path.display())).map_err(|failure| match is_taken {
            true => failure.advise(format!(
                "a namespace with that name already exists: choose another name with --name, or remove it with \
                 `ip netns delete {}`",
                self.plan.name
            )),
            false => failure,
        })?;
        tracing::debug!("named the namespace");
        Ok(())
    }

    /// Creates the veth pair, with one end inside. Its only route leads to the host's end.
    pub(super) fn create_link(&mut self) -> Result<(), Failure> {
        const CONNECTING: &str = "connect the namespace to the host";
        let Some(veth) = self.plan.veth.clone() else { return Ok(()) };
        let (outer, inner) = (&veth.host_interface, &veth.inner_interface);
        let mark = self.mark.clone();
        let namespace = self.inner()?.namespace.try_clone().doing("use the namespace")?;
        let add = |index| {
            NetlinkRequest::add_veth_with_index((outer, index), inner, TargetNamespace::Other(namespace.as_fd()))
        };
        let index = match self.outside().execute_one(add(veth.host_index())) {
            // The index belongs to another interface, or the name does.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                self.outside().execute_one(add(0)).doing(CONNECTING)?;
                self.outside().link_index(outer).doing(format!("find {outer}"))?
            }
            added => added.map(|()| veth.host_index()).doing(CONNECTING)?,
        };
        let limits = parameters::limit_host_interface(index, outer);
        self.outside().execute(limits).doing(CONNECTING)?;
        self.prepare_outer_interface(outer, veth.host_ipv6.is_some())?;
        let mut requests = vec![NetlinkRequest::set_alias(index, outer.as_str(), mark.text())];
        requests.extend(link_addresses(index, outer, veth.host_ipv4, veth.host_ipv6)?);
        requests.push(NetlinkRequest::set_up(index, outer.as_str()));
        if self.plan.rootless {
            // A local network may contain the link, and the routes of the gateway's addresses are in this table.
            let inner = veth.inner_addresses().map(IpNet::from);
            requests
                .extend(inner.map(|inner| NetlinkRequest::add_route_in(Route::LOCAL, index, outer.as_str(), inner)));
        }
        self.outside().execute(requests).doing(CONNECTING)?;

        let netlink = &mut self.inner()?.netlink;
        let index = netlink.link_index(inner).doing(format!("find {inner}"))?;
        let mut requests = link_addresses(index, inner, veth.inner_ipv4, veth.inner_ipv6)?;
        requests.push(NetlinkRequest::set_up(index, inner.as_str()));
        netlink.execute(requests).doing(CONNECTING)?;
        tracing::debug!("created the veth pair");
        Ok(())
    }

    fn create_device(
        &mut self,
        config: &DeviceConfig,
        on_data_path_start: fn() -> io::Result<()>,
    ) -> Result<DeviceEvents, Failure> {
        let namespace = self.inner()?.namespace.try_clone().doing("use the namespace")?;
        let choice = (&self.plan.wireguard.interface, self.plan.backend);
        let (device, events) = device::create(&mut self.host, choice, namespace, config, on_data_path_start)?;
        self.device = Some(device);
        tracing::debug!("created the WireGuard device");
        Ok(events)
    }

    /// Gives WireGuard's interface its addresses, takes it up, and only then adds the routes: first those into the
    /// tunnel, then those to the local networks.
    fn open_wireguard(&mut self) -> Result<(), Failure> {
        let (plan, veth) = (self.plan.wireguard.clone(), self.plan.veth.clone());
        let (tunnel_routes, local_routes) = routes(&self.plan);
        let name = plan.interface.as_str();
        let netlink = &mut self.inner()?.netlink;
        let index = netlink.link_index(&plan.interface).doing(format!("find {name}"))?;
        let mut requests = open_interface(index, &plan.interface, Some(plan.mtu), &plan.addresses);
        requests.extend(tunnel_routes.iter().map(|route| {
            let request = NetlinkRequest::add_route(index, name, *route, None);
            // The kernel adds the route to the network of each IPv4 address when the interface is taken up.
            let is_connected = plan.addresses.iter().any(|address| address.trunc() == *route);
            if is_connected { request.or_exists() } else { request }
        }));
        if let Some(veth) = veth.filter(|_| !local_routes.is_empty()) {
            let link = netlink.link_index(&veth.inner_interface).doing(format!("find {}", veth.inner_interface))?;
            requests.extend(local_routes.iter().map(|net| local_route(link, &veth, *net)));
        }
        netlink.execute(requests).doing(OPENING).map_err(advise_on_port)?;
        tracing::debug!("opened the tunnel");
        Ok(())
    }
}

/// Returns the requests that give WireGuard's interface its MTU, if it is to change, and its addresses, and take it up.
pub(super) fn open_interface(
    index: u32,
    interface: &InterfaceName,
    mtu: Option<u32>,
    addresses: &[IpNet],
) -> Vec<NetlinkRequest> {
    let name = interface.as_str();
    let mut requests: Vec<NetlinkRequest> =
        mtu.map(|mtu| NetlinkRequest::set_mtu(index, name, mtu)).into_iter().collect();
    // Without clearing the flag, a TUN would take part in multicast, which no peer forwards.
    requests.push(NetlinkRequest::clear_multicast(index, name));
    requests.extend(addresses.iter().map(|address| NetlinkRequest::add_address(index, name, *address).or_exists()));
    requests.push(NetlinkRequest::set_up(index, name));
    requests
}

/// Explains that WireGuard's port is in use, which the kernel's device reports when it is taken up.
pub(super) fn advise_on_port(failure: Failure) -> Failure {
    match failure.errno {
        Some(libc::EADDRINUSE) => {
            failure.advise("another program uses the ListenPort of the file: leave that line out, or stop the program")
        }
        _ => failure,
    }
}

/// Returns the routes into the tunnel, and those to local networks.
fn routes(plan: &Plan) -> (Vec<IpNet>, Vec<IpNet>) {
    let (mut tunnel, mut local) = (plan.wireguard.routes.clone(), plan.local.networks.clone());
    if fault::is_broken("routes") {
        local.append(&mut tunnel);
    }
    (tunnel, local)
}

/// Returns the requests that give one end of the veth pair its addresses.
fn link_addresses(
    index: u32,
    name: &InterfaceName,
    ipv4: Ipv4Addr,
    ipv6: Option<Ipv6Addr>,
) -> Result<Vec<NetlinkRequest>, Failure> {
    let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
    // A /31 has no broadcast address (RFC 3021), a /127 no subnet-router anycast address (RFC 6164).
    let ipv4 = IpNet::new(ipv4.into(), 31).map_err(invalid).doing("use the veth's address")?;
    let ipv6 =
        ipv6.map(|ipv6| IpNet::new(ipv6.into(), 127)).transpose().map_err(invalid).doing("use the veth's address")?;
    let addresses = [Some(ipv4), ipv6].into_iter().flatten();
    Ok(addresses.map(|address| NetlinkRequest::add_address(index, name.as_str(), address)).collect())
}
