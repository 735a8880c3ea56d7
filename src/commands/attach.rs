//! `vpn-exec attach`: puts a tunnel into the network namespace of this process, a container's or a pod's.

use std::process::ExitCode;

use super::print;
use crate::attach::{self, check::Health, requirements::explain_in_container};
use crate::cli::AttachArgs;
use crate::failure::Failure;
use crate::request;

/// The exit status of `--check` for a namespace that is closed without a working tunnel, and for one that is open. They
/// are those of `status --check`.
const NOT_UP: u8 = 3;
const OPEN: u8 = 4;

pub(super) fn run(arguments: &AttachArgs, is_quiet: bool) -> Result<ExitCode, Failure> {
    let result = match arguments.check {
        true => check(is_quiet),
        false => request::load_tunnel(&arguments.source, &arguments.tunnel())
            .and_then(|request| attach::run(&request.config, arguments.closed))
            .map(|()| ExitCode::SUCCESS),
    };
    result.map_err(explain_in_container)
}

/// Prints the state of the namespace in one word, and returns it as an exit status.
fn check(is_quiet: bool) -> Result<ExitCode, Failure> {
    let health = attach::check::check()?;
    if !is_quiet {
        print(&format!("{health}\n"))?;
    }
    Ok(match health {
        Health::Open => ExitCode::from(OPEN),
        health if health.is_good() => ExitCode::SUCCESS,
        Health::Damaged | Health::Closed(_) => ExitCode::from(NOT_UP),
    })
}
