//! The command `vpn-exec`: parses, runs one command, and turns an error into an exit status.

use std::process::ExitCode;

use vpn_exec::cli::Cli;
use vpn_exec::failure::FAILED;
use vpn_exec::linux::process;
use vpn_exec::{commands, logging};

fn main() -> ExitCode {
    let cli = match Cli::parse_checked(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => {
            if error.use_stderr() {
                logging::report_usage(&error);
                return ExitCode::from(FAILED);
            }
            return ExitCode::from(match error.print() {
                // That nobody reads the help to its end is no failure.
                Err(failed) if failed.kind() != std::io::ErrorKind::BrokenPipe => {
                    eprintln!("vpn-exec: cannot write to standard output: {failed}");
                    FAILED
                }
                _ => 0,
            });
        }
    };
    logging::start(cli.verbosity);
    // Before the first secret is read, whatever the command.
    if let Err(error) = process::disable_ptrace_and_core_dumps() {
        tracing::warn!("this process could be inspected: {error}");
    }
    let code = commands::execute(cli).unwrap_or_else(|failure| {
        logging::report(&failure);
        ExitCode::from(failure.status)
    });
    logging::finish();
    code
}
