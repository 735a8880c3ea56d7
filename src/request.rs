//! Brings the file, the profile and the command line together into one [`Config`].

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::hash::Hash;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{Uid, User};

use crate::cli::{ProgramArgs, SourceArgs, TargetArgs, TunnelArgs};
use crate::config::diagnostic::Diagnostics;
use crate::config::{Config, Dns, Mtu, MtuSource, Profile, ProgramOptions, profile, wg_quick};
use crate::config_file::{self, ConfigFile, ReadError};
use crate::failure::Failure;
use crate::lease::handover::Handover;
use crate::linux::netlink::Netlink;
use crate::logging;
use crate::names::TunnelName;
use crate::plan::{self, Plan, PlanOptions};
use crate::tunnel::facts;

/// How a profile says that the provider's file is a credential of the service (systemd.exec(5)).
const CREDENTIAL: &str = "credential:";

/// The folder of the machine's profiles.
const PROFILES: &str = "/etc/vpn-exec";

/// What was asked for, by files and command line.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) config: Config,
    /// How long the profile has the program wait for the first handshake.
    pub(crate) wait: Option<Duration>,
    pub(crate) options: PlanOptions,
    file: ConfigFile,
}

/// Reads and checks everything. Warnings are told at once.
pub(crate) fn load(source: &SourceArgs, tunnel: &TunnelArgs, identity: &ProgramArgs) -> Result<Loaded, Failure> {
    let mut loaded = load_tunnel(source, tunnel)?;
    overrule_program(&mut loaded.config.program, identity);
    Ok(loaded)
}

fn overrule_program(program: &mut ProgramOptions, identity: &ProgramArgs) {
    program.user = identity.user.clone().or(program.user.take());
    program.group = identity.group.clone().or(program.group.take());
    program.capabilities.extend(identity.keep_cap.iter().cloned());
    program.new_privileges |= identity.new_privs;
    program.buses.choose(&identity.dbus);
    program.buses.talk.extend(identity.dbus_talk.iter().cloned());
    program.sockets.extend(identity.socket.iter().cloned());
}

/// Reads and checks what a command says that is about a tunnel alone.
pub(crate) fn load_target(target: &TargetArgs) -> Result<Loaded, Failure> {
    load_tunnel(&source_of(target)?, &target.tunnel)
}

/// A profile's name is told from a file's by what names cannot have, or hardly do.
fn source_of(target: &TargetArgs) -> Result<SourceArgs, Failure> {
    let (path, name) = (target.target.clone(), target.name.clone());
    let text = path.to_string_lossy();
    if text == "-" || text.contains('/') || text.ends_with(".conf") {
        return Ok(SourceArgs { config: Some(path), tunnel: None, name });
    }
    let tunnel = text.parse().map_err(|error| {
        Failure::new(format!("{text:?} is no profile's name: {error}"))
            .advise("a file is told from a name by a `/` in its path, or by `.conf` at its end: try ./FILE")
    })?;
    Ok(SourceArgs { config: None, tunnel: Some(tunnel), name })
}

/// Whether this process can read all that makes the tunnel of a name: its profile and, if the provider's file is a service's
/// credential, that, too.
pub(crate) fn can_load(name: &TunnelName) -> bool {
    if !profiles(name).any(|path| path.exists()) {
        return false;
    }
    let credential = read_profile(name).ok().and_then(|profile| credential_of(&profile.wireguard));
    credential.is_none_or(|id| credential_path(&id).is_ok_and(|path| path.exists()))
}

/// Whether a target is a profile whose file is a service's credential that this process does not have: of the service's processes,
/// systemd gives credentials to the main one; newer versions (257, not 252) give `ExecReload=` none.
pub(crate) fn only_the_keeper_can_load(target: &TargetArgs) -> bool {
    let profile = source_of(target).ok().and_then(|source| source.tunnel).and_then(|name| read_profile(&name).ok());
    let credential = profile.and_then(|profile| credential_of(&profile.wireguard));
    credential.is_some_and(|id| !credential_path(&id).is_ok_and(|path| path.exists()))
}

/// The name of the tunnel that a target means.
pub(crate) fn name_of_target(target: &TargetArgs) -> Result<TunnelName, Failure> {
    let SourceArgs { config, tunnel, name } = source_of(target)?;
    match name.or(tunnel) {
        Some(name) => Ok(name),
        None => name_of(&config.unwrap_or_default()),
    }
}

/// How programs are run in a tunnel of which nothing else is known: as its profile says, if there is one, and the command line.
pub(crate) fn load_program(name: &TunnelName, identity: &ProgramArgs) -> Result<ProgramOptions, Failure> {
    let has_profile = profiles(name).any(|path| path.exists());
    let mut program = if has_profile { read_profile(name)?.program } else { ProgramOptions::default() };
    overrule_program(&mut program, identity);
    Ok(program)
}

/// The identifier of the credential that a profile names in place of a file.
fn credential_of(wireguard: &Path) -> Option<String> {
    wireguard.to_str()?.strip_prefix(CREDENTIAL).map(str::to_owned)
}

/// Where the calling service finds its credential.
fn credential_path(id: &str) -> Result<PathBuf, Failure> {
    if id.is_empty() || id.contains('/') || id == ".." || id == "." {
        return Err(Failure::new(format!("{id:?} is no credential's name")));
    }
    let folder = std::env::var_os("CREDENTIALS_DIRECTORY").ok_or_else(|| {
        Failure::new(format!(
            "the provider's file is the credential {id} of a service, and this process is none that has credentials"
        ))
        .advise("start the tunnel as a service: `systemctl start vpn-exec@NAME`; programs join it with --tunnel NAME")
    })?;
    Ok(PathBuf::from(folder).join(id))
}

/// Refuses what would say how a tunnel is made, where one is joined that is made already, and of which no configuration is at hand.
pub(crate) fn refuse_overrides(tunnel: &TunnelArgs) -> Result<(), Failure> {
    if !has_overrides(tunnel) {
        return Ok(());
    }
    Err(Failure::new(
        "this tunnel is up already: --backend, --mtu, --dns, --search, --publish, --host-port, --local, --lan, --open and --allow-hooks \
         are of no use here",
    )
    .advise("leave them out, or change the tunnel with `vpn-exec reload`"))
}

/// Whether the command line says how a tunnel is made, beside its file or profile.
pub(crate) fn has_overrides(tunnel: &TunnelArgs) -> bool {
    let TunnelArgs { backend, mtu, dns, search, publish, host_port, local, lan, open, allow_hooks } = tunnel;
    let ports = [publish.is_empty(), host_port.is_empty(), open.is_empty()];
    let lists = [dns.is_empty(), search.is_empty(), local.is_empty()].into_iter().chain(ports);
    backend.is_some() || mtu.is_some() || !lists.into_iter().all(|is_empty| is_empty) || *lan || *allow_hooks
}

fn load_tunnel(source: &SourceArgs, tunnel: &TunnelArgs) -> Result<Loaded, Failure> {
    let (profile, default_name) = match (&source.config, &source.tunnel) {
        (Some(file), _) => (Profile { wireguard: file.clone(), ..Profile::default() }, None),
        (None, Some(name)) => (read_profile(name)?, Some(name.clone())),
        (None, None) => {
            return Err(Failure::new("there is no tunnel to use")
                .advise("name the provider's file with --config FILE, or a profile with --tunnel NAME"));
        }
    };
    let name = match source.name.clone().or(default_name) {
        Some(name) => name,
        None => name_of(&profile.wireguard)?,
    };
    let file = match credential_of(&profile.wireguard).filter(|_| source.config.is_none()) {
        Some(id) => read(&credential_path(&id)?)?,
        None => read(&profile.wireguard)?,
    };
    let (wireguard, warnings) = wg_quick::parse(&file.name, &file.contents).map_err(|found| {
        let failure = Failure::new(render(&found));
        // A profile that is given as a provider's file has nothing but errors.
        match profile.wireguard.extension() == Some(OsStr::new("toml")) {
            true => failure.advise("a profile is put into /etc/vpn-exec, and used by its name: --tunnel NAME"),
            false => failure,
        }
    })?;
    logging::report_warnings(&warnings);
    let Profile { backend, mtu, mut dns, mut local, mut open, program, wait, .. } = profile;
    overrule(&mut dns, tunnel);
    extend(&mut local.publish, tunnel.publish.iter().flatten());
    extend(&mut local.host_ports, tunnel.host_port.iter().flatten());
    extend(&mut local.networks, &tunnel.local);
    extend(&mut open, &tunnel.open);
    local.lan |= tunnel.lan;
    let backend = tunnel.backend.unwrap_or(backend);
    let by_option = tunnel.mtu.map(|bytes| Mtu { bytes, source: MtuSource::Option });
    let mtu = by_option.or(mtu.map(|bytes| Mtu { bytes, source: MtuSource::Profile }));
    let config = Config { name, wireguard, backend, mtu, dns, local, open, program };
    Ok(Loaded { config, wait, options: PlanOptions { allow_hooks: tunnel.allow_hooks }, file })
}

impl Loaded {
    /// The same, for a keeper.
    pub(crate) fn handover(&self) -> Handover {
        Handover::new(&self.config, self.options, &self.file.name, &self.file.contents)
    }

    /// Plans from the facts of this instant.
    pub(crate) fn plan(&self) -> Result<Plan, Failure> {
        let facts = Netlink::open()
            .and_then(|mut host| facts::read(&mut host, &self.config))
            .map_err(|error| Failure::new(format!("cannot read the host's network configuration: {error}")))?;
        plan::plan(&self.config, &facts, self.options).map_err(Failure::new)
    }
}

/// Adds what is not there yet.
fn extend<'a, T: Clone + Eq + Hash + 'a>(list: &mut Vec<T>, more: impl IntoIterator<Item = &'a T>) {
    let mut known: HashSet<T> = list.iter().cloned().collect();
    list.extend(more.into_iter().filter(|item| known.insert((*item).clone())).cloned());
}

fn overrule(dns: &mut Dns, tunnel: &TunnelArgs) {
    if !tunnel.dns.is_empty() {
        dns.servers = Some(tunnel.dns.clone());
    }
    if !tunnel.search.is_empty() {
        dns.search = Some(tunnel.search.clone());
    }
}

/// Reads the provider's file, which is secret, and says so where others can read it, too.
fn read(path: &Path) -> Result<ConfigFile, Failure> {
    let file = read_public(path)?;
    if let Some(warning) = &file.warning {
        tracing::warn!("{warning}");
    }
    Ok(file)
}

/// Reads a file that anybody may read, as a profile.
fn read_public(path: &Path) -> Result<ConfigFile, Failure> {
    config_file::read(path).map_err(|error| {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        let failure = Failure::new(format!("{error}{cause}"));
        match error {
            ReadError::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                failure.advise("run this as root (`sudo vpn-exec …`), or as a user who may read it")
            }
            ReadError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound && path.starts_with("~") => {
                failure.advise(
                    "`~` is the shell's, which expands it only at the beginning of a word: write --config ~/FILE",
                )
            }
            ReadError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                failure.advise("check its path")
            }
            _ => failure,
        }
    })
}

/// Checks a profile by itself.
pub(crate) fn check_profile(path: &Path) -> Result<(), Failure> {
    parse_profile(path).map(|_| ())
}

fn parse_profile(path: &Path) -> Result<Profile, Failure> {
    let text = read_public(path)?;
    profile::parse(&text.name, &text.contents).map_err(|found| Failure::new(render(&found)))
}

/// Reads the machine's profile of a name, else the user's own.
fn read_profile(name: &TunnelName) -> Result<Profile, Failure> {
    let Some(path) = profiles(name).find(|path| path.exists()) else {
        let places: Vec<String> = profiles(name).map(|path| path.display().to_string()).collect();
        let text = name.as_str();
        let advice = match (text.strip_suffix(".conf"), text.strip_suffix(".toml")) {
            (Some(_), _) => "name the provider's file with --config FILE".to_owned(),
            (_, Some(stem)) => format!("a profile is named without its ending: {stem}"),
            _ => "write one (all it needs is a line `wireguard = \"FILE\"`), or name the provider's file".to_owned(),
        };
        let what = if places.len() > 1 { "neither exists" } else { "it does not exist" };
        return Err(Failure::new(format!("there is no profile {name}: {}: {what}", places.join(", "))).advise(advice));
    };
    let mut profile = parse_profile(&path)?;
    if credential_of(&profile.wireguard).is_some() {
        return Ok(profile);
    }
    if let Ok(rest) = profile.wireguard.strip_prefix("~") {
        profile.wireguard = home_of(&path)?.join(rest);
    } else if let Some(folder) = path.parent() {
        // A relative path is meant from where the profile is, wherever vpn-exec is run.
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

/// Chooses that home. In a profile of the machine it is root's, so that the profile means the same file whoever runs
/// vpn-exec, a service included. In a user's own it is that user's, also where sudo keeps the folder of its caller's
/// profiles, but not the caller's HOME. `variable` reads the environment, `entry` the user database.
fn choose_home(
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
fn is_below(path: &Path, home: &Path) -> bool {
    home.is_absolute() && home.parent().is_some() && path.starts_with(home)
}

/// Where the profile of a name may be.
fn profiles(name: &TunnelName) -> impl Iterator<Item = PathBuf> {
    let file = format!("{name}.toml");
    std::iter::once(PathBuf::from(PROFILES)).chain(own_profiles()).map(move |folder| folder.join(&file))
}

fn own_profiles() -> Option<PathBuf> {
    let folder = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|folder| folder.is_absolute());
    folder.or_else(|| own_home().map(|home| home.join(".config"))).map(|folder| folder.join("vpn-exec"))
}

fn own_home() -> Option<PathBuf> {
    Some(PathBuf::from(std::env::var_os("HOME")?)).filter(|home| home.is_absolute())
}

/// The name of a tunnel that has only a file: the file's, without its ending.
fn name_of(file: &Path) -> Result<TunnelName, Failure> {
    let from_descriptor = file == Path::new("-") || file.starts_with("/proc/") || file.starts_with("/dev/fd");
    let stem = if from_descriptor { Some(OsStr::new("vpn")) } else { file.file_stem() };
    let stem = stem.unwrap_or_default().to_string_lossy();
    stem.parse().map_err(|error| {
        Failure::new(format!("the name of the file {} cannot be the tunnel's: {error}", file.display()))
            .advise("give the tunnel a name with --name NAME")
    })
}

fn render(found: &Diagnostics) -> String {
    found.render(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
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
