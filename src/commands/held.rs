//! Gets hold of a tunnel: joins it if it is up, takes it over if its keeper was killed, or has it made.

use super::Failure;
use super::load::Loaded;
use crate::config::{self, BackendChoice};
use crate::linux::capabilities::{self, CapabilitySet};
use crate::names::TunnelName;
use crate::plan::{self, Plan};
use crate::tunnel;
use crate::tunnel::approach::{Approach, ApproachError, approach};
use crate::tunnel::handover::Handover;
use crate::tunnel::keeper::{self, Beginning, Mission};
use crate::tunnel::lease::{self, AskError, Lease};
use crate::tunnel::recovery;
use crate::tunnel::state::{self, Choosing, ClaimError, Directory, State};
use crate::wireguard::Backend;

/// A lease on a tunnel.
pub(super) struct Held {
    pub(super) lease: Lease,
    pub(super) plan: Plan,
    /// Whether the tunnel was made before, so that nothing more of that is to be waited for.
    pub(super) is_made: bool,
    /// Whether the tunnel was taken over, and may not be what the configuration says now.
    pub(super) is_taken_over: bool,
}

/// Gets hold of the tunnel that a configuration describes. The caller's privileges are those of a launcher already. The
/// configuration is taken, so that no copy of its keys is left: a keeper is a fork of this process, and nobody would
/// wipe what the fork has on the stacks of its parent.
pub(super) fn hold(loaded: Box<Loaded>, listen_fds: i32) -> Result<Held, Failure> {
    match approach(&loaded.config.name)? {
        Approach::Joined(lease) => join(&loaded, lease),
        Approach::Claimed(directory) => start(loaded, directory, listen_fds),
    }
}

/// Starts a keeper for a claimed name.
pub(super) fn start(loaded: Box<Loaded>, directory: Directory, listen_fds: i32) -> Result<Held, Failure> {
    let (mission, is_taken_over) = prepare(loaded, directory, listen_fds)?;
    let plan = mission.plan.clone();
    let lease = keeper::start(mission).map_err(|error| Failure::new(format!("cannot start the keeper: {error}")))?;
    Ok(Held { lease, plan, is_made: false, is_taken_over })
}

/// Joins the living tunnel of a name that nothing else is known of.
pub(super) fn hold_by_name(name: &TunnelName) -> Result<Option<Held>, Failure> {
    let Some(lease) = tunnel::approach::join_soon(name)? else { return Ok(None) };
    let plan = living_plan(name)?;
    Ok(Some(Held { lease, plan, is_made: true, is_taken_over: false }))
}

/// Joins a living tunnel, if it is the one that is wanted.
fn join(loaded: &Loaded, lease: Lease) -> Result<Held, Failure> {
    let name = &loaded.config.name;
    let read = match lease.handover() {
        Some(file) => Handover::open(file).map_err(|error| error.to_string()).and_then(|handover| handover.config()),
        None => Err("its keeper does not tell".into()),
    };
    let joined = read
        .map_err(|error| Failure::new(format!("cannot see the configuration of the tunnel {name}: {error}")))
        .and_then(|(living, options)| {
            let living = (&living, options.allow_hooks);
            let differences = config::difference(living, (&loaded.config, loaded.options.allow_hooks));
            if differences.is_empty() {
                return living_plan(name);
            }
            let differences: Vec<String> = differences.iter().map(ToString::to_string).collect();
            Err(Failure::new(format!("the tunnel {name} is up with another configuration: {}", differences.join("; ")))
                .advise("apply yours with `vpn-exec reload`, or choose another name with --name"))
        });
    match joined {
        Ok(plan) => Ok(Held { lease, plan, is_made: true, is_taken_over: false }),
        Err(failure) => {
            let _ = lease.leave();
            Err(failure)
        }
    }
}

fn living_plan(name: &TunnelName) -> Result<Plan, Failure> {
    let plan = state::read_plan(name).map_err(Failure::new)?;
    plan.ok_or_else(|| Failure::new(format!("the tunnel {name} has ended meanwhile")))
}

/// Prepares a keeper for a claimed name: to take over what a killed one has left, if somebody wants it, or to begin anew. Says which.
/// Nothing of the provider's file is left in this process but what the keeper gets.
pub(super) fn prepare(loaded: Box<Loaded>, directory: Directory, listen_fds: i32) -> Result<(Mission, bool), Failure> {
    let name = &loaded.config.name;
    let left = directory.state().map_err(Failure::new)?.filter(recovery::is_wanted);
    if let Some(state) = left
        && let Some(plan) = directory.plan().map_err(Failure::new)?
    {
        require_changeable(&loaded, &state, &plan)?;
        return Ok((mission(loaded, directory, plan, Beginning::TakeOver(state), listen_fds)?, true));
    }
    if let Err(error) = tunnel::reclaim(&directory, name) {
        // What is written down there must stay for the next start.
        if matches!(directory.state(), Ok(None)) {
            let _ = directory.release();
        }
        return Err(error.into());
    }
    // What a killed tunnel of this name has left is none of the host's facts.
    match choose(&loaded, &directory) {
        Ok(plan) => Ok((mission(loaded, directory, plan, Beginning::Nothing, listen_fds)?, false)),
        Err(failure) => {
            let _ = directory.release();
            Err(failure)
        }
    }
}

/// Plans, and writes the plan down before others plan, whose addresses and names must be others.
fn choose(loaded: &Loaded, directory: &Directory) -> Result<Plan, Failure> {
    let write = |error: std::io::Error| {
        let failure = Failure::new(format!("cannot write below {}: {error}", directory.path().display()));
        if error.kind() == std::io::ErrorKind::StorageFull { failure.advise("free space in /run") } else { failure }
    };
    let choosing = Choosing::begin().map_err(write)?;
    let plan = loaded.plan()?;
    directory.write_plan(&plan).and_then(|()| directory.write_names(&plan.dns)).map_err(write)?;
    drop(choosing);
    tracing::debug!("the tunnel is planned");
    for note in &plan.notes {
        tracing::warn!("{note}");
    }
    warn_of_shared_key(&plan);
    Ok(plan)
}

/// Warns if another tunnel of this machine has the same private key: a peer answers whichever was heard last, so each takes the other's
/// packets away.
fn warn_of_shared_key(plan: &Plan) {
    let Some(key) = plan.wireguard.public_key else { return };
    for name in state::names().unwrap_or_default().into_iter().filter(|name| *name != plan.name) {
        let other = state::read_plan(&name).ok().flatten();
        let shares_peer = |other: &Plan| {
            other
                .wireguard
                .peers
                .iter()
                .any(|it| plan.wireguard.peers.iter().any(|own| own.public_key == it.public_key))
        };
        if other.is_some_and(|other| other.wireguard.public_key == Some(key) && shares_peer(&other)) {
            tracing::warn!(
                "the tunnel {name} has the same private key and peer: each takes the other's answers away; use one tunnel for \
                 both programs (--tunnel {name}), or a key of its own for each"
            );
        }
    }
}

/// Refuses a configuration that a tunnel cannot be changed to while it is up. Its keeper would have other keys and peers than the
/// interface has addresses and routes.
fn require_changeable(loaded: &Loaded, state: &State, living: &Plan) -> Result<(), Failure> {
    let mut wanted = loaded.plan()?;
    wanted.keep_link(living);
    let backend = match state.made {
        Some(Backend::Kernel) => BackendChoice::Kernel,
        Some(Backend::Userspace) => BackendChoice::Userspace,
        None => living.backend,
    };
    plan::diff(living, &wanted, backend).map(drop).map_err(|reasons| {
        let name = &loaded.config.name;
        Failure::new(format!("this cannot be changed while the tunnel is up: {}", reasons.join("; ")))
            .advise(format!("take it down with `vpn-exec down {name}`, and up again"))
    })
}

/// The same, of the tunnel that is up, if there is one.
pub(super) fn require_living_changeable(loaded: &Loaded) -> Result<(), Failure> {
    let name = &loaded.config.name;
    let (state, plan) = (state::read(name).map_err(Failure::new)?, state::read_plan(name).map_err(Failure::new)?);
    match (state, plan) {
        (Some(state), Some(plan)) if state.made.is_some() => require_changeable(loaded, &state, &plan),
        _ => Ok(()),
    }
}

fn mission(
    loaded: Box<Loaded>,
    directory: Directory,
    plan: Plan,
    beginning: Beginning,
    listen_fds: i32,
) -> Result<Mission, Failure> {
    let handover = match loaded.handover().seal() {
        Ok(handover) => handover,
        Err(error) => {
            if matches!(beginning, Beginning::Nothing) {
                let _ = directory.release();
            }
            return Err(Failure::new(format!("cannot make a file in memory: {error}")));
        }
    };
    // Its file is wiped here, before there is a fork that has it too.
    let Loaded { config, options, .. } = *loaded;
    Ok(Mission { plan, directory, config, options, handover, beginning, listen_fds, reload: None })
}

impl Held {
    /// Has the keeper of a tunnel that was taken over make it what the configuration says now.
    pub(super) fn bring_up_to_date(&mut self) -> Result<(), Failure> {
        if let Some(handover) = self.lease.handover().filter(|_| self.is_taken_over) {
            let changed = lease::reload(&self.plan.name, Some(handover))?;
            tracing::debug!(?changed, "the tunnel that was taken over is up to date");
        }
        Ok(())
    }
}

/// Refuses early what cannot work, before anything is touched.
pub(super) fn require_privileges() -> Result<(), Failure> {
    let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN | CapabilitySet::SETPCAP;
    match capabilities::permitted() {
        Ok(permitted) if permitted.contains(needed) => Ok(()),
        Ok(_) => Err(Failure::new(
            "this takes root, or CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_SETPCAP, which this process lacks",
        )
        .advise("run it as root: `sudo vpn-exec …`; a program still runs as you, without privileges")),
        Err(error) => Err(Failure::new(format!("cannot read the capabilities: {error}"))),
    }
}

impl Held {
    /// Refuses what a program may not do in a tunnel that was made before, and warns of what it may.
    pub(super) fn admit(&self, program: &config::ProgramOptions, last_capability: u8) -> Result<(), Failure> {
        // A tunnel that is made for this program is planned for it.
        if self.is_made || self.is_taken_over {
            for note in plan::join(&self.plan, program, last_capability).map_err(Failure::new)? {
                tracing::warn!("{note}");
            }
        }
        Ok(())
    }
}

impl From<ApproachError> for Failure {
    fn from(error: ApproachError) -> Self {
        let failure = Failure::new(&error);
        match error {
            ApproachError::Claim(ClaimError { error, .. }) if error.kind() == std::io::ErrorKind::NotADirectory => {
                failure.advise("move away what is there: it has to be a directory")
            }
            ApproachError::Claim(_) => failure.advise("/run must be there and writable for root"),
            ApproachError::Unreachable { .. } => failure.advise("wait a moment; if it stays so, end that process"),
            ApproachError::Join { .. } => failure,
        }
    }
}

impl From<AskError> for Failure {
    fn from(error: AskError) -> Self {
        match error {
            AskError::Absent(name) => {
                Failure::new(format!("the tunnel {name} is not up")).advise("see `vpn-exec list`")
            }
            AskError::Refused { reason, advice } => Failure { advice, ..Failure::new(reason) },
            AskError::System(_) => Failure::new(error),
        }
    }
}
