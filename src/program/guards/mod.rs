//! What keeps the program from handing its work to processes outside the tunnel: the gate before unix sockets, and the filter of the session
//! bus. Each is a process of its own that runs as the program's user, beside the program, and reports what it refuses.
//!
//! They are processes, and not parts of the launcher, since the program's connections must not wait for a launcher that is stopped with
//! its job, waits for a keeper, or writes to a terminal that is not read.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

mod session_bus;
mod sockets;

use super::Program;
use super::identity::Identity;
use crate::fault;
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::local_socket;
use crate::linux::poll::wait_for;
use crate::linux::process::{self, Forked};
use crate::linux::seccomp::SyscallFilter;
use session_bus::BusFilter;
use sockets::SocketGuard;

/// The longest report, in bytes. A sentence has a path in it at most.
const LONGEST: usize = 16 << 10;

/// What a guard tells the launcher.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Report {
    /// How many connections or calls this guard has refused until now.
    pub(super) refused: u64,
    /// The sentence about something that was refused for the first time.
    pub(super) sentence: Option<String>,
    /// The process that was ended instead: it would have taken the place of a running instance.
    pub(super) ended: Option<i32>,
}

/// What a guard's process does, given its launcher's number and its way to it.
pub(super) type Work = Box<dyn FnOnce(u32, Reporter) -> io::Result<()>>;

/// The guard's end of its way to the launcher.
#[derive(Debug)]
pub(super) struct Reporter(OwnedFd);

impl Reporter {
    /// Tells the launcher of a refusal, and says whether there was room for that. The launcher is not waited for.
    pub(super) fn tell(&self, report: &Report) -> bool {
        let text = serde_json::to_vec(report).map_err(io::Error::from);
        text.and_then(|text| local_socket::send(&self.0, &text, None)).is_ok()
    }

    pub(super) fn descriptor(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// The launcher's end.
#[derive(Debug)]
struct Reports {
    socket: OwnedFd,
    /// What was refused, as it was reported last.
    refused: u64,
}

/// The guards of a program.
#[derive(Debug, Default)]
pub(super) struct Guards {
    gate: Option<SocketGuard>,
    bus: Option<BusFilter>,
    reports: Vec<Reports>,
}

impl Guards {
    /// Starts the guards that a program needs.
    ///
    /// # Errors
    /// What the system refuses.
    pub(super) fn start(program: &Program) -> io::Result<Self> {
        let mut guards = Self::default();
        if fault::is_broken("sockets") {
            return Ok(guards);
        }
        if !program.sockets.any {
            let (gate, work) = SocketGuard::prepare(program)?;
            guards.spawn(work)?;
            guards.gate = Some(gate);
        }
        if let Some((filter, work)) = BusFilter::prepare(program)? {
            guards.spawn(work)?;
            guards.bus = Some(filter);
        }
        Ok(guards)
    }

    /// Forks a process that does a guard's work.
    fn spawn(&mut self, work: Work) -> io::Result<()> {
        let (socket, reporter) = local_socket::pair()?;
        rustix::io::ioctl_fionbio(&reporter, true)?;
        let launcher = std::process::id();
        match process::fork()? {
            Forked::Child => {
                // Closed here, as all that is not kept is about to be.
                drop(socket);
                let worked = work(launcher, Reporter(reporter));
                process::exit_now(i32::from(worked.is_err()))
            }
            Forked::Parent(_) => self.reports.push(Reports { socket, refused: 0 }),
        }
        Ok(())
    }

    /// Opens the filtered session bus in the calling process's mount namespace.
    ///
    /// # Errors
    /// What the system refuses.
    pub(super) fn open_bus(&self) -> io::Result<()> {
        self.bus.as_ref().map_or(Ok(()), BusFilter::open)
    }

    /// The address of the session bus that the program is to use.
    pub(super) fn session_bus(&self) -> Option<&'static str> {
        self.bus.as_ref().map(|_| session_bus::ADDRESS)
    }

    /// Has the gate decide about the connections of the calling process, which is in the tunnel's network namespace, and of all that it
    /// starts.
    ///
    /// # Errors
    /// What the system refuses.
    pub(super) fn pass_gate(&self) -> io::Result<()> {
        self.gate.as_ref().map_or(Ok(()), SocketGuard::pass)
    }

    /// Leaves to the child, which has been forked, what is its own: if it ends before it has opened a guard's door, that guard ends, too.
    pub(super) fn leave_to_child(&mut self) {
        self.gate = None;
        self.bus = None;
    }

    /// Readable when a guard has something to say, or has ended.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.reports.iter().map(|reports| reports.socket.as_fd())
    }

    /// What the guards have said since this was asked.
    pub(super) fn hear(&mut self) -> Vec<Report> {
        let mut heard = Vec::new();
        self.reports.retain_mut(|reports| {
            let mut buffer = vec![0; LONGEST];
            while wait_for(&[reports.socket.as_fd()], Some(Duration::ZERO)).is_ok_and(|ready| ready[0]) {
                let received = local_socket::receive(&reports.socket, &mut buffer);
                let Ok(Some((length, _))) = received else { return false };
                let Ok(report) = serde_json::from_slice::<Report>(&buffer[..length]) else { continue };
                reports.refused = report.refused;
                heard.push(report);
            }
            true
        });
        heard
    }

    /// How much all guards together have refused.
    pub(super) fn refused(&self) -> u64 {
        self.reports.iter().map(|reports| reports.refused).sum()
    }
}

/// Makes the calling process a guard: it is the program's user, may do hardly anything, keeps no descriptors but these, and ends with the
/// launcher. `is_seen` says whether other processes of that user may look at it in `/proc`.
///
/// # Errors
/// What the system refuses.
pub(super) fn become_guard(
    identity: &Identity,
    launcher: u32,
    kept: &mut [i32],
    capabilities: CapabilitySet,
    calls: &SyscallFilter,
    is_seen: bool,
) -> io::Result<()> {
    // Neither the terminal's signals nor the working directory concern it.
    rustix::process::setsid()?;
    std::env::set_current_dir("/")?;
    process::redirect_to_null(&[0, 1, 2])?;
    process::close_all_except(kept)?;
    capabilities::limit_bounding_set(CapabilitySet::empty(), capabilities::last()?)?;
    capabilities::keep_across_user_change()?;
    identity.assume()?;
    capabilities::limit(capabilities, capabilities)?;
    capabilities::set_no_new_privileges()?;
    match is_seen {
        true => process::enable_ptrace_and_core_dumps()?,
        false => process::disable_ptrace_and_core_dumps()?,
    }
    // After the change of identity, which undoes it.
    process::set_death_signal(Signal::SIGKILL)?;
    if nix::unistd::getppid().as_raw().cast_unsigned() != launcher {
        return Err(io::Error::other("the launcher has ended already"));
    }
    calls.install()
}

/// The system calls that every guard makes: waiting, speaking, memory, time and the end.
pub(super) const COMMON_CALLS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_ppoll,
    libc::SYS_ioctl,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_futex,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];
