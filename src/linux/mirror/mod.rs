//! Copies of directories in memory that lack some entries and are kept up to date (inotify(7)).
//!
//! Each entry of a copy is a bind mount of the original. A hidden entry does not exist in the copy. A mount over the
//! entry would not be enough: when the host renames or removes the entry (rename(2), unlink(2)), the kernel removes
//! that mount in all mount namespaces, and a new entry of the same name would be visible.

mod directory;
mod hidden_paths;
mod watcher;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{AtFlags, CWD, FileType, Mode};
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

pub use hidden_paths::HiddenPaths;
pub use watcher::MirrorEvent;

use super::mounts;
use directory::{FileIdentity, MirroredDirectory, MirroredEntry, PATH, READ, device};
use watcher::Watcher;

/// Copies of directories in the calling process's mount namespace.
#[derive(Debug)]
pub struct Mirror {
    hidden: HiddenPaths,
    /// The directory where copies are built. It may be below an original.
    staging: PathBuf,
    /// The directories that are copied entry by entry, by their paths.
    directories: BTreeMap<PathBuf, MirroredDirectory>,
    /// Reports changes, also to other mirrors. None if the machine's limit of inotify instances was reached.
    watcher: Option<Rc<Watcher>>,
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

/// The entries of a directory that may have changed.
enum ChangedNames {
    All,
    These(HashSet<OsString>),
}

/// The changes that inotify has reported.
#[derive(Default)]
struct Changes {
    /// The copied directories with changed entries.
    copied: HashMap<PathBuf, ChangedNames>,
    /// The guarded names that may exist again, by the watches of their parents.
    guarded: HashSet<(i32, OsString)>,
}

impl Default for ChangedNames {
    fn default() -> Self {
        Self::These(HashSet::new())
    }
}

impl Mirror {
    /// Creates a mirror without copies. Copies will lack the `hidden` paths and be built at the directory `staging`.
    pub fn new(hidden: HiddenPaths, staging: &Path) -> Self {
        // At the machine's limit of instances, the copies are not kept up to date.
        let watcher =
            Watcher::new().inspect_err(|error| tracing::debug!(%error, "cannot watch directories for changes"));
        Self::watching(hidden, staging, watcher.ok().map(Rc::new))
    }

    /// Creates a mirror of the same originals, or of others, that gets its events together with this one: a machine has
    /// few inotify instances, and closing one takes 20 ms. [`Self::read_events`] of either returns those of both.
    pub fn beside(&self, hidden: HiddenPaths, staging: &Path) -> Self {
        Self::watching(hidden, staging, self.watcher.clone())
    }

    fn watching(hidden: HiddenPaths, staging: &Path, watcher: Option<Rc<Watcher>>) -> Self {
        let staging = staging.to_owned();
        let (directories, watches, guarded, own, withheld) = Default::default();
        Self { hidden, staging, directories, watcher, watches, guarded, own, withheld }
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
        // Hidden paths are compared byte by byte.
        let directory: &Path = &directory.components().collect::<PathBuf>();
        mounts::mount_tmpfs(&self.staging)?;
        let source = rustix::fs::openat(CWD, directory, READ, Mode::empty())?;
        let shown = rustix::fs::openat(CWD, &self.staging, PATH, Mode::empty())?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let writable = rustix::mount::open_tree(CWD, &self.staging, flags)?;
        let mode = Mode::from_raw_mode(rustix::fs::fstat(&source)?.st_mode);
        rustix::fs::chmodat(CWD, &self.staging, mode, AtFlags::empty())?;
        self.own.insert(device(&shown, OsStr::new(""))?);
        self.copy(directory, source, shown, writable)?;
        mounts::move_mount(&self.staging, directory)
    }

    /// Keeps a directory covered. When the host removes or renames the directory, the kernel removes the mount on it.
    /// When the directory is created again, or for the first time, an empty tmpfs covers it a moment later.
    pub fn guard(&mut self, directory: &Path) {
        let (Some(parent), Some(name)) = (directory.parent(), directory.file_name()) else { return };
        let Some(watcher) = &self.watcher else { return };
        let opened = rustix::fs::openat(CWD, parent, PATH, Mode::empty()).map_err(io::Error::from);
        match opened.and_then(|parent| Ok((watcher.watch(&parent)?, parent))) {
            Ok((watch, parent)) => match self.guarded.entry(watch) {
                Entry::Occupied(mut others) => {
                    watcher.release(watch);
                    others.get_mut().1.insert(name.to_owned());
                }
                Entry::Vacant(first) => drop(first.insert((parent, HashSet::from([name.to_owned()])))),
            },
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
        self.watcher.as_ref().map(|watcher| watcher.as_fd())
    }

    /// Returns all descriptors that the mirror needs.
    pub fn descriptors(&self) -> impl Iterator<Item = i32> {
        let of_directories = self.directories.values().flat_map(|it| [&it.source, &it.shown, &it.writable]);
        let of_parents = self.guarded.values().map(|(parent, _)| parent);
        let of_watcher = self.watcher.iter().map(|watcher| watcher.as_fd().as_raw_fd());
        of_directories.chain(of_parents).map(AsRawFd::as_raw_fd).chain(of_watcher)
    }

    /// Ends the watches of a mirror that is not needed any more. Others of the same inotify instance keep theirs. This
    /// is not done when a mirror is dropped: a fork of this process may have the same instance.
    pub fn unwatch(&mut self) {
        if let Some(watcher) = self.watcher.take() {
            let copied = self.directories.values().filter_map(|directory| directory.watch);
            copied.chain(self.guarded.keys().copied()).for_each(|watch| watcher.release(watch));
        }
    }

    /// Brings the copies up to date with the originals.
    ///
    /// # Errors
    /// Fails if the changes cannot be read. An entry that cannot be shown is hidden instead.
    pub fn update(&mut self) -> io::Result<()> {
        let events = self.read_events()?;
        self.follow(&events);
        Ok(())
    }

    /// Brings the copies up to date, as far as these events tell.
    pub fn follow(&mut self, events: &[MirrorEvent]) {
        let Changes { copied, guarded } = self.changes_of(events);
        for (watch, name) in guarded {
            if let Err(error) = self.cover_again(watch, &name) {
                tracing::debug!(?name, %error, "cannot cover a directory again");
            }
        }
        for (path, names) in copied {
            if let Err(error) = self.reconcile(&path, names) {
                tracing::debug!(path = %path.display(), %error, "a copy is out of date");
            }
        }
    }

    /// Reads all pending events of inotify.
    ///
    /// # Errors
    /// Fails as read(2) does.
    pub fn read_events(&self) -> io::Result<Vec<MirrorEvent>> {
        self.watcher.as_ref().map_or_else(|| Ok(Vec::new()), |watcher| watcher.read_events())
    }

    /// Returns what these events are about, as far as this mirror watches it.
    fn changes_of(&self, events: &[MirrorEvent]) -> Changes {
        let mut changes = Changes::default();
        for event in events {
            match event {
                MirrorEvent::Lost => {
                    changes.copied.extend(self.directories.keys().map(|path| (path.clone(), ChangedNames::All)));
                    for (watch, (_, names)) in &self.guarded {
                        changes.guarded.extend(names.iter().map(|name| (*watch, name.clone())));
                    }
                }
                MirrorEvent::Entry(watch, name) => {
                    if self.guarded.contains_key(watch) {
                        changes.guarded.insert((*watch, name.clone()));
                    } else if let Some(path) = self.watches.get(watch)
                        && let ChangedNames::These(names) = changes.copied.entry(path.clone()).or_default()
                    {
                        names.insert(name.clone());
                    }
                }
            }
        }
        changes
    }

    /// Copies a directory entry by entry, and watches it.
    fn copy(&mut self, path: &Path, source: OwnedFd, shown: OwnedFd, writable: OwnedFd) -> io::Result<()> {
        // The watch is added before the directory is read, so that no change is missed.
        let watch = self.watcher.as_ref().and_then(|watcher| watcher.watch(&source).ok());
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
            let is_replaceable = entry.is_file() && before.as_ref().is_some_and(MirroredEntry::is_file);
            if !(is_replaceable && directory.replace_mount(&name)) {
                if before.is_some() {
                    self.remove(directory, &whole);
                }
                match self.add(directory, &whole, entry.kind) {
                    Err(error) if is_hidden_by(&error) => {
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
            FileType::Symlink => directory.add_symlink(name),
            FileType::Directory if self.hidden.is_below(path) => {
                let (source, shown, writable) = directory.add_directory(name)?;
                self.copy(path, source, shown, writable)
            }
            // The staging area must not contain itself.
            _ => directory.add_mount(name, kind, !self.staging.starts_with(path)),
        }
    }

    /// Removes an entry, as far as possible, and forgets it if it was copied.
    fn remove(&mut self, directory: &MirroredDirectory, path: &Path) {
        if let Some(mut copied) = self.directories.remove(path) {
            for name in std::mem::take(&mut copied.entries).into_keys() {
                self.remove(&copied, &path.join(name));
            }
            if let (Some(watch), Some(watcher)) = (copied.watch, &self.watcher) {
                self.watches.remove(&watch);
                watcher.release(watch);
            }
        }
        directory.remove(path.file_name().unwrap_or_default());
    }
}

/// Returns whether an error of [`Mirror::add`] only concerns the entry: it is gone, it cannot be accessed, or the
/// program has created an entry of that name, which it keeps then.
fn is_hidden_by(error: &io::Error) -> bool {
    let numbers = [libc::ENOENT, libc::EACCES, libc::ESTALE, libc::EEXIST, libc::ELOOP];
    error.raw_os_error().is_some_and(|number| numbers.contains(&number))
}
