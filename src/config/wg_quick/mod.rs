//! The parser of the provider's `wg-quick` file.
//!
//! It reads a file as wg-quick(8) and wg(8) do: it accepts the files that `wg-quick strip` and `wg setconf` accept,
//! with the same meaning, and refuses the others. `tests/config_differential` compares it with wireguard-tools, and
//! lists the few intended differences.
//!
//! - `parser`: sections and settings; here a line becomes a part of the result.
//! - `values`: the values of the settings.
//! - `merge`: peers that have several sections.
//! - `unrecognized`: diagnostics for lines that wg(8) calls unrecognized.
//! - `extension`, `foreign_format`: keys and files of other programs.
//! - `line`, `setting`, `key_list`: lines, names of settings, and lists for diagnostics.
//!
//! The plan decides whether a tunnel can be made from the result.

mod extension;
mod foreign_format;
mod key_list;
mod line;
mod merge;
mod parser;
mod setting;
mod unrecognized;
mod values;

pub use self::foreign_format::binary_format;

use self::parser::Parser;
use super::diagnostic::{Diagnostic, Diagnostics};
use super::{MAX_BYTES, WgQuick};

/// Parses a `wg-quick` file. Messages call it `source_name`.
///
/// Returns the file with warnings: the file can be used, but may not do what its author expects.
///
/// # Errors
///
/// Returns all errors and warnings of the file, ordered by line, if there is an error.
pub fn parse(source_name: &str, text: &[u8]) -> Result<(WgQuick, Diagnostics), Diagnostics> {
    let mut parser = Parser::new(source_name);
    match unusable(text) {
        Some(diagnostic) => parser.found.push(diagnostic),
        None => parser.read(text),
    }
    parser.finish()
}

/// Returns an error if a text is too large, or a file of another kind.
fn unusable(text: &[u8]) -> Option<Diagnostic> {
    if text.len() > MAX_BYTES && binary_format(text).is_none() {
        return Some(Diagnostic::error(format!(
            "the file has more than {MAX_BYTES} bytes, too many for a configuration"
        )));
    }
    foreign_format::detect(text)
}
