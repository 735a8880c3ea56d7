//! Supervises a running program: forwards signals to it, stops and continues with it, and waits for its end and for
//! that of the processes that it left behind.

mod forwarding;
mod notices;

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rustix::io::Errno;
use rustix::process::{WaitOptions, WaitStatus};

use super::guards::RefusalReport;
use super::launch::Companions;
use super::{Program, ProgramOutcome, privileges, shared_view};
use crate::failure::{Doing, Failure};
use crate::lease::{KeeperEvent, Lease};
use crate::linux::poll::wait_for;
use crate::linux::process::{self, ProcessHandle};
use crate::linux::signals::Signals;
use crate::names::TunnelName;
use crate::session::recovery;
pub use forwarding::forwarded_signals;
use notices::Notices;

/// The state of the supervision.
struct Supervision<'a> {
    program: &'a Program,
    /// The main process: the program's own, or the one that it has declared in its place (sd_notify(3), `MAINPID=`).
    main_pid: Pid,
    /// A handle of a declared main process.
    declared_main: Option<ProcessHandle>,
    /// How a program ended that has declared another main process.
    former_outcome: Option<ProgramOutcome>,
    /// How the main process ended.
    outcome: Option<ProgramOutcome>,
    tunnel: &'a TunnelName,
    lease: &'a mut Lease,
    /// Why the tunnel has ended under the program.
    tunnel_end: Option<Failure>,
    companions: &'a mut Companions,
    notices: Notices,
    /// The process that a guard has killed as it would have taken the place of a running instance, and the reason.
    killed_instance: Option<(i32, String)>,
}

/// Waits until the program and the processes that it left behind have ended.
///
/// # Errors
/// Returns an error if the program was killed because of the tunnel, or by a guard; system errors.
pub(super) fn supervise(
    program: &Program,
    pid: Pid,
    companions: &mut Companions,
    tunnel: &TunnelName,
    lease: &mut Lease,
    mut signals: Signals,
) -> Result<ProgramOutcome, Failure> {
    let mut supervision = Supervision {
        program,
        main_pid: pid,
        declared_main: None,
        former_outcome: None,
        outcome: None,
        tunnel,
        lease,
        tunnel_end: None,
        companions,
        notices: Notices::new(program.awaits_handshake),
        killed_instance: None,
    };
    supervision.drop_unused_view();
    supervision.watch(&mut signals).doing("watch the program")?;
    let was_killed = supervision.outcome == Some(ProgramOutcome::Signaled(Signal::SIGKILL as i32));
    if was_killed {
        supervision.drain_keeper_events().doing("read from the connection to the keeper")?;
    }
    supervision.receive_from_guards();
    if let Some((pid, message)) = supervision.killed_instance
        && was_killed
        && supervision.main_pid.as_raw() == pid
    {
        return Err(Failure::new(message));
    }
    if let Some(reason) = supervision.tunnel_end {
        let message = format!("the program was killed, since its tunnel has ended: {reason}");
        return Err(Failure { message, ..reason });
    }
    let no_child = || io::Error::from_raw_os_error(libc::ECHILD);
    supervision.outcome.ok_or_else(no_child).doing("wait for the program")
}

impl Supervision<'_> {
    fn watch(&mut self, signals: &mut Signals) -> io::Result<()> {
        // The program may have ended already.
        while self.reap()? {
            let is_tunnel_up = self.tunnel_end.is_none();
            let mut watched = vec![signals.as_fd()];
            watched.extend(is_tunnel_up.then(|| self.lease.as_fd()));
            watched.extend(self.companions.notify_relay.as_ref().map(AsFd::as_fd));
            watched.extend(self.declared_main.as_ref().map(AsFd::as_fd));
            watched.extend(self.companions.helpers.descriptor());
            watched.extend(self.companions.guards.descriptors());
            watched.extend(self.companions.view_server.as_ref().map(AsFd::as_fd));
            if self.outcome.is_some() {
                self.notices.program_ended();
            }
            let ready = wait_for(&watched, self.notices.next())?;
            // Before the end of its sender is noticed, to which a last message belongs.
            self.relay_notifications()?;
            self.receive_from_guards();
            self.note_end_of_view_server();
            // Before signals: one that came after the program's end is for the processes that it left behind.
            self.reap()?;
            while let Some(signal) = signals.receive()? {
                self.forward(signal)?;
            }
            if is_tunnel_up && ready[1] {
                self.receive_keeper_event()?;
            }
            self.notices.warn_of_missing_handshake(self.tunnel);
            if self.notices.take_orphans_due() {
                notices::warn_of_orphans(&self.orphans()?);
            }
        }
        self.relay_notifications()
    }

    /// Relays the service's messages to its manager, and follows a newly declared main process.
    fn relay_notifications(&mut self) -> io::Result<()> {
        let Some(relay) = &self.companions.notify_relay else { return Ok(()) };
        let Some(declared) = relay.relay(self.main_pid.as_raw())? else { return Ok(()) };
        if declared == self.main_pid.as_raw() || self.outcome.is_some() || self.companions.unrelated.contains(&declared)
        {
            return Ok(());
        }
        // The handle is opened before the check, after which the PID can no longer pass to an unrelated process
        // unnoticed.
        match ProcessHandle::of(declared) {
            Ok(handle) if is_descendant(declared) && !handle.has_ended()? => {
                tracing::debug!("the main process is {declared} now");
                self.former_outcome.get_or_insert(ProgramOutcome::Exited(0));
                self.main_pid = Pid::from_raw(declared);
                self.declared_main = Some(handle);
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "cannot follow the process {declared} as the main process"),
        }
        Ok(())
    }

    /// Shows the guards' messages, and passes their counts on to the keeper.
    fn receive_from_guards(&mut self) {
        for RefusalReport { message, killed, .. } in self.companions.guards.receive() {
            match (killed, message) {
                // The reason for the end of the program, if that is what the guard has killed.
                (Some(pid), Some(message)) if pid == self.main_pid.as_raw() => {
                    self.killed_instance = Some((pid, message));
                }
                (_, Some(message)) => tracing::warn!("{message}"),
                (_, None) => {}
            }
            self.lease.refused(self.companions.guards.refused());
        }
    }

    /// Returns whether a PID is the main process's. After its end, the PID may be that of another process.
    fn is_main(&self, pid: i32) -> bool {
        self.outcome.is_none() && pid == self.main_pid.as_raw()
    }

    /// Sends a signal to the main process.
    fn kill(&self, number: i32) -> io::Result<()> {
        match &self.declared_main {
            Some(main) => main.kill(number),
            // A child keeps its PID until the launcher has waited for it.
            None => process::kill_by_number(self.main_pid.as_raw(), number),
        }
    }

    /// Waits for children that have ended or stopped. Returns whether there are still processes to wait for.
    fn reap(&mut self) -> io::Result<bool> {
        // Only its own parent learns how a declared main process ended that is not a child.
        if let Some(main) = &self.declared_main
            && main.has_ended()?
            && !main.is_child()
        {
            tracing::debug!("the main process {} has ended", main.pid());
            self.outcome = self.outcome.or(self.former_outcome);
            self.declared_main = None;
        }
        self.companions.helpers.receive(&mut self.companions.unrelated)?;
        loop {
            match rustix::process::wait(WaitOptions::NOHANG | WaitOptions::UNTRACED) {
                Ok(Some((pid, status))) => self.note_status(pid.as_raw_pid(), status)?,
                Ok(None) | Err(Errno::CHILD) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // A helper whose parent was among these has become a child of the launcher meanwhile.
        self.companions.helpers.receive(&mut self.companions.unrelated)?;
        if self.outcome.is_none() {
            return Ok(true);
        }
        let orphans = self.orphans()?;
        if self.program.kill_orphans || self.tunnel_end.is_some() {
            for orphan in &orphans {
                process::kill(*orphan, Signal::SIGKILL)?;
            }
        }
        Ok(!orphans.is_empty())
    }

    /// Notes the status of a child. Signals are numbers here, since real-time signals have no names.
    fn note_status(&mut self, pid: i32, status: WaitStatus) -> io::Result<()> {
        if let (Some(terminal), Some(signal)) = (&self.program.terminal, status.stopping_signal())
            && terminal.grant(pid, signal)?
        {
            return Ok(());
        }
        if !self.is_main(pid) {
            if !status.stopped() {
                // Another process may get the PID now.
                self.companions.unrelated.remove(&pid);
                self.note_end_of_guard(pid, status);
            }
            return Ok(());
        }
        if let Some(signal) = status.stopping_signal() {
            return forwarding::stop_with_program(signal);
        }
        // Its last message may have declared another main process.
        self.relay_notifications()?;
        if !self.is_main(pid) {
            return Ok(());
        }
        let exited = status.exit_status().map(ProgramOutcome::Exited);
        self.outcome = exited.or(status.terminating_signal().map(ProgramOutcome::Signaled)).or(self.outcome);
        self.declared_main = None;
        if let Some(terminal) = &self.program.terminal {
            terminal.end();
        }
        Ok(())
    }

    /// Tells the user if a guard has ended, and what that means.
    fn note_end_of_guard(&mut self, pid: i32, status: WaitStatus) {
        // The guard's own reason may be among its last messages.
        self.receive_from_guards();
        if let Some(message) = self.companions.guards.describe_end(pid, status) {
            tracing::warn!("{message}");
        }
    }

    /// Closes the connection to the view server if the program has got a view of its own instead.
    fn drop_unused_view(&mut self) {
        self.companions.view_server.take_if(|server| shared_view::has_ended(server));
    }

    /// Tells the user if the view server has ended. It sends nothing more once the program runs.
    fn note_end_of_view_server(&mut self) {
        let Some(server) = &self.companions.view_server else { return };
        if shared_view::has_ended(server) {
            self.companions.view_server = None;
            if self.outcome.is_none() {
                tracing::warn!(
                    "the process that keeps the program's copies of /etc and /run up to date was killed: the program \
                     does not see later changes of the host's files"
                );
            }
        }
    }

    /// Returns the processes that the program left behind: the launcher's children, except for unrelated ones.
    fn orphans(&self) -> io::Result<Vec<i32>> {
        let is_orphan = |pid: &i32| !self.is_main(*pid) && !self.companions.unrelated.contains(pid);
        Ok(process::children()?.into_iter().filter(is_orphan).collect())
    }

    /// Processes the available events of the keeper. If the keeper has killed the program, it has sent the reason
    /// before.
    fn drain_keeper_events(&mut self) -> io::Result<()> {
        while self.tunnel_end.is_none() && wait_for(&[self.lease.as_fd()], Some(Duration::ZERO))? == [true] {
            self.receive_keeper_event()?;
        }
        Ok(())
    }

    fn receive_keeper_event(&mut self) -> io::Result<()> {
        let reason = match self.lease.next_event()? {
            Some(KeeperEvent::Failed(failure)) => failure,
            Some(KeeperEvent::Gone) => Failure::new("it was taken down"),
            Some(KeeperEvent::Connected) => {
                self.notices.handshake_completed(self.tunnel);
                return Ok(());
            }
            Some(_) => return Ok(()),
            None => match self.recover() {
                Ok(()) => return Ok(()),
                Err(failure) => failure,
            },
        };
        self.tunnel_end = Some(reason);
        if self.outcome.is_none() {
            self.kill(Signal::SIGKILL as i32)?;
        }
        Ok(())
    }

    /// Finds or starts a successor of a killed keeper. The program runs on meanwhile, and still has no way out but the
    /// tunnel.
    fn recover(&mut self) -> Result<(), Failure> {
        let before = process::children().doing("list the children of this process")?;
        let recovered = recovery::recover(self.tunnel, self.lease);
        privileges::limit_supervisor(self.program).doing("drop privileges")?;
        // A successor that was started here is not the program's child.
        let now = process::children().doing("list the children of this process")?;
        self.companions.unrelated.extend(now.difference(&before));
        *self.lease = recovered?;
        self.lease.started(self.main_pid.as_raw());
        Ok(())
    }
}

/// Returns whether a process descends from the calling one.
fn is_descendant(pid: i32) -> bool {
    let own = std::process::id().cast_signed();
    std::iter::successors(Some(pid), |pid| process::parent_of(*pid).filter(|parent| *parent > 1)).any(|pid| pid == own)
}
