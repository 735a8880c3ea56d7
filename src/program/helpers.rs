//! Helper processes: processes of vpn-exec that run beside the program, such as the one that keeps its view up to date.
//!
//! When the program has ended, the launcher waits for its remaining children, but helpers wait for the launcher. So it
//! must know them. A helper that another process has started announces its PID itself, before anything else: the
//! process that has started it may be killed at any moment.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::linux::local_socket;
use crate::linux::poll::wait_for;
use crate::linux::process;

/// The system calls that every helper needs: reading, writing, waiting, memory, time and exiting.
pub(super) const BASE_CALLS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_ppoll,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_futex,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// Detaches the calling process from the terminal, the working directory, and all descriptors except `kept`.
///
/// # Errors
/// Returns the error of the system call that failed.
pub(super) fn detach(kept: &mut [i32]) -> io::Result<()> {
    rustix::process::setsid()?;
    std::env::set_current_dir("/")?;
    process::redirect_to_null(&[0, 1, 2])?;
    process::close_all_except(kept)
}

/// Has the kernel kill the calling process when its parent ends. A change of the user undoes this
/// (PR_SET_PDEATHSIG(2const)).
///
/// # Errors
/// Returns an error if `parent` has ended already.
pub(super) fn end_with_parent(parent: u32) -> io::Result<()> {
    process::set_death_signal(Signal::SIGKILL)?;
    match nix::unistd::getppid().as_raw().cast_unsigned() == parent {
        true => Ok(()),
        false => Err(io::Error::other("the parent process has ended already")),
    }
}

/// The launcher's end of the socket at which helpers announce their PIDs. The helpers end when it is dropped.
#[derive(Debug)]
pub(super) struct Helpers {
    /// None once all helpers have ended.
    socket: Option<OwnedFd>,
}

impl Helpers {
    /// Creates the socket. Returns the launcher's end and that of the helpers.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (socket, theirs) = local_socket::pair()?;
        Ok((Self { socket: Some(socket) }, theirs))
    }

    /// Returns a descriptor that is readable when a helper has announced its PID, or `None` if there are no helpers.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Adds the PIDs that helpers have announced since the last call.
    pub(super) fn receive(&mut self, pids: &mut BTreeSet<i32>) -> io::Result<()> {
        while let Some(socket) = &self.socket {
            if wait_for(&[socket.as_fd()], Some(Duration::ZERO))? != [true] {
                break;
            }
            let mut pid = [0; size_of::<i32>()];
            match local_socket::receive(socket, &mut pid)? {
                Some(_) => drop(pids.insert(i32::from_ne_bytes(pid))),
                None => self.socket = None,
            }
        }
        Ok(())
    }
}

/// Announces the calling process's PID to the launcher. Must be a helper's first act.
pub(super) fn announce(launcher: &OwnedFd) -> io::Result<()> {
    local_socket::send(launcher, &std::process::id().to_ne_bytes(), None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn helpers_are_known_once_they_have_announced_themselves() {
        let (mut helpers, theirs) = Helpers::pair().expect("a socket");
        let mut pids = BTreeSet::from([7]);
        helpers.receive(&mut pids).expect("a socket");
        assert_eq!(pids, [7].into(), "no helper has announced itself");
        announce(&theirs).expect("room");
        helpers.receive(&mut pids).expect("a socket");
        assert_eq!(pids, [7, std::process::id().cast_signed()].into());
        assert!(helpers.descriptor().is_some());
        drop(theirs);
        helpers.receive(&mut pids).expect("a socket");
        assert!(helpers.descriptor().is_none(), "a closed socket would always be readable");
    }
}
