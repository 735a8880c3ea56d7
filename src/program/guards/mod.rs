//! The guards of a program: two helper processes that keep it from handing its work to processes outside the tunnel.
//! The socket guard decides about its connections to unix sockets; the session bus filter stands between it and the
//! session bus.
//!
//! They run as the program's user, and report refusals to the launcher. They are processes of their own since the
//! launcher may be unable to answer: stopped with its job, waiting for a keeper, or writing to a terminal that is not
//! read.

mod process;
mod session_bus;
mod socket_file;
mod sockets;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rustix::process::WaitStatus;
use serde::{Deserialize, Serialize};

use super::Program;
use crate::failure::{Doing, Failure};
use crate::linux::local_socket;
use crate::linux::poll::wait_for;
use crate::linux::process::{self as linux_process, Forked};
use session_bus::BusFilter;
use sockets::SocketGuard;

/// The maximum length of a message of a guard, in bytes. The longest contain one path.
const MAX_MESSAGE: usize = 16 << 10;

/// The maximum time for all guards to become ready. They start together with the program's process, which takes longer.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// A message of a guard to the launcher.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum GuardMessage {
    /// The guard works from now on.
    Ready,
    /// The guard has refused something.
    Refused(RefusalReport),
    /// The guard is about to exit because of this failure.
    Failed(Failure),
}

/// A report of refusals.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RefusalReport {
    /// The number of connections or calls that this guard has refused so far.
    total: u64,
    /// The message for the user about a refusal, if it is the first of its kind.
    pub(super) message: Option<String>,
    /// The PID of the process that the guard kills as it would take the place of a running instance.
    pub(super) killed: Option<i32>,
}

/// The guard's end of the connection to the launcher.
#[derive(Debug)]
struct Reporter(OwnedFd);

impl Reporter {
    /// Reports that the guard works.
    fn ready(&self) -> Result<(), Failure> {
        self.send(&GuardMessage::Ready).doing("report to the launcher")
    }

    /// Reports refusals without waiting for the launcher. Returns whether the report was sent.
    fn refused(&self, report: RefusalReport) -> bool {
        self.send(&GuardMessage::Refused(report)).is_ok()
    }

    fn send(&self, message: &GuardMessage) -> io::Result<()> {
        local_socket::send(&self.0, &serde_json::to_vec(message)?, None)
    }

    /// Waits until the launcher closes the connection. It sends nothing.
    fn await_end(&self) -> io::Result<()> {
        wait_for(&[self.0.as_fd()], None).map(drop)
    }

    fn descriptor(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// The work of a guard's process. Its arguments are the connection to the launcher and the launcher's PID.
type GuardWork = Box<dyn FnOnce(&Reporter, u32) -> Result<(), Failure>>;

/// A kind of guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GuardKind {
    Sockets,
    SessionBus,
}

impl GuardKind {
    /// Returns the guard's task, as it follows "cannot".
    fn task(self) -> &'static str {
        match self {
            Self::Sockets => "guard unix sockets",
            Self::SessionBus => "filter the session bus",
        }
    }

    fn process(self) -> &'static str {
        match self {
            Self::Sockets => "the process that guards unix sockets",
            Self::SessionBus => "the process that filters the session bus",
        }
    }

    /// Returns the consequence of the guard's end.
    fn consequence(self) -> &'static str {
        match self {
            // The kernel asks the guard about every connect(2), and fails those without an answer with ENOSYS.
            Self::Sockets => "new connections of the program fail, to unix sockets and to the network",
            Self::SessionBus => "the program has lost its session bus",
        }
    }
}

/// The launcher's record of a guard, whose process is killed when this is dropped.
#[derive(Debug)]
struct Guard {
    kind: GuardKind,
    /// None once the guard has ended.
    pid: Option<Pid>,
    /// The connection to the guard. None once the guard has closed it.
    socket: Option<OwnedFd>,
    /// The number of refusals in its last report.
    refused: u64,
    failure: Option<Failure>,
}

/// The guards of a program. Their processes are killed when this is dropped, which waits for their ends.
#[derive(Debug, Default)]
pub(super) struct Guards {
    socket_guard: Option<SocketGuard>,
    bus_filter: Option<BusFilter>,
    guards: Vec<Guard>,
}

impl Guards {
    /// Starts the guards that a program needs.
    ///
    /// # Errors
    /// Returns an error if a guard cannot be prepared, or its process not be created. A failure of the guard itself is
    /// returned by [`Self::await_ready`].
    pub(super) fn start(program: &Program) -> Result<Self, Failure> {
        let mut guards = Self::default();
        if program.has_guarded_sockets() {
            let (socket_guard, work) = SocketGuard::prepare(program)?;
            guards.spawn(GuardKind::Sockets, work)?;
            guards.socket_guard = Some(socket_guard);
        }
        if let Some((bus_filter, work)) = BusFilter::prepare(program)? {
            guards.spawn(GuardKind::SessionBus, work)?;
            guards.bus_filter = Some(bus_filter);
        }
        Ok(guards)
    }

    fn spawn(&mut self, kind: GuardKind, work: GuardWork) -> Result<(), Failure> {
        let (socket, reporter) = local_socket::pair().doing(kind.task())?;
        rustix::io::ioctl_fionbio(&reporter, true).doing(kind.task())?;
        let launcher = std::process::id();
        match linux_process::fork().doing(kind.task())? {
            Forked::Child => {
                // Closed here, as the guard closes all descriptors but those that it keeps.
                drop(socket);
                let reporter = Reporter(reporter);
                let result = work(&reporter, launcher).map_err(io::Error::other).doing(kind.task());
                if let Err(failure) = &result {
                    let _ = reporter.send(&GuardMessage::Failed(failure.clone()));
                }
                linux_process::exit_now(i32::from(result.is_err()))
            }
            Forked::Parent(pid) => {
                self.guards.push(Guard { kind, pid: Some(pid), socket: Some(socket), refused: 0, failure: None });
                Ok(())
            }
        }
    }

    /// Opens the filtered session bus in the calling process's mount namespace.
    ///
    /// # Errors
    /// Returns the error of the system call that failed.
    pub(super) fn open_bus(&self) -> io::Result<()> {
        self.bus_filter.as_ref().map_or(Ok(()), BusFilter::open)
    }

    /// Returns the address of the filtered session bus, if there is one.
    pub(super) fn session_bus(&self) -> Option<&'static str> {
        self.bus_filter.as_ref().map(|_| session_bus::ADDRESS)
    }

    /// Subjects the calling process, which must be in the tunnel's network namespace, and its descendants to the socket
    /// guard.
    ///
    /// # Errors
    /// Returns the error of the system call that failed; `EBUSY` if the process has a similar supervisor already.
    pub(super) fn guard_sockets(&self) -> io::Result<()> {
        self.socket_guard.as_ref().map_or(Ok(()), SocketGuard::guard_caller)
    }

    /// Drops the launcher's copies of what the program's process uses, so that the guards notice if that process ends
    /// early.
    pub(super) fn leave_to_child(&mut self) {
        self.socket_guard = None;
        self.bus_filter = None;
    }

    /// Lets the guards end, since no process of the program is left. Does not wait for that.
    pub(super) fn dismiss(&mut self) {
        self.guards.iter_mut().for_each(|guard| guard.socket = None);
    }

    /// Waits until all guards work.
    ///
    /// # Errors
    /// Returns the failure of a guard; an error if a guard was killed, or is not ready within [`READY_TIMEOUT`].
    pub(super) fn await_ready(&mut self) -> Result<(), Failure> {
        let deadline = Instant::now() + READY_TIMEOUT;
        self.guards.iter_mut().try_for_each(|guard| guard.await_ready(deadline))
    }

    /// Returns descriptors that are readable when a guard has sent a message, or has ended.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.guards.iter().filter_map(|guard| guard.socket.as_ref().map(AsFd::as_fd))
    }

    /// Returns the reports that the guards have sent since the last call.
    pub(super) fn receive(&mut self) -> Vec<RefusalReport> {
        self.guards.iter_mut().flat_map(Guard::receive).collect()
    }

    /// Returns how many connections and calls all guards together have refused.
    pub(super) fn refused(&self) -> u64 {
        self.guards.iter().map(|guard| guard.refused).sum()
    }

    /// Returns the message for the user about a process that has ended, if that was a guard and its end has
    /// consequences.
    pub(super) fn describe_end(&mut self, pid: i32, status: WaitStatus) -> Option<String> {
        let guard = self.guards.iter_mut().find(|guard| guard.pid == Some(Pid::from_raw(pid)))?;
        // Another process may get the PID now.
        guard.pid = None;
        let reason = guard.failure.take().map(|failure| failure.message);
        let ending = match (status.terminating_signal(), status.exit_status()) {
            (Some(signal), _) => format!("was killed by signal {signal}"),
            // The program and all that it has started have ended.
            (None, Some(0)) => return None,
            (None, _) => "has failed".to_owned(),
        };
        let reason = reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
        Some(format!("{} {ending}{reason}: {} from now on", guard.kind.process(), guard.kind.consequence()))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(pid) = self.pid {
            // It is a child that was not waited for, so the PID is still its own.
            let _ = linux_process::kill(pid.as_raw(), Signal::SIGKILL);
            let _ = nix::sys::wait::waitpid(pid, None);
        }
    }
}

impl Guard {
    fn await_ready(&mut self, deadline: Instant) -> Result<(), Failure> {
        let task = self.kind.task();
        let ended = || Failure::new(format!("cannot {task}: its process was killed"));
        let socket = self.socket.as_ref().ok_or_else(ended)?;
        let left = deadline.saturating_duration_since(Instant::now());
        if wait_for(&[socket.as_fd()], Some(left)).doing(task)? != [true] {
            return Err(io::Error::from(io::ErrorKind::TimedOut)).doing(task);
        }
        match receive(socket) {
            // There are no refusals before the program runs.
            Some(GuardMessage::Ready | GuardMessage::Refused(_)) => Ok(()),
            Some(GuardMessage::Failed(failure)) => Err(failure),
            None => Err(ended()),
        }
    }

    /// Returns the reports that have arrived. Notes a failure.
    fn receive(&mut self) -> Vec<RefusalReport> {
        let mut reports = Vec::new();
        while let Some(socket) = &self.socket {
            if !wait_for(&[socket.as_fd()], Some(Duration::ZERO)).is_ok_and(|ready| ready[0]) {
                break;
            }
            match receive(socket) {
                Some(GuardMessage::Ready) => {}
                Some(GuardMessage::Refused(report)) => {
                    self.refused = report.total;
                    reports.push(report);
                }
                Some(GuardMessage::Failed(failure)) => self.failure = Some(failure),
                None => self.socket = None,
            }
        }
        reports
    }
}

/// Receives a message of a guard. Returns `None` once the guard has ended, or if it sends anything else.
fn receive(socket: &OwnedFd) -> Option<GuardMessage> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let (length, _) = local_socket::receive(socket, &mut buffer).ok()??;
    serde_json::from_slice(&buffer[..length]).ok()
}
