//! Removes the remains of a tunnel whose keeper was killed. Touches only what carries the tunnel's mark.

use std::path::Path;

use super::container;
use super::host_rules::HostRules;
use super::take_down::{remove_links, wait_for_links};
use super::{processes, rootless};
use crate::failure::{Doing, Failure};
use crate::linux::namespace::{self, NameLookup};
use crate::linux::netlink::Netlink;
use crate::names::TunnelName;
use crate::registry::{Mark, Scope, TunnelDirectory, TunnelState};

/// Removes what a killed tunnel of this name has left, programs included unless they are a container's. Waits for the
/// links of a tunnel that has ended properly.
///
/// # Errors
/// If a part cannot be removed.
pub fn reclaim(directory: &TunnelDirectory, name: &TunnelName) -> Result<(), Failure> {
    if Scope::current() == Scope::User {
        return reclaim_rootless(directory, name);
    }
    let mut host = Netlink::open().doing("open a netlink socket")?;
    if let Some(state) = directory.state().doing(format!("read the state below {}", directory.path().display()))? {
        tracing::info!("removing what a killed tunnel {name} has left");
        reclaim_namespace(&state, directory, &namespace::path_of(name.as_str()))?;
        HostRules::default().close(name, &state.mark)?;
        remove_links(&mut host, state.mark.text())?;
    }
    // Links that stay belong to a tunnel of this name in a container that shares this network but not this /run.
    wait_for_links(&mut host, &Mark::of_name(name)).map(drop)
}

/// Removes what a killed rootless tunnel has left: the programs, without which its namespaces end.
fn reclaim_rootless(directory: &TunnelDirectory, name: &TunnelName) -> Result<(), Failure> {
    let Some(state) = directory.state().doing(format!("read the state below {}", directory.path().display()))? else {
        return Ok(());
    };
    // Another namespace may have its number now, so the mark decides.
    let Some(namespace) = rootless::find_namespace(&state) else { return Ok(()) };
    let alias = rootless::alias_of_loopback(&namespace).doing("look into the namespace of a killed tunnel")?;
    if alias.as_deref() == Some(state.mark.text()) {
        tracing::info!("ending the programs of the killed tunnel {name}");
        processes::kill_all(state.namespace).doing("kill the programs of a killed tunnel")?;
    }
    Ok(())
}

fn reclaim_namespace(state: &TunnelState, directory: &TunnelDirectory, path: &Path) -> Result<(), Failure> {
    match namespace::look_up(path).doing(format!("look at {}", path.display()))? {
        // The keeper was killed before the namespace was mounted here, or after it was unmounted, so no program is
        // inside. The namespace may have ended, and another may have its number now, so nothing is killed by that
        // number.
        NameLookup::File(text) if text == state.mark.text() => {}
        NameLookup::Namespace(namespace) => {
            let alias = namespace.run(|| Ok(Netlink::open()?.link("lo")?.and_then(|lo| lo.alias)));
            let is_own = namespace.id().doing("identify the namespace")? == state.namespace
                && alias.doing("look into the namespace")?.as_deref() == Some(state.mark.text());
            if !is_own {
                return Ok(());
            }
            match &state.container {
                None => processes::kill_all(state.namespace).doing("kill the programs of a killed tunnel")?,
                Some(_) => container::remove_interface(&namespace, directory)?,
            }
        }
        NameLookup::Free | NameLookup::File(_) => return Ok(()),
    }
    namespace::remove_name(path).doing(format!("remove {}", path.display()))
}
