//! The systemd drop-in that puts an existing service into a running tunnel, for `vpn-exec unit`.
//!
//! - `checks` and `error`: whether that works for the service, and why not.
//!
//! `nix/unit.nix` implements the same for the NixOS module. The files in `tests/unit/` hold both to the same text.

mod checks;
mod error;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use self::error::DropInError;
use crate::config::DbusAccess;
use crate::names::{ServiceName, TunnelName};

/// The paths in `/run` that every service sees: the journal, systemd's notify socket, dynamic users, and locks. A
/// service can write to them if its user may.
const SHOWN: [&str; 4] = ["/run/lock", "/run/systemd/journal", "/run/systemd/notify", "/run/systemd/userdb"];

/// The paths in `/run` that every service sees read-only: the running NixOS system, and the files of secrets
/// managers.
const SHOWN_READ_ONLY: [&str; 6] =
    ["/run/agenix", "/run/booted-system", "/run/current-system", "/run/keys", "/run/opengl-driver", "/run/secrets"];

/// The directory of the system bus.
const SYSTEM_BUS: &str = "/run/dbus";

/// A request to put a service into a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DropInRequest {
    /// The service.
    pub service: ServiceName,
    /// The tunnel.
    pub tunnel: TunnelName,
    /// Whether the service sees the system bus.
    #[serde(default)]
    pub dbus: DbusAccess,
    /// More paths in `/run` that the service sees.
    #[serde(default)]
    pub show: Vec<PathBuf>,
}

/// The existing settings of a service's unit; all empty if systemd does not know the unit yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServiceFacts {
    /// `Type=`.
    pub kind: String,
    /// `RuntimeDirectory=`: the service's own directories, relative to `/run`.
    pub runtime_directories: Vec<String>,
    /// `ReadWritePaths=`, `ReadOnlyPaths=`, `ExecPaths=` and `NoExecPaths=`, as far as they must exist, and `/run`
    /// itself in any case.
    pub used_paths: Vec<PathBuf>,
    /// The entries of `BindPaths=` and `BindReadOnlyPaths=`: `[-]SOURCE[:TARGET[:OPTIONS]]`.
    pub bind_paths: Vec<String>,
    /// The file names of the programs of `ExecStart=`.
    pub programs: Vec<String>,
    /// Whether it runs as root and keeps CAP_SYS_ADMIN.
    pub privileged: bool,
    /// `PIDFile=`.
    pub pid_file: Option<PathBuf>,
    /// `PrivateNetwork=`.
    pub private_network: bool,
    /// `NetworkNamespacePath=`.
    pub network_namespace: Option<PathBuf>,
    /// `JoinsNamespaceOf=`.
    pub joins_namespace_of: Vec<String>,
    /// The socket units that start it.
    pub sockets: Vec<SocketFacts>,
}

/// The settings of a socket unit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SocketFacts {
    /// Its name.
    pub name: String,
    /// The addresses that it listens on: `[::]:80`, `/run/socket`, `@abstract`, and so on.
    pub listens: Vec<String>,
    /// `NetworkNamespacePath=`.
    pub network_namespace: Option<PathBuf>,
}

/// Returns the text of the drop-in that puts a service into a tunnel.
///
/// # Errors
///
/// Returns all reasons why a drop-in cannot do that.
pub fn render(request: &DropInRequest, facts: &ServiceFacts) -> Result<String, Vec<DropInError>> {
    let DropInRequest { service, tunnel, dbus, show } = request;
    let mut shown: Vec<PathBuf> = facts.runtime_directories.iter().map(|name| Path::new("/run").join(name)).collect();
    let below_run = |path: &PathBuf| path.starts_with("/run") && path.as_path() != Path::new("/run");
    let is_shown = |path: &PathBuf| SHOWN.iter().chain(&SHOWN_READ_ONLY).any(|shown| path.starts_with(shown));
    shown.extend(
        facts.used_paths.iter().map(|path| below_real_run(path)).filter(below_run).filter(|path| !is_shown(path)),
    );
    shown.extend(show.iter().cloned());
    shown.sort();
    shown.dedup();
    let errors = checks::errors(request, facts, &shown);
    if !errors.is_empty() {
        return Err(errors);
    }

    let keeper = format!("vpn-exec@{tunnel}.service");
    let names = format!("/run/vpn-exec/{tunnel}");
    let bus = (*dbus == DbusAccess::System).then_some(SYSTEM_BUS);
    let optional =
        |paths: &mut dyn Iterator<Item = &str>| paths.map(|path| format!("-{path}")).collect::<Vec<_>>().join(" ");
    let always = optional(&mut bus.into_iter().chain(SHOWN));
    let read_only = optional(&mut SHOWN_READ_ONLY.into_iter());
    let own: String = shown.iter().map(|path| format!("BindPaths={}\n", path.display())).collect();
    Ok(format!(
        "\
# {service} in the tunnel {tunnel}. Written by vpn-exec.

[Unit]
BindsTo={keeper}
After={keeper}

[Service]
# The tunnel's network namespace. The service cannot enter another one.
NetworkNamespacePath=/run/netns/{tunnel}
RestrictNamespaces=~net

# The tunnel's resolver files. If the unit binds these paths too, systemd mounts one of the two, and prefers norbind.
BindReadOnlyPaths={names}/resolv.conf:/etc/resolv.conf:norbind
BindReadOnlyPaths={names}/hosts:/etc/hosts:norbind
BindReadOnlyPaths={names}/nsswitch.conf:/etc/nsswitch.conf:norbind

# A private /run without the host's resolvers. A mask over /run/nscd alone would disappear with that folder whenever
# nscd restarts.
TemporaryFileSystem=/run:mode=0755,nosuid,nodev
BindPaths={always}
BindReadOnlyPaths={read_only}
{own}InaccessiblePaths=-/var/lib/sss/pipes

# Hides the host's network interfaces.
TemporaryFileSystem=/sys/class/net:ro /sys/devices/virtual/net:ro
"
    ))
}

/// Returns what the administrator should know about a service that is put into a tunnel.
pub fn warnings(request: &DropInRequest, facts: &ServiceFacts) -> Vec<String> {
    let warning = || {
        format!(
            "{} runs as root with CAP_SYS_ADMIN, and can leave the tunnel: set User= or DynamicUser=yes, or \
             CapabilityBoundingSet=~CAP_SYS_ADMIN CAP_SYS_PTRACE",
            request.service
        )
    };
    facts.privileged.then(warning).into_iter().collect()
}

/// Replaces `/var/run`, which is a link, by `/run`.
fn below_real_run(path: &Path) -> PathBuf {
    path.strip_prefix("/var/run").map_or_else(|_| path.to_owned(), |rest| Path::new("/run").join(rest))
}
