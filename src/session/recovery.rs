//! Recovery after a killed keeper: a launcher with a lease starts a successor, and a later one removes the remains.

use std::io;
use std::os::fd::AsFd;

use super::approach::{Approach, approach_again, claim_dead};
use super::{Progress, Readiness};
use crate::failure::Doing;
use crate::failure::Failure;
use crate::keeper::{self, KeeperSpec, KeeperStart};
use crate::lease::Lease;
use crate::lease::handover::Handover;
use crate::linux::capabilities;
use crate::names::TunnelName;
use crate::registry::{Container, Scope, TunnelDirectory, TunnelState};
use crate::tunnel;

/// How many successors are started in a row if each is killed before it has taken over.
const SUCCESSORS: usize = 10;

/// Returns whether a tunnel whose keeper was killed is still in use: it stands, or another launcher with a lease is
/// alive. A container's tunnel is in use as long as the container. A successor then takes it over; otherwise it is
/// removed.
pub(crate) fn is_wanted(state: &TunnelState) -> bool {
    let own = std::process::id().cast_signed();
    let mut others = state.holders.iter().filter(|holder| holder.process.pid != own);
    let has_namespace = state.container.as_ref().is_none_or(Container::is_alive);
    state.made.is_some() && has_namespace && (state.standing || others.any(|holder| holder.process.is_alive()))
}

/// Acquires a new lease on a tunnel whose keeper was killed: from the successor that another launcher has started, or
/// from one that is started here. A successor that is killed as well is replaced. Raises the capabilities that this
/// needs.
///
/// # Errors
/// If the tunnel is gone, or cannot be taken over. Its remains still exist then: [`clean_up()`] removes them.
pub(crate) fn recover(name: &TunnelName, lost: &Lease) -> Result<Lease, Failure> {
    let what = || format!("take over the tunnel {name}, whose keeper was killed");
    capabilities::raise(keeper::needed_capabilities()).doing(what())?;
    for _ in 0..SUCCESSORS {
        let directory = match approach_again(name).doing(what())? {
            Approach::Joined(lease) => return Ok(lease),
            Approach::Claimed(directory) => directory,
        };
        let mut lease = start_successor(directory, lost).doing(what())?;
        let mut readiness = Readiness::new(false, None);
        loop {
            match readiness.advance(&mut lease, &[]).doing(what())? {
                Progress::Ready => return Ok(lease),
                Progress::KeeperKilled => break,
                _ => {}
            }
        }
    }
    Err(io::Error::other(format!("{SUCCESSORS} successors were killed as well"))).doing(what())
}

/// Starts a keeper that takes over the remains in a claimed directory.
fn start_successor(directory: TunnelDirectory, lost: &Lease) -> io::Result<Lease> {
    let gone = || io::Error::new(io::ErrorKind::NotFound, "its state is gone");
    let Some(state) = directory.state()? else {
        // The tunnel was taken down meanwhile, and the claim has created its directory again.
        let _ = directory.release();
        return Err(gone());
    };
    let handover = lost.handover().ok_or_else(gone)?.try_clone_to_owned()?;
    let config = Handover::open(handover.as_fd())?.config().map_err(io::Error::other)?;
    let (plan, namespace) = match Scope::current() {
        Scope::System => (directory.plan()?.ok_or_else(gone)?, None),
        Scope::User => {
            let unnamed = lost.unnamed()?;
            unnamed.require_state(&state)?;
            (unnamed.plan, Some(unnamed.namespace))
        }
    };
    let start = KeeperStart::TakeOver(state);
    keeper::start(KeeperSpec { plan, directory, config, handover, start, namespace, listen_fds: 0, reread: None })
}

/// Removes the remains of a killed keeper, unless the tunnel is in use or has a new keeper.
///
/// # Errors
/// If a part cannot be removed.
pub(crate) fn clean_up(name: &TunnelName) -> Result<(), Failure> {
    let what = || format!("remove the remains of the tunnel {name}");
    capabilities::raise(keeper::needed_capabilities()).doing(what())?;
    let Some(directory) = claim_dead(name).doing(what())? else { return Ok(()) };
    if directory.state().doing(what())?.is_some_and(|state| is_wanted(&state)) {
        return Ok(());
    }
    // The state must stay until all of the tunnel is gone.
    tunnel::reclaim(&directory, name)?;
    directory.release().doing(what())
}
