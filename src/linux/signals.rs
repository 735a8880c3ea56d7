//! Signals as a stream (signalfd(2)). No handler is ever installed, so a disposition that was inherited (nohup's ignored
//! SIGHUP, say) reaches the program as it came.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// `si_code` of a signal that the kernel itself sent, as the terminal does for Ctrl-C (sigaction(2)).
const SI_KERNEL: i32 = 0x80;

/// Blocked signals, to be read one by one.
#[derive(Debug)]
pub struct Signals {
    descriptor: SignalFd,
    before: InheritedSignals,
}

/// What of signals was inherited and is changed while they are watched, so that a program can get it as it came.
#[derive(Clone, Copy, Debug)]
pub struct InheritedSignals {
    mask: SigSet,
    children_ignored: bool,
}

impl InheritedSignals {
    /// Restores it in the calling thread, for a program about to be executed.
    pub fn restore(&self) -> io::Result<()> {
        if self.children_ignored {
            // SAFETY: SIG_IGN installs no handler, so there is none that could be unsafe.
            unsafe { nix::sys::signal::signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
        }
        set_mask(&self.mask)
    }
}

/// A signal that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceivedSignal {
    /// Which: its number, since the real-time signals have no names (signal(7)).
    pub number: i32,
    /// Whether the kernel sent it: then a terminal sent it, to every process of the foreground group alike.
    pub from_kernel: bool,
    /// Whether the calling process has sent it itself, as to a group that it belongs to.
    pub from_self: bool,
    /// The process that has sent it, unless it was the kernel. Zero if that is in a PID namespace that cannot be seen from here.
    pub sender: i32,
}

impl ReceivedSignal {
    /// Whether it is this signal.
    pub fn is(&self, signal: Signal) -> bool {
        self.number == signal as i32
    }
}

/// The numbers of the real-time signals that are free for programs.
pub fn real_time_numbers() -> RangeInclusive<i32> {
    libc::SIGRTMIN()..=libc::SIGRTMAX()
}

impl Signals {
    /// Blocks signals, given by their numbers, in the calling thread and in threads and processes that it makes later, and lets them be read. Children are
    /// waited for from now on: where SIGCHLD was inherited as ignored, the kernel would hide their ends (wait(2)).
    pub fn block(numbers: impl IntoIterator<Item = i32>) -> io::Result<Self> {
        // SAFETY: SIG_DFL installs no handler, so there is none that could be unsafe.
        let children = unsafe { nix::sys::signal::signal(Signal::SIGCHLD, SigHandler::SigDfl) }?;
        let set = set_of(numbers);
        let mut before = SigSet::empty();
        pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&set), Some(&mut before))?;
        let descriptor = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let before = InheritedSignals { mask: before, children_ignored: matches!(children, SigHandler::SigIgn) };
        Ok(Self { descriptor, before })
    }

    /// Blocks all signals, and lets some be read, for a process that ends in order whatever is sent to it.
    pub fn block_all_but_read(signals: &[Signal]) -> io::Result<Self> {
        let read = Self::block(signals.iter().map(|signal| *signal as i32))?;
        set_mask(&SigSet::all())?;
        Ok(read)
    }

    /// What was inherited, as it was before [`Self::block`].
    pub fn inherited(&self) -> InheritedSignals {
        self.before
    }

    /// The next signal, if there is one.
    pub fn receive(&mut self) -> io::Result<Option<ReceivedSignal>> {
        let Some(info) = self.descriptor.read_signal()? else { return Ok(None) };
        let from_kernel = info.ssi_code == SI_KERNEL;
        let from_self = !from_kernel && info.ssi_pid == std::process::id();
        let (number, sender) = (info.ssi_signo.cast_signed(), info.ssi_pid.cast_signed());
        Ok(Some(ReceivedSignal { number, from_kernel, from_self, sender }))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// The set of these numbers. What is none of a signal is left out.
fn set_of(numbers: impl IntoIterator<Item = i32>) -> SigSet {
    // SAFETY: `set` is plain data for which all zeros is valid, is made empty first, and holds what sigaddset(3) has put into it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for number in numbers {
            libc::sigaddset(&raw mut set, number);
        }
        SigSet::from_sigset_t_unchecked(set)
    }
}

/// Sets the calling thread's mask.
pub fn set_mask(mask: &SigSet) -> io::Result<()> {
    Ok(pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(mask), None)?)
}

/// Has a command start with no signal blocked, whatever the calling thread blocks.
pub fn unblock_all_in(command: &mut Command) {
    // SAFETY: setting the mask is safe between fork and exec (signal-safety(7)), and nothing else is done there.
    unsafe { command.pre_exec(|| set_mask(&SigSet::empty())) };
}

/// Restores the default action of SIGPIPE, which Rust's runtime ignores from the start, for a program about to be executed.
pub fn restore_sigpipe() -> io::Result<()> {
    // SAFETY: SIG_DFL installs no handler, so there is none that could be unsafe.
    unsafe { nix::sys::signal::signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
    Ok(())
}

/// Whether the calling process ignores a signal, given by its number.
pub fn is_ignored(number: i32) -> io::Result<bool> {
    // SAFETY: `sigaction` is plain data for which all zeros is valid; without a new action nothing is changed.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        match libc::sigaction(number, std::ptr::null(), &raw mut action) {
            0 => Ok(action.sa_sigaction == libc::SIG_IGN),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Stops the calling process until SIGCONT.
pub fn stop_self() -> io::Result<()> {
    Ok(nix::sys::signal::raise(Signal::SIGSTOP)?)
}

/// Ends the calling process by a signal, so that its parent sees what ended the program. Takes a number, since a program may be
/// ended by a real-time signal, too (signal(7)). Returns only if the signal does not end a process. No core is dumped: the process
/// that deserved one was the program.
pub fn die_by_signal(signal: i32) -> io::Result<()> {
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0)?;
    // SAFETY: SIG_DFL installs no handler, so there is none that could be unsafe; `set` is a live signal set, and made empty first.
    // What may not be asked of SIGKILL fails, and need not be done.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::signal(signal, libc::SIG_DFL);
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        if libc::raise(signal) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
