//! A tunnel in the network namespace of a container, which belongs to the container's engine. The differences to a
//! namespace of the tunnel's own:
//!
//! - It has interfaces already, and may get more. So it is closed first, by packet rules and policy routing, before
//!   anything else is done ([`shared_namespace`]). The keeper adapts them to the addresses that the interfaces get
//!   later.
//! - Its processes are the engine's: the keeper never kills them.
//! - It outlives the tunnel. The packet rules and the policy routing stay there, so it stays closed.

use std::io;
use std::path::Path;

use super::adopt::kind_of;
use super::create::{OPENING, advise_on_port};
use super::{OpenNamespace, Tunnel, facts, shared_namespace};
use crate::config::Config;
use crate::failure::{Doing, Failure};
use crate::linux::namespace::{self, NameLookup, NetworkNamespace};
use crate::linux::netlink::monitor::Monitor;
use crate::linux::netlink::{Netlink, NetlinkRequest};
use crate::linux::nftables::Nftables;
use crate::linux::sysctl;
use crate::names::{InterfaceName, TunnelName};
use crate::plan::shared_namespace::{SharedNamespaceFacts, SharedNamespacePlan};
use crate::plan::{self, Plan, PlanDiff};
use crate::registry::{self, Container, Mark, TunnelDirectory};
use crate::wireguard::Backend;

/// The text by which the packet rules in a container's namespace are recognized. The rules outlive their tunnel, and
/// the next one in the same namespace replaces them.
const OWNER: &str = "vpn-exec:container";

/// The operation that a failure to prepare the namespace names.
const CLOSING: &str = "close the container's network namespace";

/// The operation that a failure to read the container's addresses names.
const READING: &str = "read the container's network configuration";

/// A container's network namespace, in which a tunnel is to be made.
#[derive(Debug)]
pub struct ContainerPlace {
    /// The namespace.
    pub namespace: NetworkNamespace,
    /// The container.
    pub container: Container,
}

/// Opens a container's network namespace.
///
/// # Errors
/// If there is no namespace at the path, or it is the calling process's own.
pub fn open_namespace(path: &Path) -> Result<NetworkNamespace, Failure> {
    let what = || format!("open the container's network namespace {}", path.display());
    let NameLookup::Namespace(found) = namespace::look_up(path).doing(what())? else {
        return Err(Failure::of(what(), &io::Error::new(io::ErrorKind::NotFound, "there is no namespace")));
    };
    let own = NetworkNamespace::current().and_then(|own| own.id()).doing(what())?;
    if found.id().doing(what())? == own {
        return Err(Failure::new("the container shares the host's network, which cannot have a tunnel")
            .advise("give the container a network of its own: not --network host, not hostNetwork: true"));
    }
    Ok(found)
}

/// Plans a tunnel in a container's namespace. `host` is a netlink socket in the host's namespace.
///
/// # Errors
/// If the facts cannot be read, or if there is no plan for this configuration.
pub fn plan_in(host: &mut Netlink, namespace: &NetworkNamespace, config: &Config) -> Result<Plan, Failure> {
    let mut inside = namespace.run(Netlink::open).doing("enter the container's network namespace")?;
    plan_with(host, &mut inside, config)
}

/// [`plan_in`] with a netlink socket in the container's namespace.
fn plan_with(host: &mut Netlink, inside: &mut Netlink, config: &Config) -> Result<Plan, Failure> {
    let underlay = facts::read(host, config).doing("read the host's network configuration")?;
    let addresses = shared_namespace::container_addresses(inside, &plan::shared_namespace::interface());
    let addresses = addresses.doing(READING)?;
    // An engine may have switched IPv6 off in the namespace, but this process can switch it on for one interface.
    let facts = SharedNamespaceFacts { underlay, addresses, ..SharedNamespaceFacts::default() };
    Ok(plan::plan_in_container(config, &facts)?)
}

impl Tunnel {
    /// Plans the tunnel again from the present state of the host and, if it has one, of its container.
    ///
    /// # Errors
    /// If the facts cannot be read, or if there is no plan for this configuration.
    pub fn plan_again(&mut self, config: &Config) -> Result<Plan, Failure> {
        match &mut self.inner {
            Some(inner) if self.container.is_some() => plan_with(&mut self.host, &mut inner.netlink, config),
            _ => {
                let facts = facts::read(&mut self.host, config).doing("read the host's network configuration")?;
                Ok(plan::plan(config, &facts)?)
            }
        }
    }

    /// Closes a container's namespace, before anything else is done in it, and marks it.
    pub(super) fn close_container(&mut self, namespace: NetworkNamespace) -> Result<(), Failure> {
        let sockets = namespace.run(|| Ok((Netlink::open()?, Nftables::open()?)));
        let (mut netlink, mut rules) = sockets.doing("enter the container's network namespace")?;
        require_free(&mut netlink, &self.plan)?;
        let plan = shared_namespace_of(&self.plan)?;
        shared_namespace::close(&mut netlink, &mut rules, plan, OWNER, |_| {
            shared_namespace::end_former_connections(&namespace, plan)
        })?;
        // A container without a network may have `lo` down.
        let lo = vec![NetlinkRequest::set_alias(1, "lo", self.mark.text()), NetlinkRequest::set_up(1, "lo")];
        netlink.execute(lo).doing(CLOSING)?;
        self.inner = Some(OpenNamespace { namespace, netlink, rules });
        tracing::debug!("closed the container's namespace");
        Ok(())
    }

    /// Monitors the addresses in the container's namespace. Returns None if the tunnel is no container's.
    ///
    /// # Errors
    /// If the namespace cannot be entered, or the monitor cannot be opened.
    pub fn monitor_container(&self) -> io::Result<Option<Monitor>> {
        let inner = self.inner.as_ref().filter(|_| self.container.is_some());
        inner.map(|inner| inner.namespace.run(Monitor::of_addresses)).transpose()
    }

    /// Adapts the packet rules and the policy routing to the addresses that the container's interfaces have now. Docker
    /// connects a container to its network after its hooks have run, and a router may give it other IPv6 addresses at
    /// any time.
    ///
    /// # Errors
    /// If the kernel refuses. Then everything is as it was, as far as possible.
    pub fn follow_container(&mut self) -> Result<(), Failure> {
        let Some(inner) = self.inner.as_mut().filter(|_| self.container.is_some()) else { return Ok(()) };
        let interface = &self.plan.wireguard.interface;
        let addresses = shared_namespace::container_addresses(&mut inner.netlink, interface).doing(READING)?;
        let mut changed = self.plan.clone();
        if !changed.follow_container(addresses) {
            return Ok(());
        }
        tracing::debug!("the container's addresses have changed");
        self.apply(&PlanDiff { firewall: true, ..PlanDiff::default() }, changed)
    }

    /// Opens WireGuard's interface in the container's namespace.
    pub(super) fn open_container(&mut self) -> Result<(), Failure> {
        let plan = shared_namespace_of(&self.plan)?.clone();
        let inner = self.inner()?;
        let wireguard = &plan.wireguard;
        inner.namespace.run(|| prepare_interface(&wireguard.interface, wireguard.ipv6)).doing(OPENING)?;
        shared_namespace::open(&mut inner.netlink, &plan, Some(wireguard.mtu)).map_err(advise_on_port)?;
        tracing::debug!("opened the tunnel");
        Ok(())
    }
}

/// Sets the parameters of WireGuard's interface. An engine may have switched IPv6 off for all interfaces. A link-local
/// address would be one of the tunnel's that no rule knows.
fn prepare_interface(name: &InterfaceName, ipv6: bool) -> io::Result<()> {
    let conf = format!("net/ipv6/conf/{name}");
    sysctl::set_if_present(&format!("{conf}/accept_ra"), "0")?;
    sysctl::set_if_present(&format!("{conf}/addr_gen_mode"), "1")?;
    sysctl::set_if_present(&format!("{conf}/disable_ipv6"), if ipv6 { "0" } else { "1" })
}

/// Fails if a tunnel is in the container's namespace already.
fn require_free(netlink: &mut Netlink, plan: &Plan) -> Result<(), Failure> {
    let alias = netlink.link("lo").doing(CLOSING)?.and_then(|lo| lo.alias);
    // A former tunnel of this name is gone: this process holds the name.
    let other = alias.as_deref().and_then(Mark::name_in).filter(|name| *name != plan.name);
    let is_up = |name: &TunnelName| {
        let state = registry::read(name).ok().flatten();
        state.is_some_and(|state| Some(state.mark.text()) == alias.as_deref())
    };
    if let Some(name) = other.filter(is_up) {
        return Err(Failure::new(format!("the container's network namespace has the tunnel {name} already"))
            .advise("name one tunnel for all containers that share a network namespace"));
    }
    let interface = &plan.wireguard.interface;
    if netlink.link(interface.as_str()).doing(CLOSING)?.is_some() {
        return Err(Failure::new(format!("the container's network namespace has an interface {interface} already"))
            .advise("if `vpn-exec attach` made it, the container needs no other tunnel"));
    }
    Ok(())
}

/// Returns how a container's namespace differs from the plan, if the tunnel could not work.
pub(super) fn deviation(netlink: &mut Netlink, plan: &Plan, made: Option<Backend>) -> io::Result<Option<String>> {
    let interface = &plan.wireguard.interface;
    let link = netlink.link(interface.as_str())?;
    Ok(match link {
        Some(link) if link.up && link.kind.as_deref() == Some(kind_of(made)) => None,
        Some(_) => Some(format!("holds another interface {interface}, or it is down")),
        None => Some(format!("has no interface {interface} any more")),
    })
}

/// Brings a container's namespace into the state of a plan, and sets the MTU of WireGuard's interface if it is to
/// change. Closes first, and opens last.
pub(super) fn complete(
    netlink: &mut Netlink,
    rules: &mut Nftables,
    plan: &Plan,
    mtu: Option<u32>,
) -> Result<(), Failure> {
    let shared = shared_namespace_of(plan)?;
    // The connections of the container are the tunnel's own by now.
    shared_namespace::close(netlink, rules, shared, OWNER, |_| ())?;
    shared_namespace::open(netlink, shared, mtu)
}

/// Changes a container's namespace to another plan.
pub(super) fn change(inner: &mut OpenNamespace, change: &PlanDiff, changed: &Plan) -> io::Result<()> {
    if *change == PlanDiff::default() {
        return Ok(());
    }
    // The keeper has adapted the MTU to the path to the endpoint, so it stays unless the planned one changes.
    complete(&mut inner.netlink, &mut inner.rules, changed, change.mtu).map_err(io::Error::from)
}

/// Removes the WireGuard interface that a killed keeper has left in a container's namespace. The caller has checked the
/// namespace's mark.
pub(super) fn remove_interface(namespace: &NetworkNamespace, directory: &TunnelDirectory) -> Result<(), Failure> {
    let plan = directory.plan().doing(format!("read the plan below {}", directory.path().display()))?;
    let Some(interface) = plan.map(|plan| plan.wireguard.interface) else { return Ok(()) };
    let removed = namespace.run(|| {
        let mut netlink = Netlink::open()?;
        match netlink.link(interface.as_str())? {
            Some(link) => Ok(netlink.execute_one(NetlinkRequest::delete_link(link.index, &link.name))?),
            None => Ok(()),
        }
    });
    removed.doing(format!("remove the interface {interface} of the container"))
}

fn shared_namespace_of(plan: &Plan) -> Result<&SharedNamespacePlan, Failure> {
    plan.shared_namespace.as_ref().ok_or_else(|| Failure::new("the plan of the tunnel is not one for a container"))
}
