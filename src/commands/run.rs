//! `vpn-exec -- PROGRAM`: a tunnel for the length of one program.

use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::{FAILED, Failure, load};
use crate::cli::RunArgs;
use crate::config::capability;
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::poll::wait_for;
use crate::linux::process;
use crate::linux::signals::{self, Received, Signals};
use crate::names::TunnelName;
use crate::program::identity;
use crate::program::{self, Ended, Program, WATCHED, Waiting};
use crate::tunnel;
use crate::tunnel::keeper::{self, Mission};
use crate::tunnel::lease::{Event, Lease};
use crate::tunnel::state::Directory;

pub(super) fn run(arguments: &RunArgs) -> Result<ExitCode, Failure> {
    if arguments.program.is_empty() {
        return Err(Failure::new("there is no program to run")
            .advise("it follows two dashes: vpn-exec --config FILE -- PROGRAM [ARG]..., and see --help"));
    }
    let loaded = load::load(&arguments.source, &arguments.tunnel)?;
    tracing::debug!("the configuration is read");
    let listen_fds = listen_fds()?;
    // Nothing of ours is open yet, so what is open was inherited, and is nobody's here.
    process::close(3 + listen_fds, i32::MAX)
        .map_err(|error| Failure::new(format!("cannot close inherited descriptors: {error}")))?;
    let wait = arguments.wait.map(|seconds| Duration::from_secs(seconds.into())).or(loaded.wait);
    let options = &loaded.config.program;
    let identity =
        identity::choose(options.user.as_deref(), options.group.as_deref(), environment).map_err(Failure::new)?;

    require_privileges()?;
    let last_capability = capabilities::last().map_err(|error| Failure::new(format!("cannot read /proc: {error}")))?;
    // What is made for the tunnel can be read by all, whatever the caller's mask. The program has that mask again.
    let umask = process::set_umask(0o022);
    // A name that is none is refused by the plan.
    let kept = options.capabilities.iter().filter_map(|name| capability::lookup(name));
    let kept = kept.fold(CapabilitySet::empty(), |all, (number, _)| all | capabilities::single(number));
    let needed = keeper::needed_capabilities()
        | keeper::capabilities_for_port(loaded.config.wireguard.interface.listen_port)
        | program::needed_capabilities(&identity, kept);
    capabilities::limit(needed, needed).map_err(|error| Failure::new(format!("cannot drop privileges: {error}")))?;
    let mut signals =
        Signals::block(&WATCHED).map_err(|error| Failure::new(format!("cannot watch for signals: {error}")))?;

    // The name is claimed before the plan is made: what a killed tunnel of this name has left is none of the host's facts.
    let directory = Directory::claim(&loaded.config.name).map_err(claim_failure)?;
    if let Err(error) = tunnel::reclaim(&directory, &loaded.config.name) {
        // What is written down there must stay for the next start.
        if matches!(directory.state(), Ok(None)) {
            let _ = directory.release();
        }
        return Err(error.into());
    }
    let plan = match loaded.plan() {
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

    let ended = program::start(&program, &signals).map_err(Failure::from).and_then(|mut waiting| {
        match await_tunnel(&lease, &mut signals, wait, &mut waiting)? {
            Some(signal) => Ok(Ended::Signaled(signal as i32)),
            None => Ok(waiting.run(&lease, signals)?),
        }
    });
    tracing::debug!("the program has ended");
    // After a failure nobody knows what still runs.
    let left = if ended.is_ok() { lease.leave() } else { lease.abandon() };
    if let Err(error) = left {
        tracing::debug!(%error, "the keeper is gone, so this process takes the tunnel down");
        clean_up(&name)?;
    }
    tracing::debug!("the tunnel is gone");
    Ok(status_of(ended?))
}

/// Waits until the tunnel is made and, if asked to, until it has its first handshake. The program's process enters the
/// namespace as soon as that is there; if it cannot, there is nothing to wait for. Returns the signal that ended the wait, if one did: there is no program yet that could take it.
fn await_tunnel(
    lease: &Lease,
    signals: &mut Signals,
    wait: Option<Duration>,
    waiting: &mut Waiting<'_>,
) -> Result<Option<Signal>, Failure> {
    let mut until = None;
    loop {
        if let Some(signal) =
            interruption(signals).map_err(|error| Failure::new(format!("cannot read signals: {error}")))?
        {
            return Ok(Some(signal));
        }
        let left = until.map(|until: Instant| until.saturating_duration_since(Instant::now()));
        // Before the tunnel is made, a process that cannot enter it may only be the first to see that the keeper has failed, which
        // then says why.
        let watched = [lease.as_fd(), signals.as_fd(), waiting.failure()];
        let ready = wait_for(if until.is_some() { &watched } else { &watched[..2] }, left);
        if matches!(ready.as_deref(), Ok([false, _, true])) {
            return Ok(None);
        }
        let heard = ready.and_then(|ready| if ready[0] { lease.next_event().map(Some) } else { Ok(None) });
        match heard.map_err(|error| Failure::new(format!("cannot hear the keeper: {error}")))? {
            Some(Some(Event::Named)) => waiting.enter(),
            Some(Some(Event::Made)) => match wait {
                Some(wait) => until = Some(Instant::now() + wait),
                // What was sent until now was for the program, which is not there to have it.
                None => return interruption(signals).map_err(Failure::new),
            },
            Some(Some(Event::Connected)) => return interruption(signals).map_err(Failure::new),
            Some(Some(Event::Failed { reason, advice })) => {
                return Err(Failure { message: reason, advice, status: FAILED });
            }
            Some(Some(Event::Gone) | None) => return Err(Failure::new("the tunnel's keeper was killed")),
            None if until.is_some_and(|until| Instant::now() >= until) => {
                let seconds = wait.unwrap_or_default().as_secs();
                return Err(Failure::new(format!("no handshake with any peer within {seconds} s")).advise(
                    "check that the endpoint can be reached from here, and that the keys are those the provider knows; -v says \
                     what was tried",
                ));
            }
            None => {}
        }
    }
}

/// Does what the signals that have arrived do to a program by default, but for ending it: that is left to the caller.
fn interruption(signals: &mut Signals) -> std::io::Result<Option<Signal>> {
    while let Some(Received { signal, .. }) = signals.receive()? {
        match signal {
            Signal::SIGCHLD | Signal::SIGWINCH | Signal::SIGCONT => {}
            _ if signals::is_ignored(signal)? => {}
            Signal::SIGTSTP => signals::stop()?,
            _ => return Ok(Some(signal)),
        }
    }
    Ok(None)
}

/// Takes down what a killed keeper has left.
fn clean_up(name: &TunnelName) -> Result<(), Failure> {
    capabilities::raise(keeper::needed_capabilities())
        .map_err(|error| Failure::new(format!("cannot raise privileges: {error}")))?;
    let directory = Directory::claim(name).map_err(claim_failure)?;
    // What is written down is released only once all of it is gone.
    tunnel::reclaim(&directory, name)?;
    directory.release().map_err(Failure::new)
}

/// A variable of the environment. What is no UTF-8 names nobody, and is refused as such: it must not be taken for missing.
fn environment(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

/// Refuses early what cannot work, before anything is touched.
fn require_privileges() -> Result<(), Failure> {
    let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN | CapabilitySet::SETPCAP;
    match capabilities::permitted() {
        Ok(permitted) if permitted.contains(needed) => Ok(()),
        Ok(_) => Err(Failure::new(
            "making a network namespace, and leaving the program no way to privileges, needs CAP_SYS_ADMIN, CAP_NET_ADMIN and \
             CAP_SETPCAP, which this process lacks",
        )
        .advise("run it as root: `sudo vpn-exec …`; the program itself then runs as you, without privileges")),
        Err(error) => Err(Failure::new(format!("cannot read the capabilities: {error}"))),
    }
}

/// How many descriptors were passed to this very process (sd_listen_fds(3)).
fn listen_fds() -> Result<i32, Failure> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<i32>().ok());
    let count = match (number("LISTEN_PID"), number("LISTEN_FDS")) {
        (Some(pid), Some(count)) if pid.cast_unsigned() == std::process::id() && (0..=1024).contains(&count) => count,
        _ => return Ok(0),
    };
    // One that is not open would become one of ours, and pass on to the program.
    match (3..3 + count).find(|descriptor| !process::is_open(*descriptor)) {
        Some(missing) => Err(Failure::new(format!("LISTEN_FDS is {count}, but the descriptor {missing} is not open"))),
        None => Ok(count),
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
            ExitCode::from(u8::try_from(128 + signal).unwrap_or(FAILED))
        }
    }
}
