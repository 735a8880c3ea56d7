//! Characters that a reader does not see, or takes for another one: pasted from a web page, typed by a word processor
//! or an input method. Neither a `wg-quick` file nor a profile has a use for them outside of comments, commands and
//! strings.

use std::ops::Range;

/// A character that does not belong here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StrayCharacter {
    /// The character.
    character: char,
    /// What it is.
    name: &'static str,
    /// What the writer meant.
    meant: Meant,
}

/// What the writer of an [`StrayCharacter`] character most likely meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meant {
    /// Nothing: it is invisible, or belongs to the formatting of another program.
    Nothing,
    /// An ordinary space, or nothing.
    Space,
    /// The end of the line.
    NewLine,
    /// This ASCII character.
    Character(char),
    /// An ASCII digit.
    Digit,
    /// A quotation mark, which a profile has and a `wg-quick` file has not.
    Quote(char),
}

impl StrayCharacter {
    /// Returns the character, if it is an odd one.
    pub(super) fn of(character: char) -> Option<Self> {
        let (name, meant) = match character {
            ' '..='~' | '\t'..='\r' => return None,
            '\u{a0}' => ("no-break space", Meant::Space),
            '\u{202f}' => ("narrow no-break space", Meant::Space),
            '\u{3000}' => ("ideographic space", Meant::Space),
            '\u{1680}' | '\u{2000}'..='\u{200a}' | '\u{205f}' => ("typographic space", Meant::Space),
            '\u{ad}' => ("soft hyphen", Meant::Nothing),
            '\u{200b}' => ("zero-width space", Meant::Nothing),
            '\u{200c}' | '\u{200d}' => ("zero-width joiner", Meant::Nothing),
            '\u{2060}' => ("word joiner", Meant::Nothing),
            '\u{feff}' => ("byte-order mark", Meant::Nothing),
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                ("directional mark", Meant::Nothing)
            }
            '\u{85}' | '\u{2028}' | '\u{2029}' => ("line separator", Meant::NewLine),
            '\u{115f}' | '\u{1160}' | '\u{180b}'..='\u{180f}' | '\u{2061}'..='\u{2065}' | '\u{206a}'..='\u{206f}' => {
                ("invisible character", Meant::Nothing)
            }
            '\u{2800}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{ffa0}' | '\u{fff9}'..='\u{fffb}' => {
                ("invisible character", Meant::Nothing)
            }
            '\u{e0000}'..='\u{e0fff}' => ("invisible character", Meant::Nothing),
            '\u{fffd}' => ("replacement character", Meant::Nothing),
            '\u{ff01}'..='\u{ff5e}' => {
                // The full-width forms are ASCII's printable characters in the same order.
                let ascii = char::from_u32(u32::from(character) - 0xfee0).unwrap_or_default();
                ("full-width form", Meant::Character(ascii))
            }
            '\u{2018}'..='\u{201b}' | '\u{2039}' | '\u{203a}' => ("typographic quotation mark", Meant::Quote('\'')),
            '\u{201c}'..='\u{201f}' | '\u{ab}' | '\u{bb}' => ("typographic quotation mark", Meant::Quote('"')),
            '\u{207c}' | '\u{208c}' | '\u{2550}' | '\u{a78a}' | '\u{fe66}' => {
                ("look-alike of an equals sign", Meant::Character('='))
            }
            '\u{2010}'..='\u{2015}' | '\u{2212}' | '\u{fe58}' | '\u{fe63}' => {
                ("typographic dash", Meant::Character('-'))
            }
            '\u{60c}' | '\u{3001}' | '\u{fe50}' | '\u{ff64}' => ("look-alike of a comma", Meant::Character(',')),
            '\u{b7}' | '\u{2024}' | '\u{3002}' | '\u{fe52}' | '\u{ff61}' => {
                ("look-alike of a dot", Meant::Character('.'))
            }
            '\u{2044}' | '\u{2215}' | '\u{29f8}' => ("look-alike of a slash", Meant::Character('/')),
            '\u{2d0}' | '\u{2236}' | '\u{a789}' | '\u{fe55}' => ("look-alike of a colon", Meant::Character(':')),
            '\u{3010}' | '\u{27e6}' => ("look-alike of a bracket", Meant::Character('[')),
            '\u{3011}' | '\u{27e7}' => ("look-alike of a bracket", Meant::Character(']')),
            c if c.is_control() => ("control character", Meant::Nothing),
            c if c.is_numeric() => ("digit of another script", Meant::Digit),
            _ => return None,
        };
        Some(Self { character, name, meant })
    }

    /// Returns a letter that no key has.
    fn letter(character: char) -> Self {
        Self { character, name: "not an ASCII character", meant: Meant::Nothing }
    }

    /// Returns what is wrong, for a message.
    pub(super) fn message(self) -> String {
        format!("the character {} ({}) is not allowed here", self.code(), self.name)
    }

    /// Returns the character's code point.
    pub(super) fn code(self) -> String {
        format!("U+{:04X}", u32::from(self.character))
    }

    /// Returns the name of its kind.
    pub(super) fn name(self) -> &'static str {
        self.name
    }

    /// Returns what the character looks like.
    pub(super) fn label(self) -> String {
        match self.meant {
            Meant::Nothing if StrayCharacter::of(self.character).is_none() => {
                "keys consist of ASCII letters and digits".to_owned()
            }
            Meant::Nothing if self.character == '\u{fffd}' => {
                "something was lost here when the file was saved".to_owned()
            }
            Meant::Nothing => "this character is invisible".to_owned(),
            Meant::Space => "this only looks like an ordinary space".to_owned(),
            Meant::NewLine => "this does not end a line".to_owned(),
            Meant::Character(ascii) => format!("this only looks like `{ascii}`"),
            Meant::Digit => "this is not one of the digits 0 to 9".to_owned(),
            Meant::Quote(_) => "this is not part of the value".to_owned(),
        }
    }

    /// Returns what to do about it. `quotes`: whether values have quotation marks, as in a profile.
    pub(super) fn help(self, quotes: bool) -> String {
        match self.meant {
            Meant::Nothing if StrayCharacter::of(self.character).is_none() => {
                "type the word again, or delete the line".to_owned()
            }
            Meant::Nothing => "delete it".to_owned(),
            Meant::Space => "replace it with an ordinary space, or delete it".to_owned(),
            Meant::NewLine => "replace it with a line break".to_owned(),
            Meant::Character(ascii) => format!("replace it with `{ascii}`"),
            Meant::Digit => "replace it with an ASCII digit".to_owned(),
            Meant::Quote(quote) if quotes => format!("replace it with `{quote}`"),
            Meant::Quote(_) => "delete it: values have no quotation marks here".to_owned(),
        }
    }
}

/// Returns whether a text consists of ASCII's printable characters and white space.
pub(super) fn is_plain(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b' '..=b'~' | b'\t'..=b'\r'))
}

/// Finds the odd characters of a text, each run of them once, with its columns from 0. `exempt` says of each column
/// whether any character may be there, `ascii` whether only ASCII's may.
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
        let strange = || (!character.is_ascii() && ascii(column)).then(|| StrayCharacter::letter(character));
        let Some(odd) = StrayCharacter::of(character).or_else(strange) else { continue };
        match runs.last_mut() {
            Some((_, columns)) if columns.end == column => columns.end = column + 1,
            _ => runs.push((odd, column..column + 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_of_any_language_is_not_odd() {
        for plain in ["DNS = 10.0.0.1\t\r", "Zürich, Москва, 東京", ""] {
            assert_eq!(runs(plain, |_| false, |_| false), []);
        }
    }

    #[test]
    fn each_odd_character_says_what_to_do() {
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
            let odd = StrayCharacter::of(character).expect("an odd character");
            assert!(odd.message().contains(code), "{}", odd.message());
            assert!(odd.help(false).contains(help), "{code}: {}", odd.help(false));
        }
    }

    #[test]
    fn a_run_is_one() {
        let found = runs("ＤＮＳ = １\u{a0}x ü", |_| false, |column| column > 9);
        let found: Vec<_> = found.into_iter().map(|(odd, columns)| (odd.character, columns)).collect();
        assert_eq!(found, [('Ｄ', 0..3), ('１', 6..8), ('ü', 10..11)]);
    }
}
