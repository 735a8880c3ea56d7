//! The files that describe tunnels, below `/run/vpn-exec` for the machine's, and in another directory for those of a
//! user ([`Scope`]). None of them holds a key.
//!
//! Each tunnel has a directory of its name, which its keeper locks ([`TunnelDirectory`]). The directory contains:
//!
//! - `state`: the [`TunnelState`], which a successor of a killed keeper needs. It contains the [`Mark`] of the tunnel's
//!   own objects.
//! - `plan`: the [`Plan`], which also reserves the addresses and the interface's name among the machine's tunnels.
//! - `socket`, `public`: the sockets at which clients connect to the keeper ([`crate::lease`]).
//! - `resolv.conf`: the file that programs inside see as `/etc/resolv.conf`. `hosts` and `nsswitch.conf` are the same
//!   for services, whose mounts the service manager makes.
//!
//! Beside the directories are the files that all tunnels share, `.netns` and `.forwarding`. The lock on the
//! directory of all tunnels itself protects these and the choice of addresses ([`PlanningLock`]).

mod base;
mod directory;
mod lookup_files;
mod mark;
mod reservation;
mod scope;
mod state;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::linux::namespace;
use crate::names::TunnelName;
use crate::plan::Plan;
pub use base::PlanningLock;
pub(crate) use base::{FORWARDING_FILE, change_shared};
pub use directory::TunnelDirectory;
pub use lookup_files::{HOSTS, NSSWITCH_CONF, read_host_file};
pub use mark::Mark;
pub use reservation::Reservation;
pub use scope::Scope;
pub(crate) use scope::user_directories;
pub use state::{Container, Holder, NetworkAttachment, TunnelState};

const STATE: &str = "state";
const PLAN: &str = "plan";
const SOCKET: &str = "socket";
const PUBLIC_SOCKET: &str = "public";
const RESOLV_CONF: &str = "resolv.conf";

/// Returns the path of a tunnel's directory.
pub fn path_of(name: &TunnelName) -> PathBuf {
    Scope::current().directory().join(name.as_str())
}

/// Returns the path of the keeper's socket.
pub fn socket_of(name: &TunnelName) -> PathBuf {
    path_of(name).join(SOCKET)
}

/// Returns the path of the keeper's socket for users who may only query the status.
pub fn public_socket_of(name: &TunnelName) -> PathBuf {
    path_of(name).join(PUBLIC_SOCKET)
}

/// Returns the path of the file that the programs inside see as `/etc/resolv.conf`.
pub fn resolv_conf_of(name: &TunnelName) -> PathBuf {
    path_of(name).join(RESOLV_CONF)
}

/// Reads the state of a tunnel, whose keeper may have been killed. Any user may read it. Returns None if there is no
/// tunnel.
///
/// # Errors
/// If the file cannot be read, or is damaged.
pub fn read(name: &TunnelName) -> io::Result<Option<TunnelState>> {
    read_json(&path_of(name).join(STATE))
}

/// Reads the plan of a tunnel, whose keeper may have been killed. Returns None if there is no tunnel.
///
/// # Errors
/// If the file cannot be read, or is damaged.
pub fn read_plan(name: &TunnelName) -> io::Result<Option<Plan>> {
    read_json(&path_of(name).join(PLAN))
}

/// Returns the names of all tunnels in order. Some of their keepers may have been killed. A user who may not list the
/// directory of tunnels gets the names of those whose namespaces have their names already.
///
/// # Errors
/// If neither directory can be listed.
pub fn names() -> io::Result<Vec<TunnelName>> {
    let unreadable =
        |path: &str, error: io::Error| io::Error::new(error.kind(), format!("cannot read {path}: {error}"));
    let scope = Scope::current();
    scope.check()?;
    let base = scope.directory();
    let entries = match fs::read_dir(&base) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => match fs::read_dir(namespace::NAMES_DIRECTORY)
        {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|error| unreadable(namespace::NAMES_DIRECTORY, error))?,
        },
        other => other.map_err(|error| unreadable(&base.display().to_string(), error))?,
    };
    let name =
        |entry: io::Result<fs::DirEntry>| -> Option<TunnelName> { entry.ok()?.file_name().to_str()?.parse().ok() };
    let mut names: Vec<TunnelName> = entries.filter_map(name).filter(|name| path_of(name).is_dir()).collect();
    names.sort_unstable();
    Ok(names)
}

/// Returns what the machine's other tunnels reserve, including those that are being created.
///
/// # Errors
/// If the tunnels cannot be listed.
pub fn reservations_of_others(own: &TunnelName) -> io::Result<Vec<Reservation>> {
    let others = names()?.into_iter().filter(|name| name != own);
    // If a plan cannot be read, the interface itself shows what is in use.
    Ok(others.filter_map(|name| read_json(&path_of(&name).join(PLAN)).ok()?).collect())
}

/// Reads a JSON file. Returns None if it does not exist.
fn read_json<T: DeserializeOwned>(file: &Path) -> io::Result<Option<T>> {
    match fs::read(file) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| {
            let message = format!(
                "{} is damaged, or of another version ({error}): if no tunnel of that name is up, remove the file",
                file.display()
            );
            io::Error::new(io::ErrorKind::InvalidData, message)
        }),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes a file, if it exists.
fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Returns the path at which a file is written before it replaces the present one.
fn temporary(file: &Path) -> PathBuf {
    file.with_extension("new")
}
