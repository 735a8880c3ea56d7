//! User namespaces (user_namespaces(7)): in one of its own, an ordinary user has all capabilities over what it creates
//! there, and none over what exists already.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

use nix::sched::CloneFlags;
use rustix::thread::LinkNameSpaceType;

use super::namespace::NamespaceId;
use super::process::{self, ProcessHandle};

/// The ioctl(2) request for the user namespace that owns another namespace (`NS_GET_USERNS` of linux/nsfs.h).
const NS_GET_USERNS: u64 = 0xb701;

/// The ioctl(2) request for the parent of a user namespace (`NS_GET_PARENT` of linux/nsfs.h).
const NS_GET_PARENT: u64 = 0xb702;

/// The user namespace in which this process began.
#[derive(Debug)]
struct Origin {
    namespace: OwnedFd,
    /// What its map looks like from every namespace: see [`ranges_of`].
    ranges: Vec<(u32, u32)>,
    no_new_privileges: bool,
}

static ORIGIN: OnceLock<Origin> = OnceLock::new();

/// Returns the user namespace in which this process began, or the process that forked it. The first call must be made
/// before it enters another one.
fn origin() -> io::Result<&'static Origin> {
    if let Some(origin) = ORIGIN.get() {
        return Ok(origin);
    }
    let found = Origin {
        namespace: File::open("/proc/self/ns/user")?.into(),
        ranges: ranges_of("self")?,
        no_new_privileges: has_no_new_privileges("self")?,
    };
    Ok(ORIGIN.get_or_init(|| found))
}

/// Opens the user namespace in which this process began. A process in a nested namespace cannot open it: it can open
/// its own and those that it may trace, and can ask for ancestors only up to its own (`ns_get_owner()` in the kernel's
/// kernel/user_namespace.c). So the descriptor proves that its sender is, or was, outside of the nested namespaces, or
/// that a process outside has passed it to the sender.
///
/// # Errors
/// Fails as open(2) does.
pub fn original() -> io::Result<BorrowedFd<'static>> {
    origin().map(|origin| origin.namespace.as_fd())
}

/// Returns whether a descriptor is that of the user namespace in which this process began.
///
/// # Errors
/// Fails as fstat(2) does.
pub fn is_original(namespace: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(NamespaceId::of(namespace)? == NamespaceId::of(original()?)?)
}

/// Fails unless a process is in the user namespace in which this one began. This process must have entered a nested one
/// with a single user, and have CAP_SYS_PTRACE there.
///
/// A process in a nested namespace may make itself untraceable by executing a file that it may not read, so the failure
/// to look into it proves nothing. The map of its users can be read for every process. In the nested namespaces it has
/// one user, so a map with several is that of the original namespace or of one outside the nested ones.
///
/// # Errors
/// Fails with `NotFound` if the process has ended, with `PermissionDenied` if it is elsewhere, and as reading from
/// `/proc` does.
pub fn require_original(pid: i32) -> io::Result<()> {
    let refuse = |what: &str| Err(io::Error::new(io::ErrorKind::PermissionDenied, what.to_owned()));
    let process = ProcessHandle::of(pid)?;
    let origin = origin()?;
    if ranges_of(pid)? != origin.ranges {
        return refuse("it is in another user namespace");
    }
    if !has_several(&origin.ranges) {
        let is_hidden = fs::metadata(format!("/proc/{pid}/ns/user"))
            .is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
        // The programs of a tunnel have no_new_privs, so one that has made itself untraceable is recognized by that.
        if !is_hidden || (has_no_new_privileges(pid)? && !origin.no_new_privileges) {
            return refuse("it is in a nested user namespace");
        }
    }
    if process.has_ended()? {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(())
}

/// Returns the users of a process's user namespace, by the first of each range and their number. The users that they
/// are outside are left out, as their numbers depend on the reader's namespace. `process` is a process ID or `self`.
fn ranges_of(process: impl std::fmt::Display) -> io::Result<Vec<(u32, u32)>> {
    let map = fs::read_to_string(format!("/proc/{process}/uid_map"))?;
    let range = |line: &str| -> Option<(u32, u32)> {
        let mut fields = line.split_ascii_whitespace();
        Some((fields.next()?.parse().ok()?, fields.nth(1)?.parse().ok()?))
    };
    map.lines().map(range).collect::<Option<_>>().ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn has_several(ranges: &[(u32, u32)]) -> bool {
    ranges.iter().map(|(_, count)| u64::from(*count)).sum::<u64>() > 1
}

/// Returns whether a process has `no_new_privs`, which its children have as well. Any process may read that.
fn has_no_new_privileges(process: impl std::fmt::Display) -> io::Result<bool> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let value = status.lines().find_map(|line| line.strip_prefix("NoNewPrivs:"));
    Ok(value.is_none_or(|value| value.trim() != "0"))
}

/// Moves the calling process, which must have one thread, into a new user namespace in which its user and its primary
/// group stay what they are. No other user or group exists there, so the process cannot drop or change its groups.
///
/// # Errors
/// Fails with `EPERM`, `ENOSPC` or `EUSERS` where the system forbids it: user_namespaces(7).
pub fn create() -> io::Result<()> {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    origin()?;
    nix::sched::unshare(CloneFlags::CLONE_NEWUSER)?;
    // The /proc entries of a process that cannot be traced belong to root, who is no user of this namespace.
    process::enable_ptrace_and_core_dumps()?;
    let mapped = fs::write("/proc/self/setgroups", "deny")
        .and_then(|()| fs::write("/proc/self/uid_map", format!("{uid} {uid} 1")))
        .and_then(|()| fs::write("/proc/self/gid_map", format!("{gid} {gid} 1")));
    process::disable_ptrace_and_core_dumps()?;
    mapped
}

/// Moves the calling process, which must have one thread, into the user namespace that owns a network namespace, unless
/// it has entered it already.
///
/// # Errors
/// Fails with `EPERM` if the calling user did not create that user namespace, or if it is not nested directly in the
/// caller's: processes in there could have made it.
pub fn enter_owner(of: BorrowedFd<'_>) -> io::Result<()> {
    let (original, current) = (NamespaceId::of(original()?)?, NamespaceId::of(File::open("/proc/self/ns/user")?)?);
    let owner = related(of, NS_GET_USERNS)?;
    if NamespaceId::of(owner.as_fd())? == current && current != original {
        return Ok(());
    }
    let parent = related(owner.as_fd(), NS_GET_PARENT)?;
    if NamespaceId::of(parent.as_fd())? != original {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    rustix::thread::move_into_link_name_space(owner.as_fd(), Some(LinkNameSpaceType::User))?;
    process::disable_ptrace_and_core_dumps()
}

/// Returns whether the calling process's user namespace owns another namespace. Only a process with CAP_SYS_ADMIN in
/// a user namespace can have made a namespace that it owns.
///
/// # Errors
/// Fails as open(2) and ioctl(2) do.
pub fn owns(namespace: BorrowedFd<'_>) -> io::Result<bool> {
    let own = NamespaceId::of(File::open("/proc/self/ns/user")?)?;
    Ok(NamespaceId::of(related(namespace, NS_GET_USERNS)?)? == own)
}

/// Opens the user namespace that owns another namespace, or the parent of one (ioctl_ns(2)).
fn related(of: BorrowedFd<'_>, request: u64) -> io::Result<OwnedFd> {
    // SAFETY: the requests take no argument, and return a new descriptor or -1.
    let descriptor = unsafe { libc::ioctl(of.as_raw_fd(), request as _) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, so nothing else owns it. It is closed on exec.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
