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

use crate::cli::{LaunchArgs, ProgramArgs, Source, SourceArgs, SourceError, TunnelArgs};
use crate::config::dns_for::replace_domains;
use crate::config::{Config, Dns, Mtu, MtuSource, Profile, ProgramOptions, Protocol, wg_quick};
use crate::config_file::ConfigFile;
use crate::failure::{Doing, Failure};
use crate::lease::handover::Handover;
use crate::linux::netlink::Netlink;
use crate::logging;
use crate::lookup::profile_paths;
use crate::names::TunnelName;
use crate::plan::{self, Plan};
use crate::registry;
use crate::tunnel::facts;
use files::{read, render};
use profiles::{configuration_of, container_profile_of, credential_of, credential_path, read_profile};

pub(crate) use profiles::{check_profile, is_for_containers};

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
    /// If no tunnel is named, or a file cannot be read or is invalid.
    pub(crate) fn read(arguments: &LaunchArgs) -> Result<Self, Failure> {
        let wait = arguments.wait.map(|seconds| Duration::from_secs(seconds.into()));
        let pty = arguments.pty;
        if let Some(name) = running_tunnel(&arguments.source)? {
            refuse_overrides(&arguments.tunnel)?;
            let program = load_program(&name, &arguments.identity)?;
            return Ok(Self { tunnel: RequestedTunnel::Living(name), program, wait, pty });
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

impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Self {
        Self::new(&error).advise(error.advice())
    }
}

/// Returns the tunnel that the command line names, else the one that the environment names.
fn source_of(arguments: &SourceArgs) -> Result<Source, Failure> {
    Ok(arguments.resolve(|name| std::env::var_os(name))?)
}

/// Returns the name of a running tunnel that has no profile which this process can use.
fn running_tunnel(arguments: &SourceArgs) -> Result<Option<TunnelName>, Failure> {
    match source_of(arguments)? {
        Source::Name(name) if arguments.name.is_none() && !can_load(&name) => {
            let is_running = registry::read(&name).is_ok_and(|state| state.is_some());
            Ok(is_running.then_some(name))
        }
        _ => Ok(None),
    }
}

/// Returns whether the tunnel of a name has a profile, and this process can read the provider's file if that is a
/// service's credential.
fn can_load(name: &TunnelName) -> bool {
    if !profile_paths(name).any(|path| path.exists()) {
        return false;
    }
    let credential = read_profile(name).ok().flatten().and_then(|profile| credential_of(&profile.wireguard));
    credential.is_none_or(|id| credential_path(&id).is_ok_and(|path| path.exists()))
}

/// Returns whether the provider's file of a tunnel is a service's credential that this process does not have. Of the
/// processes of a service, systemd gives credentials to the main one; since version 257, `ExecReload=` gets none.
pub(crate) fn only_the_keeper_can_load(arguments: &SourceArgs) -> bool {
    let Ok(Source::Name(name)) = source_of(arguments) else { return false };
    let profile = read_profile(&name).ok().flatten();
    let credential = profile.and_then(|profile| credential_of(&profile.wireguard));
    credential.is_some_and(|id| !credential_path(&id).is_ok_and(|path| path.exists()))
}

/// Returns the name of the tunnel that the arguments name.
///
/// # Errors
/// If they name none, or the name is invalid.
pub(crate) fn name_of_source(arguments: &SourceArgs) -> Result<TunnelName, Failure> {
    match (&arguments.name, source_of(arguments)?) {
        (Some(name), _) => Ok(name.clone()),
        (None, Source::Name(name)) => Ok(name),
        (None, Source::File(file)) => Ok(name_of_file(&file)),
    }
}

/// Returns the options of a program in a tunnel whose configuration cannot be read: those of the profile, if it can be
/// read, and of the command line.
fn load_program(name: &TunnelName, identity: &ProgramArgs) -> Result<ProgramOptions, Failure> {
    let mut program = read_profile(name)?.map(|profile| profile.program).unwrap_or_default();
    overrule_program(&mut program, identity);
    Ok(program)
}

/// Refuses options that say how a tunnel is made, for a tunnel that is up and whose configuration this process cannot
/// read.
fn refuse_overrides(tunnel: &TunnelArgs) -> Result<(), Failure> {
    if !has_overrides(tunnel) {
        return Ok(());
    }
    Err(Failure::new(
        "this tunnel is up already: --backend, --mtu, --dns, --dns-for, --search, --publish, --host-port, --local, --lan, --open and \
         --allow-hooks cannot be applied",
    )
    .advise("leave them out, or change the tunnel with `vpn-exec reload`"))
}

/// Returns whether the command line has options that say how a tunnel is made.
pub(crate) fn has_overrides(tunnel: &TunnelArgs) -> bool {
    let TunnelArgs {
        backend,
        mtu,
        dns,
        dns_for,
        search,
        publish,
        host_port,
        local,
        lan,
        open,
        allow_hooks,
        rootless: _,
    } = tunnel;
    let ports = [publish.is_empty(), host_port.is_empty(), open.is_empty()];
    let lists = [dns.is_empty(), dns_for.is_empty(), search.is_empty(), local.is_empty()].into_iter().chain(ports);
    backend.is_some() || mtu.is_some() || !lists.into_iter().all(|is_empty| is_empty) || *lan || *allow_hooks
}

/// Reads and checks the configuration of a container's tunnel. Only a profile of the machine counts, and only one that
/// is for containers: whoever may create a container may name any tunnel, and a container with the key of the machine's
/// own tunnel would take its packets.
///
/// # Errors
/// If there is no such profile, or it is invalid.
pub(crate) fn load_for_container(name: &TunnelName) -> Result<TunnelRequest, Failure> {
    let profile = container_profile_of(name)?;
    let path = match credential_of(&profile.wireguard) {
        Some(id) => credential_path(&id)?,
        None => profile.wireguard.clone(),
    };
    complete(profile, &path, name.clone(), &TunnelArgs::default())
}

/// Reads and checks the configuration of a tunnel. Warnings are logged at once.
pub(crate) fn load_tunnel(source: &SourceArgs, tunnel: &TunnelArgs) -> Result<TunnelRequest, Failure> {
    let (profile, path, default_name) = match source_of(source)? {
        Source::File(file) => (Profile { wireguard: file.clone(), ..Profile::default() }, file, None),
        Source::Name(name) => {
            let profile = configuration_of(&name)?;
            let path = match credential_of(&profile.wireguard) {
                Some(id) => credential_path(&id)?,
                None => profile.wireguard.clone(),
            };
            (profile, path, Some(name))
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
    complete(profile, &path, name, tunnel)
}

/// Reads the provider's file of a profile, and brings both together with the command line.
fn complete(profile: Profile, path: &Path, name: TunnelName, tunnel: &TunnelArgs) -> Result<TunnelRequest, Failure> {
    let file = read(path)?;
    let (wireguard, warnings) = wg_quick::parse(&file.name, &file.contents).map_err(|found| {
        let failure = Failure::new(render(&found));
        // A profile that is given as a provider's file has nothing but errors.
        match profile.wireguard.extension() == Some(OsStr::new("toml")) {
            true => failure.advise("for a profile, put the file into /etc/vpn-exec and use its name: --tunnel NAME"),
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
    replace_domains(&mut dns.domains, &tunnel.dns_for);
}

/// Returns the name of a tunnel that has a file and no profile: the file's name without its extension, changed where it
/// is not a valid tunnel name.
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
