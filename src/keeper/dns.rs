//! The forwarder of DNS questions, if the plan has one. It runs as a thread ([`crate::dns_forwarder`]).

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use super::privileges::{limit_dns_forwarder, with_all_capabilities};
use crate::dns_forwarder::{DnsForwarder, Listeners, ResolverSockets};
use crate::failure::{Doing, Failure};
use crate::linux::clock::boot_time;
use crate::linux::namespace::NetworkNamespace;
use crate::plan::{ForwarderPlan, Plan};
use crate::tunnel::Tunnel;

/// How long a keeper that hands over, or was killed, may take to close its sockets, before a message says that names do
/// not resolve.
const HANDOVER_TIME: Duration = Duration::from_secs(2);

/// The delay before the first further attempt to start the forwarder. Each further delay is twice as long.
const FIRST_DELAY: Duration = Duration::from_millis(5);

/// The longest delay between two attempts.
const LONGEST_DELAY: Duration = Duration::from_secs(1);

/// The forwarder of a tunnel.
#[derive(Default)]
pub(super) struct DnsForwarding {
    running: Option<Running>,
    /// Set while the forwarder could not be started yet, or has to be started again.
    retry: Option<Retry>,
}

/// When to start the forwarder again. Times are since boot.
struct Retry {
    since: Duration,
    at: Duration,
    delay: Duration,
    is_reported: bool,
}

struct Running {
    forwarder: DnsForwarder,
    plan: ForwarderPlan,
}

/// A change of the forwarder that is ready to be committed.
pub(super) enum DnsChange {
    /// It stays as it is.
    Keep,
    /// It ends.
    Stop,
    /// It has been started.
    Start(DnsForwarder, ForwarderPlan),
    /// It follows another plan, with these sockets.
    Follow(ForwarderPlan, ResolverSockets),
}

impl DnsForwarding {
    /// Starts the forwarder of a new tunnel, if its plan has one.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(super) fn start(tunnel: &Tunnel) -> Result<Self, Failure> {
        let mut forwarding = Self::default();
        let change = forwarding.prepare(tunnel, tunnel.plan())?;
        forwarding.commit(change);
        Ok(forwarding)
    }

    /// Starts the forwarder of a tunnel that is taken over. Failing to do so is no reason to end the programs inside:
    /// they cannot resolve names until it succeeds.
    pub(super) fn take_over(tunnel: &Tunnel) -> Self {
        let mut forwarding = Self::default();
        forwarding.start_again(tunnel);
        forwarding
    }

    /// Returns a descriptor that is readable when the forwarder has ended by itself.
    pub(super) fn ended(&self) -> Option<BorrowedFd<'_>> {
        self.running.as_ref().map(|running| running.forwarder.ended())
    }

    /// Returns the time since boot of the next attempt to start the forwarder.
    pub(super) fn due(&self) -> Option<Duration> {
        self.retry.as_ref().map(|retry| retry.at)
    }

    /// Makes a forwarder that has ended start again, after a pause.
    pub(super) fn restart(&mut self) {
        self.running = None;
        let now = boot_time();
        self.retry = Some(Retry { since: now, at: now + LONGEST_DELAY, delay: LONGEST_DELAY, is_reported: true });
    }

    /// Tries to start the forwarder. Schedules another attempt if that fails.
    pub(super) fn start_again(&mut self, tunnel: &Tunnel) {
        let now = boot_time();
        let mut retry =
            self.retry.take().unwrap_or(Retry { since: now, at: now, delay: FIRST_DELAY, is_reported: false });
        match self.prepare(tunnel, tunnel.plan()) {
            Ok(change) => {
                self.commit(change);
                if retry.is_reported {
                    tracing::info!("answering DNS questions again");
                }
            }
            Err(failure) => {
                // The former keeper may still have the port.
                let is_expected = failure.errno == Some(libc::EADDRINUSE) && now - retry.since < HANDOVER_TIME;
                if !is_expected && !retry.is_reported {
                    tracing::error!("the programs inside cannot resolve names yet: {failure}");
                    retry.is_reported = true;
                }
                retry.at = now + retry.delay;
                retry.delay = (retry.delay * 2).min(LONGEST_DELAY);
                self.retry = Some(retry);
            }
        }
    }

    /// Prepares to follow a changed plan: everything that can fail.
    ///
    /// # Errors
    /// If sockets cannot be opened, or a thread cannot be started. Then nothing has changed.
    pub(super) fn prepare(&self, tunnel: &Tunnel, changed: &Plan) -> Result<DnsChange, Failure> {
        let change = match (&self.running, &changed.dns.forwarder) {
            (None, None) => Ok(DnsChange::Keep),
            (Some(_), None) => Ok(DnsChange::Stop),
            (Some(running), Some(plan)) if running.plan == *plan => Ok(DnsChange::Keep),
            (Some(_), Some(plan)) => in_namespace(tunnel, |namespace| namespace.run(|| ResolverSockets::open(plan)))
                .map(|sockets| DnsChange::Follow(plan.clone(), sockets)),
            (None, Some(plan)) => {
                let start = |namespace: &NetworkNamespace| {
                    let open = || Ok((Listeners::bind(&plan.listen_addresses())?, ResolverSockets::open(plan)?));
                    let (listeners, sockets) = namespace.run(open)?;
                    DnsForwarder::start(plan, listeners, sockets, limit_dns_forwarder)
                };
                in_namespace(tunnel, start).map(|forwarder| DnsChange::Start(forwarder, plan.clone()))
            }
        };
        change.doing("answer DNS questions at port 53 of the tunnel's loopback").map_err(|failure| {
            match failure.errno {
                Some(libc::EADDRINUSE) => failure.advise("a program in the tunnel uses the port: stop it"),
                _ => failure,
            }
        })
    }

    /// Commits a change, after the tunnel was changed.
    pub(super) fn commit(&mut self, change: DnsChange) {
        match change {
            DnsChange::Keep => {}
            DnsChange::Stop => self.close(),
            DnsChange::Start(forwarder, plan) => {
                self.running = Some(Running { forwarder, plan });
                self.retry = None;
            }
            DnsChange::Follow(plan, sockets) => {
                let Some(running) = &mut self.running else { return };
                if let Err(error) = running.forwarder.change(plan.clone(), sockets) {
                    tracing::error!("the programs inside cannot resolve names: {error}");
                }
                running.plan = plan;
            }
        }
    }

    /// Follows the present plan of a tunnel whose local networks have changed.
    pub(super) fn follow(&mut self, tunnel: &Tunnel) {
        match self.prepare(tunnel, tunnel.plan()) {
            Ok(change) => self.commit(change),
            Err(failure) => tracing::error!("{failure}"),
        }
    }

    /// Ends the forwarder.
    pub(super) fn close(&mut self) {
        (self.running, self.retry) = (None, None);
    }
}

/// Runs a function with the tunnel's namespace and all of the keeper's capabilities.
fn in_namespace<T>(tunnel: &Tunnel, work: impl FnOnce(&NetworkNamespace) -> io::Result<T>) -> io::Result<T> {
    let (_, namespace) = tunnel.inner_addresses()?;
    with_all_capabilities(|| work(&namespace))?
}
