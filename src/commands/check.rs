//! `vpn-exec check`: says what is wrong with a configuration, if anything.

use std::process::ExitCode;

use super::{Failure, load, print};
use crate::cli::CheckArgs;

pub(super) fn run(arguments: &CheckArgs) -> Result<ExitCode, Failure> {
    let plan = load::load(&arguments.source, &arguments.tunnel, &arguments.identity)?.plan()?;
    for note in &plan.notes {
        print(format!("note: {note}\n").as_bytes())?;
    }
    print(format!("{}: a tunnel can be made\n", plan.name).as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
