//! The places where a tunnel's name is looked up, and the names that exist there.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::names::TunnelName;
use crate::names::closest;
use crate::registry;

/// The environment variable that names a tunnel where the command line does not. A program finds its own tunnel's name
/// in it.
pub const TUNNEL_VARIABLE: &str = "VPN_EXEC_TUNNEL";

/// The environment variable that names a provider's file where the command line names no tunnel.
pub const CONFIG_VARIABLE: &str = "VPN_EXEC_CONFIG";

/// The folder of the machine's profiles.
pub(crate) const PROFILES: &str = "/etc/vpn-exec";

/// The folder of wg-quick's files (wg-quick(8)).
const WIREGUARD: &str = "/etc/wireguard";

/// Returns the paths at which the profile of a name may be: the machine's, then the user's own.
pub(crate) fn profile_paths(name: &TunnelName) -> impl Iterator<Item = PathBuf> + use<> {
    let file = format!("{name}.toml");
    profile_folders().map(move |folder| folder.join(&file))
}

/// Returns the path at which wg-quick finds the file of a name.
pub(crate) fn wg_quick_path(name: &TunnelName) -> PathBuf {
    Path::new(WIREGUARD).join(format!("{name}.conf"))
}

/// Returns the names that can be given for a tunnel: those of running tunnels, of profiles and of files in
/// `/etc/wireguard`, as far as this process may list them.
pub fn names() -> Vec<String> {
    let mut names: BTreeSet<String> = running().into_iter().collect();
    for folder in profile_folders() {
        names.extend(stems(&folder, "toml"));
    }
    names.extend(stems(Path::new(WIREGUARD), "conf"));
    names.into_iter().collect()
}

/// Returns the names of the machine's profiles in order, as far as this process may list them.
pub(crate) fn machine_profiles() -> Vec<TunnelName> {
    let names: BTreeSet<TunnelName> =
        stems(Path::new(PROFILES), "toml").iter().filter_map(|stem| stem.parse().ok()).collect();
    names.into_iter().collect()
}

/// Returns the names of running tunnels, as far as this process may list them.
pub(crate) fn running() -> Vec<String> {
    registry::names().unwrap_or_default().iter().map(ToString::to_string).collect()
}

/// Returns the name among `names` that was probably meant by one that does not exist, also where that is a file's name.
pub(crate) fn similar(name: &TunnelName, names: &[String]) -> Option<String> {
    let text = name.as_str();
    let stem = text.strip_suffix(".conf").or_else(|| text.strip_suffix(".toml"));
    let exact = stem.and_then(|stem| names.iter().find(|name| *name == stem));
    exact.map(String::as_str).or_else(|| closest(text, names.iter().map(String::as_str))).map(str::to_owned)
}

fn profile_folders() -> impl Iterator<Item = PathBuf> {
    std::iter::once(PathBuf::from(PROFILES)).chain(own_profiles())
}

fn own_profiles() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|folder| folder.is_absolute());
    let folder = absolute("XDG_CONFIG_HOME").or_else(|| absolute("HOME").map(|home| home.join(".config")))?;
    Some(folder.join("vpn-exec"))
}

/// Returns the names of the files in a folder that have an extension and are valid names of tunnels.
fn stems(folder: &Path, extension: &str) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let files = entries.filter(|path| path.extension() == Some(OsStr::new(extension)));
    let stems = files.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()));
    stems.filter(|stem| stem.parse::<TunnelName>().is_ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_similar_name_is_found_by_a_typo_or_an_extension() {
        let names = ["mullvad", "wg0"].map(str::to_owned);
        let similar = |name: &str| similar(&name.parse().expect("a name"), &names);
        assert_eq!(similar("mulvad").as_deref(), Some("mullvad"));
        assert_eq!(similar("wg0.conf").as_deref(), Some("wg0"));
        assert_eq!(similar("mullvad.toml").as_deref(), Some("mullvad"));
        assert_eq!(similar("office"), None);
    }

    #[test]
    fn names_are_the_stems_of_files_with_an_extension() {
        let folder = tempfile::tempdir().expect("a folder");
        for file in ["a.toml", "b c.toml", "d.conf", "e.toml~", ".toml"] {
            std::fs::write(folder.path().join(file), "").expect("a file");
        }
        assert_eq!(stems(folder.path(), "toml"), ["a"]);
        assert!(stems(&folder.path().join("missing"), "toml").is_empty());
    }
}
