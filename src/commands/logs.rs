//! `vpn-exec logs`: shows the messages of a tunnel's keeper, which are in the journal if a service runs it.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use super::{no_tunnel, print};
use crate::cli::LogsArgs;
use crate::failure::{Doing, Failure};
use crate::lookup::profile_paths;
use crate::names::TunnelName;
use crate::registry;

/// The place of a keeper's messages.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// The journal's entries of a service.
    Service(String),
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
        Place::Process(pid) => format!("_PID={pid}"),
        Place::File(path) => {
            print(&format!("the keeper of the tunnel {name} writes its messages to {path}\n"))?;
            return Ok(ExitCode::SUCCESS);
        }
        Place::Nowhere => {
            let what = format!("the keeper of the tunnel {name} runs in the background, and discards its messages");
            let advice =
                format!("run it as a service (`systemctl start vpn-exec@{name}`), or with `vpn-exec up --foreground`");
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
    if let Some(unit) = service_in(&cgroup) {
        return Ok(Place::Service(unit));
    }
    let link = format!("/proc/{keeper}/fd/2");
    let output = fs::read_link(&link).doing(format!("read {link}"))?;
    Ok(match output.display().to_string() {
        output if output.starts_with("socket:") => Place::Process(keeper),
        output if output == "/dev/null" => Place::Nowhere,
        output => Place::File(output),
    })
}

/// Returns the system service in a process's control group (cgroups(7)), as `0::/system.slice/NAME.service`.
fn service_in(cgroup: &str) -> Option<String> {
    let path = cgroup.lines().find_map(|line| {
        line.strip_prefix("0::").or_else(|| line.split_once(":name=systemd:").map(|(_, path)| path))
    })?;
    // Units of a user's manager are below user@UID.service, and have a journal of their own.
    if path.contains("/user@") {
        return None;
    }
    let parts = Path::new(path).components().rev().filter_map(|part| part.as_os_str().to_str());
    parts.into_iter().find(|part| part.ends_with(".service")).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_found_by_its_control_group() {
        for (cgroup, unit) in [
            ("0::/system.slice/vpn-exec@mullvad.service\n", Some("vpn-exec@mullvad.service")),
            ("0::/system.slice/system-vpn\\x2dexec.slice/vpn-exec@a.service/sub\n", Some("vpn-exec@a.service")),
            ("12:cpu:/\n1:name=systemd:/system.slice/a.service\n", Some("a.service")),
            ("0::/user.slice/user-1000.slice/session-2.scope\n", None),
            ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/a.service\n", None),
            ("0::/\n", None),
            ("", None),
        ] {
            assert_eq!(service_in(cgroup).as_deref(), unit, "{cgroup}");
        }
    }
}
