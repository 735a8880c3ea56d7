//! `vpn-exec down`: removes a tunnel.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use super::no_tunnel;
use crate::cli::DownArgs;
use crate::failure::{Doing, Failure};
use crate::keeper;
use crate::lease;
use crate::linux::process;
use crate::names::TunnelName;
use crate::registry::path_of;
use crate::session;
use crate::session::approach::{SUCCESSION, claim_dead};
use crate::tunnel::reclaim;

/// The interval between attempts while one keeper takes over from another.
const RETRY: Duration = Duration::from_millis(1);

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
        match remove_remains(name, *force)? {
            Remains::Removed => return Ok(ExitCode::SUCCESS),
            // A new keeper has taken over meanwhile.
            Remains::TakenOver if begin.elapsed() < SUCCESSION => std::thread::sleep(RETRY),
            Remains::TakenOver => return Err(no_tunnel(name)),
        }
    }
}

/// Removes the remains of a keeper whose service has ended. Can be repeated, and does not touch the tunnel of a running
/// keeper.
fn clean_up_after_service(name: &TunnelName) -> Result<ExitCode, Failure> {
    // The result of the service (systemd.exec(5)). A killed keeper is restarted, and takes its tunnel over.
    let result = std::env::var("SERVICE_RESULT").unwrap_or_default();
    if ["signal", "core-dump", "watchdog", "oom-kill"].contains(&result.as_str()) {
        tracing::info!("leaving the tunnel {name} to its next keeper");
        return Ok(ExitCode::SUCCESS);
    }
    if path_of(name).is_dir() {
        let removed = remove_remains(name, true);
        // The tunnel may have ended by itself meanwhile.
        if path_of(name).is_dir() {
            removed?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The outcome of an attempt to remove what a killed keeper has left.
enum Remains {
    /// The remains are removed.
    Removed,
    /// A new keeper has taken the tunnel over.
    TakenOver,
}

/// Removes what a killed keeper has left.
fn remove_remains(name: &TunnelName, force: bool) -> Result<Remains, Failure> {
    if !path_of(name).is_dir() {
        return Err(no_tunnel(name));
    }
    session::require_privileges()?;
    session::Privileges::limit(keeper::needed_capabilities())?;
    let Some(directory) = claim_dead(name)? else {
        return if path_of(name).is_dir() { Ok(Remains::TakenOver) } else { Err(no_tunnel(name)) };
    };
    let state = directory.state().map_err(Failure::new)?;
    if let (Some(container), false) = (state.as_ref().and_then(|state| state.container.as_ref()), force) {
        container.require_ended(name)?;
    }
    let inside = match state.as_ref().filter(|state| state.container.is_none()) {
        Some(state) => process::in_namespace(state.namespace).doing("list the programs inside")?,
        None => Vec::new(),
    };
    if !force && !inside.is_empty() {
        return Err(Failure::new(format!("programs {inside:?} are running in the tunnel {name}"))
            .advise("end them first, or kill them with --force"));
    }
    reclaim(&directory, name)?;
    directory.release().doing("remove the tunnel's state")?;
    if state.is_some() { Ok(Remains::Removed) } else { Err(no_tunnel(name)) }
}
