//! Reading the user's files, with advice where one cannot be read.

use std::io;
use std::path::Path;

use crate::color;
use crate::config::diagnostic::Diagnostics;
use crate::config_file::{self, ConfigFile, ReadError};
use crate::failure::Failure;

/// Reads the provider's file, which is secret. Warns if other users can read it.
pub(super) fn read(path: &Path) -> Result<ConfigFile, Failure> {
    let file = read_public(path)?;
    if let Some(warning) = &file.warning {
        tracing::warn!("{warning}");
    }
    Ok(file)
}

/// Reads a file without secrets, such as a profile.
pub(super) fn read_public(path: &Path) -> Result<ConfigFile, Failure> {
    config_file::read(path).map_err(|error| {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        let failure = Failure::new(format!("{error}{cause}"));
        match error {
            ReadError::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                failure.advise("run this as root (`sudo vpn-exec …`), or as a user who may read it")
            }
            ReadError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound && path.starts_with("~") => {
                failure.advise("the shell expands `~` only at the beginning of a word: write --config ~/FILE")
            }
            ReadError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                failure.advise("check its path")
            }
            _ => failure,
        }
    })
}

/// Renders diagnostics for standard error, in colour where that is wanted.
pub(super) fn render(found: &Diagnostics) -> String {
    found.render(color::is_wanted(&io::stderr()))
}
