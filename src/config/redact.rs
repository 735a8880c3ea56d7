//! Which of a configuration's text may be shown to a person, and how: secrets as mask, and nothing that a terminal would
//! obey.

use std::ops::Range;

/// Runs of base64 at least this long are taken for keys, or most of one. WireGuard's have 44 characters.
pub(super) const KEY_LIKE: usize = 32;

/// The same text with each character that a terminal would obey, or hide, replaced; as many characters as before.
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\t' => ' ',
            // No-break spaces, which look like spaces.
            '\u{a0}' | '\u{202f}' => '\u{fffd}',
            // Soft hyphen, zero-width characters, directional marks, line and paragraph separators, byte-order mark.
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' => '\u{fffd}',
            '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}' => '\u{fffd}',
            c if c.is_control() => '\u{fffd}',
            c => c,
        })
        .collect()
}

/// Dots in place of all but white space; as many characters as before.
pub(super) fn mask(text: &str) -> String {
    text.chars().map(|c| if c.is_whitespace() { c } else { '.' }).collect()
}

/// Dots in place of whatever may be a key; as many characters as before.
pub(super) fn mask_keys(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut end = 0;
    for run in base64_runs(text) {
        shown.push_str(&text[end..run.start]);
        let hidden = &text[run.clone()];
        shown.push_str(&if hidden.len() >= KEY_LIKE { mask(hidden) } else { hidden.to_owned() });
        end = run.end;
    }
    shown.push_str(&text[end..]);
    shown
}

/// Whether a word is what keys are called, and too short to be much of a secret.
pub(super) fn is_plain_name(word: &str) -> bool {
    (1..=24).contains(&word.len()) && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

/// The longest parts of `text` that consist of base64's characters, of either alphabet of RFC 4648.
fn base64_runs(text: &str) -> impl Iterator<Item = Range<usize>> {
    let is_base64 = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=-_".contains(&byte);
    let bytes = text.as_bytes();
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = next + bytes[next..].iter().position(|byte| is_base64(*byte))?;
        next = bytes[start..].iter().position(|byte| !is_base64(*byte)).map_or(bytes.len(), |length| start + length);
        Some(start..next)
    })
}

/// A word of the file, for a message: in backquotes, without secrets, shortened.
pub(super) fn quoted(word: &str) -> String {
    const MAX: usize = 60;
    let shown = printable(&mask_keys(word));
    if shown.chars().count() > MAX {
        format!("`{}…`", shown.chars().take(MAX).collect::<String>())
    } else {
        format!("`{shown}`")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_become_dots_of_their_length() {
        let key = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
        assert_eq!(mask_keys(&format!("a {key} ü {}", &key[..31])), format!("a {} ü {}", ".".repeat(44), &key[..31]));
        assert_eq!(mask_keys("10.64.0.1/32, fc00::1/128"), "10.64.0.1/32, fc00::1/128");
        assert_eq!(mask_keys(""), "");
    }

    #[test]
    fn quoted_is_short_and_plain() {
        assert_eq!(quoted("a\x1bb"), "`a\u{fffd}b`");
        assert!(quoted(&"ü".repeat(1000)).chars().count() < 70);
        assert!(!quoted(&"a".repeat(1000)).contains('a'));
    }
}
