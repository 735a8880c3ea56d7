//! The program: joins the namespace, gets its own view of some files, gives up what it does not need, runs, and hands back its
//! exit status.

mod child;
pub(crate) mod closed_sockets;
pub mod compatibility;
mod desktop;
mod enter;
mod gnupg;
mod guards;
mod helpers;
pub mod identity;
pub(crate) mod notify;
mod privileges;
mod signal_probe;
mod supervise;
pub mod terminal;
mod view;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::Buses;
use crate::lease::Lease;
use crate::linux::capabilities::CapabilitySet;
use crate::linux::poll::wait_for;
use crate::linux::process::{self, Forked};
use crate::linux::signals::Signals;
use crate::names::TunnelName;
use crate::plan::{DnsPlan, SocketsPlan};
use child::Child;
use guards::Guards;
use helpers::Helpers;
use identity::Identity;
use notify::NotifyRelay;
use signal_probe::SignalProbe;
pub use supervise::watched;

/// Where programs are looked for if PATH does not say: confstr(3)'s `_CS_PATH`.
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// What runs, where and as whom.
#[derive(Debug)]
pub struct Program {
    /// The program and its arguments.
    pub command: Vec<OsString>,
    /// The path of the network namespace's name.
    pub namespace: PathBuf,
    /// The file of the host's that it sees as `/etc/resolv.conf`, whatever becomes of it.
    pub resolv_conf: PathBuf,
    /// A directory that exists on the host and is of no use to the program: the place to build its private files in.
    pub staging: PathBuf,
    /// What it sees of names.
    pub names: DnsPlan,
    /// The paths that it does not see: those of [`crate::plan::hidden_paths`].
    pub hidden: Vec<PathBuf>,
    /// The unix sockets of the host that it can connect to.
    pub sockets: SocketsPlan,
    /// The message buses of the host's that it can reach.
    pub buses: Buses,
    /// Who it is.
    pub identity: Identity,
    /// Which capabilities it keeps.
    pub kept: CapabilitySet,
    /// The highest capability of the kernel.
    pub last_capability: u8,
    /// Whether it can gain privileges by executing a file.
    pub new_privileges: bool,
    /// Whether what it leaves behind is killed when it ends.
    pub kill_orphans: bool,
    /// How many descriptors, from 3 on, belong to it (sd_listen_fds(3)).
    pub listen_fds: RawFd,
    /// Its mask of permission bits (umask(2)).
    pub umask: u32,
    /// Its terminal, if that is one of its own.
    pub terminal: Option<terminal::OwnTerminal>,
    /// Whether a handshake is waited for before it is started.
    pub is_connected: bool,
    /// What a keeper that its launcher may have to start can gain by executing a file.
    pub keeper_gains: CapabilitySet,
}

/// Which capabilities it takes to become a program of this identity that keeps these capabilities.
pub fn needed_capabilities(identity: &Identity, kept: CapabilitySet) -> CapabilitySet {
    let mut needed = CapabilitySet::SYS_ADMIN | CapabilitySet::SETPCAP | kept;
    if *identity != Identity::Unchanged {
        needed |= CapabilitySet::SETUID | CapabilitySet::SETGID;
    }
    needed
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// By itself, with a status.
    Exited(i32),
    /// By a signal, of this number.
    Signaled(i32),
}

/// Why a program was not run, or not to its end.
#[derive(Debug, Error)]
pub enum ProgramError {
    /// There is no such program.
    #[error("cannot find the program {0:?}")]
    NotFound(String),
    /// It is there, but what it names as its interpreter is not.
    #[error("cannot find the interpreter of the program {0:?}")]
    NoInterpreter(String),
    /// It is there, but cannot be executed.
    #[error("cannot execute {program:?}: {reason}")]
    NotExecutable {
        /// Which.
        program: String,
        /// Why.
        reason: String,
        /// What can be done about it, where that is known.
        advice: Option<&'static str>,
    },
    /// Something before that failed.
    #[error("cannot {what}: {reason}")]
    Setup {
        /// What could not be done.
        what: String,
        /// Why.
        reason: String,
    },
    /// It would have taken the place of an instance of itself that runs outside the tunnel.
    #[error("{0}")]
    RunsOutside(String),
    /// The tunnel has ended under the program.
    #[error("the tunnel has ended, so the program was ended, too: {0}")]
    TunnelEnded(String),
    /// The system refused.
    #[error("cannot {what}: {error}")]
    System {
        /// What could not be done.
        what: &'static str,
        /// Why.
        error: io::Error,
    },
}

impl ProgramError {
    /// The exit status for this error, as env(1), timeout(1) and chroot(1) have it.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::NotFound(_) | Self::NoInterpreter(_) => 127,
            Self::NotExecutable { .. } => 126,
            Self::Setup { .. } | Self::RunsOutside(_) | Self::TunnelEnded(_) | Self::System { .. } => 125,
        }
    }

    /// What the user can do about it, where that is known.
    pub fn advice(&self) -> Option<String> {
        match self {
            Self::NotFound(program) if program.is_empty() => Some("the program's name is empty".into()),
            Self::NotFound(program) if program.starts_with('-') => {
                Some("options of vpn-exec come before the two dashes, the program comes first after them".into())
            }
            Self::NotFound(program) if program.contains(char::is_whitespace) => Some(
                "the program and each of its arguments are words of their own: leave out the quotation marks".into(),
            ),
            Self::NotFound(program) if program.contains('/') => Some("check its path".into()),
            Self::NotFound(_) => {
                Some("no folder in PATH has it (sudo sets a PATH of its own): give its whole path".into())
            }
            Self::NoInterpreter(_) => {
                Some("install what its first line (`#!`) names, or, for a binary, the loader that `file` tells".into())
            }
            Self::NotExecutable { advice, .. } => advice.map(Into::into),
            Self::Setup { .. } | Self::RunsOutside(_) | Self::TunnelEnded(_) | Self::System { .. } => None,
        }
    }
}

impl From<ProgramError> for crate::failure::Failure {
    fn from(error: ProgramError) -> Self {
        let failure = Self::new(&error).with_status(error.exit_status());
        Self { advice: error.advice(), ..failure }
    }
}

/// What the child tells its parent when it cannot become the program.
#[derive(Debug, Serialize, Deserialize)]
enum Failure {
    Execute { errno: i32 },
    Setup { what: String, reason: String },
}

/// A program that waits for its tunnel: a process with a mount namespace of its own. It ends when this is dropped.
#[derive(Debug)]
pub struct Launch<'a> {
    program: &'a Program,
    /// The process, until its end is somebody else's to wait for.
    pid: Option<Pid>,
    /// What the process reads a byte from before it enters the tunnel, and another before it becomes the program.
    go: OwnedFd,
    entered: bool,
    /// What it writes to when it cannot become the program.
    failure: OwnedFd,
    /// Our children from before, the keeper among them.
    strangers: BTreeSet<i32>,
    /// The processes that help the program, which end once this is dropped.
    helpers: Helpers,
    /// The way to the service manager, if there is one.
    notify_relay: Option<NotifyRelay>,
    /// Who tells signals for all of a service from those for vpn-exec alone, if it is one.
    signal_probe: Option<SignalProbe>,
    /// What keeps the program from handing its work to processes outside.
    guards: Guards,
}

/// An error, and what could not be done.
type SetupResult<T> = Result<T, (&'static str, io::Error)>;

/// Starts the process that is to become the program, and prepares it as far as that takes no tunnel: while the keeper makes the
/// tunnel, the other half of the work is done here.
pub fn start<'a>(program: &'a Program, signals: &mut Signals) -> Result<Launch<'a>, ProgramError> {
    let system = |what| move |error: io::Error| ProgramError::System { what, error };
    process::become_subreaper().map_err(system("become the parent of orphans"))?;
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(io::Error::from);
    let (failure, writer) = pipe().map_err(system("make a pipe"))?;
    let (wait, go) = pipe().map_err(system("make a pipe"))?;
    let (helpers, alive) = Helpers::pair().map_err(system("make a socket"))?;
    let parent = std::process::id();
    let notify_relay = NotifyRelay::open().unwrap_or_else(|error| {
        tracing::warn!("the program cannot tell its service manager anything: {error}");
        None
    });
    let signal_probe = SignalProbe::start(signals).map_err(system("make a process"))?;
    let mut guards = Guards::start(program).map_err(system("start the processes that guard the program"))?;
    // Whoever became this process by exec may have started others before. These are not the program's.
    let strangers = process::children().map_err(system("look for other children"))?;
    match process::fork().map_err(system("make a process"))? {
        Forked::Child => {
            drop((failure, go, helpers));
            let inherited = signals.inherited();
            let (notify_relay, guards) = (notify_relay.as_ref(), &guards);
            let failed = Child { program, parent, inherited, wait: &wait, notify_relay, guards }.become_program(alive);
            let text = serde_json::to_vec(&failed).unwrap_or_default();
            let _ = rustix::io::write(&writer, &text);
            process::exit_now(125)
        }
        Forked::Parent(pid) => {
            let (pid, entered) = (Some(pid), false);
            guards.leave_to_child();
            Ok(Launch { program, pid, go, entered, failure, strangers, helpers, notify_relay, signal_probe, guards })
        }
    }
}

impl Launch<'_> {
    /// Lets the process enter the tunnel's namespace, which has its name now, and drop its privileges there.
    pub fn enter(&mut self) {
        if !std::mem::replace(&mut self.entered, true) {
            self.go_on();
        }
    }

    /// Readable once the process has found that it cannot become the program: [`Self::run`] then says why.
    pub fn failure(&self) -> BorrowedFd<'_> {
        self.failure.as_fd()
    }

    /// Returns whether the process has reported that it cannot become the program.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn has_failed(&self) -> io::Result<bool> {
        Ok(wait_for(&[self.failure.as_fd()], Some(Duration::ZERO))?[0])
    }

    fn go_on(&self) {
        // A process that has ended already has said why.
        let _ = rustix::io::write(&self.go, &[1]);
    }

    /// Runs the program in its tunnel, which is there now, until it and, unless they are killed, its orphans have ended. `signals`
    /// are passed on to it.
    ///
    /// After an error, what the program has started may still run in the tunnel.
    pub fn run(mut self, tunnel: &TunnelName, lease: &mut Lease, signals: Signals) -> Result<Outcome, ProgramError> {
        let system = |what| move |error: io::Error| ProgramError::System { what, error };
        self.enter();
        if let (Some(terminal), Some(pid)) = (&self.program.terminal, self.pid) {
            terminal.begin(pid).map_err(system("give the program its terminal"))?;
        }
        self.go_on();
        // The parent has passed on what it had to: from now on it only forwards signals, and cleans up if the keeper dies.
        privileges::limit_supervisor(self.program).map_err(system("drop privileges"))?;
        let mut text = Vec::new();
        let mut buffer = [0; 512];
        loop {
            match rustix::io::read(&self.failure, &mut buffer) {
                Ok(0) => break,
                Ok(length) => text.extend_from_slice(&buffer[..length]),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(system("learn whether the program was started")(error.into())),
            }
        }
        let Some(pid) = self.pid.take() else { return Err(system("find the program")(io::ErrorKind::NotFound.into())) };
        // What it starts from now on has its mount namespace.
        lease.started(pid.as_raw());
        let strangers = std::mem::take(&mut self.strangers);
        let service = (self.notify_relay.take(), self.signal_probe.take(), std::mem::take(&mut self.guards));
        let others = (strangers, &mut self.helpers);
        let supervised = supervise::supervise(self.program, pid, others, tunnel, lease, signals, service);
        match serde_json::from_slice::<Failure>(&text) {
            Ok(failure) => Err(failure.into_error(&self.program.command[0])),
            Err(_) => supervised,
        }
    }
}

impl Drop for Launch<'_> {
    fn drop(&mut self) {
        if let Some(pid) = self.pid {
            // It is our child, and nobody has waited for it: the number is still its own.
            let _ = process::kill(pid.as_raw(), Signal::SIGKILL);
            let _ = nix::sys::wait::waitpid(pid, None);
        }
    }
}

impl Failure {
    fn into_error(self, program: &OsString) -> ProgramError {
        let program = program.to_string_lossy().into_owned();
        match self {
            // A name without a slash is looked for in PATH alone.
            Self::Execute { errno: libc::ENOENT } if program.contains('/') && Path::new(&program).is_file() => {
                ProgramError::NoInterpreter(program)
            }
            Self::Execute { errno: libc::ENOENT } => ProgramError::NotFound(program),
            Self::Execute { errno: libc::EACCES } if Path::new(&program).is_dir() => {
                ProgramError::NotExecutable { program, reason: "it is a directory".into(), advice: None }
            }
            Self::Execute { errno } => {
                let reason = io::Error::from_raw_os_error(errno).to_string();
                let advice = match errno {
                    libc::EACCES => {
                        Some("make it executable (chmod +x), and its folders accessible to the user that it runs as")
                    }
                    // execve(2): the file has capabilities in effect that the bounding set does not.
                    libc::EPERM => Some(
                        "if `getcap` shows capabilities of the file, keep them with --keep-cap, or leave out --new-privs to run it without",
                    ),
                    _ => None,
                };
                ProgramError::NotExecutable { program, reason, advice }
            }
            Self::Setup { what, reason } => ProgramError::Setup { what, reason },
        }
    }
}
