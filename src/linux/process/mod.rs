//! Processes: forking and executing them, the attributes that they pass on, and what `/proc` tells about them.

mod descriptors;
mod handle;
pub(super) mod inspection;

use std::ffi::{CStr, CString, OsStr};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;

use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::sys::signal::Signal;
use nix::unistd::{ForkResult, Pid, SysconfVar, sysconf};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{SecureComputingMode, secure_computing_mode};

pub use descriptors::{
    clear_close_on_exec, close_all_except, close_range, is_open, redirect_to_null, set_close_on_exec_from,
    unshare_descriptors,
};
pub use handle::{ProcessHandle, ProcessId, is_ending, kill, kill_by_number};
pub use inspection::{
    ProcessSummary, children, describe, group_by_namespace, in_namespace, is_socket_path_bound, parent_of,
    process_of_thread, socket_owner,
};

/// The side of a fork that the caller is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forked {
    /// The parent, with the child's process ID.
    Parent(Pid),
    /// The child.
    Child,
}

/// Forks the calling process, which must have one thread only.
///
/// # Errors
/// Fails with `EBUSY` if the process has more threads: in the child, locks could stay held by threads that it does not
/// have.
pub fn fork() -> io::Result<Forked> {
    require_one_thread()?;
    // SAFETY: the process has one thread, so no lock is held by a thread that the child lacks.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Forked::Parent(child)),
        ForkResult::Child => Ok(Forked::Child),
    }
}

/// Forks the calling process, as [`fork`] does, into a process that another CPU is to run if it can.
///
/// The kernel tends to leave the new process to the CPU of a caller that is young itself, behind all that the caller
/// does and starts next, even if another CPU has nothing to do.
///
/// # Errors
/// Fails as [`fork`] does.
pub fn fork_aside() -> io::Result<Forked> {
    let forked = fork()?;
    if let Forked::Parent(child) = forked
        && let Err(error) = move_aside(child)
    {
        tracing::debug!(%error, "cannot choose the CPU of a process");
    }
    Ok(forked)
}

/// Moves a child to another CPU than the calling process's, once. Does nothing if the caller may not use all CPUs: its
/// choice of them could not be told from that of its control group, which the child is to follow later on. Nor under a
/// filter of system calls: a service's often kills a caller of sched_setaffinity(2) (`SystemCallFilter=~@resources`).
fn move_aside(child: Pid) -> nix::Result<()> {
    if secure_computing_mode() != Ok(SecureComputingMode::Disabled) {
        return Ok(());
    }
    let here = sched_getcpu()?;
    let mut others = sched_getaffinity(Pid::from_raw(0))?;
    let allowed = (0..CpuSet::count()).filter(|cpu| others.is_set(*cpu) == Ok(true)).count();
    let online = sysconf(SysconfVar::_NPROCESSORS_ONLN)?.and_then(|count| usize::try_from(count).ok());
    if allowed < 2 || Some(allowed) != online {
        return Ok(());
    }
    others.unset(here)?;
    let mut all = CpuSet::new();
    for cpu in 0..CpuSet::count() {
        all.set(cpu)?;
    }
    sched_setaffinity(child, &others)?;
    sched_setaffinity(child, &all)
}

/// Forks the calling process, which must have one thread only. The new process is a child of the caller's parent.
///
/// # Errors
/// Fails as [`fork`] does.
pub fn fork_sibling() -> io::Result<Forked> {
    require_one_thread()?;
    let flags = libc::CLONE_PARENT | libc::SIGCHLD;
    // SAFETY: without CLONE_VM and a stack this is fork(2). The process has one thread, so no lock is held by another.
    // The C library does not learn of this fork, so it keeps the old thread ID. Only raise(3) and locks that know their
    // owners use it, and the child uses neither.
    match unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0_usize, 0_usize, 0_usize, 0_usize) } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent(Pid::from_raw(pid as i32))),
    }
}

fn require_one_thread() -> io::Result<()> {
    match fs::read_dir("/proc/self/task")?.count() {
        1 => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EBUSY)),
    }
}

/// Makes the kernel send `signal` to the calling process when the thread that forked it ends (`PR_SET_PDEATHSIG` of
/// prctl(2)). Executing a set-user-ID program undoes this.
///
/// # Errors
/// Fails as prctl(2) does.
pub fn set_death_signal(signal: Signal) -> io::Result<()> {
    let signal = rustix::process::Signal::from_named_raw(signal as i32)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
    Ok(rustix::process::set_parent_process_death_signal(Some(signal))?)
}

/// Makes the calling process the parent of orphaned descendants (`PR_SET_CHILD_SUBREAPER` of prctl(2)).
///
/// # Errors
/// Fails as prctl(2) does.
pub fn become_subreaper() -> io::Result<()> {
    Ok(rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?)
}

/// Disables core dumps of the calling process, and forbids other processes of its user to trace it or to read its
/// `/proc` entries (`PR_SET_DUMPABLE` of prctl(2)). Executing a program undoes this.
///
/// # Errors
/// Fails as prctl(2) does.
pub fn disable_ptrace_and_core_dumps() -> io::Result<()> {
    Ok(rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Undoes [`disable_ptrace_and_core_dumps`], and the same effect of a change of user.
///
/// # Errors
/// Fails as prctl(2) does.
pub fn enable_ptrace_and_core_dumps() -> io::Result<()> {
    Ok(rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)?)
}

/// Replaces the inherited session keyring by a new, anonymous one (keyctl(2)).
///
/// Does nothing on a kernel without keyrings, and in a container that forbids keyring system calls.
///
/// # Errors
/// Fails as `KEYCTL_JOIN_SESSION_KEYRING` does, for example with `EDQUOT`.
pub fn join_new_session_keyring() -> io::Result<()> {
    /// `KEYCTL_JOIN_SESSION_KEYRING` of linux/keyctl.h.
    const JOIN_SESSION_KEYRING: libc::c_int = 1;

    // SAFETY: without a name the kernel reads nothing of this process's memory.
    let joined = unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, std::ptr::null::<libc::c_char>()) };
    match io::Error::last_os_error() {
        _ if joined >= 0 => Ok(()),
        error if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => Ok(()),
        error => Err(error),
    }
}

/// Raises the soft limit of open files to the hard limit (`RLIMIT_NOFILE` of getrlimit(2)).
///
/// # Errors
/// Fails as setrlimit(2) does.
pub fn raise_file_limit() -> io::Result<()> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    Ok(rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?)
}

/// Sets the file mode creation mask (umask(2)), and returns the former one.
pub fn set_umask(mask: u32) -> u32 {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(mask)).as_raw_mode()
}

/// Ends the calling process at once, without the exit handlers that it inherited from the process that forked it.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit(2) does nothing but end the process.
    unsafe { libc::_exit(code) }
}

/// Executes a program in the calling process, and returns only on failure.
///
/// A name without a slash is looked up in the directories of `search_path`, as execvp(3) does. The error is `ENOENT` if
/// no directory has the program, and otherwise the first error of a program that exists. (execvp(3) itself reports
/// `EACCES` if a directory is not searchable, even where no program is found.)
pub fn execute(program: &CStr, arguments: &[&CStr], environment: &[&CStr], search_path: &[u8]) -> io::Error {
    if program.to_bytes().contains(&b'/') {
        return execute_at(program, arguments, environment);
    }
    let mut failure = None;
    for directory in search_path.split(|byte| *byte == b':') {
        let directory = if directory.is_empty() { b"." } else { directory };
        let Ok(path) = CString::new([directory, b"/", program.to_bytes()].concat()) else { continue };
        let error = execute_at(&path, arguments, environment);
        let exists = fs::metadata(OsStr::from_bytes(path.to_bytes())).is_ok_and(|found| !found.is_dir());
        if exists && failure.is_none() {
            failure = Some(error);
        }
    }
    failure.unwrap_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
}

fn execute_at(path: &CStr, arguments: &[&CStr], environment: &[&CStr]) -> io::Error {
    match nix::unistd::execvpe(path, arguments, environment) {
        Ok(never) => match never {},
        Err(errno) => errno.into(),
    }
}
