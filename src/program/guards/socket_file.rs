//! Looks up the file of a unix socket as a thread of the program sees it: from its root and working directories, which
//! may differ from those of the calling process.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};

use crate::linux::unix_sockets::SocketFile;

/// An identifier of a file: device, inode, and the time of change, which differs if the inode number is reused.
pub(super) type FileId = (u64, u64, i64, u64);

/// The file of a socket.
pub(super) struct FoundSocket {
    /// Its path without symbolic links.
    pub(super) path: PathBuf,
    pub(super) file: SocketFile,
    pub(super) id: FileId,
}

/// Looks up a path as a thread does. Returns `None` if the thread's own call will fail, since no socket is there.
///
/// # Errors
/// Returns the error of the system call that failed.
pub(super) fn look_up(thread: i32, path: &[u8]) -> io::Result<Option<FoundSocket>> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let process = PathBuf::from(format!("/proc/{thread}"));
    let file = match open_as(&process, path, flags) {
        Ok(file) => file,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::NAMETOOLONG) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let found = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(found.st_mode) != FileType::Socket {
        return Ok(None);
    }
    let system = rustix::fs::fstatfs(&file)?;
    let link = rustix::fs::readlinkat(CWD, format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new())?;
    let path = Path::new(OsStr::from_bytes(link.to_bytes())).to_owned();
    let id = (found.st_dev, found.st_ino, found.st_ctime, found.st_ctime_nsec);
    Ok(Some(FoundSocket { file: SocketFile::new(&path, &found, &system), path, id }))
}

/// Opens a path from a process's root directory or working directory.
fn open_as(process: &Path, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let (from, path) = start_of(path);
    let whole = match from {
        PathStart::Root => Some([b"/", path].concat()),
        PathStart::Directory(name) => from_root(process, name, path)?,
        PathStart::Itself(name) => return rustix::fs::open(process.join(name), flags, Mode::empty()),
    };
    let Some(whole) = whole else {
        // The directory has no path any more. Symbolic links could lead elsewhere here than for the process, so they
        // are refused, and so are missing files.
        let directory = rustix::fs::open(process.join("cwd"), flags | OFlags::DIRECTORY, Mode::empty())?;
        return resolve(&directory, path, flags, ResolveFlags::NO_SYMLINKS).map_err(|error| match error {
            rustix::io::Errno::NOENT => rustix::io::Errno::ACCESS,
            other => other,
        });
    };
    let root = rustix::fs::open(process.join("root"), flags | OFlags::DIRECTORY, Mode::empty())?;
    match resolve(&root, &whole, flags, ResolveFlags::IN_ROOT) {
        // openat2(2) does not follow magic links of /proc, such as `/proc/PID/fd/7`, with RESOLVE_IN_ROOT.
        Err(rustix::io::Errno::XDEV | rustix::io::Errno::LOOP) => {
            let path = [process.join("root").as_os_str().as_bytes(), b"/", &whole].concat();
            rustix::fs::open(OsStr::from_bytes(&path), flags, Mode::empty())
        }
        other => other,
    }
}

/// The beginning of a path.
enum PathStart<'a> {
    /// The root directory.
    Root,
    /// A directory of the process, with this name below `/proc/PID`.
    Directory(&'a OsStr),
    /// A file with this name below `/proc/PID`, which is the whole path.
    Itself(&'a OsStr),
}

/// Splits a path into its beginning and the rest. For the process, `/proc/self` and the like lead to its own files.
fn start_of(path: &[u8]) -> (PathStart<'_>, &[u8]) {
    let own = [&b"/proc/self/"[..], b"/proc/thread-self/"].iter().find_map(|prefix| path.strip_prefix(*prefix));
    // `/dev/fd` is a link to `/proc/self/fd`.
    let own = own.or_else(|| path.starts_with(b"/dev/fd/").then(|| &path[b"/dev/".len()..]));
    let Some(own) = own else {
        return match path.strip_prefix(b"/") {
            Some(rest) => (PathStart::Root, rest),
            None => (PathStart::Directory(OsStr::new("cwd")), path),
        };
    };
    // The directory is `cwd`, `root`, or the like of `fd/7`.
    let parts = if own.starts_with(b"fd/") { 2 } else { 1 };
    let end = own.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at).nth(parts - 1);
    match end {
        Some(end) if &own[..end] == b"root" => (PathStart::Root, &own[end + 1..]),
        Some(end) => (PathStart::Directory(OsStr::from_bytes(&own[..end])), &own[end + 1..]),
        None => (PathStart::Itself(OsStr::from_bytes(own)), b""),
    }
}

/// Turns a path from one of a process's directories into one from its root directory. Returns `None` if the directory
/// has no path any more.
fn from_root(process: &Path, name: &OsStr, path: &[u8]) -> rustix::io::Result<Option<Vec<u8>>> {
    let link = |name: &OsStr| rustix::fs::readlinkat(CWD, process.join(name), Vec::new());
    let (root, directory) = (link(OsStr::new("root"))?, link(name)?);
    let root = root.to_bytes().strip_suffix(b"/").unwrap_or(root.to_bytes());
    let directory = directory.to_bytes();
    if directory.ends_with(b" (deleted)") {
        return Ok(None);
    }
    let below = directory.strip_prefix(root).filter(|rest| rest.is_empty() || rest.starts_with(b"/"));
    Ok(below.map(|below| [below, b"/", path].concat()))
}

/// Opens a path below a directory. Retries, since openat2(2) fails with `EAGAIN` after a concurrent rename or mount.
fn resolve(from: &OwnedFd, path: &[u8], flags: OFlags, how: ResolveFlags) -> rustix::io::Result<OwnedFd> {
    const TRIES: usize = 16;
    for _ in 1..TRIES {
        match rustix::fs::openat2(from, path, flags, Mode::empty(), how) {
            Err(rustix::io::Errno::AGAIN) => {}
            other => return other,
        }
    }
    rustix::fs::openat2(from, path, flags, Mode::empty(), how)
}
