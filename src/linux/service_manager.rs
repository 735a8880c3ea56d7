//! The notification protocol between a service and systemd (sd_notify(3)): datagrams with text to the socket that
//! `NOTIFY_SOCKET` names. Also the journal's stream (`JOURNAL_STREAM` of systemd.exec(5)).

use std::ffi::OsStr;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use rustix::fs::{AtFlags, CWD, Mode};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_passcred, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, UCred,
};
use rustix::process::Pid;

/// How long a send may wait for room in the manager's queue. A manager that hangs must not hang its services.
const PATIENCE: Duration = Duration::from_secs(1);

/// The maximum size of a notification in bytes (systemd's `NOTIFY_BUFFER_MAX`).
const MAX_TEXT: usize = 4096;

/// The maximum number of descriptors passed with a notification (`SCM_MAX_FD` of unix(7)).
const MAX_DESCRIPTORS: usize = 253;

/// The environment variable that names the manager's socket.
pub const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// The service manager that started the calling process.
#[derive(Debug)]
pub struct ServiceManager {
    socket: OwnedFd,
    address: SocketAddrUnix,
    watchdog: Option<Duration>,
}

impl ServiceManager {
    /// Returns the manager that the environment names, if any. `variable` reads the environment.
    ///
    /// # Errors
    /// Fails if `NOTIFY_SOCKET` is not the address of a unix socket.
    pub fn find(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> io::Result<Option<Self>> {
        let Some(name) = variable(NOTIFY_SOCKET).filter(|name| !name.is_empty()) else { return Ok(None) };
        let address = address(&name)?;
        let number = |name| variable(name)?.to_str()?.parse::<u64>().ok();
        let is_meant = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|usec| *usec > 0 && is_meant).map(Duration::from_micros);
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
        Ok(Some(Self { socket, address, watchdog }))
    }

    /// Returns the interval within which the manager expects `WATCHDOG=1`, if it expects it (sd_watchdog_enabled(3)).
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Sends a notification: lines of `NAME=value`.
    ///
    /// # Errors
    /// Fails as send(2) does, with `EAGAIN` if the manager's queue stays full for a second.
    pub fn notify(&self, text: &str) -> io::Result<()> {
        rustix::net::sendto(&self.socket, text.as_bytes(), SendFlags::NOSIGNAL, &self.address)?;
        Ok(())
    }

    /// Forwards the notification of another process with its descriptors. The manager sees `sender` as the sender if it
    /// is given, which needs CAP_SYS_ADMIN, and otherwise the calling process.
    ///
    /// # Errors
    /// Fails with `EPERM` without CAP_SYS_ADMIN, and as [`Self::notify`] does.
    pub fn forward(&self, text: &[u8], descriptors: &[OwnedFd], sender: Option<i32>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS), ScmCredentials(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        let mut fits = borrowed.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(&borrowed));
        if let Some(pid) = sender.and_then(Pid::from_raw) {
            let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
            fits &= ancillary.push(SendAncillaryMessage::ScmCredentials(UCred { pid, uid, gid }));
        }
        if !fits {
            return Err(io::Error::other("too many descriptors for one notification"));
        }
        let parts = [IoSlice::new(text)];
        rustix::net::sendmsg_addr(&self.socket, &self.address, &parts, &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

/// A notification socket for programs, whose notifications are forwarded to the real manager.
#[derive(Debug)]
pub struct NotifySocket(OwnedFd);

/// A notification of a service.
#[derive(Debug)]
pub struct Notification {
    /// The lines of `NAME=value`.
    pub text: Vec<u8>,
    /// The process ID of the sender. Zero if the sender is in a PID namespace that is not visible from here.
    pub sender: i32,
    /// The descriptors passed with it.
    pub descriptors: Vec<OwnedFd>,
}

impl NotifySocket {
    /// Creates a socket that is not bound to a path yet.
    ///
    /// # Errors
    /// Fails as socket(2) does.
    pub fn new() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        set_socket_passcred(&socket, true)?;
        Ok(Self(socket))
    }

    /// Binds the socket to a path, for all users.
    ///
    /// # Errors
    /// Fails as bind(2) and chmod(2) do.
    pub fn bind(&self, path: &Path) -> io::Result<()> {
        rustix::net::bind(&self.0, &SocketAddrUnix::new(path)?)?;
        Ok(rustix::fs::chmodat(CWD, path, Mode::from_raw_mode(0o666), AtFlags::empty())?)
    }

    /// Receives the next notification, or returns none if there is none.
    ///
    /// # Errors
    /// Fails as recvmsg(2) does.
    pub fn receive(&self) -> io::Result<Option<Notification>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS), ScmCredentials(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut text = vec![0; MAX_TEXT];
        let received = loop {
            let mut parts = [IoSliceMut::new(&mut text)];
            match rustix::net::recvmsg(&self.0, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                other => break other?,
            }
        };
        text.truncate(received.bytes);
        let (mut sender, mut descriptors) = (0, Vec::new());
        for message in ancillary.drain() {
            match message {
                RecvAncillaryMessage::ScmRights(passed) => descriptors.extend(passed),
                RecvAncillaryMessage::ScmCredentials(who) => sender = who.pid.as_raw_nonzero().get(),
                _ => {}
            }
        }
        Ok(Some(Notification { text, sender, descriptors }))
    }
}

impl AsFd for NotifySocket {
    /// Readable when a notification waits.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Parses a socket's address: a path, or `@` and the name of an abstract socket.
fn address(name: &OsStr) -> io::Result<SocketAddrUnix> {
    let invalid = || {
        let what = format!("{NOTIFY_SOCKET} is not the address of a unix socket: {}", name.display());
        io::Error::new(io::ErrorKind::InvalidInput, what)
    };
    match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddrUnix::new_abstract_name(rest).map_err(|_| invalid()),
        [b'/', ..] => SocketAddrUnix::new(Path::new(name)).map_err(|_| invalid()),
        _ => Err(invalid()),
    }
}

/// Returns the time of the manager's clock in microseconds (CLOCK_MONOTONIC), as in `MONOTONIC_USEC=`.
pub fn monotonic_usec() -> u128 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    now.as_micros()
}

/// Returns whether a descriptor is connected to the journal: it is the one that `JOURNAL_STREAM` names
/// (systemd.exec(5)).
pub fn is_journal(descriptor: BorrowedFd<'_>) -> bool {
    let named = std::env::var("JOURNAL_STREAM").ok();
    let numbers = named.as_ref().and_then(|stream| stream.split_once(':'));
    let Some((device, inode)) = numbers.and_then(|(one, other)| Some((one.parse().ok()?, other.parse().ok()?))) else {
        return false;
    };
    rustix::fs::fstat(descriptor).is_ok_and(|found| (found.st_dev, found.st_ino) == (device, inode))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables<'a>(list: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<std::ffi::OsString> + 'a {
        move |name| list.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).into())
    }

    #[test]
    fn without_a_socket_in_the_environment_there_is_no_manager() {
        for list in [&[][..], &[("NOTIFY_SOCKET", "")]] {
            assert!(ServiceManager::find(variables(list)).expect("no error").is_none());
        }
        let error = ServiceManager::find(variables(&[("NOTIFY_SOCKET", "vsock:2:1")])).expect_err("not a unix socket");
        assert!(error.to_string().contains("vsock:2:1"), "{error}");
    }

    #[test]
    fn a_watchdog_applies_to_the_process_that_it_names() {
        let own = std::process::id().to_string();
        let found = |pid: &str, usec: &str| {
            let list = [("NOTIFY_SOCKET", "/nowhere"), ("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)];
            ServiceManager::find(variables(&list)).expect("fine").expect("a manager").watchdog()
        };
        assert_eq!(found(&own, "3000000"), Some(Duration::from_secs(3)));
        assert_eq!((found("1", "3000000"), found(&own, "0")), (None, None));
    }
}
