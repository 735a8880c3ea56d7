//! Checks whether a drop-in can put a service into a tunnel.

use std::path::{Path, PathBuf};

use super::{DropInError, DropInRequest, SHOWN, SHOWN_READ_ONLY, SYSTEM_BUS, ServiceFacts, below_real_run};
use crate::config::DbusAccess;
use crate::names::ServiceName;
use crate::plan::hidden_paths;

/// Services that the whole machine needs for names, links or the bus. In a tunnel they could not serve the host.
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

/// Files that only contain addresses of resolvers, which a service in the tunnel cannot reach. Units such as NixOS's
/// tor bind them, because `/etc/resolv.conf` may be a link to one of them.
const HARMLESS: [&str; 5] = [
    "/run/NetworkManager/no-stub-resolv.conf",
    "/run/NetworkManager/resolv.conf",
    "/run/resolvconf/resolv.conf",
    "/run/systemd/resolve/resolv.conf",
    "/run/systemd/resolve/stub-resolv.conf",
];

/// The specifiers that systemd replaces by the name of an instance (systemd.unit(5), Specifiers).
const SPECIFIERS: [&str; 4] = ["%i", "%I", "%j", "%J"];

/// Returns whether a container engine that runs a service's program is Docker; `None` if there is no such engine.
fn container(service: &ServiceName, facts: &ServiceFacts) -> Option<bool> {
    let name = service.as_str();
    let is = |engine: &str| {
        let runs = facts.programs.iter().any(|program| program == engine);
        // NixOS's units for containers run scripts, so they can only be recognized by their names. Its registry is
        // not a container.
        runs || name.strip_prefix(engine).is_some_and(|rest| rest.starts_with('-') && rest != "-registry.service")
    };
    match (is("podman"), is("docker")) {
        (true, _) => Some(false),
        (false, true) => Some(true),
        (false, false) => None,
    }
}

/// Returns all reasons why a drop-in cannot put a service into a tunnel. `shown` are the paths in `/run` that it would
/// show.
pub(super) fn errors(request: &DropInRequest, facts: &ServiceFacts, shown: &[PathBuf]) -> Vec<DropInError> {
    let DropInRequest { service, tunnel, dbus, .. } = request;
    let inside = Path::new("/run/netns").join(tunnel.as_str());
    let mut errors = Vec::new();
    if service.as_str().starts_with("vpn-exec@") {
        errors.push(DropInError::Keeper(service.clone()));
    }
    let bare = service.as_str().strip_suffix(".service").unwrap_or(service.as_str());
    if HOSTS_OWN.contains(&service.prefix().unwrap_or(bare)) {
        errors.push(DropInError::HostsOwn(service.clone()));
    }
    if let Some(is_docker) = container(service, facts) {
        errors.push(DropInError::Container { service: service.clone(), tunnel: tunnel.clone(), is_docker });
    }
    if ["systemd-nspawn", "container"].iter().any(|prefix| bare == format!("{prefix}@{tunnel}")) {
        errors.push(DropInError::Collision(tunnel.clone()));
    }
    if tunnel.as_str().contains(['=', '+']) {
        errors.push(DropInError::TunnelName(tunnel.clone()));
    }
    if facts.private_network {
        errors.push(DropInError::PrivateNetwork);
    }
    if let Some(other) = facts.network_namespace.as_ref().filter(|path| **path != inside) {
        errors.push(DropInError::OtherNamespace(other.clone()));
    }
    errors.extend(facts.joins_namespace_of.iter().cloned().map(DropInError::JoinsNamespaceOf));
    for socket in facts.sockets.iter().filter(|socket| socket.network_namespace.as_ref() != Some(&inside)) {
        // Only processes of this machine can connect to a socket that is bound to a file or an abstract name.
        let outside = socket.listens.iter().find(|address| !address.starts_with(['/', '@']));
        errors.extend(outside.map(|address| DropInError::ListensOutside {
            unit: socket.name.clone(),
            address: address.clone(),
            tunnel: tunnel.clone(),
        }));
    }
    if facts.kind == "dbus" && *dbus != DbusAccess::System {
        errors.push(DropInError::Bus);
    }
    if let Some(file) = facts.pid_file.as_ref().filter(|file| file.starts_with("/run") || file.starts_with("/var/run"))
    {
        let real = file.strip_prefix("/var").map_or(file.clone(), |rest| Path::new("/").join(rest));
        if !shown.iter().any(|path| real.starts_with(path)) {
            errors.push(DropInError::PidFile(file.clone()));
        }
    }
    if facts.used_paths.iter().any(|path| path == Path::new("/run")) {
        errors.push(DropInError::UsesRun);
    }
    errors.extend(shown.iter().filter_map(|path| path_error(path, *dbus)));
    errors.extend(facts.bind_paths.iter().filter_map(|entry| bind_error(entry, shown, *dbus)));
    errors
}

/// Returns why a service cannot keep an entry of `BindPaths=` or `BindReadOnlyPaths=`.
fn bind_error(entry: &str, shown: &[PathBuf], dbus: DbusAccess) -> Option<DropInError> {
    let mut fields = entry.trim_start_matches(['-', '+']).split(':');
    let source = Path::new(fields.next().unwrap_or_default());
    let target = fields.next().map_or(source, Path::new);
    let (is_optional, source, target) = (entry.starts_with('-'), below_real_run(source), below_real_run(target));
    if target == Path::new("/run") {
        return Some(DropInError::BindsRun(entry.to_owned()));
    }
    // Requested paths are checked already. Entries of a drop-in that this one replaces are still in the unit.
    let is_own_entry = |path: &&str| is_optional && source == Path::new(path);
    let is_ours = SHOWN.iter().chain(&SHOWN_READ_ONLY).chain([&SYSTEM_BUS]).any(is_own_entry);
    if source == target && (is_ours || shown.contains(&source)) || !target.starts_with("/run") {
        return None;
    }
    match path_error(&source, dbus) {
        Some(DropInError::Resolver { .. }) => Some(DropInError::BindsResolver(entry.to_owned())),
        _ => None,
    }
}

/// Returns why a path cannot be shown to a service.
fn path_error(path: &Path, dbus: DbusAccess) -> Option<DropInError> {
    let is_plain = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-@".contains(c));
    let is_dotted = path.components().any(|part| matches!(part, std::path::Component::ParentDir));
    // Without doubled slashes.
    let written: PathBuf = path.components().collect();
    let written = written.to_string_lossy();
    // A specifier may stand for any instance's name.
    let rest = SPECIFIERS.iter().fold(written.to_string(), |text, specifier| text.replace(specifier, ""));
    if !path.starts_with("/run") || path == Path::new("/run") || is_dotted || !is_plain(&rest) {
        return Some(DropInError::Path(path.to_owned()));
    }
    if HARMLESS.contains(&written.as_ref()) {
        return None;
    }
    let fixed = written.split('%').next().unwrap_or_default();
    let has_specifier = fixed.len() < written.len();
    let overlaps = |hidden: &&PathBuf| {
        let hidden = hidden.to_string_lossy();
        let (prefix, is_pattern) = hidden.strip_suffix('*').map_or((hidden.as_ref(), false), |text| (text, true));
        let contains_it = Path::new(prefix).starts_with(path) || has_specifier && prefix.starts_with(fixed);
        contains_it || path.starts_with(prefix) || is_pattern && fixed.starts_with(prefix)
    };
    let hidden =
        hidden_paths(dbus == DbusAccess::System).iter().find(overlaps).map(|hidden| hidden.display().to_string());
    hidden.map(|hidden| DropInError::Resolver { path: path.to_owned(), hidden })
}
