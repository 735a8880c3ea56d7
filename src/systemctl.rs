//! What systemd knows of units, asked by systemctl(1).

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::failure::Failure;
use crate::names::ServiceName;
use crate::plan::drop_in::{ServiceFacts, SocketFacts};

/// The instance that stands for all of a template: what its unit says of this one, it says of each. Nobody calls one of theirs so.
pub(crate) const ANY: &str = "vpnexecany";

/// The name by which systemd tells of a service. Of a template there is nothing but instances.
pub(crate) fn instance(service: &ServiceName) -> String {
    match service.prefix() {
        Some(prefix) if service.is_template() => format!("{prefix}@{ANY}.service"),
        _ => service.to_string(),
    }
}

/// What systemd knows of a service.
pub(crate) struct Unit {
    /// Its own name, where it has others.
    pub(crate) name: ServiceName,
    pub(crate) facts: ServiceFacts,
    /// Whether systemd tells of it.
    pub(crate) is_known: bool,
    /// Whether it is started with the system.
    pub(crate) is_enabled: bool,
}

impl Unit {
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
            // `{ path=/bin/true ; argv[]=… ; … }`, a line each.
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
pub(crate) fn used_path(entry: &str) -> Option<PathBuf> {
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
pub(crate) fn show(unit: &str) -> Result<Option<HashMap<String, String>>, Failure> {
    if !Path::new("/run/systemd/system").is_dir() {
        return Ok(None);
    }
    Ok(Some(properties(&systemctl(&["show", "--", unit])?)))
}

/// The properties in what `systemctl show` prints.
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

pub(crate) fn systemctl(arguments: &[&str]) -> Result<String, Failure> {
    let run = Command::new("systemctl").args(arguments).stdin(Stdio::null()).output();
    let what = format!("systemctl {}", arguments.join(" "));
    let output = run.map_err(|error| Failure::new(format!("cannot run `{what}`: {error}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::new(format!("`{what}` has failed: {}", said.trim().replace('\n', "; "))));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
