//! What the process does once the tunnel is up: it waits for events, follows the endpoints, answers queries of the
//! status, and reaps the children of a container whose first process it is.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::carrier::Attached;
use super::forwarder::Forwarding;
use super::names::{self, EndpointResolver};
use super::{Site, privileges, status};
use crate::config::Config;
use crate::endpoints::Endpoints;
use crate::failure::{Doing, Failure};
use crate::keeper::{self, ConnectionId, PublicClients};
use crate::linux::capabilities::CapabilitySet;
use crate::linux::children;
use crate::linux::clock::{Timer, boot_time};
use crate::linux::code_pages;
use crate::linux::netlink::monitor::Monitor;
use crate::linux::poll::{Interest, wait_for_each};
use crate::linux::signals::Signals;
use crate::plan::shared_namespace::SharedNamespacePlan;
use crate::tunnel::DeviceEvents;
use crate::wireguard::Device;

/// How long the set-up of the kernel's WireGuard tries the addresses of an endpoint that has several.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(15);

/// How long the peers may take to answer before the log says that they do not.
const SILENCE: Duration = Duration::from_secs(10);

/// The process of an attached tunnel that is up.
pub(super) struct Server {
    attached: Attached,
    endpoints: Endpoints,
    events: DeviceEvents,
    signals: Signals,
    network: Monitor,
    timer: Timer,
    /// None if the socket of the status cannot be opened.
    clients: Option<PublicClients>,
    forwarder: Option<Forwarding>,
}

/// A descriptor that the process waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EventSource {
    Timer,
    Signals,
    Resolver,
    Network,
    DeviceFailed,
    Handshakes,
    ForwarderEnded,
    Client(ConnectionId),
    ClientListener,
}

/// Blocks all signals, and makes those readable that the process acts on. A container's first process has no default
/// actions for signals.
pub(super) fn block_signals() -> Result<Signals, Failure> {
    Signals::block_all_but_read(&[Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD]).doing("watch for signals")
}

impl Server {
    pub(super) fn new(
        site: Site,
        plan: SharedNamespacePlan,
        config: &Config,
        resolver: &EndpointResolver,
        (device, events): (Box<dyn Device>, DeviceEvents),
        signals: Signals,
    ) -> Result<Self, Failure> {
        let mtu = plan.wireguard.mtu;
        let attached = Attached { site, plan, device, follows_names: names::has_names(config) };
        let endpoints = Endpoints::new(&attached, config, mtu, resolver.look_up());
        Ok(Self {
            endpoints: endpoints.doing("look up the peers' endpoints")?,
            attached,
            events,
            signals,
            network: Monitor::of_network().doing("watch the network")?,
            timer: Timer::new().doing("create a timer")?,
            clients: None,
            forwarder: None,
        })
    }

    /// Sets the endpoints of the kernel's device, which then works without a process. An endpoint with several
    /// addresses gets the one that answers.
    ///
    /// # Errors
    /// If the name of an endpoint does not resolve in time.
    pub(super) fn set_endpoints(mut self) -> Result<(), Failure> {
        const WAITING: &str = "wait for a handshake";
        let deadline = boot_time() + SEARCH_TIMEOUT;
        loop {
            self.endpoints.work(&mut self.attached);
            let is_settled = self.endpoints.is_connected() || !self.endpoints.has_alternatives();
            if is_settled || boot_time() >= deadline {
                // No process will look the name up again, so the caller has to.
                return match self.endpoints.summary().problem {
                    Some(problem) => Err(Failure::new(problem).advise("the namespace is closed: run this again")),
                    None => Ok(()),
                };
            }
            let due = self.endpoints.due().map_or(deadline, |due| due.min(deadline));
            self.timer.set(Some(due)).and_then(|()| self.wait()).doing(WAITING)?;
            if self.handle_signals().doing(WAITING)? {
                return Ok(());
            }
            self.timer.clear().doing(WAITING)?;
            self.endpoints.take_answers();
            self.endpoints.read_device(&self.attached);
        }
    }

    /// Serves the tunnel until SIGTERM or SIGINT.
    ///
    /// # Errors
    /// If privileges cannot be dropped, or the data path or the DNS forwarder fails.
    pub(super) fn serve(mut self, forwarder: Option<Forwarding>) -> Result<(), Failure> {
        self.forwarder = forwarder;
        match status::listen() {
            Ok(clients) => self.clients = Some(clients),
            Err(error) => tracing::warn!("cannot answer queries of the status: {error}"),
        }
        // What follows needs a small part of the program.
        if let Err(error) = code_pages::unmap() {
            tracing::debug!(%error, "cannot unmap the code of the start");
        }
        privileges::limit(self.needed_capabilities()).doing("drop privileges")?;
        self.run().doing("keep the tunnel up")?;
        self.forwarder = None;
        tracing::info!("the tunnel has ended; the network namespace stays closed");
        Ok(())
    }

    /// Returns the capabilities that the remaining work needs: CAP_NET_ADMIN if the packet rules follow the addresses
    /// of an endpoint, and that for the port of a forwarder which still waits for it.
    fn needed_capabilities(&self) -> CapabilitySet {
        let rules = if self.attached.follows_names { CapabilitySet::NET_ADMIN } else { CapabilitySet::empty() };
        rules | self.forwarder.as_ref().map_or(CapabilitySet::empty(), Forwarding::needed_capabilities)
    }

    /// Starts the forwarder, if it waits for its port and gets it now.
    fn start_forwarder(&mut self) -> io::Result<()> {
        let Some(forwarder) = self.forwarder.as_mut().filter(|forwarder| forwarder.due().is_some()) else {
            return Ok(());
        };
        forwarder.work()?;
        if forwarder.due().is_none() { privileges::keep_only(self.needed_capabilities()) } else { Ok(()) }
    }

    fn run(&mut self) -> io::Result<()> {
        let mut silence_due = Some(boot_time() + SILENCE);
        loop {
            self.endpoints.work(&mut self.attached);
            let _ = self.endpoints.take_new_handshakes();
            if self.endpoints.is_connected() {
                silence_due = None;
            }
            if silence_due.take_if(|due| *due <= boot_time()).is_some() {
                self.warn_of_silence();
            }
            self.start_forwarder()?;
            let clients = self.clients.as_ref().and_then(PublicClients::due);
            let forwarder = self.forwarder.as_ref().and_then(Forwarding::due);
            self.timer.set([self.endpoints.due(), clients, forwarder, silence_due].into_iter().flatten().min())?;
            for source in self.wait()? {
                if self.handle(source)? {
                    return Ok(());
                }
            }
        }
    }

    /// Warns that no peer has answered yet, with the reason if it is known.
    fn warn_of_silence(&self) {
        let reason = self.endpoints.summary().problem.map(|problem| format!(": {problem}")).unwrap_or_default();
        tracing::warn!(
            "no handshake with any peer within {} s{reason}; check that the endpoint can be reached from here, and that \
             the provider knows this key",
            SILENCE.as_secs()
        );
    }

    /// Waits for the next events.
    fn wait(&self) -> io::Result<Vec<EventSource>> {
        let mut sources: Vec<(EventSource, BorrowedFd<'_>, Interest)> = Vec::new();
        let mut add = |source, descriptor| sources.push((source, descriptor, Interest::Readable));
        add(EventSource::Timer, self.timer.as_fd());
        add(EventSource::Signals, self.signals.as_fd());
        add(EventSource::Resolver, self.endpoints.resolver());
        add(EventSource::Network, self.network.as_fd());
        self.events.failed.iter().for_each(|fd| add(EventSource::DeviceFailed, fd.as_fd()));
        self.events.handshakes.iter().for_each(|fd| add(EventSource::Handshakes, fd.as_fd()));
        let forwarder = self.forwarder.as_ref().and_then(Forwarding::running);
        forwarder.iter().for_each(|forwarder| add(EventSource::ForwarderEnded, forwarder.ended()));
        if let Some(clients) = &self.clients {
            sources.extend(clients.descriptors().map(|(id, fd, interest)| (EventSource::Client(id), fd, interest)));
            sources.extend(clients.listener().map(|fd| (EventSource::ClientListener, fd, Interest::Readable)));
        }
        let descriptors: Vec<_> = sources.iter().map(|(_, fd, interest)| (*fd, *interest)).collect();
        let ready = wait_for_each(&descriptors, None)?;
        Ok(sources.into_iter().zip(ready).filter(|(_, ready)| *ready).map(|((source, ..), _)| source).collect())
    }

    /// Handles an event. Returns whether the process is to end.
    fn handle(&mut self, source: EventSource) -> io::Result<bool> {
        match source {
            EventSource::Timer => {
                self.timer.clear()?;
                if let Some(clients) = &mut self.clients {
                    clients.close_idle(boot_time());
                }
            }
            EventSource::Signals => return self.handle_signals(),
            EventSource::Resolver => self.endpoints.take_answers(),
            EventSource::Network => {
                if self.network.drain()? {
                    self.endpoints.network_changed(&mut self.attached);
                }
            }
            EventSource::DeviceFailed => return Err(io::Error::other("its WireGuard device failed")),
            // Its marked sockets need a capability that this process has dropped. The next process has it again.
            EventSource::ForwarderEnded => return Err(io::Error::other("its DNS forwarder has ended")),
            EventSource::Handshakes => {
                if let Some(handshakes) = &self.events.handshakes {
                    let _ = rustix::io::read(handshakes, &mut [0_u8; 8]);
                }
                self.endpoints.read_device(&self.attached);
            }
            EventSource::Client(id) => self.answer(id),
            EventSource::ClientListener => {
                let accepted = self.clients.as_mut().map_or(Ok(()), |clients| clients.accept(boot_time()));
                keeper::pause_if_exhausted(accepted)?;
            }
        }
        Ok(false)
    }

    /// Answers a client's query of the status.
    fn answer(&mut self, id: ConnectionId) {
        let Some(request) = self.clients.as_mut().and_then(|clients| clients.receive(id)) else { return };
        let (event, text) = status::answer(&request, &mut self.attached, &mut self.endpoints);
        if let Some(clients) = &mut self.clients {
            clients.answer(id, &event, &text);
        }
    }

    fn handle_signals(&mut self) -> io::Result<bool> {
        let mut ends = false;
        while let Some(received) = self.signals.receive()? {
            ends |= received.is(Signal::SIGTERM) || received.is(Signal::SIGINT);
        }
        children::reap()?;
        Ok(ends)
    }
}
