//! Lines of a `wg-quick` file: code and comment, white space, keys and values, and the masked line for diagnostics.
//!
//! wg(8) removes all white space of a line before it reads it; wg-quick(8) trims it. Both views keep the columns of the
//! file for diagnostics.

use std::ops::Range;
use std::str::Utf8Error;

use zeroize::Zeroizing;

use super::setting::{SETTINGS, Setting};
use crate::config::diagnostic::Location;
use crate::config::fragment::LineView;
use crate::config::redact::{is_plain_name, mask, mask_keys};
use crate::config::stray_character::{self, StrayCharacter};

/// Returns whether a character is white space to wg(8) (`char_is_space` of its ctype.h) and to bash's `[[:space:]]` in
/// the C locale.
pub(super) fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t'..='\r')
}

/// A line of the file.
#[derive(Clone, Copy)]
pub(super) struct Line<'a> {
    /// The line number, from 1.
    pub(super) number: usize,
    /// The whole line with its comment, if it is UTF-8.
    raw: Option<&'a str>,
    /// The part before `#`.
    pub(super) code: &'a str,
}

impl<'a> Line<'a> {
    /// Creates a line from its bytes without the newline. The comment may have any encoding, because wg(8) ignores it.
    ///
    /// # Errors
    ///
    /// Fails if the part before the comment is not UTF-8.
    pub(super) fn new(number: usize, bytes: &'a [u8]) -> Result<Self, Utf8Error> {
        let code = bytes.iter().position(|byte| *byte == b'#').map_or(bytes, |at| &bytes[..at]);
        Ok(Self { number, raw: str::from_utf8(bytes).ok(), code: str::from_utf8(code)? })
    }

    /// Returns the line as wg(8) reads it, without any white space.
    pub(super) fn squeezed(self) -> LineView {
        LineView::new(self.code, |_, c| !is_space(c))
    }

    /// Returns the key as wg-quick(8) reads it: the text before `=` or the end, trimmed.
    pub(super) fn quick_key(self) -> &'a str {
        self.code.split('=').next().unwrap_or_default().trim_matches(is_space)
    }

    /// Returns the value as wg-quick(8) reads it: the text after the first `=`, trimmed. Returns `None` without a `=`.
    pub(super) fn quick_value(self) -> Option<LineView> {
        let value = &self.code[self.code.find('=')? + 1..];
        let start = self.code.len() - value.trim_start_matches(is_space).len();
        let end = start.max(self.code.trim_end_matches(is_space).len());
        Some(LineView::new(self.code, |byte, _| (start..end).contains(&byte)))
    }

    /// Returns the value as a shell command, including `#` and the text after it.
    ///
    /// wg-quick passes that to bash since version 1.0.20260223. Only bash knows where `#` begins a comment.
    pub(super) fn command(self) -> Option<&'a str> {
        let (_, command) = self.raw?.split_once('=')?;
        Some(command.trim_matches(is_space))
    }

    /// Returns the columns of the code without surrounding white space.
    pub(super) fn columns(self) -> Range<usize> {
        let lead = self.code.chars().take_while(|c| is_space(*c)).count();
        lead..lead + self.code.trim_matches(is_space).chars().count()
    }

    /// Returns the location of a part of the line, with the masked line.
    pub(super) fn location(self, columns: Range<usize>) -> Location {
        Location::new(self.number, columns, &self.masked())
    }

    /// Finds the stray characters of the line: those of all scripts everywhere except in a command, and all characters
    /// outside ASCII in a key or heading.
    pub(super) fn stray_characters(self) -> Vec<(StrayCharacter, Range<usize>)> {
        if stray_character::is_plain(self.code) {
            return Vec::new();
        }
        let equals = self.code.chars().position(|c| c == '=');
        let is_heading = self.code.trim_start_matches(|c: char| !c.is_ascii_graphic()).starts_with('[');
        let is_hook = matches!(Setting::named(&self.ascii_key()), Some(Setting::Hook(_)));
        let in_value = |column| equals.is_some_and(|equals| column > equals);
        stray_character::runs(
            self.code,
            |column| is_hook && in_value(column),
            |column| is_heading || equals.is_some() && !in_value(column),
        )
    }

    /// Returns the ASCII characters before `=` or the end, without white space.
    pub(super) fn ascii_key(self) -> Zeroizing<String> {
        squeeze(self.code.split('=').next().unwrap_or_default())
    }

    /// Returns the line without comment, with secrets masked: the value is shown only for a setting that is not secret.
    fn masked(self) -> String {
        let code = self.code.trim_end_matches(is_space);
        let Some(equals) = code.find('=') else { return mask_without_equals(code) };
        let (name, value) = (&code[..equals], &code[equals + 1..]);
        match Setting::named(&squeeze(name)) {
            Some(setting) if !setting.is_secret() => mask_keys(code),
            Some(_) => format!("{name}={}", mask(value)),
            // Base64 ends with `=`: the name may be a part of a key on a line of its own, with nothing after it.
            None if is_plain_name(&squeeze(name)) && !value.chars().all(|c| c == '=' || is_space(c)) => {
                format!("{name}={}", mask(value))
            }
            None => mask_without_equals(code),
        }
    }
}

/// Masks a line that is not `KEY = VALUE`, except for a heading, or the name of a setting at its beginning.
fn mask_without_equals(code: &str) -> String {
    let squeezed = squeeze(code);
    if let Some(name) = squeezed.strip_prefix('[')
        && is_plain_name(name.strip_suffix(']').unwrap_or(name))
    {
        return code.to_owned();
    }
    let lead = code.len() - code.trim_start_matches(is_space).len();
    let word = code[lead..].find(|c: char| !c.is_ascii_alphanumeric()).map_or(code.len(), |length| lead + length);
    if SETTINGS.iter().any(|setting| setting.name().eq_ignore_ascii_case(&code[lead..word])) {
        format!("{}{}", &code[..word], mask(&code[word..]))
    } else {
        mask(code)
    }
}

/// Returns the ASCII characters of a text without white space and control characters.
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
    fn fragments_keep_their_columns() {
        let parsed = line(" Allowed IPs = 10.0.0.0/8 , ü # x");
        let view = parsed.squeezed();
        let (key, value) = view.fragment().cut('=').expect("an equals sign");
        assert_eq!((key.text, key.columns()), ("AllowedIPs", 1..12));
        let parts: Vec<_> = value.split(|c| c == ',').map(|part| (part.text, part.columns())).collect();
        assert_eq!(parts, [("10.0.0.0/8", 15..25), ("ü", 28..29)]);
        assert_eq!(parsed.quick_value().expect("a value").fragment().columns(), 15..29);
        assert_eq!(line("MTU =  ").quick_value().expect("a value").fragment().text, "");
    }

    #[test]
    fn secrets_are_masked_however_the_line_is_damaged() {
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
            let masked = parsed.masked();
            for part in [&key[..8], &key[8..16], &key[36..]] {
                assert!(!masked.contains(part), "{raw} -> {masked}");
            }
            assert_eq!(masked.chars().count(), parsed.code.trim_end().chars().count(), "{raw} -> {masked}");
        }
        assert_eq!(line("MTU = 14x0 # fast").masked(), "MTU = 14x0");
        assert_eq!(line(" Foo = secret thing").masked(), " Foo = ...... .....");
    }
}
