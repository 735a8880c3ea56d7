//! The status of a running tunnel, as its keeper reports it.

use super::event_loop::Keeper;
use crate::lease::status::{ContainerReport, DnsReport, HostLink, InterfaceReport, LiveStatus, PeerReport, Status};

/// Returns the status of a keeper's tunnel.
pub(super) fn status(keeper: &mut Keeper) -> Status {
    let statuses = keeper.endpoints.read_device(&keeper.tunnel);
    let summary = keeper.endpoints.summary();
    let counters = keeper.tunnel.counters().unwrap_or_default();
    let plan = keeper.tunnel.plan();
    let wireguard = &plan.wireguard;
    let link = plan.veth.as_ref().map(|veth| HostLink {
        interface: veth.host_interface.clone(),
        host_ipv4: veth.host_ipv4,
        inner_ipv4: veth.inner_ipv4,
        host_ipv6: veth.host_ipv6,
        inner_ipv6: veth.inner_ipv6,
    });
    let living = LiveStatus {
        interface: InterfaceReport::new(
            wireguard.interface.clone(),
            keeper.endpoints.mtu,
            wireguard.addresses.clone(),
            counters,
        ),
        peers: PeerReport::of_all(&statuses, &wireguard.peers),
        dns: DnsReport {
            servers: plan.dns.servers.clone(),
            search: plan.dns.search.clone(),
            domains: plan.dns.forwarder.as_ref().map(|forwarder| forwarder.domains.clone()).unwrap_or_default(),
        },
        link,
        local_networks: match &plan.shared_namespace {
            Some(shared) => shared.local_networks.clone(),
            None => plan.local.networks.clone(),
        },
        open_ports: plan.open.clone(),
        published_ports: plan.publish.clone(),
        host_ports: plan.host_ports.clone(),
        refused_connections: keeper.clients.refused_connections(),
        problem: summary.problem,
    };
    Status {
        name: plan.name.clone(),
        state: summary.condition,
        standing: keeper.tunnel.is_standing(),
        backend: keeper.tunnel.device().map(|device| device.backend()),
        namespace: plan.namespace.clone(),
        keeper: std::process::id(),
        leases: keeper.clients.leases(),
        container: keeper.tunnel.container().map(ContainerReport::from),
        living: Some(living),
        programs: Vec::new(),
    }
}
