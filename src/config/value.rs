//! What the values of a `wg-quick` file and of a profile have in common: errors with their columns, and numbers.

use std::ops::Range;

use super::fragment::{Fragment, LineView};

/// An error in a value, with its columns in the line.
pub(super) struct ValueError {
    /// The columns, from 0.
    pub(super) columns: Range<usize>,
    /// What is wrong.
    pub(super) message: String,
    /// What was expected.
    pub(super) label: String,
    /// How to fix it.
    pub(super) help: Option<String>,
}

impl ValueError {
    /// Creates an error at a fragment of a line.
    pub(super) fn new(at: Fragment<'_>, message: impl Into<String>, label: impl Into<String>) -> Self {
        Self { columns: at.columns(), message: message.into(), label: label.into(), help: None }
    }

    /// Sets the help.
    pub(super) fn help(mut self, help: impl Into<Option<String>>) -> Self {
        self.help = help.into();
        self
    }
}

/// Parses an argument of the command line with the parser of a file's value.
pub(super) fn parse_argument<T>(
    text: &str,
    parse: impl Fn(Fragment<'_>) -> Result<T, ValueError>,
) -> Result<T, String> {
    parse(LineView::new(text, |_, _| true).fragment()).map_err(|error| match error.help {
        Some(help) => format!("{}: {help}", error.message),
        None => format!("{}: {}", error.message, error.label),
    })
}

/// Parses a decimal number of at most `max`. Allows leading zeros, like strtoul(3), but no sign.
pub(super) fn decimal(text: &str, max: u32) -> Option<u32> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits = text.trim_start_matches('0');
    if digits.is_empty() { Some(0) } else { digits.parse().ok().filter(|number| *number <= max) }
}
