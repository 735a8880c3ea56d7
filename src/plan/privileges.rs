//! The program's privileges: the capabilities that the user lets it keep, checked against those of the kernel.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Findings;
use super::error::PlanError;
use crate::config::{Buses, ProgramOptions, capability};

/// The capabilities with which a program can leave the tunnel: by changing routes or the endpoint, by entering another
/// process's namespace, by the kernel's memory, or by files and devices that only root can access.
const ESCAPES: [&str; 12] = [
    "CAP_NET_ADMIN",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_PTRACE",
    "CAP_SYS_ADMIN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_MKNOD",
    "CAP_BPF",
];

/// Returns whether the program could use the host as a router: with raw packets, or by adding a route. The host's end
/// of the veth does not forward IPv4, but Linux forwards IPv6 from all interfaces or from none. So the veth then has no
/// IPv6.
pub(super) fn could_use_host_as_router(options: &ProgramOptions, findings: &mut Findings) -> bool {
    let kept = options.capabilities.iter().filter_map(|requested| capability::lookup(requested));
    let capability = kept.map(|(_, name)| name).find(|name| matches!(*name, "CAP_NET_RAW" | "CAP_NET_ADMIN"));
    if let Some(name) = capability {
        findings.note(format!(
            "The program reaches the host over IPv4 only: with {name} it could use a host that forwards IPv6 \
             as a router."
        ));
    }
    capability.is_some()
}

/// Refuses the capabilities with which a program of a rootless tunnel could leave it. The program is in the user
/// namespace that owns the tunnel's other namespaces, so CAP_NET_ADMIN changes its packet rules, and CAP_SYS_ADMIN
/// uncovers its files. The others have no more power there than for root's tunnels, so they are kept.
pub(super) fn check_rootless(options: &ProgramOptions, findings: &mut Findings) {
    let kept = options.capabilities.iter().filter_map(|requested| capability::lookup(requested));
    for (_, name) in kept.filter(|(_, name)| ESCAPES.contains(name)) {
        findings.refuse(PlanError::RootlessCapability { name });
    }
}

/// The program's privileges.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrivilegesPlan {
    /// The requested user.
    pub user: Option<String>,
    /// The requested group.
    pub group: Option<String>,
    /// The capabilities that it keeps, such as `CAP_NET_RAW`, sorted by their numbers.
    pub capabilities: Vec<String>,
    /// Whether `no_new_privs` is set (prctl(2)).
    pub no_new_privileges: bool,
    /// The message buses of the host that it can reach.
    #[serde(default)]
    pub buses: Buses,
}

/// Checks and sorts the capabilities. `last` is the number of the kernel's highest capability.
pub(super) fn decide(options: &ProgramOptions, last: u8, findings: &mut Findings) -> PrivilegesPlan {
    let mut kept = BTreeMap::new();
    for requested in &options.capabilities {
        match capability::lookup(requested) {
            Some((number, name)) if number <= last => {
                kept.insert(number, name);
            }
            Some((number, name)) => findings.refuse(PlanError::CapabilityNotInKernel { name, number, last }),
            None => findings.refuse(PlanError::UnknownCapability { name: requested.clone() }),
        }
    }
    for name in kept.values().filter(|name| ESCAPES.contains(name)) {
        findings.note(format!("With {name} the program can leave the tunnel."));
    }
    if kept.values().any(|name| *name == "CAP_NET_RAW") {
        findings.note(
            "With CAP_NET_RAW the program can send any packet to the host past the packet rules, DNS queries included."
                .into(),
        );
    }
    if options.buses.system {
        findings.note("On the system bus the program can have the host resolve names, outside the tunnel.".into());
    }
    if options.new_privileges {
        findings.note(
            "The program may become another user, including root, by set-user-ID programs. Root can then act as every \
             user."
                .into(),
        );
    }
    PrivilegesPlan {
        user: options.user.clone(),
        group: options.group.clone(),
        capabilities: kept.into_values().map(String::from).collect(),
        no_new_privileges: !options.new_privileges,
        buses: options.buses.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_normalized_and_sorted() {
        let capabilities = ["net_raw", "CAP_CHOWN", "Cap_Net_Raw", "checkpoint_restore"].map(String::from).to_vec();
        let options = ProgramOptions { capabilities, ..ProgramOptions::default() };
        let mut findings = Findings::default();
        let plan = decide(&options, 40, &mut findings);
        assert_eq!(plan.capabilities, ["CAP_CHOWN", "CAP_NET_RAW", "CAP_CHECKPOINT_RESTORE"]);
        assert!(plan.no_new_privileges && findings.errors.is_empty());
        // Packets of a packet socket bypass the output rules (packet(7)).
        assert!(findings.notes.len() == 1 && findings.notes[0].contains("CAP_NET_RAW"), "{:?}", findings.notes);

        let plan = decide(&options, 39, &mut findings);
        assert_eq!(plan.capabilities, ["CAP_CHOWN", "CAP_NET_RAW"]);
        let refused = PlanError::CapabilityNotInKernel { name: "CAP_CHECKPOINT_RESTORE", number: 40, last: 39 };
        assert_eq!(findings.errors, [refused]);
    }
}
