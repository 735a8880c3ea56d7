//! The tunnel that a command line or the environment names.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Args, ValueHint};
use clap_complete::engine::{ArgValueCandidates, ArgValueCompleter};
use thiserror::Error;

use super::completion;
use crate::lookup::{CONFIG_VARIABLE, TUNNEL_VARIABLE};
use crate::names::{NameError, TunnelName};

/// The arguments that name a tunnel.
#[derive(Clone, Debug, Args)]
pub struct SourceArgs {
    /// The tunnel's name, or the provider's wg-quick file: a word with a `/` or with `.conf` at its end; `-` is
    /// standard input
    #[arg(
        value_name = "NAME|FILE",
        conflicts_with_all = ["config", "tunnel"],
        add = ArgValueCompleter::new(completion::names_and_files)
    )]
    pub target: Option<PathBuf>,

    /// The provider's wg-quick file, whatever it is called; `-` is standard input
    #[arg(short, long, value_name = "FILE", conflicts_with = "tunnel", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,

    /// The tunnel's name, whatever it looks like
    #[arg(short, long, value_name = "NAME", add = ArgValueCandidates::new(completion::names))]
    pub tunnel: Option<TunnelName>,

    /// Name the tunnel [default: the name of the file or profile]
    #[arg(long, value_name = "NAME")]
    pub name: Option<TunnelName>,
}

/// A tunnel as the user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A provider's wg-quick file; `-` is standard input.
    File(PathBuf),
    /// A profile, a running tunnel, or a file in `/etc/wireguard`.
    Name(TunnelName),
}

/// The reason why a command line names no tunnel.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SourceError {
    /// Neither the command line nor the environment names one.
    #[error("no tunnel is given")]
    Missing,
    /// A word is neither a file nor a valid name.
    #[error("{word:?} is not a valid name of a tunnel: {error}")]
    Name {
        /// The word.
        word: String,
        /// The reason.
        error: NameError,
    },
}

impl SourceError {
    /// Returns what the user can do about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Missing => "name one as NAME|FILE, with --config FILE or with --tunnel NAME; see `vpn-exec --help`",
            Self::Name { .. } => "for a file, write a path with a `/` (./FILE), or use --config FILE",
        }
    }
}

impl SourceArgs {
    /// Returns the tunnel that the command line names, else the one that the environment names. `variable` reads the
    /// environment.
    ///
    /// # Errors
    /// If there is none, or its name is invalid.
    pub fn resolve(&self, variable: impl Fn(&str) -> Option<OsString>) -> Result<Source, SourceError> {
        if let Some(file) = &self.config {
            return Ok(Source::File(file.clone()));
        }
        if let Some(name) = &self.tunnel {
            return Ok(Source::Name(name.clone()));
        }
        if let Some(word) = &self.target {
            return Source::of_word(word);
        }
        // The file first: inside a tunnel, the variable with the name is set by vpn-exec, not by the user.
        let variable = |name| variable(name).filter(|value| !value.is_empty());
        match (variable(CONFIG_VARIABLE), variable(TUNNEL_VARIABLE)) {
            (Some(file), _) => Ok(Source::File(file.into())),
            (None, Some(name)) => name_of(&name.to_string_lossy()),
            (None, None) => Err(SourceError::Missing),
        }
    }
}

impl Source {
    /// Tells a file from a name: a file contains a `/`, ends in `.conf`, or is `-`.
    ///
    /// # Errors
    /// If the word is neither a file nor a valid name.
    pub fn of_word(word: &Path) -> Result<Self, SourceError> {
        if is_file(&word.to_string_lossy()) {
            Ok(Self::File(word.to_owned()))
        } else {
            name_of(&word.to_string_lossy())
        }
    }
}

/// Returns whether a word of the command line is a file, and not a name.
pub(super) fn is_file(word: &str) -> bool {
    word == "-" || word.contains('/') || word.ends_with(".conf")
}

fn name_of(word: &str) -> Result<Source, SourceError> {
    let name = word.parse().map_err(|error| SourceError::Name { word: word.to_owned(), error })?;
    Ok(Source::Name(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_a_file_by_its_slash_or_its_ending() {
        for file in ["-", "./wg0", "wg0.conf", "/etc/wireguard/wg0.conf", "/dev/fd/3", "a b.conf"] {
            assert_eq!(Source::of_word(Path::new(file)), Ok(Source::File(file.into())));
        }
        for name in ["wg0", "se-got.wg_001", "plan"] {
            assert_eq!(Source::of_word(Path::new(name)), Ok(Source::Name(name.parse().expect("a name"))));
        }
        for neither in ["a b", "", "ä"] {
            assert!(matches!(Source::of_word(Path::new(neither)), Err(SourceError::Name { .. })), "{neither}");
        }
    }

    #[test]
    fn the_command_line_precedes_the_environment() {
        let none = SourceArgs { target: None, config: None, tunnel: None, name: None };
        let resolve = |arguments: &SourceArgs, variables: &[(&str, &str)]| {
            arguments.resolve(|name| variables.iter().find(|(other, _)| *other == name).map(|(_, value)| value.into()))
        };
        let name = |name: &str| Ok(Source::Name(name.parse().expect("a name")));
        let both = [(TUNNEL_VARIABLE, "inside"), (CONFIG_VARIABLE, "wg0")];
        assert_eq!(resolve(&none, &[]), Err(SourceError::Missing));
        assert_eq!(resolve(&none, &[(TUNNEL_VARIABLE, ""), (CONFIG_VARIABLE, "")]), Err(SourceError::Missing));
        assert_eq!(resolve(&none, &both[..1]), name("inside"));
        assert_eq!(resolve(&none, &both), Ok(Source::File("wg0".into())));
        assert_eq!(resolve(&SourceArgs { target: Some("office".into()), ..none.clone() }, &both), name("office"));
        let config = SourceArgs { config: Some("plain".into()), ..none.clone() };
        assert_eq!(resolve(&config, &both), Ok(Source::File("plain".into())));
        let tunnel = SourceArgs { tunnel: Some("a.conf".parse().expect("a name")), ..none };
        assert_eq!(resolve(&tunnel, &both), name("a.conf"));
    }
}
