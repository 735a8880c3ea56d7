//! The program: prepares its process, executes it inside the tunnel, and supervises it until it ends.
//!
//! - `launch` is the launcher's side of the start, `child` that of the program's process: `enter` (namespaces), `view`
//!   and `gnupg` (files), `privileges`, `environment` and `desktop`, `exec_failure`.
//! - `supervise` forwards signals and waits for the end; `notify` and `signal_probe` serve it under a service manager.
//! - `guards` keep the program from handing its work to processes outside the tunnel: by unix sockets or the session
//!   bus.
//! - [`identity`] chooses the user, [`terminal`] replaces the caller's terminal, [`compatibility`] and `closed_sockets`
//!   warn.

mod child;
pub(crate) mod closed_sockets;
pub mod compatibility;
mod desktop;
mod enter;
mod environment;
mod exec_failure;
mod gnupg;
mod guards;
mod helpers;
pub mod identity;
mod launch;
pub(crate) mod notify;
mod privileges;
mod shared_view;
mod signal_probe;
mod supervise;
pub mod terminal;
mod view;

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::config::{Buses, SessionBus};
use crate::fault;
use crate::linux::capabilities::CapabilitySet;
use crate::names::TunnelName;
use crate::plan::{DnsPlan, SocketsPlan};
use identity::Identity;
pub use launch::{Launch, Remainder, start};
pub use supervise::forwarded_signals;

/// The directories in which programs are searched if PATH is not set (confstr(3), `_CS_PATH`).
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// The program to run, and how to run it.
#[derive(Debug)]
pub struct Program {
    /// The program and its arguments.
    pub command: Vec<OsString>,
    /// The tunnel's name.
    pub tunnel: TunnelName,
    /// The file of the tunnel's network namespace, as in ip-netns(8). None if the tunnel is rootless: the keeper passes
    /// its namespace.
    pub namespace: Option<PathBuf>,
    /// The host's file that the program sees as `/etc/resolv.conf`, with all its later changes.
    pub resolv_conf: PathBuf,
    /// An existing directory of the host that the program does not need, over which its private files are mounted.
    pub staging: PathBuf,
    /// The program's name resolution.
    pub names: DnsPlan,
    /// The paths that the program does not see: those of [`crate::plan::hidden_paths`].
    pub hidden: Vec<PathBuf>,
    /// Directories that the program sees empty: those of a user's tunnels, as the program is the keeper's own user.
    pub emptied: Vec<PathBuf>,
    /// Whether the tunnel was up, so that other programs may run in it.
    pub joins: bool,
    /// The unix sockets of the host that the program may connect to.
    pub sockets: SocketsPlan,
    /// The message buses of the host that the program can reach.
    pub buses: Buses,
    /// The user and the groups of the program.
    pub identity: Identity,
    /// The capabilities that the program keeps.
    pub kept: CapabilitySet,
    /// The number of the kernel's last capability.
    pub last_capability: u8,
    /// Whether the program can gain privileges by executing a file.
    pub new_privileges: bool,
    /// Whether to kill the processes that the program leaves behind when it ends.
    pub kill_orphans: bool,
    /// The number of descriptors, from 3 on, that are passed to the program (sd_listen_fds(3)).
    pub listen_fds: RawFd,
    /// The file mode creation mask (umask(2)).
    pub umask: u32,
    /// The program's own terminal, if it does not use the caller's.
    pub terminal: Option<terminal::OwnTerminal>,
    /// Whether the program is started only after a handshake.
    pub awaits_handshake: bool,
    /// The bounding set of a keeper that the launcher may have to start later.
    pub keeper_bounding_set: CapabilitySet,
}

impl Program {
    /// Returns whether the program's connections to unix sockets are guarded.
    fn has_guarded_sockets(&self) -> bool {
        !self.sockets.any && !is_unguarded()
    }

    /// Returns the part of the session bus that the program can reach.
    fn session_bus(&self) -> SessionBus {
        if is_unguarded() { SessionBus::Whole } else { self.buses.session }
    }
}

/// Returns whether a test has taken the guards away.
fn is_unguarded() -> bool {
    fault::is_broken("sockets")
}

/// Returns the capabilities that the launcher needs to become a program with this identity and these capabilities.
pub fn needed_capabilities(identity: &Identity, kept: CapabilitySet) -> CapabilitySet {
    let mut needed = CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_CHROOT | CapabilitySet::SETPCAP | kept;
    if *identity != Identity::Unchanged {
        needed |= CapabilitySet::SETUID | CapabilitySet::SETGID;
    }
    needed
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgramOutcome {
    /// It exited with this status.
    Exited(i32),
    /// It was killed by the signal with this number.
    Signaled(i32),
}
