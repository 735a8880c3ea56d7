//! Network namespaces: making them, giving them a name that ip-netns(8) accepts, and working inside them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sched::CloneFlags;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::thread::LinkNameSpaceType;
use serde::{Deserialize, Serialize};

use crate::linux::capabilities::{self, CapabilitySet};

/// Where ip-netns(8) keeps the names of network namespaces.
pub const NAMES_DIRECTORY: &str = "/run/netns";

/// How long somebody may have the directory of names open before it is taken for in use.
const LOOK_PATIENCE: Duration = Duration::from_millis(100);

/// How long the lock on [`NAMES_DIRECTORY`] is waited for. Who takes it in earnest holds it for some system calls only.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// The magic number of the file system of namespaces (statfs(2)).
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// The stack of a thread that works in a namespace, in bytes: requests of netlink and their answers fit many times.
const THREAD_STACK: usize = 256 * 1024;

/// A network namespace, kept alive by an open descriptor.
#[derive(Debug)]
pub struct NetworkNamespace(OwnedFd);

/// What tells a namespace apart while it lives (namespaces(7)). The kernel may use the number again afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NamespaceId {
    device: u64,
    inode: u64,
}

impl AsFd for NetworkNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for NetworkNamespace {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<NetworkNamespace> for OwnedFd {
    fn from(namespace: NetworkNamespace) -> OwnedFd {
        namespace.0
    }
}

impl NetworkNamespace {
    /// The namespace of the calling thread.
    pub fn current() -> io::Result<Self> {
        File::open("/proc/thread-self/ns/net").map(|file| Self(file.into()))
    }

    /// Makes a new namespace, and runs `inside` in it before anything else can be there. The calling thread stays where it
    /// is: the work is done by a thread that ends with this call, so that no error can leave a thread astray.
    ///
    /// # Errors
    /// `EPERM` without CAP_SYS_ADMIN, `ENOSPC` at the limit of namespaces, and what `inside` returns.
    pub fn create<T: Send>(inside: impl FnOnce() -> io::Result<T> + Send) -> io::Result<(Self, T)> {
        on_own_thread(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET)?;
            let namespace = Self::current()?;
            let value = inside()?;
            Ok((namespace, value))
        })
    }

    /// Another handle to the same namespace.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// What tells this namespace apart.
    pub fn id(&self) -> io::Result<NamespaceId> {
        let status = rustix::fs::fstat(&self.0)?;
        Ok(NamespaceId { device: status.st_dev, inode: status.st_ino })
    }

    /// Runs `inside` in this namespace, on a thread that ends with this call.
    pub fn run<T: Send>(&self, inside: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_own_thread(|| {
            self.enter()?;
            inside()
        })
    }

    /// Moves the calling thread into this namespace, for good.
    ///
    /// # Errors
    /// `EPERM` without CAP_SYS_ADMIN over the namespace's user namespace and one's own.
    pub fn enter(&self) -> io::Result<()> {
        Ok(rustix::thread::move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))?)
    }
}

/// A thread that lives in a network namespace, for work that has to be done there again and again.
#[derive(Debug)]
pub struct NamespaceThread {
    jobs: mpsc::Sender<Job>,
}

type Job = Box<dyn FnOnce() + Send>;

impl NamespaceThread {
    /// Starts a thread, moves it into a namespace, and limits it to `capabilities` there. It ends when this value is dropped.
    pub fn start(namespace: NetworkNamespace, capabilities: CapabilitySet) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let resident = Self { jobs };
        std::thread::Builder::new().name("namespace".into()).stack_size(THREAD_STACK).spawn(move || {
            let entered = namespace.enter().and_then(|()| capabilities::limit(capabilities, capabilities));
            drop(namespace);
            // Without the namespace no job is done: one that is dropped undone tells who waits for it.
            if entered.is_ok() {
                queue.into_iter().for_each(|job| job());
            }
        })?;
        resident.run(|| ())?;
        Ok(resident)
    }

    /// Does work in the namespace, and waits for it.
    ///
    /// # Errors
    /// If the thread is not there, because it could not enter the namespace.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let (sender, result) = mpsc::sync_channel(1);
        let job = move || {
            // Who asked is waiting.
            let _ = sender.send(work());
        };
        let gone = || io::Error::other("the thread in the tunnel's namespace has ended");
        self.jobs.send(Box::new(job)).map_err(|_| gone())?;
        result.recv().map_err(|_| gone())
    }
}

impl NamespaceId {
    /// The namespace of a process, if it is there and may be asked: that of its first thread, or of another where the first has ended.
    pub fn of_process(pid: i32) -> io::Result<Self> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        match Self::of_thread(&process) {
            // A thread that has ended is in no namespace.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let threads = fs::read_dir(process.join("task"))?;
                threads.filter_map(|thread| Self::of_thread(&thread.ok()?.path()).ok()).next().ok_or(error)
            }
            other => other,
        }
    }

    /// The mount namespace of a process, if it is there and may be asked.
    pub fn of_mounts(pid: i32) -> io::Result<Self> {
        let status = fs::metadata(format!("/proc/{pid}/ns/mnt"))?;
        Ok(Self { device: status.dev(), inode: status.ino() })
    }

    fn of_thread(thread: &Path) -> io::Result<Self> {
        let status = fs::metadata(thread.join("ns/net"))?;
        Ok(Self { device: status.dev(), inode: status.ino() })
    }
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread =
            std::thread::Builder::new().name("namespace".into()).stack_size(THREAD_STACK).spawn_scoped(scope, work)?;
        thread.join().map_err(|_| io::Error::other("the thread that worked in a namespace panicked"))?
    })
}

/// The file that stands for a name.
pub fn path_of(name: &str) -> PathBuf {
    Path::new(NAMES_DIRECTORY).join(name)
}

/// What [`set_up_names_directory`] has to make, so that [`tear_down_names_directory`] can take exactly that away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamesSetup {
    /// The directory itself.
    pub directory: bool,
    /// The mount on it.
    pub mount: bool,
}

/// What there is to make before `/run/netns` is ready.
///
/// # Errors
/// `NotADirectory` if it is something else.
pub fn missing_names_setup() -> io::Result<NamesSetup> {
    match fs::metadata(NAMES_DIRECTORY) {
        Ok(found) if !found.is_dir() => return Err(io::ErrorKind::NotADirectory.into()),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(NamesSetup { directory: true, mount: true });
        }
        Err(error) => return Err(error),
    }
    let status = rustix::fs::statx(CWD, NAMES_DIRECTORY, AtFlags::empty(), StatxFlags::BASIC_STATS)?;
    // Before Linux 5.8 this cannot be told. Then the mount counts as somebody's, and stays.
    let can_tell = status.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT);
    Ok(NamesSetup { directory: false, mount: can_tell && !status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) })
}

/// Makes `/run/netns` ready as ip-netns(8) does: a directory that is a shared mount, so that a name which is made or removed
/// here is made or removed in every mount namespace that shares it. Without that, a name removed here would live on in the
/// mount namespaces of others, and the network namespace with it.
pub fn set_up_names_directory() -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o755).create(NAMES_DIRECTORY) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let _lock = lock_names()?;
    let share =
        || rustix::mount::mount_change(NAMES_DIRECTORY, MountPropagationFlags::SHARED | MountPropagationFlags::REC);
    if share().is_err() {
        // It is no mount point yet.
        rustix::mount::mount_bind_recursive(NAMES_DIRECTORY, NAMES_DIRECTORY)?;
        share()?;
    }
    Ok(())
}

/// Takes away what [`set_up_names_directory`] made, unless others' names are there by now.
pub fn tear_down_names_directory(made: NamesSetup) -> io::Result<()> {
    if made.mount && !unmount_names()? {
        return Ok(());
    }
    if made.directory {
        match fs::remove_dir(NAMES_DIRECTORY) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTEMPTY | libc::EBUSY | libc::ENOENT)) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Unmounts the directory of names, and says whether it is nobody else's.
fn unmount_names() -> io::Result<bool> {
    let begin = Instant::now();
    loop {
        let others = match fs::read_dir(NAMES_DIRECTORY) {
            Ok(mut names) => names.next().is_some(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(error) => return Err(error),
        };
        if others {
            return Ok(false);
        }
        match rustix::mount::unmount(NAMES_DIRECTORY, UnmountFlags::empty()) {
            // Somebody looks at what names there are, or is at work there. In the latter case it is theirs now.
            Err(rustix::io::Errno::BUSY) if begin.elapsed() < LOOK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(rustix::io::Errno::BUSY) => return Ok(false),
            // Whoever was killed here had unmounted it already, and not yet removed the directory.
            Err(rustix::io::Errno::INVAL) => return Ok(true),
            other => return Ok(other.map(|()| true)?),
        }
    }
}

/// The lock that ip-netns(8) takes, too, while it makes the directory ready. Anybody can open that directory, and so hold the lock
/// for ever: after [`LOCK_PATIENCE`] it is done without. The worst to come of that is a second mount on the directory.
fn lock_names() -> io::Result<File> {
    let directory = File::open(NAMES_DIRECTORY)?;
    let begin = Instant::now();
    loop {
        match rustix::fs::flock(&directory, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if begin.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(()) | Err(rustix::io::Errno::WOULDBLOCK) => return Ok(directory),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Gives a namespace a name: the file `path`, which must not exist, becomes a mount of it. Until then, and again once the
/// mount is gone, the file holds `mark`, so that whoever was killed in between can tell it for its own. It is never there
/// without it.
///
/// # Errors
/// `EEXIST` if the name is taken.
pub fn bind_name(namespace: &NetworkNamespace, path: &Path, mark: &str) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    // A file without a name yet (O_TMPFILE of open(2)), which tmpfs and all common file systems have.
    let mut file = OpenOptions::new().write(true).mode(0o444).custom_flags(libc::O_TMPFILE).open(directory)?;
    file.write_all(mark.as_bytes())?;
    let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::linkat(CWD, unnamed, CWD, path, AtFlags::SYMLINK_FOLLOW)?;
    let source = format!("/proc/self/fd/{}", namespace.as_fd().as_raw_fd());
    let named = rustix::mount::mount_bind(source, path).map_err(io::Error::from);
    if named.is_err() {
        let _ = fs::remove_file(path);
    }
    named
}

/// What stands behind a name.
#[derive(Debug)]
pub enum NameLookup {
    /// Nothing: the name is free.
    Free,
    /// A namespace.
    Namespace(NetworkNamespace),
    /// A file without a namespace, with the beginning of its text.
    File(String),
}

/// Looks up a name.
pub fn look_up(path: &Path) -> io::Result<NameLookup> {
    named(File::open(path))
}

/// Where names are, as the calling process sees it now: for one that moves to a mount namespace of its own, where a name that is
/// given later need not appear.
#[derive(Debug)]
pub struct NamesDirectory(OwnedFd);

impl NamesDirectory {
    /// Holds on to the place. [`NAMES_DIRECTORY`] need not be there yet.
    pub fn open() -> io::Result<Self> {
        let parent = Path::new(NAMES_DIRECTORY).parent().unwrap_or(Path::new("/"));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(parent, flags, Mode::empty())?))
    }

    /// Looks up a name, given as its path below [`NAMES_DIRECTORY`].
    pub fn look_up(&self, path: &Path) -> io::Result<NameLookup> {
        let below = Path::new(NAMES_DIRECTORY).parent().and_then(|parent| path.strip_prefix(parent).ok());
        let below = below.ok_or(io::ErrorKind::InvalidInput)?;
        let file = rustix::fs::openat(&self.0, below, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        named(file.map(File::from).map_err(io::Error::from))
    }
}

fn named(file: io::Result<File>) -> io::Result<NameLookup> {
    let mut file = match file {
        // Where the directory of names is none, there are no names.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(NameLookup::Free);
        }
        file => file?,
    };
    if rustix::fs::fstatfs(&file)?.f_type as i64 == NSFS_MAGIC {
        return Ok(NameLookup::Namespace(NetworkNamespace(file.into())));
    }
    let mut text = vec![0; 128];
    let length = file.read(&mut text)?;
    Ok(NameLookup::File(String::from_utf8_lossy(&text[..length]).into_owned()))
}

/// Takes a name away. Whoever is in the namespace stays in it. That there is no such name is no error.
pub fn remove_name(path: &Path) -> io::Result<()> {
    match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
