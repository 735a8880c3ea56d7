//! The names of network namespaces in `/run/netns`, as ip-netns(8) makes and reads them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use serde::{Deserialize, Serialize};

use super::NetworkNamespace;

/// The directory of names (ip-netns(8)).
pub const NAMES_DIRECTORY: &str = "/run/netns";

/// How long another process may have the directory open before it counts as in use. `ls` has it open for an instant.
const BUSY_PATIENCE: Duration = Duration::from_millis(100);

/// How long to wait for the lock on [`NAMES_DIRECTORY`]. ip-netns(8) holds it for a few system calls.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// The magic number of the file system of namespaces (`NSFS_MAGIC` of linux/magic.h).
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Returns the path of a name.
pub fn path_of(name: &str) -> PathBuf {
    Path::new(NAMES_DIRECTORY).join(name)
}

/// The parts of the directory that [`set_up_names_directory`] creates and [`tear_down_names_directory`] removes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamesSetup {
    /// The directory itself.
    pub directory: bool,
    /// The shared mount on the directory.
    pub mount: bool,
}

/// Returns the parts of the directory that do not exist yet.
///
/// # Errors
/// Fails with `NotADirectory` if `/run/netns` is another kind of file.
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
    // Kernels before 5.8 do not report mount points. There, the mount counts as another program's and stays.
    let is_reported = status.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT);
    let is_mount = status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
    Ok(NamesSetup { directory: false, mount: is_reported && !is_mount })
}

/// Makes `/run/netns` a directory and a shared mount, as ip-netns(8) does.
///
/// With a shared mount, a name appears and disappears in all mount namespaces that share it. Otherwise a removed name
/// would live on in other mount namespaces, and the network namespace with it.
///
/// # Errors
/// Fails as mkdir(2) and mount(2) do.
pub fn set_up_names_directory() -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o755).create(NAMES_DIRECTORY) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let _lock = lock_names_directory()?;
    let flags = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    let share = || rustix::mount::mount_change(NAMES_DIRECTORY, flags);
    if share().is_err() {
        // Only a mount point can be shared.
        rustix::mount::mount_bind_recursive(NAMES_DIRECTORY, NAMES_DIRECTORY)?;
        share()?;
    }
    Ok(())
}

/// Removes the parts that [`set_up_names_directory`] created, unless other names exist by now.
///
/// # Errors
/// Fails as umount(2) and rmdir(2) do.
pub fn tear_down_names_directory(created: NamesSetup) -> io::Result<()> {
    if created.mount && !unmount_names_directory()? {
        return Ok(());
    }
    if created.directory {
        match fs::remove_dir(NAMES_DIRECTORY) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTEMPTY | libc::EBUSY | libc::ENOENT)) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Unmounts the directory of names, and returns whether no other program uses it.
fn unmount_names_directory() -> io::Result<bool> {
    let begin = Instant::now();
    loop {
        let has_names = match fs::read_dir(NAMES_DIRECTORY) {
            Ok(mut names) => names.next().is_some(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(error) => return Err(error),
        };
        if has_names {
            return Ok(false);
        }
        match rustix::mount::unmount(NAMES_DIRECTORY, UnmountFlags::empty()) {
            // Another process lists the names, or is about to add one. In the latter case the directory is in use.
            Err(Errno::BUSY) if begin.elapsed() < BUSY_PATIENCE => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(Errno::BUSY) => return Ok(false),
            // A process that was killed here had unmounted the directory, but not removed it.
            Err(Errno::INVAL) => return Ok(true),
            other => return Ok(other.map(|()| true)?),
        }
    }
}

/// Takes the lock that ip-netns(8) takes while it sets up the directory.
///
/// Any user can open the directory and hold the lock for ever, so the set-up goes on without it after
/// [`LOCK_PATIENCE`]. The worst result is a second mount on the directory.
fn lock_names_directory() -> io::Result<File> {
    let directory = File::open(NAMES_DIRECTORY)?;
    let begin = Instant::now();
    loop {
        match rustix::fs::flock(&directory, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if begin.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(()) | Err(Errno::WOULDBLOCK) => return Ok(directory),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Binds a namespace to a name: the file `path`, which must not exist, becomes a mount of the namespace.
///
/// Before the mount and after it is gone, the file contains `mark`, so that a name left by a killed process can be
/// recognised. The file never exists without its mark.
///
/// # Errors
/// Fails with `EEXIST` if the name is taken.
pub fn bind_name(namespace: &NetworkNamespace, path: &Path, mark: &str) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    // O_TMPFILE (open(2)), which tmpfs and all common file systems support, creates a file without a name.
    let mut file = OpenOptions::new().write(true).mode(0o444).custom_flags(libc::O_TMPFILE).open(directory)?;
    file.write_all(mark.as_bytes())?;
    let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::linkat(CWD, unnamed, CWD, path, AtFlags::SYMLINK_FOLLOW)?;
    let source = format!("/proc/self/fd/{}", namespace.as_fd().as_raw_fd());
    let bound = rustix::mount::mount_bind(source, path).map_err(io::Error::from);
    if bound.is_err() {
        let _ = fs::remove_file(path);
    }
    bound
}

/// The object behind a name.
#[derive(Debug)]
pub enum NameLookup {
    /// Nothing: the name is free.
    Free,
    /// A namespace.
    Namespace(NetworkNamespace),
    /// A file without a namespace, with the beginning of its text.
    File(String),
}

/// Looks up the name at a path.
///
/// # Errors
/// Fails if the file at the path cannot be opened or read.
pub fn look_up(path: &Path) -> io::Result<NameLookup> {
    lookup_of(File::open(path))
}

/// The directory of names in the current mount namespace. A process that moves to another mount namespace, in which
/// later names need not appear, can still look them up.
#[derive(Debug)]
pub struct NamesDirectory(OwnedFd);

impl NamesDirectory {
    /// Opens the parent of [`NAMES_DIRECTORY`], which need not exist yet itself.
    ///
    /// # Errors
    /// Fails as open(2) does.
    pub fn open() -> io::Result<Self> {
        let parent = Path::new(NAMES_DIRECTORY).parent().unwrap_or(Path::new("/"));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(parent, flags, Mode::empty())?))
    }

    /// Looks up the name at a path below [`NAMES_DIRECTORY`].
    ///
    /// # Errors
    /// Fails with `InvalidInput` for another path, and if the file cannot be opened or read.
    pub fn look_up(&self, path: &Path) -> io::Result<NameLookup> {
        let below = Path::new(NAMES_DIRECTORY).parent().and_then(|parent| path.strip_prefix(parent).ok());
        let below = below.ok_or(io::ErrorKind::InvalidInput)?;
        let file = rustix::fs::openat(&self.0, below, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        lookup_of(file.map(File::from).map_err(io::Error::from))
    }
}

fn lookup_of(file: io::Result<File>) -> io::Result<NameLookup> {
    let mut file = match file {
        // Without a directory of names, all names are free.
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

/// Removes a name, if it exists. Processes in the namespace stay in it.
///
/// # Errors
/// Fails as umount(2) and unlink(2) do.
pub fn remove_name(path: &Path) -> io::Result<()> {
    match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
