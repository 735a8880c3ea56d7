//! Locations in a configuration file.

use std::ops::Range;

use crate::config::redact::printable;

/// The column, in characters, up to which a location keeps an excerpt. A larger one would take much time and memory for
/// a file with many problems in one long line.
const MAX_COLUMN: usize = 1 << 14;

/// The number of characters that an excerpt keeps after the problem.
const CONTEXT: usize = 200;

/// A range of characters in one line of a file, with an excerpt of that line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The line, from 1.
    pub line: usize,
    /// The column of the first character, from 1, counted in Unicode scalar values.
    pub column: usize,
    /// The beginning of the line up to some characters after the problem, and the bytes to mark in it.
    pub(super) excerpt: Option<(String, Range<usize>)>,
}

impl Location {
    /// Creates a location from a line number (from 1) and a range of columns (in characters, from 0).
    ///
    /// `masked` is the line with its secrets masked. Up to the end of `columns`, it has as many characters as the line.
    pub(in crate::config) fn new(line: usize, columns: Range<usize>, masked: &str) -> Self {
        let end = columns.end.max(columns.start + 1);
        let excerpt = (end <= MAX_COLUMN).then(|| {
            let part: String = masked.chars().take(end + CONTEXT).collect();
            let excerpt = printable(part.trim_end());
            let byte = |column| excerpt.char_indices().nth(column).map_or(excerpt.len(), |(byte, _)| byte);
            let marked = byte(columns.start)..byte(end);
            (excerpt, marked)
        });
        Self { line, column: columns.start + 1, excerpt }
    }
}
