//! Signals as a stream (signalfd(2)). No handler is ever installed, so a disposition that was inherited (nohup's ignored
//! SIGHUP, say) reaches the program as it came.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// `si_code` of a signal that the kernel itself sent, as the terminal does for Ctrl-C (sigaction(2)).
const SI_KERNEL: i32 = 0x80;

/// Blocked signals, to be read one by one.
#[derive(Debug)]
pub struct Signals {
    descriptor: SignalFd,
    before: SigSet,
}

/// A signal that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Which.
    pub signal: Signal,
    /// Whether the kernel sent it: then a terminal sent it, to every process of the foreground group alike.
    pub from_kernel: bool,
}

impl Signals {
    /// Blocks `signals` in the calling thread and in threads and processes that it makes later, and lets them be read.
    pub fn block(signals: &[Signal]) -> io::Result<Self> {
        let set: SigSet = signals.iter().copied().collect();
        let mut before = SigSet::empty();
        pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&set), Some(&mut before))?;
        let descriptor = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { descriptor, before })
    }

    /// The mask as it was before [`Self::block`].
    pub fn mask_before(&self) -> SigSet {
        self.before
    }

    /// The next signal, if there is one.
    pub fn receive(&mut self) -> io::Result<Option<Received>> {
        let Some(info) = self.descriptor.read_signal()? else { return Ok(None) };
        let signal = Signal::try_from(info.ssi_signo as i32)?;
        Ok(Some(Received { signal, from_kernel: info.ssi_code == SI_KERNEL }))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Sets the calling thread's mask.
pub fn set_mask(mask: &SigSet) -> io::Result<()> {
    Ok(pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(mask), None)?)
}

/// Restores the default action of SIGPIPE, which Rust's runtime ignores from the start, for a program about to be executed.
pub fn restore_sigpipe() -> io::Result<()> {
    // SAFETY: SIG_DFL installs no handler, so there is none that could be unsafe.
    unsafe { nix::sys::signal::signal(Signal::SIGPIPE, nix::sys::signal::SigHandler::SigDfl) }?;
    Ok(())
}

/// Ends the calling process by `signal`, so that its parent sees what ended the program. Returns only if the signal does not
/// end a process. No core is dumped: the process that deserved one was the program.
pub fn die_by(signal: Signal) -> io::Result<()> {
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0)?;
    // SIGKILL always has its default action, and nothing else may be asked of it.
    if signal != Signal::SIGKILL {
        // SAFETY: SIG_DFL installs no handler, so there is none that could be unsafe.
        unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigDfl) }?;
    }
    let set: SigSet = std::iter::once(signal).collect();
    pthread_sigmask(SigmaskHow::SIG_UNBLOCK, Some(&set), None)?;
    nix::sys::signal::raise(signal)?;
    Ok(())
}
