//! The unix sockets of a network namespace, as the kernel lists them (sock_diag(7), linux/unix_diag.h).

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

/// NETLINK_SOCK_DIAG of linux/netlink.h.
const SOCK_DIAG: u32 = 4;
/// SOCK_DIAG_BY_FAMILY of linux/sock_diag.h.
const BY_FAMILY: u16 = 20;
/// What is asked of each socket, and the attributes that answer (linux/unix_diag.h).
const SHOW_NAME: u32 = 1;
const SHOW_FILE: u32 = 2;
const NAME: u16 = 0;
const FILE: u16 = 1;

/// The lengths of a netlink message's header, of `struct unix_diag_msg`, and of an attribute's header, in bytes.
const HEADER: usize = 16;
const SOCKET: usize = 16;
const ATTRIBUTE: usize = 4;

/// The state of a stream socket that accepts connections (TCP_LISTEN of the kernel's include/net/tcp_states.h).
const LISTENING: u8 = 10;

/// A netlink socket that lists the unix sockets of the network namespace in which it was opened.
#[derive(Debug)]
pub struct UnixSockets(OwnedFd);

/// A socket that is bound to a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoundSocket {
    /// The path that it was bound to, which may be relative to its process's working directory.
    pub path: PathBuf,
    /// The number of its socket file, of which the kernel tells 32 bits, and the device, as the kernel numbers it.
    file: (u32, u32),
    /// The number of the socket itself, as `/proc/PID/fd` shows it.
    pub inode: u32,
    /// Whether it waits for connections. A datagram socket does not.
    pub is_listening: bool,
    /// Whether it is a datagram socket.
    pub is_datagram: bool,
}

/// A socket file, as stat(2) and its path tell of it.
#[derive(Clone, Debug)]
pub struct SocketFile {
    /// Its inode number.
    pub inode: u64,
    /// Its device.
    pub device: u64,
    /// The last part of its path, where stat(2) tells of another device than the kernel has (overlayfs, btrfs, bcachefs).
    pub name: Option<OsString>,
}

impl UnixSockets {
    /// Opens a netlink socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn open() -> io::Result<Self> {
        let protocol = Protocol::from_raw(SOCK_DIAG.try_into().map_err(io::Error::other)?);
        let flags = SocketFlags::CLOEXEC;
        Ok(Self(rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(protocol))?))
    }

    /// Returns all that are bound to files.
    ///
    /// # Errors
    /// What the system refuses; `NotFound` on a kernel without unix_diag.
    pub fn bound(&self) -> io::Result<Vec<BoundSocket>> {
        rustix::net::send(&self.0, &request(), SendFlags::empty())?;
        let mut found = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let length = rustix::io::retry_on_intr(|| rustix::net::recv(&self.0, &mut buffer, RecvFlags::empty()))?.0;
            if !take(buffer.get(..length).unwrap_or_default(), &mut found)? {
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
    /// Whether the socket is bound to a file. Some file systems (overlayfs, btrfs) give stat(2) another device than the kernel has; there
    /// the name decides.
    pub fn is(&self, file: &SocketFile) -> bool {
        // MKDEV of the kernel's include/linux/kdev_t.h.
        let device = (rustix::fs::major(file.device) << 20) | rustix::fs::minor(file.device);
        self.file.0 == file.inode as u32
            && (self.file.1 == device || file.name.as_deref().is_some_and(|name| self.path.file_name() == Some(name)))
    }
}

/// Asks for all unix sockets with their names and files (`struct unix_diag_req`).
fn request() -> Vec<u8> {
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
    let length = HEADER as u32 + 24;
    let header = [&length.to_ne_bytes()[..], &BY_FAMILY.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 8]].concat();
    let family = [libc::AF_UNIX as u8, 0, 0, 0];
    let show = SHOW_NAME | SHOW_FILE;
    [&header[..], &family, &u32::MAX.to_ne_bytes(), &[0; 4], &show.to_ne_bytes(), &[0; 8]].concat()
}

/// Takes the sockets out of a datagram, and says whether more follow.
fn take(mut datagram: &[u8], found: &mut Vec<BoundSocket>) -> io::Result<bool> {
    while let Some(length) = word(datagram, 0).map(|length| length as usize)
        && let Some(message) = datagram.get(..length).filter(|message| message.len() >= HEADER)
    {
        match half(message, 4).map(i32::from) {
            Some(libc::NLMSG_DONE) => return Ok(false),
            Some(libc::NLMSG_ERROR) => {
                let code = word(message, HEADER).unwrap_or_default().cast_signed();
                return Err(io::Error::from_raw_os_error(code.wrapping_neg()));
            }
            _ => found.extend(parse(message)),
        }
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

/// Reads one socket (`struct unix_diag_msg` and its attributes). None if it is not bound to a file.
fn parse(message: &[u8]) -> Option<BoundSocket> {
    let [_, kind, state, _] = *message.get(HEADER..HEADER + 4)? else { return None };
    let inode = word(message, HEADER + 4)?;
    let (mut path, mut file) = (None, None);
    let mut rest = message.get(HEADER + SOCKET..)?;
    while let (Some(length), Some(name)) = (half(rest, 0), half(rest, 2)) {
        let value = rest.get(ATTRIBUTE..usize::from(length))?;
        match name {
            NAME if value.first().is_some_and(|byte| *byte != 0) => {
                let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
                path = Some(PathBuf::from(OsString::from_vec(value[..end].to_vec())));
            }
            FILE => file = Some((word(value, 0)?, word(value, 4)?)),
            _ => {}
        }
        rest = rest.get(usize::from(length).next_multiple_of(4)..).unwrap_or_default();
    }
    let is_datagram = i32::from(kind) == libc::SOCK_DGRAM;
    Some(BoundSocket { path: path?, file: file?, inode, is_listening: state == LISTENING, is_datagram })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

impl SocketFile {
    /// Describes a socket file by what stat(2) says of it, and statfs(2) of its file system.
    pub fn new(path: &Path, found: &rustix::fs::Stat, system: &rustix::fs::StatFs) -> Self {
        // Of linux/magic.h, and bcachefs.
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
        let found = find(&one).expect("it is bound");
        assert!(found.path == one && found.is_listening && !found.is_datagram);
        assert!(find(&other).is_some_and(|found| found.is_datagram && !found.is_listening));
        assert!(find(&gone).is_none(), "its socket is closed");
        // A file that was moved is found by its numbers; one of another file system with the same number is not.
        let moved = directory.path().join("moved");
        std::fs::rename(&one, &moved).expect("moved");
        assert!(find(&moved).is_some());
        let mut file = SocketFile { name: None, ..describe(&moved) };
        file.device ^= 1;
        assert!(!bound.iter().any(|bound| bound.is(&file)));
    }

    #[test]
    fn answers_cut_short_are_refused_or_left_out() {
        let mut found = Vec::new();
        for datagram in [&[][..], &[1; 3], &[255; 64], &[0; 64], &[20, 0, 0, 0, 20, 0, 0, 0]] {
            assert!(take(datagram, &mut found).is_ok());
        }
        assert!(found.is_empty());
    }
}
