//! Applies a [`Plan`] step by step, and undoes it from any point.
//!
//! The order of the steps is what keeps the namespace closed at every instant: it is born with nothing but `lo` and the rules for
//! packets, then has the veth with a route to the host alone, then WireGuard's interface with the tunnel's routes, and last those to the
//! local networks, of which some addresses may be the tunnel's. Nothing of that has to be undone one by one: it ends with the namespace,
//! so undoing is to let go of that. Only what the host does for local networks is taken back by itself.

mod adopt;
mod clean_up;
mod device;
pub mod facts;
mod forwarding;
mod hooks;
mod local_networks;
mod parameters;

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ipnet::IpNet;

use crate::config::{BackendChoice, HookKind};
use crate::failure::{Doing, Failure};
use crate::fault;
use crate::linux::capabilities;
use crate::linux::namespace::{self, NameLookup, NamespaceId, NetworkNamespace};
use crate::linux::netlink::link::{LinkCounters, TargetNamespace};
use crate::linux::netlink::{Netlink, NetlinkRequest};
use crate::linux::nftables::Nftables;
use crate::linux::process;
use crate::names::InterfaceName;
use crate::plan::{self, Plan, PlanDiff, VethPlan};
use crate::registry::{Directory, Holder, Mark, State};
use crate::wireguard::{Backend, Device, DeviceConfig};
pub use clean_up::{Remains, reclaim};
pub use device::DeviceEvents;
use local_networks::HostPart;

/// What loading the rules of a namespace is called in messages.
const RULES: &str = "load the rules for packets";

/// A tunnel that is being made, or that is up. Taken down by [`Tunnel::take_down`]; when the process is killed, it is taken over
/// by [`Tunnel::adopt`], or taken away by [`reclaim`].
pub struct Tunnel {
    plan: Plan,
    directory: Directory,
    host: Netlink,
    mark: Mark,
    inner: Option<Inner>,
    device: Option<Box<dyn Device>>,
    /// What is written down of it, once something is.
    state: Option<State>,
    post_down_due: bool,
    /// A descriptor that taking down can have when there are no others left.
    reserve: Option<OwnedFd>,
    /// Whether the namespace's name may be there still though it should be gone.
    name_left: bool,
    /// What the host does for local networks.
    host_part: HostPart,
}

/// The namespace, and netlink sockets in it.
struct Inner {
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
    /// Begins a tunnel of a claimed name. Nothing is made yet.
    pub fn new(plan: Plan, directory: Directory) -> Result<Self, Failure> {
        let mark = Mark::random(&plan.name).doing("get random bytes")?;
        Self::with_mark(plan, directory, mark)
    }

    fn with_mark(plan: Plan, directory: Directory, mark: Mark) -> Result<Self, Failure> {
        let host = Netlink::open().doing("open a netlink socket")?;
        let reserve = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC);
        let reserve = Some(reserve.doing("keep a descriptor in reserve")?);
        let (inner, device, state) = (None, None, None);
        let (post_down_due, name_left) = (false, false);
        let host_part = HostPart::default();
        Ok(Self { plan, directory, host, mark, inner, device, state, post_down_due, reserve, name_left, host_part })
    }

    /// Makes everything, in the order that keeps the namespace closed. After an error what was made until then is still there:
    /// take the tunnel down.
    ///
    /// `on_data_path_start` runs first in the thread of an embedded device, `on_named` as soon as the namespace has its name.
    /// `standing` and `holders` are written down.
    pub fn create(
        &mut self,
        config: &DeviceConfig,
        standing: bool,
        holders: Vec<Holder>,
        on_data_path_start: fn() -> io::Result<()>,
        on_named: impl FnOnce(),
    ) -> Result<DeviceEvents, Failure> {
        self.make_namespace()?;
        tracing::debug!("the namespace is made");
        fault::point("after the namespace")?;
        self.write_first_state(standing, holders)?;
        fault::point("after the state")?;
        self.directory.prepare_names().doing(format!("make {} ready", namespace::NAMES_DIRECTORY))?;
        fault::point("after the directory of names")?;
        self.give_name()?;
        tracing::debug!("the namespace has its name");
        on_named();
        fault::point("after the name")?;
        self.make_veth()?;
        tracing::debug!("the veth pair is made");
        fault::point("after the veth pair")?;
        self.open_local_networks()?;
        fault::point("after the host's rules")?;
        let namespace = self.inner()?.namespace.try_clone().doing("use the namespace")?;
        let (device, events) = device::make(&mut self.host, &self.plan, namespace, config, on_data_path_start)?;
        self.device = Some(device);
        tracing::debug!("the WireGuard device is made");
        fault::point("after the WireGuard device")?;
        self.run_hooks(HookKind::PreUp)?;
        self.post_down_due = true;
        self.open_wireguard()?;
        tracing::debug!("the tunnel is made");
        fault::point("after the routes")?;
        self.run_hooks(HookKind::PostUp)?;
        let backend = self.device.as_ref().map(|device| device.backend());
        self.update_state(|state| state.made = backend)?;
        fault::point("at the end")?;
        Ok(events)
    }

    /// Changes what is written down of the tunnel.
    pub fn update_state(&mut self, change: impl FnOnce(&mut State)) -> Result<(), Failure> {
        let Some(state) = &self.state else { return Ok(()) };
        let mut changed = state.clone();
        change(&mut changed);
        if changed != *state {
            self.directory.write(&changed).doing(format!("write below {}", self.directory.path().display()))?;
            self.state = Some(changed);
        }
        Ok(())
    }

    /// The WireGuard device, once it is made.
    pub fn device(&self) -> Option<&dyn Device> {
        self.device.as_deref()
    }

    /// What was planned.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The netlink socket of the host's namespace.
    pub fn host(&mut self) -> &mut Netlink {
        &mut self.host
    }

    /// The WireGuard device, to be changed.
    pub fn device_mut(&mut self) -> Option<&mut (dyn Device + 'static)> {
        self.device.as_deref_mut()
    }

    /// The living device, as what may be asked for.
    pub fn running_backend(&self) -> BackendChoice {
        match self.device.as_ref().map(|device| device.backend()) {
            Some(Backend::Kernel) => BackendChoice::Kernel,
            Some(Backend::Userspace) => BackendChoice::Userspace,
            None => self.plan.backend,
        }
    }

    /// Who holds a lease, as it is written down.
    pub fn holders(&self) -> Vec<Holder> {
        self.state.as_ref().map(|state| state.holders.clone()).unwrap_or_default()
    }

    /// Whether the tunnel stays when nobody holds a lease on it.
    pub fn is_standing(&self) -> bool {
        self.state.as_ref().is_some_and(|state| state.standing)
    }

    /// The claim on the tunnel's name: whoever is passed this descriptor shares it, and has it alone once this process ends.
    pub fn lock(&self) -> BorrowedFd<'_> {
        self.directory.lock()
    }

    /// Lets nobody reach the keeper any more.
    pub fn remove_sockets(&self) -> Result<(), Failure> {
        self.directory.remove_socket().doing("close the keeper's socket")
    }

    /// Where a program may listen inside, and the namespace that these are addresses in. Loopback comes last: many a program trusts
    /// whoever comes from there, so that is for those who listen nowhere else.
    pub fn inner_addresses(&self) -> io::Result<(Vec<IpAddr>, NetworkNamespace)> {
        let inner = self.inner.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
        let plan = &self.plan;
        // It has IPv6 although the tunnel may have none.
        let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
        let veth = [IpAddr::from(plan.veth.inner_ipv4)].into_iter().chain(plan.veth.inner_ipv6.map(IpAddr::from));
        let tunnel = plan.wireguard.addresses.iter().map(IpNet::addr);
        let all = veth.chain(tunnel).chain(loopback).collect();
        Ok((all, inner.namespace.try_clone()?))
    }

    /// Makes what the host does for local networks fit what the host does by itself, which may have become another.
    pub fn refresh_host_rules(&mut self) -> Result<(), Failure> {
        self.open_local_networks()
    }

    /// Makes it again if somebody has taken it away.
    pub fn repair_host_rules(&mut self) -> Result<(), Failure> {
        self.host_part.mend(&self.plan, &self.mark)
    }

    /// Whether WireGuard's interface is still there. Somebody may have removed it.
    pub fn has_interface(&mut self) -> io::Result<bool> {
        let Some(inner) = &mut self.inner else { return Ok(false) };
        Ok(inner.netlink.link(self.plan.wireguard.interface.as_str())?.is_some())
    }

    /// What went through WireGuard's interface.
    pub fn counters(&mut self) -> io::Result<LinkCounters> {
        let Some(inner) = &mut self.inner else { return Ok(LinkCounters::default()) };
        inner.netlink.counters(&self.plan.wireguard.interface)
    }

    /// The processes in the namespace. Takes CAP_SYS_PTRACE to see those of other users, which is raised for it.
    pub fn programs(&self) -> io::Result<Vec<i32>> {
        let Some(inner) = &self.inner else { return Ok(Vec::new()) };
        let id = inner.namespace.id()?;
        capabilities::with_raised(capabilities::CapabilitySet::SYS_PTRACE, || process::in_namespace(id))?
    }

    /// Kills what a program has left behind: the processes in the namespace that have its mount namespace, and those they started.
    pub fn kill_left_behind(&self, mounts: NamespaceId) -> io::Result<()> {
        match &self.inner {
            Some(inner) => clean_up::kill_left_behind(inner.namespace.id()?, mounts),
            None => Ok(()),
        }
    }

    /// Makes the living interface what a changed plan says. An address or a route that stays is not touched: connections live on it.
    ///
    /// # Errors
    /// Then all is as it was, as far as the system lets it.
    pub fn apply(&mut self, change: &PlanDiff, wanted: Plan) -> Result<(), Failure> {
        self.try_apply(change, wanted).doing("change the tunnel")
    }

    fn try_apply(&mut self, change: &PlanDiff, wanted: Plan) -> io::Result<()> {
        // Written down first: there may be no room for it, and a successor makes the interface what is written down.
        self.directory.write_plan(&wanted)?;
        let applied = match &change.dns {
            Some(names) => self.directory.write_resolv_conf(&names.resolv_conf),
            None => Ok(()),
        };
        let applied = applied.and_then(|()| self.change_network(change, &wanted));
        if let Err(error) = applied {
            // The error that matters is the first one.
            if let Ok(undo) = plan::diff(&wanted, &self.plan, self.running_backend()) {
                let living = self.plan.clone();
                let _ = self.change_network(&undo, &living);
            }
            let _ = self.directory.write_resolv_conf(&self.plan.dns.resolv_conf);
            let _ = self.directory.write_plan(&self.plan);
            return Err(error);
        }
        self.plan = wanted;
        Ok(())
    }

    /// Changes the interfaces inside, and the rules. What is not to be reached any more is closed first.
    fn change_network(&mut self, change: &PlanDiff, wanted: &Plan) -> io::Result<()> {
        let mark = self.mark.text();
        let Some(inner) = &mut self.inner else { return Ok(()) };
        let link = &wanted.veth.inner_interface;
        let (name, interface) = (wanted.wireguard.interface.as_str(), &wanted.wireguard.interface);
        let (index, link_index) = (inner.netlink.link_index(interface)?, inner.netlink.link_index(link)?);
        let closing = change
            .remove_local
            .iter()
            .map(|net| NetlinkRequest::delete_route(link_index, link.as_str(), *net))
            .collect();
        inner.netlink.execute(closing)?;
        if change.firewall {
            inner.rules.replace(&wanted.firewall.inside, mark)?;
            self.host_part.open(wanted, &self.mark).map_err(io::Error::other)?;
        }
        let mut requests: Vec<NetlinkRequest> = Vec::new();
        requests.extend(change.mtu.map(|mtu| NetlinkRequest::set_mtu(index, name, mtu)));
        requests.extend(change.remove_routes.iter().map(|route| NetlinkRequest::delete_route(index, name, *route)));
        // What is there already was made by a keeper that was killed half-way.
        let add_address = |address: &IpNet| NetlinkRequest::add_address(index, name, *address).or_exists();
        requests.extend(change.add_addresses.iter().map(add_address));
        requests.extend(
            change.add_routes.iter().map(|route| NetlinkRequest::add_route(index, name, *route, None).or_exists()),
        );
        requests.extend(
            change.remove_addresses.iter().map(|address| NetlinkRequest::delete_address(index, name, *address)),
        );
        requests.extend(change.add_local.iter().map(|net| local_route(link_index, &wanted.veth, *net).or_exists()));
        Ok(inner.netlink.execute(requests)?)
    }

    /// Kills every process in the namespace, and waits until they are gone.
    pub fn kill_programs(&mut self) -> io::Result<()> {
        self.reserve = None;
        match &self.inner {
            Some(inner) => clean_up::kill_all_in(inner.namespace.id()?),
            None => Ok(()),
        }
    }

    /// Sets the MTU of WireGuard's interface, in bytes.
    pub fn set_mtu(&mut self, mtu: u32) -> io::Result<()> {
        let Some(inner) = &mut self.inner else { return Ok(()) };
        let name = &self.plan.wireguard.interface;
        let index = inner.netlink.link_index(name)?;
        Ok(inner.netlink.execute_one(NetlinkRequest::set_mtu(index, name.as_str(), mtu))?)
    }

    fn inner(&mut self) -> Result<&mut Inner, Failure> {
        self.inner.as_mut().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT)).doing("use the namespace")
    }

    /// Makes the namespace: marked, with `lo` up, and nothing else.
    fn make_namespace(&mut self) -> Result<(), Failure> {
        let ipv6 = self.plan.wireguard.ipv6;
        let (namespace, (mut netlink, mut rules)) = NetworkNamespace::create(|| {
            parameters::prepare_ipv4()?;
            parameters::prepare_ipv6(ipv6)?;
            Ok((Netlink::open()?, Nftables::open()?))
        })
        .doing("make a network namespace")?;
        let mark = self.mark.text();
        if !fault::is_broken("rules") {
            rules.create(&self.plan.firewall.inside, mark).doing(RULES).map_err(local_networks::lacking)?;
        }
        // `lo` is the first interface of every network namespace (LOOPBACK_IFINDEX in the kernel's include/net/flow.h).
        let lo = vec![NetlinkRequest::set_alias(1, "lo", mark), NetlinkRequest::set_up(1, "lo")];
        netlink.execute(lo).doing("make a network namespace")?;
        self.inner = Some(Inner { namespace, netlink, rules });
        Ok(())
    }

    /// Has the host let packets pass to the local networks, if there are any.
    fn open_local_networks(&mut self) -> Result<(), Failure> {
        if self.plan.local.networks.is_empty() {
            return Ok(());
        }
        self.host_part.open(&self.plan, &self.mark)
    }

    /// Takes that back.
    fn close_local_networks(&mut self) -> Result<(), Failure> {
        if self.plan.local.networks.is_empty() {
            return Ok(());
        }
        self.host_part.close(&self.plan.name, &self.mark)
    }

    fn write_first_state(&mut self, standing: bool, holders: Vec<Holder>) -> Result<(), Failure> {
        let state = State {
            mark: self.mark.clone(),
            namespace: self.inner()?.namespace.id().doing("identify the namespace")?,
            keeper: std::process::id(),
            made: None,
            standing,
            holders,
        };
        self.directory.write(&state).doing(format!("write below {}", self.directory.path().display()))?;
        self.state = Some(state);
        Ok(())
    }

    fn give_name(&mut self) -> Result<(), Failure> {
        let (path, mark) = (self.plan.namespace.clone(), self.mark.clone());
        let given = namespace::bind_name(&self.inner()?.namespace, &path, mark.text());
        let taken = matches!(&given, Err(error) if error.kind() == io::ErrorKind::AlreadyExists);
        given.doing(format!("name the namespace {}", path.display())).map_err(|mut error| {
            if taken {
                error.advice = Some(format!(
                    "the name belongs to somebody else: choose another with --name, or remove it with `ip netns delete {}`",
                    self.plan.name
                ));
            }
            error
        })
    }

    /// Makes the veth pair. Its inner end is born inside; no route leads over it but the one to the host's end.
    fn make_veth(&mut self) -> Result<(), Failure> {
        let veth = self.plan.veth.clone();
        let (outer, inner) = (&veth.host_interface, &veth.inner_interface);
        let mark = self.mark.clone();
        let namespace = self.inner()?.namespace.try_clone().doing("use the namespace")?;
        let add = NetlinkRequest::add_veth(outer, inner, TargetNamespace::Other(namespace.as_fd()));
        self.host.execute_one(add).doing("join the namespace to the host")?;
        let index = self.host.link_index(outer).doing(format!("find {outer}"))?;
        parameters::prepare_host_interface(outer, veth.host_ipv6.is_some())
            .doing(format!("set the parameters of {outer}"))?;
        let mut requests = vec![NetlinkRequest::set_alias(index, outer.as_str(), mark.text())];
        requests.extend(addresses(index, outer, veth.host_ipv4, veth.host_ipv6)?);
        requests.push(NetlinkRequest::set_up(index, outer.as_str()));
        self.host.execute(requests).doing("join the namespace to the host")?;

        let netlink = &mut self.inner()?.netlink;
        let index = netlink.link_index(inner).doing(format!("find {inner}"))?;
        let mut requests = addresses(index, inner, veth.inner_ipv4, veth.inner_ipv6)?;
        requests.push(NetlinkRequest::set_up(index, inner.as_str()));
        netlink.execute(requests).doing("join the namespace to the host")
    }

    /// Gives WireGuard's interface its addresses, takes it up, and only then routes into it; then into the local networks.
    fn open_wireguard(&mut self) -> Result<(), Failure> {
        let (mut plan, veth, mut local) =
            (self.plan.wireguard.clone(), self.plan.veth.clone(), self.plan.local.networks.clone());
        if fault::is_broken("routes") {
            local.append(&mut plan.routes);
        }
        let name = plan.interface.as_str();
        let netlink = &mut self.inner()?.netlink;
        let index = netlink.link_index(&plan.interface).doing(format!("find {name}"))?;
        // A TUN would take part in multicast, which no peer passes on.
        let mut requests =
            vec![NetlinkRequest::set_mtu(index, name, plan.mtu), NetlinkRequest::clear_multicast(index, name)];
        requests.extend(plan.addresses.iter().map(|address| NetlinkRequest::add_address(index, name, *address)));
        requests.push(NetlinkRequest::set_up(index, name));
        requests.extend(plan.routes.iter().map(|route| {
            let request = NetlinkRequest::add_route(index, name, *route, None);
            // Taking the interface up has made the route to the network of each IPv4 address.
            let is_connected = plan.addresses.iter().any(|address| address.trunc() == *route);
            if is_connected { request.or_exists() } else { request }
        }));
        if !local.is_empty() {
            let link = netlink.link_index(&veth.inner_interface).doing(format!("find {}", veth.inner_interface))?;
            requests.extend(local.iter().map(|net| local_route(link, &veth, *net)));
        }
        netlink.execute(requests).doing("configure WireGuard's interface").map_err(|mut error| {
            if error.errno == Some(libc::EADDRINUSE) {
                error.advice =
                    Some("another program uses the ListenPort of the file: leave that line out, or stop it".into());
            }
            error
        })
    }

    fn run_hooks(&mut self, kind: HookKind) -> Result<(), Failure> {
        let Some(inner) = &self.inner else { return Ok(()) };
        for hook in self.plan.hooks.iter().filter(|hook| hook.run && hook.kind == kind) {
            hooks::run(&inner.namespace, hook).doing(format!("run the hook {kind} of the file"))?;
        }
        Ok(())
    }

    /// Takes away the tunnel's names: after this the host is as it was, the namespace's links excepted, which the kernel is
    /// about to remove. Works from any point of [`Self::make`]. Goes on after an error, and returns the first.
    pub fn take_down(&mut self) -> Result<(), Failure> {
        self.reserve = None;
        let closed = self.directory.remove_socket().doing("close the keeper's socket");
        fault::point("after the socket is gone")?;
        let pre_down = if self.post_down_due { self.run_hooks(HookKind::PreDown) } else { Ok(()) };
        let path = &self.plan.namespace;
        let untaken = namespace::look_up(path)
            .and_then(|named| if self.is_ours(&named) { namespace::remove_name(path) } else { Ok(()) })
            .doing(format!("remove {}", path.display()));
        self.name_left = untaken.is_err();
        let post_down = if self.post_down_due { self.run_hooks(HookKind::PostDown) } else { Ok(()) };
        self.post_down_due = false;
        fault::point("after the name is gone")?;
        let local = self.close_local_networks();
        fault::point("after the host's rules are gone")?;
        closed.and(pre_down).and(untaken).and(post_down).and(local)
    }

    fn is_ours(&self, named: &NameLookup) -> bool {
        match (named, &self.inner) {
            (NameLookup::Namespace(there), Some(inner)) => there.id().ok() == inner.namespace.id().ok(),
            (NameLookup::File(text), _) => text == self.mark.text(),
            _ => false,
        }
    }

    /// Lets go of the namespace and gives the tunnel's name back to the next start. What remains is [`Remains::settle`].
    ///
    /// # Errors
    /// Also if the namespace's name could not be taken away: then what is written down stays, for [`reclaim`] to find it.
    pub fn release(mut self) -> Result<Remains, Failure> {
        if self.name_left {
            let busy = Err(io::Error::from_raw_os_error(libc::EBUSY));
            return busy.doing(format!(
                "give back the name {}: {} is still there",
                self.plan.name,
                self.plan.namespace.display()
            ));
        }
        let remains = Remains {
            host: self.host,
            mark: self.mark.clone(),
            wireguard_interface: self.plan.wireguard.interface.clone(),
            inner: self.inner.take().filter(|_| self.device.is_some()),
            device: self.device.take(),
            _host_part: std::mem::take(&mut self.host_part),
        };
        fault::point("before the state is gone")?;
        self.directory.release().doing("remove the tunnel's state")?;
        Ok(remains)
    }
}

/// A route to a local network, inside.
fn local_route(link: u32, veth: &VethPlan, net: IpNet) -> NetlinkRequest {
    let router = if net.addr().is_ipv4() { Some(veth.host_ipv4.into()) } else { veth.host_ipv6.map(IpAddr::from) };
    NetlinkRequest::add_route(link, veth.inner_interface.as_str(), net, router)
}

fn addresses(
    index: u32,
    name: &InterfaceName,
    ipv4: std::net::Ipv4Addr,
    ipv6: Option<std::net::Ipv6Addr>,
) -> Result<Vec<NetlinkRequest>, Failure> {
    let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
    // A /31 has no broadcast address (RFC 3021), a /127 no subnet-router anycast address (RFC 6164).
    let ipv4 = IpNet::new(ipv4.into(), 31).map_err(invalid).doing("use the veth's address")?;
    let ipv6 =
        ipv6.map(|ipv6| IpNet::new(ipv6.into(), 127)).transpose().map_err(invalid).doing("use the veth's address")?;
    Ok([Some(ipv4), ipv6]
        .into_iter()
        .flatten()
        .map(|address| NetlinkRequest::add_address(index, name.as_str(), address))
        .collect())
}
