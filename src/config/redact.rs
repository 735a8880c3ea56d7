//! Masks secrets and control characters in text of a configuration before it is shown.

use std::ops::Range;

/// The minimum length of a base64 run that is masked as a possible key. WireGuard keys have 44 characters.
pub(super) const KEY_LIKE: usize = 32;

/// Replaces each character that a terminal would interpret or hide. The number of characters stays the same.
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

/// Replaces each character except white space with a dot. The number of characters stays the same.
pub(super) fn mask(text: &str) -> String {
    text.chars().map(|c| if c.is_whitespace() { c } else { '.' }).collect()
}

/// Masks each run of base64 that may be a key. The number of characters stays the same.
pub(super) fn mask_keys(text: &str) -> String {
    let mut masked = String::with_capacity(text.len());
    let mut end = 0;
    for run in base64_runs(text) {
        masked.push_str(&text[end..run.start]);
        let characters = &text[run.clone()];
        masked.push_str(&if characters.len() >= KEY_LIKE { mask(characters) } else { characters.to_owned() });
        end = run.end;
    }
    masked.push_str(&text[end..]);
    masked
}

/// Returns whether a word is like a setting's name, and too short to be most of a key.
pub(super) fn is_plain_name(word: &str) -> bool {
    (1..=24).contains(&word.len()) && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

/// Returns the longest parts of `text` that consist of characters of base64, in either alphabet of RFC 4648.
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

/// Quotes a word of a file for a message: in backquotes, with possible keys masked, and shortened.
pub(super) fn quoted(word: &str) -> String {
    const MAX: usize = 60;
    let masked = printable(&mask_keys(word));
    if masked.chars().count() > MAX {
        format!("`{}…`", masked.chars().take(MAX).collect::<String>())
    } else {
        format!("`{masked}`")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_become_dots_of_the_same_length() {
        let key = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
        assert_eq!(mask_keys(&format!("a {key} ü {}", &key[..31])), format!("a {} ü {}", ".".repeat(44), &key[..31]));
        assert_eq!(mask_keys("10.64.0.1/32, fc00::1/128"), "10.64.0.1/32, fc00::1/128");
        assert_eq!(mask_keys(""), "");
    }

    #[test]
    fn quoted_words_are_short_and_printable() {
        assert_eq!(quoted("a\x1bb"), "`a\u{fffd}b`");
        assert!(quoted(&"ü".repeat(1000)).chars().count() < 70);
        assert!(!quoted(&"a".repeat(1000)).contains('a'));
    }
}
