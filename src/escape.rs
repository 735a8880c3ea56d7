//! Escapes text for terminals and logs.
//!
//! Messages contain text from other sources: process names, configuration files, errors of peers. Characters that a
//! terminal would interpret or hide are escaped here, when the text is printed, and nowhere else.

use std::fmt::Write;

/// Returns whether a terminal would interpret a character, or show nothing for it.
///
/// These are control characters (C0, DEL and C1, including tab and newline), the soft hyphen, directional marks,
/// characters without width, and line separators.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

fn escape(text: &str, is_kept: impl Fn(char) -> bool) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if is_unsafe(c) && !is_kept(c) { safe.extend(c.escape_default()) } else { safe.push(c) }
    }
    safe
}

/// Escapes unsafe characters as Rust writes them (`\u{1b}`), except for newlines and tabs.
pub fn multiline(text: &str) -> String {
    escape(text, |c| matches!(c, '\n' | '\t'))
}

/// Escapes unsafe characters including newlines and tabs, so that the text stays on one line.
pub fn single_line(text: &str) -> String {
    escape(text, |_| false)
}

/// Escapes a message like [`multiline`], but keeps the colours of a report.
///
/// A coloured report begins with an escape sequence; no other message does. Of its escape sequences, only those for
/// colours are kept (`ESC [ … m`, ECMA-48 section 8.3.117).
pub fn message(text: &str) -> String {
    if !text.starts_with("\x1b[") {
        return multiline(text);
    }
    let mut safe = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\x1b') {
        safe.push_str(&multiline(&rest[..at]));
        let sequence = &rest[at..];
        let parameters = sequence[1..].strip_prefix('[').unwrap_or_default();
        let length = parameters.bytes().take_while(|byte| byte.is_ascii_digit() || *byte == b';').count();
        let is_color = parameters[length..].starts_with('m');
        let end = if is_color { "\x1b[".len() + length + "m".len() } else { 1 };
        if is_color {
            safe.push_str(&sequence[..end])
        } else {
            safe.push_str(&multiline(&sequence[..end]))
        }
        rest = &sequence[end..];
    }
    safe + &multiline(rest)
}

/// Escapes the unsafe characters in the strings of a JSON text as `\u009b`. serde_json escapes only those of C0.
pub fn json(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if is_unsafe(c) && c != '\n' {
            // JSON escapes are UTF-16 code units (RFC 8259 section 7). Writing to a `String` cannot fail.
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(safe, "\\u{unit:04x}");
            }
        } else {
            safe.push(c);
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(multiline("a\x1b[2Jb\x7f\u{9b}c\r\n\td"), "a\\u{1b}[2Jb\\u{7f}\\u{9b}c\\r\n\td");
        assert_eq!(single_line("a\n\tb\u{202e}"), "a\\n\\tb\\u{202e}");
        assert_eq!(multiline("näme — 名 🙂"), "näme — 名 🙂");
    }

    #[test]
    fn only_a_coloured_report_keeps_colours() {
        let report = "\x1b[1;31merror\x1b[0m: \x1b]0;title\x07 \x1b[2J\x1b[m\x1b";
        let safe = "\x1b[1;31merror\x1b[0m: \\u{1b}]0;title\\u{7} \\u{1b}[2J\x1b[m\\u{1b}";
        assert_eq!(message(report), safe);
        assert_eq!(message("cannot end x\x1b[8m"), "cannot end x\\u{1b}[8m");
    }

    #[test]
    fn escaped_json_has_the_same_value() {
        let value = serde_json::json!({ "command": "a\x1b\u{9b}\u{202e}\u{e0001}\n\"\\", "ü": 1 });
        let text = json(&value.to_string());
        assert!(!text.chars().any(is_unsafe), "{text:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).expect("JSON"), value);
    }
}
