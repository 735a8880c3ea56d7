//! `vpn-exec man`: prints the manual page, in troff.

use std::process::ExitCode;

use clap::CommandFactory;

use super::{Failure, print};
use crate::cli::Cli;

pub(super) fn run() -> Result<ExitCode, Failure> {
    let mut text = Vec::new();
    clap_mangen::Man::new(Cli::command())
        .section("1")
        .manual("vpn-exec")
        .render(&mut text)
        .map_err(|error| Failure::new(format!("cannot write the manual page: {error}")))?;
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}
