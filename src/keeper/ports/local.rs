//! The relay from a rootless tunnel to the local networks.
//!
//! Its ports are in the gateway's namespace, whose packet rules pass everything for these networks to them, and it
//! connects from the host's namespace.

use std::io;
use std::net::IpAddr;

use super::super::privileges::{limit_relay, limit_replies, needed_capabilities, with_all_capabilities};
use super::{PortRelays, run_at_link};
use crate::config::Protocol;
use crate::failure::{Doing, Failure};
use crate::linux::namespace::{NamespaceThread, NetworkNamespace};
use crate::plan::{NAME_PORTS, Plan, RELAY_ADDRESSES};
use crate::relay::{self, AllowedClient, AllowedDestinations, Destinations, ListenSocket, Relay, RelayedPort, Targets};
use crate::tunnel::Tunnel;

/// The operation that a failure names.
const RELAYING: &str = "relay to the local networks";

impl PortRelays {
    /// Starts the relay if a plan needs it and it does not run yet. It relays nothing before
    /// [`Self::follow_local_networks`].
    pub(super) fn start_local(&mut self, tunnel: &Tunnel, plan: &Plan) -> Result<(), Failure> {
        if !plan.rootless || plan.local.networks.is_empty() || self.local.is_some() {
            return Ok(());
        }
        let (ports, clients) = run_at_link(tunnel, listen)?;
        let targets = Targets::Original(Destinations::new(AllowedDestinations::default(), clients));
        let limits = self.limits().doing(RELAYING)?;
        let started =
            with_all_capabilities(|| Relay::start(ports, targets, None, limits, limit_relay)).doing(RELAYING)?;
        self.local = Some(started.doing(RELAYING)?);
        Ok(())
    }

    /// Adapts the relay to the local networks of the tunnel's plan, which may have changed.
    pub(in crate::keeper) fn follow_local_networks(&mut self, tunnel: &Tunnel) -> Result<(), Failure> {
        let plan = tunnel.plan();
        if plan.local.networks.is_empty() {
            self.local = None;
            return Ok(());
        }
        self.start_local(tunnel, plan)?;
        match &self.local {
            Some(relay) => {
                let (networks, resolvers) = (plan.local_destinations(), plan.local_resolvers());
                let allowed = AllowedDestinations { networks, name_ports: &NAME_PORTS, resolvers };
                relay.set_destinations(allowed).doing(RELAYING)
            }
            None => Ok(()),
        }
    }
}

/// Listens in the gateway, and starts a thread there that opens the sockets for replies.
fn listen(plan: &Plan) -> Result<(Vec<ListenSocket>, NamespaceThread), Failure> {
    let ports = relay::bind(&ports(plan))?;
    let start = || -> io::Result<NamespaceThread> {
        let clients = NamespaceThread::start(NetworkNamespace::current()?, needed_capabilities())?;
        clients.run(limit_replies)??;
        Ok(clients)
    };
    Ok((ports, start().doing(RELAYING)?))
}

/// Returns the ports to which the gateway's rules pass packets.
fn ports(plan: &Plan) -> Vec<RelayedPort> {
    let Some(veth) = &plan.veth else { return Vec::new() };
    let port = |address: IpAddr, protocol| {
        let relay = RELAY_ADDRESSES.into_iter().find(|relay| relay.is_ipv4() == address.is_ipv4())?;
        let client = AllowedClient { interface: veth.host_interface.clone(), address };
        Some(RelayedPort::transparent(protocol, relay, client))
    };
    let of_address = |address| [Protocol::Tcp, Protocol::Udp].map(|protocol| port(address, protocol));
    veth.inner_addresses().flat_map(of_address).flatten().collect()
}
