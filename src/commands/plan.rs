//! `vpn-exec plan`: shows all that would be done, and changes nothing.

use std::fmt::{self, Display, Formatter};
use std::process::ExitCode;

use serde::Serialize;

use super::print;
use crate::attach;
use crate::cli::PlanArgs;
use crate::failure::{Doing, Failure};
use crate::plan::{self, Plan};
use crate::program::closed_sockets;
use crate::program::identity;
use crate::request;
use crate::session;

/// A plan, and the way in which the tunnel is made: with root's privileges, or in a user namespace.
#[derive(Serialize)]
struct Shown {
    /// Why that way is used; `rootless` says which one it is.
    way_reason: &'static str,
    #[serde(flatten)]
    plan: Plan,
}

impl Display for Shown {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let way = if self.plan.rootless { "Made without root, in a user namespace" } else { "Made by root" };
        write!(f, "{way}: {}\n\n{}", self.way_reason, self.plan)
    }
}

pub(super) fn run(arguments: &PlanArgs) -> Result<ExitCode, Failure> {
    let request = request::load(&arguments.source, &arguments.tunnel, &arguments.identity)?;
    if arguments.attach {
        return show(&attach::plan(&request.config)?, arguments.json);
    }
    let mut plan = request.plan()?;
    let options = &request.config.program;
    let variable = |name: &str| std::env::var(name).ok();
    plan.sockets = plan::host_sockets::for_program(options, variable);
    // The user may not exist yet: that is refused when the program is run.
    if let Ok(identity) = identity::choose(options.user.as_deref(), options.group.as_deref(), variable) {
        match closed_sockets::notes(&plan, &identity) {
            Ok(notes) => plan.notes.extend(notes),
            Err(error) => tracing::debug!(%error, "cannot list the host's unix sockets"),
        }
    }
    show(&Shown { way_reason: session::reason_of_scope(arguments.tunnel.rootless), plan }, arguments.json)
}

fn show(plan: &(impl Serialize + Display), as_json: bool) -> Result<ExitCode, Failure> {
    let text = match as_json {
        true => serde_json::to_string_pretty(plan).doing("write the plan as JSON")? + "\n",
        false => plan.to_string(),
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}
