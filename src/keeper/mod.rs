//! The keeper: the process that owns a tunnel. It makes the tunnel, or takes it over from a keeper that was killed; runs its data
//! path; finds its endpoints; and takes it down when nobody wants it any more.
//!
//! Whoever wants the tunnel holds a *lease*: an open connection to the keeper ([`crate::lease`]). The kernel closes it however its
//! holder ends, so the keeper learns of every end, and cleans up, with nobody's help. A lease that ends without a word takes with
//! it what its program has left behind.
//!
//! - [`start`], [`run`]: the process, from its beginning to its end, and its privileges.
//! - `watch`: what it does in between.
//! - `visitors`: the connections to it. `strangers`: those of users who may only ask how the tunnel is.
//! - `endpoints`: how each peer is reached, and the MTU that follows from it.
//! - `local_networks`, `publish`: what it does for local networks and published ports.
//! - `manager`: what the service manager is told.
//! - `requests`: what it is asked for: leases, reports, changes, its end.

mod endpoint_search;
mod endpoints;
mod local_networks;
mod manager;
mod publish;
mod requests;
mod strangers;
mod system_calls;
mod visitors;
mod watch;

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::config::{Config, Peer};
use crate::failure::{Doing, Failure};
use crate::lease::handover::Handover;
use crate::lease::{Event, Lease, send};
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::local_socket::LocalListener;
use crate::linux::process::{self, Forked, ProcessId};
use crate::linux::service_manager::ServiceManager;
use crate::linux::signals::Signals;
use crate::linux::stderr;
use crate::plan::Plan;
use crate::registry::{Directory, Holder, State};
use crate::relay::ListenSocket;
use crate::tunnel::{self, Remains};
use crate::tunnel::{DeviceEvents, Tunnel};
use crate::wireguard::{Backend, Device, DeviceConfig, PeerConfig};
use nix::sys::signal::Signal;
use strangers::Strangers;
use visitors::Visitors;
use watch::Keeper;

/// The mode of the keeper's socket: for its own user. Others may ask how the tunnel is at a socket of their own.
const SOCKET_MODE: u32 = 0o600;

/// How long the reader of standard error is given to read the last of it.
const READING: Duration = Duration::from_millis(100);

/// What a keeper is made for.
pub struct Mission {
    /// What is to be made, or was.
    pub plan: Plan,
    /// The name claimed for it.
    pub directory: Directory,
    /// The keys and the peers.
    pub config: Config,
    /// The same, for a successor.
    pub handover: OwnedFd,
    /// What there is already.
    pub beginning: Beginning,
    /// How many descriptors, from 3 on, belong to the program: the keeper closes them.
    pub listen_fds: i32,
    /// How the configuration is read again when SIGHUP or a client asks for it.
    pub reload: Option<Reload>,
}

/// Reads a tunnel's configuration again, or says why that cannot be and what to do about it.
pub type Reload = Box<dyn FnMut() -> Result<Handover, (String, Option<String>)>>;

/// What there is of a tunnel before its keeper begins.
pub enum Beginning {
    /// Nothing.
    Nothing,
    /// All that a killed keeper has left.
    TakeOver(State),
}

/// Starts a keeper in a process of its own, which begins at once and ends when nobody holds a lease any more. The caller's copies
/// of the claimed name and of the keys are gone when this returns.
///
/// # Errors
/// Only if there can be no process; all other failures come as [`Event::Failed`].
pub fn start(mission: Mission) -> io::Result<Lease> {
    let begun = ProcessId::of(std::process::id().cast_signed()).and_then(|launcher| {
        let pair = Lease::pair(mission.handover.try_clone()?)?;
        Ok((launcher, pair, process::fork()?))
    });
    let (launcher, (lease, keepers), side) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            if matches!(mission.beginning, Beginning::Nothing) {
                // There is nobody else to give the name back.
                let _ = mission.directory.release();
            }
            return Err(error);
        }
    };
    match side {
        Forked::Parent(_) => Ok(lease),
        Forked::Child => {
            drop(lease);
            let code = match keep_apart(mission, launcher, keepers) {
                Ok(()) => 0,
                Err(_) => 1,
            };
            stderr::flush(READING);
            // Not by returning: the caller's stack belongs to the parent. Nothing is left to be dropped that matters.
            process::exit_now(code)
        }
    }
}

/// The life of a keeper that was forked.
fn keep_apart(mission: Mission, launcher: ProcessId, lease: OwnedFd) -> Result<(), Failure> {
    let parent = lease.try_clone().doing("make the keeper's process")?;
    let begun = detach(mission.listen_fds)
        .and_then(|()| rustix::io::ioctl_fionbio(&lease, true).map_err(io::Error::from))
        .and_then(|()| Signals::block_all_but_read(&[Signal::SIGHUP, Signal::SIGTERM]))
        .doing("make the keeper's process");
    let lived = begun.and_then(|signals| {
        let mut visitors = Visitors::new();
        visitors.admit_starter(lease, Holder { process: launcher, mounts: None });
        live(mission, visitors, Service { signals, foreground: false, wait: None, manager: None })
    });
    if let Err(error) = &lived {
        // It is for the launcher to tell, who also cleans up.
        let _ = send(&parent, &Event::failed(error), None);
    }
    lived
}

/// Is the keeper of a standing tunnel in the calling process, until it is told to end by SIGTERM, SIGINT or
/// [`Request::Down`](crate::lease), or gives way to a successor.
///
/// # Errors
/// If the tunnel cannot be made or taken over, or ends by itself; if `wait` is given, also if there is no handshake within it.
pub fn run(mission: Mission, wait: Option<Duration>) -> Result<(), Failure> {
    let signals = Signals::block_all_but_read(&[Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT]);
    let signals = signals.doing("watch for signals")?;
    let manager = ServiceManager::find(|name| std::env::var_os(name)).unwrap_or_else(|error| {
        tracing::warn!("the service manager is told nothing: {error}");
        None
    });
    live(mission, Visitors::new(), Service { signals, foreground: true, wait, manager })
}

/// How a keeper serves.
struct Service {
    signals: Signals,
    /// Whether it is a process that somebody watches, and not a child that nobody sees.
    foreground: bool,
    /// How long the first handshake may take.
    wait: Option<Duration>,
    /// Whose service it is.
    manager: Option<ServiceManager>,
}

/// Why a keeper ends.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// Nobody wants the tunnel any more.
    Unwanted,
    /// The last lease was closed without a word.
    Abandoned,
    /// Somebody has asked for it, whoever is inside.
    Ordered,
    /// The tunnel has ended by itself.
    Failed(String),
    /// A successor takes over.
    GaveWay,
}

/// A keeper's life.
fn live(mission: Mission, mut visitors: Visitors, service: Service) -> Result<(), Failure> {
    let hooks = mission.plan.hooks.iter().any(|hook| hook.run);
    let making = needed_capabilities() | capabilities_for_ports(mission.config.listened_ports());
    // What fails here leaves the name claimed until this process ends; then the launcher gives it back.
    limit_to(hooks, making).doing("drop privileges")?;
    tracing::debug!("the keeper has begun");
    let taken = publish::make_room(&mission.plan).and_then(|descriptors| {
        let published = publish::bind(&mission.plan.publish, &mission.beginning)?;
        Ok((descriptors, published))
    });
    let (descriptors, published) = match taken {
        Ok(taken) => taken,
        Err(error) => {
            if matches!(mission.beginning, Beginning::Nothing) {
                mission.directory.release().doing("give the tunnel's name back")?;
            }
            return Err(error);
        }
    };
    let listener = LocalListener::bind(&mission.directory.socket(), SOCKET_MODE).doing("open the keeper's socket")?;
    let strangers = Strangers::listen(&mission.directory.public_socket()).doing("open the keeper's public socket")?;
    let Mission { plan, directory, config, handover, beginning, reload, .. } = mission;
    let foreground = service.foreground;
    let is_taken_over = matches!(beginning, Beginning::TakeOver(_));
    let (tunnel, events, host_ports) = match beginning {
        Beginning::Nothing => make(plan, directory, &config, foreground, &mut visitors)?,
        Beginning::TakeOver(state) => take_over(plan, directory, &config, state, &visitors)?,
    };
    let keeper = Keeper::new(tunnel, events, config, handover, reload, (visitors, strangers), listener, service);
    let mut keeper = keeper.doing("watch the tunnel")?;
    keeper.descriptors = descriptors;
    keeper.begin()?;
    keeper.watch_rules();
    // What is left to do until the end is to fit the MTU, and to point the kernel's device at endpoints.
    if !hooks {
        limit_calls(keeper.tunnel.device().map(Device::backend)).doing("limit the keeper's system calls")?;
    }
    // Whoever reads what it says can be paused, and no program inside is to wait for that. Only now, because no other
    // thread may have a filter of its own before.
    stderr::start_queue(begin_data_path).doing("start the thread that writes messages")?;
    keeper.relay(published, host_ports)?;
    if is_taken_over && foreground {
        // Nobody else is there to ask for it. What cannot be changed now stays as it was, and the tunnel with it.
        keeper.reload_own();
    }
    capabilities::limit(needed_capabilities(), CapabilitySet::NET_ADMIN).doing("drop privileges")?;
    keeper.visitors.tell_all(&Event::Made);
    let end = match keeper.watch() {
        Ok(end) => end,
        Err(error) => End::Failed(format!("its keeper has failed: {error}")),
    };
    finish(keeper, end)
}

/// Makes a tunnel, and takes the ports that the program reaches the host's loopback at. What was made until an error is taken down
/// again.
fn make(
    plan: Plan,
    directory: Directory,
    config: &Config,
    foreground: bool,
    visitors: &mut Visitors,
) -> Result<(Tunnel, DeviceEvents, Vec<ListenSocket>), Failure> {
    let mut tunnel = Tunnel::begin(plan, directory)?;
    let mtu = tunnel.plan().wireguard.mtu;
    let made = device_config(config, mtu).and_then(|device| {
        tunnel.make(&device, foreground, visitors.holders(), begin_data_path, || visitors.tell_all(&Event::Named))
    });
    let made = made.and_then(|events| Ok((events, publish::bind_host_ports(tunnel.plan())?)));
    match made {
        Ok((events, host_ports)) => Ok((tunnel, events, host_ports)),
        Err(error) => {
            // The error that matters is the first one.
            let _ = tunnel.take_down();
            let remains = tunnel.release();
            let gone = remains.is_ok().then_some(Event::Gone);
            let last_words = [Event::failed(&error)].into_iter().chain(gone);
            if foreground {
                // The error is this process's own to tell.
                last_words.for_each(|event| visitors.tell_all(&event));
            } else {
                say_goodbye(visitors, last_words);
            }
            settle(remains)?;
            Err(error)
        }
    }
}

/// Takes a tunnel over, with the ports that the program reaches the host's loopback at. If that cannot be, its programs are ended and it
/// is taken away.
fn take_over(
    plan: Plan,
    directory: Directory,
    config: &Config,
    state: State,
    visitors: &Visitors,
) -> Result<(Tunnel, DeviceEvents, Vec<ListenSocket>), Failure> {
    let name = plan.name.clone();
    let mtu = plan.wireguard.mtu;
    let mut tunnel = Tunnel::begin_again(plan, directory, &state)?;
    let adopted = device_config(config, mtu).and_then(|device| tunnel.adopt(state, &device, begin_data_path));
    match adopted {
        Ok(events) => {
            tracing::info!("the tunnel {name} is taken over from a keeper that was killed");
            let host_ports = publish::take_over_host_ports(tunnel.plan());
            Ok((tunnel, events, host_ports))
        }
        Err(error) => {
            // Before programs are killed, so that whoever sees one die knows why.
            visitors.tell_all(&Event::failed(&error));
            let directory = tunnel.into_directory();
            tunnel::reclaim(&directory, &name)?;
            directory.release().doing("remove the tunnel's state")?;
            visitors.tell_all(&Event::Gone);
            Err(error)
        }
    }
}

/// Ends the tunnel, and the keeper with it.
fn finish(mut keeper: Keeper, end: End) -> Result<(), Failure> {
    if end == End::GaveWay {
        return Ok(());
    }
    keeper.manager.stopping();
    keeper.end_relays();
    // Nobody can come any more, before programs are killed, which takes them their time: a new start waits for the name.
    let closed = keeper.close();
    let reason = match &end {
        End::Failed(reason) => Some(reason.clone()),
        End::Ordered => Some("it was taken down".into()),
        _ => None,
    };
    if let Some(reason) = &reason {
        // Before programs are killed, so that whoever sees one die knows why.
        keeper.visitors.tell_all(&Event::Failed { reason: reason.clone(), advice: None });
    }
    capabilities::raise(needed_capabilities()).doing("take the tunnel down")?;
    let killed = match end {
        End::Unwanted => Ok(()),
        _ => keeper.tunnel.kill_programs().doing("end what still runs in the tunnel"),
    };
    let taken_down = keeper.tunnel.take_down();
    for error in [closed, killed, taken_down].into_iter().filter_map(Result::err) {
        tracing::error!("{error}");
    }
    let Keeper { tunnel, visitors, foreground, .. } = keeper;
    let remains = tunnel.release();
    if remains.is_ok() {
        if foreground {
            visitors.tell_all(&Event::Gone);
        } else {
            say_goodbye(&visitors, [Event::Gone]);
        }
    }
    settle(remains)?;
    match end {
        End::Failed(reason) => Err(io::Error::other(reason)).doing("keep the tunnel up"),
        _ => Ok(()),
    }
}

fn settle(remains: Result<Remains, Failure>) -> Result<(), Failure> {
    remains.and_then(Remains::settle)
}

/// The last words to all visitors. Whoever waits for all output to end shall not wait for the kernel, so that is closed first.
fn say_goodbye(visitors: &Visitors, events: impl IntoIterator<Item = Event>) {
    let _ = close_standard_error();
    for event in events {
        visitors.tell_all(&event);
    }
}

/// Lets go of standard error, which may be a pipe that is read to its end.
fn close_standard_error() -> io::Result<()> {
    // Whoever reads has had its time for what was said before.
    stderr::flush(READING);
    process::redirect_to_null(&[2])
}

/// Which capabilities it takes to make, watch and remove a tunnel: the namespace and its mounts, the network in it, and finding and
/// ending what still runs there.
pub fn needed_capabilities() -> CapabilitySet {
    CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN | CapabilitySet::KILL | CapabilitySet::SYS_PTRACE
}

/// Which capabilities it takes besides to listen on these ports of the host: one below 1024 is privileged (ip(7)).
pub fn capabilities_for_ports(ports: impl IntoIterator<Item = u16>) -> CapabilitySet {
    match ports.into_iter().any(|port| (1..1024).contains(&port)) {
        true => CapabilitySet::NET_BIND_SERVICE,
        false => CapabilitySet::empty(),
    }
}

/// Makes the calling process one that only a tunnel holds: no terminal and no descriptors of the program's.
fn detach(listen_fds: i32) -> io::Result<()> {
    rustix::process::setsid()?;
    process::redirect_to_null(&[0, 1])?;
    process::close_range(3, 2 + listen_fds)
}

/// Leaves the calling process no more capabilities than are needed, and none to gain but for hooks.
fn limit_to(hooks: bool, needed: CapabilitySet) -> io::Result<()> {
    capabilities::limit_bounding_set(gained_by_hooks(hooks), capabilities::last()?)?;
    capabilities::limit(needed, needed)
}

/// What a hook could gain by being executed as root: what configures a network, and no more. A keeper's bounding set.
pub fn gained_by_hooks(hooks: bool) -> CapabilitySet {
    if hooks { CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW } else { CapabilitySet::empty() }
}

/// Leaves the keeper's threads the system calls that they need.
fn limit_calls(backend: Option<Backend>) -> io::Result<()> {
    let filter = system_calls::keeper()?;
    match backend {
        // An embedded device's thread has a stricter filter, and there is no other.
        Some(Backend::Userspace) => filter.install(),
        _ => filter.install_in_all_threads(),
    }
}

/// Leaves the calling thread what it may do: move bytes between descriptors that are open already.
fn begin_data_path() -> io::Result<()> {
    system_calls::data_path()?.install()?;
    capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty())
}

/// What a device is made from. Endpoints come later, by [`endpoint_search::Search`].
fn device_config(config: &Config, mtu: u32) -> Result<DeviceConfig, Failure> {
    let interface = &config.wireguard.interface;
    let private_key = interface.private_key.clone().ok_or_else(|| io::Error::other("the file has no PrivateKey"));
    Ok(DeviceConfig {
        private_key: private_key.doing("make a WireGuard device")?,
        listen_port: interface.listen_port.unwrap_or(0),
        fwmark: interface.fwmark.unwrap_or(0),
        mtu,
        peers: config.wireguard.peers.iter().map(peer_config).collect(),
    })
}

fn peer_config(peer: &Peer) -> PeerConfig {
    PeerConfig {
        public_key: peer.public_key,
        preshared_key: peer.preshared_key.clone(),
        allowed_ips: peer.allowed_ips.clone(),
        persistent_keepalive: peer.persistent_keepalive,
        endpoint: None,
    }
}

/// Does something that takes more than the keeper's ordinary capabilities.
pub(super) fn with_all_capabilities<T>(work: impl FnOnce() -> T) -> io::Result<T> {
    capabilities::with_raised(needed_capabilities(), work)
}
