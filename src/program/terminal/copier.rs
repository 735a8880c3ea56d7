//! The process at the caller's terminal: copies input and output between that and the program's terminal.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags};

use crate::failure::FAILED;
use crate::linux::process;
use crate::linux::signals::{ReceivedSignal, Signals};
use crate::linux::terminal::{self, Modes};
use crate::program::ProgramOutcome;

/// The maximum number of bytes that are held in each direction.
const BUFFER: usize = 16 * 1024;

/// The process at the caller's terminal. The terminal's modes are restored when this is dropped.
pub(super) struct Copier {
    terminal: OwnedFd,
    /// The original modes of the terminal.
    modes: Modes,
    is_raw: bool,
    /// The controlling end of the program's terminal.
    controller: OwnedFd,
    launcher: Pid,
    /// The pipe that is readable once the program asks for input.
    input_requested: OwnedFd,
    /// Whether the program has asked for input, or is interactive.
    wants_input: bool,
    /// Input that the program's terminal has no room for yet.
    input: Vec<u8>,
    /// Output that the caller's terminal has no room for yet.
    output: Vec<u8>,
}

impl Copier {
    /// Takes over the caller's `terminal`, and copies from and to `controller`.
    pub(super) fn new(
        terminal: OwnedFd,
        modes: Modes,
        controller: OwnedFd,
        launcher: Pid,
        input_requested: OwnedFd,
        wants_input: bool,
    ) -> Self {
        let (input, output) = (Vec::new(), Vec::new());
        let mut copier =
            Self { terminal, modes, is_raw: false, controller, launcher, input_requested, wants_input, input, output };
        copier.take_input();
        copier
    }

    /// Copies until the launcher ends. Returns how it ended.
    ///
    /// # Errors
    /// Returns the error of the system call that failed.
    pub(super) fn copy(&mut self, mut signals: Signals) -> io::Result<ProgramOutcome> {
        loop {
            match waitpid(self.launcher, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED)) {
                Ok(WaitStatus::Stopped(..)) => self.stop(Signal::SIGTSTP)?,
                Ok(WaitStatus::Exited(_, status)) => return self.end(ProgramOutcome::Exited(status)),
                Ok(WaitStatus::Signaled(_, signal, _)) => return self.end(ProgramOutcome::Signaled(signal as i32)),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                // nix reports a death by a real-time signal so.
                Err(nix::errno::Errno::EINVAL) => return self.end(ProgramOutcome::Exited(FAILED.into())),
                Err(error) => return Err(error.into()),
            }
            self.wait(&signals)?;
            while let Some(signal) = signals.receive()? {
                self.forward(signal)?;
            }
            self.copy_once()?;
        }
    }

    /// Waits for a signal, for input or output that can be copied, or for the program to ask for input.
    fn wait(&self, signals: &Signals) -> io::Result<()> {
        let interest = |is_open: bool, has_room: bool, has_data: bool| {
            let reading = if is_open && has_room { PollFlags::IN } else { PollFlags::empty() };
            reading | if has_data { PollFlags::OUT } else { PollFlags::empty() }
        };
        let terminal = interest(self.is_raw, self.input.len() < BUFFER, !self.output.is_empty());
        let controller = interest(true, self.output.len() < BUFFER, !self.input.is_empty());
        let entry = |descriptor, flags| PollFd::from_borrowed_fd(descriptor, flags);
        let mut entries = vec![entry(signals.as_fd(), PollFlags::IN)];
        let mut add = |descriptor, flags: PollFlags| {
            // poll(2) always reports a closed end, which would make this a busy loop.
            if !flags.is_empty() {
                entries.push(entry(descriptor, flags));
            }
        };
        add(self.terminal.as_fd(), terminal);
        add(self.controller.as_fd(), controller);
        add(self.input_requested.as_fd(), if self.wants_input { PollFlags::empty() } else { PollFlags::IN });
        match rustix::event::poll(&mut entries, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn copy_once(&mut self) -> io::Result<()> {
        if !self.wants_input && is_readable(self.input_requested.as_fd())? {
            let _ = rustix::io::read(&self.input_requested, &mut [0_u8]);
            self.wants_input = true;
            self.take_input();
            if !self.is_raw {
                // The terminal stops a background job that reads.
                self.stop(Signal::SIGTTIN)?;
            }
        }
        if self.is_raw && self.input.len() < BUFFER && !self.fill(|copier| (&copier.terminal, &mut copier.input))? {
            // The caller's terminal has hung up.
            self.is_raw = false;
            process::kill(self.launcher.as_raw(), Signal::SIGHUP)?;
        }
        if self.output.len() < BUFFER {
            self.fill(|copier| (&copier.controller, &mut copier.output))?;
        }
        let Self { terminal, controller, input, output, .. } = self;
        flush(controller.as_fd(), input);
        flush(terminal.as_fd(), output);
        Ok(())
    }

    /// Reads the available bytes. Returns false if the other end is closed.
    fn fill(&mut self, of: impl Fn(&mut Self) -> (&OwnedFd, &mut Vec<u8>)) -> io::Result<bool> {
        let (from, into) = of(self);
        let mut buffer = [0; BUFFER];
        let read = terminal::read(from.as_fd(), &mut buffer)?;
        into.extend_from_slice(read.unwrap_or_default());
        Ok(read.is_none_or(|read| !read.is_empty()))
    }

    fn forward(&mut self, signal: ReceivedSignal) -> io::Result<()> {
        if signal.is(Signal::SIGCHLD) || signal.from_self {
            return Ok(());
        }
        if signal.is(Signal::SIGWINCH) {
            // A terminal that has hung up has no size.
            let _ = terminal::copy_size(self.terminal.as_fd(), &self.controller);
            return Ok(());
        }
        if signal.is(Signal::SIGCONT) {
            self.take_input();
        }
        process::kill_by_number(self.launcher.as_raw(), signal.number)
    }

    /// Takes the terminal's input if the program wants it and vpn-exec is in the foreground: sets the raw mode.
    fn take_input(&mut self) {
        if self.wants_input && !self.is_raw && terminal::is_foreground(self.terminal.as_fd()) {
            // Fails only for a terminal that has hung up.
            self.is_raw = self.modes.raw().set(self.terminal.as_fd()).is_ok();
        }
    }

    /// Stops, as the launcher has stopped or the program asks for input in the background. Continues the launcher
    /// afterwards.
    fn stop(&mut self, signal: Signal) -> io::Result<()> {
        self.restore();
        terminal::stop_group(signal)?;
        // The shell may have changed the modes meanwhile.
        if terminal::is_foreground(self.terminal.as_fd()) {
            self.modes = Modes::of(self.terminal.as_fd()).unwrap_or_else(|_| self.modes.clone());
        }
        let _ = terminal::copy_size(self.terminal.as_fd(), &self.controller);
        self.take_input();
        process::kill(self.launcher.as_raw(), Signal::SIGCONT)
    }

    /// Copies the remaining output, and restores the terminal.
    fn end(&mut self, ended: ProgramOutcome) -> io::Result<ProgramOutcome> {
        loop {
            let before = self.output.len();
            self.fill(|copier| (&copier.controller, &mut copier.output))?;
            if self.output.len() == before {
                break;
            }
        }
        let mut entries = [PollFd::new(&self.terminal, PollFlags::OUT)];
        let is_gone = |entries: &[PollFd<'_>; 1]| entries[0].revents().intersects(PollFlags::HUP | PollFlags::ERR);
        while !self.output.is_empty() {
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut entries, None))?;
            if is_gone(&entries) {
                break;
            }
            flush(self.terminal.as_fd(), &mut self.output);
        }
        self.restore();
        Ok(ended)
    }

    fn restore(&mut self) {
        if std::mem::take(&mut self.is_raw) {
            // Fails only for a terminal that has hung up.
            let _ = self.modes.set(self.terminal.as_fd());
        }
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        self.restore();
    }
}

/// Writes the bytes that there is room for. Drops them all if the other end is closed, as terminals do.
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
