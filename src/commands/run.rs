//! `vpn-exec -- PROGRAM`: runs a program in a tunnel: a standing one, that of others, or one for as long as it is used.

use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::held::{self, Held};
use super::load::{self, Loaded};
use super::{FAILED, Failure};
use crate::cli::RunArgs;
use crate::config::{ProgramOptions, Protocol, capability};
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::poll::wait_for;
use crate::linux::process;
use crate::linux::signals::{self, Signals};
use crate::names::TunnelName;
use crate::plan;
use crate::program::identity::{self, Identity};
use crate::program::refused;
use crate::program::terminal::{self, Side};
use crate::program::{self, Ended, Program, Waiting};
use crate::tunnel::lease::Event;
use crate::tunnel::{fault, keeper, recovery, state, status};

pub(super) fn run(arguments: &RunArgs) -> Result<ExitCode, Failure> {
    if arguments.program.is_empty() {
        return Err(Failure::new("there is no program to run")
            .advise("it follows two dashes: vpn-exec --config FILE -- PROGRAM [ARG]..., and see --help"));
    }
    let wanted = Wanted::read(arguments)?;
    tracing::debug!("the configuration is read");
    let listen_fds = listen_fds()?;
    // Nothing of ours is open yet, so what is open was inherited, and is nobody's here.
    if !fault::is_broken("descriptors") {
        process::close(3 + listen_fds, i32::MAX)
            .map_err(|error| Failure::new(format!("cannot close inherited descriptors: {error}")))?;
    }
    let wait = arguments.wait.map(|seconds| Duration::from_secs(seconds.into())).or(wanted.wait());
    let options = wanted.program().clone();
    let identity =
        identity::choose(options.user.as_deref(), options.group.as_deref(), environment).map_err(Failure::new)?;

    held::require_privileges()?;
    let mut wanted = Some(wanted);
    let terminal = match arguments.pty || terminal::is_lent(&identity) {
        false => None,
        true => match terminal::replace(&identity, listen_fds, || drop(wanted.take())).map_err(no_terminal)? {
            Side::Caller(ended) => return Ok(status_of(ended)),
            Side::Launcher(own) => Some(own),
        },
    };
    let Some(wanted) = wanted else { return Err(Failure::new("cannot go on without a configuration")) };
    let last_capability = capabilities::last().map_err(|error| Failure::new(format!("cannot read /proc: {error}")))?;
    // What is made for the tunnel can be read by all, whatever the caller's mask. The program has that mask again.
    let umask = process::set_umask(0o022);
    // A name that is none is refused by the plan.
    let kept = options.capabilities.iter().filter_map(|name| capability::lookup(name));
    let kept = kept.fold(CapabilitySet::empty(), |all, (number, _)| all | capabilities::single(number));
    let needed =
        keeper::needed_capabilities() | wanted.capabilities_for_ports() | program::needed_capabilities(&identity, kept);
    capabilities::limit(needed, needed).map_err(|error| Failure::new(format!("cannot drop privileges: {error}")))?;
    let mut signals = Signals::block(program::watched())
        .map_err(|error| Failure::new(format!("cannot watch for signals: {error}")))?;

    let is_root = match &identity {
        Identity::Other(account) => account.uid == 0,
        Identity::Unchanged => nix::unistd::geteuid().is_root(),
    };
    let variable = |name: &str| std::env::var_os(name);
    if let Some(advice) = refused::advice(&arguments.program, options.new_privileges, is_root, variable) {
        tracing::warn!("{advice}");
    }
    let has_port = |port| wanted.has_host_port(port);
    if let Some(advice) = refused::display_advice(environment("DISPLAY").as_deref(), has_port) {
        tracing::warn!("{advice}");
    }
    let mut held = wanted.hold(listen_fds)?;
    let name = held.plan.name.clone();
    let program = Program {
        command: arguments.program.clone(),
        namespace: held.plan.namespace.clone(),
        resolv_conf: state::resolv_conf_of(&name),
        staging: state::path_of(&name),
        names: held.plan.dns.clone(),
        sockets: plan::host_sockets::for_program(&options, environment),
        buses: options.buses.clone(),
        hidden: plan::hidden_paths(options.buses.system),
        identity,
        kept,
        last_capability,
        new_privileges: options.new_privileges,
        kill_orphans: arguments.kill_orphans,
        listen_fds,
        umask,
        terminal,
        is_connected: wait.is_some(),
        keeper_gains: keeper::gained_by_hooks(held.plan.hooks.iter().any(|hook| hook.run)),
    };
    let ended = held
        .admit(&options, last_capability)
        .and_then(|()| program::start(&program, &mut signals).map_err(Failure::from))
        .and_then(|mut waiting| match await_tunnel(&mut held, &mut signals, wait, &mut waiting)? {
            Some(signal) => Ok(Ended::Signaled(signal)),
            None => Ok(waiting.run(&name, &mut held.lease, signals)?),
        });
    tracing::debug!("the program has ended");
    // After a failure nobody knows what still runs.
    let left = if ended.is_ok() { held.lease.leave() } else { held.lease.abandon() };
    if let Err(error) = left {
        tracing::debug!(%error, "the keeper is gone, so this process takes the tunnel down");
        recovery::clean_up(&name)?;
    }
    tracing::debug!("the tunnel is left");
    Ok(status_of(ended?))
}

/// Which tunnel is wanted.
enum Wanted {
    /// The one that a configuration describes.
    Configured(Box<Loaded>),
    /// A living one that nothing else is known of.
    Named(TunnelName, ProgramOptions),
}

impl Wanted {
    fn read(arguments: &RunArgs) -> Result<Self, Failure> {
        if let (None, Some(name), None) = (&arguments.source.config, &arguments.source.tunnel, &arguments.source.name)
            && !load::can_load(name)
            && state::read(name).is_ok_and(|state| state.is_some())
        {
            load::refuse_overrides(&arguments.tunnel)?;
            let program = load::load_program(name, &arguments.identity)?;
            return Ok(Self::Named(name.clone(), program));
        }
        let loaded = load::load(&arguments.source, &arguments.tunnel, &arguments.identity)?;
        Ok(Self::Configured(Box::new(loaded)))
    }

    fn wait(&self) -> Option<Duration> {
        match self {
            Self::Configured(loaded) => loaded.wait,
            Self::Named(..) => None,
        }
    }

    fn program(&self) -> &ProgramOptions {
        match self {
            Self::Configured(loaded) => &loaded.config.program,
            Self::Named(_, program) => program,
        }
    }

    /// Whether a TCP port of the host's loopback is opened to the program, as far as that is known.
    fn has_host_port(&self, port: u16) -> bool {
        match self {
            Self::Configured(loaded) => {
                loaded.config.local.host_ports.iter().any(|open| open.port == port && open.protocol == Protocol::Tcp)
            }
            Self::Named(..) => false,
        }
    }

    fn capabilities_for_ports(&self) -> CapabilitySet {
        match self {
            Self::Configured(loaded) => keeper::capabilities_for_ports(loaded.config.listened_ports()),
            // What it is made of is not known yet, and may be this process's to make again one day.
            Self::Named(..) => CapabilitySet::NET_BIND_SERVICE,
        }
    }

    /// Gets hold of it. The keys are not in this process any more when this returns.
    fn hold(self, listen_fds: i32) -> Result<Held, Failure> {
        match self {
            Self::Configured(loaded) => held::hold(loaded, listen_fds),
            Self::Named(name, _) => held::hold_by_name(&name)?.ok_or_else(|| {
                Failure::new(format!(
                    "the keeper of the tunnel {name} was killed, and its configuration is not known here"
                ))
                .advise(format!("start it again with `vpn-exec up FILE --name {name}`"))
            }),
        }
    }
}

/// Waits until the tunnel is made and, if asked to, until it has its first handshake. The program's process enters the
/// namespace as soon as that is there; if it cannot, there is nothing to wait for. Returns the signal that ended the wait, if one did: there is no program yet that could take it.
fn await_tunnel(
    held: &mut Held,
    signals: &mut Signals,
    wait: Option<Duration>,
    waiting: &mut Waiting<'_>,
) -> Result<Option<i32>, Failure> {
    let system = |error| Failure::new(format!("cannot read signals: {error}"));
    let mut until = None;
    if held.is_made {
        waiting.enter();
        match wait {
            None => return interruption(signals).map_err(system),
            Some(wait) => until = Some(Instant::now() + wait),
        }
    }
    loop {
        if let Some(signal) = interruption(signals).map_err(system)? {
            return Ok(Some(signal));
        }
        let left = until.map(|until: Instant| until.saturating_duration_since(Instant::now()));
        // Before the tunnel is made, a process that cannot enter it may only be the first to see that the keeper has failed, which
        // then says why.
        let watched = [held.lease.as_fd(), signals.as_fd(), waiting.failure()];
        let ready = wait_for(if until.is_some() { &watched } else { &watched[..2] }, left);
        if matches!(ready.as_deref(), Ok([false, _, true])) {
            return Ok(None);
        }
        let heard = ready.and_then(|ready| if ready[0] { held.lease.next_event().map(Some) } else { Ok(None) });
        match heard.map_err(|error| Failure::new(format!("cannot hear the keeper: {error}")))? {
            Some(Some(Event::Named)) => waiting.enter(),
            Some(Some(Event::Made)) => {
                held.bring_up_to_date()?;
                match wait {
                    Some(wait) => until = Some(Instant::now() + wait),
                    // What was sent until now was for the program, which is not there to have it.
                    None => return interruption(signals).map_err(system),
                }
            }
            Some(Some(Event::Connected)) => return interruption(signals).map_err(system),
            Some(Some(Event::Failed { reason, advice })) => {
                return Err(Failure { message: reason, advice, status: FAILED });
            }
            Some(Some(Event::Gone) | None) => return Err(Failure::new("the tunnel's keeper was killed")),
            None if until.is_some_and(|until| Instant::now() >= until) => {
                return Err(no_handshake(&held.plan.name, wait.unwrap_or_default()));
            }
            Some(Some(_)) | None => {}
        }
    }
}

/// The failure of a tunnel to which no peer answers, with what its keeper knows of the reason.
pub(super) fn no_handshake(name: &TunnelName, waited: Duration) -> Failure {
    let what = format!("no handshake with any peer within {} s", waited.as_secs());
    let living = status::of(name).ok().flatten().and_then(|status| status.living);
    let unresolved = living.as_ref().and_then(|living| {
        let peer = living.peers.iter().find(|peer| peer.endpoint.is_none() && peer.configured_endpoint.is_some())?;
        peer.configured_endpoint.as_ref().map(|endpoint| format!("the endpoint {endpoint} is not resolved yet"))
    });
    match living.and_then(|living| living.problem).or(unresolved) {
        Some(problem) => Failure::new(format!("{what}: {problem}"))
            .advise("check the endpoint's name in the file, and that this machine can look names up"),
        None => Failure::new(what).advise(
            "check that the endpoint can be reached from here, and that the keys are those the provider knows; -v says what was tried",
        ),
    }
}

/// Does what the signals that have arrived do to a program by default, but for ending it: that is left to the caller.
fn interruption(signals: &mut Signals) -> std::io::Result<Option<i32>> {
    while let Some(received) = signals.receive()? {
        let is_harmless =
            [Signal::SIGCHLD, Signal::SIGWINCH, Signal::SIGCONT].iter().any(|signal| received.is(*signal));
        if is_harmless || signals::is_ignored(received.number)? {
            continue;
        }
        if !received.is(Signal::SIGTSTP) {
            return Ok(Some(received.number));
        }
        signals::stop()?;
    }
    Ok(None)
}

/// A variable of the environment. What is no UTF-8 names nobody, and is refused as such: it must not be taken for missing.
fn environment(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
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

/// The failure of a terminal that was to be made for the program.
fn no_terminal(error: std::io::Error) -> Failure {
    match error.raw_os_error() {
        Some(libc::ENOTTY) => Failure::new("cannot replace the terminal (--pty): there is none")
            .advise("leave out --pty, or run vpn-exec in a terminal"),
        _ => Failure::new(format!("cannot make a terminal for the program: {error}"))
            .advise("mount devpts at /dev/pts, or start vpn-exec without a terminal: `setsid vpn-exec … </dev/null`"),
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
