//! `vpn-exec reload`: applies a changed configuration to a tunnel that is up.

use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use super::{Failure, load, print};
use crate::cli::TargetArgs;
use crate::tunnel::approach::{SUCCESSION, is_passing};
use crate::tunnel::lease::{self, AskError};

pub(super) fn run(arguments: &TargetArgs) -> Result<ExitCode, Failure> {
    let loaded = load::load_target(arguments)?;
    let handover =
        loaded.handover().seal().map_err(|error| Failure::new(format!("cannot make a file in memory: {error}")))?;
    let (name, begin) = (&loaded.config.name, Instant::now());
    let changes = loop {
        match lease::reload(name, handover.as_fd()) {
            // Its keeper was killed, or gives way: its successor is there in an instant.
            Err(AskError::Absent(_)) if begin.elapsed() < SUCCESSION && is_passing(name).unwrap_or(false) => {
                std::thread::sleep(Duration::from_millis(1));
            }
            other => break other?,
        }
    };
    let text: String = changes.iter().map(|change| format!("{change}\n")).collect();
    print(if text.is_empty() { "nothing has changed\n" } else { &text })?;
    Ok(ExitCode::SUCCESS)
}
