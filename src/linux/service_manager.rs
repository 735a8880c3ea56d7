//! What a service tells its manager (sd_notify(3)), by the manager's own protocol: texts in datagrams to the socket that it names in
//! the environment.

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

/// How long a manager may take to make room for a message. One that does not answer shall not hang its services.
const PATIENCE: Duration = Duration::from_secs(1);

/// The most bytes of a message: what systemd takes (its `NOTIFY_BUFFER_MAX`).
const LONGEST: usize = 4096;

/// The most descriptors that pass with a message: SCM_MAX_FD of unix(7).
const MOST_DESCRIPTORS: usize = 253;

/// The variable that names the socket.
pub const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// The manager of the calling process, which is a service.
#[derive(Debug)]
pub struct ServiceManager {
    socket: OwnedFd,
    address: SocketAddrUnix,
    watchdog: Option<Duration>,
}

impl ServiceManager {
    /// The one that the environment names, if any. `variable` reads the environment.
    ///
    /// # Errors
    /// If it names a socket of another kind.
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

    /// How often it must be told that the service lives, if it wants to be (sd_watchdog_enabled(3)).
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Tells it something: lines of `NAME=value`.
    pub fn tell(&self, text: &str) -> io::Result<()> {
        rustix::net::sendto(&self.socket, text.as_bytes(), SendFlags::NOSIGNAL, &self.address)?;
        Ok(())
    }
}

impl ServiceManager {
    /// Tells it what another process has said, with the descriptors that it has passed. By `sender` the manager sees who that was, which
    /// takes CAP_SYS_ADMIN; without, it was the calling process.
    pub fn forward(&self, text: &[u8], descriptors: &[OwnedFd], sender: Option<i32>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS), ScmCredentials(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        let mut fits = borrowed.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(&borrowed));
        if let Some(pid) = sender.and_then(Pid::from_raw) {
            let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
            fits &= ancillary.push(SendAncillaryMessage::ScmCredentials(UCred { pid, uid, gid }));
        }
        if !fits {
            return Err(io::Error::other("there is no room for so many descriptors"));
        }
        let parts = [IoSlice::new(text)];
        rustix::net::sendmsg_addr(&self.socket, &self.address, &parts, &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

/// The socket of somebody who stands between services and their manager.
#[derive(Debug)]
pub struct NotifySocket(OwnedFd);

/// What a service has said.
#[derive(Debug)]
pub struct Notification {
    /// Lines of `NAME=value`.
    pub text: Vec<u8>,
    /// Who has said it. Zero if it is in a PID namespace that cannot be seen from here.
    pub sender: i32,
    /// What came with it.
    pub descriptors: Vec<OwnedFd>,
}

impl NotifySocket {
    /// Makes one that nobody can reach yet.
    pub fn new() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        set_socket_passcred(&socket, true)?;
        Ok(Self(socket))
    }

    /// Lets everybody who sees a path reach it there.
    pub fn bind(&self, path: &Path) -> io::Result<()> {
        rustix::net::bind(&self.0, &SocketAddrUnix::new(path)?)?;
        Ok(rustix::fs::chmodat(CWD, path, Mode::from_raw_mode(0o666), AtFlags::empty())?)
    }

    /// The next message, if there is one.
    pub fn receive(&self) -> io::Result<Option<Notification>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS), ScmCredentials(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut text = vec![0; LONGEST];
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
    /// Readable when there is a message.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The address of the socket that the environment names: a path, or with a `@` a name that is in no file system.
fn address(name: &OsStr) -> io::Result<SocketAddrUnix> {
    let invalid = || {
        let what = format!("{NOTIFY_SOCKET} is {}, which is no local socket's address", name.display());
        io::Error::new(io::ErrorKind::InvalidInput, what)
    };
    match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddrUnix::new_abstract_name(rest).map_err(|_| invalid()),
        [b'/', ..] => SocketAddrUnix::new(Path::new(name)).map_err(|_| invalid()),
        _ => Err(invalid()),
    }
}

/// Now, by the manager's clock, in microseconds: what `MONOTONIC_USEC=` says.
pub fn monotonic_usec() -> u128 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    now.as_micros()
}

/// Whether a descriptor is the calling process's connection to the journal: the one that `JOURNAL_STREAM` names (systemd.exec(5)).
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
    fn who_has_no_manager_tells_nobody() {
        for list in [&[][..], &[("NOTIFY_SOCKET", "")]] {
            assert!(ServiceManager::find(variables(list)).expect("that is fine").is_none());
        }
        let error = ServiceManager::find(variables(&[("NOTIFY_SOCKET", "vsock:2:1")])).expect_err("no local socket");
        assert!(error.to_string().contains("vsock:2:1"), "{error}");
    }

    #[test]
    fn a_watchdog_is_for_the_process_that_it_names() {
        let own = std::process::id().to_string();
        let found = |pid: &str, usec: &str| {
            let list = [("NOTIFY_SOCKET", "/nowhere"), ("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)];
            ServiceManager::find(variables(&list)).expect("fine").expect("a manager").watchdog()
        };
        assert_eq!(found(&own, "3000000"), Some(Duration::from_secs(3)));
        assert_eq!((found("1", "3000000"), found(&own, "0")), (None, None));
    }
}
