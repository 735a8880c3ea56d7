//! `vpn-exec unit`: prints, or installs, the drop-in that puts a systemd service into a standing tunnel.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::print;
use crate::cli::UnitArgs;
use crate::failure::Failure;
use crate::linux::namespace::path_of;
use crate::names::{ServiceName, TunnelName};
use crate::plan::drop_in::{DropInRequest, render, warnings};
use crate::systemctl::{ANY, Unit, instance, show, systemctl};

/// The folder of the administrator's units (systemd.unit(5)).
const UNITS: &str = "/etc/systemd/system";

/// The name of the drop-in's file.
const FILE: &str = "50-vpn-exec.conf";

pub(super) fn run(arguments: &UnitArgs) -> Result<ExitCode, Failure> {
    let UnitArgs { service, tunnel, show: shown, dbus, install } = arguments;
    let mut unit = Unit::read(service)?;
    if !unit.is_known {
        tracing::warn!("cannot query systemd about {service}: the drop-in does not consider its unit");
    }
    if unit.name != *service {
        // `systemctl disable` removes the other name, and a drop-in for it would have no effect then.
        tracing::warn!("{service} is another name of {}; the drop-in is for the latter", unit.name);
    }
    let service = unit.name.clone();
    let former = tunnel_of(&file_of(&service))
        .filter(|former| unit.facts.network_namespace.as_deref() == Some(&path_of(former.as_str())));
    if former.is_some() {
        // That comes from the drop-in that this one replaces.
        unit.facts.network_namespace = None;
    }
    let request = DropInRequest { service: service.clone(), tunnel: tunnel.clone(), dbus: *dbus, show: shown.clone() };
    let text = render(&request, &unit.facts).map_err(|errors| {
        let reasons: Vec<String> = errors.iter().map(ToString::to_string).collect();
        let reasons = reasons.join("; ").replace(ANY, "%i");
        Failure::new(format!("cannot put {service} into the tunnel {tunnel}: {reasons}"))
    })?;
    let text = text.replace(ANY, "%i");
    for warning in warnings(&request, &unit.facts) {
        tracing::warn!("{warning}");
    }
    let keeper = format!("vpn-exec@{tunnel}.service");
    if show(&keeper)?.is_some_and(|known| known.get("LoadState").is_some_and(|state| state == "not-found")) {
        tracing::warn!("there is no {keeper}, which {service} needs to start: install vpn-exec@.service");
    }
    match install {
        true => install_drop_in(&text, &unit, tunnel, former.as_ref())?,
        false => print(&text)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes the drop-in that puts a unit into a tunnel, replaces one for a former tunnel, and reloads systemd.
fn install_drop_in(text: &str, unit: &Unit, tunnel: &TunnelName, former: Option<&TunnelName>) -> Result<(), Failure> {
    let service = &unit.name;
    let file = file_of(service);
    write(&file, text)?;
    print(&format!("wrote {}\n", file.display()))?;
    if let Some(former) = former.filter(|former| *former != tunnel) {
        let link = want_of(former, service);
        remove(&link).map_err(|error| cannot_write(&link, &error))?;
    }
    if unit.is_enabled {
        // Without this link, a service that stopped with its tunnel would not be started with it again.
        let link = want_of(tunnel, service);
        want(&link, service)?;
        print(&format!("created {}: {service} starts with the tunnel\n", link.display()))?;
    }
    systemctl(&["daemon-reload"])?;
    if let Some(setting) = overridden(service, tunnel)? {
        return Err(Failure::new(format!("{} has no effect: another file sets {setting}= after it", file.display()))
            .advise(format!("remove that line from the file that sorts after it, see `systemctl cat {service}`")));
    }
    print(&format!("to apply it: systemctl restart {service}\n"))
}

/// Returns the path of a service's drop-in.
fn file_of(service: &ServiceName) -> PathBuf {
    Path::new(UNITS).join(format!("{service}.d")).join(FILE)
}

/// Returns the path of the link by which a tunnel's keeper starts a service.
fn want_of(tunnel: &TunnelName, service: &ServiceName) -> PathBuf {
    Path::new(UNITS).join(format!("vpn-exec@{tunnel}.service.wants")).join(service.as_str())
}

/// Returns the tunnel that a drop-in written by vpn-exec puts its service into.
fn tunnel_of(file: &Path) -> Option<TunnelName> {
    let text = fs::read_to_string(file).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("NetworkNamespacePath="))?;
    Path::new(path).file_name()?.to_str()?.parse().ok()
}

fn write(file: &Path, text: &str) -> Result<(), Failure> {
    let folder = file.parent().unwrap_or(Path::new(UNITS));
    fs::create_dir_all(folder).and_then(|()| fs::write(file, text)).map_err(|error| cannot_write(file, &error))
}

fn remove(link: &Path) -> io::Result<()> {
    match fs::remove_file(link) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Returns a setting of the drop-in that a later file overrides. The last value counts, and an empty one clears a list.
fn overridden(service: &ServiceName, tunnel: &TunnelName) -> Result<Option<&'static str>, Failure> {
    let Some(properties) = show(&instance(service))? else { return Ok(None) };
    let is_own = properties.get("NetworkNamespacePath").is_some_and(|path| Path::new(path) == path_of(tunnel.as_str()));
    let has = |name: &str, part: &str| {
        properties.get(name).is_some_and(|value| value.split_whitespace().any(|entry| entry.contains(part)))
    };
    let held = [
        ("NetworkNamespacePath", is_own),
        ("TemporaryFileSystem", has("TemporaryFileSystem", "/run:")),
        ("BindReadOnlyPaths", has("BindReadOnlyPaths", ":/etc/resolv.conf")),
    ];
    Ok(held.into_iter().find(|(_, holds)| !holds).map(|(name, _)| name))
}

/// Creates the link by which the keeper starts the service.
fn want(link: &Path, service: &ServiceName) -> Result<(), Failure> {
    let made = fs::create_dir_all(link.parent().unwrap_or(Path::new(UNITS))).and_then(|()| {
        match symlink(format!("../{service}"), link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    });
    made.map_err(|error| cannot_write(link, &error))
}

fn cannot_write(path: &Path, error: &io::Error) -> Failure {
    Failure::new(format!("cannot write {}: {error}", path.display()))
        .advise("run it as root, or print the drop-in without --install and save it yourself")
}
