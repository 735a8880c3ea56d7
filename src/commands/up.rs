//! `vpn-exec up`: a standing tunnel.

use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use super::run;
use crate::cli::{TargetArgs, UpArgs};
use crate::failure::Failure;
use crate::keeper;
use crate::lease::{self, AskError, Event, Lease};
use crate::linux::capabilities;
use crate::linux::poll::wait_for;
use crate::linux::process;
use crate::registry::Directory;
use crate::request::{self, Loaded};
use crate::session::approach::{Approach, approach};
use crate::session::recovery;
use crate::session::{self, Session};

pub(super) fn run(arguments: &UpArgs) -> Result<ExitCode, Failure> {
    let loaded = Box::new(request::load_target(&arguments.target)?);
    session::require_privileges()?;
    process::set_umask(0o022);
    let needed = keeper::needed_capabilities()
        | keeper::capabilities_for_ports(loaded.config.listened_ports())
        | capabilities::CapabilitySet::SETPCAP;
    capabilities::limit(needed, needed).map_err(|error| Failure::new(format!("cannot drop privileges: {error}")))?;
    let wait = arguments.wait.map(|seconds| Duration::from_secs(seconds.into())).or(loaded.wait);
    let replaced = if arguments.replace { replace(&loaded)? } else { None };
    if arguments.foreground { stay(arguments, loaded, replaced, wait) } else { start(loaded, replaced, wait) }
}

/// Has the living keeper end, if there is one, and returns its claim.
fn replace(loaded: &Loaded) -> Result<Option<Directory>, Failure> {
    let name = &loaded.config.name;
    session::require_living_changeable(loaded)?;
    match lease::give_way(name) {
        Ok(claim) => {
            let directory = Directory::pass_on(name, claim);
            directory.map(Some).map_err(|error| Failure::new(format!("cannot take the tunnel {name} over: {error}")))
        }
        Err(AskError::Absent(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Is the keeper, until the end.
fn stay(
    arguments: &UpArgs,
    loaded: Box<Loaded>,
    replaced: Option<Directory>,
    wait: Option<Duration>,
) -> Result<ExitCode, Failure> {
    let name = &loaded.config.name.clone();
    let directory = match replaced {
        Some(directory) => directory,
        None => match approach(name)? {
            Approach::Claimed(directory) => directory,
            Approach::Joined(lease) => {
                let _ = lease.leave();
                return Err(Failure::new(format!("the tunnel {name} is up already, held by another process"))
                    .advise("put this one in its place with --replace, or take it down first with `vpn-exec down`"));
            }
        },
    };
    let (mut mission, _) = session::prepare(loaded, directory, 0)?;
    let again = TargetArgs::clone(&arguments.target);
    mission.reload =
        Some(Box::new(move || request::load_target(&again).map(|loaded| loaded.handover()).map_err(reasons)));
    keeper::run(mission, wait).inspect_err(|_| {
        // What it could not take away itself, if anything.
        let _ = recovery::clean_up(name);
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Starts a keeper, unless there is one, and has the tunnel stay.
fn start(loaded: Box<Loaded>, replaced: Option<Directory>, wait: Option<Duration>) -> Result<ExitCode, Failure> {
    let name = &loaded.config.name.clone();
    let mut held = match replaced {
        Some(directory) => session::start(loaded, directory, 0)?,
        None => session::hold(loaded, 0)?,
    };
    let up = await_tunnel(&mut held, wait).and_then(|()| Ok(held.lease.stand(name)?));
    let left = if up.is_ok() { held.lease.leave() } else { held.lease.abandon() };
    if let Err(error) = left {
        tracing::debug!(%error, "the keeper is gone");
        recovery::clean_up(name)?;
        up?;
        return Err(Failure::new("the tunnel's keeper was killed"));
    }
    up.map(|()| ExitCode::SUCCESS)
}

/// Waits until the tunnel is made and, if asked to, until it has its first handshake.
fn await_tunnel(held: &mut Session, wait: Option<Duration>) -> Result<(), Failure> {
    let mut made = held.is_made;
    let mut until = wait.map(|wait| Instant::now() + wait).filter(|_| made);
    loop {
        if made && wait.is_none() {
            return Ok(());
        }
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let hear = |lease: &mut Lease| match wait_for(&[lease.as_fd()], left)?.first() {
            Some(true) => lease.next_event().map(Some),
            _ => Ok(None),
        };
        let heard = hear(&mut held.lease);
        match heard.map_err(|error| Failure::new(format!("cannot hear the keeper: {error}")))? {
            Some(Some(Event::Made)) => {
                held.bring_up_to_date()?;
                made = true;
                until = wait.map(|wait| Instant::now() + wait);
            }
            Some(Some(Event::Connected)) => return Ok(()),
            Some(Some(Event::Failed { reason, advice })) => {
                return Err(Failure { advice, ..Failure::new(reason) });
            }
            Some(Some(Event::Gone) | None) => return Err(Failure::new("the tunnel's keeper was killed")),
            Some(Some(_)) => {}
            None if until.is_some_and(|until| Instant::now() >= until) => {
                return Err(run::no_handshake(&held.plan.name, wait.unwrap_or_default()));
            }
            None => {}
        }
    }
}

/// A failure as a keeper's reason to refuse, and what to do about it.
fn reasons(failure: Failure) -> (String, Option<String>) {
    (failure.message, failure.advice)
}
