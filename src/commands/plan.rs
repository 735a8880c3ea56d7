//! `vpn-exec plan`: shows all that would be done.

use std::process::ExitCode;

use super::{Failure, load, print};
use crate::cli::PlanArgs;

pub(super) fn run(arguments: &PlanArgs) -> Result<ExitCode, Failure> {
    let plan = load::load(&arguments.source, &arguments.tunnel, &arguments.identity)?.plan()?;
    let text = if arguments.json {
        let json = serde_json::to_string_pretty(&plan);
        json.map_err(|error| Failure::new(format!("cannot write the plan as JSON: {error}")))? + "\n"
    } else {
        plan.to_string()
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}
