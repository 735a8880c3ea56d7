//! The session bus as the program sees it: a socket in its own `/run`, behind which a guard filters what goes to the real one
//! ([`crate::bus`]).

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::{Report, Reporter, Work};
use crate::bus::{self, BusAddress, BusRefusal, Policy};
use crate::config::SessionBus;
use crate::linux::capabilities::CapabilitySet;
use crate::linux::process;
use crate::linux::seccomp::SyscallFilter;
use crate::program::Program;
use crate::program::identity::Identity;

/// Where the program finds its session bus, and how that is written in its environment.
const SOCKET: &str = "/run/vpn-exec.bus";
pub(super) const ADDRESS: &str = "unix:path=/run/vpn-exec.bus";

/// How many clients may wait to be accepted.
const BACKLOG: i32 = 128;

/// The system calls of the filter beyond those of every guard.
const CALLS: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_geteuid,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
];

/// The child's side of the filter.
#[derive(Debug)]
pub(super) struct BusFilter {
    /// Not bound yet: the place is in the program's mount namespace.
    socket: OwnedFd,
    /// Where the filter is told that it is.
    begin: OwnedFd,
}

impl BusFilter {
    /// Prepares the filter, if there is a session bus that is to be filtered. Returns what its process does.
    ///
    /// # Errors
    /// What the system refuses.
    pub(super) fn prepare(program: &Program) -> io::Result<Option<(Self, Work)>> {
        if program.buses.session != SessionBus::Filtered {
            return Ok(None);
        }
        let Some(addresses) = real_bus(&program.identity) else { return Ok(None) };
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        let (wait, begin) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let listener = rustix::io::fcntl_dupfd_cloexec(&socket, 3)?;
        let names = program.buses.talk.iter().filter_map(|name| name.parse().ok());
        let policy = Policy::default_desktop().with_talk(names);
        let identity = program.identity.clone();
        let work = move |launcher, reporter: Reporter| {
            let mut kept = [listener.as_raw_fd(), wait.as_raw_fd(), reporter.descriptor()];
            let calls = SyscallFilter::allow_only(&[super::COMMON_CALLS, CALLS].concat(), &[libc::AF_UNIX])?;
            process::raise_file_limit()?;
            // Portals look at the root directory of whoever calls them, to tell sandboxes apart. No secret is in this process.
            super::become_guard(&identity, launcher, &mut kept, CapabilitySet::empty(), &calls, true)?;
            if rustix::io::retry_on_intr(|| rustix::io::read(&wait, &mut [0_u8]))? == 0 {
                return Ok(());
            }
            filter(&listener, &addresses, &policy, &reporter)
        };
        Ok(Some((Self { socket, begin }, Box::new(work))))
    }

    /// Opens the bus at its place in the calling process's mount namespace.
    ///
    /// # Errors
    /// What the system refuses.
    pub(super) fn open(&self) -> io::Result<()> {
        rustix::net::bind(&self.socket, &SocketAddrUnix::new(SOCKET)?)?;
        // Nobody else is in this mount namespace, and the filter takes its own user's connections alone.
        rustix::fs::chmodat(CWD, SOCKET, Mode::from_raw_mode(0o666), AtFlags::empty())?;
        rustix::net::listen(&self.socket, BACKLOG)?;
        rustix::io::write(&self.begin, &[1]).map(drop)?;
        Ok(())
    }
}

/// Filters until the launcher ends, which ends this process.
fn filter(listener: &OwnedFd, addresses: &[BusAddress], policy: &Policy, reporter: &Reporter) -> io::Result<()> {
    let (mut refused, mut said) = (0, HashSet::new());
    let report = |refusal: &BusRefusal, times: u64| {
        refused += 1;
        let sentence = (times == 1 && !refusal.is_routine()).then(|| refusal.to_string());
        // The same sentence may be said of several messages.
        let sentence = sentence.filter(|sentence| said.insert(sentence.clone()));
        reporter.tell(&Report { refused, sentence, ended: None });
    };
    // Nothing but its launcher's end stops it.
    let (never, _open) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bus::serve(listener.as_fd(), || bus::address::connect(addresses), policy, report, never.as_fd())
}

/// Where the session bus of the program's user is, if it has one.
fn real_bus(identity: &Identity) -> Option<Vec<BusAddress>> {
    let uid = match identity {
        Identity::Unchanged => nix::unistd::geteuid().as_raw(),
        Identity::Other(account) => account.uid,
    };
    let own = PathBuf::from(format!("/run/user/{uid}"));
    // What root's environment says is about root's bus.
    let said = match identity {
        Identity::Unchanged => std::env::var("DBUS_SESSION_BUS_ADDRESS").ok(),
        Identity::Other(_) if has_bus(&own) => None,
        Identity::Other(_) => std::env::var("DBUS_SESSION_BUS_ADDRESS").ok(),
    };
    match said.map(|address| bus::address::parse(&address)) {
        Some(Ok(addresses)) => Some(addresses),
        Some(Err(error)) => {
            tracing::debug!(%error, "the program has no session bus");
            None
        }
        None => has_bus(&own).then(|| vec![bus::address::in_runtime_directory(&own)]),
    }
}

/// Whether a runtime directory has a session bus. One that may not be looked into may have.
fn has_bus(runtime: &Path) -> bool {
    match std::fs::symlink_metadata(runtime.join("bus")) {
        Ok(found) => found.file_type().is_socket(),
        Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
    }
}
