//! Profiles: how a name's is found and read, and the provider's file that it names.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use nix::unistd::{Uid, User};

use super::files::{read_public, render};
use crate::config::{Profile, profile};
use crate::failure::Failure;
use crate::lookup::{self, PROFILES, profile_paths, wg_quick_path};
use crate::names::TunnelName;
use crate::registry::{self, Scope};

/// Marks a service's credential (systemd.exec(5)) in a profile, in place of the provider's file.
const CREDENTIAL: &str = "credential:";

/// Checks a profile without the provider's file that it names.
///
/// # Errors
/// If the profile cannot be read or is invalid.
pub(crate) fn check_profile(path: &Path) -> Result<(), Failure> {
    parse_profile(path).map(|_| ())
}

fn parse_profile(path: &Path) -> Result<Profile, Failure> {
    let text = read_public(path)?;
    profile::parse(&text.name, &text.contents).map_err(|found| Failure::new(render(&found)))
}

/// Returns the configuration of a name: its profile, else the file that wg-quick would use.
pub(super) fn configuration_of(name: &TunnelName) -> Result<Profile, Failure> {
    if let Some(profile) = read_profile(name)? {
        return Ok(profile);
    }
    let path = wg_quick_path(name);
    match path.try_exists() {
        Ok(true) => Ok(Profile { wireguard: path, ..Profile::default() }),
        Ok(false) => Err(no_configuration(name, None)),
        Err(error) => Err(no_configuration(name, Some(&error))),
    }
}

/// Returns the profile of a name that is for containers.
pub(super) fn container_profile_of(name: &TunnelName) -> Result<Profile, Failure> {
    let path = machine_profile(name);
    if !path.exists() {
        let missing = format!("there is no profile '{name}' for a container ({} not found)", path.display());
        return Err(Failure::new(missing).advise(format!(
            "write it: the lines `wireguard = \"FILE\"`, with the provider's file, and `containers = true`; check it \
             with `vpn-exec check {name}`"
        )));
    }
    let profile = read_profile_at(&path)?;
    if !profile.containers {
        return Err(Failure::new(format!("the profile {} is not for containers", path.display())).advise(
            "to let everyone who may create containers use this tunnel, add the line `containers = true` above the \
             first table",
        ));
    }
    Ok(profile)
}

/// Returns whether the machine's profile of a name is for containers.
///
/// # Errors
/// If it cannot be read or is invalid.
pub(crate) fn is_for_containers(name: &TunnelName) -> Result<bool, Failure> {
    Ok(parse_profile(&machine_profile(name))?.containers)
}

fn machine_profile(name: &TunnelName) -> PathBuf {
    Path::new(PROFILES).join(format!("{name}.toml"))
}

/// Creates the failure of a name that has no configuration. `unreadable` is the error of looking into the folder of
/// wg-quick's files.
fn no_configuration(name: &TunnelName, unreadable: Option<&io::Error>) -> Failure {
    if Scope::current() == Scope::User && Scope::System.directory().join(name.as_str()).is_dir() {
        return Failure::new(format!(
            "the tunnel {name} is the machine's: joining it needs root, or the capabilities CAP_SYS_ADMIN, \
             CAP_NET_ADMIN and CAP_SETPCAP"
        ))
        .advise(
            "run this as root (`sudo vpn-exec …`), or make a tunnel of your own from the provider's file: --config FILE",
        );
    }
    let wg_quick = wg_quick_path(name);
    let missing = profile_paths(name).chain(unreadable.is_none().then(|| wg_quick.clone()));
    let missing: Vec<String> = missing.map(|path| path.display().to_string()).collect();
    let mut places = format!("not found: {}", missing.join(", "));
    if let Some(error) = unreadable {
        places += &format!("; cannot look for {}: {error}", wg_quick.display());
    }
    let what = match registry::read(name) {
        Ok(Some(_)) => format!("the configuration of the running tunnel {name} is unknown"),
        _ => format!("there is no tunnel and no profile '{name}'"),
    };
    let advice = match (lookup::similar(name, &lookup::names()), unreadable) {
        (Some(similar), _) => format!("a similar name exists: {similar}"),
        (None, Some(_)) => {
            "run this as root (`sudo vpn-exec …`), or name the provider's file: --config FILE".to_owned()
        }
        (None, None) => "check the name, or name the provider's file: ./FILE, or --config FILE".to_owned(),
    };
    Failure::new(format!("{what} ({places})")).advise(advice)
}

/// Reads the profile of a name, if there is one: the machine's, else the user's own.
pub(super) fn read_profile(name: &TunnelName) -> Result<Option<Profile>, Failure> {
    profile_paths(name).find(|path| path.exists()).map(|path| read_profile_at(&path)).transpose()
}

fn read_profile_at(path: &Path) -> Result<Profile, Failure> {
    let mut profile = parse_profile(path)?;
    if credential_of(&profile.wireguard).is_some() {
        return Ok(profile);
    }
    if let Ok(rest) = profile.wireguard.strip_prefix("~") {
        profile.wireguard = home_of(path)?.join(rest);
    } else if let Some(folder) = path.parent() {
        // Relative to the profile, not to the working directory.
        profile.wireguard = folder.join(&profile.wireguard);
    }
    Ok(profile)
}

/// Finds the home that `~` stands for in a profile.
fn home_of(profile: &Path) -> Result<PathBuf, Failure> {
    let entry = |uid: u32| User::from_uid(Uid::from_raw(uid)).ok().flatten().map(|user| user.dir);
    choose_home(profile, nix::unistd::geteuid().as_raw(), |name| std::env::var_os(name), entry).ok_or_else(|| {
        Failure::new(format!("cannot find the home that `~` stands for in {}", profile.display()))
            .advise("write the whole path of the provider's file, or set HOME")
    })
}

/// Chooses the home that `~` stands for in a profile. In `/etc/vpn-exec` it is root's: the profile means the same file
/// for every user and every service. In a user's own profile it is that user's, also under a sudo that keeps
/// XDG_CONFIG_HOME but not HOME. `variable` reads the environment, `entry` the user database.
fn choose_home(
    profile: &Path,
    user: u32,
    variable: impl Fn(&str) -> Option<OsString>,
    entry: impl Fn(u32) -> Option<PathBuf>,
) -> Option<PathBuf> {
    if profile.starts_with(PROFILES) {
        // A small container may have no user database.
        return Some(entry(0).unwrap_or_else(|| "/root".into())).filter(|home| home.is_absolute());
    }
    let number = || variable("SUDO_UID").filter(|_| user == 0)?.to_str()?.parse().ok();
    let caller = number().and_then(&entry).filter(|home| is_below(profile, home));
    let own = variable("HOME").map(PathBuf::from);
    caller.or(own).filter(|home| home.is_absolute()).or_else(|| entry(user))
}

/// Returns whether a path is below a home. A home `/` contains nothing.
fn is_below(path: &Path, home: &Path) -> bool {
    home.is_absolute() && home.parent().is_some() && path.starts_with(home)
}

/// Returns the identifier of the credential that a profile names in place of the provider's file.
pub(super) fn credential_of(wireguard: &Path) -> Option<String> {
    wireguard.to_str()?.strip_prefix(CREDENTIAL).map(str::to_owned)
}

/// Returns the path of a credential of the calling service.
pub(super) fn credential_path(id: &str) -> Result<PathBuf, Failure> {
    if id.is_empty() || id.contains('/') || id == ".." || id == "." {
        return Err(Failure::new(format!("{id:?} is not a valid name of a credential")));
    }
    let folder = std::env::var_os("CREDENTIALS_DIRECTORY").ok_or_else(|| {
        let what = format!("cannot read the credential {id} of the service: CREDENTIALS_DIRECTORY is not set");
        Failure::new(what).advise(
            "start the tunnel as a service: `systemctl start vpn-exec@NAME`; then `vpn-exec NAME -- PROGRAM` joins it",
        )
    })?;
    Ok(PathBuf::from(folder).join(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_home_depends_on_the_profiles_folder() {
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
        // A profile of the machine means the same file for every user.
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
        // `SUDO_UID` counts only for root. A home `/` contains nothing.
        assert_eq!(home(own, 1001, &sudo).as_deref(), Some("/root"));
        assert_eq!(home(own, 0, &[("SUDO_UID", "65534"), ("HOME", "/root")]).as_deref(), Some("/root"));
    }
}
