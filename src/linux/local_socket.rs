//! Local sockets that keep the borders of messages (unix(7), SOCK_SEQPACKET), and pass descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use rustix::fs::{AtFlags, CWD, Mode};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

/// Whether a socket takes descriptors (linux/asm-generic/socket.h). The architectures that we are built for number it
/// alike.
const SO_PASSRIGHTS: libc::c_int = 83;

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 128;

/// A socket that others connect to.
#[derive(Debug)]
pub struct LocalListener {
    socket: OwnedFd,
    path: PathBuf,
}

/// Who is at the other end of a connection, as of when it connected (SO_PEERCRED of unix(7)). Numbers are as the reader's namespaces
/// have them: a process that is in none of them is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCredentials {
    /// The process.
    pub pid: i32,
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
}

impl LocalListener {
    /// Listens at a path, with the permission bits `mode`: who may write may connect. A socket that somebody has left there is
    /// replaced; that nobody listens there any more is the caller's to know.
    ///
    /// # Errors
    /// `EADDRINUSE` if there is something else at the path.
    pub fn bind(path: &Path, mode: u32) -> io::Result<Self> {
        use std::os::unix::fs::FileTypeExt;

        let address = address(path)?;
        if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
            std::fs::remove_file(path)?;
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::net::bind(&socket, &address)?;
        // Nobody can connect before it listens.
        rustix::fs::chmodat(CWD, path, Mode::from_raw_mode(mode), AtFlags::empty())?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(Self { socket, path: path.to_owned() })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Has the kernel refuse descriptors that are passed to this socket, or to connections to it from then on: whoever
    /// sends one is told
    /// `EPERM`. Says whether the kernel can do that, as it can since Linux 6.16.
    pub fn refuse_descriptors(&self) -> io::Result<bool> {
        let off: libc::c_int = 0;
        // SAFETY: the kernel reads as many bytes of the number as is said, and keeps none.
        let set = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_PASSRIGHTS,
                (&raw const off).cast(),
                size_of_val(&off) as libc::socklen_t,
            )
        };
        match set {
            0 => Ok(true),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(false),
                error => Err(error),
            },
        }
    }

    /// The next connection, if one waits: not blocking, and closed at the next exec.
    pub fn accept(&self) -> io::Result<Option<(OwnedFd, PeerCredentials)>> {
        loop {
            match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => {
                    let who = peer_credentials(&socket)?;
                    return Ok(Some((socket, who)));
                }
                Err(Errno::AGAIN) => return Ok(None),
                // Whoever it was has gone already.
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl From<LocalListener> for OwnedFd {
    fn from(listener: LocalListener) -> Self {
        listener.socket
    }
}

impl AsFd for LocalListener {
    /// Readable when a connection waits.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn address(path: &Path) -> io::Result<SocketAddrUnix> {
    SocketAddrUnix::new(path).map_err(|_| {
        let what = format!("{} is too long for a socket's path", path.display());
        io::Error::new(io::ErrorKind::InvalidInput, what)
    })
}

/// Who is at the other end of a connection: who has connected, or who listened then (`SO_PEERCRED` in unix(7)).
pub fn peer_credentials(socket: &OwnedFd) -> io::Result<PeerCredentials> {
    let who = getsockopt(socket, sockopt::PeerCredentials)?;
    Ok(PeerCredentials { pid: who.pid(), uid: who.uid(), gid: who.gid() })
}

/// Connects to who listens at a path. The connection blocks, and is closed at the next exec.
///
/// # Errors
/// `ENOENT` if there is nothing, `ECONNREFUSED` if nobody listens any more, `WouldBlock` if too many wait to be accepted for `patience`
/// already.
pub fn connect(path: &Path, patience: Duration) -> io::Result<OwnedFd> {
    let address = address(path)?;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(patience))?;
    rustix::net::connect(&socket, &address)?;
    set_socket_timeout(&socket, Timeout::Send, None)?;
    Ok(socket)
}

/// Two ends of a connection, which block, and are closed at the next exec.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Sends a message, and passes a descriptor with it if there is one.
///
/// # Errors
/// `EPIPE` or `ECONNRESET` if nobody is there to receive it, `WouldBlock` if there is no room for it and the connection does not block.
pub fn send(socket: &OwnedFd, message: &[u8], passed: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let passed = passed.as_slice();
    if !passed.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(passed)) {
        return Err(io::Error::other("there is no room for a descriptor"));
    }
    loop {
        match rustix::net::sendmsg(socket, &[IoSlice::new(message)], &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives a message: its length, and the descriptor that was passed with it, if one was, which is closed at the next exec. None at
/// the end.
///
/// # Errors
/// `InvalidData` if the message is longer than the buffer.
pub fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<(usize, Option<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut buffers = [IoSliceMut::new(buffer)];
        match rustix::net::recvmsg(socket, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(None),
            other => break other?,
        }
    };
    let mut passed = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            // Any more than one are closed here.
            passed = descriptors.last().or(passed);
        }
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long"));
    }
    Ok((received.bytes > 0).then_some((received.bytes, passed)))
}

/// Looks at the next message, and returns its length as far as it fits into the buffer; none at the end. It stays where
/// it is, with what is passed with it: nothing of that is opened or closed in this process.
///
/// # Errors
/// `WouldBlock` if there is none.
pub fn peek(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    match rustix::io::retry_on_intr(|| rustix::net::recv(socket, &mut *buffer, flags)) {
        Ok((0, _)) | Err(Errno::CONNRESET) => Ok(None),
        Ok((length, _)) => Ok(Some(length)),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[test]
    fn messages_keep_their_borders_and_bring_a_descriptor() {
        let (one, other) = pair().expect("a pair");
        let mut file = tempfile::tempfile().expect("a file");
        io::Write::write_all(&mut file, b"passed").expect("written");
        io::Seek::rewind(&mut file).expect("rewound");
        send(&one, b"first", None).expect("sent");
        send(&one, b"second", Some(file.as_fd())).expect("sent");
        let mut buffer = [0; 16];
        let (length, passed) = receive(&other, &mut buffer).expect("received").expect("a message");
        assert!(&buffer[..length] == b"first" && passed.is_none());
        let (length, passed) = receive(&other, &mut buffer).expect("received").expect("a message");
        assert_eq!(&buffer[..length], b"second");
        let mut text = String::new();
        let passed = passed.expect("a descriptor");
        assert!(rustix::io::fcntl_getfd(&passed).expect("flags").contains(rustix::io::FdFlags::CLOEXEC));
        File::from(passed).read_to_string(&mut text).expect("read");
        assert_eq!(text, "passed");
        send(&one, &[0; 17], None).expect("sent");
        assert_eq!(receive(&other, &mut buffer).expect_err("too long").kind(), io::ErrorKind::InvalidData);
        drop(one);
        assert!(receive(&other, &mut buffer).expect("received").is_none());
        assert_eq!(send(&other, b"x", None).expect_err("nobody is there").raw_os_error(), Some(libc::EPIPE));
    }

    #[test]
    fn a_listener_knows_who_comes() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        assert_eq!(connect(&path, PATIENCE).expect_err("nothing is there").raw_os_error(), Some(libc::ENOENT));
        let listener = LocalListener::bind(&path, 0o620).expect("a listener");
        let mode = std::fs::metadata(&path).expect("a socket").permissions().mode();
        assert_eq!(mode & 0o7777, 0o620);
        assert!(listener.accept().expect("nobody").is_none());
        let connection = connect(&path, PATIENCE).expect("connected");
        let (accepted, who) = listener.accept().expect("accepted").expect("a connection");
        assert_eq!(who.pid, std::process::id().cast_signed());
        assert_eq!(who.uid, nix::unistd::geteuid().as_raw());
        let waiting = receive(&accepted, &mut [0; 8]).expect_err("it does not block");
        assert_eq!(waiting.kind(), io::ErrorKind::WouldBlock);
        // Whoever listens and accepts nobody is not waited for for ever.
        let waiting: Vec<_> =
            std::iter::from_fn(|| connect(&path, Duration::from_millis(10)).ok()).take(1000).collect();
        assert!(waiting.len() < 1000);
        let late = connect(&path, Duration::from_millis(10)).expect_err("there is no room");
        assert_eq!(late.kind(), io::ErrorKind::WouldBlock);
        drop(waiting);
        drop(listener);
        assert_eq!(connect(&path, PATIENCE).expect_err("nobody listens").raw_os_error(), Some(libc::ECONNREFUSED));
        drop(connection);
        // What was left there is replaced; what is no socket is not.
        drop(LocalListener::bind(&path, 0o600).expect("a listener"));
        std::fs::remove_file(&path).expect("removed");
        std::fs::write(&path, "").expect("written");
        assert_eq!(LocalListener::bind(&path, 0o600).expect_err("a file").kind(), io::ErrorKind::AddrInUse);
        let long = directory.path().join("x".repeat(200));
        assert_eq!(connect(&long, PATIENCE).expect_err("too long").kind(), io::ErrorKind::InvalidInput);
    }
}
