//! Takes a tunnel down: removes its names, and lets the kernel remove the rest.

use std::io;
use std::time::{Duration, Instant};

use super::gateway::Gateway;
use super::host_rules::HostRules;
use super::{OpenNamespace, Tunnel};
use crate::config::HookKind;
use crate::failure::{Doing, Failure};
use crate::fault;
use crate::linux::namespace::{self, NameLookup};
use crate::linux::netlink::link::Link;
use crate::linux::netlink::{Netlink, NetlinkRequest};
use crate::names::InterfaceName;
use crate::registry::Mark;
use crate::wireguard::Device;

/// How long the kernel may take to remove the links of a namespace that has ended. Then they are removed one by one.
const LINKS_TIMEOUT: Duration = Duration::from_secs(1);

/// The delay between two looks at the links.
const LINKS_POLL: Duration = Duration::from_micros(500);

impl Tunnel {
    /// Removes the tunnel's names, and the host's rules. Works at any point of [`Tunnel::create`], and goes on after a
    /// failure. The links of a namespace of the tunnel's own remain until [`Tunnel::release`] closes it.
    ///
    /// # Errors
    /// The first failure of a step.
    pub fn take_down(&mut self) -> Result<(), Failure> {
        self.reserve = None;
        let closed = self.remove_sockets();
        fault::point("after the socket is gone")?;
        let pre_down = if self.post_down_due { self.run_hooks(HookKind::PreDown) } else { Ok(()) };
        // Before the name, by which another process would find the interface if this one is killed.
        let interface = self.remove_from_container();
        let unnamed = self.remove_name();
        self.name_left = unnamed.is_err();
        let post_down = if self.post_down_due { self.run_hooks(HookKind::PostDown) } else { Ok(()) };
        self.post_down_due = false;
        fault::point("after the name is gone")?;
        let host = self.remove_host_rules();
        fault::point("after the host's rules are gone")?;
        closed.and(pre_down).and(unnamed).and(post_down).and(host).and(interface)
    }

    fn remove_name(&self) -> Result<(), Failure> {
        let Some(path) = &self.plan.namespace else { return Ok(()) };
        namespace::look_up(path)
            .and_then(|found| if self.is_own(&found) { namespace::remove_name(path) } else { Ok(()) })
            .doing(format!("remove {}", path.display()))
    }

    /// Removes WireGuard's interface from a container's namespace, which does not end with the tunnel. The next tunnel
    /// in that namespace needs the interface's name.
    fn remove_from_container(&mut self) -> Result<(), Failure> {
        const REMOVING: &str = "remove WireGuard's interface from the container";
        if self.container.is_none() {
            return Ok(());
        }
        let Some(device) = self.device.take() else { return Ok(()) };
        let ends_with_device = device.remove_interface_on_drop().doing(REMOVING)?;
        drop(device);
        if ends_with_device {
            return Ok(());
        }
        let interface = self.plan.wireguard.interface.clone();
        let netlink = &mut self.inner()?.netlink;
        match netlink.link(interface.as_str()).doing(REMOVING)? {
            Some(link) => netlink.execute_one(NetlinkRequest::delete_link(link.index, &link.name)).doing(REMOVING),
            None => Ok(()),
        }
    }

    fn remove_host_rules(&mut self) -> Result<(), Failure> {
        if self.plan.local.networks.is_empty() || self.plan.rootless {
            return Ok(());
        }
        self.host_rules.close(&self.plan.name, &self.mark)
    }

    /// Returns whether the tunnel's name leads to this tunnel's namespace, or to the file that was to become its name.
    fn is_own(&self, found: &NameLookup) -> bool {
        match (found, &self.inner) {
            (NameLookup::Namespace(there), Some(inner)) => there.id().ok() == inner.namespace.id().ok(),
            (NameLookup::File(text), _) => text == self.mark.text(),
            _ => false,
        }
    }

    /// Closes the namespace and releases the tunnel's directory. [`Remains::settle`] waits for the rest.
    ///
    /// # Errors
    /// If the directory cannot be removed. If the namespace's name could not be removed, the directory stays so that
    /// [`super::reclaim`] finds it.
    pub fn release(mut self) -> Result<Remains, Failure> {
        if let Some(path) = self.plan.namespace.as_ref().filter(|_| self.name_left) {
            let (name, path) = (&self.plan.name, path.display());
            return Err(io::Error::from_raw_os_error(libc::EBUSY))
                .doing(format!("release the name {name}: {path} still exists"));
        }
        if let Some(device) = &mut self.device {
            // Another program may want its port at once.
            device.stop();
        }
        let remains = Remains {
            host: self.host,
            gateway: self.gateway.take(),
            mark: self.mark.clone(),
            wireguard_interface: self.plan.wireguard.interface.clone(),
            inner: self.inner.take().filter(|_| self.device.is_some()),
            device: self.device.take(),
            _host_rules: std::mem::take(&mut self.host_rules),
        };
        fault::point("before the state is gone")?;
        self.directory.release().doing("remove the tunnel's state")?;
        Ok(remains)
    }
}

/// The parts of a tunnel that the kernel removes in its own time.
pub struct Remains {
    host: Netlink,
    /// Closing its rules' socket takes the kernel some time.
    gateway: Option<Gateway>,
    mark: Mark,
    wireguard_interface: InterfaceName,
    inner: Option<OpenNamespace>,
    device: Option<Box<dyn Device>>,
    /// Closing its socket after rules were removed also takes the kernel some time.
    _host_rules: HostRules,
}

impl Remains {
    /// Waits until the tunnel's links are gone. Removes them if another process keeps the namespace alive, such as a
    /// shell of `ip netns exec`.
    ///
    /// # Errors
    /// If a link cannot be removed.
    pub fn settle(mut self) -> Result<(), Failure> {
        if let Some(device) = self.device.take() {
            let ends_with_namespace = device.remove_interface_on_drop().doing("release WireGuard's interface")?;
            match self.inner.take() {
                // Without a reference from this process the namespace ends, and the kernel removes all its links at
                // once. It waits for its other processors once instead of once a link, which halves the time until the
                // next start.
                Some(inner) if ends_with_namespace => drop(inner),
                Some(mut inner) => {
                    if let Ok(index) = inner.netlink.link_index(&self.wireguard_interface) {
                        let delete = NetlinkRequest::delete_link(index, self.wireguard_interface.as_str());
                        inner.netlink.execute_one(delete).doing("remove WireGuard's interface")?;
                    }
                }
                None => {}
            }
        }
        match self.gateway {
            // The link ends with either of its namespaces. No other process holds this one, and the next start needs
            // none of its names.
            Some(_) => Ok(()),
            None => remove_links(&mut self.host, self.mark.text()),
        }
    }
}

/// Waits for the links with a mark to end with their namespace, and removes those that do not.
pub(super) fn remove_links(host: &mut Netlink, mark: &str) -> Result<(), Failure> {
    let left = wait_for_links(host, mark)?;
    let requests = left.into_iter().map(|link| NetlinkRequest::delete_link(link.index, &link.name)).collect();
    host.execute(requests).doing("remove the tunnel's links")
}

/// Waits for the host's links whose alias begins with a mark to end with their namespace. Returns those that do not.
pub(super) fn wait_for_links(host: &mut Netlink, mark: &str) -> Result<Vec<Link>, Failure> {
    let begin = Instant::now();
    loop {
        let mut links = host.links().doing("look for the tunnel's links")?;
        links.retain(|link| link.alias.as_ref().is_some_and(|alias| alias.starts_with(mark)));
        if links.is_empty() || begin.elapsed() > LINKS_TIMEOUT {
            return Ok(links);
        }
        std::thread::sleep(LINKS_POLL);
    }
}
