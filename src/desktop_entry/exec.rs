//! The values of `Exec` keys: words, quoting and field codes ([The Exec
//! key](https://specifications.freedesktop.org/desktop-entry-spec/latest/exec-variables.html)).
//!
//! There are two layers: a value is a string with escape sequences, and that string is a list of words, which may be
//! quoted.

use std::ops::Range;

/// The characters for which a word must be quoted.
const RESERVED: &str = " \t\n\"'\\><~|&;$*?#()`";

/// A word of a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Word {
    /// The word without its quotes.
    pub(crate) value: String,
    /// Its place in the command line, in bytes.
    pub(crate) place: Range<usize>,
}

/// Splits a command line, without the escape sequences of its value, into its words. `None` if a quote has no end.
pub(crate) fn words(line: &str) -> Option<Vec<Word>> {
    let mut words = Vec::new();
    let mut characters = line.char_indices().peekable();
    while let Some(&(begin, first)) = characters.peek() {
        if first.is_ascii_whitespace() {
            characters.next();
            continue;
        }
        let mut value = String::new();
        while let Some((_, character)) = characters.next_if(|(_, character)| !character.is_ascii_whitespace()) {
            match character {
                '"' => loop {
                    match characters.next()?.1 {
                        '"' => break,
                        '\\' => value.push(characters.next()?.1),
                        other => value.push(other),
                    }
                },
                other => value.push(other),
            }
        }
        let end = characters.peek().map_or(line.len(), |(end, _)| *end);
        words.push(Word { value, place: begin..end });
    }
    Some(words)
}

/// Returns a word as it stands in a command line: quoted where that is needed, and no field code.
pub(crate) fn quoted(word: &str) -> String {
    let word = word.replace('%', "%%");
    if !word.is_empty() && !word.contains(|character| RESERVED.contains(character)) {
        return word;
    }
    let mut text = String::from('"');
    for character in word.chars() {
        if matches!(character, '"' | '`' | '$' | '\\') {
            text.push('\\');
        }
        text.push(character);
    }
    text.push('"');
    text
}

/// Returns the string that a value stands for: without its escape sequences.
pub(crate) fn unescaped(value: &str) -> String {
    let mut text = String::new();
    let mut characters = value.chars();
    while let Some(character) = characters.next() {
        match (character, character == '\\') {
            (_, false) => text.push(character),
            _ => match characters.next() {
                Some('s') => text.push(' '),
                Some('n') => text.push('\n'),
                Some('t') => text.push('\t'),
                Some('r') => text.push('\r'),
                Some('\\') | None => text.push('\\'),
                // Undefined: readers keep both characters.
                Some(other) => text.extend(['\\', other]),
            },
        }
    }
    text
}

/// Returns the value that stands for a string, with escape sequences.
pub(crate) fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('\n', "\\n").replace('\t', "\\t").replace('\r', "\\r")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(line: &str) -> Vec<String> {
        words(line).expect("valid").into_iter().map(|word| word.value).collect()
    }

    #[test]
    fn words_are_split_and_unquoted() {
        assert_eq!(values("firefox  --new-window %u "), ["firefox", "--new-window", "%u"]);
        assert_eq!(values(r#""/opt/My App/app" "a\"\\b\$" %U"#), ["/opt/My App/app", r#"a"\b$"#, "%U"]);
        assert_eq!(values(r#"sh -c "x; y""#), ["sh", "-c", "x; y"]);
        assert_eq!(values(""), [""; 0]);
        for unfinished in ["\"a", "a \"b\\", "\"a\\\""] {
            assert_eq!(words(unfinished), None, "{unfinished}");
        }
        assert_eq!(words("é \"b c\"").expect("valid")[1].place, 3..8);
    }

    #[test]
    fn what_needs_quotes_gets_them() {
        assert_eq!(quoted("/usr/bin/vpn-exec"), "/usr/bin/vpn-exec");
        assert_eq!(quoted("/home/a b/100%"), "\"/home/a b/100%%\"");
        assert_eq!(quoted("a$b"), "\"a\\$b\"");
        assert_eq!(quoted(""), "\"\"");
        // Four backslashes in the file, as the specification says.
        assert_eq!(escaped(&quoted("a\\b")), "\"a\\\\\\\\b\"");
        assert_eq!(unescaped(r"a\sb\\c\n\q"), "a b\\c\n\\q");
    }

    proptest! {
        #[test]
        fn a_quoted_word_is_read_back(word in "\\PC{0,12}|[ \\\\\"`$%\n\t']{0,8}") {
            let value = escaped(&quoted(&word));
            prop_assert!(!value.contains('\n'));
            prop_assert_eq!(values(&unescaped(&value)), [word.replace('%', "%%")]);
        }

        #[test]
        fn any_line_is_split(line in "\\PC{0,40}") {
            for word in words(&unescaped(&line)).unwrap_or_default() {
                prop_assert!(word.place.start < word.place.end);
            }
        }
    }
}
