//! `vpn-exec help`: prints the help of a command.

use std::io;
use std::process::ExitCode;

use clap::CommandFactory;
use clap::builder::StyledStr;

use super::{declaration, print_raw};
use crate::cli::{Cli, HelpArgs};
use crate::color;
use crate::failure::Failure;

pub(super) fn run(arguments: &HelpArgs) -> Result<ExitCode, Failure> {
    let mut command = match &arguments.command {
        Some(name) => declaration(name)?,
        None => Cli::command(),
    };
    print_help(&command.render_long_help())?;
    Ok(ExitCode::SUCCESS)
}

/// Prints a help text, with colors if they are wanted. Clap's own printing would color it by rules of its own: in a
/// pipe with `CLICOLOR_FORCE`, and with `TERM=dumb` where `CI` is set.
///
/// # Errors
/// If standard output cannot be written.
pub fn print_help(help: &StyledStr) -> Result<(), Failure> {
    let text = if color::is_wanted(&io::stdout()) { help.ansi().to_string() } else { help.to_string() };
    print_raw(text.as_bytes())
}
