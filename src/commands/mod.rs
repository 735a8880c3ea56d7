//! One file per command. Each reads like a recipe, from top to bottom.

mod attach;
mod cdi;
mod check;
mod cni;
mod completions;
mod containers;
mod desktop;
mod down;
mod help;
mod list;
mod logs;
mod man;
mod oci_hook;
mod plan;
mod reload;
mod run;
mod shell;
mod status;
mod unit;
mod up;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::CommandFactory;

use crate::cli::{Cli, Command, StatusArgs};
use crate::escape;
use crate::failure::Failure;
use crate::lookup;
use crate::names::TunnelName;
use crate::session;

pub use help::print_help;

/// Refuses to run with the privileges of a set-user-ID or set-group-ID file. Its caller chooses the environment and the
/// files, which vpn-exec trusts.
///
/// # Errors
/// If the real and the effective user or group differ.
pub fn refuse_set_user_id() -> Result<(), Failure> {
    if nix::unistd::getuid() == nix::unistd::geteuid() && nix::unistd::getgid() == nix::unistd::getegid() {
        return Ok(());
    }
    Err(Failure::new("vpn-exec must not be a set-user-ID or set-group-ID file")
        .advise("remove these bits (chmod u-s,g-s), and run it with sudo"))
}

/// Runs the command of a command line.
///
/// # Errors
/// The failure of the command.
pub fn execute(cli: Cli) -> Result<ExitCode, Failure> {
    choose_scope(&cli)?;
    match cli.command {
        None => run::run(&cli.run.launch, |_| cli.run.program.clone()),
        Some(Command::Up(arguments)) => up::run(&arguments),
        Some(Command::Down(arguments)) => down::run(&arguments),
        Some(Command::Reload(arguments)) => reload::run(&arguments),
        Some(Command::Shell(arguments)) => shell::run(&arguments),
        Some(Command::Status(arguments)) => status::run(&arguments, cli.verbosity.quiet),
        Some(Command::List(arguments)) => list::run(&arguments),
        Some(Command::Logs(arguments)) => logs::run(&arguments),
        Some(Command::Attach(arguments)) => attach::run(&arguments, cli.verbosity.quiet),
        Some(Command::Plan(arguments)) => plan::run(&arguments),
        Some(Command::Check(arguments)) => check::run(&arguments),
        Some(Command::Unit(arguments)) => unit::run(&arguments),
        Some(Command::Desktop(arguments)) => desktop::run(&arguments),
        Some(Command::OciHook(arguments)) => oci_hook::run(&arguments),
        Some(Command::Cdi(arguments)) => cdi::run(&arguments),
        Some(Command::Cni) => cni::run(),
        Some(Command::Completions(arguments)) => completions::run(arguments.shell),
        Some(Command::Man(arguments)) => man::run(&arguments),
        Some(Command::Help(arguments)) => help::run(&arguments),
        Some(Command::Version) => version(),
    }
}

/// Chooses whose tunnels the command deals with: the machine's, or those of a user without the privileges for these.
fn choose_scope(cli: &Cli) -> Result<(), Failure> {
    match &cli.command {
        None => session::choose_scope(cli.run.launch.tunnel.rootless),
        Some(Command::Shell(arguments)) => session::choose_scope(arguments.launch.tunnel.rootless),
        Some(Command::Up(arguments)) => session::choose_scope(arguments.tunnel.rootless),
        Some(Command::Plan(arguments)) => session::choose_scope(arguments.tunnel.rootless && !arguments.attach),
        Some(Command::Reload(arguments)) => session::choose_scope(arguments.tunnel.rootless),
        Some(Command::Down(arguments)) => session::choose_scope_of(&arguments.name),
        Some(Command::Status(StatusArgs { name: Some(name), .. })) => session::choose_scope_of(name),
        Some(Command::Status(_) | Command::List(_)) => session::choose_scope_to_look(),
        Some(Command::Desktop(_)) => session::choose_scope(false),
        Some(Command::Logs(arguments)) => session::choose_scope_of(&arguments.name),
        _ => Ok(()),
    }
}

fn version() -> Result<ExitCode, Failure> {
    print(&Cli::command().render_version())?;
    Ok(ExitCode::SUCCESS)
}

/// Returns the declaration of a command, with the names that usage and man pages need.
fn declaration(name: &str) -> Result<clap::Command, Failure> {
    let mut all = Cli::command();
    all.build();
    all.find_subcommand(name).cloned().ok_or_else(|| {
        let names: Vec<&str> = all.get_subcommands().map(clap::Command::get_name).collect();
        let advice = match crate::names::closest(name, names.iter().copied()) {
            Some(name) => format!("a similar command exists: {name}"),
            None => format!("commands: {}", names.join(", ")),
        };
        Failure::new(format!("there is no command '{name}'")).advise(advice)
    })
}

/// Creates the failure of a name that no running tunnel has.
fn no_tunnel(name: &TunnelName) -> Failure {
    Failure::new(format!("there is no tunnel {name}")).advise(match lookup::similar(name, &lookup::running()) {
        Some(similar) => format!("a similar tunnel exists: {similar}"),
        None => "see `vpn-exec list`".to_owned(),
    })
}

/// Writes text to standard output, with unsafe characters escaped.
fn print(text: &str) -> Result<(), Failure> {
    print_raw(escape::multiline(text).as_bytes())
}

/// Writes text of this program's own to standard output as it is. A reader that leaves early, as head(1) does, is not a
/// failure.
fn print_raw(text: &[u8]) -> Result<(), Failure> {
    match write_out(text) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(cannot_print(&error)),
        _ => Ok(()),
    }
}

fn write_out(text: &[u8]) -> io::Result<()> {
    let mut output = io::stdout().lock();
    output.write_all(text).and_then(|()| output.flush())
}

fn cannot_print(error: &io::Error) -> Failure {
    Failure::new(format!("cannot write to standard output: {error}"))
}
