//! User namespaces (user_namespaces(7)): in one of its own, an ordinary user has all capabilities over what it creates
//! there, and none over what exists already.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sched::CloneFlags;
use rustix::thread::LinkNameSpaceType;

use super::process;

/// The ioctl(2) request for the user namespace that owns another namespace (`NS_GET_USERNS` of linux/nsfs.h).
const NS_GET_USERNS: u64 = 0xb701;

/// Moves the calling process, which must have one thread, into a new user namespace in which its user and its primary
/// group stay what they are. No other user or group exists there, so the process cannot drop or change its groups.
///
/// # Errors
/// Fails with `EPERM`, `ENOSPC` or `EUSERS` where the system forbids it: see [`explain`].
pub fn create() -> io::Result<()> {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    nix::sched::unshare(CloneFlags::CLONE_NEWUSER)?;
    // The /proc entries of a process that cannot be traced belong to root, who is no user of this namespace.
    process::enable_ptrace_and_core_dumps()?;
    let mapped = fs::write("/proc/self/setgroups", "deny")
        .and_then(|()| fs::write("/proc/self/uid_map", format!("{uid} {uid} 1")))
        .and_then(|()| fs::write("/proc/self/gid_map", format!("{gid} {gid} 1")));
    process::disable_ptrace_and_core_dumps()?;
    mapped
}

/// Moves the calling process, which must have one thread, into the user namespace that owns a network namespace.
///
/// # Errors
/// Fails with `EPERM` if the calling user did not create that user namespace.
pub fn enter_owner(of: BorrowedFd<'_>) -> io::Result<()> {
    let owner = owner(of)?;
    rustix::thread::move_into_link_name_space(owner.as_fd(), Some(LinkNameSpaceType::User))?;
    process::disable_ptrace_and_core_dumps()
}

/// Opens the user namespace that owns another namespace (ioctl_ns(2)).
fn owner(of: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument, and returns a new descriptor or -1.
    let descriptor = unsafe { libc::ioctl(of.as_raw_fd(), NS_GET_USERNS as _) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, so nothing else owns it. It is closed on exec.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
