//! Signals as a stream (signalfd(2)).
//!
//! No handler is ever installed, so the program gets the dispositions that the launcher inherited, such as nohup's
//! ignored SIGHUP.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use signal_hook::low_level::emulate_default_handler;

/// The `si_code` of a signal from the kernel itself, such as the terminal's SIGINT for Ctrl-C (sigaction(2)).
const SI_KERNEL: i32 = 0x80;

/// The `si_code` of a signal that kill(2) sent.
const SI_USER: i32 = 0;

/// The `si_code` of a signal that tgkill(2) sent.
const SI_TKILL: i32 = -6;

/// Blocked signals, to be read one by one.
#[derive(Debug)]
pub struct Signals {
    descriptor: SignalFd,
    before: InheritedSignals,
}

/// The signal mask and the disposition of SIGCHLD that this process inherited.
#[derive(Clone, Copy, Debug)]
pub struct InheritedSignals {
    mask: SigSet,
    children_ignored: bool,
}

impl InheritedSignals {
    /// Restores the inherited state in the calling thread, before it executes a program.
    ///
    /// # Errors
    /// Fails as sigaction(2) and sigprocmask(2) do.
    pub fn restore(&self) -> io::Result<()> {
        if self.children_ignored {
            // SAFETY: SIG_IGN installs no handler that could be unsafe.
            unsafe { nix::sys::signal::signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
        }
        set_mask(&self.mask)
    }
}

/// A signal that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceivedSignal {
    /// The number of the signal. Real-time signals have no names (signal(7)).
    pub number: i32,
    /// Whether the kernel sent the signal. A terminal sends its signals to all processes of the foreground group.
    pub from_kernel: bool,
    /// Whether the calling process sent the signal itself, for example to its own process group.
    pub from_self: bool,
    /// The process that sent the signal. Zero for the kernel, and for a process in a PID namespace that is not visible
    /// from here.
    pub sender: i32,
    /// Whether the kernel vouches for the sender. A process that queues a signal names the
    /// sender itself (rt_sigqueueinfo(2)).
    pub is_sender_certain: bool,
}

impl ReceivedSignal {
    /// Returns whether the signal is `signal`.
    pub fn is(&self, signal: Signal) -> bool {
        self.number == signal as i32
    }
}

/// Returns the numbers of the real-time signals that the C library leaves to programs.
pub fn real_time_numbers() -> RangeInclusive<i32> {
    libc::SIGRTMIN()..=libc::SIGRTMAX()
}

impl Signals {
    /// Blocks signals, given by their numbers, in the calling thread and its future threads and children, and makes
    /// them readable.
    ///
    /// The disposition of SIGCHLD becomes the default. If it was inherited as ignored, the kernel would hide how
    /// children end (wait(2)).
    ///
    /// # Errors
    /// Fails as sigaction(2), sigprocmask(2) and signalfd(2) do.
    pub fn block(numbers: impl IntoIterator<Item = i32>) -> io::Result<Self> {
        // SAFETY: SIG_DFL installs no handler that could be unsafe.
        let children = unsafe { nix::sys::signal::signal(Signal::SIGCHLD, SigHandler::SigDfl) }?;
        let set = set_of(numbers);
        let mut before = SigSet::empty();
        pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&set), Some(&mut before))?;
        let descriptor = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let before = InheritedSignals { mask: before, children_ignored: matches!(children, SigHandler::SigIgn) };
        Ok(Self { descriptor, before })
    }

    /// Blocks all signals and makes `signals` readable, for a process that must finish its work whatever it is sent.
    ///
    /// # Errors
    /// Fails as [`Self::block`] does.
    pub fn block_all_but_read(signals: &[Signal]) -> io::Result<Self> {
        let read = Self::block(signals.iter().map(|signal| *signal as i32))?;
        set_mask(&SigSet::all())?;
        Ok(read)
    }

    /// Returns the state before [`Self::block`].
    pub fn inherited(&self) -> InheritedSignals {
        self.before
    }

    /// Returns the next signal, or none if no signal is pending.
    ///
    /// # Errors
    /// Fails as read(2) does.
    pub fn receive(&mut self) -> io::Result<Option<ReceivedSignal>> {
        let Some(info) = self.descriptor.read_signal()? else { return Ok(None) };
        let from_kernel = info.ssi_code == SI_KERNEL;
        let from_self = !from_kernel && info.ssi_pid == std::process::id();
        let (number, sender) = (info.ssi_signo.cast_signed(), info.ssi_pid.cast_signed());
        let is_sender_certain = from_kernel || [SI_USER, SI_TKILL].contains(&info.ssi_code);
        Ok(Some(ReceivedSignal { number, from_kernel, from_self, sender, is_sender_certain }))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Returns the set of these numbers, without those that are not signals.
fn set_of(numbers: impl IntoIterator<Item = i32>) -> SigSet {
    // SAFETY: `set` is plain data for which all zeros is valid. sigemptyset(3) initializes it, and sigaddset(3) fills
    // it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for number in numbers {
            libc::sigaddset(&raw mut set, number);
        }
        SigSet::from_sigset_t_unchecked(set)
    }
}

/// Sets the calling thread's signal mask.
///
/// # Errors
/// Fails as sigprocmask(2) does.
pub fn set_mask(mask: &SigSet) -> io::Result<()> {
    Ok(pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(mask), None)?)
}

/// Makes a command start with no signal blocked, whatever the calling thread blocks.
pub fn unblock_all_in(command: &mut Command) {
    // SAFETY: setting the mask is async-signal-safe (signal-safety(7)), and the closure does nothing else.
    unsafe { command.pre_exec(|| set_mask(&SigSet::empty())) };
}

/// Restores the default action of SIGPIPE, which Rust's runtime ignores, before a program is executed.
///
/// # Errors
/// Fails as sigaction(2) does.
pub fn restore_sigpipe() -> io::Result<()> {
    // SAFETY: SIG_DFL installs no handler that could be unsafe.
    unsafe { nix::sys::signal::signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
    Ok(())
}

/// Returns whether the calling process ignores a signal, given by its number.
///
/// # Errors
/// Fails with `EINVAL` if there is no such signal.
pub fn is_ignored(number: i32) -> io::Result<bool> {
    // SAFETY: `sigaction` is plain data for which all zeros is valid. Without a new action the call changes nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        match libc::sigaction(number, std::ptr::null(), &raw mut action) {
            0 => Ok(action.sa_sigaction == libc::SIG_IGN),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Stops the calling process until SIGCONT, as SIGTSTP does by default.
///
/// # Errors
/// Fails as raise(3) does.
pub fn stop_self() -> io::Result<()> {
    emulate_default_handler(libc::SIGTSTP)
}

/// Ends the calling process by a signal, so that its parent sees how the program ended.
///
/// The signal is given by its number, which may be a real-time signal's. No core is dumped, since the process that
/// crashed was the program. Returns if the signal does not end the process.
///
/// # Errors
/// Fails with `EINVAL` if there is no such signal.
pub fn die_by_signal(number: i32) -> io::Result<()> {
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0)?;
    if std::process::id() == 1 {
        // The kernel ignores a signal whose action is the default if the init process of a PID namespace sends it to
        // itself (pid_namespaces(7)). signal-hook would then abort.
        return Ok(());
    }
    match emulate_default_handler(number) {
        // Signals that signal-hook has no name for: the real-time signals, SIGPWR and SIGSTKFLT.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => raise_by_default(number),
        other => other,
    }
}

/// Raises a signal with its default action, unblocked.
fn raise_by_default(number: i32) -> io::Result<()> {
    // SAFETY: SIG_DFL installs no handler that could be unsafe.
    if unsafe { libc::signal(number, libc::SIG_DFL) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    pthread_sigmask(SigmaskHow::SIG_UNBLOCK, Some(&set_of([number])), None)?;
    // SAFETY: raise(3) only sends a signal.
    match unsafe { libc::raise(number) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
