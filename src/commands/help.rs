//! `vpn-exec help`: prints the help of a command.

use std::io;
use std::process::ExitCode;

use clap::CommandFactory;

use super::{declaration, print_raw};
use crate::cli::{Cli, HelpArgs};
use crate::color;
use crate::failure::Failure;

pub(super) fn run(arguments: &HelpArgs) -> Result<ExitCode, Failure> {
    let mut command = match &arguments.command {
        Some(name) => declaration(name)?,
        None => Cli::command(),
    };
    let help = command.render_long_help();
    let text = if color::is_wanted(&io::stdout()) { help.ansi().to_string() } else { help.to_string() };
    print_raw(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
