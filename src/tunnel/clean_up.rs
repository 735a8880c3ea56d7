//! Removes what a tunnel leaves: what the kernel takes its time for after a tunnel was taken down, and all that one has left that
//! was killed. Only what carries the mark is touched.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::Inner;
use super::local_networks::HostPart;
use crate::failure::{Doing, Failure};
use crate::linux::namespace::{self, NameLookup, NamespaceId};
use crate::linux::netlink::link::Link;
use crate::linux::netlink::{Netlink, NetlinkRequest};
use crate::linux::process;
use crate::names::{InterfaceName, TunnelName};
use crate::registry::{Directory, Mark, State};
use crate::wireguard::Device;

/// How long the kernel may take to remove the links of a namespace that has ended, before they are removed one by one.
const LINKS_END: Duration = Duration::from_secs(1);

/// How long programs that were killed may take to be gone.
const KILLED: Duration = Duration::from_secs(5);

/// What the kernel takes its time to remove.
pub struct Remains {
    pub(super) host: Netlink,
    pub(super) mark: Mark,
    pub(super) wireguard_interface: InterfaceName,
    pub(super) inner: Option<Inner>,
    pub(super) device: Option<Box<dyn Device>>,
    /// Closing it after rules were removed takes the kernel some time, too.
    pub(super) _host_part: HostPart,
}

impl Remains {
    /// Waits until the tunnel's links are gone, and removes them where somebody else keeps the namespace alive (a shell of
    /// `ip netns exec`, say).
    pub fn settle(mut self) -> Result<(), Failure> {
        if let Some(device) = self.device.take() {
            let goes_along = device.take_interface_along().doing("let WireGuard's interface go")?;
            match self.inner.take() {
                // With nothing of ours left in it the namespace ends, and takes all its links at once: the kernel waits for its
                // other processors once, not once a link, which is half the time until a next start may use the name.
                Some(inner) if goes_along => drop(inner),
                Some(mut inner) => {
                    if let Ok(index) = inner.netlink.link_index(&self.wireguard_interface) {
                        let delete = NetlinkRequest::delete_link(index, self.wireguard_interface.as_str());
                        inner.netlink.execute_one(delete).doing("remove WireGuard's interface")?;
                    }
                }
                None => {}
            }
        }
        remove_links(&mut self.host, self.mark.text())
    }
}

/// Waits for the links that carry a mark to go with their namespace, and removes them if they do not.
fn remove_links(host: &mut Netlink, mark: &str) -> Result<(), Failure> {
    let left = wait_for_links(host, mark)?;
    let requests = left.into_iter().map(|link| NetlinkRequest::delete_link(link.index, &link.name)).collect();
    host.execute(requests).doing("remove the tunnel's links")
}

/// Waits for the links of the host whose alias begins with a mark to go with their namespace, and returns those that do not.
fn wait_for_links(host: &mut Netlink, mark: &str) -> Result<Vec<Link>, Failure> {
    let begin = Instant::now();
    loop {
        let mut links = host.links().doing("look for the tunnel's links")?;
        links.retain(|link| link.alias.as_ref().is_some_and(|alias| alias.starts_with(mark)));
        if links.is_empty() || begin.elapsed() > LINKS_END {
            return Ok(links);
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// Takes away what a tunnel of this name has left that was killed, programs included: what carries its mark. Of one that has ended
/// well the kernel may still be about to remove the links, which is waited for.
pub fn reclaim(directory: &Directory, name: &TunnelName) -> Result<(), Failure> {
    let mut host = Netlink::open().doing("open a netlink socket")?;
    if let Some(state) = directory.state().doing(format!("read the state below {}", directory.path().display()))? {
        tracing::info!("taking away what a killed tunnel {name} has left");
        reclaim_namespace(&state, &namespace::path_of(name.as_str()))?;
        HostPart::default().close(name, &state.mark)?;
        remove_links(&mut host, state.mark.text())?;
    }
    // Any that stay are not this machine's /run's: somebody in a container on this network has a tunnel of this name.
    wait_for_links(&mut host, &Mark::of_name(name)).map(drop)
}

fn reclaim_namespace(state: &State, path: &Path) -> Result<(), Failure> {
    match namespace::look_up(path).doing(format!("look at {}", path.display()))? {
        // Killed before the namespace was mounted there, or after it was unmounted: no program is inside. The namespace may have
        // ended, and its number be another's by now, so nobody is to be killed by that number.
        NameLookup::File(text) if text == state.mark.text() => {}
        NameLookup::Namespace(namespace) => {
            let alias = namespace.run(|| Ok(Netlink::open()?.link("lo")?.and_then(|lo| lo.alias)));
            let is_ours = namespace.id().doing("identify the namespace")? == state.namespace
                && alias.doing("look into the namespace")?.as_deref() == Some(state.mark.text());
            if !is_ours {
                return Ok(());
            }
            kill_all_in(state.namespace).doing("end the programs of a killed tunnel")?;
        }
        NameLookup::Free | NameLookup::File(_) => return Ok(()),
    }
    namespace::remove_name(path).doing(format!("remove {}", path.display()))
}

/// Kills every process in a namespace until there is none.
pub(super) fn kill_all_in(namespace: NamespaceId) -> io::Result<()> {
    kill_until_none(|| process::in_namespace(namespace))
}

/// Kills, of the processes in a network namespace, those in a mount namespace and their descendants, until there is none.
pub(super) fn kill_left_behind(namespace: NamespaceId, mounts: NamespaceId) -> io::Result<()> {
    kill_until_none(|| {
        let mut inside = process::in_namespace(namespace)?;
        let mut found: Vec<i32> = Vec::new();
        loop {
            let belongs = |pid: &i32| {
                let parent = process::parent_of(*pid);
                NamespaceId::of_mounts(*pid).is_ok_and(|of| of == mounts)
                    || parent.is_some_and(|of| found.contains(&of))
            };
            let (more, others): (Vec<i32>, Vec<i32>) = inside.into_iter().partition(belongs);
            if more.is_empty() {
                return Ok(found);
            }
            found.extend(more);
            inside = others;
        }
    })
}

fn kill_until_none(find: impl Fn() -> io::Result<Vec<i32>>) -> io::Result<()> {
    let begin = Instant::now();
    loop {
        let programs = find()?;
        if programs.is_empty() {
            return Ok(());
        }
        if begin.elapsed() > KILLED {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("processes {programs:?} do not end")));
        }
        for pid in programs {
            process::kill(pid, Signal::SIGKILL)?;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
