//! How a tunnel's name is approached: whoever comes first has it, all others join.

use std::io;
use std::time::{Duration, Instant};

use crate::failure::Failure;
use crate::lease::{ANSWER, Lease};
use crate::names::TunnelName;
use crate::registry::{self, ClaimError, Directory};

/// How long a tunnel may take that comes or goes. Programs that are killed have their time in it.
const PASSING: Duration = Duration::from_secs(10);

/// How long a killed keeper may be without a successor.
pub(crate) const SUCCESSION: Duration = Duration::from_secs(2);

/// What there is behind a name.
#[derive(Debug)]
pub(crate) enum Approach {
    /// No living tunnel: the name is claimed. What a killed one has left may still be there.
    Claimed(Directory),
    /// A living tunnel, and a lease on it.
    Joined(Lease),
}

/// Joins the living tunnel of a name, or claims the name. Waits for a tunnel that comes or goes at the same time.
pub(crate) fn approach(name: &TunnelName) -> Result<Approach, Failure> {
    let begin = Instant::now();
    loop {
        if let Some(lease) = join(name)? {
            return Ok(Approach::Joined(lease));
        }
        if let Some(directory) = try_claim(name)? {
            return Ok(Approach::Claimed(directory));
        }
        if begin.elapsed() > PASSING {
            return Err(unreachable(name));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether the keeper of a tunnel that cannot be reached now is about to have a successor: somebody has its lock, or a launcher inside
/// has yet to notice.
pub(crate) fn is_passing(name: &TunnelName) -> Result<bool, Failure> {
    // What is not there needs not be made to be looked at.
    if !registry::path_of(name).is_dir() {
        return Ok(false);
    }
    let held = registry::read(name).ok().flatten();
    if held.is_some_and(|state| state.holders.iter().any(|holder| holder.process.is_alive())) {
        return Ok(true);
    }
    let Some(directory) = try_claim(name)? else { return Ok(true) };
    if matches!(directory.state(), Ok(None)) {
        // It has ended since, and claiming it has made its directory again.
        let _ = directory.release();
    }
    Ok(false)
}

/// Joins the living tunnel of a name, or the one that a successor of its killed keeper has in an instant.
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

/// Joins the living tunnel of a name, if there is one that can be reached now.
pub(crate) fn join(name: &TunnelName) -> Result<Option<Lease>, Failure> {
    Lease::connect(name, ANSWER)
        .and_then(|connection| connection.map_or(Ok(None), Lease::join))
        .map_err(|error| Failure::new(format!("cannot join the tunnel {name}: {error}")))
}

/// Claims a name whose tunnel's keeper is dead. None if there is no tunnel of that name, or a living one.
///
/// A process that is killed closes its descriptors one after the other, and the TUN may take the kernel 20 ms: its socket is dead for
/// that long before its lock is free, which is waited for.
pub(crate) fn claim_dead(name: &TunnelName) -> Result<Option<Directory>, Failure> {
    let begin = Instant::now();
    // What is not there needs not be made to be claimed.
    while registry::path_of(name).is_dir() {
        if let Some(directory) = try_claim(name)? {
            return Ok(Some(directory));
        }
        if !matches!(Lease::connect(name, ANSWER), Ok(None)) {
            return Ok(None);
        }
        if begin.elapsed() > PASSING {
            return Err(unreachable(name));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(None)
}

/// Claims a name; none if another process holds it.
fn try_claim(name: &TunnelName) -> Result<Option<Directory>, Failure> {
    Directory::try_claim(name).map_err(|error| {
        let failure = Failure::new(&error);
        match error {
            ClaimError { error, .. } if error.kind() == io::ErrorKind::NotADirectory => {
                failure.advise("move away the file that stands where a directory is needed")
            }
            _ => failure.advise("/run must exist and be writable for root"),
        }
    })
}

fn unreachable(name: &TunnelName) -> Failure {
    let keeper = registry::read(name).ok().flatten().map(|state| format!(" by process {}", state.keeper));
    Failure::new(format!("the tunnel {name} is taken{}, but its keeper cannot be reached", keeper.unwrap_or_default()))
        .advise("wait a moment; if it stays so, end that process")
}
