//! The user's request: files, profile and command line brought together.
//!
//! - [`RunRequest`], [`TunnelRequest`]: what a command needs to know of its program and its tunnel.
//! - `profiles`: where profiles are found. `files`: reading them and the provider's file.

mod files;
mod profiles;

use std::collections::HashSet;
use std::ffi::OsStr;
use std::hash::Hash;
use std::path::Path;
use std::time::Duration;

use crate::cli::{ProgramArgs, RunArgs, SourceArgs, TargetArgs, TunnelArgs};
use crate::config::{Config, Dns, Mtu, MtuSource, Profile, ProgramOptions, Protocol, wg_quick};
use crate::config_file::ConfigFile;
use crate::failure::{Doing, Failure};
use crate::lease::handover::Handover;
use crate::linux::netlink::Netlink;
use crate::logging;
use crate::names::TunnelName;
use crate::plan::{self, Plan};
use crate::registry;
use crate::tunnel::facts;
use files::{read, render};
use profiles::{credential_of, credential_path, profiles, read_profile};

pub(crate) use profiles::check_profile;

/// A request to run a program.
#[derive(Debug)]
pub(crate) struct RunRequest {
    pub(crate) tunnel: RequestedTunnel,
    pub(crate) program: ProgramOptions,
    /// How long the program waits for the tunnel's first handshake. None if it does not wait.
    pub(crate) wait: Option<Duration>,
    /// Whether the caller asks for a terminal of the program's own.
    pub(crate) pty: bool,
}

/// The tunnel that a program is to run in.
#[derive(Debug)]
pub(crate) enum RequestedTunnel {
    /// The one that a configuration describes.
    Configured(Box<TunnelRequest>),
    /// A living one, whose configuration this process cannot read.
    Living(TunnelName),
}

impl RunRequest {
    /// Reads the files that the command line names.
    ///
    /// # Errors
    /// If there is no program to run, or if a file cannot be read or is wrong.
    pub(crate) fn read(arguments: &RunArgs) -> Result<Self, Failure> {
        if arguments.program.is_empty() {
            return Err(Failure::new("there is no program to run")
                .advise("it follows two dashes: vpn-exec --config FILE -- PROGRAM [ARG]..., and see --help"));
        }
        let wait = arguments.wait.map(|seconds| Duration::from_secs(seconds.into()));
        let pty = arguments.pty;
        if let (None, Some(name), None) = (&arguments.source.config, &arguments.source.tunnel, &arguments.source.name)
            && !can_load(name)
            && registry::read(name).is_ok_and(|state| state.is_some())
        {
            refuse_overrides(&arguments.tunnel)?;
            let program = load_program(name, &arguments.identity)?;
            return Ok(Self { tunnel: RequestedTunnel::Living(name.clone()), program, wait, pty });
        }
        let tunnel = load(&arguments.source, &arguments.tunnel, &arguments.identity)?;
        let (program, wait) = (tunnel.config.program.clone(), wait.or(tunnel.wait));
        tracing::debug!("the configuration is read");
        Ok(Self { tunnel: RequestedTunnel::Configured(Box::new(tunnel)), program, wait, pty })
    }
}

impl RequestedTunnel {
    /// Returns whether a TCP port of the host's loopback is open to the program, as far as this process knows.
    pub(crate) fn has_host_port(&self, port: u16) -> bool {
        match self {
            Self::Configured(request) => {
                request.config.local.host_ports.iter().any(|open| open.port == port && open.protocol == Protocol::Tcp)
            }
            Self::Living(_) => false,
        }
    }
}

/// What was asked for, by files and command line.
#[derive(Debug)]
pub(crate) struct TunnelRequest {
    pub(crate) config: Config,
    /// How long the profile has the program wait for the first handshake.
    pub(crate) wait: Option<Duration>,
    file: ConfigFile,
}

/// Reads and checks the configuration of a tunnel and of its program. Logs the warnings.
///
/// # Errors
/// If a file cannot be read or is wrong.
pub(crate) fn load(source: &SourceArgs, tunnel: &TunnelArgs, identity: &ProgramArgs) -> Result<TunnelRequest, Failure> {
    let mut loaded = load_tunnel(source, tunnel)?;
    overrule_program(&mut loaded.config.program, identity);
    Ok(loaded)
}

/// Applies the options of the command line, which take precedence over the profile.
fn overrule_program(program: &mut ProgramOptions, identity: &ProgramArgs) {
    program.user = identity.user.clone().or(program.user.take());
    program.group = identity.group.clone().or(program.group.take());
    program.capabilities.extend(identity.keep_cap.iter().cloned());
    program.new_privileges |= identity.new_privs;
    program.buses.choose(&identity.dbus);
    program.buses.talk.extend(identity.dbus_talk.iter().cloned());
    program.sockets.extend(identity.socket.iter().cloned());
}

/// Reads and checks the configuration of a tunnel, for a command that runs no program.
///
/// # Errors
/// As [`load`].
pub(crate) fn load_target(target: &TargetArgs) -> Result<TunnelRequest, Failure> {
    load_tunnel(&source_of(target)?, &target.tunnel)
}

/// Tells a file (`-`, a path with a `/`, or a name that ends in `.conf`) from the name of a profile.
fn source_of(target: &TargetArgs) -> Result<SourceArgs, Failure> {
    let (path, name) = (target.target.clone(), target.name.clone());
    let text = path.to_string_lossy();
    if text == "-" || text.contains('/') || text.ends_with(".conf") {
        return Ok(SourceArgs { config: Some(path), tunnel: None, name });
    }
    let tunnel = text.parse().map_err(|error| {
        Failure::new(format!("{text:?} is not a valid profile name: {error}"))
            .advise("for a file, write a path with a `/`, or a name that ends in `.conf`: ./FILE")
    })?;
    Ok(SourceArgs { config: None, tunnel: Some(tunnel), name })
}

/// Returns whether this process can read the configuration of a tunnel: its profile and, if the provider's file is a credential of a
/// service, that credential.
fn can_load(name: &TunnelName) -> bool {
    if !profiles(name).any(|path| path.exists()) {
        return false;
    }
    let credential = read_profile(name).ok().and_then(|profile| credential_of(&profile.wireguard));
    credential.is_none_or(|id| credential_path(&id).is_ok_and(|path| path.exists()))
}

/// Returns whether a target is a profile whose file is a credential that only the service's main process can read. systemd 257, unlike
/// 252, gives no credentials to `ExecReload=`.
pub(crate) fn only_the_keeper_can_load(target: &TargetArgs) -> bool {
    let profile = source_of(target).ok().and_then(|source| source.tunnel).and_then(|name| read_profile(&name).ok());
    let credential = profile.and_then(|profile| credential_of(&profile.wireguard));
    credential.is_some_and(|id| !credential_path(&id).is_ok_and(|path| path.exists()))
}

/// Returns the name of the tunnel that a target stands for.
///
/// # Errors
/// If the target is neither a file nor a valid name.
pub(crate) fn name_of_target(target: &TargetArgs) -> Result<TunnelName, Failure> {
    let SourceArgs { config, tunnel, name } = source_of(target)?;
    match name.or(tunnel) {
        Some(name) => Ok(name),
        None => Ok(name_of_file(&config.unwrap_or_default())),
    }
}

/// Returns the options of a program in a tunnel whose configuration cannot be read: those of the profile, if it can be read, and of the
/// command line.
fn load_program(name: &TunnelName, identity: &ProgramArgs) -> Result<ProgramOptions, Failure> {
    let has_profile = profiles(name).any(|path| path.exists());
    let mut program = if has_profile { read_profile(name)?.program } else { ProgramOptions::default() };
    overrule_program(&mut program, identity);
    Ok(program)
}

/// Refuses options that say how a tunnel is made, for a tunnel that is up and whose configuration this process cannot read.
fn refuse_overrides(tunnel: &TunnelArgs) -> Result<(), Failure> {
    if !has_overrides(tunnel) {
        return Ok(());
    }
    Err(Failure::new(
        "this tunnel is up already: --backend, --mtu, --dns, --search, --publish, --host-port, --local, --lan, --open and --allow-hooks \
         cannot be applied",
    )
    .advise("leave them out, or change the tunnel with `vpn-exec reload`"))
}

/// Returns whether the command line has options that say how a tunnel is made.
pub(crate) fn has_overrides(tunnel: &TunnelArgs) -> bool {
    let TunnelArgs { backend, mtu, dns, search, publish, host_port, local, lan, open, allow_hooks } = tunnel;
    let ports = [publish.is_empty(), host_port.is_empty(), open.is_empty()];
    let lists = [dns.is_empty(), search.is_empty(), local.is_empty()].into_iter().chain(ports);
    backend.is_some() || mtu.is_some() || !lists.into_iter().all(|is_empty| is_empty) || *lan || *allow_hooks
}

fn load_tunnel(source: &SourceArgs, tunnel: &TunnelArgs) -> Result<TunnelRequest, Failure> {
    let (profile, default_name) = match (&source.config, &source.tunnel) {
        (Some(file), _) => (Profile { wireguard: file.clone(), ..Profile::default() }, None),
        (None, Some(name)) => (read_profile(name)?, Some(name.clone())),
        (None, None) => {
            return Err(Failure::new("no tunnel is named")
                .advise("name the provider's file with --config FILE, or a profile with --tunnel NAME"));
        }
    };
    let name = source.name.clone().or(default_name).unwrap_or_else(|| {
        let name = name_of_file(&profile.wireguard);
        if is_derived(&name, &profile.wireguard) {
            tracing::warn!(
                "the file name {:?} is not a valid tunnel name; the tunnel is named {name} (choose a name with --name)",
                profile.wireguard.file_name().unwrap_or_default()
            );
        }
        name
    });
    let file = match credential_of(&profile.wireguard).filter(|_| source.config.is_none()) {
        Some(id) => read(&credential_path(&id)?)?,
        None => read(&profile.wireguard)?,
    };
    let (wireguard, warnings) = wg_quick::parse(&file.name, &file.contents).map_err(|found| {
        let failure = Failure::new(render(&found));
        // A profile that is given as a provider's file has nothing but errors.
        match profile.wireguard.extension() == Some(OsStr::new("toml")) {
            true => failure.advise("put the profile into /etc/vpn-exec, and use it by its name: --tunnel NAME"),
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
    let config = Config { name, wireguard, backend, mtu, dns, local, open, allow_hooks: tunnel.allow_hooks, program };
    Ok(TunnelRequest { config, wait, file })
}

impl TunnelRequest {
    /// Returns the request as it is handed over to a keeper.
    pub(crate) fn handover(&self) -> Handover {
        Handover::new(&self.config, &self.file.name, &self.file.contents)
    }

    /// Makes a plan from the facts about the host at this instant.
    ///
    /// # Errors
    /// If the facts cannot be read, or if there is no plan for this configuration on this host.
    pub(crate) fn plan(&self) -> Result<Plan, Failure> {
        let facts = Netlink::open()
            .and_then(|mut host| facts::read(&mut host, &self.config))
            .doing("read the host's network configuration")?;
        Ok(plan::plan(&self.config, &facts)?)
    }
}

/// Appends the items that the list does not have.
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

/// Returns the name of a tunnel that has a file and no profile: the file's name without its extension, changed where it is
/// not a valid tunnel name.
fn name_of_file(file: &Path) -> TunnelName {
    TunnelName::from_file_stem(stem_of(file))
}

/// Returns whether [`name_of_file`] had to change a file's name.
fn is_derived(name: &TunnelName, file: &Path) -> bool {
    OsStr::new(name.as_str()) != stem_of(file)
}

/// Returns a file's name without its extension, or `vpn` for a descriptor, whose path is different in each run.
fn stem_of(file: &Path) -> &OsStr {
    let from_descriptor = file == Path::new("-") || file.starts_with("/proc/") || file.starts_with("/dev/fd");
    if from_descriptor { OsStr::new("vpn") } else { file.file_stem().unwrap_or_default() }
}
