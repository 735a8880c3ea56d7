//! Mounts in a mount namespace of one's own (mount_namespaces(7)).

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};

/// Moves the calling thread into a new mount namespace: what is mounted in it stays in it, what the host mounts and unmounts
/// later appears and vanishes in it, too.
pub fn unshare() -> io::Result<()> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
    Ok(rustix::mount::mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?)
}

/// Mounts a file system in mount_tmpfs, for root alone to write. It may hold 64 MiB, which no `/etc/hosts` reaches, not even one that
/// blocks the world's advertisements, and takes what is in it.
pub fn mount_tmpfs(at: &Path) -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(rustix::mount::mount("vpn-exec", at, c"tmpfs", flags, Some(c"mode=0755,size=64m"))?)
}

/// A file system in mount_tmpfs in which nothing is, nor can be, which is mounted nowhere yet.
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

/// Makes `target` show what `source` is.
pub fn bind(source: &Path, target: &Path) -> io::Result<()> {
    Ok(rustix::mount::mount_bind(source, target)?)
}

/// Makes `target` show what `source` is, with all that is mounted below it.
pub fn bind_recursive(source: &Path, target: &Path) -> io::Result<()> {
    Ok(rustix::mount::mount_bind_recursive(source, target)?)
}

/// Moves the mount at `from` onto a directory.
///
/// # Errors
/// `EINVAL` if what it is mounted in is shared with another mount namespace: see [`unshare`].
pub fn move_mount(from: &Path, onto: &Path) -> io::Result<()> {
    Ok(rustix::mount::mount_move(from, onto)?)
}

/// Makes the mount at `target` read-only, for its own mount point alone.
pub fn make_read_only(target: &Path) -> io::Result<()> {
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(rustix::mount::mount_remount(target, flags, c"")?)
}

/// Has executing a file of any mount in the calling thread's mount namespace bring no privileges: neither those of a set-user-ID file, nor
/// capabilities of a file. Mounts that appear later are not concerned.
///
/// # Errors
/// `ENOSYS` before Linux 5.12.
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
    // SAFETY: the kernel reads the path, up to its zero, and as much of the attributes as is said; both live until the call returns.
    let done = unsafe {
        libc::syscall(libc::SYS_mount_setattr, libc::AT_FDCWD, root, libc::AT_RECURSIVE, &raw const attributes, size)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes the topmost mount at `target` out of the tree. What is in use lives on until it is no longer.
pub fn detach(target: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(target, UnmountFlags::DETACH)?)
}

/// Replaces `/sys` by that of the calling thread's network namespace: a sysfs shows the interfaces of the namespace in which
/// it was mounted. What is mounted below (`/sys/fs/cgroup` and others) is carried over.
pub fn replace_sysfs() -> io::Result<()> {
    let below = BindCopies::below("/sys")?;
    let read_only = rustix::fs::statvfs("/sys")?.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY);
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    if read_only {
        flags |= MountFlags::RDONLY;
    }
    rustix::mount::mount("sysfs", "/sys", c"sysfs", flags, None)?;
    below.attach();
    Ok(())
}

/// Mounts that are about to be covered with the mount point that they are below, to be put back on top of what covers it.
#[derive(Debug)]
pub struct BindCopies(Vec<(PathBuf, OwnedFd)>);

impl BindCopies {
    /// All below a mount point, or any directory.
    pub fn below(point: &str) -> io::Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        let opened = |path: PathBuf| {
            let tree = rustix::mount::open_tree(CWD, &path, flags).ok()?;
            Some((path, tree))
        };
        Ok(Self(mounted_below(point)?.into_iter().filter_map(opened).collect()))
    }

    /// Puts them back.
    pub fn attach(self) {
        for (path, tree) in self.0 {
            // One that cannot be carried over is hidden, which is safe; the program can do without it, as in a container.
            let moved = rustix::mount::move_mount(tree, "", CWD, &path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH);
            if let Err(error) = moved {
                tracing::debug!(path = %path.display(), %error, "a mount is hidden from the program");
            }
        }
    }
}

/// Hides the host's interfaces where [`replace_sysfs`] is not possible.
pub fn hide_sysfs_interfaces() -> io::Result<()> {
    for path in ["/sys/class/net", "/sys/devices/virtual/net"].map(Path::new) {
        if path.exists() {
            mount_tmpfs(path)?;
            make_read_only(path)?;
        }
    }
    Ok(())
}

/// The topmost mounts below a mount point (proc_pid_mountinfo(5)).
fn mounted_below(point: &str) -> io::Result<Vec<PathBuf>> {
    let mut found: Vec<String> = Vec::new();
    for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
        let Some(path) = line.split(' ').nth(4).map(unescape) else { continue };
        if path.strip_prefix(point).is_some_and(|rest| rest.starts_with('/')) {
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
