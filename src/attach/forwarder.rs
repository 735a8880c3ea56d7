//! The forwarder of DNS questions, if some domains have resolvers of their own ([`crate::dns_forwarder`]).
//!
//! Another program of the namespace may have its port, such as a process of this container that is just being killed.
//! That is no reason to give the tunnel up: the forwarder takes the port as soon as it is free. Until then, no question
//! goes anywhere else, because only the forwarder's marked sockets reach a resolver outside the tunnel.

use std::io;
use std::time::Duration;

use crate::dns_forwarder::{DnsForwarder, Listeners, ResolverSockets};
use crate::failure::{Doing, Failure};
use crate::keeper;
use crate::linux::capabilities::CapabilitySet;
use crate::linux::clock::boot_time;
use crate::plan::shared_namespace::SharedNamespacePlan;
use crate::plan::{DNS_PORT, ForwarderPlan};

/// The delay between two attempts to get the port.
const RETRY_DELAY: Duration = Duration::from_millis(250);

/// How long a killed process may take to release the port, before a warning says that it is in use.
const RELEASE_TIME: Duration = Duration::from_secs(2);

/// The forwarder of an attached tunnel.
pub(super) struct Forwarding {
    plan: ForwarderPlan,
    state: State,
}

enum State {
    /// Another program has the port.
    Waits {
        /// The sockets to the resolvers, which were opened with CAP_NET_ADMIN.
        sockets: ResolverSockets,
        /// The time since boot of the next attempt.
        again_at: Duration,
        /// The time since boot of the warning, unless it was given.
        warn_at: Option<Duration>,
    },
    Runs(DnsForwarder),
    /// A start has failed for good.
    Failed,
}

impl Forwarding {
    /// Opens the sockets to the resolvers, and starts the forwarder if its port is free. Returns None if the plan has
    /// no forwarder.
    ///
    /// # Errors
    /// If the kernel refuses a socket, or the forwarder cannot be started for another reason than that its port is in
    /// use.
    pub(super) fn start(plan: &SharedNamespacePlan) -> Result<Option<Self>, Failure> {
        let Some(plan) = plan.dns.forwarder.clone() else { return Ok(None) };
        let sockets = ResolverSockets::open(&plan).doing("open sockets to the resolvers")?;
        let now = boot_time();
        let state = State::Waits { sockets, again_at: now, warn_at: Some(now + RELEASE_TIME) };
        let mut forwarding = Self { plan, state };
        forwarding.work()?;
        Ok(Some(forwarding))
    }

    /// Returns the capability that the next attempt needs.
    pub(super) fn needed_capabilities(&self) -> CapabilitySet {
        match &self.state {
            State::Waits { .. } if self.plan.port == DNS_PORT => CapabilitySet::NET_BIND_SERVICE,
            _ => CapabilitySet::empty(),
        }
    }

    /// Returns the time since boot of the next attempt.
    pub(super) fn due(&self) -> Option<Duration> {
        match &self.state {
            State::Waits { again_at, .. } => Some(*again_at),
            State::Runs(_) | State::Failed => None,
        }
    }

    /// Returns the forwarder, once it runs.
    pub(super) fn running(&self) -> Option<&DnsForwarder> {
        match &self.state {
            State::Runs(forwarder) => Some(forwarder),
            State::Waits { .. } | State::Failed => None,
        }
    }

    /// Starts the forwarder, if that is due and the port is free. It then needs no capability any more.
    ///
    /// # Errors
    /// If it cannot be started for another reason than that its port is in use.
    pub(super) fn work(&mut self) -> Result<(), Failure> {
        let now = boot_time();
        let State::Waits { again_at, warn_at, .. } = &mut self.state else { return Ok(()) };
        if *again_at > now {
            return Ok(());
        }
        let port = self.plan.port;
        let what = || format!("answer DNS questions at port {port} of the loopback");
        match Listeners::bind(&self.plan.listen_addresses()) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                *again_at = now + RETRY_DELAY;
                if warn_at.take_if(|at| *at <= now).is_some() {
                    tracing::warn!(
                        "cannot {} yet: another program of the container or the pod uses the port; stop it, or names \
                         do not resolve",
                        what()
                    );
                }
                Ok(())
            }
            Err(error) => Err(error).doing(what()),
            Ok(listeners) => self.listen(listeners).doing(what()),
        }
    }

    fn listen(&mut self, listeners: Listeners) -> io::Result<()> {
        let State::Waits { sockets, warn_at, .. } = std::mem::replace(&mut self.state, State::Failed) else {
            return Ok(());
        };
        self.state = State::Runs(DnsForwarder::start(&self.plan, listeners, sockets, keeper::limit_dns_forwarder)?);
        if warn_at.is_none() {
            tracing::info!("answering DNS questions now");
        }
        Ok(())
    }
}
