//! What must hold of every text that is printed about a configuration.

use vpn_exec::config::diagnostic::Diagnostics;

/// As many base64 characters in a row may be most of a key, which has 44.
const KEY_LIKE: usize = 32;

/// Panics if a diagnostic shows a terminal something to obey, or a key.
pub fn check(input: &[u8], found: &Diagnostics) {
    for color in [false, true] {
        let text = found.render(color);
        let foreign = text.chars().any(|c| c.is_control() && c != '\n' && !(color && c == '\x1b'));
        assert!(!foreign, "a control character in {text:?}");
        for run in input.split(|byte| !(byte.is_ascii_alphanumeric() || b"+/=-_".contains(byte))) {
            if run.len() >= KEY_LIKE {
                let key = std::str::from_utf8(run).expect("ASCII");
                // The first ones, and the last ones: a part that is cut off is a leak as well.
                for part in [&key[..KEY_LIKE], &key[key.len() - KEY_LIKE..]] {
                    assert!(!text.contains(part), "{part} is echoed in {text}");
                }
            }
        }
    }
    assert!(found.render(false).len() < 500_000, "too much to read");
}
