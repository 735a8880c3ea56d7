//! `vpn-exec unit`: prints, or installs, the drop-in that puts a systemd service into a standing tunnel.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use super::{Failure, print};
use crate::cli::UnitArgs;
use crate::names::ServiceName;
use crate::plan::unit::{ServiceFacts, SocketFacts, UnitRequest, drop_in};

/// Where the machine's own units are.
const UNITS: &str = "/etc/systemd/system";

/// The drop-in's file.
const FILE: &str = "50-vpn-exec.conf";

pub(super) fn run(arguments: &UnitArgs) -> Result<ExitCode, Failure> {
    let UnitArgs { service, tunnel, show, dbus, install } = arguments;
    let request = UnitRequest { service: service.clone(), tunnel: tunnel.clone(), dbus: *dbus, show: show.clone() };
    let unit = Unit::read(service)?;
    if !unit.is_known {
        tracing::warn!("systemd does not tell of {service}, so what its unit says could not be considered");
    }
    let text = drop_in(&request, &unit.facts).map_err(|errors| {
        let reasons: Vec<String> = errors.iter().map(ToString::to_string).collect();
        Failure::new(format!("{service} cannot be put into the tunnel {tunnel}: {}", reasons.join("; ")))
    })?;
    if !*install {
        print(text.as_bytes())?;
        return Ok(ExitCode::SUCCESS);
    }
    let keeper = format!("vpn-exec@{tunnel}.service");
    let file = write(service, &text)?;
    print(format!("{} is written\n", file.display()).as_bytes())?;
    if unit.is_enabled {
        // A service that stopped with its tunnel would not be started with it again otherwise.
        let link = want(&keeper, service)?;
        print(format!("{} is made, so {service} is started with the tunnel\n", link.display()).as_bytes())?;
    }
    systemctl(&["daemon-reload"])?;
    print(format!("now it takes `systemctl restart {service}`\n").as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn write(service: &ServiceName, text: &str) -> Result<PathBuf, Failure> {
    let folder = Path::new(UNITS).join(format!("{service}.d"));
    let file = folder.join(FILE);
    let written = fs::create_dir_all(&folder).and_then(|()| fs::write(&file, text));
    written.map_err(|error| cannot_write(&file, &error))?;
    Ok(file)
}

/// Has the keeper want the service.
fn want(keeper: &str, service: &ServiceName) -> Result<PathBuf, Failure> {
    let folder = Path::new(UNITS).join(format!("{keeper}.wants"));
    let link = folder.join(service.as_str());
    let made = fs::create_dir_all(&folder).and_then(|()| match symlink(format!("../{service}"), &link) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    });
    made.map_err(|error| cannot_write(&link, &error))?;
    Ok(link)
}

fn cannot_write(path: &Path, error: &io::Error) -> Failure {
    Failure::new(format!("cannot write {}: {error}", path.display()))
        .advise("run it as root, or print the drop-in without --install and put it where your units are")
}

/// What systemd knows of a service.
struct Unit {
    facts: ServiceFacts,
    is_known: bool,
    is_enabled: bool,
}

impl Unit {
    fn read(service: &ServiceName) -> Result<Self, Failure> {
        let unknown = Self { facts: ServiceFacts::default(), is_known: false, is_enabled: false };
        // Of a template there is nothing but instances.
        if service.is_template() {
            return Ok(unknown);
        }
        let Some(properties) = show(service.as_str())? else { return Ok(unknown) };
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
        let words = |name: &str| text(name).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let path = |name: &str| Some(text(name)).filter(|path| !path.is_empty()).map(PathBuf::from);
        let used = words("ReadWritePaths").into_iter().chain(words("ReadOnlyPaths"));
        let facts = ServiceFacts {
            kind: text("Type").to_owned(),
            // A name may be followed by one of a link to it.
            runtime_directories: words("RuntimeDirectory")
                .iter()
                .filter_map(|name| name.split(':').next().map(str::to_owned))
                .collect(),
            used_paths: used.filter(|path| path.starts_with('/')).map(PathBuf::from).collect(),
            bind_paths: words("BindPaths").into_iter().chain(words("BindReadOnlyPaths")).collect(),
            pid_file: path("PIDFile"),
            private_network: text("PrivateNetwork") == "yes",
            network_namespace: path("NetworkNamespacePath"),
            joins_namespace_of: words("JoinsNamespaceOf"),
            sockets: words("TriggeredBy")
                .iter()
                .filter(|unit| unit.ends_with(".socket"))
                .filter_map(|unit| socket(unit).transpose())
                .collect::<Result<_, _>>()?,
        };
        Ok(Self { facts, is_known: true, is_enabled: text("UnitFileState") == "enabled" })
    }
}

fn socket(unit: &str) -> Result<Option<SocketFacts>, Failure> {
    let Some(properties) = show(unit)? else { return Ok(None) };
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
