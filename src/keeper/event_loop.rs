//! The keeper's event loop: it waits for the next event and passes it to the part that deals with it. While nothing
//! happens, the keeper sleeps.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::clients::{ConnectionId, KeeperClients};
use super::container::{ContainerAddresses, ContainerWatch};
use super::dns::DnsForwarding;
use super::host_network::{self, HostNetwork};
use super::leases::Leases;
use super::lifecycle::End;
use super::ports::PortRelays;
use super::privileges::with_all_capabilities;
use super::public_clients::PublicClients;
use super::reload::{self, Configuration};
use super::service::ServiceNotifier;
use super::view_servers::ViewServers;
use crate::endpoints::Endpoints;
use crate::failure::Failure;
use crate::lease::{KeeperEvent, ViewKey};
use crate::linux::clock::{Timer, boot_time};
use crate::linux::poll::{Interest, wait_for_each};
use crate::linux::signals::{ReceivedSignal, Signals};
use crate::linux::user_namespace;
use crate::tunnel::{DeviceEvents, Tunnel};

/// A keeper whose tunnel is up.
pub(super) struct Keeper {
    pub(super) tunnel: Tunnel,
    pub(super) configuration: Configuration,
    pub(super) clients: KeeperClients,
    /// None once the keeper is about to end.
    pub(super) public_clients: Option<PublicClients>,
    pub(super) leases: Leases,
    pub(super) view_servers: ViewServers,
    pub(super) endpoints: Endpoints,
    pub(super) ports: PortRelays,
    pub(super) dns: DnsForwarding,
    pub(super) host_network: HostNetwork,
    pub(super) container: ContainerWatch,
    pub(super) container_addresses: ContainerAddresses,
    pub(super) service: ServiceNotifier,
    pub(super) foreground: bool,
    /// The time since boot by which there must have been a handshake.
    pub(super) handshake_deadline: Option<Duration>,
    pub(super) signals: Signals,
    pub(super) device_events: DeviceEvents,
    pub(super) timer: Timer,
}

/// A descriptor that the keeper waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EventSource {
    Timer,
    Container,
    ContainerAddresses,
    HostNetwork,
    Resolver,
    DeviceFailed,
    Links,
    Handshakes,
    ForwarderEnded,
    Signals,
    Client(ConnectionId),
    ClientListener,
    ViewServer(ViewKey),
    PublicClient(ConnectionId),
    PublicListener,
}

impl Keeper {
    /// Serves until the tunnel ends, and returns the reason.
    pub(super) fn run(&mut self) -> io::Result<End> {
        loop {
            if self.host_network.has_slept() {
                self.endpoints.search_again();
            }
            self.endpoints.work(&mut self.tunnel);
            self.report_handshakes();
            if let Some(end) = self.is_over() {
                return Ok(end);
            }
            self.service.update(self.endpoints.summary(), self.handshake_deadline.is_none());
            self.timer.set(self.due())?;
            for source in self.wait()? {
                if let Some(end) = self.handle(source)? {
                    return Ok(end);
                }
            }
        }
    }

    /// Waits for the next events.
    fn wait(&self) -> io::Result<Vec<EventSource>> {
        let mut sources: Vec<(EventSource, BorrowedFd<'_>, Interest)> = Vec::new();
        let mut add = |source, descriptor| sources.push((source, descriptor, Interest::Readable));
        add(EventSource::Timer, self.timer.as_fd());
        // Before the clients: the next container of this name need not be refused.
        self.container.descriptor().into_iter().for_each(|fd| add(EventSource::Container, fd));
        self.container_addresses.descriptor().into_iter().for_each(|fd| add(EventSource::ContainerAddresses, fd));
        add(EventSource::Resolver, self.endpoints.resolver());
        add(EventSource::Signals, self.signals.as_fd());
        self.host_network.descriptors().for_each(|fd| add(EventSource::HostNetwork, fd));
        self.device_events.failed.iter().for_each(|fd| add(EventSource::DeviceFailed, fd.as_fd()));
        self.device_events.links.iter().for_each(|links| add(EventSource::Links, links.as_fd()));
        self.device_events.handshakes.iter().for_each(|fd| add(EventSource::Handshakes, fd.as_fd()));
        self.dns.ended().into_iter().for_each(|fd| add(EventSource::ForwarderEnded, fd));
        // Clients come before the listener, because a client that leaves makes room.
        self.clients.descriptors().for_each(|(id, fd)| add(EventSource::Client(id), fd));
        self.clients.listener().into_iter().for_each(|fd| add(EventSource::ClientListener, fd));
        let servers = self.view_servers.descriptors();
        sources.extend(servers.map(|(key, fd)| (EventSource::ViewServer(key), fd, Interest::Closed)));
        // Users who may only query the status come last.
        if let Some(public) = &self.public_clients {
            sources
                .extend(public.descriptors().map(|(id, fd, interest)| (EventSource::PublicClient(id), fd, interest)));
            sources.extend(public.listener().map(|fd| (EventSource::PublicListener, fd, Interest::Readable)));
        }
        let descriptors: Vec<(BorrowedFd<'_>, Interest)> =
            sources.iter().map(|(_, fd, interest)| (*fd, *interest)).collect();
        let ready = wait_for_each(&descriptors, None)?;
        Ok(sources.into_iter().zip(ready).filter(|(_, ready)| *ready).map(|((source, ..), _)| source).collect())
    }

    fn handle(&mut self, source: EventSource) -> io::Result<Option<End>> {
        match source {
            EventSource::Timer => self.handle_timer()?,
            EventSource::Container => {
                tracing::info!("the container has ended");
                return Ok(Some(End::ContainerEnded));
            }
            EventSource::ContainerAddresses => self.container_addresses.handle_change(&mut self.tunnel)?,
            EventSource::HostNetwork => self.host_network.note_change(boot_time()),
            EventSource::Resolver => self.endpoints.take_answers(),
            EventSource::DeviceFailed => {
                tracing::debug!("the data path has ended");
                return Ok(Some(End::Broken("its WireGuard device failed".into())));
            }
            EventSource::Links => {
                self.device_events.links.as_ref().map_or(Ok(false), |links| links.drain())?;
                if !self.tunnel.has_interface()? {
                    return Ok(Some(End::Broken("another process removed its WireGuard interface".into())));
                }
            }
            EventSource::Handshakes => {
                if let Some(handshakes) = &self.device_events.handshakes {
                    let _ = rustix::io::read(handshakes, &mut [0_u8; 8]);
                }
                self.endpoints.read_device(&self.tunnel);
            }
            EventSource::ForwarderEnded => self.dns.restart(),
            EventSource::Signals => return self.handle_signals(),
            EventSource::Client(id) => return Ok(self.handle_client(id)),
            EventSource::ClientListener => {
                let accepted = self.clients.accept(boot_time());
                pause_if_exhausted(accepted)?;
            }
            EventSource::ViewServer(key) => self.view_servers.remove(key),
            EventSource::PublicClient(id) => self.handle_public_client(id),
            EventSource::PublicListener => {
                let accepted = self.public_clients.as_mut().map_or(Ok(()), |public| public.accept(boot_time()));
                pause_if_exhausted(accepted)?;
            }
        }
        Ok(None)
    }

    fn handle_timer(&mut self) -> io::Result<()> {
        self.timer.clear()?;
        let now = boot_time();
        self.clients.close_idle(now);
        if let Some(public) = &mut self.public_clients {
            public.close_idle(now);
        }
        self.container_addresses.retry(&mut self.tunnel, now);
        if self.dns.due().is_some_and(|due| due <= now) {
            self.dns.start_again(&self.tunnel);
        }
        if !self.host_network.has_settled(now) {
            return Ok(());
        }
        if self.host_network.drain_network()? {
            self.endpoints.network_changed(&mut self.tunnel);
            let Configuration { config, handover, .. } = &mut self.configuration;
            host_network::update_local_networks(&mut self.tunnel, config, |plan| {
                reload::pass_plan(handover, &self.clients, plan)
            });
            if let Err(failure) = self.ports.follow_local_networks(&self.tunnel) {
                tracing::warn!("{failure}");
            }
            self.dns.follow(&self.tunnel);
            self.host_network.watch_rules(&mut self.tunnel);
        }
        // Drained second, to absorb the messages about the keeper's own changes.
        if self.host_network.drain_rules()?
            && let Err(failure) = self.tunnel.repair_host_rules()
        {
            tracing::warn!("{failure}");
        }
        Ok(())
    }

    fn handle_signals(&mut self) -> io::Result<Option<End>> {
        while let Some(received) = self.signals.receive()? {
            if received.is(Signal::SIGHUP) && self.ignores(&received) {
                continue;
            }
            if received.is(Signal::SIGHUP) {
                self.service.reloading();
                self.reload_and_log();
                self.service.ready_again();
                continue;
            }
            // A forked keeper ends with its leases. A SIGTERM to all processes also reaches the launchers.
            let lives_for_leases = !self.foreground && !self.tunnel.is_standing();
            if !(received.is(Signal::SIGTERM) && lives_for_leases) {
                return Ok(Some(End::Requested));
            }
        }
        Ok(None)
    }

    /// Returns whether a signal to read the configuration again is to be ignored, and says why: a program in a rootless
    /// tunnel is of the keeper's user, and may have changed the file.
    fn ignores(&self, signal: &ReceivedSignal) -> bool {
        if !self.tunnel.plan().rootless || signal.from_kernel {
            return false;
        }
        let reason = match signal.is_sender_certain {
            true => match with_all_capabilities(|| user_namespace::require_original(signal.sender)) {
                Ok(Ok(())) => return false,
                Ok(Err(error)) if is_absence(&error) => "it has ended".into(),
                Ok(Err(error)) | Err(error) => error.to_string(),
            },
            false => "it may have named another process".into(),
        };
        tracing::warn!(
            "ignoring SIGHUP from the process {}, which may be a program in the tunnel: {reason}; to change the tunnel, \
             use `vpn-exec reload`",
            signal.sender
        );
        true
    }

    /// Returns the reason to end, if the tunnel is no longer used or no peer has answered in time.
    fn is_over(&mut self) -> Option<End> {
        let now = boot_time();
        if self.endpoints.is_connected() {
            self.handshake_deadline = None;
        }
        if self.handshake_deadline.is_some_and(|deadline| deadline <= now) {
            return Some(End::Broken("no handshake with any peer in time".into()));
        }
        if self.container.has_ended(now) {
            tracing::info!("the container has ended");
            return Some(End::ContainerEnded);
        }
        if self.leases.stop_expecting(&self.clients, now) {
            self.write_down_holders();
        }
        if self.is_used() {
            return None;
        }
        Some(if self.leases.any_abandoned { End::Abandoned } else { End::Unused })
    }

    /// Tells the clients of each peer's first handshake.
    fn report_handshakes(&mut self) {
        for _ in 0..self.endpoints.take_new_handshakes() {
            self.clients.broadcast(&KeeperEvent::Connected);
        }
    }

    /// Returns the time since boot of the next work that does not depend on a descriptor.
    fn due(&self) -> Option<Duration> {
        let all = [
            self.endpoints.due(),
            self.clients.due(),
            self.public_clients.as_ref().and_then(PublicClients::due),
            self.host_network.due(),
            self.handshake_deadline,
            self.leases.due(),
            self.container.due(),
            self.container_addresses.due(),
            self.dns.due(),
            self.service.due(),
        ];
        all.into_iter().flatten().min()
    }

    /// Closes the sockets at which clients connect.
    pub(super) fn close_sockets(&mut self) -> Result<(), Failure> {
        let removed = self.tunnel.remove_sockets();
        self.clients.stop_listening();
        self.public_clients = None;
        removed
    }
}

/// Returns whether an error means that a process has ended.
fn is_absence(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Ignores the error of a connection that cannot be accepted because descriptors or memory have run out, and pauses:
/// the listener stays readable until a client leaves.
///
/// # Errors
/// Any other error.
pub(crate) fn pause_if_exhausted(accepted: io::Result<()>) -> io::Result<()> {
    match accepted {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
            tracing::warn!("cannot accept another connection: {error}");
            std::thread::sleep(Duration::from_millis(10));
            Ok(())
        }
        other => other,
    }
}
