//! Changes the relayed ports of a running tunnel, in two phases: everything that can fail comes first.

use std::borrow::Borrow;

use super::{PortRelays, bind, run_at_link};
use crate::failure::{Doing, Failure};
use crate::plan::Plan;
use crate::relay::{self, ListenSocket, PortDiff, Relay, RelayedPort};
use crate::tunnel::Tunnel;

/// A change of all ports that is ready to be committed.
pub(in crate::keeper) struct PortsChange {
    published: RelayChange,
    host_ports: RelayChange,
}

/// A change of one relay's ports that is ready to be committed.
struct RelayChange {
    change: PortDiff,
    /// The new ports.
    bound: Vec<ListenSocket>,
}

impl PortRelays {
    /// Binds to the ports that a changed plan adds.
    ///
    /// # Errors
    /// If one of them cannot be bound. Then nothing has changed.
    pub(in crate::keeper) fn prepare(&mut self, tunnel: &Tunnel, changed: &Plan) -> Result<PortsChange, Failure> {
        if self.descriptors.is_none() {
            self.descriptors = bind::descriptor_budget(changed)?;
        }
        let ports: Vec<RelayedPort> = changed.publish.iter().map(RelayedPort::from).collect();
        let bind_one = |port: &RelayedPort| relay::bind(std::slice::from_ref(port)).map(|mut bound| bound.pop());
        let published = RelayChange::prepare(&self.published, &ports, bind_one)?;
        let relayed_host_ports = bind::relayed_host_ports(changed);
        let host_ports = match RelayChange::prepare(&self.host_ports, &relayed_host_ports, |port| {
            run_at_link(tunnel, |_| bind::bind_unless_reachable(port))
        }) {
            Ok(change) => change,
            Err(failure) => {
                published.abandon(&self.published, relay::bind);
                return Err(failure);
            }
        };
        let change = PortsChange { published, host_ports };
        // Starting a thread is the last step that can fail.
        let started = self.start_missing(tunnel, &change).and_then(|()| self.start_local(tunnel, changed));
        if let Err(failure) = started {
            self.abandon(tunnel, change);
            return Err(failure);
        }
        Ok(change)
    }

    /// Starts the relays that a change needs and that do not run yet, without ports.
    fn start_missing(&mut self, tunnel: &Tunnel, change: &PortsChange) -> Result<(), Failure> {
        if self.published.is_none() && !change.published.bound.is_empty() {
            self.published = Some(self.start_published(tunnel, Vec::new())?);
        }
        if self.host_ports.is_none() && !change.host_ports.bound.is_empty() {
            self.host_ports = Some(self.start_host_ports(Vec::new())?);
        }
        Ok(())
    }

    /// Commits a change, after the tunnel was changed.
    pub(in crate::keeper) fn commit(&mut self, tunnel: &Tunnel, change: PortsChange) {
        change.published.commit(&mut self.published);
        change.host_ports.commit(&mut self.host_ports);
        if let Err(failure) = self.follow_local_networks(tunnel) {
            tracing::error!("{failure}");
        }
        // The program may listen at new addresses of the tunnel.
        if let Some(relay) = &self.published
            && let Err(error) = tunnel.inner_addresses().and_then(|(targets, _)| relay.set_targets(targets))
        {
            tracing::error!("cannot relay published ports to the tunnel's new addresses: {error}");
        }
    }

    /// Closes the ports that were bound for a change.
    pub(in crate::keeper) fn abandon(&mut self, tunnel: &Tunnel, change: PortsChange) {
        change.published.abandon(&self.published, relay::bind);
        change.host_ports.abandon(&self.host_ports, |ports| run_at_link(tunnel, |_| relay::bind(ports)));
        end_if_unused(&mut self.published);
        end_if_unused(&mut self.host_ports);
        if tunnel.plan().local.networks.is_empty() {
            self.local = None;
        }
    }
}

impl RelayChange {
    fn prepare(
        relay: &Option<Relay>,
        ports: &[RelayedPort],
        bind_one: impl Fn(&RelayedPort) -> Result<Option<ListenSocket>, Failure>,
    ) -> Result<Self, Failure> {
        let change = PortDiff::between(relay.as_ref().map_or(&[], Relay::ports), ports);
        let bind_all = |ports: &[RelayedPort]| -> Result<Vec<ListenSocket>, Failure> {
            let bound = ports.iter().map(&bind_one).collect::<Result<Vec<_>, _>>()?;
            Ok(bound.into_iter().flatten().collect())
        };
        let mut prepared = Self { bound: bind_all(&change.open)?, change };
        if let Some(relay) = relay.as_ref().filter(|_| !prepared.change.open_after_close.is_empty()) {
            // A port whose addresses change cannot be bound twice, so it is closed for an instant.
            relay.release(&prepared.change.conflicting()).doing("publish ports")?;
            match bind_all(&prepared.change.open_after_close) {
                Ok(bound) => prepared.bound.extend(bound),
                Err(error) => {
                    let bind = |ports: &[RelayedPort]| {
                        let bound = ports.iter().map(&bind_one).collect::<Result<Vec<_>, _>>()?;
                        Ok(bound.into_iter().flatten().collect())
                    };
                    prepared.abandon(&Some(relay), bind);
                    return Err(error);
                }
            }
        }
        Ok(prepared)
    }

    fn commit(self, relay: &mut Option<Relay>) {
        if let Some(running) = relay
            && let Err(error) = running.apply(self.change, self.bound)
        {
            tracing::error!("the port relay has stopped: {error}");
        }
        end_if_unused(relay);
    }

    fn abandon(
        self,
        relay: &Option<impl Borrow<Relay>>,
        bind: impl Fn(&[RelayedPort]) -> Result<Vec<ListenSocket>, Failure>,
    ) {
        let Some(relay) = relay else { return };
        drop(self.bound);
        let closed = self.change.conflicting();
        let reopened = match bind(&closed) {
            Ok(bound) => relay.borrow().restore(bound),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = reopened {
            tracing::error!("cannot reopen a port that was closed for a change: {error}");
        }
    }
}

/// Ends a relay without ports.
fn end_if_unused(relay: &mut Option<Relay>) {
    if relay.as_ref().is_some_and(|relay| relay.ports().is_empty()) {
        *relay = None;
    }
}
