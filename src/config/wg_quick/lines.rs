//! The lines of a `wg-quick` file: what is comment, what is white space, what the key is, and what may be shown.
//!
//! wg(8) drops all white space of a line and reads what is left; wg-quick(8) trims. Both views keep the columns of the
//! file, so that each problem can be underlined where it is.

use std::ops::Range;
use std::str::Utf8Error;

use zeroize::Zeroizing;

use super::setting::{SETTINGS, Setting};
use crate::config::diagnostic::Location;
use crate::config::fragment::LineView;
use crate::config::redact::{is_plain_name, mask, mask_keys};
use crate::config::stray_character::{self, StrayCharacter};

/// White space to wg(8) (`char_is_space` of its ctype.h) and to bash's `[[:space:]]` in the C locale.
pub(super) fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t'..='\r')
}

/// A line without its comment.
#[derive(Clone, Copy)]
pub(super) struct Line<'a> {
    /// Its number, from 1.
    pub(super) number: usize,
    /// All of it, if that is text.
    raw: Option<&'a str>,
    /// It up to `#`.
    pub(super) code: &'a str,
}

impl<'a> Line<'a> {
    /// A line of the file, without its newline. A comment may be in any encoding: wg(8) never looks at it.
    ///
    /// # Errors
    ///
    /// If what is before the comment is not UTF-8.
    pub(super) fn new(number: usize, bytes: &'a [u8]) -> Result<Self, Utf8Error> {
        let code = bytes.iter().position(|byte| *byte == b'#').map_or(bytes, |at| &bytes[..at]);
        Ok(Self { number, raw: str::from_utf8(bytes).ok(), code: str::from_utf8(code)? })
    }

    /// The line as wg(8) reads it: without any white space.
    pub(super) fn squeezed(self) -> LineView {
        LineView::new(self.code, |_, c| !is_space(c))
    }

    /// The key as wg-quick(8) reads it: trimmed, up to `=` or to the end.
    pub(super) fn quick_key(self) -> &'a str {
        self.code.split('=').next().unwrap_or_default().trim_matches(is_space)
    }

    /// The value as wg-quick(8) reads it: trimmed, after the first `=`. `None` without one.
    pub(super) fn quick_value(self) -> Option<LineView> {
        let value = &self.code[self.code.find('=')? + 1..];
        let start = self.code.len() - value.trim_start_matches(is_space).len();
        let end = start.max(self.code.trim_end_matches(is_space).len());
        Some(LineView::new(self.code, |byte, _| (start..end).contains(&byte)))
    }

    /// The value as a shell command: with `#` and what follows, which wg-quick since 1.0.20260223 hands on to bash. Bash knows
    /// where `#` begins a comment and where it does not.
    pub(super) fn command(self) -> Option<&'a str> {
        let (_, command) = self.raw?.split_once('=')?;
        Some(command.trim_matches(is_space))
    }

    /// The columns of all that is not comment and not white space around it.
    pub(super) fn columns(self) -> Range<usize> {
        let lead = self.code.chars().take_while(|c| is_space(*c)).count();
        lead..lead + self.code.trim_matches(is_space).chars().count()
    }

    /// A part of the line, with as much of the line as may be shown.
    pub(super) fn place(self, columns: Range<usize>) -> Location {
        Location::new(self.number, columns, &self.shown())
    }

    /// Finds the characters that do not belong into the line: odd ones anywhere but in a command, others than ASCII's
    /// in a key or in a heading.
    pub(super) fn odd(self) -> Vec<(StrayCharacter, Range<usize>)> {
        if stray_character::is_plain(self.code) {
            return Vec::new();
        }
        let equals = self.code.chars().position(|c| c == '=');
        let heading = self.code.trim_start_matches(|c: char| !c.is_ascii_graphic()).starts_with('[');
        let is_hook = matches!(Setting::named(&self.key_in_ascii()), Some(Setting::Hook(_)));
        let in_value = |column| equals.is_some_and(|equals| column > equals);
        stray_character::runs(
            self.code,
            |column| is_hook && in_value(column),
            |column| heading || equals.is_some() && !in_value(column),
        )
    }

    /// Returns what is before the `=`, or all of a line without one, without any characters but ASCII's and without
    /// white space.
    pub(super) fn key_in_ascii(self) -> Zeroizing<String> {
        squeeze(self.code.split('=').next().unwrap_or_default())
    }

    /// The line as it may be shown: values only of keys that hold no key and no command, and never a comment.
    fn shown(self) -> String {
        let code = self.code.trim_end_matches(is_space);
        let Some(equals) = code.find('=') else { return shown_without_equals(code) };
        let (name, value) = (&code[..equals], &code[equals + 1..]);
        match Setting::named(&squeeze(name)) {
            Some(key) if key.may_be_shown() => mask_keys(code),
            Some(_) => format!("{name}={}", mask(value)),
            // Base64 ends with `=`: a piece of a key that stands alone on a line has nothing after it.
            None if is_plain_name(&squeeze(name)) && !value.chars().all(|c| c == '=' || is_space(c)) => {
                format!("{name}={}", mask(value))
            }
            None => shown_without_equals(code),
        }
    }
}

/// What may be shown of a line that is not `KEY = VALUE`: a section's heading, or the key that it begins with.
fn shown_without_equals(code: &str) -> String {
    let squeezed = squeeze(code);
    if let Some(name) = squeezed.strip_prefix('[')
        && is_plain_name(name.strip_suffix(']').unwrap_or(name))
    {
        return code.to_owned();
    }
    let lead = code.len() - code.trim_start_matches(is_space).len();
    let word = code[lead..].find(|c: char| !c.is_ascii_alphanumeric()).map_or(code.len(), |length| lead + length);
    if SETTINGS.iter().any(|key| key.name().eq_ignore_ascii_case(&code[lead..word])) {
        format!("{}{}", &code[..word], mask(&code[word..]))
    } else {
        mask(code)
    }
}

/// Returns the ASCII text without white space and control characters.
fn squeeze(text: &str) -> Zeroizing<String> {
    let mut squeezed = Zeroizing::new(String::with_capacity(text.len()));
    squeezed.extend(text.chars().filter(|c| c.is_ascii() && !c.is_ascii_control() && !is_space(*c)));
    squeezed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(raw: &str) -> Line<'_> {
        Line::new(1, raw.as_bytes()).expect("UTF-8")
    }

    #[test]
    fn pieces_know_their_columns() {
        let parsed = line(" Allowed IPs = 10.0.0.0/8 , ü # x");
        let view = parsed.squeezed();
        let (key, value) = view.piece().cut('=').expect("an equals sign");
        assert_eq!((key.text, key.columns()), ("AllowedIPs", 1..12));
        let parts: Vec<_> = value.split(|c| c == ',').map(|part| (part.text, part.columns())).collect();
        assert_eq!(parts, [("10.0.0.0/8", 15..25), ("ü", 28..29)]);
        assert_eq!(parsed.quick_value().expect("a value").piece().columns(), 15..29);
        assert_eq!(line("MTU =  ").quick_value().expect("a value").piece().text, "");
    }

    #[test]
    fn secrets_are_dots_whatever_became_of_their_line() {
        let key = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
        for raw in [
            format!("PrivateKey = {key}"),
            format!("private key={key}"),
            format!("Pr\u{456}vateKey = {key}"),
            format!("PrivatKy = {key}"),
            format!("PublicKey = {key}"),
            format!("PrivateKey {key}"),
            format!("PrivateKey: {key}"),
            format!("PrivateKey{key}"),
            format!("[Interface] PrivateKey = {key}"),
            format!("[{key}]"),
            format!("Endpoint = 192.0.2.1:5 {key}"),
            format!("Address = 10.0.0.1 # {key}"),
            format!("PostUp = wg set %i private-key <(echo {key})"),
            key.to_owned(),
            key[..20].to_owned(),
            format!("{}=", &key[..20]),
        ] {
            let parsed = line(&raw);
            let shown = parsed.shown();
            for part in [&key[..8], &key[8..16], &key[36..]] {
                assert!(!shown.contains(part), "{raw} -> {shown}");
            }
            assert_eq!(shown.chars().count(), parsed.code.trim_end().chars().count(), "{raw} -> {shown}");
        }
        assert_eq!(line("MTU = 14x0 # fast").shown(), "MTU = 14x0");
        assert_eq!(line(" Foo = secret thing").shown(), " Foo = ...... .....");
    }
}
