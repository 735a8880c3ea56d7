//! `vpn-exec plan`: shows all that would be done.

use std::process::ExitCode;

use super::print;
use crate::cli::PlanArgs;
use crate::failure::Failure;
use crate::plan;
use crate::program::closed_sockets;
use crate::program::identity;
use crate::request;

pub(super) fn run(arguments: &PlanArgs) -> Result<ExitCode, Failure> {
    let loaded = request::load(&arguments.source, &arguments.tunnel, &arguments.identity)?;
    let mut plan = loaded.plan()?;
    let options = &loaded.config.program;
    let variable = |name: &str| std::env::var(name).ok();
    plan.sockets = plan::host_sockets::for_program(options, variable);
    // A user that is not there yet is refused when the program is run.
    if let Ok(identity) = identity::choose(options.user.as_deref(), options.group.as_deref(), variable) {
        match closed_sockets::notes(&plan, &identity) {
            Ok(notes) => plan.notes.extend(notes),
            Err(error) => tracing::debug!(%error, "cannot list the host's unix sockets"),
        }
    }
    let text = if arguments.json {
        let json = serde_json::to_string_pretty(&plan);
        json.map_err(|error| Failure::new(format!("cannot write the plan as JSON: {error}")))? + "\n"
    } else {
        plan.to_string()
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}
