//! What a tunnel cannot have if an ordinary user makes it, in a user namespace (user_namespaces(7)): everything that
//! changes the host, or needs a privilege there.

use super::error::PlanError;
use super::{Findings, HookPlan, privileges};
use crate::config::{BackendChoice, Config, ProgramOptions};

/// What a rootless tunnel depends on besides the facts of every tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootlessFacts {
    /// The first port that a process of the host can bind to without a privilege: the parameter
    /// `net.ipv4.ip_unprivileged_port_start`.
    pub first_port: u16,
}

/// Refuses what needs root.
pub(super) fn check(config: &Config, facts: RootlessFacts, findings: &mut Findings) {
    let interface = &config.wireguard.interface;
    if config.backend == BackendChoice::Kernel {
        findings.refuse(PlanError::RootlessKernel);
    }
    if interface.fwmark.is_some_and(|mark| mark != 0) {
        findings.refuse(PlanError::RootlessMark);
    }
    check_program(&config.program, findings);
    let listen = interface.listen_port.filter(|port| *port > 0);
    let published = config.local.publish.iter().map(|port| port.host_port);
    let mut ports: Vec<u16> = listen.into_iter().chain(published).filter(|port| *port < facts.first_port).collect();
    ports.sort_unstable();
    ports.dedup();
    for port in ports {
        findings.refuse(PlanError::RootlessPort { port });
    }
}

/// Refuses what a program cannot have.
pub(super) fn check_program(program: &ProgramOptions, findings: &mut Findings) {
    if program.user.is_some() || program.group.is_some() {
        findings.refuse(PlanError::RootlessUser);
    }
    privileges::check_rootless(program, findings);
}

/// Refuses hooks: what they are written for, such as routes and rules of the host, needs root.
pub(super) fn check_hooks(hooks: &[HookPlan], findings: &mut Findings) {
    if let Some(hook) = hooks.iter().find(|hook| hook.run) {
        findings.refuse(PlanError::RootlessHook { kind: hook.kind });
    }
}
