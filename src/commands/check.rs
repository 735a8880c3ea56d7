//! `vpn-exec check`: explains the mistakes of a configuration.

use std::process::ExitCode;

use super::print;
use crate::cli::CheckArgs;
use crate::failure::Failure;
use crate::request;

pub(super) fn run(arguments: &CheckArgs) -> Result<ExitCode, Failure> {
    if let Some(file) = &arguments.profile_only {
        request::check_profile(file)?;
        print(&format!("{}: the profile is valid\n", file.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let plan = request::load(&arguments.source, &arguments.tunnel, &arguments.identity)?.plan()?;
    for note in &plan.notes {
        print(&format!("note: {note}\n"))?;
    }
    print(&format!("{}: the configuration is valid\n", plan.name))?;
    Ok(ExitCode::SUCCESS)
}
