//! The plan of a tunnel in the network namespace of a container. The container keeps its own interfaces, so there is no
//! link to the host. The encrypted packets leave in the host's namespace.

use std::net::IpAddr;
use std::path::Path;

use super::shared_namespace::{self, Placement, SharedNamespaceFacts};
use super::{Findings, FirewallPlan, LocalNetworksPlan, NAMESPACES, Plan, PlanErrors, SocketsPlan, privileges};
use crate::config::{Config, ProgramOptions};

impl Plan {
    /// Adapts the plan to the addresses that the container's interfaces have now. Returns whether anything has changed.
    pub fn follow_container(&mut self, addresses: Vec<IpAddr>) -> bool {
        let Some(shared) = &mut self.shared_namespace else { return false };
        let has_changed = shared.follow(addresses);
        if has_changed {
            self.firewall.inside = shared.rules.clone();
        }
        has_changed
    }
}

/// Plans a tunnel in a container's namespace.
///
/// # Errors
///
/// Returns all reasons why the tunnel cannot be made.
pub fn plan_in_container(config: &Config, facts: &SharedNamespaceFacts) -> Result<Plan, PlanErrors> {
    let shared = shared_namespace::plan(config, facts, Placement::Container)?;
    let no_program = ProgramOptions::default();
    Ok(Plan {
        name: shared.name.clone(),
        namespace: Some(Path::new(NAMESPACES).join(config.name.as_str())),
        rootless: false,
        backend: shared.backend,
        wireguard: shared.wireguard.clone(),
        veth: None,
        local: LocalNetworksPlan::default(),
        publish: Vec::new(),
        host_ports: Vec::new(),
        open: shared.open.clone(),
        firewall: FirewallPlan { inside: shared.rules.clone(), host: None },
        parameters: Vec::new(),
        dns: shared.dns.clone(),
        hidden: Vec::new(),
        sockets: SocketsPlan::default(),
        privileges: privileges::decide(&no_program, facts.underlay.last_capability, &mut Findings::default()),
        hooks: Vec::new(),
        notes: shared.notes.clone(),
        shared_namespace: Some(shared),
    })
}
