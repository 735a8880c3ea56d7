//! The creation of a tunnel: what its keeper is to make or to take over.

use std::io;

use super::{Origin, recovery};
use crate::config::BackendChoice;
use crate::failure::{Doing, Failure};
use crate::keeper::{KeeperSpec, KeeperStart};
use crate::names::TunnelName;
use crate::plan::{self, Plan};
use crate::registry::{self, PlanningLock, TunnelDirectory, TunnelState};
use crate::request::TunnelRequest;
use crate::tunnel;
use crate::wireguard::Backend;

/// Prepares a keeper for a claimed name: it adopts what a killed keeper left if that is still in use, or makes the
/// tunnel anew.
///
/// The request is consumed: of the provider's file, this process keeps only what the keeper gets.
///
/// # Errors
/// If the remains cannot be removed, or cannot be changed to what is requested, or if no plan can be made. A claim on a
/// name without a tunnel is released then.
pub(crate) fn keeper_spec(
    request: Box<TunnelRequest>,
    directory: TunnelDirectory,
    listen_fds: i32,
) -> Result<(KeeperSpec, Origin), Failure> {
    let left = directory.state().map_err(Failure::new)?.filter(recovery::is_wanted);
    if let Some(state) = left
        && let Some(plan) = directory.plan().map_err(Failure::new)?
    {
        require_changeable(&request, &state, &plan)?;
        return Ok((spec(request, directory, plan, KeeperStart::TakeOver(state), listen_fds)?, Origin::Adopted));
    }
    if let Err(failure) = tunnel::reclaim(&directory, &request.config.name) {
        // The state must stay for the next start if there is any.
        if matches!(directory.state(), Ok(None)) {
            let _ = directory.release();
        }
        return Err(failure);
    }
    // After the remains are gone: they are no facts about the host.
    match make_plan(&request, &directory) {
        Ok(plan) => Ok((spec(request, directory, plan, KeeperStart::Create, listen_fds)?, Origin::New)),
        Err(failure) => {
            let _ = directory.release();
            Err(failure)
        }
    }
}

/// Makes a plan and stores it before another launcher plans, whose addresses and names must differ.
fn make_plan(request: &TunnelRequest, directory: &TunnelDirectory) -> Result<Plan, Failure> {
    let write = |error: io::Error| {
        let failure = Failure::new(format!("cannot write below {}: {error}", directory.path().display()));
        if error.kind() == io::ErrorKind::StorageFull { failure.advise("free space in /run") } else { failure }
    };
    let lock = PlanningLock::take().map_err(write)?;
    let plan = request.plan()?;
    directory.write_plan(&plan).and_then(|()| directory.write_names(&plan.dns)).map_err(write)?;
    drop(lock);
    tracing::debug!("the tunnel is planned");
    for note in &plan.notes {
        tracing::warn!("{note}");
    }
    warn_of_shared_key(&plan);
    Ok(plan)
}

/// Warns if another tunnel of this machine has the same private key and a peer in common. A peer answers the endpoint
/// that it heard last, so each tunnel would take the other's packets.
fn warn_of_shared_key(plan: &Plan) {
    let Some(key) = plan.wireguard.public_key else { return };
    for name in registry::names().unwrap_or_default().into_iter().filter(|name| *name != plan.name) {
        let other = registry::read_plan(&name).ok().flatten();
        let shares_peer = |other: &Plan| {
            let is_own = |key| plan.wireguard.peers.iter().any(|own| own.public_key == key);
            other.wireguard.peers.iter().any(|peer| is_own(peer.public_key))
        };
        if other.is_some_and(|other| other.wireguard.public_key == Some(key) && shares_peer(&other)) {
            tracing::warn!(
                "the tunnel {name} has the same private key and peer: each takes the other's answers away; use one tunnel for both \
                 programs (--tunnel {name}), or a key of its own for each"
            );
        }
    }
}

/// Checks that a living tunnel can be changed to the requested configuration. Otherwise a keeper that adopts it would
/// have other keys and peers than the interface has addresses and routes.
fn require_changeable(request: &TunnelRequest, state: &TunnelState, living: &Plan) -> Result<(), Failure> {
    let mut requested = request.plan()?;
    requested.keep_link(living);
    let backend = match state.made {
        Some(Backend::Kernel) => BackendChoice::Kernel,
        Some(Backend::Userspace) => BackendChoice::Userspace,
        None => living.backend,
    };
    plan::diff(living, &requested, backend).map(drop).map_err(|reasons| {
        let name = &request.config.name;
        Failure::new(format!("this cannot be changed while the tunnel is up: {}", reasons.join("; ")))
            .advise(format!("take it down with `vpn-exec down {name}`, and up again"))
    })
}

/// Checks that the tunnel that is up can be changed to the requested configuration, if there is one.
///
/// # Errors
/// If it cannot, or if its state cannot be read.
pub(crate) fn require_living_changeable(request: &TunnelRequest) -> Result<(), Failure> {
    let name: &TunnelName = &request.config.name;
    let state = registry::read(name).map_err(Failure::new)?;
    match (state, registry::read_plan(name).map_err(Failure::new)?) {
        (Some(state), Some(plan)) if state.made.is_some() => require_changeable(request, &state, &plan),
        _ => Ok(()),
    }
}

fn spec(
    request: Box<TunnelRequest>,
    directory: TunnelDirectory,
    plan: Plan,
    start: KeeperStart,
    listen_fds: i32,
) -> Result<KeeperSpec, Failure> {
    let handover = match request.handover().seal().doing("make a file in memory") {
        Ok(handover) => handover,
        Err(failure) => {
            if matches!(start, KeeperStart::Create) {
                let _ = directory.release();
            }
            return Err(failure);
        }
    };
    // The file is wiped here, before a fork has a copy of it.
    let TunnelRequest { config, .. } = *request;
    Ok(KeeperSpec { plan, directory, config, handover, start, listen_fds, reread: None })
}
