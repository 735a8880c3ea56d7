//! Waiting for descriptors (poll(2)).

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::SigSet;
use nix::sys::time::TimeSpec;
use rustix::event::{PollFd, PollFlags, Timespec};

/// Waits until a descriptor is readable or closed, and says whether it is. Signals that the calling thread blocks come through meanwhile,
/// with what they do by default: ending the process, most of them.
///
/// # Errors
/// What ppoll(2) says.
pub fn wait_with_signals_unblocked(descriptor: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let deadline = Instant::now().checked_add(timeout);
    loop {
        let left = deadline.map(|at| TimeSpec::from_duration(at.saturating_duration_since(Instant::now())));
        let mut entries = [nix::poll::PollFd::new(descriptor, nix::poll::PollFlags::POLLIN)];
        match nix::poll::ppoll(&mut entries, left, Some(SigSet::empty())) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// That there is something to read, or that the other end is closed.
    Readable,
    /// That the other end is closed, whatever there is to read.
    Closed,
}

/// Waits until one of the descriptors is readable or closed, or the time is up, and says which are.
pub fn wait_for(descriptors: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    let descriptors: Vec<_> = descriptors.iter().map(|descriptor| (*descriptor, Interest::Readable)).collect();
    wait_for_each(&descriptors, timeout)
}

/// [`wait_for`], with what is waited for of each descriptor.
pub fn wait_for_each(descriptors: &[(BorrowedFd<'_>, Interest)], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    let flags = |interest| match interest {
        Interest::Readable => PollFlags::IN,
        // An end is told unasked (poll(2), POLLHUP).
        Interest::Closed => PollFlags::empty(),
    };
    let mut entries: Vec<PollFd<'_>> =
        descriptors.iter().map(|(fd, interest)| PollFd::from_borrowed_fd(*fd, flags(*interest))).collect();
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match rustix::event::poll(&mut entries, left.as_ref()) {
            Ok(_) => return Ok(entries.iter().map(|entry| !entry.revents().is_empty()).collect()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
