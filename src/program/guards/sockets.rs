//! Keeps the program from handing its work to processes outside the tunnel: the gate, a process that decides about each connection to a
//! unix socket. The filter of system calls that has the kernel ask it is in [`crate::linux::seccomp::connect`]; which sockets of the host are
//! open is decided in [`crate::plan::host_sockets`].
//!
//! If the gate ends, all that it would be asked about fails (`ENOSYS`).

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};

use super::{Report, Reporter, Work};
use crate::linux::capabilities::CapabilitySet;
use crate::linux::local_socket;
use crate::linux::process;
use crate::linux::seccomp::SyscallFilter;
use crate::linux::seccomp::connect::{self, ConnectSupervisor, Destination, PendingConnect};
use crate::linux::unix_sockets::{SocketFile, UnixSockets};
use crate::plan::SocketsPlan;
use crate::plan::host_sockets::{self, SocketOwner};
use crate::program::Program;
use crate::program::identity::Identity;

/// What is said where the kernel does not list unix sockets (CONFIG_UNIX_DIAG, which distributions have).
const NO_LIST: &str = "the kernel lists no unix sockets (unix_diag), without which only `--socket any` works";

/// How often at most the launcher is told of refusals that it has been told of before.
const PAUSE: Duration = Duration::from_secs(1);

/// How many different sockets a sentence is said about.
const MOST_SENTENCES: usize = 64;

/// How many sockets inside are remembered.
const MOST_REMEMBERED: usize = 1024;

/// The system calls of the gate beyond those of every guard: looking at a socket's file as the program sees it.
const CALLS: &[libc::c_long] = &[
    libc::SYS_process_vm_readv,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_kill,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
];

/// The child's side of the gate.
#[derive(Debug)]
pub(super) struct SocketGuard {
    entrance: OwnedFd,
}

impl SocketGuard {
    /// Prepares the gate of a program. Returns what its process does.
    ///
    /// # Errors
    /// What the system refuses, such as to list unix sockets: without that every socket would be closed, those inside as well.
    pub(super) fn prepare(program: &Program) -> io::Result<(Self, Work)> {
        let listed = UnixSockets::open().and_then(|sockets| sockets.bound());
        listed.map_err(|error| io::Error::other(format!("{NO_LIST}: {error}")))?;
        let (entrance, gates) = local_socket::pair()?;
        let (open, identity) = (program.sockets.clone(), program.identity.clone());
        let work = move |launcher, reporter| keep(open, &identity, launcher, &gates, reporter);
        Ok((Self { entrance }, Box::new(work)))
    }

    /// Has the gate decide about the connections of the calling process, which is in the tunnel's network namespace, and of all that it
    /// starts.
    ///
    /// # Errors
    /// What the system refuses; `EBUSY` if the process has such a filter already.
    pub(super) fn pass(&self) -> io::Result<()> {
        let inside = UnixSockets::open()?;
        let filter = connect::install()?;
        local_socket::send(&self.entrance, b"inside", Some(inside.as_fd()))?;
        local_socket::send(&self.entrance, b"filter", Some(filter.as_fd()))
    }
}

/// The life of the gate.
fn keep(open: SocketsPlan, identity: &Identity, launcher: u32, gates: &OwnedFd, reporter: Reporter) -> io::Result<()> {
    let outside = UnixSockets::open()?;
    let home = identity.home();
    let mut kept = [gates.as_raw_fd(), reporter.descriptor(), outside.as_fd().as_raw_fd()];
    let calls = SyscallFilter::allow_only(&[super::COMMON_CALLS, CALLS].concat(), &[])?;
    // It takes CAP_SYS_PTRACE to see the program's memory and files.
    super::become_guard(identity, launcher, &mut kept, CapabilitySet::SYS_PTRACE, &calls, false)?;
    let (Some(inside), Some(filter)) = (receive(gates)?, receive(gates)?) else { return Ok(()) };
    let mut gatekeeper = Gatekeeper {
        open,
        home,
        filter: filter.into(),
        inside: inside.into(),
        outside,
        reporter,
        remembered: HashSet::new(),
        said: HashSet::new(),
        refused: 0,
        told: 0,
        told_at: None,
    };
    gatekeeper.work()
}

fn receive(gates: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    Ok(local_socket::receive(gates, &mut [0; 16])?.and_then(|(_, passed)| passed))
}

/// What is to become of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// The kernel goes on with it.
    Allow,
    /// It fails with an error number.
    Fail(i32),
}

/// Which file something is. A number may be used again, but not with the same time of change.
type FileId = (u64, u64, i64, u64);

/// A socket's file, as the program sees it.
struct Seen {
    /// Its path without links.
    path: PathBuf,
    file: SocketFile,
    id: FileId,
}

struct Gatekeeper {
    open: SocketsPlan,
    home: Option<PathBuf>,
    filter: ConnectSupervisor,
    /// The sockets of the tunnel's network namespace, and of the host's.
    inside: UnixSockets,
    outside: UnixSockets,
    reporter: Reporter,
    /// Files that sockets inside are bound to.
    remembered: HashSet<FileId>,
    /// What a sentence was said about.
    said: HashSet<PathBuf>,
    refused: u64,
    /// How many refusals the launcher knows of, and since when.
    told: u64,
    told_at: Option<Instant>,
}

impl Gatekeeper {
    fn work(&mut self) -> io::Result<()> {
        loop {
            let pause = self.told_at.map_or(Duration::ZERO, |at| PAUSE.saturating_sub(at.elapsed()));
            match self.filter.wait((self.told < self.refused).then_some(pause))? {
                connect::Waited::Over => return Ok(()),
                connect::Waited::TimeUp => self.tell(None, None),
                connect::Waited::Call => {
                    let Some(attempt) = self.filter.receive()? else { continue };
                    let verdict = self.judge(&attempt);
                    let errno = match verdict {
                        Verdict::Allow => None,
                        Verdict::Fail(errno) => Some(errno),
                    };
                    self.filter.answer(&attempt, errno)?;
                }
            }
        }
    }

    fn judge(&mut self, attempt: &PendingConnect) -> Verdict {
        let address = match attempt.read_address() {
            Ok(address) => address,
            // The call itself says what is wrong with the address.
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => return Verdict::Allow,
            // A set-user-ID program that may not be looked into. It keeps the Internet.
            Err(_) if attempt.has_length_of_internet_address() => return Verdict::Allow,
            Err(_) => return Verdict::Fail(libc::EACCES),
        };
        let Destination::Path(path) = address else { return Verdict::Allow };
        let seen = match look_up(attempt.thread, &path) {
            Ok(Some(seen)) => seen,
            // The call says what is wrong.
            Ok(None) => return Verdict::Allow,
            Err(error) => return Verdict::Fail(error.raw_os_error().unwrap_or(libc::EACCES)),
        };
        if !self.filter.is_waiting(attempt) {
            return Verdict::Fail(libc::EACCES);
        }
        if self.open.allows(&seen.path, self.home.as_deref()) || self.is_inside(&seen) {
            return Verdict::Allow;
        }
        let bound = self.outside.bound().unwrap_or_default();
        let listener = bound.iter().find(|bound| bound.is(&seen.file));
        if listener.is_none() && !process::is_socket_path_bound(&seen.path) {
            // Nothing listens there any more, so that the program may start its own.
            return Verdict::Fail(libc::ECONNREFUSED);
        }
        self.refused += 1;
        let (mut sentence, mut ended) = (None, None);
        let is_new = self.said.len() < MOST_SENTENCES && self.said.insert(seen.path.clone());
        let takes_over = host_sockets::is_of_running_instance(&seen.path);
        if is_new || takes_over {
            // That of a third network namespace, such as another tunnel's, has no number here.
            let holder = listener.and_then(|listener| process::socket_owner(listener.inode));
            let holder = holder.map(|(pid, name)| SocketOwner { pid, name });
            sentence = Some(host_sockets::refusal_message(&seen.path, holder.as_ref()));
        }
        if takes_over {
            // What it does when it is refused would harm the running instance: it takes the profile's lock away.
            ended = process::process_of_thread(attempt.thread).filter(|_| self.filter.is_waiting(attempt));
        }
        if sentence.is_some() {
            self.tell(sentence, ended);
        }
        if let Some(pid) = ended {
            let _ = process::kill(pid, Signal::SIGKILL);
        }
        Verdict::Fail(libc::EACCES)
    }

    /// Whether a socket of the tunnel's network namespace is bound to a file.
    fn is_inside(&mut self, seen: &Seen) -> bool {
        if self.remembered.contains(&seen.id) {
            return true;
        }
        let bound = self.inside.bound().unwrap_or_default();
        let is_inside = bound.iter().any(|bound| bound.is(&seen.file));
        if is_inside {
            if self.remembered.len() >= MOST_REMEMBERED {
                self.remembered.clear();
            }
            self.remembered.insert(seen.id);
        }
        is_inside
    }

    /// Tells the launcher of what was refused. One that does not listen hears of it the next time.
    fn tell(&mut self, sentence: Option<String>, ended: Option<i32>) {
        let report = Report { refused: self.refused, sentence, ended };
        if self.reporter.tell(&report) {
            self.told = self.refused;
        }
        self.told_at = Some(Instant::now());
    }
}

/// Looks a path up as a thread of the program does. None if the thread will find out by itself that nothing can be connected to there.
fn look_up(thread: i32, path: &[u8]) -> io::Result<Option<Seen>> {
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
    Ok(Some(Seen { file: SocketFile::new(&path, &found, &system), path, id }))
}

/// Opens a path as a process sees it: from its root directory, which may be another one than this process's, or from its working
/// directory.
fn open_as(process: &Path, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let (from, path) = start_of(path);
    let whole = match from {
        Start::Root => Some([b"/", path].concat()),
        Start::Directory(name) => from_root(process, name, path)?,
        Start::Itself(name) => return rustix::fs::open(process.join(name), flags, Mode::empty()),
    };
    let Some(whole) = whole else {
        // The directory has no path any more. Where a link in the path leads is not what the process would find, so whatever is not found
        // is refused.
        let directory = rustix::fs::open(process.join("cwd"), flags | OFlags::DIRECTORY, Mode::empty())?;
        return resolve(&directory, path, flags, ResolveFlags::NO_SYMLINKS).map_err(|error| match error {
            rustix::io::Errno::NOENT => rustix::io::Errno::ACCESS,
            other => other,
        });
    };
    let root = rustix::fs::open(process.join("root"), flags | OFlags::DIRECTORY, Mode::empty())?;
    match resolve(&root, &whole, flags, ResolveFlags::IN_ROOT) {
        // A link of /proc leads elsewhere, as `/proc/PID/fd/7` does: these cannot be followed below a root directory.
        Err(rustix::io::Errno::XDEV | rustix::io::Errno::LOOP) => {
            let path = [process.join("root").as_os_str().as_bytes(), b"/", &whole].concat();
            rustix::fs::open(OsStr::from_bytes(&path), flags, Mode::empty())
        }
        other => other,
    }
}

/// Where a path begins.
enum Start<'a> {
    /// At the root directory.
    Root,
    /// At a directory of the process, which has this name below `/proc/PID`.
    Directory(&'a OsStr),
    /// It is this name below `/proc/PID`, and no more.
    Itself(&'a OsStr),
}

/// Tells where a path begins, and what follows. `/proc/self` and the like are about whoever asks.
fn start_of(path: &[u8]) -> (Start<'_>, &[u8]) {
    let own = [&b"/proc/self/"[..], b"/proc/thread-self/"].iter().find_map(|prefix| path.strip_prefix(*prefix));
    // `/dev/fd` is a link to `/proc/self/fd`.
    let own = own.or_else(|| path.starts_with(b"/dev/fd/").then(|| &path[b"/dev/".len()..]));
    let Some(own) = own else {
        return match path.strip_prefix(b"/") {
            Some(rest) => (Start::Root, rest),
            None => (Start::Directory(OsStr::new("cwd")), path),
        };
    };
    // What the directory is called: `cwd`, `root`, `fd/7`.
    let parts = if own.starts_with(b"fd/") { 2 } else { 1 };
    let end = own.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at).nth(parts - 1);
    match end {
        Some(end) if &own[..end] == b"root" => (Start::Root, &own[end + 1..]),
        Some(end) => (Start::Directory(OsStr::from_bytes(&own[..end])), &own[end + 1..]),
        None => (Start::Itself(OsStr::from_bytes(own)), b""),
    }
}

/// The path from a process's root directory of what is at a path from one of its directories. None if that has no path any more.
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

/// Opens a path below a directory. The kernel gives up when something is renamed or mounted meanwhile.
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
