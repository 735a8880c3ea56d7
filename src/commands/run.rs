//! `vpn-exec [NAME|FILE] -- PROGRAM`: runs a program in a tunnel.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::cli::LaunchArgs;
use crate::config::{ProgramOptions, capability};
use crate::failure::{Doing, FAILED, Failure};
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::process;
use crate::linux::signals::{self, Signals};
use crate::plan;
use crate::program::compatibility;
use crate::program::identity::{self, Identity};
use crate::program::terminal::{self, OwnTerminal, Replaced};
use crate::program::{self, Launch, Program, ProgramOutcome, Remainder};
use crate::registry::Scope;
use crate::request::RunRequest;
use crate::session::{self, Origin, Progress, Session};
use crate::{fault, keeper, registry};

/// The directory at which a user's program builds its copies. It must be the root of no mount that the user's namespace
/// has inherited together with others below it, as `/run` often is (mount_namespaces(7)).
const STAGING: &str = "/tmp";

/// Runs a program in a tunnel. `command` returns the program and its arguments for its identity.
pub(super) fn run(
    arguments: &LaunchArgs,
    command: impl FnOnce(&Identity) -> Vec<OsString>,
) -> Result<ExitCode, Failure> {
    let request = RunRequest::read(arguments)?;
    let listen_fds = take_passed_descriptors()?;
    let identity = choose_identity(&request.program)?;
    let command = command(&identity);
    session::require_privileges()?;
    let (request, terminal) = match replace_terminal(request, &identity, listen_fds)? {
        AtTerminal::Caller(outcome) => return Ok(end_as(outcome)),
        AtTerminal::Launcher(request, terminal) => (request, terminal),
    };
    let RunRequest { tunnel, program: options, wait, .. } = *request;
    let kept = kept_capabilities(&options);
    let needed = session::needed_capabilities(&tunnel) | program::needed_capabilities(&identity, kept);
    let privileges = session::Privileges::limit(needed)?;
    warn_of_incompatibility(&command, &options, &identity, |port| tunnel.has_host_port(port));
    // All users can read the files made for the tunnel, whatever the caller's mask. The program gets that mask back.
    let umask = process::set_umask(0o022);
    let signals = Signals::block(program::forwarded_signals()).doing("watch for signals")?;
    if Scope::current() == Scope::User {
        require_staging(STAGING.as_ref())?;
    }
    let mut session = session::acquire_requested(tunnel, listen_fds, &privileges)?;
    let program = Program {
        command,
        tunnel: session.plan.name.clone(),
        namespace: session.plan.namespace.clone(),
        resolv_conf: registry::resolv_conf_of(&session.plan.name),
        staging: if session.plan.rootless { STAGING.into() } else { registry::path_of(&session.plan.name) },
        names: session.plan.dns.clone(),
        sockets: plan::host_sockets::for_program(&options, environment),
        buses: options.buses.clone(),
        hidden: plan::hidden_paths(options.buses.system),
        emptied: if session.plan.rootless { registry::user_directories() } else { Vec::new() },
        joins: session.origin == Origin::Joined,
        identity,
        kept,
        last_capability: capabilities::last().doing("read /proc")?,
        new_privileges: options.new_privileges,
        kill_orphans: arguments.kill_orphans,
        listen_fds,
        umask,
        terminal,
        awaits_handshake: wait.is_some(),
        keeper_bounding_set: keeper::gained_by_hooks(session.plan.hooks.iter().any(|hook| hook.run)),
    };
    let ended = run_program(&program, &options, &mut session, signals, wait);
    session.end(ended.is_ok())?;
    let (outcome, remainder) = ended?;
    drop(remainder);
    Ok(end_as(outcome))
}

/// Checks for the directory at which a user's program builds its copies, before anything is made.
fn require_staging(directory: &Path) -> Result<(), Failure> {
    if directory.is_dir() {
        return Ok(());
    }
    let shown = directory.display();
    Err(Failure::new(format!("cannot build the program's copies of /etc and /run: {shown} is not a directory"))
        .advise(format!("make it as root: `install -d -m 1777 {shown}`")))
}

/// The two processes after the caller's terminal was replaced; only the launcher if it was not.
enum AtTerminal {
    /// The process at the caller's terminal, whose launcher has ended.
    Caller(ProgramOutcome),
    /// The launcher, with the program's own terminal if it has one.
    Launcher(Box<RunRequest>, Option<OwnTerminal>),
}

/// Gives the program a terminal of its own if the caller asks for it, or if the caller's terminal belongs to another
/// user.
fn replace_terminal(request: RunRequest, identity: &Identity, listen_fds: i32) -> Result<AtTerminal, Failure> {
    let mut request = Some(Box::new(request));
    let is_needed = request.as_ref().is_some_and(|request| request.pty) || terminal::is_lent(identity);
    let terminal = match is_needed {
        false => None,
        // The process at the caller's terminal keeps no keys.
        true => match terminal::replace(identity, listen_fds, || drop(request.take())).map_err(no_terminal)? {
            Replaced::Caller(outcome) => return Ok(AtTerminal::Caller(outcome)),
            Replaced::Launcher(terminal) => Some(terminal),
        },
    };
    match request {
        Some(request) => Ok(AtTerminal::Launcher(request, terminal)),
        None => Err(Failure::new("cannot continue without a configuration")),
    }
}

/// Runs the program once its tunnel is ready, and waits for its end.
fn run_program(
    program: &Program,
    options: &ProgramOptions,
    session: &mut Session,
    mut signals: Signals,
    wait: Option<Duration>,
) -> Result<(ProgramOutcome, Remainder), Failure> {
    session.admit(options, program.last_capability)?;
    let mut launch = program::start(program, &session.lease, &mut signals)?;
    if let Some(signal) = await_tunnel(session, &mut launch, &mut signals, wait)? {
        return Ok((ProgramOutcome::Signaled(signal), Remainder::default()));
    }
    let ended = launch.run(&session.plan.name, &mut session.lease, signals)?;
    tracing::debug!("the program has ended");
    Ok(ended)
}

/// Waits until the tunnel is ready, and lets the program's process enter the namespace as soon as that exists. Returns
/// the signal that ended the wait, if any: there is no program yet to forward it to.
fn await_tunnel(
    session: &mut Session,
    launch: &mut Launch<'_>,
    signals: &mut Signals,
    wait: Option<Duration>,
) -> Result<Option<i32>, Failure> {
    let mut readiness = session.readiness(wait);
    if readiness.is_made() {
        launch.enter(session.lease.namespace());
    }
    loop {
        if let Some(signal) = take_signal(signals).doing("read signals")? {
            return Ok(Some(signal));
        }
        // Until the tunnel is made, a process that cannot enter it may only be the first to notice that the keeper has
        // failed, whose reason is the better one.
        let is_failure_final = readiness.is_made();
        let watched = [signals.as_fd(), launch.failure()];
        match session.advance(&mut readiness, &watched[..1 + usize::from(is_failure_final)])? {
            Progress::Ready => return take_signal(signals).doing("read signals"),
            Progress::Named => launch.enter(session.lease.namespace()),
            Progress::Other if is_failure_final && launch.has_failed().doing("watch the program's process")? => {
                return Ok(None);
            }
            _ => {}
        }
    }
}

/// Applies the default action of the pending signals to this process, except for those that end it: returns the first
/// of these.
fn take_signal(signals: &mut Signals) -> std::io::Result<Option<i32>> {
    while let Some(received) = signals.receive()? {
        let is_harmless =
            [Signal::SIGCHLD, Signal::SIGWINCH, Signal::SIGCONT].iter().any(|signal| received.is(*signal));
        if is_harmless || signals::is_ignored(received.number)? {
            continue;
        }
        if !received.is(Signal::SIGTSTP) {
            return Ok(Some(received.number));
        }
        signals::stop_self()?;
    }
    Ok(None)
}

/// Returns the user and group that the program is to run as.
fn choose_identity(options: &ProgramOptions) -> Result<Identity, Failure> {
    // A user namespace has one user. Plans refuse the choice of another.
    if Scope::current() == Scope::User {
        return Ok(Identity::Unchanged);
    }
    identity::choose(options.user.as_deref(), options.group.as_deref(), environment)
}

/// Returns the capabilities that the program keeps. The plan has refused unknown names.
fn kept_capabilities(options: &ProgramOptions) -> CapabilitySet {
    let known = options.capabilities.iter().filter_map(|name| capability::lookup(name));
    known.fold(CapabilitySet::empty(), |all, (number, _)| all | capabilities::from_number(number))
}

/// Logs advice about programs and displays that are known not to work in a tunnel as they are called.
fn warn_of_incompatibility(
    command: &[OsString],
    options: &ProgramOptions,
    identity: &Identity,
    has_host_port: impl Fn(u16) -> bool,
) {
    let is_root = match identity {
        Identity::Other(account) => account.uid == 0,
        Identity::Unchanged => nix::unistd::geteuid().is_root(),
    };
    let variable = |name: &str| std::env::var_os(name);
    let is_rootless = Scope::current() == Scope::User;
    let program = compatibility::program_warning(command, options.new_privileges, is_rootless, is_root, variable);
    let display = compatibility::display_warning(environment("DISPLAY").as_deref(), has_host_port);
    for warning in [program, display].into_iter().flatten() {
        tracing::warn!("{warning}");
    }
}

/// Returns a variable of the environment. A value that is not UTF-8 is kept as far as it can be: it must not count as
/// unset.
fn environment(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

/// Returns the number of descriptors that were passed to this process (sd_listen_fds(3)), and closes all other
/// inherited ones.
fn take_passed_descriptors() -> Result<i32, Failure> {
    let count = listen_fds()?;
    // This process has no descriptors of its own yet.
    if !fault::is_broken("descriptors") {
        process::close_range(3 + count, i32::MAX).doing("close inherited descriptors")?;
    }
    Ok(count)
}

/// Returns the number of descriptors that were passed to this process (sd_listen_fds(3)).
fn listen_fds() -> Result<i32, Failure> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<i32>().ok());
    let count = match (number("LISTEN_PID"), number("LISTEN_FDS")) {
        (Some(pid), Some(count)) if pid.cast_unsigned() == std::process::id() && (0..=1024).contains(&count) => count,
        _ => return Ok(0),
    };
    // A closed one would be opened by this process for itself, and passed on to the program.
    match (3..3 + count).find(|descriptor| !process::is_open(*descriptor)) {
        Some(missing) => Err(Failure::new(format!("LISTEN_FDS is {count}, but the descriptor {missing} is not open"))),
        None => Ok(count),
    }
}

/// Returns the failure to make a terminal for the program.
fn no_terminal(error: std::io::Error) -> Failure {
    match error.raw_os_error() {
        Some(libc::ENOTTY) => Failure::new("cannot replace the terminal (--pty): this process has none")
            .advise("leave out --pty, or run vpn-exec in a terminal"),
        _ => Failure::new(format!("cannot make a terminal for the program: {error}"))
            .advise("mount devpts at /dev/pts, or start vpn-exec without a terminal: `setsid vpn-exec … </dev/null`"),
    }
}

/// Ends as the program did: returns its exit status, or dies by its signal.
fn end_as(outcome: ProgramOutcome) -> ExitCode {
    match outcome {
        ProgramOutcome::Exited(status) => ExitCode::from(u8::try_from(status).unwrap_or(FAILED)),
        ProgramOutcome::Signaled(signal) => {
            if let Err(error) = signals::die_by_signal(signal) {
                tracing::debug!(%error, "cannot die by the program's signal");
            }
            ExitCode::from(u8::try_from(128 + signal).unwrap_or(FAILED))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_directory_for_the_programs_copies_is_reported_with_the_remedy() {
        let folder = tempfile::tempdir().expect("a folder");
        require_staging(folder.path()).expect("a directory");
        let missing = folder.path().join("missing");
        let failure = require_staging(&missing).expect_err("no directory");
        assert!(failure.to_string().contains(&missing.display().to_string()), "{failure}");
        assert!(format!("{failure:?}").contains("install -d -m 1777"), "{failure:?}");
    }
}
