//! The launcher's side of a program's start: prepares the program's process while the keeper makes the tunnel, lets it
//! enter the tunnel, and supervises the program.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rustix::pipe::{PipeFlags, pipe_with};

use super::child::Child;
use super::guards::Guards;
use super::helpers::Helpers;
use super::notify::NotifyRelay;
use super::shared_view::{SharedView, ViewQuery};
use super::signal_probe::{SignalProbe, is_main_process_of_service};
use super::{Program, ProgramOutcome, privileges, supervise};
use crate::failure::{Doing, FAILED, Failure};
use crate::lease::Lease;
use crate::linux::local_socket;
use crate::linux::namespace::NetworkNamespace;
use crate::linux::poll::wait_for;
use crate::linux::process::{self, Forked};
use crate::linux::signals::Signals;
use crate::names::TunnelName;

/// A launch in progress: a process with its own mount namespace that waits for the tunnel. It is killed when this is
/// dropped.
#[derive(Debug)]
pub struct Launch<'a> {
    program: &'a Program,
    process: PendingProcess,
    /// The socket from which the process reads a message before it enters the tunnel, with its namespace if that has no
    /// name, and another before it executes the program.
    stages: OwnedFd,
    has_entered: bool,
    /// The pipe on which the process reports that it cannot execute the program.
    failure: OwnedFd,
    companions: Companions,
}

/// The launcher's other processes and connections that belong to a program.
#[derive(Debug)]
pub(super) struct Companions {
    /// The launcher's children that are not the program's: the keeper, and those of before execve(2) of vpn-exec.
    pub(super) unrelated: BTreeSet<i32>,
    pub(super) helpers: Helpers,
    pub(super) guards: Guards,
    /// The relay to the service manager, if there is one.
    pub(super) notify_relay: Option<NotifyRelay>,
    /// The signal probe, if the launcher is the main process of a service.
    pub(super) signal_probe: Option<SignalProbe>,
    /// The connection to the view server, if the program shares its view.
    pub(super) view_server: Option<OwnedFd>,
}

/// What is left of a launch once the program has ended. Its end takes processor time, so this is dropped when the
/// keeper has answered. That waits for the guards' processes.
#[derive(Debug, Default)]
pub struct Remainder {
    _guards: Guards,
    _view_server: Option<OwnedFd>,
}

/// The program's process before it executes the program. It is killed when this is dropped.
#[derive(Debug)]
struct PendingProcess(Pid);

impl PendingProcess {
    /// Leaves the process alone.
    fn release(self) -> Pid {
        let pid = self.0;
        std::mem::forget(self);
        pid
    }
}

impl Drop for PendingProcess {
    fn drop(&mut self) {
        // It is a child that was not waited for, so the PID is still its own.
        let _ = process::kill(self.0.as_raw(), Signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(self.0, None);
    }
}

/// Starts the process that is to become the program. It prepares all that does not need the tunnel, while the keeper
/// makes the tunnel.
///
/// # Errors
/// Returns an error if the process, or one of the helpers and guards, cannot be started.
pub fn start<'a>(program: &'a Program, lease: &Lease, signals: &mut Signals) -> Result<Launch<'a>, Failure> {
    // A service's view depends on no process outside of the service, and the views of others on none of its own.
    let query = if is_main_process_of_service() { None } else { ViewQuery::send(program, lease) };
    process::become_subreaper().doing("become the parent of orphaned processes")?;
    let (failure, failure_writer) = pipe_with(PipeFlags::CLOEXEC).doing("create a pipe")?;
    let (stages_reader, stages) = local_socket::pair().doing("create a socket")?;
    let (helpers, launcher) = Helpers::pair().doing("create a socket")?;
    let parent = std::process::id();
    let notify_relay = NotifyRelay::open().unwrap_or_else(|error| {
        tracing::warn!("cannot relay messages of the program to the service manager: {error}");
        None
    });
    let signal_probe = SignalProbe::start(signals).doing("start the signal probe")?;
    let mut guards = Guards::start(program)?;
    // A process that became vpn-exec by execve(2) may have other children, which are not the program's.
    let unrelated = process::children().doing("list the children of this process")?;
    let shared = query.and_then(|query| query.answer(lease));
    match process::fork().doing("create the program's process")? {
        Forked::Child => {
            drop((failure, stages, helpers));
            let child = Child {
                program,
                parent,
                inherited: signals.inherited(),
                stages: &stages_reader,
                notify_relay: notify_relay.as_ref(),
                guards: &guards,
            };
            let failure = child.become_program(launcher, shared);
            let report = serde_json::to_vec(&failure).unwrap_or_default();
            let _ = rustix::io::write(&failure_writer, &report);
            process::exit_now(FAILED.into())
        }
        Forked::Parent(pid) => {
            guards.leave_to_child();
            let view_server = shared.map(SharedView::into_connection);
            let companions = Companions { unrelated, helpers, guards, notify_relay, signal_probe, view_server };
            Ok(Launch { program, process: PendingProcess(pid), stages, has_entered: false, failure, companions })
        }
    }
}

impl Launch<'_> {
    /// Lets the process enter the tunnel's namespace, which must have its name now or be passed here, and drop its
    /// privileges there.
    pub fn enter(&mut self, namespace: Option<&NetworkNamespace>) {
        if !std::mem::replace(&mut self.has_entered, true) {
            self.begin_next_stage(namespace);
        }
    }

    /// Returns a descriptor that is readable once the process has reported its failure, which [`Self::run`] returns.
    pub fn failure(&self) -> BorrowedFd<'_> {
        self.failure.as_fd()
    }

    /// Returns whether the process has reported that it cannot become the program.
    ///
    /// # Errors
    /// Returns the error of poll(2).
    pub fn has_failed(&self) -> io::Result<bool> {
        Ok(wait_for(&[self.failure.as_fd()], Some(Duration::ZERO))?[0])
    }

    fn begin_next_stage(&self, namespace: Option<&NetworkNamespace>) {
        // If the process has ended already, it has reported its failure.
        let _ = local_socket::send(&self.stages, &[1], namespace.map(AsFd::as_fd));
    }

    /// Runs the program in its tunnel, which must be made, and forwards `signals` to it. Returns once the program has
    /// ended, and with it the processes that it left behind.
    ///
    /// # Errors
    /// Returns an error if the program cannot be executed, or was killed because of the tunnel. Processes that the
    /// program has started may still run then.
    pub fn run(
        mut self,
        tunnel: &TunnelName,
        lease: &mut Lease,
        signals: Signals,
    ) -> Result<(ProgramOutcome, Remainder), Failure> {
        self.enter(lease.namespace());
        self.companions.guards.await_ready()?;
        if let Some(terminal) = &self.program.terminal {
            terminal.begin(self.process.0).doing("give the program its terminal")?;
        }
        self.begin_next_stage(None);
        // From now on the launcher only forwards signals, and cleans up if the keeper dies.
        privileges::limit_supervisor(self.program).doing("drop privileges")?;
        let Self { program, process, failure, mut companions, .. } = self;
        let failure = read_failure(failure).doing("learn whether the program was executed")?;
        let pid = process.release();
        // The keeper finds processes of the program by its mount namespace, which exists now.
        lease.started(pid.as_raw());
        let outcome = supervise::supervise(program, pid, &mut companions, tunnel, lease, signals);
        let Companions { mut guards, view_server, .. } = companions;
        guards.dismiss();
        failure.map_or(outcome, Err).map(|outcome| (outcome, Remainder { _guards: guards, _view_server: view_server }))
    }
}

/// Waits until the process has executed the program, which closes its end of the pipe. Returns the failure if it could
/// not.
fn read_failure(pipe: OwnedFd) -> io::Result<Option<Failure>> {
    let mut report = Vec::new();
    File::from(pipe).read_to_end(&mut report)?;
    Ok(serde_json::from_slice(&report).ok())
}
