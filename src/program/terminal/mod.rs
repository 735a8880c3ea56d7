//! Gives the program its own terminal, a pseudoterminal, instead of the caller's: with `--pty`, and wherever the
//! caller's terminal belongs to another user than the program. A process that has a terminal open can read the input of
//! later programs there, and write anything to it.
//!
//! The original process stays at the caller's terminal, copies input and output (`copier`), and forwards signals. Its
//! child leads a session at the new terminal and is the launcher. The program is a job of that session, as in a shell:
//! the foreground job at once if standard input and output are terminals, else as soon as it asks for input. So
//! `vpn-exec -- PROGRAM | less` leaves the keys to less.

mod copier;

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::identity::Identity;
use super::{ProgramOutcome, forwarded_signals, helpers};
use crate::failure::FAILED;
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::process::{self, Forked};
use crate::linux::signals::{ReceivedSignal, Signals};
use crate::linux::terminal::{self, Modes};
use copier::Copier;

/// The two processes in which [`replace`] returns.
#[derive(Debug)]
pub enum Replaced {
    /// The original process, once the launcher has ended.
    Caller(ProgramOutcome),
    /// The launcher, with the program's terminal.
    Launcher(OwnTerminal),
}

/// The program's own terminal, as the launcher controls it.
#[derive(Debug)]
pub struct OwnTerminal {
    terminal: OwnedFd,
    /// The pipe on which the copier is told that the program asks for input.
    input_request: OwnedFd,
    /// Whether the program is the foreground job from its start.
    is_interactive: bool,
}

/// Returns whether a program with this identity would get a terminal that belongs to another user.
pub fn is_lent(identity: &Identity) -> bool {
    let Identity::Other(account) = identity else { return false };
    let standard: Vec<(u64, u32)> = standard_terminals().into_iter().filter_map(|(_, found)| found).collect();
    let controlling = terminal::controlling_device().is_some_and(|device| {
        let owner = standard.iter().find(|(other, _)| *other == device).map(|(_, owner)| *owner);
        // A terminal whose owner cannot be found, as in a container, counts as that of another user.
        owner.or_else(|| terminal::owner(device)) != Some(account.uid)
    });
    controlling || standard.iter().any(|(_, owner)| *owner != account.uid)
}

/// Returns the standard descriptors, with the device and the owner of those that are terminals.
fn standard_terminals() -> [(i32, Option<(u64, u32)>); 3] {
    let of = terminal::device_and_owner;
    [(0, of(io::stdin().as_fd())), (1, of(io::stdout().as_fd())), (2, of(io::stderr().as_fd()))]
}

/// Replaces the caller's terminal. Returns at once in a new process, which continues as the launcher, and in the
/// calling process once the launcher has ended. The calling process calls `forget` to drop secrets, and closes the
/// descriptors from 3 on, of which `passed` are the launcher's.
///
/// # Errors
/// Returns `ENOTTY` if the caller has no terminal; the error of the system call that failed.
pub fn replace(identity: &Identity, passed: i32, forget: impl FnOnce()) -> io::Result<Replaced> {
    let standard = standard_terminals();
    let first = || standard.iter().find(|(_, found)| found.is_some());
    let caller = match (terminal::controlling(), first()) {
        (Some(terminal), _) => terminal,
        (None, Some((descriptor, _))) => terminal::reopen(*descriptor)?,
        (None, None) => return Err(io::Error::from_raw_os_error(libc::ENOTTY)),
    };
    let terminal::Pseudoterminal { controller, terminal: own } = terminal::open_pseudoterminal()?;
    let modes = Modes::of(caller.as_fd())?;
    modes.set(own.as_fd())?;
    terminal::copy_size(caller.as_fd(), &own)?;
    if let Identity::Other(account) = identity {
        terminal::give_to(&own, account.uid)?;
    }
    let is_interactive = standard[0].1.is_some() && standard[1].1.is_some() && terminal::is_foreground(caller.as_fd());
    let (input_requested, input_request) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let parent = std::process::id();
    match process::fork()? {
        Forked::Child => {
            drop((caller, controller, input_requested));
            if helpers::end_with_parent(parent).is_err() {
                process::exit_now(FAILED.into());
            }
            terminal::lead_session(&own)?;
            terminal::replace_standard(&own)?;
            Ok(Replaced::Launcher(OwnTerminal { terminal: own, input_request, is_interactive }))
        }
        Forked::Parent(launcher) => {
            drop((own, input_request));
            forget();
            process::close_range(3, 2 + passed)?;
            let signals = Signals::block(forwarded_signals())?;
            capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty())?;
            capabilities::set_no_new_privileges()?;
            let mut copier = Copier::new(caller, modes, controller, launcher, input_requested, is_interactive);
            copier.copy(signals).map(Replaced::Caller)
        }
    }
}

impl OwnTerminal {
    /// Makes the program's process a job.
    ///
    /// # Errors
    /// Returns the error of the system call that failed.
    pub(super) fn begin(&self, program: Pid) -> io::Result<()> {
        nix::unistd::setpgid(program, program)?;
        if self.is_interactive { terminal::set_foreground(&self.terminal, program.as_raw()) } else { Ok(()) }
    }

    /// Makes the process group of a process that has stopped to wait for the terminal the foreground job. Returns false
    /// if the process has stopped for another reason.
    ///
    /// # Errors
    /// Returns the error of the system call that failed.
    pub(super) fn grant(&self, process: i32, signal: i32) -> io::Result<bool> {
        if ![Signal::SIGTTIN, Signal::SIGTTOU].iter().any(|stops| *stops as i32 == signal) {
            return Ok(false);
        }
        let Ok(group) = nix::unistd::getpgid(Some(Pid::from_raw(process))) else { return Ok(false) };
        terminal::set_foreground(&self.terminal, group.as_raw())?;
        nix::sys::signal::killpg(group, Signal::SIGCONT)?;
        // The copier reads one request only.
        let _ = rustix::io::write(&self.input_request, &[1]);
        Ok(true)
    }

    /// Makes the launcher the foreground job again. It forwards the terminal's signals to processes that the program
    /// left behind.
    pub(super) fn end(&self) {
        if let Err(error) = terminal::set_foreground(&self.terminal, nix::unistd::getpgrp().as_raw()) {
            tracing::debug!(%error, "cannot become the foreground job of the terminal");
        }
    }

    /// Returns the program's process group if a signal is one that terminals send to a whole job.
    pub(super) fn job(&self, program: Pid, signal: ReceivedSignal) -> Option<Pid> {
        const JOB_SIGNALS: [Signal; 5] =
            [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTSTP, Signal::SIGCONT, Signal::SIGHUP];
        let own = nix::unistd::getpgrp();
        let group = nix::unistd::getpgid(Some(program)).ok().filter(|group| *group != own);
        group.filter(|_| JOB_SIGNALS.iter().any(|sent| signal.is(*sent)))
    }
}
