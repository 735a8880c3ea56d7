//! Waiting for descriptors (poll(2)).

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::SigSet;
use nix::sys::time::TimeSpec;
use rustix::event::{PollFd, PollFlags, Timespec};

/// Waits until a descriptor is readable or closed, and returns whether it is. Meanwhile no signal is blocked, so most
/// signals end the process.
///
/// # Errors
/// Fails as ppoll(2) does.
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

/// The events to wait for on a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// There is data to read, or the other end is closed.
    Readable,
    /// There is room for data to write, a connection was made, or the other end is closed.
    Writable,
    /// The other end is closed. Data to read does not count.
    Closed,
}

/// Waits until a descriptor is readable or closed, or the time is up. Returns for each descriptor whether it is ready.
///
/// # Errors
/// Fails as poll(2) does.
pub fn wait_for(descriptors: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    let descriptors: Vec<_> = descriptors.iter().map(|descriptor| (*descriptor, Interest::Readable)).collect();
    wait_for_each(&descriptors, timeout)
}

/// Waits as [`wait_for`] does, with an interest for each descriptor.
///
/// # Errors
/// Fails as poll(2) does.
pub fn wait_for_each(descriptors: &[(BorrowedFd<'_>, Interest)], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    let flags = |interest| match interest {
        Interest::Readable => PollFlags::IN,
        Interest::Writable => PollFlags::OUT,
        // The kernel always reports POLLHUP (poll(2)).
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
