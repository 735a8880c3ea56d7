//! Queries systemd about units with systemctl(1).

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::failure::Failure;
use crate::names::ServiceName;
use crate::plan::drop_in::{ServiceFacts, SocketFacts};

/// The name of an instance that stands for all instances of a template. It is unlikely to be that of a real one.
pub(crate) const ANY: &str = "vpnexecany";

/// Returns the name to query a service by. systemd loads instances of a template, but not the template itself.
pub(crate) fn instance(service: &ServiceName) -> String {
    match service.prefix() {
        Some(prefix) if service.is_template() => format!("{prefix}@{ANY}.service"),
        _ => service.to_string(),
    }
}

/// A service as systemd knows it.
pub(crate) struct Unit {
    /// The main name, where the service has aliases.
    pub(crate) name: ServiceName,
    /// The properties that decide about a drop-in.
    pub(crate) facts: ServiceFacts,
    /// Whether systemd runs, and the facts come from it.
    pub(crate) is_known: bool,
    /// Whether the service is started at boot.
    pub(crate) is_enabled: bool,
}

impl Unit {
    /// Queries systemd about a service.
    ///
    /// # Errors
    /// If there is no such service, or systemctl fails.
    pub(crate) fn read(service: &ServiceName) -> Result<Self, Failure> {
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
            state => return Err(Failure::new(format!("systemd cannot use {service}: its unit is {state}"))),
        }
        let name: ServiceName = text("Id").replace(ANY, "").parse().unwrap_or_else(|_| service.clone());
        let words = |name: &str| text(name).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let path = |name: &str| Some(text(name)).filter(|path| !path.is_empty()).map(PathBuf::from);
        let used = ["ReadWritePaths", "ReadOnlyPaths", "ExecPaths", "NoExecPaths"].into_iter().flat_map(words);
        let triggers = words("TriggeredBy").into_iter().filter(|unit| unit.ends_with(".socket"));
        let mut sockets: Vec<SocketFacts> =
            triggers.filter_map(|unit| socket(&unit, false).transpose()).collect::<Result<_, _>>()?;
        // TriggeredBy= lacks a socket with Accept=yes until there is a connection.
        let accepting = name.prefix().map(|prefix| socket(&format!("{prefix}.socket"), true)).transpose()?.flatten();
        sockets.extend(accepting.filter(|accepting| sockets.iter().all(|socket| socket.name != accepting.name)));
        let facts = ServiceFacts {
            kind: text("Type").to_owned(),
            // `NAME:LINK` also creates a symbolic link.
            runtime_directories: words("RuntimeDirectory")
                .iter()
                .filter_map(|name| name.split(':').next().map(str::to_owned))
                .collect(),
            used_paths: used.filter_map(|path| used_path(&path)).collect(),
            bind_paths: words("BindPaths").into_iter().chain(words("BindReadOnlyPaths")).collect(),
            // One line per command: `{ path=/bin/true ; argv[]=… ; … }`.
            programs: text("ExecStart")
                .lines()
                .filter_map(|line| line.split_once("path=")?.1.split(' ').next())
                .filter_map(|path| Some(Path::new(path).file_name()?.to_str()?.to_owned()))
                .collect(),
            privileged: ["", "root", "0"].contains(&text("User"))
                && text("DynamicUser") != "yes"
                && words("CapabilityBoundingSet").iter().any(|name| name == "cap_sys_admin"),
            pid_file: path("PIDFile"),
            private_network: text("PrivateNetwork") == "yes",
            network_namespace: path("NetworkNamespacePath"),
            joins_namespace_of: words("JoinsNamespaceOf"),
            sockets,
        };
        // A unit generated from a System V init script is enabled by links outside of systemd.
        let is_enabled = match text("UnitFileState") {
            "enabled" => !service.is_template(),
            "generated" => !words("WantedBy").is_empty(),
            _ => false,
        };
        Ok(Self { name, facts, is_known: true, is_enabled })
    }
}

/// Returns the path in an entry of `ReadWritePaths=` or the like, if it must exist or is `/run`.
pub(crate) fn used_path(entry: &str) -> Option<PathBuf> {
    let path = Path::new(entry.trim_start_matches(['-', '+']));
    (path == Path::new("/run") || path == Path::new(entry)).then(|| path.to_owned())
}

/// Queries systemd about a socket unit that is in use. If `accepts`, only one that starts an instance of its service
/// for each connection counts (systemd.socket(5), Accept=).
fn socket(unit: &str, accepts: bool) -> Result<Option<SocketFacts>, Failure> {
    let Some(properties) = show(unit)? else { return Ok(None) };
    let is = |name: &str, values: &[&str]| values.contains(&properties.get(name).map_or("", String::as_str));
    // systemd also knows units that do not exist, if another unit is ordered after them.
    let starts = ["WantedBy", "RequiredBy", "BoundBy", "UpheldBy"].iter().any(|name| !is(name, &[""]));
    let is_unused = is("ActiveState", &["inactive", "failed"]) && is("UnitFileState", &["disabled", "masked", ""]);
    if is_unused && !starts || accepts && !is("Accept", &["yes"]) {
        return Ok(None);
    }
    let listens = properties.get("Listen").map(String::as_str).unwrap_or_default().lines();
    Ok(Some(SocketFacts {
        name: unit.to_owned(),
        // As `[::]:80 (Stream)`.
        listens: listens.map(|line| line.rsplit_once(" (").map_or(line, |(address, _)| address).to_owned()).collect(),
        network_namespace: properties.get("NetworkNamespacePath").filter(|path| !path.is_empty()).map(PathBuf::from),
    }))
}

/// Returns the properties of a unit, a repeated one with a line for each value. None if systemd does not run.
pub(crate) fn show(unit: &str) -> Result<Option<HashMap<String, String>>, Failure> {
    if !Path::new("/run/systemd/system").is_dir() {
        return Ok(None);
    }
    Ok(Some(properties(&systemctl(&["show", "--", unit])?)))
}

/// Parses the output of `systemctl show`.
pub(crate) fn properties(text: &str) -> HashMap<String, String> {
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
    properties
}

/// Runs systemctl and returns its output.
///
/// # Errors
/// If it cannot be run, or fails.
pub(crate) fn systemctl(arguments: &[&str]) -> Result<String, Failure> {
    let run = Command::new("systemctl").args(arguments).stdin(Stdio::null()).output();
    let what = format!("systemctl {}", arguments.join(" "));
    let output = run.map_err(|error| Failure::new(format!("cannot run `{what}`: {error}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::new(format!("`{what}` failed: {}", said.trim().replace('\n', "; "))));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
