//! The ports that the keeper relays: published ports of the host, which lead inside; ports of the link, which lead to
//! the host's loopback; and those that lead from a rootless tunnel to local networks (`local`). The relays themselves
//! are threads ([`crate::relay`]).

mod bind;
mod change;
mod local;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::KeeperStart;
use super::privileges::{limit_relay, with_all_capabilities};
use crate::failure::{Doing, Failure};
use crate::plan::Plan;
use crate::relay::{Budget, Limits, ListenSocket, Relay, Targets};
use crate::tunnel::Tunnel;

/// Runs a function in the namespace where the host's end of the link is.
fn run_at_link<T: Send>(tunnel: &Tunnel, work: impl FnOnce(&Plan) -> Result<T, Failure> + Send) -> Result<T, Failure> {
    match tunnel.has_gateway() {
        true => with_all_capabilities(|| tunnel.run_outside(work)).doing("enter the gateway's namespace")?,
        false => work(tunnel.plan()),
    }
}

/// Bound ports whose relays have not started yet.
pub(super) struct ReservedPorts {
    published: Vec<ListenSocket>,
    host_ports: Vec<ListenSocket>,
    descriptors: Option<Budget>,
}

impl ReservedPorts {
    /// Binds to the published ports.
    pub(super) fn reserve(plan: &Plan, start: &KeeperStart) -> Result<Self, Failure> {
        let descriptors = bind::descriptor_budget(plan)?;
        let published = bind::bind_published(&plan.publish, start)?;
        Ok(Self { published, host_ports: Vec::new(), descriptors })
    }

    /// Binds to the ports of a new tunnel's link.
    pub(super) fn reserve_host_ports(&mut self, tunnel: &Tunnel) -> Result<(), Failure> {
        self.host_ports = run_at_link(tunnel, bind::bind_host_ports)?;
        Ok(())
    }

    /// Binds to the ports of the link of a tunnel that is taken over, as far as possible.
    ///
    /// # Errors
    /// If the namespace of the link's other end cannot be entered.
    pub(super) fn take_over_host_ports(&mut self, tunnel: &Tunnel) -> Result<(), Failure> {
        self.host_ports = run_at_link(tunnel, |plan| Ok(bind::rebind_host_ports(plan)))?;
        Ok(())
    }

    /// Starts the relays that are needed.
    pub(super) fn start(self, tunnel: &Tunnel) -> Result<PortRelays, Failure> {
        let mut ports = PortRelays { published: None, host_ports: None, local: None, descriptors: self.descriptors };
        if !self.published.is_empty() {
            ports.published = Some(ports.start_published(tunnel, self.published)?);
        }
        if !self.host_ports.is_empty() {
            ports.host_ports = Some(ports.start_host_ports(self.host_ports)?);
        }
        ports.follow_local_networks(tunnel)?;
        Ok(ports)
    }
}

/// The running relays.
pub(super) struct PortRelays {
    /// The relay of published ports, if there are any.
    published: Option<Relay>,
    /// The relay to the host's loopback, if it has ports.
    host_ports: Option<Relay>,
    /// The relay to local networks, if a rootless tunnel has some.
    local: Option<Relay>,
    /// The number of descriptors that all relays may open. Set when the first relay starts.
    descriptors: Option<Budget>,
}

impl PortRelays {
    /// Ends the relays and all their connections.
    pub(super) fn close(&mut self) {
        (self.published, self.host_ports, self.local, self.descriptors) = (None, None, None, None);
    }

    /// Starts the relay from the host to the program.
    fn start_published(&mut self, tunnel: &Tunnel, ports: Vec<ListenSocket>) -> Result<Relay, Failure> {
        let start = || {
            let (targets, namespace) = tunnel.inner_addresses()?;
            let limits = self.limits()?;
            let targets = Targets::Addresses(targets);
            with_all_capabilities(|| Relay::start(ports, targets, Some(namespace), limits, limit_relay))?
        };
        start().doing("publish ports")
    }

    /// Starts the relay from inside to the host's loopback.
    fn start_host_ports(&mut self, ports: Vec<ListenSocket>) -> Result<Relay, Failure> {
        let start = || {
            let loopback = Targets::Addresses(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
            let limits = self.limits()?;
            with_all_capabilities(|| Relay::start(ports, loopback, None, limits, limit_relay))?
        };
        start().doing("open the host's ports to the program")
    }

    fn limits(&mut self) -> io::Result<Limits> {
        let descriptors = match &self.descriptors {
            Some(descriptors) => descriptors.clone(),
            None => self.descriptors.insert(Budget::of_process()?).clone(),
        };
        Ok(Limits::new(descriptors))
    }
}
