//! Text on its way to a terminal or a log. Much of it comes from elsewhere: a process chooses its own name, a file its
//! own text, a peer its own error. Whatever a terminal would obey or hide is escaped here, and only here: where text is
//! printed.

use std::fmt::Write;

/// Whether a terminal would obey a character, or show it as nothing: control characters (C0, DEL and C1), the soft
/// hyphen, marks that change the direction of writing, characters without a width, and line separators. Tabs and
/// newlines count as well.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

fn escaped(text: &str, is_kept: impl Fn(char) -> bool) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if is_unsafe(c) && !is_kept(c) { safe.extend(c.escape_default()) } else { safe.push(c) }
    }
    safe
}

/// Returns the text with every unsafe character escaped as Rust writes it (`\u{1b}`), but for newlines and tabs.
pub fn plain(text: &str) -> String {
    escaped(text, |c| matches!(c, '\n' | '\t'))
}

/// Returns the text with every unsafe character escaped, newlines and tabs included: it stays a part of its line.
pub fn in_line(text: &str) -> String {
    escaped(text, |_| false)
}

/// Returns a message with every unsafe character escaped, as [`plain`] does. A report that this program has coloured
/// keeps its colours: it begins with one, which no other message does. Of escape sequences only colours are kept (`ESC
/// [ … m`, ECMA-48 section 8.3.117).
pub fn message(text: &str) -> String {
    if !text.starts_with("\x1b[") {
        return plain(text);
    }
    let mut safe = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\x1b') {
        safe.push_str(&plain(&rest[..at]));
        let sequence = &rest[at..];
        let parameters = sequence[1..].strip_prefix('[').unwrap_or_default();
        let length = parameters.bytes().take_while(|byte| byte.is_ascii_digit() || *byte == b';').count();
        let is_color = parameters[length..].starts_with('m');
        let end = if is_color { "\x1b[".len() + length + "m".len() } else { 1 };
        if is_color {
            safe.push_str(&sequence[..end])
        } else {
            safe.push_str(&plain(&sequence[..end]))
        }
        rest = &sequence[end..];
    }
    safe + &plain(rest)
}

/// Returns JSON in which every unsafe character of a string is escaped as JSON does (`\u009b`). serde_json escapes the
/// C0 ones only.
pub fn json(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if is_unsafe(c) && c != '\n' {
            // As UTF-16 (RFC 8259 section 7). Writing into a text cannot fail.
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
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(plain("a\x1b[2Jb\x7f\u{9b}c\r\n\td"), "a\\u{1b}[2Jb\\u{7f}\\u{9b}c\\r\n\td");
        assert_eq!(in_line("a\n\tb\u{202e}"), "a\\n\\tb\\u{202e}");
        assert_eq!(plain("näme — 名 🙂"), "näme — 名 🙂");
    }

    #[test]
    fn only_a_coloured_report_keeps_escapes_and_only_colours() {
        let report = "\x1b[1;31merror\x1b[0m: \x1b]0;title\x07 \x1b[2J\x1b[m\x1b";
        let shown = "\x1b[1;31merror\x1b[0m: \\u{1b}]0;title\\u{7} \\u{1b}[2J\x1b[m\\u{1b}";
        assert_eq!(message(report), shown);
        assert_eq!(message("cannot end x\x1b[8m"), "cannot end x\\u{1b}[8m");
    }

    #[test]
    fn json_says_the_same() {
        let value = serde_json::json!({ "command": "a\x1b\u{9b}\u{202e}\u{e0001}\n\"\\", "ü": 1 });
        let text = json(&value.to_string());
        assert!(!text.chars().any(is_unsafe), "{text:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).expect("JSON"), value);
    }
}
