//! Brings the file, the profile and the command line together into one [`Config`].

use std::ffi::OsStr;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Failure;
use crate::cli::{SourceArgs, TunnelArgs};
use crate::config::diagnostic::Diagnostics;
use crate::config::{Config, Dns, Profile, profile, wg_quick};
use crate::config_file::{self, ConfigFile};
use crate::linux::netlink::Netlink;
use crate::names::TunnelName;
use crate::plan::{self, Plan, PlanOptions};
use crate::tunnel::facts;

/// The folder of the machine's profiles.
const PROFILES: &str = "/etc/vpn-exec";

/// What was asked for, by files and command line.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) config: Config,
    /// How long the profile has the program wait for the first handshake.
    pub(super) wait: Option<Duration>,
    options: PlanOptions,
}

/// Reads and checks everything. Warnings are told at once.
pub(super) fn load(source: &SourceArgs, tunnel: &TunnelArgs) -> Result<Loaded, Failure> {
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
    let file = read(&profile.wireguard)?;
    let (wireguard, warnings) =
        wg_quick::parse(&file.name, &file.contents).map_err(|found| Failure::new(render(&found)))?;
    if !warnings.is_empty() {
        tracing::warn!("{}", render(&warnings));
    }
    let Profile { backend, mut dns, local, mut program, wait, .. } = profile;
    overrule(&mut dns, tunnel);
    program.user = tunnel.user.clone().or(program.user);
    program.group = tunnel.group.clone().or(program.group);
    program.capabilities.extend(tunnel.keep_cap.iter().cloned());
    program.new_privileges |= tunnel.new_privs;
    let config = Config { name, wireguard, backend: tunnel.backend.unwrap_or(backend), dns, local, program };
    Ok(Loaded { config, wait, options: PlanOptions { allow_hooks: tunnel.allow_hooks } })
}

impl Loaded {
    /// Plans from the facts of this instant.
    pub(super) fn plan(&self) -> Result<Plan, Failure> {
        let facts = Netlink::open()
            .and_then(|mut host| facts::read(&mut host, &self.config.name, &self.config.wireguard))
            .map_err(|error| Failure::new(format!("cannot read the host's network configuration: {error}")))?;
        plan::plan(&self.config, &facts, self.options).map_err(Failure::new)
    }
}

fn overrule(dns: &mut Dns, tunnel: &TunnelArgs) {
    if !tunnel.dns.is_empty() {
        dns.servers = Some(tunnel.dns.clone());
    }
    if !tunnel.search.is_empty() {
        dns.search = Some(tunnel.search.clone());
    }
}

fn read(path: &Path) -> Result<ConfigFile, Failure> {
    let file = config_file::read(path).map_err(|error| {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        Failure::new(format!("{error}{cause}"))
    })?;
    if let Some(warning) = &file.warning {
        tracing::warn!("{warning}");
    }
    Ok(file)
}

/// Reads the machine's profile of a name, else the user's own.
fn read_profile(name: &TunnelName) -> Result<Profile, Failure> {
    let file = format!("{name}.toml");
    let machine = Path::new(PROFILES).join(&file);
    let own = own_profiles().map(|folder| folder.join(&file));
    let found = std::iter::once(machine.clone()).chain(own.clone()).find(|path| path.exists());
    let Some(path) = found else {
        let places = own.map(|own| format!(" nor {}", own.display())).unwrap_or_default();
        return Err(Failure::new(format!("there is no profile {name}: neither {}{places} exists", machine.display()))
            .advise("write one (all it needs is a line `wireguard = \"FILE\"`), or use --config FILE"));
    };
    let text = read(&path)?;
    let mut profile = profile::parse(&text.name, &text.contents).map_err(|found| Failure::new(render(&found)))?;
    // A relative path is meant from where the profile is, wherever vpn-exec is run.
    if let (true, Some(folder)) = (profile.wireguard.is_relative(), path.parent()) {
        profile.wireguard = folder.join(&profile.wireguard);
    }
    Ok(profile)
}

fn own_profiles() -> Option<PathBuf> {
    let folder = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|folder| folder.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".config"));
    folder.or_else(home).map(|folder| folder.join("vpn-exec"))
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
