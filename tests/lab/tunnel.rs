//! A running tunnel as a test finds it, whoever made it.
//!
//! Where [`variables::ROOTLESS`] is set, tests have vpn-exec make its tunnels in a user namespace. Their namespaces
//! have no names, and their files are in another directory.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, bail};
use vpn_exec::linux::namespace::{NameLookup, NetworkNamespace, look_up, path_of};
use vpn_exec::names::TunnelName;
use vpn_exec::registry::{self, Scope, TunnelState};
use vpn_exec::tunnel::rootless;

use crate::shared::variables;

/// The directory in which a user's tunnels are below `vpn-exec`.
pub const RUNTIME_DIRECTORY: &str = "/run/user/0";

/// Returns whether tests have vpn-exec make tunnels without root.
pub fn is_rootless() -> bool {
    variables::is_set(variables::ROOTLESS)
}

/// Requires that tunnels are root's, for a test of what only these can have.
///
/// # Errors
/// [`Skip`](crate::Skip) if vpn-exec makes them without root.
pub fn needs_root(what: &str) -> Result<()> {
    if is_rootless() { Err(crate::Skip::by_design(format_args!("it needs root's tunnels: {what}"))) } else { Ok(()) }
}

/// Makes the calling process look for tunnels where vpn-exec has them.
pub(crate) fn enter_scope() {
    if is_rootless() {
        Scope::User.enter();
    }
}

/// Adds the option by which vpn-exec needs no root, to a command line that makes or joins a tunnel.
pub(crate) fn with_option<'a>(words: impl Iterator<Item = &'a OsStr>) -> Vec<&'a OsStr> {
    let mut words: Vec<&OsStr> = words.collect();
    let command = words.first().and_then(|word| word.to_str()).unwrap_or_default();
    let place = match command {
        "up" | "shell" | "plan" | "reload" => Some(1),
        _ if command.starts_with("--") && command != "--" => Some(0),
        _ => None,
    };
    if let Some(place) = place.filter(|_| is_rootless()) {
        words.insert(place, OsStr::new("--rootless"));
    }
    words
}

/// Returns the state of a tunnel.
///
/// # Errors
/// If there is no such tunnel.
pub fn state(name: &str) -> Result<TunnelState> {
    let name: TunnelName = name.parse()?;
    registry::read(&name)?.with_context(|| format!("the tunnel {name} has no state"))
}

/// Returns whether a tunnel exists.
///
/// # Errors
/// If the name is none of a tunnel.
pub fn exists(name: &str) -> Result<bool> {
    Ok(registry::path_of(&name.parse()?).exists() || path_of(name).exists())
}

/// Opens the namespace of a tunnel.
///
/// # Errors
/// If there is no such tunnel.
pub fn namespace(name: &str) -> Result<NetworkNamespace> {
    if is_rootless() {
        let state = state(name)?;
        let held = || held_by(state.keeper.cast_signed(), &state);
        return rootless::find_namespace(&state).or_else(held).context("the namespace of the tunnel has ended");
    }
    match look_up(&path_of(name))? {
        NameLookup::Namespace(namespace) => Ok(namespace),
        NameLookup::File(_) | NameLookup::Free => bail!("the name {name} leads to no namespace"),
    }
}

/// Opens the namespace that a keeper holds, in which no process may be yet.
fn held_by(keeper: i32, state: &TunnelState) -> Option<NetworkNamespace> {
    let descriptors = fs::read_dir(format!("/proc/{keeper}/fd")).ok()?.flatten();
    let mut namespaces = descriptors.filter_map(|entry| {
        let target = fs::read_link(entry.path()).ok()?;
        let is_network = target.to_string_lossy().starts_with("net:[");
        is_network
            .then(|| File::open(entry.path()).ok())
            .flatten()
            .map(|file| NetworkNamespace::from(OwnedFd::from(file)))
    });
    namespaces.find(|namespace| namespace.id().is_ok_and(|id| id == state.namespace))
}
