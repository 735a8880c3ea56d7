//! The options and arguments of every command.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::{ArgAction, Args, ValueHint};
use clap_complete::engine::ArgValueCandidates;
use ipnet::IpNet;

use super::completion;
use super::source::SourceArgs;
use crate::config::dns_for::parse_dns_for;
use crate::config::host_access::{self, BusChoice};
use crate::config::network::parse_local;
use crate::config::ports::{parse_host_ports, parse_open, parse_publish};
use crate::config::{BackendChoice, DbusAccess, DomainResolvers, HostPort, OpenPorts, Publish, parse_mtu};
use crate::names::{ServiceName, TunnelName};

/// The ports of a single `--publish`.
pub type Ports = Vec<Publish>;

/// The ports of a single `--host-port`.
pub type HostPorts = Vec<HostPort>;

/// The heading of the options of a tunnel in the help.
const TUNNEL_OPTIONS: &str = "Tunnel options";

/// The options of a tunnel, which supplement or override its file and profile.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = TUNNEL_OPTIONS)]
pub struct TunnelArgs {
    /// WireGuard implementation [default: auto, the kernel's where available]
    #[arg(long, value_enum, value_name = "BACKEND", hide_possible_values = false)]
    pub backend: Option<BackendChoice>,

    /// Make the tunnel in a user namespace, without privileges [default: unless run as root]
    #[arg(long)]
    pub rootless: bool,

    /// MTU of the WireGuard interface in bytes [default: the file's, else computed from the route to the endpoint]
    #[arg(long, value_name = "BYTES", value_parser = parse_mtu)]
    pub mtu: Option<u32>,

    /// DNS server for the program, instead of the file's (repeatable)
    #[arg(long, value_name = "ADDRESS", value_parser = parse_resolver)]
    pub dns: Vec<IpAddr>,

    /// DNS server for a domain and all names below it, such as cluster.local=10.43.0.10: in a local network, or one of
    /// the tunnel's (repeatable)
    #[arg(long, value_name = "DOMAIN=ADDRESS", value_parser = parse_dns_for)]
    pub dns_for: Vec<DomainResolvers>,

    /// DNS search domain for the program, instead of the file's (repeatable)
    #[arg(long, value_name = "DOMAIN")]
    pub search: Vec<String>,

    /// Forward a host port to a port in the tunnel: `[ADDRESS:]PORT:PORT[/udp]`; ranges are allowed (repeatable).
    /// Append `,proxy-protocol=v2` to tell the program its client's address
    #[arg(long, value_name = "PORTS", value_parser = parse_publish)]
    pub publish: Vec<Ports>,

    /// Let the program reach a port of the host's loopback at host.internal: `PORT[/udp]`; ranges are allowed
    /// (repeatable)
    #[arg(long, value_name = "PORTS", value_parser = parse_host_ports)]
    pub host_port: Vec<HostPorts>,

    /// Reach a network through the host instead of the tunnel, such as 192.168.1.0/24 (repeatable)
    #[arg(long, value_name = "NETWORK", value_parser = parse_local)]
    pub local: Vec<IpNet>,

    /// Reach all private networks that the host is attached to, through the host
    #[arg(long)]
    pub lan: bool,

    /// Accept connections through the tunnel to a port of the program: `PORT[/tcp|/udp]`; ranges are allowed
    /// (repeatable)
    #[arg(long, value_name = "PORTS", value_parser = parse_open)]
    pub open: Vec<OpenPorts>,

    /// Run the file's PreUp, PostUp, PreDown and PostDown commands, inside the tunnel's namespace
    #[arg(long)]
    pub allow_hooks: bool,
}

/// The identity and the privileges of the program, and the services of the host that it can reach.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Program options")]
pub struct ProgramArgs {
    /// Run as this user (name or ID) [default: the caller of sudo, else the current user]
    #[arg(short, long, value_name = "USER")]
    pub user: Option<String>,

    /// Run as this group (name or ID)
    #[arg(short, long, value_name = "GROUP")]
    pub group: Option<String>,

    /// Let the program keep a capability, such as net_raw (repeatable) [default: none]
    #[arg(long, value_name = "CAPABILITY")]
    pub keep_cap: Vec<String>,

    /// Let the program gain privileges from set-user-ID files (turns no_new_privs off)
    #[arg(long)]
    pub new_privs: bool,

    /// D-Bus buses that the program can reach: the unfiltered `session` bus, the `system` bus, or `none` (repeatable)
    /// [default: the filtered session bus]
    #[arg(long, value_name = "BUS", value_enum)]
    pub dbus: Vec<BusChoice>,

    /// Let the program call a name on the session bus, besides the standard desktop services (repeatable)
    #[arg(long, value_name = "NAME", value_parser = parse_bus_name)]
    pub dbus_talk: Vec<String>,

    /// Let the program connect to a unix socket outside the tunnel; a trailing `*` matches any rest; `any` allows all
    /// (repeatable)
    #[arg(long, value_name = "PATH", value_parser = parse_socket, value_hint = ValueHint::AnyPath)]
    pub socket: Vec<String>,
}

/// The options of a program's launch.
#[derive(Debug, Args)]
pub struct LaunchArgs {
    /// The tunnel.
    #[command(flatten)]
    pub source: SourceArgs,

    /// Start the program after the first handshake; fail if there is none within SECONDS
    #[arg(short, long, value_name = "SECONDS", value_parser = parse_wait)]
    pub wait: Option<u32>,

    /// Kill the processes that the program leaves behind, instead of waiting for them
    #[arg(long)]
    pub kill_orphans: bool,

    /// Give the program a pseudoterminal [default: only if the caller's terminal belongs to another user]
    #[arg(long)]
    pub pty: bool,

    /// The options of the program.
    #[command(flatten)]
    pub identity: ProgramArgs,

    /// The options of the tunnel.
    #[command(flatten)]
    pub tunnel: TunnelArgs,
}

/// The program to run, and its tunnel.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The options of the launch.
    #[command(flatten)]
    pub launch: LaunchArgs,

    /// The program and its arguments
    #[arg(last = true, value_name = "PROGRAM", help_heading = None::<&str>)]
    pub program: Vec<OsString>,
}

/// The arguments of `vpn-exec shell`.
#[derive(Debug, Args)]
pub struct ShellArgs {
    /// The options of the launch.
    #[command(flatten)]
    pub launch: LaunchArgs,
}

/// The arguments of `vpn-exec attach`.
#[derive(Debug, Args)]
pub struct AttachArgs {
    /// The tunnel.
    #[command(flatten)]
    pub source: SourceArgs,

    /// Only close the namespace, without a tunnel
    #[arg(long)]
    pub closed: bool,

    /// Print the state of the namespace, for probes; needs no tunnel's name
    #[arg(
        long,
        conflicts_with_all = ["SourceArgs", "closed", "backend", "mtu", "dns", "dns_for", "search", "local", "open"]
    )]
    pub check: bool,

    /// WireGuard implementation [default: auto, the embedded one if there is /dev/net/tun, else the kernel's]
    #[arg(long, value_enum, value_name = "BACKEND", help_heading = TUNNEL_OPTIONS)]
    pub backend: Option<BackendChoice>,

    /// MTU of the WireGuard interface in bytes [default: the file's, else computed from the route to the endpoint]
    #[arg(long, value_name = "BYTES", value_parser = parse_mtu, help_heading = TUNNEL_OPTIONS)]
    pub mtu: Option<u32>,

    /// DNS server, instead of the file's (repeatable)
    #[arg(long, value_name = "ADDRESS", value_parser = parse_resolver, help_heading = TUNNEL_OPTIONS)]
    pub dns: Vec<IpAddr>,

    /// DNS server for a domain and all names below it, such as cluster.local=10.43.0.10: in a local network, or one of
    /// the tunnel's (repeatable)
    #[arg(long, value_name = "DOMAIN=ADDRESS", value_parser = parse_dns_for, help_heading = TUNNEL_OPTIONS)]
    pub dns_for: Vec<DomainResolvers>,

    /// DNS search domain, instead of the file's (repeatable)
    #[arg(long, value_name = "DOMAIN", help_heading = TUNNEL_OPTIONS)]
    pub search: Vec<String>,

    /// Reach a network outside the tunnel, such as the cluster's 10.43.0.0/16 (repeatable)
    #[arg(long, value_name = "NETWORK", value_parser = parse_local, help_heading = TUNNEL_OPTIONS)]
    pub local: Vec<IpNet>,

    /// Accept connections through the tunnel to a port: `PORT[/tcp|/udp]`; ranges are allowed (repeatable)
    #[arg(long, value_name = "PORTS", value_parser = parse_open, help_heading = TUNNEL_OPTIONS)]
    pub open: Vec<OpenPorts>,
}

impl AttachArgs {
    /// Returns the options of the tunnel.
    pub fn tunnel(&self) -> TunnelArgs {
        let Self { backend, mtu, dns, dns_for, search, local, open, .. } = self;
        TunnelArgs {
            backend: *backend,
            mtu: *mtu,
            dns: dns.clone(),
            dns_for: dns_for.clone(),
            search: search.clone(),
            local: local.clone(),
            open: open.clone(),
            ..TunnelArgs::default()
        }
    }
}

/// The arguments of `vpn-exec plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// The tunnel.
    #[command(flatten)]
    pub source: SourceArgs,

    /// Print JSON
    #[arg(long)]
    pub json: bool,

    /// Show what `vpn-exec attach` would do in the network namespace of this process
    #[arg(long)]
    pub attach: bool,

    /// The options of the program.
    #[command(flatten)]
    pub identity: ProgramArgs,

    /// The options of the tunnel.
    #[command(flatten)]
    pub tunnel: TunnelArgs,
}

/// The arguments of `vpn-exec check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The tunnel.
    #[command(flatten)]
    pub source: SourceArgs,

    /// Check only a profile, without the provider's file that it names
    #[arg(
        long,
        value_name = "FILE",
        value_hint = ValueHint::FilePath,
        conflicts_with_all = ["SourceArgs", "TunnelArgs", "ProgramArgs"]
    )]
    pub profile_only: Option<PathBuf>,

    /// The options of the program.
    #[command(flatten)]
    pub identity: ProgramArgs,

    /// The options of the tunnel.
    #[command(flatten)]
    pub tunnel: TunnelArgs,
}

/// The arguments of `vpn-exec up`.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// The tunnel.
    #[command(flatten)]
    pub source: SourceArgs,

    /// Return after the first handshake; remove the tunnel if there is none within SECONDS
    #[arg(short, long, value_name = "SECONDS", value_parser = parse_wait)]
    pub wait: Option<u32>,

    /// Stay in the foreground and hold the tunnel until SIGTERM or SIGINT, for service managers; SIGHUP reloads the
    /// configuration
    #[arg(short, long)]
    pub foreground: bool,

    /// Replace the running keeper, for example after an upgrade; the programs inside go on
    #[arg(long)]
    pub replace: bool,

    /// The options of the tunnel.
    #[command(flatten)]
    pub tunnel: TunnelArgs,
}

/// The arguments of `vpn-exec reload`.
#[derive(Debug, Args)]
pub struct ReloadArgs {
    /// The tunnel.
    #[command(flatten)]
    pub source: SourceArgs,

    /// Let the keeper of `up --foreground` read the configuration again, with its own options and credentials
    #[arg(long)]
    pub by_keeper: bool,

    /// The options of the tunnel.
    #[command(flatten)]
    pub tunnel: TunnelArgs,
}

/// The arguments of `vpn-exec down`.
#[derive(Debug, Args)]
pub struct DownArgs {
    /// The tunnel's name
    #[arg(add = ArgValueCandidates::new(completion::running))]
    pub name: TunnelName,

    /// Kill the programs inside, instead of refusing to remove a tunnel in use
    #[arg(short, long)]
    pub force: bool,

    /// For ExecStopPost= of a service: remove the remains of its keeper, unless the keeper was killed and will be
    /// restarted
    #[arg(long, conflicts_with = "force")]
    pub after_service: bool,
}

/// The arguments of `vpn-exec status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The tunnel's name [default: all tunnels]
    #[arg(add = ArgValueCandidates::new(completion::running))]
    pub name: Option<TunnelName>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,

    /// Repeat every second until interrupted
    #[arg(short, long)]
    pub watch: bool,

    /// Print only the state of NAME, and exit with 0 if it is up, 3 if it is not, 4 if there is no such tunnel
    #[arg(long, requires = "name", conflicts_with_all = ["json", "watch"])]
    pub check: bool,
}

/// The arguments of `vpn-exec list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// The arguments of `vpn-exec logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// The tunnel's name
    #[arg(add = ArgValueCandidates::new(completion::names))]
    pub name: TunnelName,

    /// Print new messages until interrupted
    #[arg(short, long)]
    pub follow: bool,

    /// Print at most the last LINES messages
    #[arg(short = 'n', long, value_name = "LINES")]
    pub lines: Option<u32>,
}

/// The arguments of `vpn-exec unit`.
#[derive(Debug, Args)]
pub struct UnitArgs {
    /// The service; only its network, its DNS and its view of /run and /etc change
    #[arg(add = ArgValueCandidates::new(completion::services))]
    pub service: ServiceName,

    /// The standing tunnel, which the service vpn-exec@NAME holds
    #[arg(short, long, value_name = "NAME", add = ArgValueCandidates::new(completion::names))]
    pub tunnel: TunnelName,

    /// Show a path below /run to the service besides its RuntimeDirectory=, such as /run/postgresql (repeatable)
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    pub show: Vec<PathBuf>,

    /// D-Bus buses that the service can reach
    #[arg(long, value_name = "BUSES", default_value = "session", hide_default_value = true)]
    pub dbus: DbusAccess,

    /// Write the drop-in to /etc/systemd/system and reload systemd
    #[arg(long)]
    pub install: bool,
}

/// The arguments of `vpn-exec desktop`.
#[derive(Debug, Args)]
pub struct DesktopArgs {
    /// The program: the ID of its entry (firefox.desktop), its command, or its name in menus
    #[arg(value_name = "PROGRAM", add = ArgValueCandidates::new(completion::applications))]
    pub program: String,

    /// The tunnel's name
    #[arg(
        short,
        long,
        value_name = "NAME",
        required_unless_present = "config",
        add = ArgValueCandidates::new(completion::names)
    )]
    pub tunnel: Option<TunnelName>,

    /// The provider's wg-quick file, instead of a name
    #[arg(short, long, value_name = "FILE", conflicts_with = "tunnel", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,

    /// Remove the entry; a profile stays
    #[arg(long)]
    pub remove: bool,
}

impl DesktopArgs {
    /// Returns the tunnel.
    pub fn source(&self) -> SourceArgs {
        SourceArgs { target: None, config: self.config.clone(), tunnel: self.tunnel.clone(), name: None }
    }
}

/// The arguments of `vpn-exec oci-hook`.
#[derive(Debug, Args)]
pub struct OciHookArgs {
    /// The stage at which the runtime runs the hook
    #[arg(value_enum)]
    pub stage: OciHookStage,

    /// The tunnel's name: that of a profile with `containers = true` [default: the container's annotation]
    #[arg(add = ArgValueCandidates::new(completion::names))]
    pub name: Option<TunnelName>,
}

/// A stage at which an OCI runtime runs hooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OciHookStage {
    /// The container's namespaces exist: make the tunnel
    #[value(name = "createRuntime")]
    CreateRuntime,
    /// The container has ended: remove the tunnel
    #[value(name = "poststop")]
    Poststop,
}

/// The arguments of `vpn-exec cdi`.
#[derive(Debug, Args)]
pub struct CdiArgs {
    /// The tunnels' names [default: all profiles in /etc/vpn-exec with `containers = true`]
    #[arg(value_name = "NAME", add = ArgValueCandidates::new(completion::names))]
    pub names: Vec<TunnelName>,

    /// Write the resolv.conf files that the containers mount to this directory; it must persist as long as the CDI file
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, default_value = "/etc/cdi/vpn-exec")]
    pub resolv_conf_dir: PathBuf,
}

/// The arguments of `vpn-exec completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    pub shell: clap_complete::Shell,
}

/// The arguments of `vpn-exec man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Print the man page of this command [default: the main page]
    #[arg(value_name = "COMMAND", conflicts_with = "dir", add = ArgValueCandidates::new(completion::commands))]
    pub command: Option<String>,

    /// Write all man pages to this directory
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub dir: Option<PathBuf>,
}

/// The arguments of `vpn-exec help`.
#[derive(Debug, Args)]
pub struct HelpArgs {
    /// The command [default: the help of vpn-exec itself]
    #[arg(value_name = "COMMAND", add = ArgValueCandidates::new(completion::commands))]
    pub command: Option<String>,
}

/// The amount and the form of messages.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Message options")]
pub struct Verbosity {
    /// Print more messages; twice: debugging messages; three times: messages of the libraries as well
    #[arg(short, long, action = ArgAction::Count, global = true)]
    pub verbose: u8,

    /// Print only errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,

    /// Form of messages [default: auto]
    #[arg(long, global = true, value_name = "FORM", value_enum, default_value_t, hide_default_value = true)]
    pub log: LogFormat,
}

/// The form of messages on standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// `journal` if standard error is the journal, else `plain`
    #[default]
    Auto,
    /// One line per message, for people
    Plain,
    /// Lines with syslog priorities, for the systemd journal
    Journal,
    /// One JSON object per message
    Json,
}

/// Parses a time to wait for a handshake, in seconds.
fn parse_wait(text: &str) -> Result<u32, String> {
    const DAY: u32 = 24 * 60 * 60;

    let seconds = text.parse().ok().filter(|seconds| (1..=DAY).contains(seconds));
    seconds.ok_or_else(|| format!("expected whole seconds, from 1 to {DAY}"))
}

/// Parses the path of a unix socket outside the tunnel.
fn parse_socket(text: &str) -> Result<String, String> {
    host_access::check_socket(text).map(|()| text.to_owned())
}

/// Parses a name on the session bus.
fn parse_bus_name(text: &str) -> Result<String, String> {
    host_access::check_bus_name(text).map(|()| text.to_owned())
}

/// Parses the address of a DNS server.
fn parse_resolver(text: &str) -> Result<IpAddr, &'static str> {
    text.parse().map_err(|_| "expected the IP address of a DNS server, such as 10.64.0.1, without a port")
}
