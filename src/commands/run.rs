//! `vpn-exec -- PROGRAM`: a tunnel for the length of one program.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use super::{FAILED, Failure, load};
use crate::cli::RunArgs;
use crate::config::capability;
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::process;
use crate::linux::signals::{self, Signals};
use crate::names::TunnelName;
use crate::program::identity;
use crate::program::{self, Ended, Program, ProgramError, WATCHED};
use crate::tunnel;
use crate::tunnel::keeper::{self, Event, Lease, Mission};
use crate::tunnel::state::Directory;

pub(super) fn run(arguments: &RunArgs) -> Result<ExitCode, Failure> {
    if arguments.program.is_empty() {
        return Err(Failure::new("there is no program to run")
            .advise("it follows two dashes: vpn-exec --config FILE -- PROGRAM [ARG]..., and see --help"));
    }
    let loaded = load::load(&arguments.source, &arguments.tunnel)?;
    tracing::debug!("the configuration is read");
    let wait = arguments.wait.map(|seconds| Duration::from_secs(seconds.into())).or(loaded.wait);
    let options = &loaded.config.program;
    let identity = identity::choose(options.user.as_deref(), options.group.as_deref(), |name| std::env::var(name).ok())
        .map_err(Failure::new)?;

    require_privileges()?;
    let listen_fds = listen_fds();
    // What is made for the tunnel can be read by all, whatever the caller's mask. The program has that mask again.
    let umask = process::set_umask(0o022);
    // A name that is none is refused by the plan.
    let kept = options.capabilities.iter().filter_map(|name| capability::lookup(name));
    let kept = kept.fold(CapabilitySet::empty(), |all, (number, _)| all | capabilities::single(number));
    let needed = keeper::needed_capabilities() | program::needed_capabilities(&identity, kept);
    // Nothing of ours is open yet, so what is open was inherited, and is nobody's here.
    process::close(3 + listen_fds, i32::MAX)
        .and_then(|()| process::forbid_inspection())
        .and_then(|()| capabilities::limit(needed, needed))
        .map_err(|error| Failure::new(format!("cannot prepare this process: {error}")))?;
    let signals =
        Signals::block(&WATCHED).map_err(|error| Failure::new(format!("cannot watch for signals: {error}")))?;

    // The name is claimed before the plan is made: what a killed tunnel of this name has left is none of the host's facts.
    let directory = Directory::claim(&loaded.config.name).map_err(claim_failure)?;
    let planned = tunnel::reclaim(&directory, &loaded.config.name)
        .map_err(|error| Failure { advice: error.advice.clone(), ..Failure::new(error) })
        .and_then(|()| loaded.plan());
    let plan = match planned {
        Ok(plan) => plan,
        Err(failure) => {
            let _ = directory.release();
            return Err(failure);
        }
    };
    tracing::debug!("the tunnel is planned");
    for note in &plan.notes {
        tracing::warn!("{note}");
    }
    let last_capability = capabilities::last().map_err(|error| Failure::new(format!("cannot read /proc: {error}")))?;
    let program = Program {
        command: arguments.program.clone(),
        namespace: plan.namespace.clone(),
        staging: directory.path().to_owned(),
        names: plan.names.clone(),
        identity,
        kept,
        last_capability,
        new_privileges: !plan.privileges.no_new_privileges,
        kill_orphans: arguments.kill_orphans,
        listen_fds,
        umask,
    };
    let name = loaded.config.name.clone();
    let mission = Mission { plan, directory, wireguard: loaded.config.wireguard, listen_fds };
    let lease = keeper::start(mission).map_err(|error| Failure::new(format!("cannot start the keeper: {error}")))?;

    let failed = |error: ProgramError| Failure { status: error.exit_status(), ..Failure::new(error) };
    let ended = program::start(&program, &signals).map_err(failed).and_then(|mut waiting| {
        await_tunnel(&lease, wait, || waiting.enter())?;
        waiting.run(&lease, signals).map_err(failed)
    });
    tracing::debug!("the program has ended");
    if let Err(error) = lease.leave() {
        tracing::debug!(%error, "the keeper is gone, so this process takes the tunnel down");
        clean_up(&name)?;
    }
    tracing::debug!("the tunnel is gone");
    Ok(status_of(ended?))
}

/// Waits until the tunnel is made and, if asked to, until it has its first handshake. `on_named` is done as soon as the namespace
/// is there.
fn await_tunnel(lease: &Lease, wait: Option<Duration>, mut on_named: impl FnMut()) -> Result<(), Failure> {
    let next =
        |until| lease.next_event(until).map_err(|error| Failure::new(format!("cannot hear the keeper: {error}")));
    let ended = |event| match event {
        Some(Event::Failed { reason, advice }) => Failure { message: reason, advice, status: FAILED },
        _ => Failure::new("the tunnel's keeper was killed"),
    };
    loop {
        match next(None)? {
            Some(Event::Named) => on_named(),
            Some(Event::Made) => break,
            event => return Err(ended(event)),
        }
    }
    let Some(wait) = wait else { return Ok(()) };
    let until = Instant::now() + wait;
    match next(Some(until))? {
        Some(Event::Connected) => Ok(()),
        None if Instant::now() >= until => {
            Err(Failure::new(format!("no handshake with any peer within {} s", wait.as_secs())).advise(
                "check that the endpoint can be reached from here, and that the keys are those the provider knows; -v says what \
                 was tried",
            ))
        }
        event => Err(ended(event)),
    }
}

/// Takes down what a killed keeper has left.
fn clean_up(name: &TunnelName) -> Result<(), Failure> {
    capabilities::raise(keeper::needed_capabilities())
        .map_err(|error| Failure::new(format!("cannot raise privileges: {error}")))?;
    let directory = Directory::claim(name).map_err(claim_failure)?;
    let reclaimed = tunnel::reclaim(&directory, name).map_err(Failure::new);
    reclaimed.and(directory.release().map_err(Failure::new))
}

/// Refuses early what cannot work, before anything is touched.
fn require_privileges() -> Result<(), Failure> {
    let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN;
    match capabilities::permitted() {
        Ok(permitted) if permitted.contains(needed) => Ok(()),
        Ok(_) => Err(Failure::new(
            "making a network namespace needs CAP_SYS_ADMIN and CAP_NET_ADMIN, which this process lacks",
        )
        .advise("run it as root: `sudo vpn-exec …`; the program itself then runs as you, without privileges")),
        Err(error) => Err(Failure::new(format!("cannot read the capabilities: {error}"))),
    }
}

/// How many descriptors were passed to this very process (sd_listen_fds(3)).
fn listen_fds() -> i32 {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<i32>().ok());
    match (number("LISTEN_PID"), number("LISTEN_FDS")) {
        (Some(pid), Some(count)) if pid.cast_unsigned() == std::process::id() && (0..=1024).contains(&count) => count,
        _ => 0,
    }
}

fn claim_failure(error: tunnel::state::ClaimError) -> Failure {
    let failure = Failure::new(&error);
    match error {
        tunnel::state::ClaimError::InUse { .. } => failure
            .advise("this version runs one program in a tunnel: give this one a tunnel of its own with --name NAME"),
        tunnel::state::ClaimError::System { .. } => failure.advise("/run must be there and writable for root"),
    }
}

/// Ends as the program has ended.
fn status_of(ended: Ended) -> ExitCode {
    match ended {
        Ended::Exited(status) => ExitCode::from(u8::try_from(status).unwrap_or(FAILED)),
        Ended::Signaled(signal) => {
            if let Err(error) = signals::die_by(signal) {
                tracing::debug!(%error, "this process cannot end by the program's signal");
            }
            ExitCode::from(128_u8.wrapping_add(signal as u8))
        }
    }
}
