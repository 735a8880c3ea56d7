//! How an existing systemd service is put into a standing tunnel: the drop-in for its unit, or why that cannot work. Another
//! implementation writes the same text: both are held to the files in `tests/unit/`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::hidden_paths;
use crate::config::DbusAccess;
use crate::names::{ServiceName, TunnelName};

/// What of `/run` every service sees, read-write as far as its user may write: the journal, the manager's notify socket, the users that
/// systemd makes up, and locks.
const SHOWN: [&str; 4] = ["/run/lock", "/run/systemd/journal", "/run/systemd/notify", "/run/systemd/userdb"];

/// What of `/run` every service sees, but cannot change: where NixOS keeps the running system, and secrets' managers what they manage.
const SHOWN_READ_ONLY: [&str; 6] =
    ["/run/agenix", "/run/booted-system", "/run/current-system", "/run/keys", "/run/opengl-driver", "/run/secrets"];

/// Files without an address but those of resolvers, which are not reached from inside. Units bind them, as NixOS's tor does, since
/// `/etc/resolv.conf` may be a link to them.
const HARMLESS: [&str; 5] = [
    "/run/NetworkManager/no-stub-resolv.conf",
    "/run/NetworkManager/resolv.conf",
    "/run/resolvconf/resolv.conf",
    "/run/systemd/resolve/resolv.conf",
    "/run/systemd/resolve/stub-resolv.conf",
];

/// Services that the whole machine asks for names, links or the bus. Inside a tunnel they would not serve the host any more.
const HOSTS_OWN: [&str; 20] = [
    "NetworkManager",
    "avahi-daemon",
    "connman",
    "dbus",
    "dbus-broker",
    "dhcpcd",
    "dnsmasq",
    "iwd",
    "named",
    "networking",
    "nscd",
    "nsncd",
    "sssd",
    "systemd-machined",
    "systemd-networkd",
    "systemd-resolved",
    "systemd-udevd",
    "unbound",
    "unscd",
    "wpa_supplicant",
];

/// The folder of the system bus.
const SYSTEM_BUS: &str = "/run/dbus";

/// What systemd puts the name of an instance in the place of (systemd.unit(5), Specifiers).
const SPECIFIERS: [&str; 4] = ["%i", "%I", "%j", "%J"];

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnitRequest {
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
    /// `ReadWritePaths=`, `ReadOnlyPaths=`, `ExecPaths=` and `NoExecPaths=`, as far as they must exist, and `/run` itself in any case.
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

/// Why a service cannot be put into a tunnel in this way, and what can be done about it.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum UnitError {
    /// The service that holds tunnels.
    #[error("{0} holds a tunnel itself, and must stay outside")]
    Keeper(ServiceName),
    /// The host needs it outside.
    #[error("{0} serves the whole machine, which would be without it: leave it outside")]
    HostsOwn(ServiceName),
    /// An engine runs its program, in a network namespace that the engine makes.
    #[error(
        "an engine runs the program of {service} in a network namespace of its own, outside of the tunnel: leave the unit's service \
         settings as they are, and give {} the options --network=ns:/run/netns/{tunnel} and \
         --volume=/run/vpn-exec/{tunnel}/resolv.conf:/etc/resolv.conf:ro, and the unit BindsTo= and After=vpn-exec@{tunnel}.service",
        if *.is_docker { "podman (Docker cannot join a namespace by its path)" } else { "podman" }
    )]
    Container {
        /// The service.
        service: ServiceName,
        /// The tunnel.
        tunnel: TunnelName,
        /// Whether the engine is Docker.
        is_docker: bool,
    },
    /// A machine's interface on the host would have the name of the tunnel's.
    #[error(
        "ve-{0} is the interface of the tunnel on the host, and the container's as well: give one of them another name"
    )]
    Collision(TunnelName),
    /// The names of units have fewer characters than those of tunnels.
    #[error("the tunnel {0} cannot be a service, since the name of a unit has no '=' and no '+': rename its profile")]
    TunnelName(TunnelName),
    /// It is to have no network.
    #[error("the unit has PrivateNetwork=yes, a network without any way out: set PrivateNetwork=no in the unit")]
    PrivateNetwork,
    /// It is in another namespace already.
    #[error("the unit has NetworkNamespacePath={} already, and a service is in one network namespace: take that line away", .0.display())]
    OtherNamespace(PathBuf),
    /// It shares another service's network.
    #[error(
        "the unit has JoinsNamespaceOf={0}, and would share the network of that unit: take that line away, and put both into the tunnel"
    )]
    JoinsNamespaceOf(String),
    /// What it is passed listens on the host.
    #[error(
        "{unit} listens at {address} outside of the tunnel, and what comes there would be answered past it: publish a port of the tunnel \
         instead, and disable {unit}, or have it listen inside (NetworkNamespacePath=/run/netns/{tunnel} in its [Socket])"
    )]
    ListensOutside {
        /// The socket unit.
        unit: String,
        /// Where.
        address: String,
        /// The tunnel.
        tunnel: TunnelName,
    },
    /// It is known by a name on a bus that it would not see.
    #[error(
        "the unit has Type=dbus, and the system bus is hidden, where anybody can have the host look names up: --dbus system shows it"
    )]
    Bus,
    /// Where nobody outside sees it.
    #[error(
        "the unit has PIDFile={}, which systemd would not see: /run is the service's own inside. Put it into a folder of RuntimeDirectory=, \
         or show its folder with --show", .0.display()
    )]
    PidFile(PathBuf),
    /// The host's `/run` would be in the place of the service's own, which is hidden by whatever else is mounted there.
    #[error(
        "the unit binds {0}, and the host's resolvers with it, in the place of a /run without them: take that away"
    )]
    BindsRun(String),
    /// Of several settings for one path, systemd mounts one; and these go before the drop-in's.
    #[error(
        "the unit has /run in ReadWritePaths=, ReadOnlyPaths=, ExecPaths= or NoExecPaths=, by which systemd shows the host's /run, and the \
         host's resolvers with it: name what is below it that the service needs instead"
    )]
    UsesRun,
    /// It shows what must not be seen already.
    #[error("the unit binds {0}, by which the host looks names up, past the tunnel: take that away")]
    BindsResolver(String),
    /// No path below `/run`, or one that a unit cannot say.
    #[error("{} cannot be shown: give a path below /run, of letters, digits and / . _ - @ or %i", .0.display())]
    Path(PathBuf),
    /// It would show what must not be seen.
    #[error("{} cannot be shown: {hidden} is there, by which the host looks names up, past the tunnel", .path.display())]
    Resolver {
        /// What was to be shown.
        path: PathBuf,
        /// What is hidden.
        hidden: String,
    },
}

/// The drop-in that puts a service into a tunnel.
///
/// # Errors
/// All that speaks against it.
pub fn drop_in(request: &UnitRequest, facts: &ServiceFacts) -> Result<String, Vec<UnitError>> {
    let UnitRequest { service, tunnel, dbus, show } = request;
    let mut shown: Vec<PathBuf> = facts.runtime_directories.iter().map(|name| Path::new("/run").join(name)).collect();
    let below_run = |path: &PathBuf| path.starts_with("/run") && path.as_path() != Path::new("/run");
    let is_shown = |path: &PathBuf| SHOWN.iter().chain(&SHOWN_READ_ONLY).any(|shown| path.starts_with(shown));
    shown.extend(facts.used_paths.iter().map(|path| in_run(path)).filter(below_run).filter(|path| !is_shown(path)));
    shown.extend(show.iter().cloned());
    shown.sort();
    shown.dedup();
    let errors = refusals(request, facts, &shown);
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
# No network but the tunnel's, and no way to another.
NetworkNamespacePath=/run/netns/{tunnel}
RestrictNamespaces=~net

# Names are the tunnel's, also where the unit binds a file of the host's there: systemd mounts one of both, and prefers norbind.
BindReadOnlyPaths={names}/resolv.conf:/etc/resolv.conf:norbind
BindReadOnlyPaths={names}/hosts:/etc/hosts:norbind
BindReadOnlyPaths={names}/nsswitch.conf:/etc/nsswitch.conf:norbind

# Nobody of the host can be asked for them: of /run, only this is there. A mask over /run/nscd alone would go with that folder
# whenever nscd is restarted.
TemporaryFileSystem=/run:mode=0755,nosuid,nodev
BindPaths={always}
BindReadOnlyPaths={read_only}
{own}InaccessiblePaths=-/var/lib/sss/pipes

# The interfaces of the host are not shown.
TemporaryFileSystem=/sys/class/net:ro /sys/devices/virtual/net:ro
"
    ))
}

/// What the administrator should know of a service that goes into a tunnel.
pub fn warnings(request: &UnitRequest, facts: &ServiceFacts) -> Vec<String> {
    let warning = || {
        format!(
            "{} runs as root with CAP_SYS_ADMIN, with which it can leave the tunnel: give it User= or DynamicUser=yes, or \
             CapabilityBoundingSet=~CAP_SYS_ADMIN CAP_SYS_PTRACE",
            request.service
        )
    };
    facts.privileged.then(warning).into_iter().collect()
}

/// Whether an engine runs a service's program in a container, and whether that engine is Docker.
fn container(service: &ServiceName, facts: &ServiceFacts) -> Option<bool> {
    let name = service.as_str();
    let is = |engine: &str| {
        let runs = facts.programs.iter().any(|program| program == engine);
        // NixOS's units for containers run scripts, so that they are known by their names alone. Its registry is no container.
        runs || name.strip_prefix(engine).is_some_and(|rest| rest.starts_with('-') && rest != "-registry.service")
    };
    match (is("podman"), is("docker")) {
        (true, _) => Some(false),
        (false, true) => Some(true),
        (false, false) => None,
    }
}

fn refusals(request: &UnitRequest, facts: &ServiceFacts, shown: &[PathBuf]) -> Vec<UnitError> {
    let UnitRequest { service, tunnel, dbus, .. } = request;
    let inside = Path::new("/run/netns").join(tunnel.as_str());
    let mut errors = Vec::new();
    if service.as_str().starts_with("vpn-exec@") {
        errors.push(UnitError::Keeper(service.clone()));
    }
    let bare = service.as_str().strip_suffix(".service").unwrap_or(service.as_str());
    if HOSTS_OWN.contains(&service.prefix().unwrap_or(bare)) {
        errors.push(UnitError::HostsOwn(service.clone()));
    }
    if let Some(is_docker) = container(service, facts) {
        errors.push(UnitError::Container { service: service.clone(), tunnel: tunnel.clone(), is_docker });
    }
    if ["systemd-nspawn", "container"].iter().any(|prefix| bare == format!("{prefix}@{tunnel}")) {
        errors.push(UnitError::Collision(tunnel.clone()));
    }
    if tunnel.as_str().contains(['=', '+']) {
        errors.push(UnitError::TunnelName(tunnel.clone()));
    }
    if facts.private_network {
        errors.push(UnitError::PrivateNetwork);
    }
    if let Some(other) = facts.network_namespace.as_ref().filter(|path| **path != inside) {
        errors.push(UnitError::OtherNamespace(other.clone()));
    }
    errors.extend(facts.joins_namespace_of.iter().cloned().map(UnitError::JoinsNamespaceOf));
    for socket in facts.sockets.iter().filter(|socket| socket.network_namespace.as_ref() != Some(&inside)) {
        // What is bound to a file, or to a name of its own, is reached by those on the machine.
        let outside = socket.listens.iter().find(|address| !address.starts_with(['/', '@']));
        errors.extend(outside.map(|address| UnitError::ListensOutside {
            unit: socket.name.clone(),
            address: address.clone(),
            tunnel: tunnel.clone(),
        }));
    }
    if facts.kind == "dbus" && *dbus != DbusAccess::System {
        errors.push(UnitError::Bus);
    }
    if let Some(file) = facts.pid_file.as_ref().filter(|file| file.starts_with("/run") || file.starts_with("/var/run"))
    {
        let real = file.strip_prefix("/var").map_or(file.clone(), |rest| Path::new("/").join(rest));
        if !shown.iter().any(|path| real.starts_with(path)) {
            errors.push(UnitError::PidFile(file.clone()));
        }
    }
    if facts.used_paths.iter().any(|path| path == Path::new("/run")) {
        errors.push(UnitError::UsesRun);
    }
    errors.extend(shown.iter().filter_map(|path| refusal_of_path(path, *dbus)));
    errors.extend(facts.bind_paths.iter().filter_map(|entry| refusal_of_bind(entry, shown, *dbus)));
    errors
}

/// What `/var/run` is another name of.
fn in_run(path: &Path) -> PathBuf {
    path.strip_prefix("/var/run").map_or_else(|_| path.to_owned(), |rest| Path::new("/run").join(rest))
}

fn refusal_of_bind(entry: &str, shown: &[PathBuf], dbus: DbusAccess) -> Option<UnitError> {
    let mut fields = entry.trim_start_matches(['-', '+']).split(':');
    let source = Path::new(fields.next().unwrap_or_default());
    let target = fields.next().map_or(source, Path::new);
    let (is_optional, source, target) = (entry.starts_with('-'), in_run(source), in_run(target));
    if target == Path::new("/run") {
        return Some(UnitError::BindsRun(entry.to_owned()));
    }
    // Of what is asked for, all has been said; and what a drop-in of ours has written is there already where it is replaced by another.
    let is_ours = |path: &str| is_optional && source == Path::new(path);
    let ours = SHOWN.iter().chain(&SHOWN_READ_ONLY).chain([&SYSTEM_BUS]).any(|path| is_ours(path));
    if source == target && (ours || shown.contains(&source)) || !target.starts_with("/run") {
        return None;
    }
    match refusal_of_path(&source, dbus) {
        Some(UnitError::Resolver { .. }) => Some(UnitError::BindsResolver(entry.to_owned())),
        _ => None,
    }
}

fn refusal_of_path(path: &Path, dbus: DbusAccess) -> Option<UnitError> {
    let is_plain = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-@".contains(c));
    let is_dotted = path.components().any(|part| matches!(part, std::path::Component::ParentDir));
    // In one way of writing it, without doubled slashes.
    let written: PathBuf = path.components().collect();
    let written = written.to_string_lossy();
    // What an instance's name may stand for.
    let rest = SPECIFIERS.iter().fold(written.to_string(), |text, specifier| text.replace(specifier, ""));
    if !path.starts_with("/run") || path == Path::new("/run") || is_dotted || !is_plain(&rest) {
        return Some(UnitError::Path(path.to_owned()));
    }
    if HARMLESS.contains(&written.as_ref()) {
        return None;
    }
    let fixed = written.split('%').next().unwrap_or_default();
    let is_open = fixed.len() < written.len();
    let meets = |hidden: &&PathBuf| {
        let hidden = hidden.to_string_lossy();
        let (beginning, is_pattern) = hidden.strip_suffix('*').map_or((hidden.as_ref(), false), |text| (text, true));
        let is_around = Path::new(beginning).starts_with(path) || is_open && beginning.starts_with(fixed);
        is_around || path.starts_with(beginning) || is_pattern && fixed.starts_with(beginning)
    };
    let hidden = hidden_paths(dbus == DbusAccess::System).iter().find(meets).map(|hidden| hidden.display().to_string());
    hidden.map(|hidden| UnitError::Resolver { path: path.to_owned(), hidden })
}
