//! What a keeper does between the tunnel's beginning and its end: waits for whatever comes first, and lets the right one deal with
//! it. While nothing happens, it sleeps.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::endpoints::Endpoints;
use super::manager::Manager;
use super::strangers::Strangers;
use super::visitors::{Number, Visitors};
use super::{End, Reload, Service};
use crate::config::Config;
use crate::failure::Doing;
use crate::failure::Failure;
use crate::lease::Event;
use crate::linux::clock::{Timer, boot_time};
use crate::linux::local_socket::LocalListener;
use crate::linux::netlink::monitor::Monitor;
use crate::linux::poll::{Interest, wait_for_each};
use crate::linux::process::ProcessId;
use crate::linux::signals::Signals;
use crate::relay::{Budget, Relay};
use crate::tunnel::{DeviceEvents, Tunnel};

/// How long the host's network may go on changing before the keeper looks at it: one change comes as many messages, and where many
/// tunnels start at once, each hears of all the others' interfaces.
const SETTLING: Duration = Duration::from_millis(250);

/// How long those who held a lease on a killed keeper have to come to its successor.
const RETURN: Duration = Duration::from_secs(2);

/// How much longer the machine must have slept than it seems to be worth a look at the network.
const SLEPT: Duration = Duration::from_secs(2);

pub(super) struct Keeper {
    pub(super) tunnel: Tunnel,
    pub(super) config: Config,
    /// What a successor needs.
    pub(super) handover: OwnedFd,
    pub(super) reload: Option<Reload>,
    pub(super) visitors: Visitors,
    /// Users who may only ask how the tunnel is; nobody any more when the keeper is about to end.
    pub(super) strangers: Option<Strangers>,
    pub(super) foreground: bool,
    pub(super) endpoints: Endpoints,
    /// Moves what comes to published ports, if there are any.
    pub(super) published: Option<Relay>,
    /// Moves what comes from inside to the host's loopback, if any of it is to be reached.
    pub(super) host_ports: Option<Relay>,
    /// How many descriptors these may have open, once there was one.
    pub(super) descriptors: Option<Budget>,
    /// Whether a lease was closed without a word: what its program left behind may be inside still.
    pub(super) abandoned: bool,
    /// Those who held a lease on the killed keeper before, and until when they may come.
    pub(super) awaited: Option<(Vec<ProcessId>, Duration)>,
    /// Who is told how the tunnel is.
    pub(super) manager: Manager,
    listener: Option<LocalListener>,
    signals: Signals,
    events: DeviceEvents,
    timer: Timer,
    monitor: Monitor,
    /// Hears of changes of the host's rules, where the tunnel has some of its own among them.
    pub(super) rules: Option<Monitor>,
    /// When to look at the host's network, which has changed.
    settled_at: Option<Duration>,
    /// How long the machine has slept since it was started.
    slept: Duration,
    /// Until when there must have been a handshake.
    pub(super) wait_until: Option<Duration>,
}

/// What the keeper waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Timer,
    Network,
    Rules,
    Resolver,
    DeviceFailed,
    Links,
    Handshakes,
    Signals,
    Door,
    Visitor(Number),
    PublicDoor,
    Stranger(Number),
}

impl Keeper {
    #[expect(clippy::too_many_arguments, reason = "each is a part of the keeper, and there is one caller")]
    pub(super) fn new(
        tunnel: Tunnel,
        events: DeviceEvents,
        config: Config,
        handover: OwnedFd,
        reload: Option<Reload>,
        (visitors, strangers): (Visitors, Strangers),
        listener: LocalListener,
        service: Service,
    ) -> io::Result<Self> {
        let endpoints = Endpoints::new(&tunnel, &config)?;
        let now = boot_time();
        Ok(Self {
            tunnel,
            config,
            handover,
            reload,
            visitors,
            strangers: Some(strangers),
            foreground: service.foreground,
            endpoints,
            published: None,
            host_ports: None,
            descriptors: None,
            abandoned: false,
            awaited: None,
            manager: Manager::new(service.manager, service.wait),
            listener: Some(listener),
            signals: service.signals,
            events,
            timer: Timer::new()?,
            monitor: Monitor::of_network()?,
            rules: None,
            settled_at: None,
            slept: slept(),
            wait_until: service.wait.map(|wait| now + wait),
        })
    }

    /// Settles, with all capabilities, what a killed keeper has left to be settled.
    pub(super) fn begin(&mut self) -> Result<(), Failure> {
        let (returning, ended): (Vec<_>, Vec<_>) =
            self.tunnel.holders().into_iter().partition(|holder| holder.process.is_alive());
        let own = self.visitors.holders();
        for holder in ended {
            self.abandoned = true;
            if let Some(mounts) = holder.mounts {
                self.tunnel.kill_left_behind(mounts).doing("end what a killed launcher's program has left behind")?;
            }
        }
        let returning: Vec<ProcessId> = returning.into_iter().map(|holder| holder.process).collect();
        let returning: Vec<ProcessId> =
            returning.into_iter().filter(|process| !own.iter().any(|holder| holder.process == *process)).collect();
        if !returning.is_empty() {
            self.awaited = Some((returning, boot_time() + RETURN));
        }
        if self.foreground {
            self.tunnel.note(|state| state.standing = true)?;
        }
        Ok(())
    }

    /// Lets nobody in any more.
    pub(super) fn close(&mut self) -> Result<(), Failure> {
        let closed = self.tunnel.close();
        self.listener = None;
        self.strangers = None;
        closed
    }

    /// Watches the tunnel until it ends.
    pub(super) fn watch(&mut self) -> io::Result<End> {
        loop {
            self.notice_sleep();
            self.endpoints.work(&mut self.tunnel);
            self.hear_of_handshakes();
            if let Some(end) = self.is_over() {
                return Ok(end);
            }
            self.tell_manager();
            self.timer.set(self.due())?;
            for source in self.wait()? {
                if let Some(end) = self.deal_with(source)? {
                    return Ok(end);
                }
            }
        }
    }

    fn wait(&self) -> io::Result<Vec<Source>> {
        let mut sources: Vec<(Source, BorrowedFd<'_>)> = vec![
            (Source::Timer, self.timer.as_fd()),
            (Source::Resolver, self.endpoints.resolver()),
            (Source::Signals, self.signals.as_fd()),
        ];
        // Until it has settled, one change is as good as many.
        if self.settled_at.is_none() {
            sources.push((Source::Network, self.monitor.as_fd()));
            sources.extend(self.rules.as_ref().map(|rules| (Source::Rules, rules.as_fd())));
        }
        sources.extend(self.events.failed.as_ref().map(|fd| (Source::DeviceFailed, fd.as_fd())));
        sources.extend(self.events.links.as_ref().map(|links| (Source::Links, links.as_fd())));
        sources.extend(self.events.handshakes.as_ref().map(|fd| (Source::Handshakes, fd.as_fd())));
        // Visitors come before the door: who leaves makes room.
        sources.extend(self.visitors.descriptors().map(|(number, fd)| (Source::Visitor(number), fd)));
        sources.extend(self.listener.as_ref().map(|listener| (Source::Door, listener.as_fd())));
        let mut sources: Vec<(Source, (BorrowedFd<'_>, Interest))> =
            sources.into_iter().map(|(source, fd)| (source, (fd, Interest::Readable))).collect();
        // Whoever may do more comes before those who may only ask.
        if let Some(strangers) = &self.strangers {
            let all = strangers.descriptors();
            sources.extend(all.map(|(number, fd, awaited)| (Source::Stranger(number), (fd, awaited))));
            sources.extend(strangers.door().map(|door| (Source::PublicDoor, (door, Interest::Readable))));
        }
        let descriptors: Vec<(BorrowedFd<'_>, Interest)> = sources.iter().map(|(_, awaited)| *awaited).collect();
        let ready = wait_for_each(&descriptors, None)?;
        Ok(sources.into_iter().zip(ready).filter(|(_, ready)| *ready).map(|((source, _), _)| source).collect())
    }

    fn deal_with(&mut self, source: Source) -> io::Result<Option<End>> {
        match source {
            Source::Timer => {
                self.timer.clear()?;
                let now = boot_time();
                self.visitors.dismiss_idle(now);
                if let Some(strangers) = &mut self.strangers {
                    strangers.dismiss_idle(now);
                }
                if self.settled_at.is_some_and(|at| at <= now) {
                    self.settled_at = None;
                    if self.monitor.drain()? {
                        self.endpoints.network_changed(&mut self.tunnel);
                        self.find_local_networks();
                    }
                    if self.rules.as_ref().map_or(Ok(false), Monitor::drain)? {
                        self.mend_rules();
                    }
                }
            }
            Source::Network | Source::Rules => self.settled_at = Some(boot_time() + SETTLING),
            Source::Resolver => self.endpoints.take_answers(),
            Source::DeviceFailed => {
                tracing::debug!("the tunnel's device has ended");
                return Ok(Some(End::Failed("its device has failed".into())));
            }
            Source::Links => {
                self.events.links.as_ref().map_or(Ok(false), Monitor::drain)?;
                if !self.tunnel.has_interface()? {
                    return Ok(Some(End::Failed("its device is gone: somebody has removed the interface".into())));
                }
            }
            Source::Handshakes => {
                if let Some(handshakes) = &self.events.handshakes {
                    let _ = rustix::io::read(handshakes, &mut [0_u8; 8]);
                }
                self.endpoints.look(&self.tunnel);
            }
            Source::Signals => return self.take_signals(),
            Source::Door => self.open_door()?,
            Source::Visitor(number) => return Ok(self.hear(number)),
            Source::PublicDoor => {
                let opened = self.strangers.as_mut().map_or(Ok(()), |strangers| strangers.open_door(boot_time()));
                self.unless_exhausted(opened)?;
            }
            Source::Stranger(number) => self.hear_stranger(number),
        }
        Ok(None)
    }

    fn take_signals(&mut self) -> io::Result<Option<End>> {
        while let Some(received) = self.signals.receive()? {
            // One that is there for its leases ends with them: their holders have the same signal from whoever ends all.
            let is_for_others = !self.foreground && !self.tunnel.is_standing();
            if received.is(Signal::SIGHUP) {
                self.manager.reloading();
                self.reload_by_itself();
                self.manager.ready_again();
            } else if !(received.is(Signal::SIGTERM) && is_for_others) {
                return Ok(Some(End::Ordered));
            }
        }
        Ok(None)
    }

    fn open_door(&mut self) -> io::Result<()> {
        let Some(listener) = &self.listener else { return Ok(()) };
        let opened = loop {
            match listener.accept() {
                Ok(Some((socket, who))) => self.visitors.admit(socket, &who, boot_time()),
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.unless_exhausted(opened)
    }

    /// Goes on when no connection can be accepted because something has run out.
    fn unless_exhausted(&self, opened: io::Result<()>) -> io::Result<()> {
        match opened {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
                // The others go on. It is tried again when somebody leaves or comes.
                tracing::warn!("cannot accept another connection: {error}");
                std::thread::sleep(Duration::from_millis(10));
                Ok(())
            }
            other => other,
        }
    }

    /// Whether the tunnel ends because nobody wants it, or because nobody answers.
    fn is_over(&mut self) -> Option<End> {
        let now = boot_time();
        if self.endpoints.is_connected() {
            self.wait_until = None;
        }
        if let Some(until) = self.wait_until
            && until <= now
        {
            return Some(End::Failed("no handshake with any peer in time".into()));
        }
        let present = self.visitors.holders();
        if let Some((awaited, until)) = &mut self.awaited {
            awaited.retain(|process| !present.iter().any(|holder| holder.process == *process) && process.is_alive());
            if awaited.is_empty() || *until <= now {
                self.awaited = None;
                self.write_down_holders();
            }
        }
        let wanted = self.tunnel.is_standing() || self.visitors.leases() > 0 || self.awaited.is_some();
        (!wanted).then_some(if self.abandoned { End::Abandoned } else { End::Unwanted })
    }

    /// Tells those who wait for it of the first handshake.
    fn hear_of_handshakes(&mut self) {
        for _ in 0..self.endpoints.take_connected() {
            self.visitors.tell_all(&Event::Connected);
        }
    }

    /// When there is something to do, whatever happens until then.
    fn due(&self) -> Option<Duration> {
        let awaited = self.awaited.as_ref().map(|(_, until)| *until);
        let strangers = self.strangers.as_ref().and_then(Strangers::due);
        let all = [
            self.endpoints.due(),
            self.visitors.due(),
            strangers,
            self.settled_at,
            self.wait_until,
            awaited,
            self.manager.due(),
        ];
        all.into_iter().flatten().min()
    }

    /// Takes a sleep of the machine for a change of its network.
    fn notice_sleep(&mut self) {
        let slept = slept();
        if slept > self.slept + SLEPT {
            tracing::info!("the machine has slept");
            self.endpoints.has_slept();
        }
        self.slept = slept;
    }
}

/// How long the machine has slept since it was started.
fn slept() -> Duration {
    let awake = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    boot_time().saturating_sub(awake)
}
