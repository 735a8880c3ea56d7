//! The unix sockets of a network namespace, as the kernel lists them (sock_diag(7), linux/unix_diag.h).

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::netlink::channel::{AnswerHeader, HEADER_LENGTH, Messages, NLMSG_DONE, NLMSG_ERROR, refusal};

/// `NETLINK_SOCK_DIAG` of linux/netlink.h.
const SOCK_DIAG: u32 = 4;
/// `SOCK_DIAG_BY_FAMILY` of linux/sock_diag.h.
const BY_FAMILY: u16 = 20;
/// The information to show about each socket, and the attributes that carry it (linux/unix_diag.h).
const SHOW_NAME: u32 = 1;
const SHOW_FILE: u32 = 2;
const NAME: u16 = 0;
const FILE: u16 = 1;

/// The lengths of `struct unix_diag_msg` and of an attribute's header in bytes.
const SOCKET: usize = 16;
const ATTRIBUTE: usize = 4;

/// The state of a stream socket that listens (`TCP_LISTEN` of the kernel's include/net/tcp_states.h).
const LISTENING: u8 = 10;

/// The size of the receive buffer in bytes. The kernel's datagrams are at most 32 KiB.
const BUFFER: usize = 64 << 10;

/// A netlink socket that lists the unix sockets of the network namespace in which it was opened.
#[derive(Debug)]
pub struct UnixSockets(OwnedFd);

/// A socket that is bound to a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoundSocket {
    /// The path that the socket was bound to, which may be relative to its process's working directory.
    pub path: PathBuf,
    /// The lower 32 bits of the socket file's inode number, and its device in the kernel's format.
    file: (u32, u32),
    /// The inode number of the socket itself, as `/proc/PID/fd` shows it.
    pub inode: u32,
    /// Whether the socket accepts connections. A datagram socket does not.
    pub is_listening: bool,
    /// Whether the socket is a datagram socket.
    pub is_datagram: bool,
}

/// The attributes of a socket file that identify it among [`BoundSocket`]s.
#[derive(Clone, Debug)]
pub struct SocketFile {
    /// The inode number.
    pub inode: u64,
    /// The device.
    pub device: u64,
    /// The file name, on file systems where stat(2) reports another device than the kernel uses (overlayfs, btrfs,
    /// bcachefs).
    pub name: Option<OsString>,
}

impl UnixSockets {
    /// Opens a netlink socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Fails as socket(2) does.
    pub fn open() -> io::Result<Self> {
        let protocol = Protocol::from_raw(SOCK_DIAG.try_into().map_err(io::Error::other)?);
        let flags = SocketFlags::CLOEXEC;
        Ok(Self(rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(protocol))?))
    }

    /// Returns all sockets that are bound to files.
    ///
    /// # Errors
    /// Fails with `NotFound` on a kernel without unix_diag.
    pub fn bound(&self) -> io::Result<Vec<BoundSocket>> {
        rustix::net::send(&self.0, &request(), SendFlags::empty())?;
        let mut found = Vec::new();
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = rustix::io::retry_on_intr(|| rustix::net::recv(&self.0, &mut buffer, RecvFlags::empty()))?.0;
            if !parse_datagram(buffer.get(..length).unwrap_or_default(), &mut found)? {
                return Ok(found);
            }
        }
    }
}

impl AsFd for UnixSockets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for UnixSockets {
    fn from(socket: OwnedFd) -> Self {
        Self(socket)
    }
}

impl BoundSocket {
    /// Returns whether the socket is bound to a file.
    pub fn is(&self, file: &SocketFile) -> bool {
        // MKDEV of the kernel's include/linux/kdev_t.h.
        let device = (rustix::fs::major(file.device) << 20) | rustix::fs::minor(file.device);
        self.file.0 == file.inode as u32
            && (self.file.1 == device || file.name.as_deref().is_some_and(|name| self.path.file_name() == Some(name)))
    }
}

/// Builds the request for all unix sockets with their names and files (`struct unix_diag_req`).
fn request() -> Vec<u8> {
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
    let length = HEADER_LENGTH as u32 + 24;
    let header = [&length.to_ne_bytes()[..], &BY_FAMILY.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 8]].concat();
    let family = [libc::AF_UNIX as u8, 0, 0, 0];
    let show = SHOW_NAME | SHOW_FILE;
    [&header[..], &family, &u32::MAX.to_ne_bytes(), &[0; 4], &show.to_ne_bytes(), &[0; 8]].concat()
}

/// Appends the sockets in a datagram, and returns whether more datagrams follow.
fn parse_datagram(datagram: &[u8], found: &mut Vec<BoundSocket>) -> io::Result<bool> {
    for message in Messages(datagram) {
        match AnswerHeader::of(message).kind {
            NLMSG_DONE => return Ok(false),
            NLMSG_ERROR => return refusal(message).map_or(Ok(false), |(error, _)| Err(error)),
            _ => found.extend(parse(message)),
        }
    }
    Ok(true)
}

/// Parses a datagram, for a fuzzer.
#[cfg(any(test, fuzzing))]
pub(super) fn inspect_datagram(datagram: &[u8]) {
    let _ = parse_datagram(datagram, &mut Vec::new());
}

/// Parses a socket (`struct unix_diag_msg` and its attributes). Returns none for a socket that is not bound to a file.
fn parse(message: &[u8]) -> Option<BoundSocket> {
    let [_, kind, state, _] = *message.get(HEADER_LENGTH..HEADER_LENGTH + 4)? else { return None };
    let inode = read_u32(message, HEADER_LENGTH + 4)?;
    let (mut path, mut file) = (None, None);
    let mut rest = message.get(HEADER_LENGTH + SOCKET..)?;
    while let (Some(length), Some(name)) = (read_u16(rest, 0), read_u16(rest, 2)) {
        let value = rest.get(ATTRIBUTE..usize::from(length))?;
        match name {
            NAME if value.first().is_some_and(|byte| *byte != 0) => {
                let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
                path = Some(PathBuf::from(OsString::from_vec(value[..end].to_vec())));
            }
            FILE => file = Some((read_u32(value, 0)?, read_u32(value, 4)?)),
            _ => {}
        }
        rest = rest.get(usize::from(length).next_multiple_of(4)..).unwrap_or_default();
    }
    let is_datagram = i32::from(kind) == libc::SOCK_DGRAM;
    Some(BoundSocket { path: path?, file: file?, inode, is_listening: state == LISTENING, is_datagram })
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

impl SocketFile {
    /// Describes a socket file by the results of stat(2) and, for its file system, statfs(2).
    pub fn new(path: &Path, found: &rustix::fs::Stat, system: &rustix::fs::StatFs) -> Self {
        /// The magic numbers of overlayfs and btrfs (linux/magic.h) and of bcachefs.
        const OTHER_DEVICES: [u32; 3] = [0x794c_7630, 0x9123_683e, 0xca45_1a4e];

        let name = OTHER_DEVICES.contains(&(system.f_type as u32)).then(|| path.file_name()).flatten();
        let name = name.map(OsStr::to_owned);
        Self { inode: found.st_ino, device: found.st_dev, name }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixListener};

    use super::*;

    fn describe(path: &Path) -> SocketFile {
        let system = rustix::fs::statfs(path).expect("a file system");
        SocketFile::new(path, &rustix::fs::stat(path).expect("a file"), &system)
    }

    #[test]
    fn bound_sockets_are_found_by_their_files() {
        let directory = tempfile::tempdir().expect("a directory");
        let (one, other, gone) = ["one", "other", "gone"].map(|name| directory.path().join(name)).into();
        let _listener = UnixListener::bind(&one).expect("a listener");
        let _datagram = UnixDatagram::bind(&other).expect("a socket");
        drop(UnixListener::bind(&gone).expect("a listener"));
        let bound = UnixSockets::open().and_then(|sockets| sockets.bound()).expect("a list");
        let find = |path: &Path| {
            let file = describe(path);
            bound.iter().find(|bound| bound.is(&file))
        };
        let found = find(&one).expect("a bound socket");
        assert!(found.path == one && found.is_listening && !found.is_datagram);
        assert!(find(&other).is_some_and(|found| found.is_datagram && !found.is_listening));
        assert!(find(&gone).is_none(), "the socket is closed");
        // A moved file is found by its inode number and device. A file with the same number on another device is not.
        let moved = directory.path().join("moved");
        std::fs::rename(&one, &moved).expect("moved");
        assert!(find(&moved).is_some());
        let mut file = SocketFile { name: None, ..describe(&moved) };
        file.device ^= 1;
        assert!(!bound.iter().any(|bound| bound.is(&file)));
    }

    #[test]
    fn truncated_answers_are_left_out() {
        let mut found = Vec::new();
        for datagram in [&[][..], &[1; 3], &[255; 64], &[0; 64], &[20, 0, 0, 0, 20, 0, 0, 0]] {
            assert!(parse_datagram(datagram, &mut found).is_ok());
        }
        assert!(found.is_empty());
    }
}
