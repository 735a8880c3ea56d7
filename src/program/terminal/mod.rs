//! A terminal of the program's own, in the place of the caller's (`--pty`, and wherever the caller's belongs to another user than the
//! program's): a process that has a terminal open can read what is typed there, and have it say anything, also after its end.
//!
//! The process that was started stays at the caller's terminal, and does nothing but to copy what is typed and printed, and to pass signals
//! on. Its child leads a session at the new terminal and is the launcher; the program is a job of that session's, as in a shell. It becomes
//! the foreground one at once if standard input and output are terminals. Otherwise it does when it first asks for input, so that
//! `vpn-exec -- PROGRAM | less` leaves the keys to less.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags};

use super::Outcome;
use super::identity::Identity;
use super::supervise::watched;
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::process::{self, Forked};
use crate::linux::signals::{ReceivedSignal, Signals};
use crate::linux::terminal::{self, Modes};

/// How much is held of what one side has said and the other has not taken yet.
const BUFFER: usize = 16 * 1024;

/// Which process this is after [`replace`].
#[derive(Debug)]
pub enum Replaced {
    /// The one that is at the caller's terminal: the launcher has ended so.
    Caller(Outcome),
    /// The launcher, whose terminal this is.
    Launcher(OwnTerminal),
}

/// The launcher's hold of the program's terminal.
#[derive(Debug)]
pub struct OwnTerminal {
    terminal: OwnedFd,
    /// Where the process at the caller's terminal is told that the program wants input.
    wants: OwnedFd,
    /// Whether the program is in the foreground from its start.
    is_interactive: bool,
}

/// Whether a terminal of the caller's would be lent to a program of another user than its own.
pub fn is_lent(identity: &Identity) -> bool {
    let Identity::Other(account) = identity else { return false };
    let standard: Vec<(u64, u32)> = standard().into_iter().filter_map(|(_, seen)| seen).collect();
    let controlling = terminal::controlling_device().is_some_and(|device| {
        let seen = standard.iter().find(|(other, _)| *other == device).map(|(_, owner)| *owner);
        // Whose it is cannot be seen from everywhere. Then it is somebody else's.
        seen.or_else(|| terminal::owner(device)) != Some(account.uid)
    });
    controlling || standard.iter().any(|(_, owner)| *owner != account.uid)
}

/// The standard descriptors, and the device and the owner of those that are terminals.
fn standard() -> [(i32, Option<(u64, u32)>); 3] {
    let of = terminal::device_and_owner;
    [(0, of(io::stdin().as_fd())), (1, of(io::stdout().as_fd())), (2, of(io::stderr().as_fd()))]
}

/// Replaces the caller's terminal. Returns at once in a new process, which goes on as the launcher, and in the calling one when that has
/// ended. The calling process keeps no secrets: `forget` drops them. Descriptors from 3 on, `passed` of them, are the launcher's.
///
/// # Errors
/// `ENOTTY` if the caller has no terminal; else what keeps a pseudoterminal from being made.
pub fn replace(identity: &Identity, passed: i32, forget: impl FnOnce()) -> io::Result<Replaced> {
    let standard = standard();
    let first = || standard.iter().find(|(_, seen)| seen.is_some());
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
    let (wanted, wants) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let parent = std::process::id();
    match process::fork()? {
        Forked::Child => {
            drop((caller, controller, wanted));
            // As vpn-exec ends, so does the program.
            process::set_death_signal(Signal::SIGKILL)?;
            if nix::unistd::getppid().as_raw().cast_unsigned() != parent {
                process::exit_now(125);
            }
            terminal::lead_session(&own)?;
            terminal::replace_standard(&own)?;
            Ok(Replaced::Launcher(OwnTerminal { terminal: own, wants, is_interactive }))
        }
        Forked::Parent(launcher) => {
            drop((own, wants));
            forget();
            process::close_range(3, 2 + passed)?;
            let signals = Signals::block(watched())?;
            capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty())?;
            capabilities::set_no_new_privileges()?;
            let (typed, printed, hears) = (Vec::new(), Vec::new(), is_interactive);
            let mut caller =
                Copier { terminal: caller, modes, is_raw: false, controller, launcher, wanted, hears, typed, printed };
            caller.hear();
            caller.copy(signals).map(Replaced::Caller)
        }
    }
}

/// What the process at the caller's terminal has.
struct Copier {
    terminal: OwnedFd,
    /// The terminal's modes as they were.
    modes: Modes,
    is_raw: bool,
    controller: OwnedFd,
    launcher: Pid,
    /// Readable when the program wants input.
    wanted: OwnedFd,
    /// Whether what is typed is for the program, when vpn-exec is in the foreground.
    hears: bool,
    typed: Vec<u8>,
    printed: Vec<u8>,
}

impl Copier {
    /// Copies until the launcher ends.
    fn copy(&mut self, mut signals: Signals) -> io::Result<Outcome> {
        loop {
            match waitpid(self.launcher, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED)) {
                Ok(WaitStatus::Stopped(..)) => self.stop(Signal::SIGTSTP)?,
                Ok(WaitStatus::Exited(_, status)) => return self.end(Outcome::Exited(status)),
                Ok(WaitStatus::Signaled(_, signal, _)) => return self.end(Outcome::Signaled(signal as i32)),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                // A real-time signal is none that `nix` has a name for.
                Err(nix::errno::Errno::EINVAL) => return self.end(Outcome::Exited(125)),
                Err(error) => return Err(error.into()),
            }
            self.wait(&signals)?;
            while let Some(received) = signals.receive()? {
                self.pass_on(received)?;
            }
            self.copy_once()?;
        }
    }

    fn wait(&self, signals: &Signals) -> io::Result<()> {
        let interest = |is_open: bool, has_room: bool, has_data: bool| {
            let reading = if is_open && has_room { PollFlags::IN } else { PollFlags::empty() };
            reading | if has_data { PollFlags::OUT } else { PollFlags::empty() }
        };
        let terminal = interest(self.is_raw, self.typed.len() < BUFFER, !self.printed.is_empty());
        let controller = interest(true, self.printed.len() < BUFFER, !self.typed.is_empty());
        let entry = |descriptor, flags| PollFd::from_borrowed_fd(descriptor, flags);
        let mut entries = vec![entry(signals.as_fd(), PollFlags::IN)];
        let mut add = |descriptor, flags: PollFlags| {
            // A closed side is reported also to who asks for nothing.
            if !flags.is_empty() {
                entries.push(entry(descriptor, flags));
            }
        };
        add(self.terminal.as_fd(), terminal);
        add(self.controller.as_fd(), controller);
        add(self.wanted.as_fd(), if self.hears { PollFlags::empty() } else { PollFlags::IN });
        match rustix::event::poll(&mut entries, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn copy_once(&mut self) -> io::Result<()> {
        if !self.hears && is_readable(self.wanted.as_fd())? {
            let _ = rustix::io::read(&self.wanted, &mut [0_u8]);
            self.hears = true;
            self.hear();
            if !self.is_raw {
                // As the terminal does with a job of the background that reads.
                self.stop(Signal::SIGTTIN)?;
            }
        }
        if self.is_raw && self.typed.len() < BUFFER && !self.fill(|caller| (&caller.terminal, &mut caller.typed))? {
            // It hung up, and the program shall know, as from a terminal of its caller's.
            self.is_raw = false;
            process::kill(self.launcher.as_raw(), Signal::SIGHUP)?;
        }
        if self.printed.len() < BUFFER {
            self.fill(|caller| (&caller.controller, &mut caller.printed))?;
        }
        let Self { terminal, controller, typed, printed, .. } = self;
        flush(controller.as_fd(), typed);
        flush(terminal.as_fd(), printed);
        Ok(())
    }

    /// Reads what there is now. False if the other side is closed.
    fn fill(&mut self, of: impl Fn(&mut Self) -> (&OwnedFd, &mut Vec<u8>)) -> io::Result<bool> {
        let (from, into) = of(self);
        let mut buffer = [0; BUFFER];
        let read = terminal::read(from.as_fd(), &mut buffer)?;
        into.extend_from_slice(read.unwrap_or_default());
        Ok(read.is_none_or(|read| !read.is_empty()))
    }

    fn pass_on(&mut self, received: ReceivedSignal) -> io::Result<()> {
        if received.is(Signal::SIGCHLD) || received.from_self {
            return Ok(());
        }
        if received.is(Signal::SIGWINCH) {
            // Of a terminal that is gone, nobody needs the size.
            let _ = terminal::copy_size(self.terminal.as_fd(), &self.controller);
            return Ok(());
        }
        if received.is(Signal::SIGCONT) {
            self.hear();
        }
        process::kill_by_number(self.launcher.as_raw(), received.number)
    }

    /// Hears what is typed, if it is for the program and vpn-exec is in the foreground.
    fn hear(&mut self) {
        if self.hears && !self.is_raw && terminal::is_foreground(self.terminal.as_fd()) {
            // What cannot be set is of a terminal that is gone.
            self.is_raw = self.modes.raw().set(self.terminal.as_fd()).is_ok();
        }
    }

    /// Stops with the launcher, or because the program asks for input in the background, and goes on with it.
    fn stop(&mut self, signal: Signal) -> io::Result<()> {
        self.restore();
        terminal::stop_group(signal)?;
        // The shell may have changed them meanwhile, for itself and for what it runs next.
        if terminal::is_foreground(self.terminal.as_fd()) {
            self.modes = Modes::of(self.terminal.as_fd()).unwrap_or_else(|_| self.modes.clone());
        }
        let _ = terminal::copy_size(self.terminal.as_fd(), &self.controller);
        self.hear();
        process::kill(self.launcher.as_raw(), Signal::SIGCONT)
    }

    /// Prints what the launcher has left, and hands the terminal back.
    fn end(&mut self, ended: Outcome) -> io::Result<Outcome> {
        loop {
            let before = self.printed.len();
            self.fill(|caller| (&caller.controller, &mut caller.printed))?;
            if self.printed.len() == before {
                break;
            }
        }
        let mut entries = [PollFd::new(&self.terminal, PollFlags::OUT)];
        let is_gone = |entries: &[PollFd<'_>; 1]| entries[0].revents().intersects(PollFlags::HUP | PollFlags::ERR);
        while !self.printed.is_empty() {
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut entries, None))?;
            if is_gone(&entries) {
                break;
            }
            flush(self.terminal.as_fd(), &mut self.printed);
        }
        self.restore();
        Ok(ended)
    }

    fn restore(&mut self) {
        if std::mem::take(&mut self.is_raw) {
            // A terminal that is gone needs nothing.
            let _ = self.modes.set(self.terminal.as_fd());
        }
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        self.restore();
    }
}

/// Writes what there is room for. What a closed side does not take is lost, as with every terminal.
fn flush(to: BorrowedFd<'_>, data: &mut Vec<u8>) {
    match rustix::io::write(to, data) {
        Ok(length) => drop(data.drain(..length)),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
        Err(_) => data.clear(),
    }
}

fn is_readable(descriptor: BorrowedFd<'_>) -> io::Result<bool> {
    let ready = crate::linux::poll::wait_for(&[descriptor], Some(std::time::Duration::ZERO))?;
    Ok(ready == [true])
}

impl OwnTerminal {
    /// Makes the program a job of its own, which it is before it is executed.
    pub(super) fn begin(&self, program: Pid) -> io::Result<()> {
        nix::unistd::setpgid(program, program)?;
        if self.is_interactive { terminal::set_foreground(&self.terminal, program.as_raw()) } else { Ok(()) }
    }

    /// Puts a process that has stopped because it wants the terminal, and its group, into the foreground. False if it has stopped for
    /// another reason.
    pub(super) fn grant(&self, process: i32, signal: i32) -> io::Result<bool> {
        if ![Signal::SIGTTIN, Signal::SIGTTOU].iter().any(|stops| *stops as i32 == signal) {
            return Ok(false);
        }
        let Ok(group) = nix::unistd::getpgid(Some(Pid::from_raw(process))) else { return Ok(false) };
        terminal::set_foreground(&self.terminal, group.as_raw())?;
        nix::sys::signal::killpg(group, Signal::SIGCONT)?;
        // One who has heard it already does not listen any more.
        let _ = rustix::io::write(&self.wants, &[1]);
        Ok(true)
    }

    /// The terminal's signals go to the launcher again, which passes them on to what the program has left behind.
    pub(super) fn end(&self) {
        if let Err(error) = terminal::set_foreground(&self.terminal, nix::unistd::getpgrp().as_raw()) {
            tracing::debug!(%error, "the launcher is not in the foreground of its terminal");
        }
    }

    /// The group that a signal is for which terminals send to all of a job. None for any other signal.
    pub(super) fn job(&self, program: Pid, received: ReceivedSignal) -> Option<Pid> {
        const OF_TERMINALS: [Signal; 5] =
            [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTSTP, Signal::SIGCONT, Signal::SIGHUP];
        let own = nix::unistd::getpgrp();
        let group = nix::unistd::getpgid(Some(program)).ok().filter(|group| *group != own);
        group.filter(|_| OF_TERMINALS.iter().any(|signal| received.is(*signal)))
    }
}
