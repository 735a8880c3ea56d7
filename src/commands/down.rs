//! `vpn-exec down`: takes a tunnel down.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::cli::DownArgs;
use crate::failure::Failure;
use crate::keeper;
use crate::lease;
use crate::linux::{namespace, process};
use crate::names::TunnelName;
use crate::registry::path_of;
use crate::session;
use crate::session::approach::{SUCCESSION, claim_dead};
use crate::tunnel::reclaim;

pub(super) fn run(arguments: &DownArgs) -> Result<ExitCode, Failure> {
    let DownArgs { name, force, after_service } = arguments;
    if *after_service {
        return clean_up_after_service(name);
    }
    let begin = Instant::now();
    loop {
        if lease::take_down(name, *force)? {
            return Ok(ExitCode::SUCCESS);
        }
        match take_away(name, *force) {
            // Its keeper was killed, or gives way, and its successor is there by now.
            Ok(Taken::Living) if begin.elapsed() < SUCCESSION => std::thread::sleep(Duration::from_millis(1)),
            Ok(Taken::Living) => return Err(absent(name)),
            Ok(Taken::Away) => return Ok(ExitCode::SUCCESS),
            Err(failure) => return Err(failure),
        }
    }
}

/// Takes away what the keeper has left whose service has ended. It is safe to be repeated, and touches no living keeper's tunnel.
fn clean_up_after_service(name: &TunnelName) -> Result<ExitCode, Failure> {
    // How the service has ended (systemd.exec(5)). One that was killed is started again, and takes its tunnel over.
    let result = std::env::var("SERVICE_RESULT").unwrap_or_default();
    if ["signal", "core-dump", "watchdog", "oom-kill"].contains(&result.as_str()) {
        tracing::info!("the tunnel {name} is left to its next keeper");
        return Ok(ExitCode::SUCCESS);
    }
    if path_of(name).is_dir() {
        let taken = take_away(name, true);
        // It may have ended by itself in between.
        if path_of(name).is_dir() {
            taken?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What has become of a tunnel whose keeper could not be asked.
enum Taken {
    /// It was taken away.
    Away,
    /// It has a keeper again.
    Living,
}

fn absent(name: &TunnelName) -> Failure {
    Failure::new(format!("there is no tunnel {name}")).advise("see `vpn-exec list`")
}

/// Takes away what a killed keeper has left.
fn take_away(name: &TunnelName, force: bool) -> Result<Taken, Failure> {
    session::require_privileges()?;
    session::limit_privileges(keeper::needed_capabilities())?;
    let Some(directory) = claim_dead(name)? else {
        return if path_of(name).is_dir() { Ok(Taken::Living) } else { Err(absent(name)) };
    };
    let state = directory.state().map_err(Failure::new)?;
    let inside = match &state {
        Some(state) => process::in_namespace(state.namespace)
            .map_err(|error| Failure::new(format!("cannot see whether programs are inside: {error}")))?,
        None => Vec::new(),
    };
    if !force && !inside.is_empty() {
        let path = namespace::path_of(name.as_str());
        return Err(Failure::new(format!("programs {inside:?} are inside {}", path.display()))
            .advise("end them first, or have them killed with --force"));
    }
    reclaim(&directory, name)?;
    directory.release().map_err(|error| Failure::new(format!("cannot remove the tunnel's state: {error}")))?;
    if state.is_some() { Ok(Taken::Away) } else { Err(absent(name)) }
}
