//! `vpn-exec logs`: shows the messages of a tunnel's keeper, which are in the journal if a service runs it.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use super::{no_tunnel, print};
use crate::cli::LogsArgs;
use crate::failure::{Doing, Failure};
use crate::lookup::profile_paths;
use crate::names::TunnelName;
use crate::registry::{self, Scope};

/// The place of a keeper's messages.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// The journal's entries of a service.
    Service(String),
    /// The journal's entries of a service of the user's manager.
    UserService(String),
    /// The journal's entries of the keeper's process.
    Process(u32),
    /// A file, or a terminal.
    File(String),
    /// None: a keeper in the background discards them.
    Nowhere,
}

pub(super) fn run(arguments: &LogsArgs) -> Result<ExitCode, Failure> {
    let name = &arguments.name;
    let state = registry::read(name).map_err(Failure::new)?;
    let place = match &state {
        Some(state) => place_of(state.keeper)?,
        // The service may have failed.
        None if profile_paths(name).any(|path| path.exists()) => Place::Service(service_of(name)),
        None => return Err(no_tunnel(name)),
    };
    let filter = match place {
        Place::Service(unit) => format!("--unit={unit}"),
        Place::UserService(unit) => format!("--user-unit={unit}"),
        Place::Process(pid) => format!("_PID={pid}"),
        Place::File(path) => {
            print(&format!("the keeper of the tunnel {name} writes its messages to {path}\n"))?;
            return Ok(ExitCode::SUCCESS);
        }
        Place::Nowhere => {
            let what = format!("the keeper of the tunnel {name} runs in the background, and discards its messages");
            let systemctl = if Scope::current() == Scope::User { "systemctl --user" } else { "systemctl" };
            let advice = format!(
                "run it as a service (`{systemctl} start vpn-exec@{name}`), or with `vpn-exec up --foreground`"
            );
            return Err(Failure::new(what).advise(advice));
        }
    };
    let mut journalctl = Command::new("journalctl");
    journalctl.arg(filter);
    if arguments.follow {
        journalctl.arg("--follow");
    }
    if let Some(lines) = arguments.lines {
        journalctl.arg(format!("--lines={lines}"));
    }
    // It returns only if it fails.
    Err(Failure::of("run journalctl", &journalctl.exec()))
}

/// Returns the name of the service that holds a standing tunnel.
fn service_of(name: &TunnelName) -> String {
    format!("vpn-exec@{name}.service")
}

/// Finds the place of a keeper's messages.
fn place_of(keeper: u32) -> Result<Place, Failure> {
    let cgroup = fs::read_to_string(format!("/proc/{keeper}/cgroup")).unwrap_or_default();
    if let Some(place) = service_in(&cgroup) {
        return Ok(place);
    }
    let link = format!("/proc/{keeper}/fd/2");
    let output = match fs::read_link(&link) {
        // A user may not look into the keeper of a rootless tunnel.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && Scope::current() == Scope::User => {
            return Ok(Place::Nowhere);
        }
        read => read.doing(format!("read {link}"))?,
    };
    Ok(match output.display().to_string() {
        output if output.starts_with("socket:") => Place::Process(keeper),
        output if output == "/dev/null" => Place::Nowhere,
        output => Place::File(output),
    })
}

/// Returns the service in a process's control group (cgroups(7)), as `0::/system.slice/NAME.service`.
fn service_in(cgroup: &str) -> Option<Place> {
    let path = cgroup.lines().find_map(|line| {
        line.strip_prefix("0::").or_else(|| line.split_once(":name=systemd:").map(|(_, path)| path))
    })?;
    let parts = Path::new(path).components().rev().filter_map(|part| part.as_os_str().to_str());
    let unit = parts.into_iter().find(|part| part.ends_with(".service"))?.to_owned();
    // Units of a user's manager are below user@UID.service.
    match path.split_once("/user@") {
        None => Some(Place::Service(unit)),
        Some(_) if unit.starts_with("user@") => None,
        Some(_) => Some(Place::UserService(unit)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_found_by_its_control_group() {
        let system = |unit: &str| Some(Place::Service(unit.into()));
        for (cgroup, place) in [
            ("0::/system.slice/vpn-exec@mullvad.service\n", system("vpn-exec@mullvad.service")),
            ("0::/system.slice/system-vpn\\x2dexec.slice/vpn-exec@a.service/sub\n", system("vpn-exec@a.service")),
            ("12:cpu:/\n1:name=systemd:/system.slice/a.service\n", system("a.service")),
            ("0::/user.slice/user-1000.slice/session-2.scope\n", None),
            (
                "0::/user.slice/user-1000.slice/user@1000.service/app.slice/a.service\n",
                Some(Place::UserService("a.service".into())),
            ),
            ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/a.scope\n", None),
            ("0::/\n", None),
            ("", None),
        ] {
            assert_eq!(service_in(cgroup), place, "{cgroup}");
        }
    }
}
