//! A file for each command; each reads like a recipe, from top to bottom.

mod check;
mod closed;
mod completions;
mod down;
mod held;
mod list;
mod load;
mod man;
mod plan;
mod reload;
mod run;
mod status;
pub(crate) mod systemd;
mod unit;
mod up;

use std::process::ExitCode;

use crate::cli::{Cli, Command};
use crate::escape;
use crate::program::ProgramError;
use crate::tunnel::TunnelError;

/// The exit status of a failure of vpn-exec itself, as env(1), timeout(1) and chroot(1) have it.
pub const FAILED: u8 = 125;

/// A failure that is told to the user: what failed and why, what can be done about it, and the exit status.
#[derive(Debug)]
pub struct Failure {
    /// What failed, and why. May be a whole report of several lines, which then says all by itself.
    pub message: String,
    /// What can be done about it.
    pub advice: Option<String>,
    /// The exit status.
    pub status: u8,
}

impl Failure {
    fn new(message: impl ToString) -> Self {
        Self { message: message.to_string(), advice: None, status: FAILED }
    }

    fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

impl From<TunnelError> for Failure {
    fn from(error: TunnelError) -> Self {
        Self { advice: error.advice.clone(), ..Self::new(error) }
    }
}

impl From<ProgramError> for Failure {
    fn from(error: ProgramError) -> Self {
        Self { status: error.exit_status(), advice: error.advice(), ..Self::new(error) }
    }
}

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
