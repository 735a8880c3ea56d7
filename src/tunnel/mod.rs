//! A tunnel as the kernel sees it: a network namespace with its packet rules, a veth pair to the host, and a WireGuard
//! interface.
//!
//! A [`Tunnel`] carries a [`Plan`] out. The order of its steps keeps the namespace closed at every instant:
//!
//! 1. The namespace starts with `lo` and the packet rules, and nothing else.
//! 2. It gets its name. A process that enters it can reach nothing.
//! 3. The veth pair follows, with one route: to the host's end.
//! 4. The host's rules for local networks follow, if there are any.
//! 5. WireGuard's interface follows with the tunnel's routes, and then the routes to the local networks, some of whose
//!    addresses may also be the tunnel's.
//!
//! None of this is undone step by step. It ends with the namespace, so removing the name and closing the descriptors is
//! enough. Only the host's rules and forwarding are removed separately.
//!
//! - `create`, `adopt`, `apply`, `take_down`: creates a tunnel, takes it over from a keeper that was killed, changes
//!   it, and removes it.
//! - `container`: the differences of a tunnel in a container's namespace, which belongs to the container's engine.
//! - `gateway`: what stands in place of the host at the other end of a rootless tunnel's link.
//! - `reclaim`: removes what a killed tunnel has left.
//! - [`shared_namespace`]: applies the plan of a tunnel in a namespace that is not its own.
//! - [`rootless`]: finds the namespaces of a rootless tunnel.
//! - `device`, `hooks`, `parameters`, `processes`: the parts that these use.
//! - `host_rules`, `forwarding`: what the host does for local networks.
//! - [`facts`]: what a plan needs to know of the host.

mod adopt;
mod apply;
mod container;
mod create;
pub mod device;
pub mod facts;
mod forwarding;
mod gateway;
mod hooks;
mod host_rules;
mod parameters;
mod processes;
mod reclaim;
pub mod rootless;
pub mod shared_namespace;
mod take_down;

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{BorrowedFd, OwnedFd};

use ipnet::IpNet;

use crate::config::{BackendChoice, HookKind};
use crate::failure::{Doing, Failure};
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::namespace::{NamespaceId, NetworkNamespace};
use crate::linux::netlink::link::LinkCounters;
use crate::linux::netlink::{Netlink, NetlinkRequest};
use crate::linux::nftables::Nftables;
use crate::linux::process;
use crate::plan::{Plan, VethPlan};
use crate::registry::{Container, Holder, Mark, TunnelDirectory, TunnelState};
use crate::wireguard::{Backend, Device};
pub use container::{ContainerPlace, open_namespace, plan_in};
pub use device::{DeviceEvents, DeviceFailure};
use gateway::Gateway;
use host_rules::HostRules;
pub use reclaim::reclaim;
pub use take_down::Remains;

/// The operation that a failure to load the namespace's packet rules names.
const LOADING_RULES: &str = "load the packet rules";

/// A tunnel that is being created, or is up.
///
/// [`Tunnel::take_down`] removes it. If the process is killed, the next keeper takes it over with [`Tunnel::adopt`], or
/// the next launcher removes it with [`reclaim`].
pub struct Tunnel {
    plan: Plan,
    directory: TunnelDirectory,
    /// A netlink socket in the host's namespace.
    host: Netlink,
    mark: Mark,
    inner: Option<OpenNamespace>,
    device: Option<Box<dyn Device>>,
    /// The state that is written down, once it is.
    state: Option<TunnelState>,
    /// Whether the hooks of the end are to run.
    post_down_due: bool,
    /// A descriptor that is closed before the tunnel is taken down, which needs one even if the process has no others
    /// left.
    reserve: Option<OwnedFd>,
    /// Whether removing the namespace's name has failed.
    name_left: bool,
    host_rules: HostRules,
    /// The container whose namespace the tunnel is in. None if the namespace is the tunnel's own.
    container: Option<Container>,
    /// That namespace, or that of a rootless tunnel, until the tunnel is created in it or is taken over.
    place: Option<NetworkNamespace>,
    /// The namespace at the other end of a rootless tunnel's link.
    gateway: Option<Gateway>,
}

/// The namespace, and sockets in it.
struct OpenNamespace {
    namespace: NetworkNamespace,
    netlink: Netlink,
    rules: Nftables,
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").field("plan", &self.plan).finish_non_exhaustive()
    }
}

impl Tunnel {
    /// Prepares to create a tunnel in a claimed directory, in a network namespace of its own: a new one, or the given
    /// one, in which nothing has been done yet. Nothing is created yet.
    ///
    /// # Errors
    /// If a netlink socket cannot be opened.
    pub fn new(plan: Plan, directory: TunnelDirectory, namespace: Option<NetworkNamespace>) -> Result<Self, Failure> {
        let mark = Mark::random(&plan.name).doing("get random bytes")?;
        Ok(Self { place: namespace, ..Self::with_mark(plan, directory, mark)? })
    }

    /// Prepares to create a tunnel in a claimed directory, in the network namespace of a container.
    ///
    /// # Errors
    /// As [`Tunnel::new`].
    pub fn new_in(plan: Plan, directory: TunnelDirectory, place: ContainerPlace) -> Result<Self, Failure> {
        let ContainerPlace { namespace, container } = place;
        Ok(Self { container: Some(container), ..Self::new(plan, directory, Some(namespace))? })
    }

    /// Prepares to take over the tunnel of a claimed directory. Nothing is changed yet. A rootless tunnel's `namespace`
    /// has no name by which it could be found.
    ///
    /// # Errors
    /// If a netlink socket cannot be opened.
    pub fn existing(
        plan: Plan,
        directory: TunnelDirectory,
        state: &TunnelState,
        namespace: Option<NetworkNamespace>,
    ) -> Result<Self, Failure> {
        let mut tunnel = Self::with_mark(plan, directory, state.mark.clone())?;
        tunnel.place = namespace;
        tunnel.container.clone_from(&state.container);
        Ok(tunnel)
    }

    fn with_mark(plan: Plan, directory: TunnelDirectory, mark: Mark) -> Result<Self, Failure> {
        let reserve = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC);
        Ok(Self {
            plan,
            directory,
            host: Netlink::open().doing("open a netlink socket")?,
            mark,
            inner: None,
            device: None,
            state: None,
            post_down_due: false,
            reserve: Some(reserve.doing("keep a descriptor in reserve")?),
            name_left: false,
            host_rules: HostRules::default(),
            container: None,
            place: None,
            gateway: None,
        })
    }

    /// Returns the claimed directory, and forgets the tunnel.
    pub fn into_directory(self) -> TunnelDirectory {
        self.directory
    }

    /// Changes the state that is written down.
    ///
    /// # Errors
    /// If it cannot be written. Then it stays as it was.
    pub fn update_state(&mut self, change: impl FnOnce(&mut TunnelState)) -> Result<(), Failure> {
        let Some(state) = &self.state else { return Ok(()) };
        let mut changed = state.clone();
        change(&mut changed);
        if changed != *state {
            self.write_state(changed)?;
        }
        Ok(())
    }

    fn write_state(&mut self, state: TunnelState) -> Result<(), Failure> {
        self.directory.write(&state).doing(format!("write below {}", self.directory.path().display()))?;
        self.state = Some(state);
        Ok(())
    }

    /// Returns the plan of the tunnel as it is now.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Returns the netlink socket in the host's namespace.
    pub fn host(&mut self) -> &mut Netlink {
        &mut self.host
    }

    /// Returns the WireGuard device, once it exists.
    pub fn device(&self) -> Option<&dyn Device> {
        self.device.as_deref()
    }

    /// Returns the WireGuard device for a change, once it exists.
    pub fn device_mut(&mut self) -> Option<&mut (dyn Device + 'static)> {
        self.device.as_deref_mut()
    }

    /// Returns the WireGuard implementation in use, as a choice that a configuration can make.
    pub fn running_backend(&self) -> BackendChoice {
        match self.device.as_ref().map(|device| device.backend()) {
            Some(Backend::Kernel) => BackendChoice::Kernel,
            Some(Backend::Userspace) => BackendChoice::Userspace,
            None => self.plan.backend,
        }
    }

    /// Returns the launchers that hold a lease according to the written state.
    pub fn holders(&self) -> Vec<Holder> {
        self.state.as_ref().map(|state| state.holders.clone()).unwrap_or_default()
    }

    /// Returns whether the tunnel stays up when no lease is left.
    pub fn is_standing(&self) -> bool {
        self.state.as_ref().is_some_and(|state| state.standing)
    }

    /// Returns the container that the tunnel was made for.
    pub fn container(&self) -> Option<&Container> {
        self.container.as_ref()
    }

    /// Returns the lock of the tunnel's directory. A process that gets this descriptor shares the lock, and has it
    /// alone once this process ends.
    pub fn lock(&self) -> BorrowedFd<'_> {
        self.directory.lock()
    }

    /// Removes the sockets at which clients connect to the keeper.
    ///
    /// # Errors
    /// If they cannot be removed.
    pub fn remove_sockets(&self) -> Result<(), Failure> {
        self.directory.remove_sockets().doing("close the keeper's socket")
    }

    /// Returns the namespace of a rootless tunnel, which has no name by which a client could find it.
    ///
    /// # Errors
    /// If its descriptor cannot be duplicated.
    pub fn unnamed_namespace(&self) -> Result<Option<NetworkNamespace>, Failure> {
        let inner = self.inner.as_ref().filter(|_| self.plan.rootless);
        inner.map(|inner| inner.namespace.try_clone()).transpose().doing("pass the namespace on")
    }

    /// Returns the addresses inside at which a program may listen, and their namespace. Loopback comes last, because
    /// many programs trust connections from there.
    ///
    /// # Errors
    /// If there is no namespace.
    pub fn inner_addresses(&self) -> io::Result<(Vec<IpAddr>, NetworkNamespace)> {
        let inner = self.inner.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
        let plan = &self.plan;
        // `lo` has IPv6 even if the tunnel does not.
        let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
        let veth = plan.veth.iter().flat_map(VethPlan::inner_addresses);
        let tunnel = plan.wireguard.addresses.iter().map(IpNet::addr);
        let all = veth.chain(tunnel).chain(loopback).collect();
        Ok((all, inner.namespace.try_clone()?))
    }

    /// Loads the host's rules for local networks, and switches forwarding on, if there are local networks. Adapts both
    /// to the host's own forwarding if they are present.
    ///
    /// # Errors
    /// If the kernel refuses, or another program has a table of the same name.
    pub fn refresh_host_rules(&mut self) -> Result<(), Failure> {
        if self.plan.local.networks.is_empty() || self.plan.rootless {
            return Ok(());
        }
        self.host_rules.open(&self.plan, &self.mark)
    }

    /// Loads the host's rules again if another program has removed them.
    ///
    /// # Errors
    /// As [`Tunnel::refresh_host_rules`].
    pub fn repair_host_rules(&mut self) -> Result<(), Failure> {
        self.host_rules.repair(&self.plan, &self.mark)
    }

    /// Returns whether WireGuard's interface exists. Any process with the privilege can remove it.
    ///
    /// # Errors
    /// If the kernel cannot be queried.
    pub fn has_interface(&mut self) -> io::Result<bool> {
        let Some(inner) = &mut self.inner else { return Ok(false) };
        Ok(inner.netlink.link(self.plan.wireguard.interface.as_str())?.is_some())
    }

    /// Returns the counters of WireGuard's interface.
    ///
    /// # Errors
    /// If the kernel cannot be queried.
    pub fn counters(&mut self) -> io::Result<LinkCounters> {
        let Some(inner) = &mut self.inner else { return Ok(LinkCounters::default()) };
        inner.netlink.counters(&self.plan.wireguard.interface)
    }

    /// Sets the MTU of WireGuard's interface, in bytes.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_mtu(&mut self, mtu: u32) -> io::Result<()> {
        let Some(inner) = &mut self.inner else { return Ok(()) };
        let name = &self.plan.wireguard.interface;
        let index = inner.netlink.link_index(name)?;
        Ok(inner.netlink.execute_one(NetlinkRequest::set_mtu(index, name.as_str(), mtu))?)
    }

    /// Returns the processes in the namespace. Raises CAP_SYS_PTRACE to see those of other users.
    ///
    /// # Errors
    /// If /proc cannot be read.
    pub fn programs(&self) -> io::Result<Vec<i32>> {
        let Some(inner) = &self.inner else { return Ok(Vec::new()) };
        let id = inner.namespace.id()?;
        capabilities::with_raised(CapabilitySet::SYS_PTRACE, || process::in_namespace(id))?
    }

    /// Kills every process in the namespace, and waits until all are gone. A container's processes belong to its engine
    /// and are left alone.
    ///
    /// # Errors
    /// If one cannot be killed, or does not end in time.
    pub fn kill_programs(&mut self) -> io::Result<()> {
        self.reserve = None;
        match self.own_namespace() {
            Some(inner) => processes::kill_all(inner.namespace.id()?),
            None => Ok(()),
        }
    }

    /// Kills the processes that a program has left behind: those in its mount namespace, and their descendants.
    ///
    /// # Errors
    /// If one cannot be killed, or does not end in time.
    pub fn kill_left_behind(&self, mounts: NamespaceId) -> io::Result<()> {
        match self.own_namespace() {
            Some(inner) => processes::kill_left_behind(inner.namespace.id()?, mounts),
            None => Ok(()),
        }
    }

    /// Returns the namespace if it is the tunnel's own.
    fn own_namespace(&self) -> Option<&OpenNamespace> {
        self.inner.as_ref().filter(|_| self.container.is_none())
    }

    fn inner(&mut self) -> Result<&mut OpenNamespace, Failure> {
        self.inner.as_mut().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT)).doing("use the namespace")
    }

    /// Runs the file's hooks of a kind that the user has allowed.
    fn run_hooks(&mut self, kind: HookKind) -> Result<(), Failure> {
        let Some(inner) = &self.inner else { return Ok(()) };
        for hook in self.plan.hooks.iter().filter(|hook| hook.run && hook.kind == kind) {
            hooks::run(&inner.namespace, hook).doing(format!("run the hook {kind} of the file"))?;
        }
        Ok(())
    }
}

/// Returns the request for a route inside to a local network, through the host.
fn local_route(link: u32, veth: &VethPlan, net: IpNet) -> NetlinkRequest {
    let router = if net.addr().is_ipv4() { Some(veth.host_ipv4.into()) } else { veth.host_ipv6.map(IpAddr::from) };
    NetlinkRequest::add_route(link, veth.inner_interface.as_str(), net, router)
}
