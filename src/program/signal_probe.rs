//! The signal probe: a process in the service's control group that reports the service manager's signals to the
//! launcher.
//!
//! `systemctl stop` signals all processes of a service, or the main process alone, as the unit's `KillMode=` says; a
//! process cannot see which. If the probe has received a signal, too, then so has the program, and the launcher does
//! not forward it.
//!
//! The probe has no capabilities and no files, and ends with the launcher.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::helpers;
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::poll::wait_for;
use crate::linux::process::{self, Forked};
use crate::linux::signals::{ReceivedSignal, Signals};

/// The maximum time for the probe to report a signal that the launcher has received. The manager signals the main
/// process first, and then the others without a pause.
const REPORT_TIMEOUT: Duration = Duration::from_millis(100);

/// The time after which a report is obsolete. It may have no counterpart, since the kernel merges pending signals.
const REPORT_LIFETIME: Duration = Duration::from_secs(1);

/// The launcher's end of the signal probe, which is killed when this is dropped.
#[derive(Debug)]
pub(super) struct SignalProbe {
    pid: Pid,
    /// The pipe on which the probe reports the numbers of signals, one byte each.
    reports: OwnedFd,
    /// The PID of the service manager.
    manager: i32,
    /// When the probe last reported each signal that the launcher has not received yet.
    reported: HashMap<i32, Instant>,
}

/// Returns whether the calling process is the main process of a service.
pub(super) fn is_main_process_of_service() -> bool {
    // Before version 248, systemd does not name the main process, which then is its child.
    match std::env::var("SYSTEMD_EXEC_PID") {
        Ok(pid) => pid.parse() == Ok(std::process::id()),
        Err(_) => std::env::var_os("INVOCATION_ID").is_some() && nix::unistd::getppid().as_raw() == 1,
    }
}

impl SignalProbe {
    /// Starts the probe if the calling process is the main process of a service. It watches for `signals`.
    ///
    /// # Errors
    /// Returns an error if the probe's process cannot be created.
    pub(super) fn start(signals: &mut Signals) -> io::Result<Option<Self>> {
        if !is_main_process_of_service() {
            return Ok(None);
        }
        let own = std::process::id();
        let manager = nix::unistd::getppid().as_raw();
        let flags = rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK;
        let (reports, writer) = rustix::pipe::pipe_with(flags)?;
        match process::fork()? {
            Forked::Child => {
                // On an error the probe just ends: without it, the launcher forwards every signal.
                let _ = report_signals(own, manager, signals, &writer);
                process::exit_now(0)
            }
            Forked::Parent(pid) => Ok(Some(Self { pid, reports, manager, reported: HashMap::new() })),
        }
    }

    /// Returns whether a signal that the launcher has received was for the whole control group.
    ///
    /// # Errors
    /// Returns the error of the system call that failed.
    pub(super) fn has_received(&mut self, signal: ReceivedSignal) -> io::Result<bool> {
        if signal.from_kernel || signal.sender != self.manager {
            return Ok(false);
        }
        let begin = Instant::now();
        loop {
            let mut numbers = [0; 64];
            match rustix::io::read(&self.reports, &mut numbers) {
                // The probe was killed.
                Ok(0) => return Ok(false),
                Ok(length) => {
                    let now = Instant::now();
                    self.reported.extend(numbers[..length].iter().map(|number| (i32::from(*number), now)));
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if self.reported.remove(&signal.number).is_some_and(|at| at.elapsed() < REPORT_LIFETIME) {
                return Ok(true);
            }
            let left = REPORT_TIMEOUT.saturating_sub(begin.elapsed());
            if left.is_zero() {
                return Ok(false);
            }
            wait_for(&[self.reports.as_fd()], Some(left))?;
        }
    }
}

impl Drop for SignalProbe {
    fn drop(&mut self) {
        // If it has ended, the launcher has waited for it already, and the PID may belong to another process.
        if waitpid(self.pid, Some(WaitPidFlag::WNOHANG)) == Ok(WaitStatus::StillAlive) {
            let _ = process::kill(self.pid.as_raw(), Signal::SIGKILL);
            let _ = waitpid(self.pid, None);
        }
    }
}

/// Runs the probe in the calling process: reports the manager's signals until the process is killed.
fn report_signals(launcher: u32, manager: i32, signals: &mut Signals, writer: &OwnedFd) -> io::Result<()> {
    helpers::end_with_parent(launcher)?;
    capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty())?;
    capabilities::set_no_new_privileges()?;
    process::redirect_to_null(&[0, 1, 2])?;
    // Closes the lease, which must end with the launcher. The values that own these descriptors are never dropped here.
    process::close_all_except(&mut [signals.as_fd().as_raw_fd(), writer.as_raw_fd()])?;
    loop {
        wait_for(&[signals.as_fd()], None)?;
        while let Some(signal) = signals.receive()? {
            if signal.sender == manager && !signal.from_kernel {
                let number = u8::try_from(signal.number).unwrap_or_default();
                // The pipe is full only if the launcher does not read.
                let _ = rustix::io::write(writer, &[number]);
            }
        }
    }
}
