//! `vpn-exec completions`: prints the completions of a shell.

use std::process::ExitCode;

use clap::CommandFactory;

use super::print;
use crate::cli::Cli;
use crate::failure::Failure;

pub(super) fn run(shell: clap_complete::Shell) -> Result<ExitCode, Failure> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "vpn-exec", &mut text);
    let text = String::from_utf8_lossy(&text);
    // clap_complete looks for a command by one name and has its options under another, where the program's name has a hyphen
    // (clap's issue 6421): behind a command nothing is completed.
    let text = text.replace("vpn__subcmd__exec__", "vpn__exec__");
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}
