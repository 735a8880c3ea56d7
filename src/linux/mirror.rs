//! Directories as others in memory show them: all of their entries but some, by mounts (mount(2)), and kept up to date (inotify(7)).
//!
//! What hides an entry is that the copy has none of that name. A mount over the entry would not do: the kernel takes it away with the
//! entry, in all mount namespaces, when the host removes that (rename(2), unlink(2)), and what the host makes then under the same
//! name would be seen.

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

use super::mounts;

/// Has move_mount(2) put a mount beneath the topmost one (`MOVE_MOUNT_BENEATH`, since Linux 6.5).
const BENEATH: MoveMountFlags = MoveMountFlags::from_bits_retain(0x200);

/// The largest file that is copied for an instant, in bytes.
const COPIED: u64 = 1 << 20;

/// What is watched of a directory: which entries it has.
const CHANGES: inotify::WatchFlags = inotify::WatchFlags::CREATE
    .union(inotify::WatchFlags::DELETE)
    .union(inotify::WatchFlags::MOVED_FROM)
    .union(inotify::WatchFlags::MOVED_TO)
    .union(inotify::WatchFlags::ONLYDIR);

/// How a directory is opened to be read, and how to work below it.
const READ: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);
const PATH: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);

/// Paths that are not to be seen. The last part of one may end with `*`, which stands for any rest of a name.
#[derive(Clone, Debug)]
pub struct HiddenPaths(pub Vec<PathBuf>);

impl HiddenPaths {
    /// Whether a path is one of them.
    pub fn has(&self, path: &Path) -> bool {
        self.0.iter().any(|hidden| {
            let wildcard = hidden.file_name().and_then(|name| name.as_bytes().strip_suffix(b"*"));
            match (wildcard, path.file_name()) {
                (Some(begin), Some(name)) => hidden.parent() == path.parent() && name.as_bytes().starts_with(begin),
                _ => hidden == path,
            }
        })
    }

    /// Whether one of them is below a directory.
    pub fn is_below(&self, directory: &Path) -> bool {
        self.0.iter().any(|hidden| hidden != directory && hidden.starts_with(directory))
    }
}

/// Copies of directories in the calling process's mount namespace.
#[derive(Debug)]
pub struct Mirror {
    hidden: HiddenPaths,
    /// Where copies are built, which may be below what is copied.
    staging: PathBuf,
    /// The directories that are copied entry by entry, by their paths.
    directories: BTreeMap<PathBuf, Directory>,
    /// Tells of changes, and in which directory.
    inotify: Option<OwnedFd>,
    watches: HashMap<i32, PathBuf>,
    /// In which directories there are some that are to stay covered, by the watches of these, and what is to stay covered there.
    guarded: HashMap<i32, (OwnedFd, HashSet<OsString>)>,
    /// The file systems that cover something, by their devices.
    own: HashSet<(u32, u32)>,
    /// What is hidden, or has something below it that is. It is not to be seen by another name either: who listens in a directory that
    /// is renamed still does.
    withheld: HashSet<Identity>,
}

/// Which file something is: device, number, and when it was made, since numbers are used again.
type Identity = (u32, u32, u64, i64, u32);

/// A directory that is copied entry by entry.
#[derive(Debug)]
struct Directory {
    /// The original.
    source: OwnedFd,
    /// The copy as it is seen, where entries are mounted.
    shown: OwnedFd,
    /// The copy by a mount that nobody sees, where entries are made: the one that is seen may be read-only.
    made: OwnedFd,
    entries: HashMap<OsString, Entry>,
    watch: Option<i32>,
}

/// Which entries of a directory may have changed.
enum Names {
    All,
    These(HashSet<OsString>),
}

impl Default for Names {
    fn default() -> Self {
        Self::These(HashSet::new())
    }
}

impl Directory {
    /// The names of the original's entries.
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
struct Entry {
    /// What it is.
    kind: FileType,
    /// Which it is.
    identity: Identity,
}

impl Entry {
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
    /// Prepares to copy directories without what is `hidden`. `staging` is a directory to build the copies at.
    pub fn new(hidden: HiddenPaths, staging: &Path) -> Self {
        let inotify = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK);
        // The machine's limit (fs.inotify.max_user_instances) may be reached. Then the copies stay as they are.
        let inotify = inotify.inspect_err(|error| tracing::debug!(%error, "nothing can be watched")).ok();
        let staging = staging.to_owned();
        let (directories, watches, guarded, own, withheld) = Default::default();
        Self { hidden, staging, directories, inotify, watches, guarded, own, withheld }
    }

    /// Covers a directory with a copy in memory that has all of its entries but those that are hidden, here or further below.
    ///
    /// What is inside of a directory that is an entry is the host's own, so whatever is made there later is seen.
    ///
    /// # Errors
    /// If the system refuses. Then the directory may be covered by a part of it, so nobody is to run in this mount namespace.
    pub fn cover(&mut self, directory: &Path) -> io::Result<()> {
        mounts::mount_tmpfs(&self.staging)?;
        let source = rustix::fs::open(directory, READ, Mode::empty())?;
        let shown = rustix::fs::open(&self.staging, PATH, Mode::empty())?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let made = rustix::mount::open_tree(CWD, &self.staging, flags)?;
        rustix::fs::chmod(&self.staging, Mode::from_raw_mode(rustix::fs::fstat(&source)?.st_mode))?;
        self.own.insert(device(&shown, OsStr::new(""))?);
        self.copy(directory, source, shown, made)?;
        mounts::move_mount(&self.staging, directory)
    }

    /// Has a directory stay covered: with what covers it goes if the host removes or renames it, and when there is one of that name again,
    /// or for the first time, another covers it a moment later, in which nothing is.
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
            Err(error) => tracing::debug!(path = %directory.display(), %error, "it is not watched"),
        }
    }

    /// Covers what there is by a name that is guarded, unless it is covered.
    fn cover_again(&mut self, watch: i32, name: &OsStr) -> io::Result<()> {
        let Some((parent, names)) = self.guarded.get(&watch) else { return Ok(()) };
        let is_directory = || Entry::of(parent, name).is_ok_and(|entry| entry.kind == FileType::Directory);
        if !names.contains(name) || !is_directory() || self.own.contains(&device(parent, name)?) {
            return Ok(());
        }
        let nothing = mounts::empty_tmpfs()?;
        self.own.insert(device(&nothing, OsStr::new(""))?);
        Ok(rustix::mount::move_mount(nothing, "", parent, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
    }

    /// What to wait for, until [`Self::update`] has something to do. None if nothing can be watched.
    pub fn changes(&self) -> Option<BorrowedFd<'_>> {
        self.inotify.as_ref().map(AsFd::as_fd)
    }

    /// The descriptors that it takes to go on.
    pub fn descriptors(&self) -> impl Iterator<Item = i32> {
        let of_directories = self.directories.values().flat_map(|it| [&it.source, &it.shown, &it.made]);
        let of_parents = self.guarded.values().map(|(parent, _)| parent);
        of_directories.chain(of_parents).chain(&self.inotify).map(AsRawFd::as_raw_fd)
    }

    /// Makes the copies what the originals are by now.
    ///
    /// # Errors
    /// If it cannot be known what has changed. A single entry that cannot be shown is none.
    pub fn update(&mut self) -> io::Result<()> {
        let mut changed: HashMap<PathBuf, Names> = HashMap::new();
        let mut made: HashSet<(i32, OsString)> = HashSet::new();
        if let Some(inotify) = &self.inotify {
            let mut buffer = [const { MaybeUninit::uninit() }; 4096];
            let mut events = inotify::Reader::new(inotify, &mut buffer);
            loop {
                match events.next() {
                    Ok(event) if event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW) => {
                        changed.extend(self.directories.keys().map(|path| (path.clone(), Names::All)));
                        let guarded = self.guarded.iter();
                        made.extend(
                            guarded.flat_map(|(watch, (_, names))| names.iter().map(|name| (*watch, name.clone()))),
                        );
                    }
                    Ok(event) => {
                        let Some(name) = event.file_name() else { continue };
                        let name = OsString::from_vec(name.to_bytes().to_vec());
                        if self.guarded.contains_key(&event.wd()) {
                            made.insert((event.wd(), name));
                        } else if let Some(path) = self.watches.get(&event.wd())
                            && let Names::These(names) = changed.entry(path.clone()).or_default()
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
        for (watch, name) in made {
            if let Err(error) = self.cover_again(watch, &name) {
                tracing::debug!(?name, %error, "it is not covered");
            }
        }
        for (path, names) in changed {
            if let Err(error) = self.reconcile(&path, names) {
                tracing::debug!(path = %path.display(), %error, "a copy is out of date");
            }
        }
        Ok(())
    }

    /// Takes a directory to those that are copied entry by entry, and copies it.
    fn copy(&mut self, path: &Path, source: OwnedFd, shown: OwnedFd, made: OwnedFd) -> io::Result<()> {
        // Watched before it is read, so that nothing is missed in between.
        let watch = self.inotify.as_ref().and_then(|inotify| {
            let by_descriptor = format!("/proc/self/fd/{}", source.as_raw_fd());
            inotify::add_watch(inotify, by_descriptor, CHANGES).ok()
        });
        self.watches.extend(watch.map(|watch| (watch, path.to_owned())));
        let directory = Directory { source, shown, made, entries: HashMap::new(), watch };
        self.directories.insert(path.to_owned(), directory);
        self.reconcile(path, Names::All)
    }

    /// Makes the copy of one directory what the original is now, as far as these names go.
    fn reconcile(&mut self, path: &Path, names: Names) -> io::Result<()> {
        let Some(mut directory) = self.directories.remove(path) else { return Ok(()) };
        let done = self.reconcile_entries(path, &mut directory, names);
        self.directories.insert(path.to_owned(), directory);
        done
    }

    fn reconcile_entries(&mut self, path: &Path, directory: &mut Directory, names: Names) -> io::Result<()> {
        let names = match names {
            Names::All => directory.entries.keys().cloned().chain(directory.names()?).collect(),
            Names::These(names) => names,
        };
        let (mut gone, mut failed) = (names.clone(), None);
        for name in names {
            let whole = path.join(&name);
            let entry = match Entry::of(&directory.source, &name) {
                // It has gone in the meantime, or may not be looked at, such as another user's file system in user space.
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
                    // As above; or the program has made something of that name, which is its own then.
                    Err(error)
                        if matches!(
                            error.raw_os_error(),
                            Some(libc::ENOENT | libc::EACCES | libc::ESTALE | libc::EEXIST | libc::ELOOP)
                        ) =>
                    {
                        tracing::debug!(path = %whole.display(), %error, "hidden from the program");
                        continue;
                    }
                    // The others are not to suffer from it.
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

    /// Whether an entry is hidden, here or by the name that it had before.
    fn is_withheld(&mut self, path: &Path, entry: &Entry) -> bool {
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

    /// Shows an entry that was not there.
    fn add(&mut self, directory: &Directory, path: &Path, kind: FileType) -> io::Result<()> {
        let name = path.file_name().unwrap_or_default();
        match kind {
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(&directory.source, name, Vec::new())?;
                return Ok(rustix::fs::symlinkat(target, &directory.made, name)?);
            }
            FileType::Directory => {
                rustix::fs::mkdirat(&directory.made, name, Mode::from_raw_mode(0o755))?;
                if self.hidden.is_below(path) {
                    let source = rustix::fs::openat(&directory.source, name, READ, Mode::empty())?;
                    let shown = rustix::fs::openat(&directory.shown, name, PATH, Mode::empty())?;
                    let made = rustix::fs::openat(&directory.made, name, PATH, Mode::empty())?;
                    let mode = Mode::from_raw_mode(rustix::fs::fstat(&source)?.st_mode);
                    rustix::fs::chmodat(&directory.made, name, mode, AtFlags::empty())?;
                    return self.copy(path, source, shown, made);
                }
            }
            _ => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                rustix::fs::openat(&directory.made, name, flags, Mode::from_raw_mode(0o644))?;
            }
        }
        let mounted = self.mount(directory, path, MoveMountFlags::empty());
        if mounted.is_err() {
            unlink(directory, name);
        }
        mounted
    }

    /// Shows another entry in the place of one, at no instant nothing, and says whether it does.
    fn replace(&self, directory: &Directory, path: &Path, before: &Entry, now: &Entry) -> bool {
        let is_file = |entry: &Entry| !matches!(entry.kind, FileType::Directory | FileType::Symlink);
        if !is_file(before) || !is_file(now) {
            return false;
        }
        let name = path.file_name().unwrap_or_default();
        if self.mount(directory, path, BENEATH).is_ok() {
            return unmount(directory, name);
        }
        // Older kernels cannot, and put nothing on top of a file that was removed. So what is below shows for an instant what is to come.
        if let Err(error) = copy_for_an_instant(directory, name) {
            tracing::debug!(?name, %error, "for an instant it is empty");
        }
        while unmount(directory, name) {}
        self.mount(directory, path, MoveMountFlags::empty()).is_ok()
    }

    fn mount(&self, directory: &Directory, path: &Path, how: MoveMountFlags) -> io::Result<()> {
        let name = path.file_name().unwrap_or_default();
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::from_bits_retain(AtFlags::SYMLINK_NOFOLLOW.bits());
        // What is being built shall not be seen in itself.
        if !self.staging.starts_with(path) {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let tree = rustix::mount::open_tree(&directory.source, name, flags)?;
        let how = how | MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(rustix::mount::move_mount(tree, "", &directory.shown, name, how)?)
    }

    /// Takes an entry away, as far as it can be.
    fn remove(&mut self, directory: &Directory, path: &Path) {
        if let Some(mut copied) = self.directories.remove(path) {
            for name in std::mem::take(&mut copied.entries).into_keys() {
                self.remove(&copied, &path.join(name));
            }
            if let (Some(watch), Some(inotify)) = (copied.watch, &self.inotify) {
                self.watches.remove(&watch);
                // It has gone with the directory, as a rule.
                let _ = inotify::remove_watch(inotify, watch);
            }
        }
        let name = path.file_name().unwrap_or_default();
        while unmount(directory, name) {}
        unlink(directory, name);
    }
}

/// Copies a file that all may read to where it is about to be mounted.
fn copy_for_an_instant(directory: &Directory, name: &OsStr) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut source = File::from(rustix::fs::openat(&directory.source, name, flags, Mode::empty())?);
    let found = source.metadata()?;
    if !found.is_file() || found.len() > COPIED || found.mode() & 0o444 != 0o444 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut text = Vec::new();
    source.read_to_end(&mut text)?;
    let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    File::from(rustix::fs::openat(&directory.made, name, flags, Mode::empty())?).write_all(&text)
}

/// The device of a file system in which something is.
fn device(directory: &OwnedFd, name: &OsStr) -> rustix::io::Result<(u32, u32)> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::EMPTY_PATH;
    let found = rustix::fs::statx(directory, name, flags, StatxFlags::TYPE)?;
    Ok((found.stx_dev_major, found.stx_dev_minor))
}

/// Takes the topmost mount off an entry, and says whether there was one.
fn unmount(directory: &Directory, name: &OsStr) -> bool {
    let place = Path::new("/proc/self/fd").join(directory.shown.as_raw_fd().to_string()).join(name);
    rustix::mount::unmount(place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok()
}

fn unlink(directory: &Directory, name: &OsStr) {
    // What the program has put into a directory of its own making there stays, and is its own.
    let removed = rustix::fs::unlinkat(&directory.made, name, AtFlags::empty());
    if matches!(removed, Err(Errno::ISDIR | Errno::PERM)) {
        let _ = rustix::fs::unlinkat(&directory.made, name, AtFlags::REMOVEDIR);
    }
    tracing::trace!(name = %name.as_bytes().escape_ascii(), "an entry is gone");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_paths_are_recognised() {
        let paths = ["/run/nscd", "/run/dnsmasq*", "/run/systemd/resolve"].map(PathBuf::from);
        let hidden = HiddenPaths(paths.into());
        for (path, has) in [
            ("/run/nscd", true),
            ("/run/nscd2", false),
            ("/run/dnsmasq", true),
            ("/run/dnsmasq.pid", true),
            ("/run/x/dnsmasq", false),
            ("/run/systemd", false),
            ("/run/systemd/resolve", true),
            ("/run", false),
        ] {
            assert_eq!(hidden.has(Path::new(path)), has, "{path}");
        }
        // Names need not be text.
        assert!(hidden.has(Path::new(OsStr::from_bytes(b"/run/dnsmasq\xff"))));
        assert!(hidden.is_below(Path::new("/run")) && hidden.is_below(Path::new("/run/systemd")));
        assert!(!hidden.is_below(Path::new("/run/nscd")) && !hidden.is_below(Path::new("/run/sys")));
    }
}
