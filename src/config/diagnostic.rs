//! What is wrong with a configuration, said as a compiler says it: where, what, and what would be right; all of a file at
//! once.
//!
//! A [`Diagnostic`] holds only text that may be shown. Which text that is, is decided by the parsers, with
//! `shown`; they hide secrets before they hand a line over, so no later step can leak one. Nothing here reads
//! files or writes to a terminal.

use std::fmt;
use std::ops::Range;

use super::shown::printable;

/// The most problems of one severity that are kept for one file. A file with more is no configuration.
const MAX_KEPT: usize = 100;

/// The most characters of a line that are shown; of a longer one, those around the problem.
const MAX_SHOWN: usize = 120;

/// The most places that are listed where a problem is found again.
const MAX_PLACES: usize = 20;

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Severity {
    /// The configuration cannot be used.
    Error,
    /// It can, but perhaps not as its author thinks.
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
        })
    }
}

/// A place in a file: part of one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The line, from 1.
    pub line: usize,
    /// The first character of the part, from 1. Characters are Unicode's scalar values.
    pub column: usize,
    /// How many characters the part has; at least 1.
    pub width: usize,
    /// The line as it is shown, or the part of a long one around the problem.
    excerpt: String,
    /// Where the part begins in `excerpt`, in characters from 0.
    offset: usize,
}

impl Place {
    /// The part `columns` (in characters from 0) of the line with this number (from 1). `shown` is the line as it may be
    /// shown, with as many characters as the line itself, up to the end of `columns` at least.
    pub(super) fn new(line: usize, columns: Range<usize>, shown: &str) -> Self {
        let length = shown.chars().count();
        let width = columns.end.saturating_sub(columns.start).max(1);
        let first = if length <= MAX_SHOWN { 0 } else { columns.start.saturating_sub(MAX_SHOWN / 4) };
        let before = if first > 0 { "…" } else { "" };
        let after = if length > first + MAX_SHOWN { "…" } else { "" };
        let part: String = shown.chars().skip(first).take(MAX_SHOWN).collect();
        let excerpt = format!("{before}{}{after}", printable(part.trim_end()));
        Self { line, column: columns.start + 1, width, excerpt, offset: columns.start - first + before.chars().count() }
    }

    /// How many carets fit under the part that is shown.
    fn carets(&self) -> usize {
        let left = self.excerpt.chars().count().saturating_sub(self.offset);
        self.width.min(left).max(1)
    }
}

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong, in one line.
    pub message: String,
    /// Where; `None`: in the file as a whole.
    pub place: Option<Place>,
    /// What was expected there; may be empty.
    pub label: String,
    /// What would be right.
    pub help: Option<String>,
    /// Where the file has the same problem again.
    pub again: Vec<Again>,
    /// What problems of this kind have in common, where their messages differ, and what this one is about.
    group: Option<(&'static str, String)>,
}

/// Another place of a problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Again {
    /// The line, from 1.
    pub line: usize,
    /// The first character, from 1.
    pub column: usize,
    /// What it is about there, such as a key's name, if that is not the same.
    pub subject: Option<String>,
}

impl Diagnostic {
    /// An error of the file as a whole.
    pub fn error(message: impl Into<String>) -> Self {
        Self::new(Severity::Error, message)
    }

    /// A warning about the file as a whole.
    pub fn warning(message: impl Into<String>) -> Self {
        Self::new(Severity::Warning, message)
    }

    fn new(severity: Severity, message: impl Into<String>) -> Self {
        Self {
            severity,
            message: message.into(),
            place: None,
            label: String::new(),
            help: None,
            again: Vec::new(),
            group: None,
        }
    }

    /// The same, at a place, with what was expected there.
    pub fn at(mut self, place: Place, label: impl Into<String>) -> Self {
        self.place = Some(place);
        self.label = label.into();
        self
    }

    /// The same, with what would be right.
    pub fn help(mut self, help: impl Into<Option<String>>) -> Self {
        self.help = help.into();
        self
    }

    /// Marks it as one of a group whose messages differ only in their `subject`.
    pub(super) fn grouped(mut self, group: &'static str, subject: impl Into<String>) -> Self {
        self.group = Some((group, subject.into()));
        self
    }

    /// Returns whether the other one says nothing new but another place.
    fn says_the_same_as(&self, other: &Self) -> bool {
        let same = match (&self.group, &other.group) {
            (Some((one, _)), Some((two, _))) => one == two,
            (None, None) => self.message == other.message,
            _ => false,
        };
        // What a warning's label says of one place matters less than that it is short. An error has to be mended there.
        let same_label = self.severity == Severity::Warning || self.label == other.label;
        same && same_label && self.severity == other.severity && self.help == other.help && self.place.is_some()
    }

    /// Returns where the problem is again, as a clause.
    fn repetitions(&self) -> Option<String> {
        let first = self.place.as_ref().map_or(0, |place| place.line);
        let others = self.again.len();
        if others == 0 {
            return None;
        }
        let place = |again: &Again| {
            let line = match again.line == first {
                true => format!("line {}:{}", again.line, again.column),
                false => format!("line {}", again.line),
            };
            again.subject.as_ref().map_or(line.clone(), |subject| format!("{subject} in {line}"))
        };
        let places: Vec<String> = self.again.iter().take(MAX_PLACES).map(place).collect();
        let rest = if others > MAX_PLACES { ", …" } else { "" };
        Some(format!("{others} more like this: {}{rest}", places.join(", ")))
    }

    /// Returns the problem in one line, for a journal.
    fn line(&self, source: &str) -> String {
        let mut text = match &self.place {
            Some(place) => format!("{source}:{}:{}: {}", place.line, place.column, self.message),
            None => format!("{source}: {}", self.message),
        };
        if !self.label.is_empty() {
            text += &format!(" ({})", self.label);
        }
        for more in [self.repetitions(), self.help.clone()].into_iter().flatten() {
            text += &format!("; {more}");
        }
        printable(&text)
    }
}

/// All problems of one file, in the order of its lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostics {
    source: String,
    entries: Vec<Diagnostic>,
    left_out: usize,
}

impl Diagnostics {
    /// None yet, of the file with this name.
    pub fn new(source: &str) -> Self {
        Self { source: source.to_owned(), entries: Vec::new(), left_out: 0 }
    }

    /// Adds a problem; one that was there before is only given another place. Beyond a hundred of one severity they are
    /// counted, not kept.
    pub fn push(&mut self, diagnostic: Diagnostic) {
        if self.places(diagnostic.severity) >= MAX_KEPT {
            self.left_out += 1;
            return;
        }
        let before = self.entries.iter_mut().find(|entry| entry.says_the_same_as(&diagnostic));
        match (before, &diagnostic.place) {
            (Some(entry), Some(place)) => {
                let first = entry.group.as_ref().map(|(_, subject)| subject);
                let subject = diagnostic.group.map(|(_, subject)| subject).filter(|subject| Some(subject) != first);
                entry.again.push(Again { line: place.line, column: place.column, subject });
            }
            _ => self.entries.push(diagnostic),
        }
    }

    /// Whether another problem of this severity is kept; if not, it is counted now, and need not be made.
    pub(super) fn has_room(&mut self, severity: Severity) -> bool {
        let room = self.places(severity) < MAX_KEPT;
        self.left_out += usize::from(!room);
        room
    }

    /// Counts the places that have a problem of this severity.
    fn places(&self, severity: Severity) -> usize {
        self.of(severity).map(|entry| 1 + entry.again.len()).sum()
    }

    /// Brings them into the order of their lines; those of the file as a whole come last.
    pub(super) fn sort(&mut self) {
        self.entries.sort_by_key(|entry| entry.place.as_ref().map_or((usize::MAX, 0), |at| (at.line, at.column)));
        for entry in &mut self.entries {
            entry.again.sort_by_key(|again| (again.line, again.column));
        }
    }

    /// The problems.
    pub fn iter(&self) -> impl Iterator<Item = &Diagnostic> {
        self.entries.iter()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether one of them is an error.
    pub fn has_errors(&self) -> bool {
        self.of(Severity::Error).next().is_some()
    }

    fn of(&self, severity: Severity) -> impl Iterator<Item = &Diagnostic> {
        self.entries.iter().filter(move |entry| entry.severity == severity)
    }

    /// The text for a person: one block for each problem, an empty line between two, a newline at the end; empty if there
    /// are none. With `color`, for a terminal that knows ECMA-48's colours.
    pub fn render(&self, color: bool) -> String {
        let paint = Paint { color };
        let source = printable(&self.source);
        let mut blocks: Vec<String> = self.entries.iter().map(|entry| block(entry, &source, &paint)).collect();
        if self.left_out > 0 {
            blocks.push(format!("{}: {source}: {} more problems\n", paint.bold("note"), self.left_out));
        }
        blocks.join("\n")
    }
}

impl Diagnostics {
    /// Returns each problem with its severity, in one line without excerpts and colours, for logs.
    pub fn lines(&self) -> impl Iterator<Item = (Severity, String)> {
        let left_out = (self.left_out > 0)
            .then(|| (Severity::Warning, format!("{}: {} more problems", printable(&self.source), self.left_out)));
        self.entries.iter().map(|entry| (entry.severity, entry.line(&self.source))).chain(left_out)
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.render(false).trim_end())
    }
}

impl std::error::Error for Diagnostics {}

fn block(entry: &Diagnostic, source: &str, paint: &Paint) -> String {
    let heading = paint.severity(entry.severity, &entry.severity.to_string());
    let message = paint.bold(&format!(": {}", printable(&entry.message)));
    let mut text = format!("{heading}{message}\n");
    let gutter = entry.place.as_ref().map_or(1, |place| place.line.to_string().len());
    let pad = " ".repeat(gutter);
    let bar = paint.frame("|");
    if let Some(place) = &entry.place {
        let number = paint.frame(&format!("{:>gutter$}", place.line));
        let indent = " ".repeat(place.offset);
        let label = format!("{} {}", "^".repeat(place.carets()), printable(&entry.label));
        let label = paint.severity(entry.severity, label.trim_end());
        text += &format!("{pad}{} {source}:{}:{}\n", paint.frame("-->"), place.line, place.column);
        text += &format!("{pad} {bar}\n");
        text += format!("{number} {bar} {}", place.excerpt).trim_end();
        text += &format!("\n{pad} {bar} {indent}{label}\n");
    } else {
        text += &format!("{pad}{} {source}\n", paint.frame("-->"));
    }
    let remarks = [("note", entry.repetitions()), ("help", entry.help.clone())];
    let mut bars = format!("{pad} {bar}\n");
    for (kind, remark) in remarks.into_iter().filter_map(|(kind, remark)| Some((kind, remark?))) {
        text += &std::mem::take(&mut bars);
        text += &format!("{pad} {} {}: {}\n", paint.frame("="), paint.bold(kind), printable(&remark));
    }
    text
}

/// Colours as rustc uses them, or none.
struct Paint {
    color: bool,
}

impl Paint {
    fn wrap(&self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn severity(&self, severity: Severity, text: &str) -> String {
        let code = match severity {
            Severity::Error => "1;31",
            Severity::Warning => "1;33",
        };
        self.wrap(code, text)
    }

    fn bold(&self, text: &str) -> String {
        self.wrap("1", text)
    }

    fn frame(&self, text: &str) -> String {
        self.wrap("1;34", text)
    }
}

/// The candidate that `word` is most likely a misspelling of, if any is near: at most a third of its letters wrong.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // No candidate is longer than 40 characters; the distance takes quadratic time.
    if word.len() > 64 {
        return None;
    }
    let word = word.to_ascii_lowercase();
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&word, &candidate.to_ascii_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= (candidate.chars().count() / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(diagnostic: Diagnostic) -> Diagnostics {
        let mut all = Diagnostics::new("wg0.conf");
        all.push(diagnostic);
        all
    }

    #[test]
    fn reads_like_a_compilers() {
        let place = Place::new(12, 13..19, "AllowedIPs = 10.0/8");
        let all = one(Diagnostic::error("this is no network")
            .at(place, "an IPv4 address has four numbers")
            .help("did you mean `10.0.0.0/8`?".to_owned()));
        insta::assert_snapshot!(all.render(false), @r"
        error: this is no network
          --> wg0.conf:12:14
           |
        12 | AllowedIPs = 10.0/8
           |              ^^^^^^ an IPv4 address has four numbers
           |
           = help: did you mean `10.0.0.0/8`?
        ");
    }

    #[test]
    fn a_problem_of_the_whole_file_has_no_line() {
        insta::assert_snapshot!(one(Diagnostic::warning("it is odd").help("write another".to_owned())).render(false), @r"
        warning: it is odd
         --> wg0.conf
          |
          = help: write another
        ");
    }

    #[test]
    fn color_only_adds_escapes() {
        let all = one(Diagnostic::error("x").at(Place::new(1, 0..1, "abc"), "y").help("z".to_owned()));
        let mut plain = String::new();
        let mut rest = all.render(true);
        while let Some(start) = rest.find('\x1b') {
            plain += &rest[..start];
            let end = start + rest[start..].find('m').expect("an escape ends with m");
            rest = rest[end + 1..].to_owned();
        }
        plain += &rest;
        assert_eq!(plain, all.render(false));
        assert!(!all.render(false).contains('\x1b'));
    }

    #[test]
    fn nothing_reaches_the_terminal_raw() {
        let place = Place::new(1, 4..5, "a\x1b[2J\u{202e}b\tc");
        let mut all = Diagnostics::new("w\x07g.conf");
        all.push(Diagnostic::error("\x1b]0;m").at(place, "\u{9b}l").help("\r\nh".to_owned()));
        let text = all.render(false);
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
        assert!(!text.contains('\u{202e}'));
        // The lines are those of the frame alone.
        assert_eq!(text.lines().count(), 7, "{text}");
    }

    #[test]
    fn a_long_line_is_shown_around_the_problem() {
        let line = format!("{}WRONG{}", "x".repeat(3000), "y".repeat(3000));
        let all = one(Diagnostic::error("m").at(Place::new(1, 3000..3005, &line), "here"));
        let text = all.render(false);
        assert!(text.lines().all(|line| line.chars().count() < 140), "{text}");
        let source = text.lines().find(|line| line.contains("WRONG")).expect("the excerpt");
        let carets = text.lines().find(|line| line.contains("^^^^^")).expect("the carets");
        let column = |line: &str, what: char| line.chars().position(|c| c == what);
        assert_eq!(column(source, 'W'), column(carets, '^'));
        assert!(text.contains("wg0.conf:1:3001"));
    }

    #[test]
    fn a_flood_is_counted_and_errors_are_not_lost_in_it() {
        let mut all = Diagnostics::new("f");
        for _ in 0..MAX_KEPT + 5 {
            all.push(Diagnostic::warning("w"));
        }
        all.push(Diagnostic::error("e"));
        assert!(all.has_errors());
        assert!(all.render(false).ends_with("note: f: 5 more problems\n"));
    }

    #[test]
    fn a_problem_is_said_once_with_all_its_places() {
        let mut all = Diagnostics::new("f");
        let place = |line, columns| Place::new(line, columns, "Foo = bar, bar");
        for line in [3, 5, 9] {
            all.push(Diagnostic::error("unknown").at(place(line, 0..3), "here"));
        }
        all.push(Diagnostic::error("unknown").at(place(3, 6..9), "here"));
        all.push(Diagnostic::error("unknown").at(place(7, 0..3), "elsewhere"));
        for (line, name) in [(1, "`a`"), (2, "`b`")] {
            let grouped = Diagnostic::error(format!("no {name}")).at(place(line, 0..3), "").help("x".to_owned());
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

    #[test]
    fn nearest_is_near() {
        let keys = ["PrivateKey", "PublicKey", "MTU", "DNS"];
        assert_eq!(nearest("privatkey", keys), Some("PrivateKey"));
        assert_eq!(nearest("PubilcKey", keys), Some("PublicKey"));
        assert_eq!(nearest("mut", keys), Some("MTU"));
        assert_eq!(nearest("Banana", keys), None);
        assert_eq!(nearest(&"x".repeat(100_000), keys), None);
    }
}
