//! Tells whether a signal of the service manager was for the whole control group: then the program has had it already, and shall not
//! have it twice. `systemctl stop` signals all processes of a service, or the main one alone, as the unit's `KillMode=` says; and a
//! process cannot see which it was.
//!
//! The signal_probe is a process that is in the group, and does nothing but to say which of the manager's signals it has had. It has no
//! capabilities and no files, and ends with vpn-exec.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::poll::wait_for;
use crate::linux::process::{self, Forked};
use crate::linux::signals::{ReceivedSignal, Signals};

/// How long the signal_probe may take to have a signal that vpn-exec has had. The manager signals the main process first, and then the others,
/// in one go.
const PATIENCE: Duration = Duration::from_millis(100);

/// How long what it has seen may be of use: two signals at once may be one to vpn-exec.
const FRESH: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct SignalProbe {
    pid: Pid,
    /// What it writes the numbers of signals to.
    testimony: OwnedFd,
    /// Who the manager is.
    manager: i32,
    /// When each signal was seen last of which vpn-exec has not heard yet.
    seen: HashMap<i32, Instant>,
}

impl SignalProbe {
    /// Starts one, if this process is the main one of a service. `signals` are those that it watches for.
    pub(super) fn start(signals: &mut Signals) -> io::Result<Option<Self>> {
        let own = std::process::id();
        // Before version 248, systemd does not say who is meant. It is its child, then.
        let is_main = match std::env::var("SYSTEMD_EXEC_PID") {
            Ok(pid) => pid.parse() == Ok(own),
            Err(_) => std::env::var_os("INVOCATION_ID").is_some() && nix::unistd::getppid().as_raw() == 1,
        };
        if !is_main {
            return Ok(None);
        }
        let manager = nix::unistd::getppid().as_raw();
        let flags = rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK;
        let (testimony, writer) = rustix::pipe::pipe_with(flags)?;
        match process::fork()? {
            Forked::Child => {
                // Nobody is left to whom an error could be told: without a signal_probe, each signal is passed on.
                let _ = be_witness(own, manager, signals, &writer);
                process::exit_now(0)
            }
            Forked::Parent(pid) => Ok(Some(Self { pid, testimony, manager, seen: HashMap::new() })),
        }
    }

    /// Whether a signal that vpn-exec has received was for the whole group.
    pub(super) fn has_seen(&mut self, received: ReceivedSignal) -> io::Result<bool> {
        if received.from_kernel || received.sender != self.manager {
            return Ok(false);
        }
        let begin = Instant::now();
        loop {
            let mut numbers = [0; 64];
            match rustix::io::read(&self.testimony, &mut numbers) {
                // It was killed.
                Ok(0) => return Ok(false),
                Ok(length) => {
                    self.seen.extend(numbers[..length].iter().map(|number| (i32::from(*number), Instant::now())))
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if self.seen.remove(&received.number).is_some_and(|at| at.elapsed() < FRESH) {
                return Ok(true);
            }
            let left = PATIENCE.saturating_sub(begin.elapsed());
            if left.is_zero() {
                return Ok(false);
            }
            wait_for(&[self.testimony.as_fd()], Some(left))?;
        }
    }
}

impl Drop for SignalProbe {
    fn drop(&mut self) {
        // One that has ended was reaped with others, and its number may be another's by now.
        if waitpid(self.pid, Some(WaitPidFlag::WNOHANG)) == Ok(WaitStatus::StillAlive) {
            let _ = process::kill(self.pid.as_raw(), Signal::SIGKILL);
            let _ = waitpid(self.pid, None);
        }
    }
}

/// The life of the signal_probe.
fn be_witness(launcher: u32, manager: i32, signals: &mut Signals, writer: &OwnedFd) -> io::Result<()> {
    process::set_death_signal(Signal::SIGKILL)?;
    if nix::unistd::getppid().as_raw().cast_unsigned() != launcher {
        return Ok(());
    }
    capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty())?;
    capabilities::set_no_new_privileges()?;
    process::redirect_to_null(&[0, 1, 2])?;
    // The lease is among the others, which must end with vpn-exec. What owns them is the parent's: this process never returns to it.
    process::close_all_except(&mut [signals.as_fd().as_raw_fd(), writer.as_raw_fd()])?;
    loop {
        wait_for(&[signals.as_fd()], None)?;
        while let Some(received) = signals.receive()? {
            if received.sender == manager && !received.from_kernel {
                let number = u8::try_from(received.number).unwrap_or_default();
                // Where there is no room, nobody listens.
                let _ = rustix::io::write(writer, &[number]);
            }
        }
    }
}
