//! Unix sockets that preserve message boundaries and pass descriptors (SOCK_SEQPACKET of unix(7)), at paths and under
//! abstract names.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use rustix::fs::{AtFlags, CWD, Mode};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

/// The socket option that allows passing descriptors (`SO_PASSRIGHTS` of asm-generic/socket.h). All supported
/// architectures use the generic number.
const SO_PASSRIGHTS: libc::c_int = 83;

/// The list of the unix sockets in the network namespace of the process (proc_pid_net(5)).
const LIST: &str = "/proc/net/unix";

/// The flag of a listening socket in that list (`__SO_ACCEPTCON` of the kernel's include/linux/net.h).
const LISTENING: &str = "00010000";

/// The maximum number of connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// A listening socket.
#[derive(Debug)]
pub struct LocalListener {
    socket: OwnedFd,
}

/// The process at the other end of a connection, as of when it connected or began to listen (`SO_PEERCRED` of unix(7)).
/// A process ID that the reader's PID namespace does not have is 0. A user or group that its user namespace does not
/// have is the overflow ID, which is 65534 as a rule (user_namespaces(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCredentials {
    /// The process ID.
    pub pid: i32,
    /// The effective user ID.
    pub uid: u32,
    /// The effective group ID.
    pub gid: u32,
}

impl LocalListener {
    /// Listens at a path. Users with write permission by `mode` may connect.
    ///
    /// A socket that exists at the path is replaced. The caller must know that no process listens there any more.
    ///
    /// # Errors
    /// Fails with `EADDRINUSE` if another kind of file is at the path.
    pub fn bind(path: &Path, mode: u32) -> io::Result<Self> {
        use std::os::unix::fs::FileTypeExt;

        let address = address(path)?;
        if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
            std::fs::remove_file(path)?;
        }
        let socket = new_socket(SocketFlags::NONBLOCK)?;
        rustix::net::bind(&socket, &address)?;
        // No client can connect before listen(2), so the former mode does no harm.
        rustix::fs::chmodat(CWD, path, Mode::from_raw_mode(mode), AtFlags::empty())?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(Self { socket })
    }

    /// Listens under an abstract name in the network namespace of the calling thread. Such a name needs no file.
    ///
    /// All processes of the namespace may connect. The name is free again as soon as the socket is closed, and any
    /// process may take it then, so a client has to check the listener by [`peer_credentials`].
    ///
    /// # Errors
    /// Fails with `EADDRINUSE` if another socket has the name.
    pub fn bind_abstract(name: &str) -> io::Result<Self> {
        let socket = new_socket(SocketFlags::NONBLOCK)?;
        rustix::net::bind(&socket, &abstract_address(name)?)?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(Self { socket })
    }

    /// Makes the kernel refuse descriptors passed to this socket and to its future connections: sending one fails with
    /// `EPERM`. Returns whether the kernel supports this, as it does since Linux 6.16.
    ///
    /// # Errors
    /// Fails as setsockopt(2) does.
    pub fn refuse_descriptors(&self) -> io::Result<bool> {
        let off: libc::c_int = 0;
        // SAFETY: the kernel reads the number, whose size is passed, and keeps no reference to it.
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

    /// Accepts the next connection, or returns none if no connection waits. The connection does not block and is closed
    /// on exec.
    ///
    /// # Errors
    /// Fails as accept(2) does, for example with `EMFILE`.
    pub fn accept(&self) -> io::Result<Option<(OwnedFd, PeerCredentials)>> {
        loop {
            match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => {
                    let peer = peer_credentials(&socket)?;
                    return Ok(Some((socket, peer)));
                }
                Err(Errno::AGAIN) => return Ok(None),
                // ECONNABORTED: the client has disconnected already.
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
        let what = format!("the socket path is too long: {}", path.display());
        io::Error::new(io::ErrorKind::InvalidInput, what)
    })
}

fn abstract_address(name: &str) -> io::Result<SocketAddrUnix> {
    SocketAddrUnix::new_abstract_name(name.as_bytes()).map_err(|_| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("the name of the abstract socket is too long: {name}"))
    })
}

/// Creates a socket that is closed on exec.
fn new_socket(flags: SocketFlags) -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC | flags, None)?)
}

/// Returns the credentials of the process at the other end: the one that connected, or that listened at that time
/// (`SO_PEERCRED` of unix(7)).
///
/// # Errors
/// Fails as getsockopt(2) does.
pub fn peer_credentials(socket: &OwnedFd) -> io::Result<PeerCredentials> {
    let peer = getsockopt(socket, sockopt::PeerCredentials)?;
    Ok(PeerCredentials { pid: peer.pid(), uid: peer.uid(), gid: peer.gid() })
}

/// Connects to the socket at a path. The connection blocks and is closed on exec.
///
/// # Errors
/// Fails with `ENOENT` if there is no such file, with `ECONNREFUSED` if no process listens any more, and with
/// `WouldBlock` if the backlog stays full for `patience`.
pub fn connect(path: &Path, patience: Duration) -> io::Result<OwnedFd> {
    connect_to(&address(path)?, patience)
}

/// Connects to the socket with an abstract name in the network namespace of the calling thread, without waiting. The
/// connection blocks and is closed on exec.
///
/// # Errors
/// Fails with `ECONNREFUSED` if no process listens, and with `WouldBlock` if the backlog is full.
pub fn connect_abstract(name: &str) -> io::Result<OwnedFd> {
    let socket = new_socket(SocketFlags::NONBLOCK)?;
    rustix::net::connect(&socket, &abstract_address(name)?)?;
    rustix::io::ioctl_fionbio(&socket, false)?;
    Ok(socket)
}

/// Returns the abstract names with a prefix at which processes listen in the network namespace of this process. Any of
/// its processes can add names, also such that do not exist.
///
/// # Errors
/// Fails if `/proc/net/unix` cannot be read.
pub fn listening_abstract_names(prefix: &str) -> io::Result<Vec<String>> {
    let list = std::fs::read(LIST)?;
    let prefix = format!("@{prefix}");
    let name = |line: &[u8]| {
        let line = std::str::from_utf8(line).ok()?;
        let name = line.split_ascii_whitespace().nth(7)?;
        let is_wanted = line.split_ascii_whitespace().nth(3) == Some(LISTENING) && name.starts_with(&prefix);
        is_wanted.then(|| name[1..].to_owned())
    };
    Ok(list.split(|byte| *byte == b'\n').filter_map(name).collect())
}

fn connect_to(address: &SocketAddrUnix, patience: Duration) -> io::Result<OwnedFd> {
    let socket = new_socket(SocketFlags::empty())?;
    set_socket_timeout(&socket, Timeout::Send, Some(patience))?;
    rustix::net::connect(&socket, address)?;
    set_socket_timeout(&socket, Timeout::Send, None)?;
    Ok(socket)
}

/// Creates the two ends of a connection, which block and are closed on exec.
///
/// # Errors
/// Fails as socketpair(2) does.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Sends a message, with a descriptor if one is given.
///
/// # Errors
/// Fails with `EPIPE` or `ECONNRESET` if the other end is closed, and with `WouldBlock` if the connection does not
/// block and its buffer is full.
pub fn send(socket: &OwnedFd, message: &[u8], passed: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let passed = passed.as_slice();
    if !passed.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(passed)) {
        return Err(io::Error::other("the buffer has no room for a descriptor"));
    }
    loop {
        match rustix::net::sendmsg(socket, &[IoSlice::new(message)], &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives a message. Returns its length and the descriptor passed with it, which is closed on exec, or none if the
/// other end is closed.
///
/// # Errors
/// Fails with `InvalidData` if the message is longer than the buffer.
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
            // Dropping the iterator closes all descriptors but the last.
            passed = descriptors.last().or(passed);
        }
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the message is too long"));
    }
    Ok((received.bytes > 0).then_some((received.bytes, passed)))
}

/// Copies the next message into the buffer and leaves it in the queue. Returns its length as far as it fits, or none if
/// the other end is closed.
///
/// Descriptors passed with the message stay in the queue as well: this process neither opens nor closes them.
///
/// # Errors
/// Fails with `WouldBlock` if there is no message.
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
    fn messages_keep_their_boundaries_and_bring_a_descriptor() {
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
        assert_eq!(send(&other, b"x", None).expect_err("the other end is closed").raw_os_error(), Some(libc::EPIPE));
    }

    #[test]
    fn a_listener_reports_its_clients_and_has_a_bounded_backlog() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        assert_eq!(connect(&path, PATIENCE).expect_err("no such file").raw_os_error(), Some(libc::ENOENT));
        let listener = LocalListener::bind(&path, 0o620).expect("a listener");
        let mode = std::fs::metadata(&path).expect("a socket").permissions().mode();
        assert_eq!(mode & 0o7777, 0o620);
        assert!(listener.accept().expect("no error").is_none());
        let connection = connect(&path, PATIENCE).expect("connected");
        let (accepted, peer) = listener.accept().expect("accepted").expect("a connection");
        assert_eq!(peer.pid, std::process::id().cast_signed());
        assert_eq!(peer.uid, nix::unistd::geteuid().as_raw());
        let waiting = receive(&accepted, &mut [0; 8]).expect_err("it does not block");
        assert_eq!(waiting.kind(), io::ErrorKind::WouldBlock);
        // Connecting to a listener that does not accept times out.
        let waiting: Vec<_> =
            std::iter::from_fn(|| connect(&path, Duration::from_millis(10)).ok()).take(1000).collect();
        assert!(waiting.len() < 1000);
        let late = connect(&path, Duration::from_millis(10)).expect_err("the backlog is full");
        assert_eq!(late.kind(), io::ErrorKind::WouldBlock);
        drop(waiting);
        drop(listener);
        assert_eq!(connect(&path, PATIENCE).expect_err("no process listens").raw_os_error(), Some(libc::ECONNREFUSED));
        drop(connection);
        // A stale socket is replaced, another file is not.
        drop(LocalListener::bind(&path, 0o600).expect("a listener"));
        std::fs::remove_file(&path).expect("removed");
        std::fs::write(&path, "").expect("written");
        assert_eq!(LocalListener::bind(&path, 0o600).expect_err("a file").kind(), io::ErrorKind::AddrInUse);
        let long = directory.path().join("x".repeat(200));
        assert_eq!(connect(&long, PATIENCE).expect_err("too long").kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn an_abstract_name_belongs_to_one_listener_that_its_clients_can_check() {
        let name = format!("vpn-exec-test-{}", std::process::id());
        let refused = connect_abstract(&name).expect_err("no process listens");
        assert_eq!(refused.raw_os_error(), Some(libc::ECONNREFUSED));
        let listener = LocalListener::bind_abstract(&name).expect("a listener");
        let second = LocalListener::bind_abstract(&name).expect_err("the name is taken");
        assert_eq!(second.kind(), io::ErrorKind::AddrInUse);
        let prefix = &name[..name.len() - 1];
        assert_eq!(listening_abstract_names(prefix).expect("a list"), [name.as_str()]);
        let connection = connect_abstract(&name).expect("connected");
        let (accepted, client) = listener.accept().expect("accepted").expect("a connection");
        let this = PeerCredentials {
            pid: std::process::id().cast_signed(),
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
        };
        assert_eq!((client, peer_credentials(&connection).expect("the listener")), (this, this));
        send(&accepted, b"status", None).expect("sent");
        assert_eq!(receive(&connection, &mut [0; 8]).expect("received").expect("a message").0, 6);
        assert!(!Path::new(&name).exists(), "there is no file");
        // Connecting to a listener that does not accept fails at once.
        let waiting: Vec<_> = std::iter::from_fn(|| connect_abstract(&name).ok()).take(1000).collect();
        assert!(waiting.len() < 1000);
        assert_eq!(connect_abstract(&name).expect_err("the backlog is full").kind(), io::ErrorKind::WouldBlock);
        drop(waiting);
        drop(listener);
        assert_eq!(listening_abstract_names(prefix).expect("a list"), [""; 0]);
        drop(LocalListener::bind_abstract(&name).expect("the name is free again"));
        let long = connect_abstract(&"x".repeat(200)).expect_err("too long");
        assert_eq!(long.kind(), io::ErrorKind::InvalidInput);
    }
}
