//! Texts that remember where in their line they were, so that each problem can be underlined in its place.

use std::ops::Range;

use zeroize::Zeroizing;

/// A text of the file that remembers its columns.
#[derive(Clone, Copy)]
pub(super) struct Fragment<'a> {
    /// The text.
    pub(super) text: &'a str,
    /// The column (in characters from 0) of each byte of `text`, and one more for its end.
    columns: &'a [usize],
}

impl<'a> Fragment<'a> {
    /// A part of it.
    pub(super) fn part(self, bytes: Range<usize>) -> Fragment<'a> {
        Fragment { text: &self.text[bytes.clone()], columns: &self.columns[bytes.start..=bytes.end] }
    }

    /// What it is cut into by `separator`.
    pub(super) fn split(self, separator: impl Fn(char) -> bool) -> impl Iterator<Item = Fragment<'a>> {
        let base = self.text.as_ptr() as usize;
        self.text.split(separator).map(move |part| {
            let start = part.as_ptr() as usize - base;
            self.part(start..start + part.len())
        })
    }

    /// It before and after the first `separator`.
    pub(super) fn cut(self, separator: char) -> Option<(Fragment<'a>, Fragment<'a>)> {
        let at = self.text.find(separator)?;
        Some((self.part(0..at), self.part(at + separator.len_utf8()..self.text.len())))
    }

    /// Its columns. An empty one is shown as one character wide.
    pub(super) fn columns(self) -> Range<usize> {
        let last = self.columns.len() - 1;
        // The end is the column after the last character, not that of the next one: white space was dropped between.
        let end = if last == 0 { self.columns[0] } else { self.columns[last - 1] + 1 };
        self.columns[0]..end
    }
}

/// A view of a line: some of its characters and where they were. Wiped when dropped, since it may hold a key.
pub(super) struct LineView {
    text: Zeroizing<String>,
    columns: Vec<usize>,
}

impl LineView {
    /// The characters of a line that `keep` wants, which is asked with their byte and themselves.
    pub(super) fn new(line: &str, keep: impl Fn(usize, char) -> bool) -> Self {
        // With all its room from the start, the text never moves and leaves no copy behind.
        let mut view = LineView { text: Zeroizing::new(String::with_capacity(line.len())), columns: Vec::new() };
        let mut end = 0;
        for (column, (byte, c)) in line.char_indices().enumerate() {
            if keep(byte, c) {
                view.text.push(c);
                view.columns.extend(std::iter::repeat_n(column, c.len_utf8()));
                end = column + 1;
            }
        }
        view.columns.push(end);
        view
    }

    /// All of it.
    pub(super) fn piece(&self) -> Fragment<'_> {
        Fragment { text: &self.text, columns: &self.columns }
    }
}
