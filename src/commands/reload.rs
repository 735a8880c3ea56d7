//! `vpn-exec reload`: applies a changed configuration to a running tunnel.

use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use super::print;
use crate::cli::ReloadArgs;
use crate::failure::{Doing, Failure};
use crate::lease;
use crate::names::TunnelName;
use crate::request;
use crate::session::approach::{SUCCESSION, is_passing};

pub(super) fn run(arguments: &ReloadArgs) -> Result<ExitCode, Failure> {
    let (name, handover) = requested(arguments)?;
    let begin = Instant::now();
    let changes = loop {
        match lease::reload(&name, handover.as_ref().map(AsFd::as_fd))? {
            Some(changes) => break changes,
            // The keeper was killed or hands over, and its successor is about to start.
            None if begin.elapsed() < SUCCESSION && is_passing(&name).unwrap_or(false) => {
                std::thread::sleep(Duration::from_millis(1));
            }
            None => return Err(lease::not_up(&name)),
        }
    };
    let text: String = changes.iter().map(|change| format!("{change}\n")).collect();
    print(if text.is_empty() { "nothing has changed\n" } else { &text })?;
    Ok(ExitCode::SUCCESS)
}

/// Returns the tunnel, and the configuration to apply. None lets the keeper read the configuration itself.
fn requested(arguments: &ReloadArgs) -> Result<(TunnelName, Option<OwnedFd>), Failure> {
    if arguments.by_keeper || request::only_the_keeper_can_load(&arguments.source) {
        if request::has_overrides(&arguments.tunnel) {
            return Err(Failure::new(
                "cannot change the tunnel by options: its keeper reads the configuration with its own options",
            )
            .advise("put the options into the profile"));
        }
        return Ok((request::name_of_source(&arguments.source)?, None));
    }
    let request = request::load_tunnel(&arguments.source, &arguments.tunnel)?;
    let handover = request.handover().seal().doing("create a file in memory")?;
    Ok((request.config.name, Some(handover)))
}
