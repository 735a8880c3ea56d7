//! The keeper: the process that owns a tunnel.
//!
//! The keeper creates the tunnel, or takes it over from a keeper that was killed. It runs the data path, finds the
//! peers' endpoints, relays ports, serves its clients, and takes the tunnel down when it is no longer used.
//!
//! Each launcher holds a *lease*: an open connection to the keeper ([`crate::lease`]). The kernel closes the connection
//! however the launcher ends, so the keeper learns of every end. If a launcher ends without leaving properly, the
//! keeper kills the processes that its program left behind.
//!
//! [`start`] forks a keeper; [`run`] runs one in the foreground. From there the story is:
//!
//! 1. `lifecycle` drops privileges, creates or takes over the tunnel, and takes it down at the end.
//! 2. `event_loop` waits for events in between, and passes each to the part that deals with it.
//! 3. `requests` answers the clients. `reload` changes the running tunnel to another configuration, and `report`
//!    describes its status.
//!
//! Each of these parts owns its state:
//!
//! - `clients`: connections of the keeper's own user. `public_clients`: connections of users who may only query the
//!   status.
//! - `view_servers`: which processes keep the programs' views of files up to date.
//! - `leases`: which launchers hold the tunnel, and which are expected back after a takeover.
//! - `carrier`: the tunnel as [`crate::endpoints`] sees it.
//! - `ports`: published ports, and ports of the host's loopback.
//! - `container`: the end and the addresses of the container whose namespace the tunnel is in.
//! - `dns`: the forwarder of DNS questions.
//! - `host_network`: changes of the host's network and firewall rules.
//! - `service`: notifications to systemd.
//!
//! `privileges` and `system_calls` limit what a compromised keeper could do.

mod carrier;
mod clients;
mod container;
mod dns;
mod event_loop;
mod host_network;
mod leases;
mod lifecycle;
mod ports;
mod privileges;
mod public_clients;
mod reload;
mod report;
mod requests;
mod service;
mod system_calls;
mod view_servers;

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::config::Config;
use crate::failure::{Doing, Failure};
use crate::lease::handover::Handover;
use crate::lease::{KeeperEvent, Lease};
use crate::linux::namespace::NetworkNamespace;
use crate::linux::process::{self, Forked, ProcessId};
use crate::linux::service_manager::ServiceManager;
use crate::linux::signals::Signals;
use crate::linux::stderr;
use crate::plan::Plan;
use crate::registry::{Holder, TunnelDirectory, TunnelState};
use crate::tunnel::ContainerPlace;
pub(crate) use clients::ConnectionId;
use clients::KeeperClients;
pub(crate) use event_loop::pause_if_exhausted;
pub(crate) use lifecycle::device_config;
use lifecycle::{Runtime, live};
pub(crate) use privileges::limit_attached_process;
pub use privileges::limit_data_path;
pub use privileges::{capabilities_for_ports, gained_by_hooks, limit_dns_forwarder, needed_capabilities};
pub(crate) use public_clients::PublicClients;

/// How long the keeper waits for the reader of standard error to read the last messages.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(100);

/// Everything that a keeper needs to create or take over a tunnel.
pub struct KeeperSpec {
    /// The plan of the tunnel.
    pub plan: Plan,
    /// The tunnel's locked directory.
    pub directory: TunnelDirectory,
    /// The configuration with its keys.
    pub config: Config,
    /// The same configuration in a sealed file, for the clients and a successor.
    pub handover: OwnedFd,
    /// Whether to create the tunnel or to take it over.
    pub start: KeeperStart,
    /// The network namespace of a rootless tunnel: a new one, or that of the tunnel that is taken over.
    pub namespace: Option<NetworkNamespace>,
    /// The number of descriptors, from 3 on, that belong to the program. The keeper closes them.
    pub listen_fds: i32,
    /// How to read the configuration again after SIGHUP or a reload request. None if the keeper cannot.
    pub reread: Option<Reread>,
}

/// A function that reads a tunnel's configuration again.
pub type Reread = Box<dyn FnMut() -> Result<Handover, Failure>>;

/// How a keeper comes to its tunnel.
pub enum KeeperStart {
    /// The keeper creates the tunnel.
    Create,
    /// The keeper creates the tunnel in the network namespace of a container.
    CreateIn(ContainerPlace),
    /// The keeper takes over the tunnel of a keeper that was killed or has handed over.
    TakeOver(TunnelState),
}

/// Starts a keeper in a process of its own, and returns the caller's lease on the tunnel.
///
/// The keeper exits when no lease is left. The caller's copies of the directory lock and of the keys are gone when this
/// function returns.
///
/// # Errors
/// If the process cannot be created. All other failures arrive as [`KeeperEvent::Failed`].
pub fn start(spec: KeeperSpec) -> io::Result<Lease> {
    let forked = ProcessId::of(std::process::id().cast_signed()).and_then(|launcher| {
        let pair = Lease::pair(spec.handover.try_clone()?)?;
        // A launch takes as long as its slowest process, which is the keeper, or the one that becomes the program.
        Ok((launcher, pair, process::fork_aside()?))
    });
    let (launcher, (lease, keeper_end), side) = match forked {
        Ok(forked) => forked,
        Err(error) => {
            if !matches!(spec.start, KeeperStart::TakeOver(_)) {
                let _ = spec.directory.release();
            }
            return Err(error);
        }
    };
    match side {
        Forked::Parent(_) => Ok(lease),
        Forked::Child => {
            drop(lease);
            let code = match run_forked(spec, launcher, keeper_end) {
                Ok(()) => 0,
                Err(_) => 1,
            };
            stderr::flush(FLUSH_TIMEOUT);
            // Returning would run the caller's code, which belongs to the parent.
            process::exit_now(code)
        }
    }
}

/// Runs a forked keeper until it exits. The parent holds the first lease.
fn run_forked(spec: KeeperSpec, launcher: ProcessId, lease: OwnedFd) -> Result<(), Failure> {
    let parent = lease.try_clone().doing("start the keeper process")?;
    let signals = detach(spec.listen_fds)
        .and_then(|()| rustix::io::ioctl_fionbio(&lease, true).map_err(io::Error::from))
        .and_then(|()| Signals::block_all_but_read(&[Signal::SIGHUP, Signal::SIGTERM]))
        .doing("start the keeper process");
    let ended = signals.and_then(|signals| {
        let mut clients = KeeperClients::new();
        clients.add_starter(lease, Holder { process: launcher, mounts: None });
        live(spec, clients, Runtime { signals, foreground: false, wait: None, service_manager: None })
    });
    if let Err(failure) = &ended {
        // The launcher reports it to the user, and cleans up.
        let _ = crate::lease::send(&parent, &KeeperEvent::Failed(failure.clone()), None);
    }
    ended
}

/// Runs the keeper of a standing tunnel in the calling process until SIGTERM, SIGINT, a request to take the tunnel
/// down, or a request to hand it over to another keeper.
///
/// # Errors
/// If the tunnel cannot be created or taken over, if it breaks, or if there is no handshake within `wait`.
pub fn run(spec: KeeperSpec, wait: Option<Duration>) -> Result<(), Failure> {
    let signals = Signals::block_all_but_read(&[Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT]);
    let signals = signals.doing("watch for signals")?;
    let service_manager = ServiceManager::find(|name| std::env::var_os(name)).unwrap_or_else(|error| {
        tracing::warn!("cannot notify systemd: {error}");
        None
    });
    live(spec, KeeperClients::new(), Runtime { signals, foreground: true, wait, service_manager })
}

/// Separates the calling process from the launcher: its own session, no terminal, and none of the program's
/// descriptors.
fn detach(listen_fds: i32) -> io::Result<()> {
    rustix::process::setsid()?;
    process::redirect_to_null(&[0, 1])?;
    process::close_range(3, 2 + listen_fds)
}

/// Closes standard error, so that a reader who waits for its end need not wait for the keeper.
fn close_standard_error() {
    stderr::flush(FLUSH_TIMEOUT);
    if let Err(error) = process::redirect_to_null(&[2]) {
        tracing::debug!(%error, "cannot close standard error");
    }
}
