//! A session: a lease on a living tunnel. The launcher joins a tunnel that is up, adopts one whose keeper was killed,
//! or has one made.
//!
//! - [`acquire`], [`acquire_requested`]: the ways to a session.
//! - `approach`: finding out which of the ways is open. `creation`: preparing a keeper.
//! - `readiness`: waiting until the tunnel is made and connected.
//! - [`Privileges`]: what a launcher may do, as root or in a user namespace. `obstacles`: what forbids the latter.
//! - `recovery`: what is done about a killed keeper.

pub(crate) mod approach;
mod creation;
mod obstacles;
mod privileges;
mod readiness;
pub(crate) mod recovery;

use crate::config;
use crate::failure::{Doing, Failure};
use crate::keeper;
use crate::lease::handover::Handover;
use crate::lease::{self, Lease, UnnamedTunnel};
use crate::linux::capabilities::CapabilitySet;
use crate::names::TunnelName;
use crate::plan::{self, Plan};
use crate::registry::{self, Scope, TunnelDirectory};
use crate::request::{RequestedTunnel, TunnelRequest};
use crate::tunnel::ContainerPlace;
use approach::{Approach, approach};
pub(crate) use creation::{keeper_spec, require_living_changeable};
pub(crate) use privileges::{
    CALLERS, Privileges, choose_scope, choose_scope_of, choose_scope_to_look, is_root_for_caller, reason_of_scope,
    require_privileges,
};
pub(crate) use readiness::{Progress, Readiness};

/// How a session came to its tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The tunnel is being made for it.
    New,
    /// The tunnel was up.
    Joined,
    /// The tunnel's keeper was killed, and a new one takes it over. It may differ from the configuration.
    Adopted,
}

/// A lease on a tunnel, with the plan that the tunnel is made by.
pub(crate) struct Session {
    pub(crate) lease: Lease,
    pub(crate) plan: Plan,
    pub(crate) origin: Origin,
}

/// Acquires the tunnel that a request describes. The caller has the privileges of a launcher, and no more.
///
/// The request is consumed, so that this process has no copy of its keys left: a keeper is a fork of this process, and
/// nothing would wipe its parent's stacks in the fork.
///
/// # Errors
/// If the tunnel is up with another configuration, or cannot be joined, adopted or made.
pub(crate) fn acquire(
    request: Box<TunnelRequest>,
    listen_fds: i32,
    privileges: &Privileges,
) -> Result<Session, Failure> {
    match approach(&request.config.name)? {
        Approach::Joined(lease) => join(&request, lease, privileges),
        Approach::Claimed(directory) => start(request, directory, None, listen_fds, privileges),
    }
}

/// Acquires the tunnel that a program is to run in.
///
/// # Errors
/// As [`acquire`]; also if the keeper of a living tunnel was killed.
pub(crate) fn acquire_requested(
    tunnel: RequestedTunnel,
    listen_fds: i32,
    privileges: &Privileges,
) -> Result<Session, Failure> {
    match tunnel {
        RequestedTunnel::Configured(request) => acquire(request, listen_fds, privileges),
        RequestedTunnel::Living(name) => acquire_living(&name, privileges)?.ok_or_else(|| {
            Failure::new(format!("the keeper of the tunnel {name} was killed, and its configuration is not known here"))
                .advise(format!("start it again with `vpn-exec up FILE --name {name}`"))
        }),
    }
}

/// Returns the capabilities that a launcher needs to make, join or adopt a tunnel.
pub(crate) fn needed_capabilities(tunnel: &RequestedTunnel) -> CapabilitySet {
    let ports = match tunnel {
        RequestedTunnel::Configured(request) => keeper::capabilities_for_ports(request.config.listened_ports()),
        // Its ports are not known yet, and this process may have to adopt the tunnel one day.
        RequestedTunnel::Living(_) => CapabilitySet::NET_BIND_SERVICE,
    };
    keeper::needed_capabilities() | ports
}

/// Starts a keeper for a claimed name. `passed` is a rootless tunnel that its keeper has handed over.
///
/// # Errors
/// As [`acquire`].
pub(crate) fn start(
    request: Box<TunnelRequest>,
    directory: TunnelDirectory,
    passed: Option<UnnamedTunnel>,
    listen_fds: i32,
    privileges: &Privileges,
) -> Result<Session, Failure> {
    let (spec, origin) = keeper_spec(request, directory, passed, listen_fds, privileges)?;
    let plan = spec.plan.clone();
    let lease = keeper::start(spec).doing("start the keeper")?;
    Ok(Session { lease, plan, origin })
}

/// Starts a keeper whose tunnel is in the network namespace of a container. If the container has the tunnel already,
/// and its keeper was killed, the new one takes it over.
///
/// # Errors
/// If the tunnel serves another container or this machine, or if it cannot be made.
pub(crate) fn start_in(
    request: Box<TunnelRequest>,
    place: ContainerPlace,
    privileges: &Privileges,
) -> Result<Session, Failure> {
    let name = request.config.name.clone();
    let state = registry::read(&name).map_err(Failure::new)?;
    let other = state.and_then(|state| state.container).filter(|former| !former.is_same(&place.container));
    if let Some(former) = other {
        if former.is_alive() {
            return Err(former.refuse_other_use(&name));
        }
        // Its keeper may not have noticed the end yet.
        lease::take_down_if(&name, &|state| state.container.as_ref() == Some(&former))?;
    }
    let directory = match approach(&name)? {
        Approach::Claimed(directory) => directory,
        Approach::Joined(lease) => {
            let _ = lease.leave();
            return Err(serves_this_machine(&name));
        }
    };
    let (spec, origin) = creation::keeper_spec_in(request, directory, place, privileges)?;
    let plan = spec.plan.clone();
    let lease = keeper::start(spec).doing("start the keeper")?;
    Ok(Session { lease, plan, origin })
}

/// Returns the refusal of a tunnel for a container that is up with a namespace of its own.
fn serves_this_machine(name: &TunnelName) -> Failure {
    Failure::new(format!(
        "the tunnel {name} is up for programs of this machine: a key cannot serve a container as well"
    ))
    .advise(format!("take it down with `vpn-exec down {name}`, or give the container a profile with a key of its own"))
}

/// Joins the living tunnel of a name, whose configuration this process need not know. None if there is no such tunnel.
///
/// # Errors
/// If its keeper cannot be reached or refuses.
fn acquire_living(name: &TunnelName, privileges: &Privileges) -> Result<Option<Session>, Failure> {
    let Some(lease) = approach::join_soon(name)? else { return Ok(None) };
    privileges.gain_in(lease.namespace())?;
    let plan = living_plan(name, &lease)?;
    Ok(Some(Session { lease, plan, origin: Origin::Joined }))
}

/// Joins a living tunnel if its configuration is the requested one.
fn join(request: &TunnelRequest, lease: Lease, privileges: &Privileges) -> Result<Session, Failure> {
    let joined = require_same_configuration(request, &lease)
        .and_then(|()| privileges.gain_in(lease.namespace()))
        .and_then(|()| living_plan(&request.config.name, &lease));
    match joined {
        Ok(plan) => Ok(Session { lease, plan, origin: Origin::Joined }),
        Err(failure) => {
            let _ = lease.leave();
            Err(failure)
        }
    }
}

fn require_same_configuration(request: &TunnelRequest, lease: &Lease) -> Result<(), Failure> {
    let name = &request.config.name;
    let living = match lease.handover() {
        Some(file) => Handover::open(file).map_err(|error| error.to_string()).and_then(|handover| handover.config()),
        None => Err("its keeper has not passed it".into()),
    };
    let living = living.map_err(|error| {
        Failure::new(format!("cannot read the configuration of the running tunnel {name}: {error}"))
    })?;
    let differences = config::difference(&living, &request.config);
    if differences.is_empty() {
        return Ok(());
    }
    let differences: Vec<String> = differences.iter().map(ToString::to_string).collect();
    Err(Failure::new(format!("the tunnel {name} is up with another configuration: {}", differences.join("; ")))
        .advise("apply yours with `vpn-exec reload`, or choose another name with --name"))
}

fn living_plan(name: &TunnelName, lease: &Lease) -> Result<Plan, Failure> {
    if Scope::current() == Scope::User {
        return lease.unnamed().map(|unnamed| unnamed.plan).doing(format!("join the tunnel {name}"));
    }
    let plan = registry::read_plan(name).map_err(Failure::new)?;
    plan.ok_or_else(|| Failure::new(format!("the tunnel {name} has ended meanwhile")))
}

impl Session {
    /// Checks that a program may run in the tunnel as it asks to, and logs warnings. A tunnel that is made for the
    /// program is planned for it.
    ///
    /// # Errors
    /// If the tunnel's plan does not allow an option of the program.
    pub(crate) fn admit(&self, program: &config::ProgramOptions, last_capability: u8) -> Result<(), Failure> {
        if self.origin != Origin::New {
            for note in plan::join(&self.plan, program, last_capability)? {
                tracing::warn!("{note}");
            }
        }
        Ok(())
    }

    /// Applies the requested configuration to a tunnel that was adopted.
    fn bring_up_to_date(&mut self) -> Result<(), Failure> {
        if self.origin == Origin::Adopted {
            let changed = self.lease.reload(&self.plan.name)?;
            tracing::debug!(?changed, "the adopted tunnel is up to date");
        }
        Ok(())
    }

    /// Ends the session and waits until the tunnel is gone, or stays for others. Returns whether the keeper was still
    /// there; otherwise this process has taken the tunnel down.
    ///
    /// After a failure (`is_clean` is false) the keeper kills the processes that the program left in the tunnel.
    ///
    /// # Errors
    /// If the keeper is gone, and the rest of its tunnel cannot be removed.
    pub(crate) fn end(self, is_clean: bool) -> Result<bool, Failure> {
        let left = if is_clean { self.lease.leave() } else { self.lease.abandon() };
        if let Err(error) = &left {
            tracing::debug!(%error, "the keeper is gone, so this process takes the tunnel down");
            recovery::clean_up(&self.plan.name)?;
        }
        tracing::debug!("the session has ended");
        Ok(left.is_ok())
    }
}
