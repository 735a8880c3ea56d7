//! The forwarder of DNS questions, if the plan has one. It runs as a thread ([`crate::dns_forwarder`]).

use std::io;
use std::time::{Duration, Instant};

use super::privileges::{limit_dns_forwarder, with_all_capabilities};
use crate::dns_forwarder::{DnsForwarder, Listeners, ResolverSockets};
use crate::failure::{Doing, Failure};
use crate::linux::namespace::NetworkNamespace;
use crate::plan::{ForwarderPlan, Plan};
use crate::tunnel::Tunnel;

/// How long a keeper that hands over, or was killed, may take to close its sockets.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(2);

/// The delay between two attempts to bind.
const RETRY_DELAY: Duration = Duration::from_millis(5);

/// The forwarder of a tunnel.
#[derive(Default)]
pub(super) struct DnsForwarding {
    running: Option<Running>,
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
    /// they cannot resolve names then.
    pub(super) fn take_over(tunnel: &Tunnel) -> Self {
        let begin = Instant::now();
        loop {
            match Self::start(tunnel) {
                Ok(forwarding) => return forwarding,
                // The former keeper may still have the port.
                Err(failure) if failure.errno == Some(libc::EADDRINUSE) && begin.elapsed() < HANDOVER_TIMEOUT => {
                    std::thread::sleep(RETRY_DELAY);
                }
                Err(failure) => {
                    tracing::error!("the programs inside cannot resolve names: {failure}");
                    return Self::default();
                }
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
            DnsChange::Start(forwarder, plan) => self.running = Some(Running { forwarder, plan }),
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
        self.running = None;
    }
}

/// Runs a function with the tunnel's namespace and all of the keeper's capabilities.
fn in_namespace<T>(tunnel: &Tunnel, work: impl FnOnce(&NetworkNamespace) -> io::Result<T>) -> io::Result<T> {
    let (_, namespace) = tunnel.inner_addresses()?;
    with_all_capabilities(|| work(&namespace))?
}
