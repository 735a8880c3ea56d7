//! Copies of directories in memory that lack some entries and are kept up to date (inotify(7)).
//!
//! Each entry of a copy is a bind mount of the original. A hidden entry does not exist in the copy. A mount over the
//! entry would not be enough: when the host renames or removes the entry (rename(2), unlink(2)), the kernel removes
//! that mount in all mount namespaces, and a new entry of the same name would be visible.

mod hidden_paths;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, StatxFlags, inotify};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags};

pub use hidden_paths::HiddenPaths;

use super::mounts;

/// The flag of move_mount(2) that places a mount beneath the topmost one (`MOVE_MOUNT_BENEATH`, since Linux 6.5).
const BENEATH: MoveMountFlags = MoveMountFlags::from_bits_retain(0x200);

/// The maximum size in bytes of a file that [`copy_contents`] copies.
const MAX_COPIED: u64 = 1 << 20;

/// The events that change a directory's list of entries.
const CHANGES: inotify::WatchFlags = inotify::WatchFlags::CREATE
    .union(inotify::WatchFlags::DELETE)
    .union(inotify::WatchFlags::MOVED_FROM)
    .union(inotify::WatchFlags::MOVED_TO)
    .union(inotify::WatchFlags::ONLYDIR);

/// The flags to open a directory for reading, and for working below it.
const READ: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);
const PATH: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);

/// Copies of directories in the calling process's mount namespace.
#[derive(Debug)]
pub struct Mirror {
    hidden: HiddenPaths,
    /// The directory where copies are built. It may be below an original.
    staging: PathBuf,
    /// The directories that are copied entry by entry, by their paths.
    directories: BTreeMap<PathBuf, MirroredDirectory>,
    /// Reports changes. None if the machine's limit of inotify instances was reached.
    inotify: Option<OwnedFd>,
    /// The copied directories by their watches.
    watches: HashMap<i32, PathBuf>,
    /// The parents of guarded directories and the names of these, by the watches of the parents.
    guarded: HashMap<i32, (OwnedFd, HashSet<OsString>)>,
    /// The devices of the file systems that cover directories.
    own: HashSet<(u32, u32)>,
    /// Sockets and directories that are hidden or contain hidden entries. They stay hidden after the host renames them:
    /// a service still listens in a renamed directory.
    withheld: HashSet<FileIdentity>,
}

/// The identity of a file: its device, inode number and creation time, since inode numbers are reused.
type FileIdentity = (u32, u32, u64, i64, u32);

/// A directory that is copied entry by entry.
#[derive(Debug)]
struct MirroredDirectory {
    /// The original.
    source: OwnedFd,
    /// The copy as the program sees it, in which entries are mounted.
    shown: OwnedFd,
    /// The copy by a detached mount, in which entries are created: the visible mount may be read-only.
    writable: OwnedFd,
    entries: HashMap<OsString, MirroredEntry>,
    watch: Option<i32>,
}

/// The entries of a directory that may have changed.
enum ChangedNames {
    All,
    These(HashSet<OsString>),
}

impl Default for ChangedNames {
    fn default() -> Self {
        Self::These(HashSet::new())
    }
}

impl MirroredDirectory {
    /// Returns the names of the original's entries.
    fn names(&self) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.source)? {
            let name = OsString::from_vec(entry?.file_name().to_bytes().to_vec());
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }
}

/// An entry of the original, as it was copied.
#[derive(Clone, Debug, PartialEq, Eq)]
struct MirroredEntry {
    kind: FileType,
    identity: FileIdentity,
}

impl MirroredEntry {
    fn of(directory: &OwnedFd, name: &OsStr) -> rustix::io::Result<Self> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::BTIME;
        let found = rustix::fs::statx(directory, name, flags, wanted)?;
        let born = found.stx_btime;
        let identity = (found.stx_dev_major, found.stx_dev_minor, found.stx_ino, born.tv_sec, born.tv_nsec);
        Ok(Self { kind: FileType::from_raw_mode(found.stx_mode.into()), identity })
    }
}

impl Mirror {
    /// Creates a mirror without copies. Copies will lack the `hidden` paths and be built at the directory `staging`.
    pub fn new(hidden: HiddenPaths, staging: &Path) -> Self {
        let inotify = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK);
        // At the machine's limit (fs.inotify.max_user_instances), the copies are not kept up to date.
        let inotify = inotify.inspect_err(|error| tracing::debug!(%error, "cannot watch directories for changes")).ok();
        let staging = staging.to_owned();
        let (directories, watches, guarded, own, withheld) = Default::default();
        Self { hidden, staging, directories, inotify, watches, guarded, own, withheld }
    }

    /// Covers a directory with a copy that lacks the hidden entries, in it or below.
    ///
    /// Only directories that contain hidden entries are copied. Others are bind mounts of the host's directories, so
    /// new files in them are visible at once.
    ///
    /// # Errors
    /// Fails as mount(2) and the like do. The directory may be covered partly then, so no program may run in this mount
    /// namespace.
    pub fn cover(&mut self, directory: &Path) -> io::Result<()> {
        mounts::mount_tmpfs(&self.staging)?;
        let source = rustix::fs::open(directory, READ, Mode::empty())?;
        let shown = rustix::fs::open(&self.staging, PATH, Mode::empty())?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let writable = rustix::mount::open_tree(CWD, &self.staging, flags)?;
        rustix::fs::chmod(&self.staging, Mode::from_raw_mode(rustix::fs::fstat(&source)?.st_mode))?;
        self.own.insert(device(&shown, OsStr::new(""))?);
        self.copy(directory, source, shown, writable)?;
        mounts::move_mount(&self.staging, directory)
    }

    /// Keeps a directory covered. When the host removes or renames the directory, the kernel removes the mount on it.
    /// When the directory is created again, or for the first time, an empty tmpfs covers it a moment later.
    pub fn guard(&mut self, directory: &Path) {
        let (Some(parent), Some(name)) = (directory.parent(), directory.file_name()) else { return };
        let Some(inotify) = &self.inotify else { return };
        let watched = rustix::fs::open(parent, PATH, Mode::empty()).and_then(|parent| {
            let by_descriptor = format!("/proc/self/fd/{}", parent.as_raw_fd());
            Ok((inotify::add_watch(inotify, by_descriptor, CHANGES)?, parent))
        });
        match watched {
            Ok((watch, parent)) => {
                let (_, names) = self.guarded.entry(watch).or_insert_with(|| (parent, HashSet::new()));
                names.insert(name.to_owned());
            }
            Err(error) => tracing::debug!(path = %directory.display(), %error, "cannot watch a directory for changes"),
        }
    }

    /// Covers the guarded directory of a name, unless it is covered already.
    fn cover_again(&mut self, watch: i32, name: &OsStr) -> io::Result<()> {
        let Some((parent, names)) = self.guarded.get(&watch) else { return Ok(()) };
        let is_directory = || MirroredEntry::of(parent, name).is_ok_and(|entry| entry.kind == FileType::Directory);
        if !names.contains(name) || !is_directory() || self.own.contains(&device(parent, name)?) {
            return Ok(());
        }
        let empty = mounts::empty_tmpfs()?;
        self.own.insert(device(&empty, OsStr::new(""))?);
        Ok(rustix::mount::move_mount(empty, "", parent, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
    }

    /// Returns the descriptor that is readable when [`Self::update`] has work. None if directories cannot be watched.
    pub fn changes(&self) -> Option<BorrowedFd<'_>> {
        self.inotify.as_ref().map(AsFd::as_fd)
    }

    /// Returns all descriptors that the mirror needs.
    pub fn descriptors(&self) -> impl Iterator<Item = i32> {
        let of_directories = self.directories.values().flat_map(|it| [&it.source, &it.shown, &it.writable]);
        let of_parents = self.guarded.values().map(|(parent, _)| parent);
        of_directories.chain(of_parents).chain(&self.inotify).map(AsRawFd::as_raw_fd)
    }

    /// Brings the copies up to date with the originals.
    ///
    /// # Errors
    /// Fails if the changes cannot be read. An entry that cannot be shown is hidden instead.
    pub fn update(&mut self) -> io::Result<()> {
        let mut changed: HashMap<PathBuf, ChangedNames> = HashMap::new();
        let mut created: HashSet<(i32, OsString)> = HashSet::new();
        if let Some(inotify) = &self.inotify {
            let mut buffer = [const { MaybeUninit::uninit() }; 4096];
            let mut events = inotify::Reader::new(inotify, &mut buffer);
            loop {
                match events.next() {
                    Ok(event) if event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW) => {
                        changed.extend(self.directories.keys().map(|path| (path.clone(), ChangedNames::All)));
                        let guarded = self.guarded.iter();
                        created.extend(
                            guarded.flat_map(|(watch, (_, names))| names.iter().map(|name| (*watch, name.clone()))),
                        );
                    }
                    Ok(event) => {
                        let Some(name) = event.file_name() else { continue };
                        let name = OsString::from_vec(name.to_bytes().to_vec());
                        if self.guarded.contains_key(&event.wd()) {
                            created.insert((event.wd(), name));
                        } else if let Some(path) = self.watches.get(&event.wd())
                            && let ChangedNames::These(names) = changed.entry(path.clone()).or_default()
                        {
                            names.insert(name);
                        }
                    }
                    Err(Errno::AGAIN) => break,
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        for (watch, name) in created {
            if let Err(error) = self.cover_again(watch, &name) {
                tracing::debug!(?name, %error, "cannot cover a directory again");
            }
        }
        for (path, names) in changed {
            if let Err(error) = self.reconcile(&path, names) {
                tracing::debug!(path = %path.display(), %error, "a copy is out of date");
            }
        }
        Ok(())
    }

    /// Copies a directory entry by entry, and watches it.
    fn copy(&mut self, path: &Path, source: OwnedFd, shown: OwnedFd, writable: OwnedFd) -> io::Result<()> {
        // The watch is added before the directory is read, so that no change is missed.
        let watch = self.inotify.as_ref().and_then(|inotify| {
            let by_descriptor = format!("/proc/self/fd/{}", source.as_raw_fd());
            inotify::add_watch(inotify, by_descriptor, CHANGES).ok()
        });
        self.watches.extend(watch.map(|watch| (watch, path.to_owned())));
        let directory = MirroredDirectory { source, shown, writable, entries: HashMap::new(), watch };
        self.directories.insert(path.to_owned(), directory);
        self.reconcile(path, ChangedNames::All)
    }

    /// Brings the copy of a directory up to date, as far as the entries `names` are concerned.
    fn reconcile(&mut self, path: &Path, names: ChangedNames) -> io::Result<()> {
        let Some(mut directory) = self.directories.remove(path) else { return Ok(()) };
        let done = self.reconcile_entries(path, &mut directory, names);
        self.directories.insert(path.to_owned(), directory);
        done
    }

    fn reconcile_entries(
        &mut self,
        path: &Path,
        directory: &mut MirroredDirectory,
        names: ChangedNames,
    ) -> io::Result<()> {
        let names = match names {
            ChangedNames::All => directory.entries.keys().cloned().chain(directory.names()?).collect(),
            ChangedNames::These(names) => names,
        };
        let (mut gone, mut failed) = (names.clone(), None);
        for name in names {
            let whole = path.join(&name);
            let entry = match MirroredEntry::of(&directory.source, &name) {
                // The entry is gone, or cannot be accessed, such as a FUSE mount of another user.
                Err(error) => {
                    tracing::debug!(path = %whole.display(), %error, "hidden from the program");
                    continue;
                }
                Ok(entry) => entry,
            };
            if self.is_withheld(&whole, &entry) {
                continue;
            }
            gone.remove(&name);
            let before = directory.entries.remove(&name);
            if before.as_ref() == Some(&entry) {
                directory.entries.insert(name, entry);
                continue;
            }
            let replaced = before.as_ref().is_some_and(|before| self.replace(directory, &whole, before, &entry));
            if !replaced {
                if before.is_some() {
                    self.remove(directory, &whole);
                }
                match self.add(directory, &whole, entry.kind) {
                    // As above, or the program has created an entry of that name, which it keeps then.
                    Err(error)
                        if matches!(
                            error.raw_os_error(),
                            Some(libc::ENOENT | libc::EACCES | libc::ESTALE | libc::EEXIST | libc::ELOOP)
                        ) =>
                    {
                        tracing::debug!(path = %whole.display(), %error, "hidden from the program");
                        continue;
                    }
                    // Continue with the other entries.
                    Err(error) => {
                        failed.get_or_insert(error);
                        continue;
                    }
                    Ok(()) => {}
                }
            }
            directory.entries.insert(name, entry);
        }
        for name in gone {
            if directory.entries.remove(&name).is_some() {
                self.remove(directory, &path.join(name));
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Returns whether an entry is hidden, by its name or by one that it had before.
    fn is_withheld(&mut self, path: &Path, entry: &MirroredEntry) -> bool {
        let is_hidden = self.hidden.has(path);
        if !matches!(entry.kind, FileType::Directory | FileType::Socket) {
            return is_hidden;
        }
        if is_hidden || self.hidden.is_below(path) {
            self.withheld.insert(entry.identity);
            return is_hidden;
        }
        self.withheld.contains(&entry.identity)
    }

    /// Shows a new entry.
    fn add(&mut self, directory: &MirroredDirectory, path: &Path, kind: FileType) -> io::Result<()> {
        let name = path.file_name().unwrap_or_default();
        match kind {
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(&directory.source, name, Vec::new())?;
                return Ok(rustix::fs::symlinkat(target, &directory.writable, name)?);
            }
            FileType::Directory => {
                rustix::fs::mkdirat(&directory.writable, name, Mode::from_raw_mode(0o755))?;
                if self.hidden.is_below(path) {
                    let source = rustix::fs::openat(&directory.source, name, READ, Mode::empty())?;
                    let shown = rustix::fs::openat(&directory.shown, name, PATH, Mode::empty())?;
                    let writable = rustix::fs::openat(&directory.writable, name, PATH, Mode::empty())?;
                    let mode = Mode::from_raw_mode(rustix::fs::fstat(&source)?.st_mode);
                    rustix::fs::chmodat(&directory.writable, name, mode, AtFlags::empty())?;
                    return self.copy(path, source, shown, writable);
                }
            }
            _ => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                rustix::fs::openat(&directory.writable, name, flags, Mode::from_raw_mode(0o644))?;
            }
        }
        let mounted = self.mount(directory, path, MoveMountFlags::empty());
        if mounted.is_err() {
            unlink(directory, name);
        }
        mounted
    }

    /// Replaces an entry without an instant in which it is missing, and returns whether it succeeded.
    fn replace(&self, directory: &MirroredDirectory, path: &Path, before: &MirroredEntry, now: &MirroredEntry) -> bool {
        let is_file = |entry: &MirroredEntry| !matches!(entry.kind, FileType::Directory | FileType::Symlink);
        if !is_file(before) || !is_file(now) {
            return false;
        }
        let name = path.file_name().unwrap_or_default();
        if self.mount(directory, path, BENEATH).is_ok() {
            return unmount(directory, name);
        }
        // Older kernels cannot mount beneath, nor on top of a removed file. So the file below the mount gets the new
        // contents, since it is visible until the new mount is in place.
        if let Err(error) = copy_contents(directory, name) {
            tracing::debug!(?name, %error, "a file is empty for an instant");
        }
        while unmount(directory, name) {}
        self.mount(directory, path, MoveMountFlags::empty()).is_ok()
    }

    fn mount(&self, directory: &MirroredDirectory, path: &Path, how: MoveMountFlags) -> io::Result<()> {
        let name = path.file_name().unwrap_or_default();
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::from_bits_retain(AtFlags::SYMLINK_NOFOLLOW.bits());
        // The staging area must not contain itself.
        if !self.staging.starts_with(path) {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let tree = rustix::mount::open_tree(&directory.source, name, flags)?;
        let how = how | MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(rustix::mount::move_mount(tree, "", &directory.shown, name, how)?)
    }

    /// Removes an entry, as far as possible.
    fn remove(&mut self, directory: &MirroredDirectory, path: &Path) {
        if let Some(mut copied) = self.directories.remove(path) {
            for name in std::mem::take(&mut copied.entries).into_keys() {
                self.remove(&copied, &path.join(name));
            }
            if let (Some(watch), Some(inotify)) = (copied.watch, &self.inotify) {
                self.watches.remove(&watch);
                // The kernel has usually removed the watch with the directory.
                let _ = inotify::remove_watch(inotify, watch);
            }
        }
        let name = path.file_name().unwrap_or_default();
        while unmount(directory, name) {}
        unlink(directory, name);
    }
}

/// Copies the contents of a file that all users may read to the file on which it is about to be mounted.
fn copy_contents(directory: &MirroredDirectory, name: &OsStr) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut source = File::from(rustix::fs::openat(&directory.source, name, flags, Mode::empty())?);
    let found = source.metadata()?;
    if !found.is_file() || found.len() > MAX_COPIED || found.mode() & 0o444 != 0o444 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut text = Vec::new();
    source.read_to_end(&mut text)?;
    let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    File::from(rustix::fs::openat(&directory.writable, name, flags, Mode::empty())?).write_all(&text)
}

/// Returns the device of a file.
fn device(directory: &OwnedFd, name: &OsStr) -> rustix::io::Result<(u32, u32)> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::EMPTY_PATH;
    let found = rustix::fs::statx(directory, name, flags, StatxFlags::TYPE)?;
    Ok((found.stx_dev_major, found.stx_dev_minor))
}

/// Unmounts the topmost mount of an entry, and returns whether there was one.
fn unmount(directory: &MirroredDirectory, name: &OsStr) -> bool {
    let place = Path::new("/proc/self/fd").join(directory.shown.as_raw_fd().to_string()).join(name);
    rustix::mount::unmount(place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok()
}

fn unlink(directory: &MirroredDirectory, name: &OsStr) {
    // A directory in which the program has created files stays.
    let removed = rustix::fs::unlinkat(&directory.writable, name, AtFlags::empty());
    if matches!(removed, Err(Errno::ISDIR | Errno::PERM)) {
        let _ = rustix::fs::unlinkat(&directory.writable, name, AtFlags::REMOVEDIR);
    }
    tracing::trace!(name = %name.as_bytes().escape_ascii(), "an entry is gone");
}
