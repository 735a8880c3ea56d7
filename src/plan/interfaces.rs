//! The names of the interfaces: fixed inside, derived from the tunnel's name on the host, where they share one list with
//! everybody else's.
//!
//! On the host, a tunnel's end of the veth is `ve-NAME` where that fits into the kernel's 15 bytes. Otherwise, or where that
//! name is taken by another interface, it is `ve-`, the first five characters of the name, `-`, and six digits of
//! [`stable::hex`] for the purpose `host-interface`. The attempt is 0, and one more for each derived name that is taken.

use super::error::PlanError;
use super::facts::Facts;
use super::{Findings, stable};
use crate::names::{InterfaceName, TunnelName};

/// WireGuard's interface, inside.
const WIREGUARD: &str = "wg0";

/// The inner end of the veth.
const INNER: &str = "host0";

/// How the host's end of every tunnel's veth begins.
pub(super) const HOST_PREFIX: &str = "ve-";

/// How many derived names are tried. A host would need as many look-alikes before we gave up.
const ATTEMPTS: u32 = 64;

/// All interface names of a tunnel.
pub(super) struct Names {
    pub(super) wireguard: InterfaceName,
    pub(super) host: InterfaceName,
    pub(super) inner: InterfaceName,
}

/// Derives the names, passing over those that the host has already.
pub(super) fn derive(name: &TunnelName, facts: &Facts, findings: &mut Findings) -> Option<Names> {
    let plain = Some(format!("{HOST_PREFIX}{name}")).filter(|plain| plain.len() <= InterfaceName::MAX);
    let derived = (0..ATTEMPTS).map(|attempt| shortened(name, attempt));
    let host = first_free(plain.into_iter().chain(derived), facts, findings);
    Some(Names { wireguard: checked(WIREGUARD), host: host?, inner: checked(INNER) })
}

fn shortened(name: &TunnelName, attempt: u32) -> String {
    // A tunnel's name is ASCII, so any cut is between characters.
    let start = &name.as_str()[..name.as_str().len().min(5)];
    format!("{HOST_PREFIX}{start}-{}", stable::hex("host-interface", name, attempt, 6))
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
            findings.note(format!("The host has an interface {first} already, so this tunnel uses {candidate}."));
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

    // These values are a promise between versions; they were computed with another implementation (Python's hashlib).
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
    fn a_name_that_the_host_has_is_passed_over_and_noted() {
        let (host, notes) = derived("mullvad", &["lo", "ve-mullvad"]).expect("a free name");
        assert_eq!(host, "ve-mullv-aa3202");
        assert_eq!(notes, ["The host has an interface ve-mullvad already, so this tunnel uses ve-mullv-aa3202."]);

        let (host, notes) = derived("mullvad", &["ve-mullvad", "ve-mullv-aa3202"]).expect("a free name");
        assert_eq!((host.as_str(), notes.len()), ("ve-mullv-262897", 1));
    }

    #[test]
    fn a_host_full_of_look_alikes_is_an_error() {
        let name: TunnelName = "mullvad".parse().expect("a name");
        let mut taken: Vec<String> = (0..ATTEMPTS).map(|attempt| shortened(&name, attempt)).collect();
        taken.push("ve-mullvad".into());
        let taken: Vec<&str> = taken.iter().map(String::as_str).collect();
        assert_eq!(derived("mullvad", &taken), None);
        assert!(derived("mullvad", &taken[1..]).is_some());
    }
}
