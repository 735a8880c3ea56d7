//! Mounts in a mount namespace of one's own (mount_namespaces(7)).

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};
use rustix::thread::LinkNameSpaceType;

/// A mount namespace, kept alive by an open descriptor.
#[derive(Debug)]
pub struct MountNamespace(OwnedFd);

impl MountNamespace {
    /// Opens the namespace of the calling thread.
    ///
    /// # Errors
    /// Fails as open(2) does.
    pub fn current() -> io::Result<Self> {
        fs::File::open("/proc/thread-self/ns/mnt").map(|file| Self(file.into()))
    }

    /// Moves the calling process, which must have one thread, into the namespace. Its root and its working directory
    /// are the root of the namespace then.
    ///
    /// # Errors
    /// Fails with `EPERM` without CAP_SYS_ADMIN and CAP_SYS_CHROOT, and with `EINVAL` for another kind of file.
    pub fn enter(&self) -> io::Result<()> {
        Ok(rustix::thread::move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Mount))?)
    }
}

impl AsFd for MountNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for MountNamespace {
    fn from(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }
}

/// Moves the calling process to the root of its mount namespace, and returns whether its root was there already.
///
/// # Errors
/// Fails as [`MountNamespace::enter`] and statx(2) do.
pub fn enter_own_root(namespace: &MountNamespace) -> io::Result<bool> {
    let root = || -> io::Result<_> {
        let found = rustix::fs::statx(CWD, "/", AtFlags::empty(), StatxFlags::INO | StatxFlags::MNT_ID)?;
        let has_mount = found.stx_mask & StatxFlags::MNT_ID.bits() != 0;
        Ok(has_mount.then_some((found.stx_mnt_id, found.stx_ino)))
    };
    let before = root()?;
    namespace.enter()?;
    Ok(before.is_some() && root()? == before)
}

/// Makes all mounts of the calling thread's mount namespace known to the namespaces that are copied from it: what is
/// mounted or unmounted here appears or disappears there.
///
/// # Errors
/// Fails as mount(2) does.
pub fn share() -> io::Result<()> {
    Ok(rustix::mount::mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)?)
}

/// Moves the calling thread into a new mount namespace. Its mounts stay inside, while mounts of the former one still
/// appear and disappear in it.
///
/// # Errors
/// Fails with `EPERM` without CAP_SYS_ADMIN.
pub fn unshare() -> io::Result<()> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
    Ok(rustix::mount::mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?)
}

/// Mounts a tmpfs that only root can write to.
///
/// Its limit is 64 MiB, more than any `/etc/hosts` needs, even one that blocks all known advertisers.
///
/// # Errors
/// Fails as mount(2) does.
pub fn mount_tmpfs(at: &Path) -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(rustix::mount::mount("vpn-exec", at, c"tmpfs", flags, Some(c"mode=0755,size=64m"))?)
}

/// Creates an empty, read-only tmpfs that is not mounted yet.
///
/// # Errors
/// Fails as fsopen(2) and fsmount(2) do, with `ENOSYS` before Linux 5.2.
pub fn empty_tmpfs() -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(context.as_fd(), "mode", "0755")?;
    rustix::mount::fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// Covers a directory with an empty, read-only tmpfs.
///
/// # Errors
/// Fails as [`empty_tmpfs`] and move_mount(2) do.
pub fn empty(directory: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(rustix::mount::move_mount(empty_tmpfs()?, "", CWD, directory, flags)?)
}

/// Bind-mounts `source` on `target`.
///
/// # Errors
/// Fails as mount(2) does.
pub fn bind(source: &Path, target: &Path) -> io::Result<()> {
    Ok(rustix::mount::mount_bind(source, target)?)
}

/// Bind-mounts `source` on `target`, with all mounts below it.
///
/// # Errors
/// Fails as mount(2) does.
pub fn bind_recursive(source: &Path, target: &Path) -> io::Result<()> {
    Ok(rustix::mount::mount_bind_recursive(source, target)?)
}

/// Moves the mount at `from` to the directory `onto`.
///
/// # Errors
/// Fails with `EINVAL` if the mount that contains it is shared with another mount namespace: see [`unshare`].
pub fn move_mount(from: &Path, onto: &Path) -> io::Result<()> {
    Ok(rustix::mount::mount_move(from, onto)?)
}

/// Makes the mount at `target` read-only, but not the file system in other places.
///
/// # Errors
/// Fails as mount(2) does.
pub fn make_read_only(target: &Path) -> io::Result<()> {
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(rustix::mount::mount_remount(target, flags, c"")?)
}

/// Sets the nosuid flag of all mounts in the calling thread's mount namespace, so that executing a file brings no
/// privileges. Mounts that appear later are not affected.
///
/// # Errors
/// Fails with `ENOSYS` before Linux 5.12.
pub fn set_nosuid_everywhere() -> io::Result<()> {
    /// `struct mount_attr` of linux/mount.h.
    #[repr(C)]
    struct Attributes {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    let set = MountAttrFlags::MOUNT_ATTR_NOSUID.bits().into();
    let attributes = Attributes { set, clear: 0, propagation: 0, user_namespace: 0 };
    let (root, size) = (c"/".as_ptr(), size_of::<Attributes>());
    // SAFETY: the kernel reads the path up to its NUL and `size` bytes of the attributes. Both live until the call
    // returns.
    let done = unsafe {
        libc::syscall(libc::SYS_mount_setattr, libc::AT_FDCWD, root, libc::AT_RECURSIVE, &raw const attributes, size)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Detaches the topmost mount at `target`. Open files in it stay usable.
///
/// # Errors
/// Fails with `EINVAL` if `target` is not a mount point.
pub fn detach(target: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(target, UnmountFlags::DETACH)?)
}

/// Replaces `/sys` by that of the calling thread's network namespace, and carries over the mounts `below` it, such as
/// `/sys/fs/cgroup`. A sysfs shows the interfaces of the namespace in which it was mounted.
///
/// # Errors
/// Fails with `EPERM` in a user namespace that does not own the network namespace, as in some containers.
pub fn replace_sysfs(below: &[PathBuf]) -> io::Result<()> {
    let below = BindCopies::of(below);
    let read_only = rustix::fs::statvfs("/sys")?.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY);
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    if read_only {
        flags |= MountFlags::RDONLY;
    }
    rustix::mount::mount("sysfs", "/sys", c"sysfs", flags, None)?;
    below.attach();
    Ok(())
}

/// Copies of the mounts below a directory, to be attached again on top of a new mount on that directory.
#[derive(Debug)]
pub struct BindCopies(Vec<(PathBuf, OwnedFd)>);

impl BindCopies {
    /// Copies all mounts below a directory. Mounts that cannot be copied are left out.
    ///
    /// # Errors
    /// Fails if `/proc/self/mountinfo` cannot be read.
    pub fn below(directory: &str) -> io::Result<Self> {
        Ok(Self::of(&mounted_below(directory)?))
    }

    /// Copies these mounts, with all below them. Mounts that cannot be copied are left out.
    fn of(mounts: &[PathBuf]) -> Self {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        let copied = |path: &PathBuf| {
            let tree = rustix::mount::open_tree(CWD, path, flags).ok()?;
            Some((path.clone(), tree))
        };
        Self(mounts.iter().filter_map(copied).collect())
    }

    /// Attaches the copies at their former places.
    pub fn attach(self) {
        for (path, tree) in self.0 {
            // A mount that cannot be attached is hidden, which is safe. Containers lack such mounts as well.
            let moved = rustix::mount::move_mount(tree, "", CWD, &path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH);
            if let Err(error) = moved {
                tracing::debug!(path = %path.display(), %error, "a mount is hidden from the program");
            }
        }
    }
}

/// Hides the host's interfaces in `/sys` where [`replace_sysfs`] is not possible.
///
/// # Errors
/// Fails as mount(2) does.
pub fn hide_sysfs_interfaces() -> io::Result<()> {
    for path in ["/sys/class/net", "/sys/devices/virtual/net"].map(Path::new) {
        if path.exists() {
            mount_tmpfs(path)?;
            make_read_only(path)?;
        }
    }
    Ok(())
}

/// Returns the topmost mounts below a directory (proc_pid_mountinfo(5)).
///
/// # Errors
/// Fails if `/proc/self/mountinfo` cannot be read.
pub fn mounted_below(directory: &str) -> io::Result<Vec<PathBuf>> {
    let mut found: Vec<String> = Vec::new();
    for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
        let Some(path) = line.split(' ').nth(4).map(unescape) else { continue };
        if path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/')) {
            found.push(path);
        }
    }
    let mut top: Vec<String> = Vec::new();
    for path in &found {
        let nested =
            found.iter().any(|other| path.strip_prefix(other.as_str()).is_some_and(|rest| rest.starts_with('/')));
        if !nested && !top.contains(path) {
            top.push(path.clone());
        }
    }
    Ok(top.into_iter().map(PathBuf::from).collect())
}

/// Undoes the octal escapes of `/proc/self/mountinfo`: `\040` is a blank.
fn unescape(field: &str) -> String {
    let mut text = String::with_capacity(field.len());
    let mut rest = field;
    while let Some(at) = rest.find('\\') {
        text.push_str(&rest[..at]);
        let digits = rest.get(at + 1..at + 4);
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                text.push(char::from(byte));
                rest = &rest[at + 4..];
            }
            None => {
                text.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    text.push_str(rest);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_escapes_are_undone() {
        assert_eq!(unescape(r"/a\040b\134c"), r"/a b\c");
        assert_eq!(unescape(r"/a\9"), r"/a\9");
    }

    #[test]
    fn only_topmost_mounts_are_found() {
        let below_root = mounted_below("").expect("mountinfo is readable");
        assert!(below_root.iter().any(|path| path == Path::new("/proc")), "{below_root:?}");
        assert!(!below_root.iter().any(|path| path.starts_with("/proc/sys")), "{below_root:?}");
    }
}
