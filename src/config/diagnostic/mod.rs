//! Diagnostics for configuration files: errors and warnings, each with its location, a label and help.
//!
//! A [`Diagnostic`] holds only text that is safe to show. The parsers mask secrets (see `redact`) before they pass on a
//! line, so rendering cannot leak any. Nothing here reads files or writes to a terminal.

mod location;
mod render;

use std::fmt;

pub use location::Location;

/// The maximum number of problems of one severity that are kept for one file.
const MAX_KEPT: usize = 100;

/// The maximum number of repetitions of a problem that are listed.
const MAX_LISTED: usize = 20;

/// The severity of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Severity {
    /// The configuration cannot be used.
    Error,
    /// The configuration can be used, but may not do what its author expects.
    Warning,
}

/// A problem in a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// The severity.
    pub severity: Severity,
    /// What is wrong, in one line.
    pub message: String,
    /// The location; `None` if the problem concerns the whole file.
    pub location: Option<Location>,
    /// What was expected at the location; may be empty.
    pub label: String,
    /// How to fix it.
    pub help: Option<String>,
    /// Other locations of the same problem.
    pub repetitions: Vec<Repetition>,
    /// The group of problems that this one belongs to, and its subject, if the messages of the group differ.
    group: Option<(&'static str, String)>,
}

/// Another location of a problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repetition {
    /// The line, from 1.
    pub line: usize,
    /// The column of the first character, from 1.
    pub column: usize,
    /// The subject there, such as a key's name, if it differs from the first one.
    pub subject: Option<String>,
}

impl Diagnostic {
    /// Creates an error about the whole file.
    pub fn error(message: impl Into<String>) -> Self {
        Self::new(Severity::Error, message)
    }

    /// Creates a warning about the whole file.
    pub fn warning(message: impl Into<String>) -> Self {
        Self::new(Severity::Warning, message)
    }

    fn new(severity: Severity, message: impl Into<String>) -> Self {
        Self {
            severity,
            message: message.into(),
            location: None,
            label: String::new(),
            help: None,
            repetitions: Vec::new(),
            group: None,
        }
    }

    /// Sets the location, and a label that says what was expected there.
    pub fn at(mut self, location: Location, label: impl Into<String>) -> Self {
        self.location = Some(location);
        self.label = label.into();
        self
    }

    /// Sets the help.
    pub fn help(mut self, help: impl Into<Option<String>>) -> Self {
        self.help = help.into();
        self
    }

    /// Adds the problem to a group whose messages differ only in their `subject`.
    pub(super) fn grouped(mut self, group: &'static str, subject: impl Into<String>) -> Self {
        self.group = Some((group, subject.into()));
        self
    }

    /// Returns whether `other` is the same problem at another location.
    fn is_repeated_by(&self, other: &Self) -> bool {
        let same = match (&self.group, &other.group) {
            (Some((one, _)), Some((two, _))) => one == two,
            (None, None) => self.message == other.message,
            _ => false,
        };
        // A warning with another label is merged, too: brevity matters more. An error must be fixed at its location.
        let same_label = self.severity == Severity::Warning || self.label == other.label;
        same && same_label && self.severity == other.severity && self.help == other.help && self.location.is_some()
    }

    /// Returns a note that lists the repetitions, if there are any.
    fn repetition_note(&self) -> Option<String> {
        let first_line = self.location.as_ref().map_or(0, |location| location.line);
        let count = self.repetitions.len();
        if count == 0 {
            return None;
        }
        let describe = |repetition: &Repetition| {
            let line = match repetition.line == first_line {
                true => format!("line {}:{}", repetition.line, repetition.column),
                false => format!("line {}", repetition.line),
            };
            repetition.subject.as_ref().map_or(line.clone(), |subject| format!("{subject} in {line}"))
        };
        let listed: Vec<String> = self.repetitions.iter().take(MAX_LISTED).map(describe).collect();
        let rest = if count > MAX_LISTED { ", …" } else { "" };
        Some(format!("{count} more like this: {}{rest}", listed.join(", ")))
    }
}

/// The problems of one file, ordered by line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostics {
    source: String,
    entries: Vec<Diagnostic>,
    omitted: usize,
}

impl Diagnostics {
    /// Creates an empty list for the file with this name.
    pub fn new(source: &str) -> Self {
        Self { source: source.to_owned(), entries: Vec::new(), omitted: 0 }
    }

    /// Adds a problem. A repetition of an earlier one only adds its location to that one. More than 100 problems of one
    /// severity are counted, but not kept.
    pub fn push(&mut self, diagnostic: Diagnostic) {
        if self.count(diagnostic.severity) >= MAX_KEPT {
            self.omitted += 1;
            return;
        }
        let earlier = self.entries.iter_mut().find(|entry| entry.is_repeated_by(&diagnostic));
        match (earlier, &diagnostic.location) {
            (Some(entry), Some(location)) => {
                let first = entry.group.as_ref().map(|(_, subject)| subject);
                let subject = diagnostic.group.map(|(_, subject)| subject).filter(|subject| Some(subject) != first);
                entry.repetitions.push(Repetition { line: location.line, column: location.column, subject });
            }
            _ => self.entries.push(diagnostic),
        }
    }

    /// Returns whether another problem of this severity would be kept. If not, counts it, so that the caller need not
    /// create it.
    pub(super) fn has_room(&mut self, severity: Severity) -> bool {
        let has_room = self.count(severity) < MAX_KEPT;
        self.omitted += usize::from(!has_room);
        has_room
    }

    /// Returns the number of problems of this severity, repetitions included.
    fn count(&self, severity: Severity) -> usize {
        self.with_severity(severity).map(|entry| 1 + entry.repetitions.len()).sum()
    }

    /// Sorts the problems by line; those about the whole file come last.
    pub(super) fn sort(&mut self) {
        let position = |entry: &Diagnostic| entry.location.as_ref().map_or((usize::MAX, 0), |at| (at.line, at.column));
        self.entries.sort_by_key(position);
        for entry in &mut self.entries {
            entry.repetitions.sort_by_key(|repetition| (repetition.line, repetition.column));
        }
    }

    /// Returns the problems in order.
    pub fn iter(&self) -> impl Iterator<Item = &Diagnostic> {
        self.entries.iter()
    }

    /// Returns whether there are no problems.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns whether there is an error among the problems.
    pub fn has_errors(&self) -> bool {
        self.with_severity(Severity::Error).next().is_some()
    }

    fn with_severity(&self, severity: Severity) -> impl Iterator<Item = &Diagnostic> {
        self.entries.iter().filter(move |entry| entry.severity == severity)
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.render(false).trim_end())
    }
}

impl std::error::Error for Diagnostics {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_over_the_limit_are_counted_but_errors_are_kept() {
        let mut all = Diagnostics::new("f");
        for _ in 0..MAX_KEPT + 5 {
            all.push(Diagnostic::warning("w"));
        }
        all.push(Diagnostic::error("e"));
        assert!(all.has_errors());
        assert!(all.render(false).ends_with("note: f: 5 more problems\n"));
    }

    #[test]
    fn repeated_problems_are_merged() {
        let mut all = Diagnostics::new("f");
        let location = |line, columns| Location::new(line, columns, "Foo = bar, bar");
        for line in [3, 5, 9] {
            all.push(Diagnostic::error("unknown").at(location(line, 0..3), "here"));
        }
        all.push(Diagnostic::error("unknown").at(location(3, 6..9), "here"));
        all.push(Diagnostic::error("unknown").at(location(7, 0..3), "elsewhere"));
        for (line, name) in [(1, "`a`"), (2, "`b`")] {
            let grouped = Diagnostic::error(format!("no {name}")).at(location(line, 0..3), "").help("x".to_owned());
            all.push(grouped.grouped("no", name));
        }
        all.sort();
        let text = all.render(false);
        assert_eq!(text.matches("error:").count(), 3, "{text}");
        assert!(text.contains("note: 3 more like this: line 3:7, line 5, line 9"), "{text}");
        assert!(text.contains("note: 1 more like this: `b` in line 2\n  = help: x"), "{text}");
        let lines: Vec<String> = all.lines().map(|(_, line)| line).collect();
        assert_eq!(lines[0], "f:1:1: no `a`; 1 more like this: `b` in line 2; x");
        assert_eq!(lines[2], "f:7:1: unknown (elsewhere)");
    }
}
