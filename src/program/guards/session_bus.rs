//! The session bus filter: a process that serves the program's session bus at a socket in its own `/run`, and filters
//! the messages to the real one ([`crate::bus`]).

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::process::Confinement;
use super::{GuardKind, GuardWork, RefusalReport, Reporter};
use crate::bus::{self, BusAddress, BusPolicy, BusRefusal};
use crate::config::SessionBus;
use crate::failure::{Doing, Failure};
use crate::fault;
use crate::linux::capabilities::CapabilitySet;
use crate::linux::process;
use crate::program::Program;
use crate::program::identity::Identity;

/// The path of the filtered session bus inside, and its D-Bus address.
const SOCKET: &str = "/run/vpn-exec.bus";
pub(super) const ADDRESS: &str = "unix:path=/run/vpn-exec.bus";

/// The maximum number of clients that wait to be accepted.
const BACKLOG: i32 = 128;

/// The system calls of the filter besides those of every guard.
const CALLS: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_geteuid,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
];

/// The filter, as the program's process uses it.
#[derive(Debug)]
pub(super) struct BusFilter {
    /// The filter's socket, still to be bound in the program's mount namespace.
    socket: OwnedFd,
    /// The pipe on which the filter is told that the socket is bound.
    begin: OwnedFd,
}

impl BusFilter {
    /// Prepares the filter if the program's session bus is to be filtered and there is one. Returns the work of its
    /// process.
    ///
    /// # Errors
    /// Returns an error if the socket or the pipe cannot be created.
    pub(super) fn prepare(program: &Program) -> Result<Option<(Self, GuardWork)>, Failure> {
        if program.session_bus() != SessionBus::Filtered {
            return Ok(None);
        }
        let Some(addresses) = real_bus(&program.identity) else { return Ok(None) };
        let task = GuardKind::SessionBus.task();
        let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
        let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None).doing(task)?;
        let (wait, begin) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).doing(task)?;
        let listener = rustix::io::fcntl_dupfd_cloexec(&socket, 3).doing(task)?;
        let names = program.buses.talk.iter().filter_map(|name| name.parse().ok());
        let policy = BusPolicy::default_desktop().with_talk(names);
        let identity = program.identity.clone();
        // A rootless program is of the filter's user and in its user namespace, and the filter's root directory is the
        // host's. A capability that no such program may keep keeps it from there (ptrace(2)). The system call filter
        // makes it useless.
        let is_rootless = program.namespace.is_none();
        let capabilities = if is_rootless { CapabilitySet::SYS_PTRACE } else { CapabilitySet::empty() };
        let work: GuardWork = Box::new(move |reporter, launcher| {
            fault::fail_at("in the session bus filter")?;
            process::raise_file_limit().doing("raise the limit of open files")?;
            let confinement = Confinement {
                identity: &identity,
                launcher,
                descriptors: &mut [listener.as_raw_fd(), wait.as_raw_fd(), reporter.descriptor()],
                capabilities,
                calls: CALLS,
                families: &[libc::AF_UNIX],
                // Portals look at a caller's root directory, to recognize sandboxes. This process has no secrets.
                is_inspectable: true,
            };
            confinement.apply()?;
            reporter.ready()?;
            // The program's process ends before it binds the socket if the launch fails.
            match rustix::io::retry_on_intr(|| rustix::io::read(&wait, &mut [0_u8])).doing("wait for the socket")? {
                0 => Ok(()),
                _ => filter(&listener, &addresses, &policy, reporter).doing("serve its clients"),
            }
        });
        Ok(Some((Self { socket, begin }, work)))
    }

    /// Binds the socket in the calling process's mount namespace, and starts the filter.
    ///
    /// # Errors
    /// Returns the error of the system call that failed.
    pub(super) fn open(&self) -> io::Result<()> {
        rustix::net::bind(&self.socket, &SocketAddrUnix::new(SOCKET)?)?;
        // Only the program is in this mount namespace, and the filter accepts only clients of its own user.
        rustix::fs::chmodat(CWD, SOCKET, Mode::from_raw_mode(0o666), AtFlags::empty())?;
        rustix::net::listen(&self.socket, BACKLOG)?;
        rustix::io::write(&self.begin, &[1]).map(drop)?;
        Ok(())
    }
}

/// Runs the filter until the launcher ends, which kills this process.
fn filter(listener: &OwnedFd, addresses: &[BusAddress], policy: &BusPolicy, reporter: &Reporter) -> io::Result<()> {
    let (mut total, mut messages) = (0, HashSet::new());
    let report = |refusal: &BusRefusal, times: u64| {
        total += 1;
        let message = (times == 1 && !refusal.is_routine()).then(|| refusal.to_string());
        // Different refusals may have the same message.
        let message = message.filter(|message| messages.insert(message.clone()));
        reporter.refused(RefusalReport { total, message, killed: None });
    };
    // Never readable.
    let (stop, _open) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bus::serve(listener.as_fd(), || bus::address::connect(addresses), policy, report, stop.as_fd())
}

/// Returns the addresses of the session bus of the program's user, if there is one.
fn real_bus(identity: &Identity) -> Option<Vec<BusAddress>> {
    let uid = match identity {
        Identity::Unchanged => nix::unistd::geteuid().as_raw(),
        Identity::Other(account) => account.uid,
    };
    let own = PathBuf::from(format!("/run/user/{uid}"));
    // The variable may name root's bus, so for another user it is the second choice.
    let variable = match identity {
        Identity::Unchanged => std::env::var("DBUS_SESSION_BUS_ADDRESS").ok(),
        Identity::Other(_) if has_bus(&own) => None,
        Identity::Other(_) => std::env::var("DBUS_SESSION_BUS_ADDRESS").ok(),
    };
    match variable.map(|address| bus::address::parse(&address)) {
        Some(Ok(addresses)) => Some(addresses),
        Some(Err(error)) => {
            tracing::debug!(%error, "DBUS_SESSION_BUS_ADDRESS is invalid, so the program has no session bus");
            None
        }
        None => has_bus(&own).then(|| vec![bus::address::in_runtime_directory(&own)]),
    }
}

/// Returns whether a runtime directory has a session bus. One that this process cannot access is assumed to have one.
fn has_bus(runtime: &Path) -> bool {
    match std::fs::symlink_metadata(runtime.join("bus")) {
        Ok(found) => found.file_type().is_socket(),
        Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
    }
}
