//! The socket guard: a process that decides about each connection of the program to a unix socket, so that no process
//! outside the tunnel does the program's work.
//!
//! The seccomp filter by which the kernel asks the guard is in [`crate::linux::seccomp::connect`]. The policy for
//! sockets of the host is in [`crate::plan::host_sockets`].
//!
//! If the guard ends, every call that it would be asked about fails with `ENOSYS`.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::process::Confinement;
use super::socket_file::{FileId, FoundSocket, look_up};
use super::{GuardKind, GuardWork, RefusalReport, Reporter};
use crate::failure::{Doing, Failure};
use crate::fault;
use crate::linux::capabilities::CapabilitySet;
use crate::linux::local_socket;
use crate::linux::process;
use crate::linux::seccomp::connect::{self, ConnectSupervisor, Destination, PendingConnect};
use crate::linux::unix_sockets::{BoundSocket, UnixSockets};
use crate::plan::SocketsPlan;
use crate::plan::host_sockets::{self, SocketOwner};
use crate::program::Program;
use crate::program::identity::Identity;

/// The minimum time between reports that contain only a count.
const COUNT_INTERVAL: Duration = Duration::from_secs(1);

/// The maximum number of sockets that the user gets a message about.
const MAX_MESSAGES: usize = 64;

/// The maximum number of sockets inside that are remembered.
const MAX_KNOWN_INSIDE: usize = 1024;

/// The system calls of this guard besides those of every guard: inspecting a socket's file as the program sees it.
const CALLS: &[libc::c_long] = &[
    libc::SYS_process_vm_readv,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_kill,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
];

/// The socket guard, as the program's process uses it.
#[derive(Debug)]
pub(super) struct SocketGuard {
    /// The connection over which the guard gets its descriptors.
    guard: OwnedFd,
}

impl SocketGuard {
    /// Prepares the guard of a program. Returns the work of its process.
    ///
    /// # Errors
    /// Returns an error if a socket cannot be created.
    pub(super) fn prepare(program: &Program) -> Result<(Self, GuardWork), Failure> {
        let (guard, program_end) = local_socket::pair().doing(GuardKind::Sockets.task())?;
        let (open, identity) = (program.sockets.clone(), program.identity.clone());
        let work: GuardWork =
            Box::new(move |reporter, launcher| run(open, &identity, launcher, &program_end, reporter));
        Ok((Self { guard }, work))
    }

    /// Subjects the calling process, which must be in the tunnel's network namespace, and its descendants to the guard.
    ///
    /// # Errors
    /// Returns the error of the system call that failed; `EBUSY` if the process has a similar supervisor already.
    pub(super) fn guard_caller(&self) -> io::Result<()> {
        let inside = UnixSockets::open()?;
        let supervisor = connect::install()?;
        local_socket::send(&self.guard, b"inside", Some(inside.as_fd()))?;
        local_socket::send(&self.guard, b"supervisor", Some(supervisor.as_fd()))
    }
}

/// Runs the guard in the calling process until no process of the program is left, and the launcher knows.
fn run(
    open: SocketsPlan,
    identity: &Identity,
    launcher: u32,
    program: &OwnedFd,
    reporter: &Reporter,
) -> Result<(), Failure> {
    fault::fail_at("in the socket guard")?;
    let outside = list_outside()?;
    let home = identity.home();
    let confinement = Confinement {
        identity,
        launcher,
        descriptors: &mut [program.as_raw_fd(), reporter.descriptor(), outside.as_fd().as_raw_fd()],
        // To read the memory and see the files of the program, which may be of another user by then.
        capabilities: CapabilitySet::SYS_PTRACE,
        calls: CALLS,
        families: &[],
        is_inspectable: false,
    };
    confinement.apply()?;
    reporter.ready()?;
    let received = receive_descriptor(program).and_then(|inside| Ok((inside, receive_descriptor(program)?)));
    // The program's process ends before it sends them if the launch fails.
    let (Some(inside), Some(supervisor)) = received.doing("receive the program's filter")? else { return Ok(()) };
    let mut judge = Judge {
        open,
        home,
        supervisor: supervisor.into(),
        inside: inside.into(),
        outside,
        reporter,
        known_inside: HashSet::new(),
        messages_about: HashSet::new(),
        refused: 0,
        reported: 0,
        reported_at: None,
    };
    judge.run().doing("answer the kernel")?;
    // The launcher has something to do now, maybe on this processor.
    reporter.await_end().doing("wait for the launcher")
}

/// Returns the sockets of the host's network namespace.
///
/// # Errors
/// Returns an error if the kernel does not list unix sockets. Without that list, sockets inside could not be told
/// apart.
fn list_outside() -> Result<UnixSockets, Failure> {
    let listed = UnixSockets::open().and_then(|sockets| sockets.bound().map(|_| sockets));
    listed.map_err(|error| {
        Failure::new(format!("the kernel does not list them (unix_diag): {error}"))
            .advise("use a kernel with CONFIG_UNIX_DIAG, or give --socket any to open all sockets of the host")
    })
}

fn receive_descriptor(program: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    Ok(local_socket::receive(program, &mut [0; 16])?.and_then(|(_, passed)| passed))
}

/// The decision about a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    /// The kernel carries the call out.
    Allow,
    /// The call fails with this error number.
    Fail(i32),
}

/// The guard at work.
struct Judge<'a> {
    open: SocketsPlan,
    /// The home directory of the program's user.
    home: Option<PathBuf>,
    supervisor: ConnectSupervisor,
    /// The sockets of the tunnel's network namespace.
    inside: UnixSockets,
    /// The sockets of the host's network namespace.
    outside: UnixSockets,
    reporter: &'a Reporter,
    /// Socket files that were bound inside. Each query lists all sockets of the namespace, so the result is kept.
    known_inside: HashSet<FileId>,
    /// The paths that the user got a message about.
    messages_about: HashSet<PathBuf>,
    refused: u64,
    /// The number of refusals in the last report, and its time.
    reported: u64,
    reported_at: Option<Instant>,
}

impl Judge<'_> {
    /// Answers the kernel until no process of the program is left.
    fn run(&mut self) -> io::Result<()> {
        loop {
            let pause = self.reported_at.map_or(Duration::ZERO, |at| COUNT_INTERVAL.saturating_sub(at.elapsed()));
            match self.supervisor.wait((self.reported < self.refused).then_some(pause))? {
                connect::Waited::Over => return Ok(()),
                connect::Waited::TimeUp => self.report(None, None),
                connect::Waited::Call => {
                    let Some(call) = self.supervisor.receive()? else { continue };
                    let errno = match self.judge(&call) {
                        Decision::Allow => None,
                        Decision::Fail(errno) => Some(errno),
                    };
                    self.supervisor.answer(&call, errno)?;
                }
            }
        }
    }

    fn judge(&mut self, call: &PendingConnect) -> Decision {
        let address = match call.read_address() {
            Ok(address) => address,
            // The kernel reports the invalid address itself.
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => return Decision::Allow,
            // The memory of a set-user-ID program cannot be read. It keeps its Internet connections.
            Err(_) if call.has_length_of_internet_address() => return Decision::Allow,
            Err(_) => return Decision::Fail(libc::EACCES),
        };
        let Destination::Path(path) = address else { return Decision::Allow };
        let socket = match look_up(call.thread, &path) {
            Ok(Some(socket)) => socket,
            // The kernel reports the error itself.
            Ok(None) => return Decision::Allow,
            Err(error) => return Decision::Fail(error.raw_os_error().unwrap_or(libc::EACCES)),
        };
        // Otherwise the thread has ended, and its PID may belong to another one that was looked at.
        if !self.supervisor.is_waiting(call) {
            return Decision::Fail(libc::EACCES);
        }
        if self.open.allows(&socket.path, self.home.as_deref()) || self.is_inside(&socket) {
            return Decision::Allow;
        }
        let bound = self.outside.bound().unwrap_or_default();
        let listener = bound.iter().find(|bound| bound.is(&socket.file));
        if listener.is_none() && !process::is_socket_path_bound(&socket.path) {
            // A stale file: the usual error lets the program start its own service.
            return Decision::Fail(libc::ECONNREFUSED);
        }
        self.refuse(call, &socket, listener);
        Decision::Fail(libc::EACCES)
    }

    /// Counts and reports a refusal. Kills the process if it would otherwise take the place of a running instance.
    fn refuse(&mut self, call: &PendingConnect, socket: &FoundSocket, listener: Option<&BoundSocket>) {
        self.refused += 1;
        let is_new = self.messages_about.len() < MAX_MESSAGES && self.messages_about.insert(socket.path.clone());
        let takes_over = host_sockets::is_of_running_instance(&socket.path);
        if !is_new && !takes_over {
            return;
        }
        // A listener in a third network namespace, such as another tunnel's, is not found.
        let owner = listener.and_then(|listener| process::socket_owner(listener.inode));
        let owner = owner.map(|(pid, name)| SocketOwner { pid, name });
        let message = host_sockets::refusal_message(&socket.path, owner.as_ref());
        // After a refused connection, such a program takes the profile's lock from the running instance.
        let victim = if takes_over { process::process_of_thread(call.thread) } else { None };
        let victim = victim.filter(|_| self.supervisor.is_waiting(call));
        self.report(Some(message), victim);
        if let Some(pid) = victim {
            let _ = process::kill(pid, Signal::SIGKILL);
        }
    }

    /// Returns whether a socket of the tunnel's network namespace is bound to the file.
    fn is_inside(&mut self, socket: &FoundSocket) -> bool {
        if self.known_inside.contains(&socket.id) {
            return true;
        }
        let bound = self.inside.bound().unwrap_or_default();
        let is_inside = bound.iter().any(|bound| bound.is(&socket.file));
        if is_inside {
            if self.known_inside.len() >= MAX_KNOWN_INSIDE {
                self.known_inside.clear();
            }
            self.known_inside.insert(socket.id);
        }
        is_inside
    }

    /// Reports refusals to the launcher. If there is no room for the report, the next one contains the count.
    fn report(&mut self, message: Option<String>, killed: Option<i32>) {
        if self.reporter.refused(RefusalReport { total: self.refused, message, killed }) {
            self.reported = self.refused;
        }
        self.reported_at = Some(Instant::now());
    }
}
