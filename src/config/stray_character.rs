//! Stray characters: invisible ones, and those that look like ASCII characters.
//!
//! They come from web pages, word processors and input methods. In a `wg-quick` file or a profile they are valid only
//! in comments, commands and strings.

use std::ops::Range;

/// A stray character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StrayCharacter {
    /// The character.
    character: char,
    /// The name of its kind.
    name: &'static str,
    /// What its author most likely meant.
    intention: Intention,
}

/// What the author of a [`StrayCharacter`] most likely meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Intention {
    /// Nothing: the character is invisible, or comes from another program's formatting.
    Nothing,
    /// An ordinary space, or nothing.
    Space,
    /// The end of the line.
    NewLine,
    /// This ASCII character.
    Character(char),
    /// An ASCII digit.
    Digit,
    /// A quotation mark. Values have them in a profile, but not in a `wg-quick` file.
    Quote(char),
}

impl StrayCharacter {
    /// Returns the character if it is a stray one.
    pub(super) fn of(character: char) -> Option<Self> {
        let (name, intention) = match character {
            ' '..='~' | '\t'..='\r' => return None,
            '\u{a0}' => ("no-break space", Intention::Space),
            '\u{202f}' => ("narrow no-break space", Intention::Space),
            '\u{3000}' => ("ideographic space", Intention::Space),
            '\u{1680}' | '\u{2000}'..='\u{200a}' | '\u{205f}' => ("typographic space", Intention::Space),
            '\u{ad}' => ("soft hyphen", Intention::Nothing),
            '\u{200b}' => ("zero-width space", Intention::Nothing),
            '\u{200c}' | '\u{200d}' => ("zero-width joiner", Intention::Nothing),
            '\u{2060}' => ("word joiner", Intention::Nothing),
            '\u{feff}' => ("byte-order mark", Intention::Nothing),
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                ("directional mark", Intention::Nothing)
            }
            '\u{85}' | '\u{2028}' | '\u{2029}' => ("line separator", Intention::NewLine),
            '\u{115f}' | '\u{1160}' | '\u{180b}'..='\u{180f}' | '\u{2061}'..='\u{2065}' | '\u{206a}'..='\u{206f}' => {
                ("invisible character", Intention::Nothing)
            }
            '\u{2800}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{ffa0}' | '\u{fff9}'..='\u{fffb}' => {
                ("invisible character", Intention::Nothing)
            }
            '\u{e0000}'..='\u{e0fff}' => ("invisible character", Intention::Nothing),
            '\u{fffd}' => ("replacement character", Intention::Nothing),
            '\u{ff01}'..='\u{ff5e}' => {
                // Full-width forms have the order of ASCII's printable characters.
                let ascii = char::from_u32(u32::from(character) - 0xfee0).unwrap_or_default();
                ("full-width form", Intention::Character(ascii))
            }
            '\u{2018}'..='\u{201b}' | '\u{2039}' | '\u{203a}' => ("typographic quotation mark", Intention::Quote('\'')),
            '\u{201c}'..='\u{201f}' | '\u{ab}' | '\u{bb}' => ("typographic quotation mark", Intention::Quote('"')),
            '\u{207c}' | '\u{208c}' | '\u{2550}' | '\u{a78a}' | '\u{fe66}' => {
                ("look-alike of an equals sign", Intention::Character('='))
            }
            '\u{2010}'..='\u{2015}' | '\u{2212}' | '\u{fe58}' | '\u{fe63}' => {
                ("typographic dash", Intention::Character('-'))
            }
            '\u{60c}' | '\u{3001}' | '\u{fe50}' | '\u{ff64}' => ("look-alike of a comma", Intention::Character(',')),
            '\u{b7}' | '\u{2024}' | '\u{3002}' | '\u{fe52}' | '\u{ff61}' => {
                ("look-alike of a dot", Intention::Character('.'))
            }
            '\u{2044}' | '\u{2215}' | '\u{29f8}' => ("look-alike of a slash", Intention::Character('/')),
            '\u{2d0}' | '\u{2236}' | '\u{a789}' | '\u{fe55}' => ("look-alike of a colon", Intention::Character(':')),
            '\u{3010}' | '\u{27e6}' => ("look-alike of a bracket", Intention::Character('[')),
            '\u{3011}' | '\u{27e7}' => ("look-alike of a bracket", Intention::Character(']')),
            c if c.is_control() => ("control character", Intention::Nothing),
            c if c.is_numeric() => ("digit of another script", Intention::Digit),
            _ => return None,
        };
        Some(Self { character, name, intention })
    }

    /// Returns a letter outside ASCII, where only a key of the file can be.
    fn letter(character: char) -> Self {
        Self { character, name: "not an ASCII character", intention: Intention::Nothing }
    }

    /// Returns the message of a diagnostic.
    pub(super) fn message(self) -> String {
        format!("the character {} ({}) is not allowed here", self.code(), self.name)
    }

    /// Returns the character's code point, such as `U+00A0`.
    pub(super) fn code(self) -> String {
        format!("U+{:04X}", u32::from(self.character))
    }

    /// Returns the name of its kind.
    pub(super) fn name(self) -> &'static str {
        self.name
    }

    /// Returns the label of a diagnostic: what the character looks like.
    pub(super) fn label(self) -> String {
        match self.intention {
            Intention::Nothing if StrayCharacter::of(self.character).is_none() => {
                "keys consist of ASCII letters and digits".to_owned()
            }
            Intention::Nothing if self.character == '\u{fffd}' => {
                "a character was lost here when the file was saved".to_owned()
            }
            Intention::Nothing => "this character is invisible".to_owned(),
            Intention::Space => "this only looks like an ordinary space".to_owned(),
            Intention::NewLine => "this does not end a line".to_owned(),
            Intention::Character(ascii) => format!("this only looks like `{ascii}`"),
            Intention::Digit => "this is not one of the digits 0 to 9".to_owned(),
            Intention::Quote(_) => "this is not part of the value".to_owned(),
        }
    }

    /// Returns the help of a diagnostic. `quotes` says whether values have quotation marks, as in a profile.
    pub(super) fn help(self, quotes: bool) -> String {
        match self.intention {
            Intention::Nothing if StrayCharacter::of(self.character).is_none() => {
                "type the word again, or delete the line".to_owned()
            }
            Intention::Nothing => "delete it".to_owned(),
            Intention::Space => "replace it with an ordinary space, or delete it".to_owned(),
            Intention::NewLine => "replace it with a line break".to_owned(),
            Intention::Character(ascii) => format!("replace it with `{ascii}`"),
            Intention::Digit => "replace it with an ASCII digit".to_owned(),
            Intention::Quote(quote) if quotes => format!("replace it with `{quote}`"),
            Intention::Quote(_) => "delete it: values have no quotation marks here".to_owned(),
        }
    }
}

/// Returns whether a text consists of printable ASCII characters and white space.
pub(super) fn is_plain(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b' '..=b'~' | b'\t'..=b'\r'))
}

/// Finds the runs of stray characters in a text, with their columns from 0.
///
/// `exempt` returns whether all characters are allowed at a column; `ascii` returns whether only ASCII is.
pub(super) fn runs(
    text: &str,
    exempt: impl Fn(usize) -> bool,
    ascii: impl Fn(usize) -> bool,
) -> Vec<(StrayCharacter, Range<usize>)> {
    let mut runs: Vec<(StrayCharacter, Range<usize>)> = Vec::new();
    if is_plain(text) {
        return runs;
    }
    for (column, character) in text.chars().enumerate().filter(|(column, _)| !exempt(*column)) {
        let letter = || (!character.is_ascii() && ascii(column)).then(|| StrayCharacter::letter(character));
        let Some(stray) = StrayCharacter::of(character).or_else(letter) else { continue };
        match runs.last_mut() {
            Some((_, columns)) if columns.end == column => columns.end = column + 1,
            _ => runs.push((stray, column..column + 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_any_language_is_allowed() {
        for plain in ["DNS = 10.0.0.1\t\r", "Zürich, Москва, 東京", ""] {
            assert_eq!(runs(plain, |_| false, |_| false), []);
        }
    }

    #[test]
    fn each_stray_character_has_help() {
        for (character, code, help) in [
            ('\u{a0}', "U+00A0", "ordinary space"),
            ('\u{200b}', "U+200B", "delete"),
            ('\u{feff}', "U+FEFF", "delete"),
            ('\u{202e}', "U+202E", "delete"),
            ('\u{ad}', "U+00AD", "delete"),
            ('\u{1b}', "U+001B", "delete"),
            ('\u{201c}', "U+201C", "delete"),
            ('\u{ff1d}', "U+FF1D", "`=`"),
            ('\u{ff15}', "U+FF15", "`5`"),
            ('\u{665}', "U+0665", "ASCII digit"),
            ('\u{2013}', "U+2013", "`-`"),
            ('\u{e0041}', "U+E0041", "delete"),
        ] {
            let stray = StrayCharacter::of(character).expect("a stray character");
            assert!(stray.message().contains(code), "{}", stray.message());
            assert!(stray.help(false).contains(help), "{code}: {}", stray.help(false));
        }
    }

    #[test]
    fn consecutive_characters_are_one_run() {
        let found = runs("ＤＮＳ = １\u{a0}x ü", |_| false, |column| column > 9);
        let found: Vec<_> = found.into_iter().map(|(stray, columns)| (stray.character, columns)).collect();
        assert_eq!(found, [('Ｄ', 0..3), ('１', 6..8), ('ü', 10..11)]);
    }
}
