//! Watches over a running program: passes signals on to it, stops and goes on with it, waits for its end and for that of what it
//! leaves behind.

use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::{Ended, Program, ProgramError};
use crate::linux::process;
use crate::linux::signals::{Received, Signals};
use crate::tunnel::keeper::{Event, Lease, wait_for};

/// The signals that are passed on, and SIGCHLD.
pub const WATCHED: [Signal; 10] = [
    Signal::SIGCHLD,
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
    Signal::SIGTSTP,
    Signal::SIGCONT,
];

/// The state of the supervision.
struct Supervision<'a> {
    program: &'a Program,
    pid: Pid,
    lease: &'a Lease,
    ended: Option<Ended>,
    tunnel_ended: Option<String>,
}

/// Waits for the end of the program and of its orphans.
pub(super) fn supervise(
    program: &Program,
    pid: Pid,
    lease: &Lease,
    mut signals: Signals,
) -> Result<Ended, ProgramError> {
    let mut supervision = Supervision { program, pid, lease, ended: None, tunnel_ended: None };
    supervision.watch(&mut signals).map_err(|error| ProgramError::System { what: "watch the program", error })?;
    match (supervision.tunnel_ended, supervision.ended) {
        (Some(reason), _) => Err(ProgramError::TunnelEnded(reason)),
        (None, Some(ended)) => Ok(ended),
        (None, None) => {
            let error = io::Error::from_raw_os_error(libc::ECHILD);
            Err(ProgramError::System { what: "wait for the program", error })
        }
    }
}

impl Supervision<'_> {
    fn watch(&mut self, signals: &mut Signals) -> io::Result<()> {
        // The program may have ended before anybody looked.
        while self.reap()? {
            let watching_tunnel = self.tunnel_ended.is_none();
            let ready = if watching_tunnel {
                wait_for(&[signals.as_fd(), self.lease.as_fd()], None)?
            } else {
                wait_for(&[signals.as_fd()], None)?
            };
            while let Some(received) = signals.receive()? {
                self.pass_on(received)?;
            }
            if watching_tunnel && ready[1] {
                self.hear_from_keeper()?;
            }
        }
        Ok(())
    }

    /// Waits for children that have ended or stopped. Returns whether there is still somebody to wait for.
    fn reap(&mut self) -> io::Result<bool> {
        let changes = WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED;
        loop {
            match waitpid(None, Some(changes)) {
                Ok(WaitStatus::Exited(pid, status)) => self.note_end(pid, Ended::Exited(status)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => self.note_end(pid, Ended::Signaled(signal)),
                Ok(WaitStatus::Stopped(pid, signal)) if pid == self.pid => self.stop_with_program(signal)?,
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => break,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if self.ended.is_none() {
            return Ok(true);
        }
        let orphans = self.orphans()?;
        if self.program.kill_orphans || self.tunnel_ended.is_some() {
            for orphan in &orphans {
                process::kill(*orphan, Signal::SIGKILL)?;
            }
        }
        Ok(!orphans.is_empty())
    }

    fn note_end(&mut self, pid: Pid, ended: Ended) {
        if pid == self.pid {
            self.ended = Some(ended);
        }
    }

    /// What the program has left behind: our children, the keeper excepted.
    fn orphans(&self) -> io::Result<Vec<i32>> {
        let keeper = self.lease.keeper().as_raw();
        Ok(process::children()?.into_iter().filter(|pid| *pid != keeper && *pid != self.pid.as_raw()).collect())
    }

    fn pass_on(&mut self, received: Received) -> io::Result<()> {
        // A terminal's signal goes to all processes of the foreground group, the program among them: it has it already.
        if received.signal == Signal::SIGCHLD || received.from_kernel {
            return Ok(());
        }
        if self.ended.is_none() {
            return process::kill(self.pid.as_raw(), received.signal);
        }
        for orphan in self.orphans()? {
            process::kill(orphan, received.signal)?;
        }
        Ok(())
    }

    /// Stops as the program has, so that the shell sees its job stop. SIGCONT lets both go on.
    fn stop_with_program(&self, signal: Signal) -> io::Result<()> {
        if matches!(signal, Signal::SIGTSTP | Signal::SIGTTIN | Signal::SIGTTOU) {
            nix::sys::signal::raise(Signal::SIGSTOP)?;
            // The shell's SIGCONT goes to the whole group. One that was sent to this process alone is passed on as others are.
        }
        Ok(())
    }

    fn hear_from_keeper(&mut self) -> io::Result<()> {
        let reason = match self.lease.next_event(None)? {
            Some(Event::Named | Event::Made | Event::Connected) => return Ok(()),
            Some(Event::Failed { reason, .. }) => reason,
            Some(Event::Gone) => "its device has failed".into(),
            None => "its keeper was killed".into(),
        };
        self.tunnel_ended = Some(reason);
        if self.ended.is_none() {
            process::kill(self.pid.as_raw(), Signal::SIGKILL)?;
        }
        Ok(())
    }
}
