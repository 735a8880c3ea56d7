//! The life of a keeper: it creates or takes over the tunnel, serves until the end, and takes the tunnel down.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use super::clients::KeeperClients;
use super::container::{ContainerAddresses, ContainerWatch};
use super::dns::DnsForwarding;
use super::event_loop::Keeper;
use super::host_network::HostNetwork;
use super::leases::Leases;
use super::ports::ReservedPorts;
use super::privileges::{self, capabilities_for_ports, needed_capabilities};
use super::public_clients::PublicClients;
use super::reload::Configuration;
use super::service::ServiceNotifier;
use super::view_servers::ViewServers;
use super::{KeeperSpec, KeeperStart, close_standard_error};
use crate::config::Config;
use crate::endpoints::{self, Endpoints};
use crate::failure::{Doing, Failure};
use crate::fault;
use crate::lease::KeeperEvent;
use crate::linux::capabilities;
use crate::linux::clock::{Timer, boot_time};
use crate::linux::namespace::NetworkNamespace;
use crate::linux::service_manager::ServiceManager;
use crate::linux::signals::Signals;
use crate::linux::stderr;
use crate::plan::Plan;
use crate::registry::{TunnelDirectory, TunnelState};
use crate::tunnel::{self, DeviceEvents, Remains, Tunnel};
use crate::wireguard::{Device, DeviceConfig, PeerConfig};

/// The circumstances that a keeper runs in.
pub(super) struct Runtime {
    pub(super) signals: Signals,
    /// Whether it runs in the foreground, as the process that the user or systemd watches.
    pub(super) foreground: bool,
    /// How long the first handshake may take. None for no limit.
    pub(super) wait: Option<Duration>,
    /// The service manager, if the keeper is the main process of a service.
    pub(super) service_manager: Option<ServiceManager>,
}

/// Why a keeper ends.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// No lease is left, and every launcher has left properly.
    Unused,
    /// No lease is left, and a launcher has ended without leaving: its program's processes may still run.
    Abandoned,
    /// The container that the tunnel was made for has ended.
    ContainerEnded,
    /// A user or a signal asked for it.
    Requested,
    /// The tunnel broke.
    Broken(String),
    /// Another keeper takes over.
    HandedOver,
}

/// Lives the life of a keeper.
pub(super) fn live(spec: KeeperSpec, clients: KeeperClients, runtime: Runtime) -> Result<(), Failure> {
    let is_new = !matches!(spec.start, KeeperStart::TakeOver(_));
    let mut keeper = set_up(spec, clients, runtime)?;
    // The programs start now, while the keeper gets ready to serve.
    keeper.clients.broadcast(&KeeperEvent::Made);
    let end = settle(is_new)
        .and_then(|()| keeper.run())
        .unwrap_or_else(|error| End::Broken(format!("its keeper failed: {error}")));
    finish(keeper, end)
}

/// Does what is due before the keeper serves, and after the programs may run: leaves the process with the privileges
/// that it needs from then on, and starts the thread that writes messages.
fn settle(is_new: bool) -> io::Result<()> {
    if is_new {
        fault::point("after the announcement").map_err(io::Error::other)?;
    }
    // The reader of standard error may be paused, and no program may wait for it. This thread cannot start earlier: it
    // has a stricter system call filter of its own, and the keeper's is installed in all threads.
    stderr::start_queue(privileges::limit_data_path)?;
    privileges::limit_to_running()
}

/// Brings the tunnel up, limits the system calls of the process, and starts the threads that the programs need.
fn set_up(spec: KeeperSpec, mut clients: KeeperClients, runtime: Runtime) -> Result<Keeper, Failure> {
    let has_hooks = spec.plan.hooks.iter().any(|hook| hook.run);
    let needed = needed_capabilities() | capabilities_for_ports(spec.config.listened_ports());
    privileges::drop_except(needed, has_hooks).doing("drop privileges")?;
    tracing::debug!("the keeper has started");

    // A port that is in use is the likeliest failure, so the ports come first.
    let (spec, mut ports) = reserve_ports(spec)?;
    clients.listen(&spec.directory.socket()).doing("listen at the keeper's socket")?;
    let public_clients =
        PublicClients::listen(&spec.directory.public_socket()).doing("listen at the keeper's public socket")?;

    let KeeperSpec { plan, directory, config, handover, start, namespace, reread, .. } = spec;
    let is_taken_over = matches!(start, KeeperStart::TakeOver(_));
    let (mut tunnel, device_events) = match start {
        KeeperStart::Create => {
            let tunnel = Tunnel::new(plan, directory, namespace)?;
            create(tunnel, &config, runtime.foreground, &mut clients, &mut ports)?
        }
        KeeperStart::CreateIn(place) => {
            let tunnel = Tunnel::new_in(plan, directory, place)?;
            create(tunnel, &config, runtime.foreground, &mut clients, &mut ports)?
        }
        KeeperStart::TakeOver(state) => take_over(plan, directory, &config, (state, namespace), &clients, &mut ports)?,
    };

    let mtu = tunnel.plan().wireguard.mtu;
    let endpoints = Endpoints::new(&tunnel, &config, mtu, Arc::new(endpoints::look_up));
    let endpoints = endpoints.doing("look up the peers' endpoints")?;
    let leases = if is_taken_over { Leases::inherit(&tunnel, &clients)? } else { Leases::default() };
    if runtime.foreground {
        tunnel.update_state(|state| state.standing = true)?;
    }
    let host_network = HostNetwork::watch(&mut tunnel, &config).doing("watch the host's network")?;
    let container = ContainerWatch::open(tunnel.container()).doing("watch the container")?;
    let container_addresses = ContainerAddresses::follow(&mut tunnel).doing("watch the container's network")?;
    let timer = Timer::new().doing("create a timer")?;
    // Hooks at the end would inherit the filter, and they are the user's own commands.
    if !has_hooks {
        privileges::limit_system_calls(tunnel.device().map(Device::backend))
            .doing("limit the keeper's system calls")?;
    }
    let ports = ports.start(&tunnel)?;
    let dns = if is_taken_over { DnsForwarding::take_over(&tunnel) } else { DnsForwarding::start(&tunnel)? };

    let mut keeper = Keeper {
        tunnel,
        configuration: Configuration { config, handover, reread },
        clients,
        public_clients: Some(public_clients),
        leases,
        view_servers: ViewServers::default(),
        endpoints,
        ports,
        dns,
        host_network,
        container,
        container_addresses,
        service: ServiceNotifier::new(runtime.service_manager, runtime.wait),
        foreground: runtime.foreground,
        handshake_deadline: runtime.wait.map(|wait| boot_time() + wait),
        signals: runtime.signals,
        device_events,
        timer,
    };
    if is_taken_over && runtime.foreground {
        // No client will ask for it. A setting that cannot be changed now stays as it was, and so does the tunnel.
        keeper.reload_own();
    }
    Ok(keeper)
}

/// Binds to the published ports. Releases the name of a new tunnel after a failure.
fn reserve_ports(spec: KeeperSpec) -> Result<(KeeperSpec, ReservedPorts), Failure> {
    match ReservedPorts::reserve(&spec.plan, &spec.start) {
        Ok(ports) => Ok((spec, ports)),
        Err(failure) => {
            if !matches!(spec.start, KeeperStart::TakeOver(_)) {
                spec.directory.release().doing("release the tunnel's directory")?;
            }
            Err(failure)
        }
    }
}

/// Creates the tunnel, and reserves the ports that lead from inside to the host's loopback. Undoes everything after a
/// failure.
fn create(
    mut tunnel: Tunnel,
    config: &Config,
    foreground: bool,
    clients: &mut KeeperClients,
    ports: &mut ReservedPorts,
) -> Result<(Tunnel, DeviceEvents), Failure> {
    let (is_rootless, mtu) = (tunnel.plan().rootless, tunnel.plan().wireguard.mtu);
    let created = device_config(config, mtu).and_then(|device| {
        tunnel.create(&device, foreground, clients.holders(), privileges::limit_data_path, |namespace| {
            // A rootless tunnel's namespace has no name by which it could be found.
            let passed = Some(namespace.as_fd()).filter(|_| is_rootless);
            clients.broadcast_with(&KeeperEvent::Named, passed);
        })
    });
    let created = created.and_then(|events| ports.reserve_host_ports(&tunnel).map(|()| events));
    let failure = match created {
        Ok(events) => return Ok((tunnel, events)),
        Err(failure) => failure,
    };
    // The failure to report is the first one.
    let _ = tunnel.take_down();
    let remains = tunnel.release();
    let mut events = vec![KeeperEvent::Failed(failure.clone())];
    if remains.is_ok() {
        events.push(KeeperEvent::Gone);
    }
    say_goodbye(clients, &events, foreground);
    remains.and_then(Remains::settle)?;
    Err(failure)
}

/// Takes a tunnel over, with the ports that lead from inside to the host's loopback. After a failure, kills the
/// programs inside and removes the tunnel.
fn take_over(
    plan: Plan,
    directory: TunnelDirectory,
    config: &Config,
    (state, namespace): (TunnelState, Option<NetworkNamespace>),
    clients: &KeeperClients,
    ports: &mut ReservedPorts,
) -> Result<(Tunnel, DeviceEvents), Failure> {
    let name = plan.name.clone();
    let mtu = plan.wireguard.mtu;
    let mut tunnel = Tunnel::existing(plan, directory, &state, namespace)?;
    let adopted =
        device_config(config, mtu).and_then(|device| tunnel.adopt(state, &device, privileges::limit_data_path));
    let adopted = adopted.and_then(|events| {
        if let Some(namespace) = tunnel.unnamed_namespace()? {
            clients.broadcast_with(&KeeperEvent::Named, Some(namespace.as_fd()));
        }
        ports.take_over_host_ports(&tunnel)?;
        Ok(events)
    });
    match adopted {
        Ok(events) => {
            tracing::info!("took over the tunnel {name} from its former keeper");
            Ok((tunnel, events))
        }
        Err(failure) => {
            // Sent before the programs are killed, so that their launchers know why.
            clients.broadcast(&KeeperEvent::Failed(failure.clone()));
            let directory = tunnel.into_directory();
            tunnel::reclaim(&directory, &name)?;
            directory.release().doing("remove the tunnel's state")?;
            clients.broadcast(&KeeperEvent::Gone);
            Err(failure)
        }
    }
}

/// Ends the tunnel, unless it is handed over, and the keeper with it.
fn finish(mut keeper: Keeper, end: End) -> Result<(), Failure> {
    let reason = match &end {
        End::HandedOver => return Ok(()),
        End::Broken(reason) => Some(reason.clone()),
        End::Requested => Some("it was taken down".into()),
        End::Unused | End::Abandoned | End::ContainerEnded => None,
    };
    keeper.service.stopping();
    keeper.ports.close();
    keeper.dns.close();
    // Its end takes a thread, for which no program need wait.
    let _public_clients = keeper.public_clients.take();
    // Killing programs takes time. New launchers must not join meanwhile: they wait for the name.
    let closed = keeper.close_sockets();
    if let Some(reason) = reason {
        // Sent before the programs are killed, so that their launchers know why.
        keeper.clients.broadcast(&KeeperEvent::Failed(Failure::new(reason)));
    }
    capabilities::raise(needed_capabilities()).doing("take the tunnel down")?;
    let killed = match end {
        End::Unused => Ok(()),
        _ => keeper.tunnel.kill_programs().doing("kill the processes in the tunnel"),
    };
    let taken_down = keeper.tunnel.take_down();
    for failure in [closed, killed, taken_down].into_iter().filter_map(Result::err) {
        tracing::error!("{failure}");
    }
    let Keeper { tunnel, clients, foreground, .. } = keeper;
    let remains = tunnel.release();
    if remains.is_ok() {
        say_goodbye(&clients, &[KeeperEvent::Gone], foreground);
    }
    remains.and_then(Remains::settle)?;
    match end {
        End::Broken(reason) => Err(io::Error::other(reason)).doing("keep the tunnel up"),
        _ => Ok(()),
    }
}

/// Sends the last events to all clients. A forked keeper closes standard error first: a reader of its launcher's output
/// need not wait for the kernel to remove the tunnel.
fn say_goodbye(clients: &KeeperClients, events: &[KeeperEvent], foreground: bool) {
    if !foreground {
        close_standard_error();
    }
    for event in events {
        clients.broadcast(event);
    }
}

/// Returns the configuration of the tunnel's device, without endpoints: [`Endpoints`] sets those.
pub(crate) fn device_config(config: &Config, mtu: u32) -> Result<DeviceConfig, Failure> {
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

fn peer_config(peer: &crate::config::Peer) -> PeerConfig {
    PeerConfig {
        public_key: peer.public_key,
        preshared_key: peer.preshared_key.clone(),
        allowed_ips: peer.allowed_ips.clone(),
        persistent_keepalive: peer.persistent_keepalive,
        endpoint: None,
    }
}
