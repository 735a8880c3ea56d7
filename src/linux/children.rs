//! The children of a process that stands in for an init process, such as PID 1 of a container: it inherits orphans that
//! it never started, and must wait for them lest they stay as zombies (pid_namespaces(7)).

use std::io;

use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus};

/// A child that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndedChild {
    /// Its process ID, which another process may have by now.
    pub pid: i32,
    /// The exit status, or 128 + N if signal N killed it, as shells report it.
    pub code: i32,
}

/// Waits for all children that have ended, and returns them. Call it on each SIGCHLD, and once at the start: one signal
/// may stand for several children.
///
/// # Errors
/// Fails as wait(2) does. Having no children is not an error.
pub fn reap() -> io::Result<Vec<EndedChild>> {
    let mut ended = Vec::new();
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => ended.extend(code(status).map(|code| EndedChild { pid: number(pid), code })),
            Ok(None) | Err(Errno::CHILD) => return Ok(ended),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn number(pid: Pid) -> i32 {
    pid.as_raw_nonzero().get()
}

/// Returns how a child ended, or none if it was only stopped by a tracer.
fn code(status: WaitStatus) -> Option<i32> {
    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal))
}
