//! Invariants of all diagnostics of a configuration.

use vpn_exec::config::diagnostic::Diagnostics;

/// The length of a base64 run that may be most of a key, which has 44 characters.
const KEY_LIKE: usize = 32;

/// Panics if a diagnostic contains a control character or a key.
pub fn check(input: &[u8], found: &Diagnostics) {
    for color in [false, true] {
        let text = found.render(color);
        let has_control = text.chars().any(|c| c.is_control() && c != '\n' && !(color && c == '\x1b'));
        assert!(!has_control, "a control character in {text:?}");
        for run in input.split(|byte| !(byte.is_ascii_alphanumeric() || b"+/=-_".contains(byte))) {
            if run.len() >= KEY_LIKE {
                let key = std::str::from_utf8(run).expect("ASCII");
                // The beginning and the end: a part of a key is a leak, too.
                for part in [&key[..KEY_LIKE], &key[key.len() - KEY_LIKE..]] {
                    assert!(!text.contains(part), "{part} is echoed in {text}");
                }
            }
        }
    }
    assert!(found.render(false).len() < 500_000, "too much to read");
}
