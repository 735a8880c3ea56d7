//! `vpn-exec completions`: prints the script that registers the completions with a shell.

use std::process::ExitCode;

use super::print_raw;
use crate::cli::completion;
use crate::failure::{Doing, Failure};

pub(super) fn run(shell: clap_complete::Shell) -> Result<ExitCode, Failure> {
    let mut script = Vec::new();
    completion::write_registration(&shell.to_string(), &mut script).doing("print the completions")?;
    print_raw(&script)?;
    Ok(ExitCode::SUCCESS)
}
