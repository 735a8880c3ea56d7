//! The tunnels of containers, as the commands for container engines make and remove them.

use std::time::{Duration, Instant};

use crate::failure::{Doing, Failure};
use crate::keeper;
use crate::lease;
use crate::lease::status::{self, Condition};
use crate::linux::{capabilities, process};
use crate::names::TunnelName;
use crate::registry::{self, Container, TunnelState};
use crate::request;
use crate::session;
use crate::session::approach::{SUCCESSION, claim_dead};
use crate::tunnel::{ContainerPlace, reclaim};

/// The delay between two attempts while a keeper ends.
const RETRY: Duration = Duration::from_millis(1);

/// Makes a standing tunnel in a container's namespace, unless the container has it already. There may be no handshake
/// yet when this function returns.
///
/// # Errors
/// If there is no such profile, if it is not for containers, if the tunnel serves another container or this machine, or
/// if it cannot be made. Then nothing is left but a closed namespace.
pub(super) fn create_tunnel(name: &TunnelName, place: ContainerPlace) -> Result<(), Failure> {
    let request = Box::new(request::load_for_container(name)?);
    if is_up_for(name, &place.container)? {
        return Ok(());
    }
    session::require_privileges()?;
    process::set_umask(0o022);
    let ports = keeper::capabilities_for_ports(request.config.listened_ports());
    let needed = keeper::needed_capabilities() | ports | capabilities::CapabilitySet::SETPCAP;
    let privileges = session::Privileges::limit(needed)?;
    let mut session = session::start_in(request, place, &privileges)?;
    let made = session.wait_until_ready(None).and_then(|()| session.lease.stand(name));
    let is_kept = session.end(made.is_ok())?;
    made?;
    match is_kept {
        true => Ok(()),
        false => Err(Failure::new("the tunnel's keeper was killed")),
    }
}

/// Returns whether a tunnel with a living keeper serves a container.
fn is_up_for(name: &TunnelName, container: &Container) -> Result<bool, Failure> {
    let state = registry::read(name).map_err(Failure::new)?;
    if !state.and_then(|state| state.container).is_some_and(|served| served.is_same(container)) {
        return Ok(false);
    }
    let status = status::of(name).map_err(Failure::new)?;
    Ok(status.is_some_and(|status| status.state != Condition::Failed))
}

/// Removes the tunnels of the containers that `is_meant` selects. Does nothing if there are none.
///
/// # Errors
/// If the tunnels cannot be listed, or one cannot be removed.
pub(super) fn remove_tunnels(is_meant: impl Fn(&Container) -> bool) -> Result<(), Failure> {
    let is_its = |state: &TunnelState| state.container.as_ref().is_some_and(&is_meant);
    let mut result = Ok(());
    for name in registry::names().map_err(Failure::new)? {
        match registry::read(&name) {
            // One that cannot be removed does not keep the others. The first failure is reported.
            Ok(Some(state)) if is_its(&state) => result = result.and(remove(&name, &is_its)),
            Ok(_) => {}
            Err(error) => tracing::warn!("cannot read the state of the tunnel {name}: {error}"),
        }
    }
    result
}

/// Removes a tunnel if it still is one that `is_its` selects.
fn remove(name: &TunnelName, is_its: &dyn Fn(&TunnelState) -> bool) -> Result<(), Failure> {
    let begin = Instant::now();
    session::require_privileges()?;
    loop {
        let failure = match lease::take_down_if(name, is_its) {
            Ok(true) => return Ok(()),
            Ok(false) => None,
            // The keeper may have been killed meanwhile. Then the rest is removed here.
            Err(failure) => Some(failure),
        };
        let Some(directory) = claim_dead(name)? else {
            // It has ended by itself, or another keeper has the name by now.
            if !registry::read(name).map_err(Failure::new)?.is_some_and(|state| is_its(&state)) {
                return Ok(());
            }
            if begin.elapsed() > SUCCESSION {
                let hangs = || Failure::new(format!("cannot remove the tunnel {name}: its keeper does not answer"));
                return Err(failure.unwrap_or_else(hangs));
            }
            std::thread::sleep(RETRY);
            continue;
        };
        let state = directory.state().map_err(Failure::new)?;
        if state.as_ref().is_none_or(is_its) {
            reclaim(&directory, name)?;
            directory.release().doing("remove the tunnel's state")?;
        }
        return Ok(());
    }
}
