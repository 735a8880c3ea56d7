//! `vpn-exec reload`: applies a changed configuration to a tunnel that is up.

use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use super::print;
use crate::cli::ReloadArgs;
use crate::failure::Failure;
use crate::lease;
use crate::names::TunnelName;
use crate::request;
use crate::session::approach::{SUCCESSION, is_passing};

pub(super) fn run(arguments: &ReloadArgs) -> Result<ExitCode, Failure> {
    let (name, handover) = wanted(arguments)?;
    let begin = Instant::now();
    let changes = loop {
        match lease::reload(&name, handover.as_ref().map(AsFd::as_fd))? {
            Some(changes) => break changes,
            // Its keeper was killed, or hands over: its successor is there in an instant.
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

/// The tunnel and the configuration to change it to: none where its keeper reads that itself.
fn wanted(arguments: &ReloadArgs) -> Result<(TunnelName, Option<OwnedFd>), Failure> {
    if arguments.by_keeper || request::only_the_keeper_can_load(&arguments.source) {
        if request::has_overrides(&arguments.tunnel) {
            return Err(Failure::new(
                "cannot change the tunnel by options: its keeper reads the configuration with its own options",
            )
            .advise("put them into the profile"));
        }
        return Ok((request::name_of_source(&arguments.source)?, None));
    }
    let loaded = request::load_tunnel(&arguments.source, &arguments.tunnel)?;
    let handover = loaded.handover().seal();
    let handover = handover.map_err(|error| Failure::new(format!("cannot make a file in memory: {error}")))?;
    Ok((loaded.config.name, Some(handover)))
}
