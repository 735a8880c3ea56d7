//! Parts of a line that keep their columns, so that diagnostics can mark them.

use std::ops::Range;

use zeroize::Zeroizing;

/// A part of a [`LineView`], with its columns in the line.
#[derive(Clone, Copy)]
pub(super) struct Fragment<'a> {
    /// The text.
    pub(super) text: &'a str,
    /// The column (in characters from 0) of each byte of `text`, and one more for its end.
    columns: &'a [usize],
}

impl<'a> Fragment<'a> {
    /// Returns the part with these bytes.
    pub(super) fn part(self, bytes: Range<usize>) -> Fragment<'a> {
        Fragment { text: &self.text[bytes.clone()], columns: &self.columns[bytes.start..=bytes.end] }
    }

    /// Splits at each `separator`.
    pub(super) fn split(self, separator: impl Fn(char) -> bool) -> impl Iterator<Item = Fragment<'a>> {
        let base = self.text.as_ptr() as usize;
        self.text.split(separator).map(move |part| {
            let start = part.as_ptr() as usize - base;
            self.part(start..start + part.len())
        })
    }

    /// Splits at the first `separator`.
    pub(super) fn cut(self, separator: char) -> Option<(Fragment<'a>, Fragment<'a>)> {
        let at = self.text.find(separator)?;
        Some((self.part(0..at), self.part(at + separator.len_utf8()..self.text.len())))
    }

    /// Returns the columns in the line. An empty fragment is one column wide when it is shown.
    pub(super) fn columns(self) -> Range<usize> {
        let last = self.columns.len() - 1;
        // The end follows the last character. The next byte's column may be further right, after dropped white space.
        let end = if last == 0 { self.columns[0] } else { self.columns[last - 1] + 1 };
        self.columns[0]..end
    }
}

/// A copy of some characters of a line with their columns. Wiped when dropped, because it may contain a key.
pub(super) struct LineView {
    text: Zeroizing<String>,
    columns: Vec<usize>,
}

impl LineView {
    /// Copies the characters of a line for which `keep` returns `true`. Its arguments are a byte offset and the
    /// character.
    pub(super) fn new(line: &str, keep: impl Fn(usize, char) -> bool) -> Self {
        // The full capacity is allocated at once: growing would leave an unwiped copy behind.
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

    /// Returns all of the view.
    pub(super) fn fragment(&self) -> Fragment<'_> {
        Fragment { text: &self.text, columns: &self.columns }
    }
}
