//! Ways to refer to another process that survive the reuse of its process ID, and signals to it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::signal::Signal;
use rustix::process::{PidfdFlags, WaitId, WaitIdOptions, waitid};
use serde::{Deserialize, Serialize};

use super::inspection::stat_fields;
use crate::linux::poll::wait_for;

/// The identity of a process since boot. Another process may get its process ID later, but not its start time as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// The process ID.
    pub pid: i32,
    /// The start time in clock ticks since boot (proc_pid_stat(5)).
    started: u64,
}

impl ProcessId {
    /// Returns the identity of the process that has a process ID now.
    ///
    /// # Errors
    /// Fails with `ENOENT` or `ESRCH` if there is no such process.
    pub fn of(pid: i32) -> io::Result<Self> {
        /// The start time in [`stat_fields`].
        const START_TIME: usize = 19;

        let started = stat_fields(pid)?.get(START_TIME).and_then(|started| started.parse().ok());
        started.map(|started| Self { pid, started }).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Returns whether the process is alive, and not about to end.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).is_ok_and(|now| now == *self) && !is_ending(self.pid)
    }
}

/// Returns whether a process has ended or is about to: it is gone, a zombie, exiting, or has a SIGKILL pending. It
/// releases its resources at once, if it has not already. When in doubt, the answer is no.
pub fn is_ending(pid: i32) -> bool {
    /// The flags of a process in [`stat_fields`].
    const FLAGS: usize = 6;
    /// `PF_EXITING` of the kernel's include/linux/sched.h, one of these flags.
    const EXITING: u32 = 0x4;
    /// SIGKILL in the signal masks of `/proc/PID/status`, whose lowest bit is signal 1.
    const KILLED: u64 = 1 << (libc::SIGKILL - 1);

    let stat = match stat_fields(pid) {
        Ok(stat) => stat,
        Err(error) => return matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)),
    };
    let exiting = stat.get(FLAGS).and_then(|flags| flags.parse::<u32>().ok()).is_some_and(|flags| flags & EXITING != 0);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mut pending = status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
    exiting || pending.any(|mask| u64::from_str_radix(mask.trim(), 16).is_ok_and(|mask| mask & KILLED != 0))
}

/// A handle to a process (pidfd_open(2)). Signals never reach another process that gets the same process ID later.
#[derive(Debug)]
pub struct ProcessHandle {
    pid: i32,
    descriptor: OwnedFd,
}

impl ProcessHandle {
    /// Opens a handle to the process that has a process ID now.
    ///
    /// The caller must find out afterwards which process this is. The finding holds if [`Self::has_ended`] returns
    /// false after it.
    ///
    /// # Errors
    /// Fails with `ESRCH` if there is no such process, and with `ENOSYS` on a kernel before 5.3.
    pub fn of(pid: i32) -> io::Result<Self> {
        let number = rustix::process::Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
        let descriptor = rustix::process::pidfd_open(number, PidfdFlags::empty())?;
        Ok(Self { pid, descriptor })
    }

    /// Returns the process ID. No other process gets it until this one has ended and was waited for.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Returns whether the process has ended.
    ///
    /// # Errors
    /// Fails as poll(2) does.
    pub fn has_ended(&self) -> io::Result<bool> {
        Ok(wait_for(&[self.as_fd()], Some(Duration::ZERO))? == [true])
    }

    /// Returns whether the process is a child of the calling process that was not waited for yet.
    pub fn is_child(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        waitid(WaitId::PidFd(self.as_fd()), options).is_ok()
    }

    /// Sends a signal, given by its number, unless the process is gone already.
    ///
    /// # Errors
    /// Fails with `EPERM` for a process of another user.
    pub fn kill(&self, number: i32) -> io::Result<()> {
        let (descriptor, nothing) = (self.descriptor.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
        // SAFETY: without information about the signal the kernel reads nothing of this process's memory.
        unless_gone(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, descriptor, number, nothing, 0) } == 0)
    }
}

impl AsFd for ProcessHandle {
    /// Readable when the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Sends a signal to a process, unless it is gone already.
///
/// # Errors
/// Fails with `EPERM` for a process of another user.
pub fn kill(pid: i32, signal: Signal) -> io::Result<()> {
    kill_by_number(pid, signal as i32)
}

/// Sends a signal, given by its number, to a process, unless it is gone already. Real-time signals have no names.
///
/// # Errors
/// Fails with `EPERM` for a process of another user.
pub fn kill_by_number(pid: i32, number: i32) -> io::Result<()> {
    // SAFETY: kill(2) takes plain numbers.
    unless_gone(unsafe { libc::kill(pid, number) } == 0)
}

fn unless_gone(sent: bool) -> io::Result<()> {
    match io::Error::last_os_error() {
        _ if sent => Ok(()),
        error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        error => Err(error),
    }
}
