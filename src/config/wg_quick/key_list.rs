//! Keys of a file that are reported in one diagnostic.

use std::ops::Range;

use super::line::Line;
use crate::config::diagnostic::Diagnostic;

/// The maximum number of lines that are listed for a key.
const MAX_LINES: usize = 10;

/// A list of keys in the order of the file, reported together.
#[derive(Default)]
pub(super) struct KeyList<'a> {
    /// The first line with such a key, and the columns to mark.
    first: Option<(Line<'a>, Range<usize>)>,
    /// The names, each once, with the numbers of their lines.
    names: Vec<(&'static str, Vec<usize>)>,
}

impl<'a> KeyList<'a> {
    /// Adds a key, by the name that its program gives it.
    pub(super) fn add(&mut self, line: Line<'a>, columns: Range<usize>, name: &'static str) {
        self.first.get_or_insert((line, columns));
        match self.names.iter_mut().find(|(known, _)| *known == name) {
            Some((_, lines)) => lines.push(line.number),
            None => self.names.push((name, vec![line.number])),
        }
    }

    /// Returns the singular or the plural, depending on the number of keys.
    pub(super) fn choose(&self, singular: &'static str, plural: &'static str) -> &'static str {
        if self.names.len() == 1 { singular } else { plural }
    }

    /// Lists the names for a sentence.
    pub(super) fn names(&self) -> String {
        join(self.names.iter().map(|(name, _)| format!("`{name}`")).collect())
    }

    /// Lists the names with their lines for a sentence.
    pub(super) fn names_with_lines(&self) -> String {
        let lines = |lines: &[usize]| {
            let rest = if lines.len() > MAX_LINES { ", …" } else { "" };
            let s = if lines.len() > 1 { "s" } else { "" };
            let numbers: Vec<String> = lines.iter().take(MAX_LINES).map(ToString::to_string).collect();
            format!("line{s} {}{rest}", numbers.join(", "))
        };
        join(self.names.iter().map(|(name, at)| format!("`{name}` ({})", lines(at))).collect())
    }

    /// Creates a diagnostic at the first key with `create`. Returns `None` if the list is empty.
    pub(super) fn diagnostic(&self, label: &str, create: impl FnOnce(&Self) -> Diagnostic) -> Option<Diagnostic> {
        let (line, columns) = self.first.as_ref()?;
        Some(create(self).at(line.location(columns.clone()), label))
    }
}

/// Joins texts with commas and "and".
fn join(mut texts: Vec<String>) -> String {
    match texts.pop() {
        Some(last) if !texts.is_empty() => format!("{} and {last}", texts.join(", ")),
        last => last.unwrap_or_default(),
    }
}
