//! `vpn-exec reload`: applies a changed configuration to a tunnel that is up.

use std::os::fd::AsFd;
use std::process::ExitCode;

use super::{Failure, load, print};
use crate::cli::TargetArgs;
use crate::tunnel::lease;

pub(super) fn run(arguments: &TargetArgs) -> Result<ExitCode, Failure> {
    let loaded = load::load_target(arguments)?;
    let handover =
        loaded.handover().seal().map_err(|error| Failure::new(format!("cannot make a file in memory: {error}")))?;
    let changes = lease::reload(&loaded.config.name, handover.as_fd())?;
    let text: String = changes.iter().map(|change| format!("{change}\n")).collect();
    print(if text.is_empty() { "nothing has changed\n" } else { &text }.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
