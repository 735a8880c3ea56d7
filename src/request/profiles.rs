//! Profiles: where they are found, and the provider's file that each names.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use nix::unistd::{Uid, User};

use super::files::{read_public, render};
use crate::config::{Profile, profile};
use crate::failure::Failure;
use crate::names::TunnelName;

/// The prefix of a provider's file that is a credential of the service (systemd.exec(5)).
const CREDENTIAL: &str = "credential:";

/// The directory of the machine's profiles.
const PROFILES: &str = "/etc/vpn-exec";

/// Checks a profile, without its provider's file.
///
/// # Errors
/// If the file cannot be read or is wrong.
pub(crate) fn check_profile(path: &Path) -> Result<(), Failure> {
    parse_profile(path).map(|_| ())
}

pub(super) fn parse_profile(path: &Path) -> Result<Profile, Failure> {
    let text = read_public(path)?;
    profile::parse(&text.name, &text.contents).map_err(|found| Failure::new(render(&found)))
}

/// Reads the machine's profile of a name or, if there is none, the user's own.
pub(super) fn read_profile(name: &TunnelName) -> Result<Profile, Failure> {
    let Some(path) = profiles(name).find(|path| path.exists()) else {
        let places: Vec<String> = profiles(name).map(|path| path.display().to_string()).collect();
        let text = name.as_str();
        let advice = match (text.strip_suffix(".conf"), text.strip_suffix(".toml")) {
            (Some(_), _) => "name the provider's file with --config FILE".to_owned(),
            (_, Some(stem)) => format!("a profile is named without its ending: {stem}"),
            _ => "write one (all it needs is a line `wireguard = \"FILE\"`), or name the provider's file".to_owned(),
        };
        let what = if places.len() > 1 { "neither exists" } else { "it does not exist" };
        return Err(Failure::new(format!("no such profile: {name}: {}: {what}", places.join(", "))).advise(advice));
    };
    let mut profile = parse_profile(&path)?;
    if credential_of(&profile.wireguard).is_some() {
        return Ok(profile);
    }
    if let Ok(rest) = profile.wireguard.strip_prefix("~") {
        profile.wireguard = home_of(&path)?.join(rest);
    } else if let Some(folder) = path.parent() {
        // A relative path starts at the profile, so that it does not depend on the working directory.
        profile.wireguard = folder.join(&profile.wireguard);
    }
    Ok(profile)
}

/// Returns the home directory that `~` stands for in a profile.
pub(super) fn home_of(profile: &Path) -> Result<PathBuf, Failure> {
    let entry = |uid: u32| User::from_uid(Uid::from_raw(uid)).ok().flatten().map(|user| user.dir);
    choose_home(profile, nix::unistd::geteuid().as_raw(), |name| std::env::var_os(name), entry).ok_or_else(|| {
        Failure::new(format!("cannot find the home that `~` stands for in {}", profile.display()))
            .advise("write the whole path of the provider's file, or set HOME")
    })
}

/// Chooses that home directory. In a profile of the machine it is root's, so that the profile means the same file whoever runs
/// vpn-exec, a service included. In a user's own it is that user's, also where sudo keeps the folder of its caller's
/// profiles, but not the caller's HOME. `variable` reads the environment, `entry` the user database.
pub(super) fn choose_home(
    profile: &Path,
    user: u32,
    variable: impl Fn(&str) -> Option<OsString>,
    entry: impl Fn(u32) -> Option<PathBuf>,
) -> Option<PathBuf> {
    if profile.starts_with(PROFILES) {
        // A small container may have no user database; root's home is there everywhere.
        return Some(entry(0).unwrap_or_else(|| "/root".into())).filter(|home| home.is_absolute());
    }
    let number = || variable("SUDO_UID").filter(|_| user == 0)?.to_str()?.parse().ok();
    let caller = number().and_then(&entry).filter(|home| is_below(profile, home));
    let own = variable("HOME").map(PathBuf::from);
    caller.or(own).filter(|home| home.is_absolute()).or_else(|| entry(user))
}

/// Returns whether a path is below a home; `/` is no user's home.
pub(super) fn is_below(path: &Path, home: &Path) -> bool {
    home.is_absolute() && home.parent().is_some() && path.starts_with(home)
}

/// Returns the paths at which the profile of a name is looked for, in this order.
pub(super) fn profiles(name: &TunnelName) -> impl Iterator<Item = PathBuf> {
    let file = format!("{name}.toml");
    std::iter::once(PathBuf::from(PROFILES)).chain(own_profiles()).map(move |folder| folder.join(&file))
}

pub(super) fn own_profiles() -> Option<PathBuf> {
    let folder = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|folder| folder.is_absolute());
    folder.or_else(|| own_home().map(|home| home.join(".config"))).map(|folder| folder.join("vpn-exec"))
}

pub(super) fn own_home() -> Option<PathBuf> {
    Some(PathBuf::from(std::env::var_os("HOME")?)).filter(|home| home.is_absolute())
}

/// Returns the identifier of the credential that a profile names in place of a file.
pub(super) fn credential_of(wireguard: &Path) -> Option<String> {
    wireguard.to_str()?.strip_prefix(CREDENTIAL).map(str::to_owned)
}

/// Returns the path of a credential of the calling service.
pub(super) fn credential_path(id: &str) -> Result<PathBuf, Failure> {
    if id.is_empty() || id.contains('/') || id == ".." || id == "." {
        return Err(Failure::new(format!("{id:?} is not a valid credential name")));
    }
    let folder = std::env::var_os("CREDENTIALS_DIRECTORY").ok_or_else(|| {
        Failure::new(format!("cannot read the credential {id} of the service: CREDENTIALS_DIRECTORY is not set"))
            .advise(
                "start the tunnel as a service: `systemctl start vpn-exec@NAME`; programs join it with --tunnel NAME",
            )
    })?;
    Ok(PathBuf::from(folder).join(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_is_the_profiles() {
        let home = |profile: &str, user, variables: &[(&str, &str)]| {
            let variable = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
            let entry = |uid| match uid {
                0 => Some(PathBuf::from("/root")),
                1000 => Some(PathBuf::from("/home/ann")),
                65534 => Some(PathBuf::from("/")),
                _ => None,
            };
            choose_home(Path::new(profile), user, variable, entry).map(|home| home.display().to_string())
        };
        let (machine, own) = ("/etc/vpn-exec/a.toml", "/home/ann/.config/vpn-exec/a.toml");
        let sudo = [("SUDO_UID", "1000"), ("HOME", "/root")];
        // A profile of the machine means the same file to everybody.
        for (user, variables) in
            [(0, &[][..]), (0, &sudo[..]), (0, &[("HOME", "/home/ann")]), (1000, &[("HOME", "/home/ann")])]
        {
            assert_eq!(home(machine, user, variables).as_deref(), Some("/root"));
        }
        assert_eq!(home(own, 1000, &[("HOME", "/home/ann")]).as_deref(), Some("/home/ann"));
        assert_eq!(home(own, 1000, &[("HOME", "/elsewhere")]).as_deref(), Some("/elsewhere"));
        assert_eq!(home(own, 1000, &[]).as_deref(), Some("/home/ann"));
        assert_eq!(home(own, 1000, &[("HOME", "relative")]).as_deref(), Some("/home/ann"));
        assert_eq!(home(own, 4711, &[]), None);
        // Under sudo: the caller's profile with and without the caller's HOME, and root's own.
        assert_eq!(home(own, 0, &sudo).as_deref(), Some("/home/ann"));
        assert_eq!(home(own, 0, &[("SUDO_UID", "1000"), ("HOME", "/home/ann")]).as_deref(), Some("/home/ann"));
        assert_eq!(home("/root/.config/vpn-exec/a.toml", 0, &sudo).as_deref(), Some("/root"));
        // `SUDO_UID` is anybody's to set, and means nothing but to root. A home `/` is nobody's.
        assert_eq!(home(own, 1001, &sudo).as_deref(), Some("/root"));
        assert_eq!(home(own, 0, &[("SUDO_UID", "65534"), ("HOME", "/root")]).as_deref(), Some("/root"));
    }
}
