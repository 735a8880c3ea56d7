//! `vpn-exec completions`: prints the completions of a shell.

use std::process::ExitCode;

use clap::CommandFactory;

use super::{Failure, print};
use crate::cli::Cli;

pub(super) fn run(shell: clap_complete::Shell) -> Result<ExitCode, Failure> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "vpn-exec", &mut text);
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}
