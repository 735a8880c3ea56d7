//! What is to be done when a keeper was killed: by those who hold a lease on its tunnel, and by those who come later.

use std::io;
use std::os::fd::AsFd;

use super::approach::{Approach, approach, claim_dead};
use super::{Progress, Readiness};
use crate::failure::Doing;
use crate::failure::Failure;
use crate::keeper::{self, Beginning, Mission};
use crate::lease::Lease;
use crate::lease::handover::Handover;
use crate::linux::capabilities;
use crate::names::TunnelName;
use crate::registry::{Directory, State};
use crate::tunnel;

/// How many keepers are started in a row, each in the place of one that was killed before it had begun.
const SUCCESSORS: usize = 10;

/// Whether anybody still wants a tunnel whose keeper was killed: then a successor takes it over. Otherwise it is taken away.
pub(crate) fn is_wanted(state: &State) -> bool {
    let own = std::process::id().cast_signed();
    let mut others = state.holders.iter().filter(|holder| holder.process.pid != own);
    state.made.is_some() && (state.standing || others.any(|holder| holder.process.is_alive()))
}

/// Holds a lease again on a tunnel whose keeper was killed: on the successor's that somebody has started already, or on that of
/// one which is started here. One that is killed, too, is replaced as well. Raises the capabilities that this takes.
///
/// # Errors
/// If the tunnel is gone, or cannot be taken over. Then what is left of it is still there: [`clean_up()`] takes it away.
pub(crate) fn recover(name: &TunnelName, lost: &Lease) -> Result<Lease, Failure> {
    let what = || format!("take over the tunnel {name}, whose keeper was killed");
    capabilities::raise(keeper::needed_capabilities()).doing(what())?;
    for _ in 0..SUCCESSORS {
        let directory = match approach(name).doing(what())? {
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
    Err(io::Error::other(format!("{SUCCESSORS} successors of it were killed, too"))).doing(what())
}

/// Starts a keeper that takes over what is left in a claimed directory.
fn start_successor(directory: Directory, lost: &Lease) -> io::Result<Lease> {
    let gone = || io::Error::new(io::ErrorKind::NotFound, "what was written down of it is gone");
    let state = directory.state()?.ok_or_else(gone)?;
    let plan = directory.plan()?.ok_or_else(gone)?;
    let handover = lost.handover().ok_or_else(gone)?.try_clone_to_owned()?;
    let (config, options) = Handover::open(handover.as_fd())?.config().map_err(io::Error::other)?;
    let beginning = Beginning::TakeOver(state);
    keeper::start(Mission { plan, directory, config, options, handover, beginning, listen_fds: 0, reload: None })
}

/// Takes away what a killed keeper has left, unless somebody else wants it or has it by now.
pub(crate) fn clean_up(name: &TunnelName) -> Result<(), Failure> {
    let what = || format!("take away what is left of the tunnel {name}");
    capabilities::raise(keeper::needed_capabilities()).doing(what())?;
    let Some(directory) = claim_dead(name).doing(what())? else { return Ok(()) };
    if directory.state().doing(what())?.is_some_and(|state| is_wanted(&state)) {
        return Ok(());
    }
    // What is written down is released only once all of it is gone.
    tunnel::reclaim(&directory, name)?;
    directory.release().doing(what())
}
