//! How an existing systemd service is put into a standing tunnel: the drop-in for its unit, or why that cannot work.
//! Another implementation writes the same text: both are held to the files in `tests/unit/`.

mod checks;
mod error;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use self::error::DropInError;
use crate::config::DbusAccess;
use crate::names::{ServiceName, TunnelName};

/// What of `/run` every service sees, read-write as far as its user may write: the journal, the manager's notify
/// socket, the users that systemd makes up, and locks.
const SHOWN: [&str; 4] = ["/run/lock", "/run/systemd/journal", "/run/systemd/notify", "/run/systemd/userdb"];

/// What of `/run` every service sees, but cannot change: where NixOS keeps the running system, and secrets' managers
/// what they manage.
const SHOWN_READ_ONLY: [&str; 6] =
    ["/run/agenix", "/run/booted-system", "/run/current-system", "/run/keys", "/run/opengl-driver", "/run/secrets"];

/// The folder of the system bus.
const SYSTEM_BUS: &str = "/run/dbus";

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DropInRequest {
    /// The service.
    pub service: ServiceName,
    /// The tunnel.
    pub tunnel: TunnelName,
    /// Whether it sees the system bus.
    #[serde(default)]
    pub dbus: DbusAccess,
    /// What it sees of `/run` besides.
    #[serde(default)]
    pub show: Vec<PathBuf>,
}

/// What its unit says already. Nothing, of a unit that systemd knows nothing of yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServiceFacts {
    /// `Type=`.
    pub kind: String,
    /// `RuntimeDirectory=`: folders below `/run` that are the service's own.
    pub runtime_directories: Vec<String>,
    /// `ReadWritePaths=`, `ReadOnlyPaths=`, `ExecPaths=` and `NoExecPaths=`, as far as they must exist, and `/run`
    /// itself in any case.
    pub used_paths: Vec<PathBuf>,
    /// `BindPaths=` and `BindReadOnlyPaths=`, an entry each: `[-]SOURCE[:TARGET[:OPTIONS]]`.
    pub bind_paths: Vec<String>,
    /// The names of the programs of `ExecStart=`, without their folders.
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

/// What a socket unit says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SocketFacts {
    /// The unit.
    pub name: String,
    /// Where it listens: `[::]:80`, `/run/socket`, `@abstract`, and so on.
    pub listens: Vec<String>,
    /// `NetworkNamespacePath=`.
    pub network_namespace: Option<PathBuf>,
}

/// The drop-in that puts a service into a tunnel.
///
/// # Errors
/// All that speaks against it.
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

/// What the administrator should know of a service that goes into a tunnel.
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

/// What `/var/run` is another name of.
fn below_real_run(path: &Path) -> PathBuf {
    path.strip_prefix("/var/run").map_or_else(|_| path.to_owned(), |rest| Path::new("/run").join(rest))
}
