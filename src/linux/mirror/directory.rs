//! A directory that is copied entry by entry, and the operations on its entries.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags};

/// The flag of move_mount(2) that places a mount beneath the topmost one (`MOVE_MOUNT_BENEATH`, since Linux 6.5).
const BENEATH: MoveMountFlags = MoveMountFlags::from_bits_retain(0x200);

/// The maximum size in bytes of a file whose contents are copied.
const MAX_COPIED: u64 = 1 << 20;

/// The flags to open a directory for reading, and for working below it.
pub(super) const READ: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);
pub(super) const PATH: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);

/// The identity of a file: its device, inode number and creation time, since inode numbers are reused.
pub(super) type FileIdentity = (u32, u32, u64, i64, u32);

/// A directory that is copied entry by entry.
#[derive(Debug)]
pub(super) struct MirroredDirectory {
    /// The original.
    pub(super) source: OwnedFd,
    /// The copy as the program sees it, in which entries are mounted.
    pub(super) shown: OwnedFd,
    /// The copy by a detached mount, in which entries are created: the visible mount may be read-only.
    pub(super) writable: OwnedFd,
    pub(super) entries: HashMap<OsString, MirroredEntry>,
    pub(super) watch: Option<i32>,
}

/// An entry of the original, as it was copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MirroredEntry {
    pub(super) kind: FileType,
    pub(super) identity: FileIdentity,
}

impl MirroredEntry {
    pub(super) fn of(directory: &OwnedFd, name: &OsStr) -> rustix::io::Result<Self> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::BTIME;
        let found = rustix::fs::statx(directory, name, flags, wanted)?;
        let born = found.stx_btime;
        let identity = (found.stx_dev_major, found.stx_dev_minor, found.stx_ino, born.tv_sec, born.tv_nsec);
        Ok(Self { kind: FileType::from_raw_mode(found.stx_mode.into()), identity })
    }

    /// Returns whether the entry is neither a directory nor a symbolic link, so that a mount can replace it.
    pub(super) fn is_file(&self) -> bool {
        !matches!(self.kind, FileType::Directory | FileType::Symlink)
    }
}

impl MirroredDirectory {
    /// Returns the names of the original's entries.
    pub(super) fn names(&self) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.source)? {
            let name = OsString::from_vec(entry?.file_name().to_bytes().to_vec());
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Copies a symbolic link.
    pub(super) fn add_symlink(&self, name: &OsStr) -> io::Result<()> {
        let target = rustix::fs::readlinkat(&self.source, name, Vec::new())?;
        Ok(rustix::fs::symlinkat(target, &self.writable, name)?)
    }

    /// Creates a directory that is to be copied entry by entry. Returns the original, and the copy as it is shown and
    /// as it is writable.
    pub(super) fn add_directory(&self, name: &OsStr) -> io::Result<(OwnedFd, OwnedFd, OwnedFd)> {
        rustix::fs::mkdirat(&self.writable, name, Mode::from_raw_mode(0o755))?;
        let source = rustix::fs::openat(&self.source, name, READ, Mode::empty())?;
        let shown = rustix::fs::openat(&self.shown, name, PATH, Mode::empty())?;
        let writable = rustix::fs::openat(&self.writable, name, PATH, Mode::empty())?;
        let mode = Mode::from_raw_mode(rustix::fs::fstat(&source)?.st_mode);
        rustix::fs::chmodat(&self.writable, name, mode, AtFlags::empty())?;
        Ok((source, shown, writable))
    }

    /// Creates a directory or a file, and mounts the original's entry on it.
    pub(super) fn add_mount(&self, name: &OsStr, kind: FileType, recursive: bool) -> io::Result<()> {
        if kind == FileType::Directory {
            rustix::fs::mkdirat(&self.writable, name, Mode::from_raw_mode(0o755))?;
        } else {
            rustix::fs::mknodat(&self.writable, name, FileType::RegularFile, Mode::from_raw_mode(0o644), 0)?;
        }
        let mounted = self.mount(name, recursive, MoveMountFlags::empty());
        if mounted.is_err() {
            self.unlink(name);
        }
        mounted
    }

    /// Replaces a file without an instant in which it is missing, and returns whether it succeeded.
    pub(super) fn replace_mount(&self, name: &OsStr) -> bool {
        if self.mount(name, true, BENEATH).is_ok() {
            return self.unmount(name);
        }
        // Older kernels cannot mount beneath, nor on top of a removed file. So the file below the mount gets the new
        // contents, since it is visible until the new mount is in place.
        if let Err(error) = self.copy_contents(name) {
            tracing::debug!(?name, %error, "a file is empty for an instant");
        }
        while self.unmount(name) {}
        self.mount(name, true, MoveMountFlags::empty()).is_ok()
    }

    /// Removes an entry with all mounts on it, as far as possible.
    pub(super) fn remove(&self, name: &OsStr) {
        while self.unmount(name) {}
        self.unlink(name);
    }

    fn mount(&self, name: &OsStr, recursive: bool, how: MoveMountFlags) -> io::Result<()> {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::from_bits_retain(AtFlags::SYMLINK_NOFOLLOW.bits());
        if recursive {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let tree = rustix::mount::open_tree(&self.source, name, flags)?;
        let how = how | MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(rustix::mount::move_mount(tree, "", &self.shown, name, how)?)
    }

    /// Unmounts the topmost mount of an entry, and returns whether there was one.
    fn unmount(&self, name: &OsStr) -> bool {
        let place = Path::new("/proc/self/fd").join(self.shown.as_raw_fd().to_string()).join(name);
        rustix::mount::unmount(place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok()
    }

    fn unlink(&self, name: &OsStr) {
        // A directory in which the program has created files stays.
        let removed = rustix::fs::unlinkat(&self.writable, name, AtFlags::empty());
        if matches!(removed, Err(Errno::ISDIR | Errno::PERM)) {
            let _ = rustix::fs::unlinkat(&self.writable, name, AtFlags::REMOVEDIR);
        }
        tracing::trace!(name = %name.as_bytes().escape_ascii(), "an entry is gone");
    }

    /// Copies the contents of a file that all users may read to the file on which it is about to be mounted.
    fn copy_contents(&self, name: &OsStr) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mut source = File::from(rustix::fs::openat(&self.source, name, flags, Mode::empty())?);
        let found = source.metadata()?;
        if !found.is_file() || found.len() > MAX_COPIED || found.mode() & 0o444 != 0o444 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut text = Vec::new();
        source.read_to_end(&mut text)?;
        let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        File::from(rustix::fs::openat(&self.writable, name, flags, Mode::empty())?).write_all(&text)
    }
}

/// Returns the device of a file.
pub(super) fn device(directory: &OwnedFd, name: &OsStr) -> rustix::io::Result<(u32, u32)> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::EMPTY_PATH;
    let found = rustix::fs::statx(directory, name, flags, StatxFlags::TYPE)?;
    Ok((found.stx_dev_major, found.stx_dev_minor))
}
