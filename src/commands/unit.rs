//! `vpn-exec unit`: prints, or installs, the drop-in that puts a systemd service into a standing tunnel.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use super::{Failure, print};
use crate::cli::UnitArgs;
use crate::linux::namespace::path_of;
use crate::names::{ServiceName, TunnelName};
use crate::plan::unit::{ServiceFacts, SocketFacts, UnitRequest, drop_in};

/// Where the machine's own units are.
const UNITS: &str = "/etc/systemd/system";

/// The drop-in's file.
const FILE: &str = "50-vpn-exec.conf";

/// The instance that stands for all of a template: what its unit says of this one, it says of each. Nobody calls one of theirs so.
const ANY: &str = "vpnexecany";

pub(super) fn run(arguments: &UnitArgs) -> Result<ExitCode, Failure> {
    let UnitArgs { service, tunnel, show, dbus, install } = arguments;
    let mut unit = Unit::read(service)?;
    if !unit.is_known {
        tracing::warn!("systemd does not tell of {service}, so what its unit says could not be considered");
    }
    if unit.name != *service {
        // A drop-in for the other name goes when that name does: `systemctl disable` takes it away.
        tracing::warn!("{service} is another name of {}, which the drop-in is for", unit.name);
    }
    let service = &unit.name;
    let file = Path::new(UNITS).join(format!("{service}.d")).join(FILE);
    let former =
        tunnel_of(&file).filter(|former| unit.facts.network_namespace.as_deref() == Some(&path_of(former.as_str())));
    if former.is_some() {
        // That is what the drop-in says which this one takes the place of.
        unit.facts.network_namespace = None;
    }
    let request = UnitRequest { service: service.clone(), tunnel: tunnel.clone(), dbus: *dbus, show: show.clone() };
    let text = drop_in(&request, &unit.facts).map_err(|errors| {
        let reasons: Vec<String> = errors.iter().map(ToString::to_string).collect();
        let reasons = reasons.join("; ").replace(ANY, "%i");
        Failure::new(format!("{service} cannot be put into the tunnel {tunnel}: {reasons}"))
    })?;
    let text = text.replace(ANY, "%i");
    let keeper = format!("vpn-exec@{tunnel}.service");
    if self::show(&keeper)?.is_some_and(|known| known.get("LoadState").is_some_and(|state| state == "not-found")) {
        tracing::warn!("there is no {keeper}, without which {service} does not start: install vpn-exec@.service");
    }
    if !*install {
        print(text.as_bytes())?;
        return Ok(ExitCode::SUCCESS);
    }
    write(&file, &text)?;
    print(format!("{} is written\n", file.display()).as_bytes())?;
    let wanted =
        |tunnel: &TunnelName| Path::new(UNITS).join(format!("vpn-exec@{tunnel}.service.wants")).join(service.as_str());
    if let Some(former) = former.filter(|former| former != tunnel) {
        let link = wanted(&former);
        remove(&link).map_err(|error| cannot_write(&link, &error))?;
    }
    if unit.is_enabled {
        // A service that stopped with its tunnel would not be started with it again otherwise.
        let link = wanted(tunnel);
        want(&link, service)?;
        print(format!("{} is made, so {service} is started with the tunnel\n", link.display()).as_bytes())?;
    }
    systemctl(&["daemon-reload"])?;
    if let Some(setting) = lost(service, tunnel)? {
        return Err(Failure::new(format!("{} does not hold: {setting}= is set anew after it", file.display()))
            .advise(format!("take that out of the file that sorts after it, see `systemctl cat {service}`")));
    }
    print(format!("now it takes `systemctl restart {service}`\n").as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// Which tunnel a drop-in of ours puts its service into.
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

/// Which setting of the drop-in another one takes back: what is said last holds, and an empty list takes away all that was in it.
fn lost(service: &ServiceName, tunnel: &TunnelName) -> Result<Option<&'static str>, Failure> {
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

/// Has the keeper want the service.
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
        .advise("run it as root, or print the drop-in without --install and put it where your units are")
}

/// The name by which systemd tells of a service. Of a template there is nothing but instances.
fn instance(service: &ServiceName) -> String {
    match service.prefix() {
        Some(prefix) if service.is_template() => format!("{prefix}@{ANY}.service"),
        _ => service.to_string(),
    }
}

/// What systemd knows of a service.
struct Unit {
    /// Its own name, where it has others.
    name: ServiceName,
    facts: ServiceFacts,
    is_known: bool,
    is_enabled: bool,
}

impl Unit {
    fn read(service: &ServiceName) -> Result<Self, Failure> {
        let Some(properties) = show(&instance(service))? else {
            let (name, facts) = (service.clone(), ServiceFacts::default());
            return Ok(Self { name, facts, is_known: false, is_enabled: false });
        };
        let text = |name: &str| properties.get(name).map(String::as_str).unwrap_or_default();
        match text("LoadState") {
            "loaded" => {}
            "not-found" => {
                return Err(
                    Failure::new(format!("there is no service {service}")).advise("see `systemctl list-unit-files`")
                );
            }
            state => return Err(Failure::new(format!("systemd cannot use {service}: it is {state}"))),
        }
        let name: ServiceName = text("Id").replace(ANY, "").parse().unwrap_or_else(|_| service.clone());
        let words = |name: &str| text(name).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let path = |name: &str| Some(text(name)).filter(|path| !path.is_empty()).map(PathBuf::from);
        let used = ["ReadWritePaths", "ReadOnlyPaths", "ExecPaths", "NoExecPaths"].into_iter().flat_map(words);
        let triggers = words("TriggeredBy").into_iter().filter(|unit| unit.ends_with(".socket"));
        let mut sockets: Vec<SocketFacts> =
            triggers.filter_map(|unit| socket(&unit, false).transpose()).collect::<Result<_, _>>()?;
        // One that starts an instance for each connection is not told of until there is a connection.
        let accepting = name.prefix().map(|prefix| socket(&format!("{prefix}.socket"), true)).transpose()?.flatten();
        sockets.extend(accepting.filter(|accepting| sockets.iter().all(|socket| socket.name != accepting.name)));
        let facts = ServiceFacts {
            kind: text("Type").to_owned(),
            // A name may be followed by one of a link to it.
            runtime_directories: words("RuntimeDirectory")
                .iter()
                .filter_map(|name| name.split(':').next().map(str::to_owned))
                .collect(),
            used_paths: used.filter_map(|path| used_path(&path)).collect(),
            bind_paths: words("BindPaths").into_iter().chain(words("BindReadOnlyPaths")).collect(),
            pid_file: path("PIDFile"),
            private_network: text("PrivateNetwork") == "yes",
            network_namespace: path("NetworkNamespacePath"),
            joins_namespace_of: words("JoinsNamespaceOf"),
            sockets,
        };
        // What was made of a script for System V's init is enabled by links that are none of systemd's.
        let is_enabled = match text("UnitFileState") {
            "enabled" => !service.is_template(),
            "generated" => !words("WantedBy").is_empty(),
            _ => false,
        };
        Ok(Self { name, facts, is_known: true, is_enabled })
    }
}

/// An entry of `ReadWritePaths=` or the like, if it must exist or is `/run`.
fn used_path(entry: &str) -> Option<PathBuf> {
    let path = Path::new(entry.trim_start_matches(['-', '+']));
    (path == Path::new("/run") || path == Path::new(entry)).then(|| path.to_owned())
}

/// What a socket unit says, if it is in use; and, if `accepts`, only of one that starts an instance of its service for each connection
/// (systemd.socket(5), Accept=).
fn socket(unit: &str, accepts: bool) -> Result<Option<SocketFacts>, Failure> {
    let Some(properties) = show(unit)? else { return Ok(None) };
    let is = |name: &str, values: &[&str]| values.contains(&properties.get(name).map_or("", String::as_str));
    // It may be known for no more than that a service is ordered after it.
    let starts = ["WantedBy", "RequiredBy", "BoundBy", "UpheldBy"].iter().any(|name| !is(name, &[""]));
    let is_unused = is("ActiveState", &["inactive", "failed"]) && is("UnitFileState", &["disabled", "masked", ""]);
    if is_unused && !starts || accepts && !is("Accept", &["yes"]) {
        return Ok(None);
    }
    let listens = properties.get("Listen").map(String::as_str).unwrap_or_default().lines();
    Ok(Some(SocketFacts {
        name: unit.to_owned(),
        // The kind follows in brackets: `[::]:80 (Stream)`.
        listens: listens.map(|line| line.rsplit_once(" (").map_or(line, |(address, _)| address).to_owned()).collect(),
        network_namespace: properties.get("NetworkNamespacePath").filter(|path| !path.is_empty()).map(PathBuf::from),
    }))
}

/// The properties of a unit; those that are said several times are lines of one text. None where systemd is not running.
fn show(unit: &str) -> Result<Option<HashMap<String, String>>, Failure> {
    if !Path::new("/run/systemd/system").is_dir() {
        return Ok(None);
    }
    let text = systemctl(&["show", "--", unit])?;
    let mut properties: HashMap<String, String> = HashMap::new();
    for (name, value) in text.lines().filter_map(|line| line.split_once('=')) {
        properties
            .entry(name.to_owned())
            .and_modify(|values| {
                values.push('\n');
                values.push_str(value);
            })
            .or_insert_with(|| value.to_owned());
    }
    Ok(Some(properties))
}

fn systemctl(arguments: &[&str]) -> Result<String, Failure> {
    let run = Command::new("systemctl").args(arguments).stdin(Stdio::null()).output();
    let what = format!("systemctl {}", arguments.join(" "));
    let output = run.map_err(|error| Failure::new(format!("cannot run `{what}`: {error}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::new(format!("`{what}` has failed: {}", said.trim().replace('\n', "; "))));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
