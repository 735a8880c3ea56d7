//! Processes: forking, executing, their relatives, and what they pass on.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{CStr, CString, OsStr};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use nix::unistd::{ForkResult, Pid, Uid};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use serde::{Deserialize, Serialize};

use crate::linux::namespace::NamespaceId;

/// Which side of a fork the caller is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forked {
    /// The parent, with the child's number.
    Parent(Pid),
    /// The child.
    Child,
}

/// Forks the calling process, which must have one thread only.
///
/// # Errors
/// `EBUSY` if there are more threads: a child of such a process may find locks held for ever by threads that it does not have.
pub fn fork() -> io::Result<Forked> {
    if fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    // SAFETY: the process has one thread, so the child has all threads that there were and no lock is held by another.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Forked::Parent(child)),
        ForkResult::Child => Ok(Forked::Child),
    }
}

/// Forks the calling process, which must have one thread only, so that the new one is a child of the caller's parent.
///
/// # Errors
/// As for [`fork`].
pub fn fork_sibling() -> io::Result<Forked> {
    if fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    let flags = libc::CLONE_PARENT | libc::SIGCHLD;
    // SAFETY: without CLONE_VM and a stack this is fork(2); the process has one thread, so no lock is held by another. What the C library
    // notes of a fork for itself (the number of the thread) is missed by it, which concerns raise(3) and locks that know their owners:
    // the child uses neither.
    match unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0_usize, 0_usize, 0_usize, 0_usize) } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent(Pid::from_raw(pid as i32))),
    }
}

/// Has the kernel send `signal` to the calling process when the thread that forked it ends (prctl(2)). Executing a
/// set-user-ID program undoes it.
pub fn set_death_signal(signal: Signal) -> io::Result<()> {
    let signal = rustix::process::Signal::from_named_raw(signal as i32)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
    Ok(rustix::process::set_parent_process_death_signal(Some(signal))?)
}

/// Makes the calling process the parent of its descendants whose own parents end (prctl(2)).
pub fn become_subreaper() -> io::Result<()> {
    Ok(rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?)
}

/// Keeps the calling process out of core dumps and away from the debuggers and `/proc` readers of its own user (prctl(2)).
/// Executing a program undoes it.
pub fn disable_ptrace_and_core_dumps() -> io::Result<()> {
    Ok(rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Joins a new session keyring without a name (keyctl(2)), in the place of the one that is inherited. Does nothing on a
/// kernel without keyrings, and in a container that allows none of their system calls to any process in it.
pub fn join_new_session_keyring() -> io::Result<()> {
    /// KEYCTL_JOIN_SESSION_KEYRING of linux/keyctl.h.
    const JOIN_SESSION_KEYRING: libc::c_int = 1;

    // SAFETY: without a name the kernel reads nothing of this process's memory.
    let joined = unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, std::ptr::null::<libc::c_char>()) };
    match io::Error::last_os_error() {
        _ if joined >= 0 => Ok(()),
        error if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => Ok(()),
        error => Err(error),
    }
}

/// Lets the debuggers and `/proc` readers of its user look at the calling process, as at any other. A change of the user forbids it.
pub fn enable_ptrace_and_core_dumps() -> io::Result<()> {
    Ok(rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)?)
}

/// Lets the calling process have as many open files as it may at most (RLIMIT_NOFILE of getrlimit(2)).
pub fn raise_file_limit() -> io::Result<()> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    Ok(rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?)
}

/// Sets the mask of permission bits that new files do not get (umask(2)), and returns the former one.
pub fn set_umask(mask: u32) -> u32 {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(mask)).as_raw_mode()
}

/// Ends the calling process at once, without running what was registered for its end by the process that forked it.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit(2) does nothing but end the process.
    unsafe { libc::_exit(code) }
}

/// Makes standard descriptors lead to `/dev/null`.
pub fn redirect_to_null(descriptors: &[RawFd]) -> io::Result<()> {
    let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    for descriptor in descriptors {
        // SAFETY: the standard descriptors are owned by nobody in particular, and stay open all the time.
        if unsafe { libc::dup2(null.as_raw_fd(), *descriptor) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Closes descriptors that were inherited and that nothing in this process owns, `first` to `last`.
pub fn close_range(first: RawFd, last: RawFd) -> io::Result<()> {
    for_range(first, last, 0, |descriptor| {
        // SAFETY: by the contract above no value in this process owns it, so no value is left with a closed descriptor.
        unsafe { libc::close(descriptor) };
    })
}

/// Closes all descriptors from 3 on that were inherited, but those that are `kept`.
pub fn close_all_except(kept: &mut [RawFd]) -> io::Result<()> {
    kept.sort_unstable();
    let mut first = 3;
    for descriptor in kept {
        close_range(first, *descriptor - 1)?;
        first = *descriptor + 1;
    }
    close_range(first, RawFd::MAX)
}

/// Gives the calling thread a table of descriptors of its own (close_range(2), `CLOSE_RANGE_UNSHARE`), in which only
/// `kept` is open. Other threads keep theirs. The thread must not use any other descriptor from then on, nor any value
/// that owns one.
///
/// # Errors
/// Before Linux 5.9. Then nothing has changed.
pub fn unshare_descriptors(kept: RawFd) -> io::Result<()> {
    let close_range = |first: RawFd, last: RawFd, flags: libc::c_uint| {
        // SAFETY: with the first call the table is this thread's own, and by the contract above it uses nothing that is
        // closed in it. The tables of other threads, and what owns descriptors there, are not touched.
        match unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    close_range(kept + 1, RawFd::MAX, libc::CLOSE_RANGE_UNSHARE)?;
    if kept > 0 { close_range(0, kept - 1, 0) } else { Ok(()) }
}

/// Marks every descriptor from `first` on as closed at the next exec.
pub fn set_close_on_exec_from(first: RawFd) -> io::Result<()> {
    for_range(first, RawFd::MAX, libc::CLOSE_RANGE_CLOEXEC, |descriptor| {
        // SAFETY: setting a flag invalidates no descriptor; on what is none any more it fails.
        unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) };
    })
}

/// Does something to all open descriptors of a range: by close_range(2), or one by one where the kernel (before 5.11) lacks it.
fn for_range(first: RawFd, last: RawFd, flags: libc::c_uint, one: impl Fn(RawFd)) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: what this does to descriptors is the callers' affair, who say why it is sound.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if result == 0 {
        return Ok(());
    }
    let numbers = fs::read_dir("/proc/self/fd")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let numbers: Vec<RawFd> = numbers.filter(|number| (first..=last).contains(number)).collect();
    numbers.into_iter().for_each(one);
    Ok(())
}

/// Whether a descriptor is open.
pub fn is_open(descriptor: RawFd) -> bool {
    // SAFETY: fcntl fails with EBADF on what is no descriptor; asking changes nothing.
    unsafe { libc::fcntl(descriptor, libc::F_GETFD) != -1 }
}

/// Lets descriptors `first..first + count` survive the next exec.
pub fn clear_close_on_exec(first: RawFd, count: RawFd) -> io::Result<()> {
    for number in first..first.saturating_add(count) {
        // SAFETY: fcntl fails with EBADF on what is no descriptor; clearing a flag invalidates none.
        if unsafe { libc::fcntl(number, libc::F_SETFD, 0) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Executes a program, found as execvp(3) does by the directories of `search_path` if its name has no slash, in the calling
/// process. Returns only on failure: `ENOENT` if it is nowhere, another error if it is there but cannot be executed.
///
/// execvp(3) itself says `EACCES` also if one of the directories may not be looked into, though the program is nowhere.
pub fn execute(program: &CStr, arguments: &[&CStr], environment: &[&CStr], search_path: &[u8]) -> io::Error {
    if program.to_bytes().contains(&b'/') {
        return execute_at(program, arguments, environment);
    }
    let mut failure = None;
    for directory in search_path.split(|byte| *byte == b':') {
        let directory = if directory.is_empty() { b"." } else { directory };
        let Ok(path) = CString::new([directory, b"/", program.to_bytes()].concat()) else { continue };
        let error = execute_at(&path, arguments, environment);
        let there = fs::metadata(OsStr::from_bytes(path.to_bytes())).is_ok_and(|found| !found.is_dir());
        if there && failure.is_none() {
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

/// The living children of the calling process; zombies are among them until they are waited for.
pub fn children() -> io::Result<BTreeSet<i32>> {
    let own = std::process::id();
    match fs::read_to_string(format!("/proc/self/task/{own}/children")) {
        Ok(list) => Ok(list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect()),
        // A kernel without CONFIG_PROC_CHILDREN.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Ok(all()?.into_iter().filter(|pid| parent_of(*pid) == i32::try_from(own).ok()).collect())
        }
        Err(error) => Err(error),
    }
}

/// All processes of the PID namespace.
fn all() -> io::Result<Vec<i32>> {
    Ok(fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
}

/// The parent of a process, if that is there.
pub fn parent_of(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything; the state and the parent follow the last one (proc_pid_stat(5)).
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// The processes in a network namespace, but for the calling one. A process of another user is found only with
/// CAP_SYS_PTRACE.
pub fn in_namespace(namespace: NamespaceId) -> io::Result<Vec<i32>> {
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    Ok(all()?
        .into_iter()
        .filter(|pid| *pid != own && NamespaceId::of_process(*pid).is_ok_and(|of| of == namespace))
        .collect())
}

/// All processes that can be seen, by their network namespaces: but for the calling one's, and for those of other users where
/// CAP_SYS_PTRACE is missing.
pub fn group_by_namespace() -> io::Result<HashMap<NamespaceId, Vec<i32>>> {
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    let own = NamespaceId::of_process(own).ok();
    let mut found: HashMap<NamespaceId, Vec<i32>> = HashMap::new();
    for pid in all()? {
        if let Ok(namespace) = NamespaceId::of_process(pid)
            && Some(namespace) != own
        {
            found.entry(namespace).or_default().push(pid);
        }
    }
    Ok(found)
}

/// What a process looks like from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessSummary {
    /// Its effective user.
    pub user: Uid,
    /// Its command line, or in brackets the name of one that has none.
    pub command: String,
}

/// What a process looks like. None if it has ended.
pub fn describe(pid: i32) -> Option<ProcessSummary> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    // The owner of this directory may be root where the process may not be inspected; its status tells in any case.
    let status = fs::read_to_string(process.join("status")).ok()?;
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let user = Uid::from_raw(users.split_ascii_whitespace().nth(1)?.parse().ok()?);
    let command = fs::read(process.join("cmdline")).ok()?;
    let words: Vec<_> = command.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    let command = words.join(" ").trim_end().to_owned();
    let named = || fs::read_to_string(process.join("comm")).map(|name| format!("[{}]", name.trim_end()));
    Some(ProcessSummary { user, command: if command.is_empty() { named().ok()? } else { command } })
}

/// Returns the process that holds a socket, and its name. The socket is given by the number that `/proc/PID/fd` shows. A process of another
/// user is found only with CAP_SYS_PTRACE.
pub fn socket_owner(inode: u32) -> Option<(i32, String)> {
    let link = format!("socket:[{inode}]");
    let holds = |pid: &i32| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok();
        let mut links = descriptors.into_iter().flatten().filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        links.any(|found| found.as_os_str() == link.as_str())
    };
    let pid = all().ok()?.into_iter().find(holds)?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some((pid, name.trim_end().escape_debug().to_string()))
}

/// Whether a socket of any network namespace that a process is in is bound to a path. Namespaces of other users' processes are seen only with
/// CAP_SYS_PTRACE.
pub fn is_socket_path_bound(path: &std::path::Path) -> bool {
    let mut seen = BTreeSet::new();
    let wanted = path.as_os_str().as_bytes();
    all().unwrap_or_default().into_iter().any(|pid| {
        let is_new = fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|namespace| seen.insert(namespace));
        let listed = is_new.then(|| fs::read(format!("/proc/{pid}/net/unix")).ok()).flatten().unwrap_or_default();
        // The path comes last (proc_pid_net(5)).
        listed
            .split(|byte| *byte == b'\n')
            .any(|line| line.strip_suffix(wanted).is_some_and(|rest| rest.ends_with(b" ")))
    })
}

/// The process that a thread belongs to.
pub fn process_of_thread(thread: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()
}

/// Whether a process has ended, or is about to: it is gone, a zombie, on its way out, or SIGKILL waits for it, which cannot be
/// blocked. What it holds is let go in an instant, if it is not already. Unsure is no.
pub fn is_ending(pid: i32) -> bool {
    /// PF_EXITING of the kernel's include/linux/sched.h, among the flags in /proc/PID/stat.
    const EXITING: u32 = 0x4;
    /// SIGKILL in the masks of /proc/PID/status, whose lowest bit is signal 1.
    const KILLED: u64 = 1 << (libc::SIGKILL - 1);

    let stat = match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat,
        Err(error) => return matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)),
    };
    // As in `parent_of`; the flags are the seventh field after the name.
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace().collect();
    let exiting = fields.get(6).and_then(|flags| flags.parse::<u32>().ok()).is_some_and(|flags| flags & EXITING != 0);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mut pending = status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
    exiting || pending.any(|mask| u64::from_str_radix(mask.trim(), 16).is_ok_and(|mask| mask & KILLED != 0))
}

/// What tells a process from all others since the machine was started: its number may be another's by now, but not one that was
/// started at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: i32,
    /// When it was started, in clock ticks since boot (proc_pid_stat(5)).
    started: u64,
}

impl ProcessId {
    /// The process that has a number now.
    ///
    /// # Errors
    /// `ENOENT` or `ESRCH` if there is none.
    pub fn of(pid: i32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // As in `parent_of`; the time of its start is the twentieth field after the name.
        let started = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19)?.parse().ok());
        started.map(|started| Self { pid, started }).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Whether it lives, and is not about to end.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).is_ok_and(|now| now == *self) && !is_ending(self.pid)
    }
}

/// A process that is held by more than its number: what is done to it is not done to another one that has the number later (pidfd_open(2)).
#[derive(Debug)]
pub struct ProcessHandle {
    pid: i32,
    descriptor: OwnedFd,
}

impl ProcessHandle {
    /// Holds the process that has a number now. Which that is must be found out afterwards, and holds if [`Self::has_ended`] says no then.
    ///
    /// # Errors
    /// `ESRCH` if there is none, `ENOSYS` on a kernel before 5.3.
    pub fn of(pid: i32) -> io::Result<Self> {
        let number = rustix::process::Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
        let descriptor = rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty())?;
        Ok(Self { pid, descriptor })
    }

    /// Its number, which is its own until it has ended and was waited for.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> io::Result<bool> {
        Ok(crate::linux::poll::wait_for(&[self.as_fd()], Some(std::time::Duration::ZERO))? == [true])
    }

    /// Whether it is a child of the calling process that is still to be waited for.
    pub fn is_child(&self) -> bool {
        use rustix::process::{WaitId, WaitIdOptions, waitid};

        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        waitid(WaitId::PidFd(self.as_fd()), options).is_ok()
    }

    /// Sends it a signal, given by its number. That it is gone already is no error.
    ///
    /// # Errors
    /// `EPERM` if it is another user's.
    pub fn kill(&self, number: i32) -> io::Result<()> {
        let (descriptor, nothing) = (self.descriptor.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
        // SAFETY: without information about the signal the kernel reads nothing of this process's memory.
        match unsafe { libc::syscall(libc::SYS_pidfd_send_signal, descriptor, number, nothing, 0) } {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
                error => Err(error),
            },
        }
    }
}

impl AsFd for ProcessHandle {
    /// Readable when it has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Sends a signal to a process. That it is gone already is no error.
pub fn kill(pid: i32, signal: Signal) -> io::Result<()> {
    kill_by_number(pid, signal as i32)
}

/// The same with a signal's number, since real-time signals have no names.
pub fn kill_by_number(pid: i32, number: i32) -> io::Result<()> {
    // SAFETY: kill(2) takes plain numbers.
    match unsafe { libc::kill(pid, number) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            error => Err(error),
        },
    }
}
