//! The approach to a tunnel's name: the first launcher claims it, later ones join its keeper.

use std::time::{Duration, Instant};

use crate::failure::{Doing, Failure};
use crate::lease::{ANSWER_TIMEOUT, Lease};
use crate::names::TunnelName;
use crate::registry::{self, Scope, TunnelDirectory};

/// How long a tunnel may take to come up or to go away. This includes the time that killed programs take to end.
const PASSING: Duration = Duration::from_secs(10);

/// How long a killed keeper may be without a successor.
pub(crate) const SUCCESSION: Duration = Duration::from_secs(2);

/// The result of an approach.
#[derive(Debug)]
pub(crate) enum Approach {
    /// There is no living tunnel: the name is claimed. Remains of a killed tunnel may still exist.
    Claimed(TunnelDirectory),
    /// There is a living tunnel, with this lease on it.
    Joined(Lease),
}

/// Joins the living tunnel of a name, or claims the name. Waits while another process makes or removes the tunnel, and
/// until a launcher with a lease has taken over a user's tunnel: only launchers know the plan of that for certain.
///
/// # Errors
/// If the keeper cannot be reached or refuses, or if the registry cannot be used.
pub(crate) fn approach(name: &TunnelName) -> Result<Approach, Failure> {
    approach_unless(name, |directory| {
        let state = directory.state().ok().flatten().filter(|_| Scope::current() == Scope::User);
        state.is_some_and(|state| state.made.is_some() && state.holders.iter().any(|holder| holder.process.is_alive()))
    })
}

/// Like [`approach`], for a launcher that has lost its keeper.
///
/// # Errors
/// As [`approach`].
pub(super) fn approach_again(name: &TunnelName) -> Result<Approach, Failure> {
    approach_unless(name, |_| false)
}

fn approach_unless(name: &TunnelName, is_left: impl Fn(&TunnelDirectory) -> bool) -> Result<Approach, Failure> {
    let begin = Instant::now();
    loop {
        if let Some(lease) = join(name)? {
            return Ok(Approach::Joined(lease));
        }
        if let Some(directory) = TunnelDirectory::try_claim(name)?.filter(|directory| !is_left(directory)) {
            return Ok(Approach::Claimed(directory));
        }
        if begin.elapsed() > PASSING {
            return Err(unreachable(name));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Returns whether a keeper that cannot be reached is about to have a successor: a process holds its lock, or a living
/// launcher has not noticed its end yet.
///
/// # Errors
/// If the registry cannot be used.
pub(crate) fn is_passing(name: &TunnelName) -> Result<bool, Failure> {
    // Claiming would create the directory.
    if !registry::path_of(name).is_dir() {
        return Ok(false);
    }
    let held = registry::read(name).ok().flatten();
    if held.is_some_and(|state| state.holders.iter().any(|holder| holder.process.is_alive())) {
        return Ok(true);
    }
    let Some(directory) = TunnelDirectory::try_claim(name)? else { return Ok(true) };
    if matches!(directory.state(), Ok(None)) {
        // The tunnel has ended since, and the claim has created its directory again.
        let _ = directory.release();
    }
    Ok(false)
}

/// Joins the living tunnel of a name. Waits for the successor of a killed keeper. None if there is no such tunnel.
///
/// # Errors
/// As [`approach`].
pub(crate) fn join_soon(name: &TunnelName) -> Result<Option<Lease>, Failure> {
    let begin = Instant::now();
    loop {
        let joined = join(name)?;
        if joined.is_some() || begin.elapsed() > SUCCESSION || !is_passing(name)? {
            return Ok(joined);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Joins the living tunnel of a name. None if no keeper can be reached now.
///
/// # Errors
/// If the keeper refuses.
pub(crate) fn join(name: &TunnelName) -> Result<Option<Lease>, Failure> {
    let scope = Scope::current();
    scope.check().doing("look for the tunnel").map_err(|failure| failure.advise(scope.advice()))?;
    Lease::connect(name, ANSWER_TIMEOUT)
        .and_then(|connection| connection.map_or(Ok(None), Lease::join))
        .doing(format!("join the tunnel {name}"))
}

/// Claims a name whose keeper is dead. None if there is no tunnel of that name, or a living one.
///
/// The kernel closes the descriptors of a killed process one after the other, and the TUN may take 20 ms: its socket is
/// closed that long before its lock. This function waits for the lock.
///
/// # Errors
/// If the registry cannot be used, or if another process keeps the lock without answering.
pub(crate) fn claim_dead(name: &TunnelName) -> Result<Option<TunnelDirectory>, Failure> {
    let begin = Instant::now();
    // Claiming would create the directory.
    while registry::path_of(name).is_dir() {
        if let Some(directory) = TunnelDirectory::try_claim(name)? {
            return Ok(Some(directory));
        }
        if !matches!(Lease::connect(name, ANSWER_TIMEOUT), Ok(None)) {
            return Ok(None);
        }
        if begin.elapsed() > PASSING {
            return Err(unreachable(name));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(None)
}

fn unreachable(name: &TunnelName) -> Failure {
    let keeper = registry::read(name).ok().flatten().map(|state| format!(" by process {}", state.keeper));
    Failure::new(format!("the tunnel {name} is taken{}, but its keeper cannot be reached", keeper.unwrap_or_default()))
        .advise("wait a moment; if it stays so, end that process")
}
