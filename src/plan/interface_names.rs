//! The names of the interfaces. In the namespace they are fixed. On the host the name is derived from the tunnel's
//! name, since all interfaces of the host need different names.
//!
//! The host's end of a tunnel's veth is `ve-NAME` where that fits into the kernel's 15 bytes. If it does not fit or
//! another interface has that name, it is `ve-`, the first five characters of the name, `-`, and six digits of
//! [`name_hash::hex`] for the purpose `host-interface`. The attempt is 0, and one more for each derived name that is
//! taken.

use super::error::PlanError;
use super::facts::Facts;
use super::{Findings, name_hash};
use crate::names::{InterfaceName, TunnelName};

/// The WireGuard interface.
const WIREGUARD: &str = "wg0";

/// The namespace's end of the veth.
const INNER: &str = "host0";

/// The prefix of the host's ends of all tunnels' veths.
pub(super) const HOST_PREFIX: &str = "ve-";

/// How many derived names are tried.
const ATTEMPTS: u32 = 64;

/// The interface names of a tunnel.
pub(super) struct InterfaceNames {
    pub(super) wireguard: InterfaceName,
    pub(super) host: InterfaceName,
    pub(super) inner: InterfaceName,
}

/// Derives the names; skips those that another interface of the host has.
pub(super) fn derive(name: &TunnelName, facts: &Facts, findings: &mut Findings) -> Option<InterfaceNames> {
    let plain = Some(format!("{HOST_PREFIX}{name}")).filter(|plain| plain.len() <= InterfaceName::MAX);
    let derived = (0..ATTEMPTS).map(|attempt| shortened(name, attempt));
    let host = first_free(plain.into_iter().chain(derived), facts, findings);
    Some(InterfaceNames { wireguard: wireguard(), host: host?, inner: checked(INNER) })
}

/// Returns the name of the WireGuard interface.
pub(super) fn wireguard() -> InterfaceName {
    checked(WIREGUARD)
}

fn shortened(name: &TunnelName, attempt: u32) -> String {
    // A tunnel's name is ASCII, so it can be cut at any byte.
    let start = &name.as_str()[..name.as_str().len().min(5)];
    format!("{HOST_PREFIX}{start}-{}", name_hash::hex("host-interface", name, attempt, 6))
}

fn first_free(
    candidates: impl Iterator<Item = String>,
    facts: &Facts,
    findings: &mut Findings,
) -> Option<InterfaceName> {
    let mut taken = Vec::new();
    for candidate in candidates {
        if facts.has_interface(&candidate) {
            taken.push(candidate);
            continue;
        }
        if let Some(first) = taken.first() {
            findings.note(format!("The host already has an interface {first}, so this tunnel uses {candidate}."));
        }
        return Some(checked(&candidate));
    }
    findings.refuse(PlanError::NoFreeInterfaceName { last: taken.pop().unwrap_or_default() });
    None
}

fn checked(text: &str) -> InterfaceName {
    text.parse().expect("at most 15 of the characters that tunnel names and interface names have in common")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::facts::HostInterface;

    fn derived(name: &str, taken: &[&str]) -> Option<(String, Vec<String>)> {
        let interfaces = taken.iter().map(|name| HostInterface { name: (*name).into(), index: 9, mtu: 1500 }).collect();
        let mut findings = Findings::default();
        let facts = Facts { interfaces, ..Facts::default() };
        let names = derive(&name.parse().expect("a name"), &facts, &mut findings);
        assert_eq!(names.is_none(), matches!(findings.errors[..], [PlanError::NoFreeInterfaceName { .. }]));
        Some((names?.host.to_string(), findings.notes))
    }

    // All versions must derive these values. They were computed with another implementation (Python's hashlib).
    #[test]
    fn names_never_change() {
        let long = "x".repeat(64);
        for (name, host) in [
            ("a", "ve-a"),
            ("mullvad", "ve-mullvad"),
            ("twelve-chars", "ve-twelve-chars"),
            ("thirteen-char", "ve-thirt-e852f3"),
            (long.as_str(), "ve-xxxxx-6bbc9f"),
        ] {
            assert_eq!(derived(name, &[]), Some((host.into(), vec![])), "{name}");
        }
    }

    #[test]
    fn a_name_that_is_taken_is_skipped_and_noted() {
        let (host, notes) = derived("mullvad", &["lo", "ve-mullvad"]).expect("a free name");
        assert_eq!(host, "ve-mullv-aa3202");
        assert_eq!(notes, ["The host already has an interface ve-mullvad, so this tunnel uses ve-mullv-aa3202."]);

        let (host, notes) = derived("mullvad", &["ve-mullvad", "ve-mullv-aa3202"]).expect("a free name");
        assert_eq!((host.as_str(), notes.len()), ("ve-mullv-262897", 1));
    }

    #[test]
    fn it_is_an_error_if_all_derived_names_are_taken() {
        let name: TunnelName = "mullvad".parse().expect("a name");
        let mut taken: Vec<String> = (0..ATTEMPTS).map(|attempt| shortened(&name, attempt)).collect();
        taken.push("ve-mullvad".into());
        let taken: Vec<&str> = taken.iter().map(String::as_str).collect();
        assert_eq!(derived("mullvad", &taken), None);
        assert!(derived("mullvad", &taken[1..]).is_some());
    }
}
