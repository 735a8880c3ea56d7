//! The program `vpn-exec`: parses the command line, runs a command, and turns a failure into an exit status.

use std::process::ExitCode;

use vpn_exec::cli::{Cli, NotParsed, completion};
use vpn_exec::failure::Failure;
use vpn_exec::linux::process;
use vpn_exec::{commands, logging, lookup};

fn main() -> ExitCode {
    // Before anything is read that the caller names.
    if let Err(failure) = commands::refuse_set_user_id() {
        return report(&failure);
    }
    if completion::answer() {
        return ExitCode::SUCCESS;
    }
    let cli = match Cli::parse_checked(std::env::args_os(), lookup::names) {
        Ok(cli) => cli,
        Err(NotParsed::Invalid(failure)) => return report(&failure),
        Err(NotParsed::Help(help)) => {
            return commands::print_help(&help).map_or_else(|failure| report(&failure), |()| ExitCode::SUCCESS);
        }
    };
    logging::start(cli.verbosity, cli.is_daemon());
    // Before the first secret is read, whatever the command.
    if let Err(error) = process::disable_ptrace_and_core_dumps() {
        tracing::warn!("cannot disable core dumps and ptrace: {error}");
    }
    let code = commands::execute(cli).unwrap_or_else(|failure| report(&failure));
    logging::finish();
    code
}

/// Prints a failure and returns its exit status.
fn report(failure: &Failure) -> ExitCode {
    logging::report(failure);
    ExitCode::from(failure.status)
}
