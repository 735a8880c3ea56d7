//! What the program may do: the capabilities that were asked for, checked against the kernel's, and nothing else.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Findings;
use super::error::PlanError;
use crate::config::{Buses, ProgramOptions, capability};

/// Those with which a program can leave the tunnel: by new routes or a new endpoint, by another process's namespace, by the
/// kernel's memory, or as the host's root, by files and devices that are root's alone.
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

/// Whether the program could send the host packets for anybody: by making them itself, or by a route of its own. The host's end of
/// the veth forwards no IPv4, but Linux forwards IPv6 from all interfaces or none: then the veth has no IPv6.
pub(super) fn could_use_host_as_router(options: &ProgramOptions, findings: &mut Findings) -> bool {
    let kept = options.capabilities.iter().filter_map(|asked| capability::lookup(asked));
    let by = kept.map(|(_, name)| name).find(|name| matches!(*name, "CAP_NET_RAW" | "CAP_NET_ADMIN"));
    if let Some(name) = by {
        findings.note(format!(
            "The host is reached over IPv4 only: with {name} the program could have it forward IPv6 packets, if it does so for others."
        ));
    }
    by.is_some()
}

/// What the program may do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrivilegesPlan {
    /// The user that was asked for.
    pub user: Option<String>,
    /// The group that was asked for.
    pub group: Option<String>,
    /// The capabilities kept, in the order of their numbers, as `CAP_NET_RAW`.
    pub capabilities: Vec<String>,
    /// Whether `no_new_privs` is set (prctl(2)).
    pub no_new_privileges: bool,
    /// Which message buses of the host's can be reached.
    #[serde(default)]
    pub buses: Buses,
}

/// Checks the capabilities, `last` being the kernel's highest, and puts them in order.
pub(super) fn decide(options: &ProgramOptions, last: u8, findings: &mut Findings) -> PrivilegesPlan {
    let mut kept = BTreeMap::new();
    for asked in &options.capabilities {
        match capability::lookup(asked) {
            Some((number, name)) if number <= last => {
                kept.insert(number, name);
            }
            Some((number, name)) => findings.refuse(PlanError::CapabilityNotInKernel { name, number, last }),
            None => findings.refuse(PlanError::UnknownCapability { name: asked.clone() }),
        }
    }
    for name in kept.values().filter(|name| ESCAPES.contains(name)) {
        findings.note(format!("With {name} the program can leave the tunnel if it wants to."));
    }
    if kept.values().any(|name| *name == "CAP_NET_RAW") {
        findings.note(
            "With CAP_NET_RAW the program can send the host anything, also questions for names, past the rules.".into(),
        );
    }
    if options.buses.system {
        findings.note("By the system bus the program can have the host look names up, past the tunnel.".into());
    }
    if options.new_privileges {
        findings.note(
            "The program may become another user, root too, by set-user-ID programs. Root inside may then act as every user."
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
    fn capabilities_are_normalised_and_sorted() {
        let capabilities = ["net_raw", "CAP_CHOWN", "Cap_Net_Raw", "checkpoint_restore"].map(String::from).to_vec();
        let options = ProgramOptions { capabilities, ..ProgramOptions::default() };
        let mut findings = Findings::default();
        let plan = decide(&options, 40, &mut findings);
        assert_eq!(plan.capabilities, ["CAP_CHOWN", "CAP_NET_RAW", "CAP_CHECKPOINT_RESTORE"]);
        assert!(plan.no_new_privileges && findings.errors.is_empty());
        // What leaves by a packet socket passes no rule for output (packet(7)).
        assert!(findings.notes.len() == 1 && findings.notes[0].contains("CAP_NET_RAW"), "{:?}", findings.notes);

        let plan = decide(&options, 39, &mut findings);
        assert_eq!(plan.capabilities, ["CAP_CHOWN", "CAP_NET_RAW"]);
        let refused = PlanError::CapabilityNotInKernel { name: "CAP_CHECKPOINT_RESTORE", number: 40, last: 39 };
        assert_eq!(findings.errors, [refused]);
    }
}
