//! Starts a program in namespaces of its own, below a small init process. This is the only `unsafe` code of the lab: a
//! test has threads, and a process with threads may not enter a user namespace, so it is done between fork and exec.
//!
//! ```text
//! the test ─── guard: makes the namespaces, waits ─── init (PID 1): reaps ─── the program
//! ```
//!
//! The kernel kills the guard with the thread that started it, init with the guard, and all other processes with init.
//! So no process outlives the test, however it ends.
#![expect(unsafe_code, reason = "entering a user namespace needs code that runs between fork and exec")]

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use nix::sched::CloneFlags;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};

/// The number of user IDs to map where possible: enough for every ordinary user and for `nobody`.
const USERS: u32 = 65536;

/// Starts `command` as root in new user, mount, PID and network namespaces, and kills it after `seconds`.
///
/// The exit status of the child is the program's, or 128 + N if signal N killed the program.
pub(crate) fn spawn(command: &mut Command, seconds: u32) -> io::Result<Child> {
    let (ours, theirs) = UnixStream::pair()?;
    let socket = theirs.as_raw_fd();
    // SAFETY: `nest` allocates nothing and takes no lock. It only makes system calls, with a descriptor that is open in
    // the child, as `theirs` lives until `spawn` has returned.
    unsafe { command.pre_exec(move || nest(socket, seconds)) };
    std::thread::scope(|scope| {
        let mapping = scope.spawn(|| map_users_when_asked(&ours));
        let child = command.spawn();
        drop(theirs);
        match mapping.join() {
            Ok(Err(error)) => Err(error),
            _ => child,
        }
    })
}

/// Waits until the guard is in its user namespace, maps users into that, and lets the guard go on.
fn map_users_when_asked(mut guard: &UnixStream) -> io::Result<()> {
    let mut pid = [0; 4];
    if guard.read_exact(&mut pid).is_err() {
        // The guard failed before, and `spawn` returns the reason.
        return Ok(());
    }
    let mapped = map_users(i32::from_ne_bytes(pid));
    match &mapped {
        Ok(()) => guard.write_all(&[1])?,
        Err(_) => guard.shutdown(Shutdown::Both)?,
    }
    mapped
}

/// Maps users: an ordinary user maps itself to root, root maps the users that it has on this machine.
fn map_users(pid: i32) -> io::Result<()> {
    let (user, group) = (nix::unistd::geteuid(), nix::unistd::getegid());
    if user.is_root() {
        for kind in ["uid_map", "gid_map"] {
            fs::write(format!("/proc/{pid}/{kind}"), same_users(&fs::read_to_string(format!("/proc/self/{kind}"))?))?;
        }
        return Ok(());
    }
    fs::write(format!("/proc/{pid}/setgroups"), "deny")?;
    fs::write(format!("/proc/{pid}/uid_map"), format!("0 {user} 1\n"))?;
    fs::write(format!("/proc/{pid}/gid_map"), format!("0 {group} 1\n"))
}

/// Returns the map (user_namespaces(7)) that keeps the IDs of those users below [`USERS`] that `own` has.
fn same_users(own: &str) -> String {
    own.lines()
        .filter_map(|line| {
            let mut numbers = line.split_ascii_whitespace().map(|number| number.parse::<u32>().ok());
            let (first, _, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
            let count = count.min(USERS.saturating_sub(first));
            (count > 0).then(|| format!("{first} {first} {count}\n"))
        })
        .collect()
}

/// Runs in the child: creates the namespaces and the two processes above the program, and returns in the program's
/// process.
fn nest(socket: RawFd, seconds: u32) -> io::Result<()> {
    let parent = nix::unistd::getppid();
    let namespaces =
        CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNET;
    nix::sched::unshare(namespaces)?;
    // SAFETY: the descriptor is open, as `spawn` promises.
    let socket = unsafe { BorrowedFd::borrow_raw(socket) };
    nix::unistd::write(socket, &nix::unistd::getpid().as_raw().to_ne_bytes())?;
    if nix::unistd::read(socket, &mut [0])? == 0 {
        return Err(io::Error::from_raw_os_error(libc::ECANCELED));
    }
    die_with_parent()?;
    if nix::unistd::getppid() != parent {
        exit(1);
    }
    nix::unistd::alarm::set(seconds);
    if let ForkResult::Parent { child } = fork()? {
        guard(child);
    }
    die_with_parent()?;
    if let ForkResult::Parent { child } = fork()? {
        init(child);
    }
    reset_signals();
    Ok(())
}

/// Resets the disposition of every signal. A shell ignores SIGINT for its background jobs, and nohup(1) ignores SIGHUP;
/// all programs that a test runs would inherit that.
fn reset_signals() {
    for number in 1..=libc::SIGRTMAX() {
        // SAFETY: no handler is installed. The kernel or the C library refuses the signals that cannot be changed.
        unsafe { libc::signal(number, libc::SIG_DFL) };
    }
}

/// Waits for init, and ends with its status.
fn guard(init: Pid) -> ! {
    close_all();
    loop {
        if let Some(status) = status_of(waitpid(init, None)) {
            exit(status);
        }
    }
}

/// Reaps orphans, and ends when the program does. The kernel then kills all other processes of the PID namespace.
fn init(program: Pid) -> ! {
    close_all();
    loop {
        let ended = waitpid(None, None);
        if ended.is_ok_and(|ended| ended.pid() == Some(program))
            && let Some(status) = status_of(ended)
        {
            exit(status);
        }
    }
}

fn status_of(ended: nix::Result<WaitStatus>) -> Option<i32> {
    match ended {
        Ok(WaitStatus::Exited(_, status)) => Some(status),
        Ok(WaitStatus::Signaled(_, signal, _)) => Some(128 + signal as i32),
        Err(nix::Error::ECHILD) => Some(1),
        _ => None,
    }
}

fn fork() -> io::Result<ForkResult> {
    // SAFETY: both processes only make system calls until they exit or execute a program: see `nest`.
    Ok(unsafe { nix::unistd::fork() }?)
}

fn die_with_parent() -> io::Result<()> {
    // SAFETY: this call reads and writes no memory of the process.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Closes every descriptor, so that the program's pipes close when it ends. Among them is the pipe by which
/// `Command::spawn` learns that the program was executed.
fn close_all() {
    // SAFETY: no code in this process uses a descriptor from here on.
    unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) };
}

fn exit(status: i32) -> ! {
    // SAFETY: ends the process without running exit handlers of the program that it is a copy of.
    unsafe { libc::_exit(status) }
}

#[cfg(test)]
mod tests {
    use super::same_users;

    #[test]
    fn mapped_users_keep_their_ids() {
        assert_eq!(same_users("         0          0 4294967295\n"), "0 0 65536\n");
        assert_eq!(same_users("0 1000 1\n1 100000 65536\n"), "0 0 1\n1 1 65535\n");
    }
}
