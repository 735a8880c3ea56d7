//! Terminals (tty(4)), pseudoterminals (pty(7)) and their foreground process groups.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use rustix::process::Pid;
use rustix::pty::OpenptFlags;

/// The two ends of a pseudoterminal.
#[derive(Debug)]
pub struct Pseudoterminal {
    /// The end of the process that stands for the user.
    pub controller: OwnedFd,
    /// The end that programs have as their terminal.
    pub terminal: OwnedFd,
}

/// Makes a pseudoterminal. Its two ends close at exec; the controller's end does not block.
///
/// # Errors
/// `ENOENT` without `/dev/ptmx`, `ENOSPC` if there are too many.
pub fn open_pseudoterminal() -> io::Result<Pseudoterminal> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let controller = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&controller)?;
    let terminal = rustix::pty::ioctl_tiocgptpeer(&controller, flags)?;
    rustix::io::ioctl_fionbio(&controller, true)?;
    Ok(Pseudoterminal { controller, terminal })
}

/// Opens the calling process's controlling terminal, for input and output that do not block. None if it has none.
pub fn controlling() -> Option<OwnedFd> {
    open("/dev/tty").ok()
}

/// Opens the terminal that a descriptor leads to anew, so that it can be read and written without blocking others who have it open.
///
/// # Errors
/// What open(2) says.
pub fn reopen(descriptor: i32) -> io::Result<OwnedFd> {
    open(&format!("/proc/self/fd/{descriptor}"))
}

fn open(path: &str) -> io::Result<OwnedFd> {
    let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
    Ok(OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?.into())
}

/// Whether a descriptor leads to a terminal.
pub fn is_terminal(descriptor: BorrowedFd<'_>) -> bool {
    rustix::termios::isatty(descriptor)
}

/// The device and the owner of the terminal that a descriptor leads to. None if it leads to none.
pub fn device_and_owner(descriptor: BorrowedFd<'_>) -> Option<(u64, u32)> {
    let status = rustix::fs::fstat(descriptor).ok().filter(|_| is_terminal(descriptor))?;
    Some((status.st_rdev as u64, status.st_uid))
}

/// The device of the calling process's controlling terminal. None if it has none.
pub fn controlling_device() -> Option<u64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The name, in parentheses, may hold anything; the terminal is the fifth field after it (proc_pid_stat(5)).
    let number: u32 = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(4)?.parse::<i32>().ok()?.cast_unsigned();
    let (major, minor) = (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xf_ff00);
    (number != 0).then(|| libc::makedev(major, minor))
}

/// The owner of a terminal of which only the device is known. None if it is in none of the usual places.
pub fn owner(device: u64) -> Option<u32> {
    let minor = libc::minor(device);
    // The kernel's Documentation/admin-guide/devices.txt.
    let path = match libc::major(device) {
        136 => format!("/dev/pts/{minor}"),
        4 if minor < 64 => format!("/dev/tty{minor}"),
        4 => format!("/dev/ttyS{}", minor - 64),
        _ => return None,
    };
    let found = fs::metadata(path).ok().filter(|found| found.rdev() == device)?;
    Some(found.uid())
}

/// Gives a terminal to a user. Its group and its mode stay as the system has them for all.
///
/// # Errors
/// `EPERM` without CAP_CHOWN, unless it is that user's already.
pub fn give_to(terminal: &OwnedFd, user: u32) -> io::Result<()> {
    std::os::unix::fs::fchown(terminal, Some(user), None)
}

/// Makes the calling process the leader of a new session whose controlling terminal this is.
///
/// # Errors
/// `EPERM` if the process leads a process group.
pub fn lead_session(terminal: &OwnedFd) -> io::Result<()> {
    rustix::process::setsid()?;
    Ok(rustix::process::ioctl_tiocsctty(terminal)?)
}

/// Has those of the standard descriptors that lead to a terminal lead to this one.
///
/// # Errors
/// What dup2(2) says.
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

/// Makes a process group the foreground one of a terminal. The caller's group may be in the background.
///
/// # Errors
/// `ENOTTY` if this is not the caller's controlling terminal, `ESRCH` without such a group.
pub fn set_foreground(terminal: &OwnedFd, group: i32) -> io::Result<()> {
    let group = Pid::from_raw(group).ok_or(io::ErrorKind::InvalidInput)?;
    // The kernel lets a group of the background do this only if it would not be stopped for it.
    let mut former = SigSet::empty();
    let stops = SigSet::from_iter([Signal::SIGTTOU]);
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&stops), Some(&mut former))?;
    let done = rustix::termios::tcsetpgrp(terminal, group);
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&former), None)?;
    Ok(done?)
}

/// Whether the calling process is in the foreground of a terminal. So is everyone at a terminal that is nobody's controlling one.
pub fn is_foreground(terminal: BorrowedFd<'_>) -> bool {
    rustix::termios::tcgetpgrp(terminal).map_or(true, |group| group == rustix::process::getpgrp())
}

/// Stops the calling process's group, as the terminal does, and returns when it goes on. A group that no shell controls does not stop
/// (orphaned, in setpgid(2)), nor does a process that ignores the signal.
///
/// # Errors
/// What kill(2) and sigprocmask(2) say.
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
    /// Reads them.
    ///
    /// # Errors
    /// `ENOTTY` if it is not a terminal.
    pub fn of(terminal: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self(rustix::termios::tcgetattr(terminal)?))
    }

    /// The same with nothing done to what is typed or printed: another terminal does that.
    pub fn raw(&self) -> Self {
        let mut raw = self.0.clone();
        raw.make_raw();
        Self(raw)
    }

    /// Sets them, once what was printed before is out.
    ///
    /// # Errors
    /// What tcsetattr(3) says.
    pub fn set(&self, terminal: BorrowedFd<'_>) -> io::Result<()> {
        Ok(rustix::termios::tcsetattr(terminal, rustix::termios::OptionalActions::Drain, &self.0)?)
    }
}

/// Gives a terminal the size of another, of whose change the foreground group is told (SIGWINCH).
///
/// # Errors
/// `ENOTTY` if one of them is not a terminal.
pub fn copy_size(from: BorrowedFd<'_>, to: &OwnedFd) -> io::Result<()> {
    Ok(rustix::termios::tcsetwinsize(to, rustix::termios::tcgetwinsize(from)?)?)
}

/// Reads from a descriptor that does not block. None if there is nothing now; an empty part at its end, which a terminal's closed other
/// side is, too.
///
/// # Errors
/// What read(2) says.
pub fn read<'a>(descriptor: BorrowedFd<'_>, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
    match rustix::io::retry_on_intr(|| rustix::io::read(descriptor, &mut *buffer)) {
        Ok(length) => Ok(Some(&buffer[..length])),
        Err(rustix::io::Errno::AGAIN) => Ok(None),
        Err(rustix::io::Errno::IO) => Ok(Some(&[])),
        Err(error) => Err(error.into()),
    }
}
