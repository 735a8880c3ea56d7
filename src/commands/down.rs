//! `vpn-exec down`: takes a tunnel down.

use std::process::ExitCode;

use super::{Failure, held};
use crate::cli::DownArgs;
use crate::linux::{capabilities, namespace, process};
use crate::names::TunnelName;
use crate::tunnel::approach::claim_dead;
use crate::tunnel::lease::{self, AskError};
use crate::tunnel::{keeper, reclaim};

pub(super) fn run(arguments: &DownArgs) -> Result<ExitCode, Failure> {
    let DownArgs { name, force } = arguments;
    match lease::take_down(name, *force) {
        Err(AskError::Absent(_)) => take_away(name, *force)?,
        other => other?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Takes away what a killed keeper has left.
fn take_away(name: &TunnelName, force: bool) -> Result<(), Failure> {
    let absent = || Failure::new(format!("there is no tunnel {name}")).advise("see `vpn-exec list`");
    held::require_privileges()?;
    let needed = keeper::needed_capabilities();
    capabilities::limit(needed, needed).map_err(|error| Failure::new(format!("cannot drop privileges: {error}")))?;
    let Some(directory) = claim_dead(name).map_err(Failure::new)? else { return Err(absent()) };
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
    if state.is_some() { Ok(()) } else { Err(absent()) }
}
