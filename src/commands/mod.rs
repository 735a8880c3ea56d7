//! A file for each command; each reads like a recipe, from top to bottom.

mod check;
mod completions;
mod down;
mod list;
mod man;
mod plan;
mod reload;
mod run;
mod status;
mod unit;
mod up;

use std::process::ExitCode;

use crate::cli::{Cli, Command};
use crate::escape;
use crate::failure::Failure;

/// Runs the command that was asked for.
pub fn execute(cli: Cli) -> Result<ExitCode, Failure> {
    // Whoever calls a set-user-ID file chooses its environment and its files, which are trusted here.
    if nix::unistd::getuid() != nix::unistd::geteuid() || nix::unistd::getgid() != nix::unistd::getegid() {
        return Err(Failure::new("vpn-exec must not be a set-user-ID or set-group-ID file")
            .advise("take these bits away (chmod u-s,g-s), and call it by sudo"));
    }
    match cli.command {
        None => run::run(&cli.run),
        Some(Command::Up(arguments)) => up::run(&arguments),
        Some(Command::Down(arguments)) => down::run(&arguments),
        Some(Command::Reload(arguments)) => reload::run(&arguments),
        Some(Command::Status(arguments)) => status::run(&arguments),
        Some(Command::List(arguments)) => list::run(&arguments),
        Some(Command::Plan(arguments)) => plan::run(&arguments),
        Some(Command::Check(arguments)) => check::run(&arguments),
        Some(Command::Unit(arguments)) => unit::run(&arguments),
        Some(Command::Completions { shell }) => completions::run(shell),
        Some(Command::Man) => man::run(),
    }
}

/// Writes text to standard output, fit for a terminal. That nobody reads it any more is no failure.
fn print(text: &str) -> Result<(), Failure> {
    print_bytes(escape::multiline(text).as_bytes())
}

/// Writes to standard output what is this program's own from beginning to end.
fn print_bytes(text: &[u8]) -> Result<(), Failure> {
    use std::io::Write;

    let mut output = std::io::stdout().lock();
    match output.write_all(text).and_then(|()| output.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::new(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}
