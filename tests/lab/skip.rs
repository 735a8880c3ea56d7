//! Tests, or parts of tests, that this machine cannot run. Each is reported at once on standard error, past the test
//! harness, and appended to the file in the variable [`variables::SKIPS`] for a summary at the end.

use std::fmt::{self, Display};
use std::fs::File;
use std::io::{self, Write};

use crate::shared::variables;
use crate::world;

/// Begins the line by which a test inside a world says that it, or a part of it, was skipped.
pub(crate) const SKIPPED: &str = "skipped: ";

/// The reason why a test cannot run on this machine, as the error of the test's body.
#[derive(Debug)]
pub struct Skip {
    /// What is missing.
    pub reason: String,
    /// The environment variable that, set to 1, makes this a failure. Empty if nothing does.
    pub unless: &'static str,
}

impl Skip {
    /// Returns the error for something that is missing, which is a failure if the variable `unless` is 1.
    pub fn error(reason: impl Display, unless: &'static str) -> anyhow::Error {
        Self { reason: reason.to_string(), unless }.into()
    }

    /// Returns the error of a test that does not apply to what is tested.
    pub fn by_design(reason: impl Display) -> anyhow::Error {
        Self { reason: reason.to_string(), unless: "" }.into()
    }
}

impl Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Skip {}

/// Reports that the calling test skips a part of itself, or all of it without an error.
pub fn skipped(reason: impl Display) {
    if world::is_inside() {
        // The process outside reads it, and knows the test's name.
        println!("{SKIPPED}{reason}");
    } else {
        report(&world::name_of_test(), &reason.to_string());
    }
}

/// Writes the line about a skipped test.
pub(crate) fn report(test: &str, reason: &str) {
    // `eprintln` would leave it to the harness, which shows nothing of a test that passes. A line that cannot be
    // written is no reason to fail.
    let _ = writeln!(io::stderr(), "{SKIPPED}{test}: {reason}");
    let Some(path) = std::env::var_os(variables::SKIPS).filter(|path| !path.is_empty()) else { return };
    let line = format!("{}: {reason}\n", in_executable(test));
    // One write with O_APPEND: lines of tests that run at the same time do not mix.
    let written =
        File::options().append(true).create(true).open(&path).and_then(|mut file| file.write_all(line.as_bytes()));
    if let Err(error) = written {
        let _ = writeln!(io::stderr(), "cannot append to {}: {error}", path.display());
    }
}

/// Returns the name of a test after that of its executable, without the hash that cargo appends.
fn in_executable(test: &str) -> String {
    let own = std::env::current_exe().ok();
    let name = own.as_deref().and_then(|path| path.file_name()?.to_str()).unwrap_or("?");
    format!("{} {test}", name.rsplit_once('-').map_or(name, |(name, _)| name))
}
