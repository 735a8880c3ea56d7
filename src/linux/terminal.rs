//! Terminals (tty(4)), pseudoterminals (pty(7)) and their foreground process groups.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use rustix::process::Pid;
use rustix::pty::OpenptFlags;

use super::process::inspection::stat_fields;

/// The two ends of a pseudoterminal.
#[derive(Debug)]
pub struct Pseudoterminal {
    /// The end of the process that acts for the user (the master).
    pub controller: OwnedFd,
    /// The end that is the program's terminal (the slave).
    pub terminal: OwnedFd,
}

/// Opens a pseudoterminal. Both ends are closed on exec. The controller does not block.
///
/// # Errors
/// Fails with `ENOENT` without `/dev/ptmx`, and with `ENOSPC` at the limit of pseudoterminals.
pub fn open_pseudoterminal() -> io::Result<Pseudoterminal> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let controller = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&controller)?;
    let terminal = rustix::pty::ioctl_tiocgptpeer(&controller, flags)?;
    rustix::io::ioctl_fionbio(&controller, true)?;
    Ok(Pseudoterminal { controller, terminal })
}

/// Opens the calling process's controlling terminal without blocking I/O, or returns none if it has none.
pub fn controlling() -> Option<OwnedFd> {
    open("/dev/tty").ok()
}

/// Reopens the terminal of a descriptor without blocking I/O. Other processes that have it open are not affected.
///
/// # Errors
/// Fails as open(2) does.
pub fn reopen(descriptor: i32) -> io::Result<OwnedFd> {
    open(&format!("/proc/self/fd/{descriptor}"))
}

fn open(path: &str) -> io::Result<OwnedFd> {
    let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
    Ok(OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?.into())
}

/// Returns whether a descriptor refers to a terminal.
pub fn is_terminal(descriptor: BorrowedFd<'_>) -> bool {
    rustix::termios::isatty(descriptor)
}

/// Returns the device and the owner of a descriptor's terminal, or none if it does not refer to a terminal.
pub fn device_and_owner(descriptor: BorrowedFd<'_>) -> Option<(u64, u32)> {
    let status = rustix::fs::fstat(descriptor).ok().filter(|_| is_terminal(descriptor))?;
    Some((status.st_rdev as u64, status.st_uid))
}

/// Returns the device of the calling process's controlling terminal, or none if it has none.
pub fn controlling_device() -> Option<u64> {
    /// The controlling terminal (`tty_nr`) in [`stat_fields`].
    const TERMINAL: usize = 4;

    let fields = stat_fields("self").ok()?;
    let number = fields.get(TERMINAL)?.parse::<i32>().ok()?.cast_unsigned();
    // The format of the kernel's new_encode_dev() (include/linux/kdev_t.h).
    let (major, minor) = (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xf_ff00);
    (number != 0).then(|| libc::makedev(major, minor))
}

/// Returns the owner of the terminal with a device number, or none if it is not at one of the usual paths.
pub fn owner(device: u64) -> Option<u32> {
    let minor = libc::minor(device);
    // The device numbers of the kernel's Documentation/admin-guide/devices.txt.
    let path = match libc::major(device) {
        136 => format!("/dev/pts/{minor}"),
        4 if minor < 64 => format!("/dev/tty{minor}"),
        4 => format!("/dev/ttyS{}", minor - 64),
        _ => return None,
    };
    let found = fs::metadata(path).ok().filter(|found| found.rdev() == device)?;
    Some(found.uid())
}

/// Makes a user the owner of a terminal. Its group and mode stay the same.
///
/// # Errors
/// Fails with `EPERM` without CAP_CHOWN, unless the user is the owner already.
pub fn give_to(terminal: &OwnedFd, user: u32) -> io::Result<()> {
    std::os::unix::fs::fchown(terminal, Some(user), None)
}

/// Makes the calling process the leader of a new session with this controlling terminal.
///
/// # Errors
/// Fails with `EPERM` if the process leads a process group.
pub fn lead_session(terminal: &OwnedFd) -> io::Result<()> {
    rustix::process::setsid()?;
    Ok(rustix::process::ioctl_tiocsctty(terminal)?)
}

/// Redirects the standard descriptors that refer to a terminal to this terminal.
///
/// # Errors
/// Fails as dup2(2) does.
pub fn replace_standard(terminal: &OwnedFd) -> io::Result<()> {
    if is_terminal(io::stdin().as_fd()) {
        rustix::stdio::dup2_stdin(terminal)?;
    }
    if is_terminal(io::stdout().as_fd()) {
        rustix::stdio::dup2_stdout(terminal)?;
    }
    if is_terminal(io::stderr().as_fd()) {
        rustix::stdio::dup2_stderr(terminal)?;
    }
    Ok(())
}

/// Makes a process group the foreground group of a terminal. The caller's group may be in the background.
///
/// # Errors
/// Fails with `ENOTTY` if this is not the caller's controlling terminal, and with `ESRCH` if there is no such group.
pub fn set_foreground(terminal: &OwnedFd, group: i32) -> io::Result<()> {
    let group = Pid::from_raw(group).ok_or(io::ErrorKind::InvalidInput)?;
    // The kernel sends SIGTTOU to a background group that does this, unless the signal is blocked or ignored.
    let mut former = SigSet::empty();
    let stops = SigSet::from_iter([Signal::SIGTTOU]);
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&stops), Some(&mut former))?;
    let done = rustix::termios::tcsetpgrp(terminal, group);
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&former), None)?;
    Ok(done?)
}

/// Returns whether the calling process is in the foreground of a terminal. A terminal that is not its controlling
/// terminal has no foreground group, so the answer is yes.
pub fn is_foreground(terminal: BorrowedFd<'_>) -> bool {
    rustix::termios::tcgetpgrp(terminal).map_or(true, |group| group == rustix::process::getpgrp())
}

/// Stops the calling process's group, as the terminal does, and returns when it continues. An orphaned process group
/// (setpgid(2)) does not stop, nor does a process that ignores the signal.
///
/// # Errors
/// Fails as kill(2) and sigprocmask(2) do.
pub fn stop_group(signal: Signal) -> io::Result<()> {
    let mut former = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_UNBLOCK, Some(&SigSet::from_iter([signal])), Some(&mut former))?;
    let sent = nix::sys::signal::killpg(nix::unistd::getpgrp(), signal);
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&former), None)?;
    Ok(sent?)
}

/// The modes of a terminal (termios(3)).
#[derive(Clone, Debug)]
pub struct Modes(rustix::termios::Termios);

impl Modes {
    /// Reads the modes of a terminal.
    ///
    /// # Errors
    /// Fails with `ENOTTY` if the descriptor is not a terminal.
    pub fn of(terminal: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self(rustix::termios::tcgetattr(terminal)?))
    }

    /// Returns raw modes, in which input and output are not processed (`cfmakeraw` of termios(3)).
    pub fn raw(&self) -> Self {
        let mut raw = self.0.clone();
        raw.make_raw();
        Self(raw)
    }

    /// Sets the modes of a terminal after its pending output was written.
    ///
    /// # Errors
    /// Fails as tcsetattr(3) does.
    pub fn set(&self, terminal: BorrowedFd<'_>) -> io::Result<()> {
        Ok(rustix::termios::tcsetattr(terminal, rustix::termios::OptionalActions::Drain, &self.0)?)
    }
}

/// Copies the size of a terminal to another one. The kernel sends SIGWINCH to the other's foreground group.
///
/// # Errors
/// Fails with `ENOTTY` if one of them is not a terminal.
pub fn copy_size(from: BorrowedFd<'_>, to: &OwnedFd) -> io::Result<()> {
    Ok(rustix::termios::tcsetwinsize(to, rustix::termios::tcgetwinsize(from)?)?)
}

/// Reads from a descriptor that does not block. Returns none if there is no data yet, and an empty slice at the end of
/// the data, or if the other end of a pseudoterminal is closed.
///
/// # Errors
/// Fails as read(2) does.
pub fn read<'a>(descriptor: BorrowedFd<'_>, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
    match rustix::io::retry_on_intr(|| rustix::io::read(descriptor, &mut *buffer)) {
        Ok(length) => Ok(Some(&buffer[..length])),
        Err(rustix::io::Errno::AGAIN) => Ok(None),
        Err(rustix::io::Errno::IO) => Ok(Some(&[])),
        Err(error) => Err(error.into()),
    }
}
