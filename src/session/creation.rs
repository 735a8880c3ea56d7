//! The creation of a tunnel: what its keeper is to make or to take over.

use std::io;

use super::{Origin, Privileges, recovery};
use crate::config::BackendChoice;
use crate::failure::{Doing, Failure};
use crate::keeper::{KeeperSpec, KeeperStart};
use crate::lease::UnnamedTunnel;
use crate::linux::namespace::NetworkNamespace;
use crate::linux::netlink::Netlink;
use crate::names::TunnelName;
use crate::plan::{self, Plan};
use crate::registry::{self, PlanningLock, Scope, TunnelDirectory, TunnelState};
use crate::request::TunnelRequest;
use crate::tunnel::{self, ContainerPlace};
use crate::wireguard::Backend;

/// Prepares a keeper for a claimed name: it adopts what a killed keeper left if that is still in use, or makes the
/// tunnel anew.
///
/// The request is consumed: of the provider's file, this process keeps only what the keeper gets. `passed` is the
/// rootless tunnel that its keeper has handed over, without which no rootless tunnel is adopted. The process gains the
/// privileges that it needs.
///
/// # Errors
/// If the remains cannot be removed, or cannot be changed to what is requested, or if no plan can be made. A claim on a
/// name without a tunnel is released then.
pub(crate) fn keeper_spec(
    request: Box<TunnelRequest>,
    directory: TunnelDirectory,
    passed: Option<UnnamedTunnel>,
    listen_fds: i32,
    privileges: &Privileges,
) -> Result<(KeeperSpec, Origin), Failure> {
    let left = directory.state().map_err(Failure::new)?.filter(recovery::is_wanted);
    if let Some(state) = left
        && let Some((plan, namespace)) = adoptable(&directory, &state, passed)?
    {
        require_changeable(&request, &state, &plan)?;
        privileges.gain_in(namespace.as_ref())?;
        let spec = spec(request, directory, plan, KeeperStart::TakeOver(state), listen_fds)?;
        return Ok((KeeperSpec { namespace, ..spec }, Origin::Adopted));
    }
    let directory = clear(directory, &request.config.name)?;
    // After the remains are gone: they are no facts about the host.
    let planned = make_plan(|| request.plan(), &directory);
    match planned.and_then(|plan| Ok((plan, privileges.gain()?))) {
        Ok((plan, namespace)) => {
            let spec = spec(request, directory, plan, KeeperStart::Create, listen_fds)?;
            Ok((KeeperSpec { namespace, ..spec }, Origin::New))
        }
        Err(failure) => {
            let _ = directory.release();
            Err(failure)
        }
    }
}

/// Returns the plan of a tunnel that is to be adopted, and its namespace if that has no name. The plan of a user's
/// tunnel is not taken from the disk, where any program of the user can replace it: the launchers know it, and what
/// they have left is removed.
fn adoptable(
    directory: &TunnelDirectory,
    state: &TunnelState,
    passed: Option<UnnamedTunnel>,
) -> Result<Option<(Plan, Option<NetworkNamespace>)>, Failure> {
    match (Scope::current(), passed) {
        (Scope::System, _) => Ok(directory.plan().map_err(Failure::new)?.map(|plan| (plan, None))),
        (Scope::User, None) => Ok(None),
        (Scope::User, Some(passed)) => {
            passed.require_state(state).doing(format!("take over the tunnel {}", passed.plan.name))?;
            Ok(Some((passed.plan, Some(passed.namespace))))
        }
    }
}

/// Prepares a keeper for a claimed name, whose tunnel is in a container's namespace: it adopts what a killed keeper has
/// left for the same container, or makes the tunnel anew.
///
/// # Errors
/// If a killed keeper's tunnel of that name is in use by another container or this machine, or as [`keeper_spec`].
pub(crate) fn keeper_spec_in(
    request: Box<TunnelRequest>,
    directory: TunnelDirectory,
    place: ContainerPlace,
    privileges: &Privileges,
) -> Result<(KeeperSpec, Origin), Failure> {
    let name = request.config.name.clone();
    if let Some(state) = directory.state().map_err(Failure::new)?.filter(recovery::is_wanted) {
        return match &state.container {
            Some(container) if container.is_same(&place.container) => {
                keeper_spec(request, directory, None, 0, privileges)
            }
            Some(container) => Err(container.refuse_other_use(&name)),
            None => Err(super::serves_this_machine(&name)),
        };
    }
    let directory = clear(directory, &name)?;
    let planned = Netlink::open()
        .doing("open a netlink socket")
        .and_then(|mut host| make_plan(|| tunnel::plan_in(&mut host, &place.namespace, &request.config), &directory));
    match planned {
        Ok(plan) => Ok((spec(request, directory, plan, KeeperStart::CreateIn(place), 0)?, Origin::New)),
        Err(failure) => {
            let _ = directory.release();
            Err(failure)
        }
    }
}

/// Removes what a killed keeper has left of a tunnel that is not in use any more.
fn clear(directory: TunnelDirectory, name: &TunnelName) -> Result<TunnelDirectory, Failure> {
    match tunnel::reclaim(&directory, name) {
        Ok(()) => Ok(directory),
        Err(failure) => {
            // The state must stay for the next start if there is any.
            if matches!(directory.state(), Ok(None)) {
                let _ = directory.release();
            }
            Err(failure)
        }
    }
}

/// Makes a plan and stores it before another launcher plans, whose addresses and names must differ.
fn make_plan(plan: impl FnOnce() -> Result<Plan, Failure>, directory: &TunnelDirectory) -> Result<Plan, Failure> {
    let write = |error: io::Error| {
        let failure = Failure::new(format!("cannot write below {}: {error}", directory.path().display()));
        if error.kind() == io::ErrorKind::StorageFull { failure.advise("free space in /run") } else { failure }
    };
    let lock = PlanningLock::take().map_err(write)?;
    let plan = plan()?;
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
    let others = registry::reservations_of_others(&plan.name).unwrap_or_default();
    for name in others.into_iter().filter(|other| other.has_keys_of(plan)).map(|other| other.name) {
        tracing::warn!(
            "the tunnel {name} has the same private key and peer: each takes the other's answers away; use one tunnel for both \
             programs (--tunnel {name}), or a key of its own for each"
        );
    }
}

/// Checks that a living tunnel can be changed to the requested configuration. Otherwise a keeper that adopts it would
/// have other keys and peers than the interface has addresses and routes.
fn require_changeable(request: &TunnelRequest, state: &TunnelState, living: &Plan) -> Result<(), Failure> {
    let mut requested = plan_like(request, living)?;
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

/// Plans a tunnel in the namespace of a living one: its own, or a container's.
fn plan_like(request: &TunnelRequest, living: &Plan) -> Result<Plan, Failure> {
    if living.shared_namespace.is_none() {
        return request.plan();
    }
    let missing = || io::Error::from_raw_os_error(libc::ENOENT);
    let path = living.namespace.as_ref().ok_or_else(missing).doing("find the container's namespace")?;
    let namespace = tunnel::open_namespace(path)?;
    let mut host = Netlink::open().doing("open a netlink socket")?;
    tunnel::plan_in(&mut host, &namespace, &request.config)
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
    let handover = match request.handover().seal_with(&plan).doing("make a file in memory") {
        Ok(handover) => handover,
        Err(failure) => {
            if !matches!(start, KeeperStart::TakeOver(_)) {
                let _ = directory.release();
            }
            return Err(failure);
        }
    };
    // The file is wiped here, before a fork has a copy of it.
    let TunnelRequest { config, .. } = *request;
    Ok(KeeperSpec { plan, directory, config, handover, start, namespace: None, listen_fds, reread: None })
}
