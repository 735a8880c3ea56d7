//! The command line. Declared once, here: help, completions and the man page come from it.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use ipnet::IpNet;

use crate::config::host_access::{self, BusChoice};
use crate::config::network::parse_local;
use crate::config::ports::{parse_host_ports, parse_open, parse_publish};
use crate::config::{BackendChoice, DbusAccess, HostPort, OpenPorts, Publish, parse_mtu};
use crate::names::closest;
use crate::names::{ServiceName, TunnelName};

/// Run a program so that its Internet traffic leaves through a WireGuard tunnel, and only that program's.
#[derive(Debug, Parser)]
#[command(
    name = "vpn-exec",
    version,
    long_about = LONG_ABOUT,
    after_long_help = AFTER_HELP,
    subcommand_negates_reqs = true,
    disable_help_subcommand = true,
    override_usage = "vpn-exec [--config FILE | --tunnel NAME] [OPTIONS] -- PROGRAM [ARG]...\n       vpn-exec COMMAND [OPTIONS]",
    max_term_width = 100
)]
pub struct Cli {
    /// What to do instead of running a program.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Which program to run, and how.
    #[command(flatten)]
    pub run: RunArgs,

    /// What is said on the way.
    #[command(flatten)]
    pub verbosity: Verbosity,
}

impl Cli {
    /// Parses a command line, the program's name first.
    ///
    /// # Errors
    /// If it is not understood; also if it asks for help, which is then the error's text.
    pub fn parse_checked(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut command = Self::command();
        let arguments: Vec<OsString> = arguments.into_iter().collect();
        let matches = command
            .try_get_matches_from_mut(&arguments)
            .map_err(|error| with_better_tips(error, &command, &arguments))?;
        if let Some((name, _)) = matches.subcommand() {
            // Clap's own `args_conflicts_with_subcommands` would forbid `vpn-exec -v plan`, too.
            let given = |id: &&clap::Id| matches.value_source(id.as_str()) == Some(ValueSource::CommandLine);
            let misplaced = matches.ids().filter(given).find(|id| !matches!(id.as_str(), "verbose" | "quiet" | "log"));
            let option = command.get_arguments().find(|argument| Some(argument.get_id()) == misplaced);
            if let Some(option) = option.map(ToString::to_string) {
                let message = format!("the argument '{option}' belongs after '{name}', not before it");
                return Err(command.error(ErrorKind::ArgumentConflict, message));
            }
        }
        Self::from_arg_matches(&matches)
    }
}

/// Tells who has given an argument that is not understood what was probably meant. Clap does not know that a program has to follow
/// two dashes, and takes any word for an attempt at an option.
fn with_better_tips(mut error: clap::Error, command: &clap::Command, arguments: &[OsString]) -> clap::Error {
    let (ErrorKind::UnknownArgument, Some(ContextValue::String(unknown))) =
        (error.kind(), error.get(ContextKind::InvalidArg).cloned())
    else {
        return error;
    };
    // That a misspelt option could be meant for the name of a program.
    error.remove(ContextKind::Suggested);
    if unknown.starts_with('-') {
        return error;
    }
    let words: Vec<_> = arguments.iter().skip(1).map(|word| word.to_string_lossy()).collect();
    let before = words.iter().position(|word| *word == unknown).unwrap_or(words.len());
    let names: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
    let given = words[..before].iter().find(|word| names.contains(&word.as_ref()));
    let tip = match given.map(AsRef::as_ref) {
        Some("check" | "plan") if unknown.contains('/') || unknown.ends_with(".conf") => {
            format!("a provider's file is named with an option: '--config {unknown}'")
        }
        Some("check" | "plan") => format!("a tunnel is named with an option: '--tunnel {unknown}'"),
        Some(_) => return error,
        None if unknown == "help" => "for help, use '--help', also after a command: 'vpn-exec up --help'".to_owned(),
        None => match closest(&unknown, names) {
            Some(name) => format!("a similar command exists: '{name}'"),
            None => {
                let options = if before == 0 { "--config FILE".to_owned() } else { words[..before].join(" ") };
                format!("the program follows two dashes: 'vpn-exec {options} -- {}'", words[before..].join(" "))
            }
        },
    };
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![StyledStr::from(tip)]));
    error
}

/// A time that can be waited for a handshake, in seconds.
fn parse_wait(text: &str) -> Result<u32, String> {
    const DAY: u32 = 24 * 60 * 60;

    let seconds = text.parse().ok().filter(|seconds| (1..=DAY).contains(seconds));
    seconds.ok_or_else(|| format!("expected whole seconds, from 1 to {DAY}"))
}

/// A unix socket outside.
fn parse_socket(text: &str) -> Result<String, String> {
    host_access::check_socket(text).map(|()| text.to_owned())
}

/// A name on the session bus.
fn parse_bus_name(text: &str) -> Result<String, String> {
    host_access::check_bus_name(text).map(|()| text.to_owned())
}

/// A resolver's address.
fn parse_resolver(text: &str) -> Result<IpAddr, &'static str> {
    text.parse().map_err(|_| "expected a resolver's IP address, such as 10.64.0.1, without a port")
}

const LONG_ABOUT: &str = "\
Run a program so that its Internet traffic leaves through a WireGuard tunnel, and only that program's.

The program runs in a network namespace of its own that holds WireGuard's interface wg0 and a link to the host, and nothing \
else: when the tunnel is down, it has no way out. The machine and everybody else on it keep their network as it is.";

/// What the help says after the options, and the manual page, too.
pub const AFTER_HELP: &str = "\
Exit status:
  that of the program; if a signal ended it, vpn-exec ends by the same one
  125  vpn-exec itself failed
  126  the program cannot be executed
  127  there is no such program

Examples:
  sudo vpn-exec --config wg0.conf -- curl https://ifconfig.me
  sudo vpn-exec up wg0.conf --wait 10
  sudo vpn-exec --tunnel wg0 -- transmission-daemon --foreground
  vpn-exec plan --config wg0.conf";

/// What to do instead of running a program.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a standing tunnel, which programs join with --tunnel NAME
    Up(UpArgs),
    /// Take a standing tunnel down
    Down(DownArgs),
    /// Apply a changed configuration to a tunnel that is up, without interrupting the programs inside
    Reload(ReloadArgs),
    /// Show how tunnels are: their handshakes, their traffic, the programs inside
    Status(StatusArgs),
    /// List all tunnels, a line each
    List(ListArgs),
    /// Show all that would be done, and change nothing
    Plan(PlanArgs),
    /// Check a configuration, and say what is wrong with it
    Check(CheckArgs),
    /// Print the drop-in that puts a systemd service into a standing tunnel, or say why that cannot work
    Unit(UnitArgs),
    /// Print the completions of a shell
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man,
}

/// Where the tunnel comes from.
#[derive(Debug, Args)]
pub struct SourceArgs {
    /// The provider's wg-quick file, unchanged; `-` is standard input
    #[arg(short, long, value_name = "FILE", conflicts_with = "tunnel")]
    pub config: Option<PathBuf>,

    /// The standing tunnel NAME, or the profile /etc/vpn-exec/NAME.toml (else ~/.config/vpn-exec/NAME.toml)
    #[arg(short, long, value_name = "NAME")]
    pub tunnel: Option<TunnelName>,

    /// The tunnel's name, also of its namespace /run/netns/NAME [default: the file's or the profile's name]
    #[arg(long, value_name = "NAME")]
    pub name: Option<TunnelName>,
}

/// What a single `--publish` says.
pub type Ports = Vec<Publish>;

/// What a single `--host-port` says.
pub type HostPorts = Vec<HostPort>;

/// What the tunnel is made of, beyond its file.
#[derive(Clone, Debug, Args)]
pub struct TunnelArgs {
    /// Which WireGuard to use [default: auto, the kernel's if there is one]
    #[arg(long, value_enum, value_name = "BACKEND", hide_possible_values = false)]
    pub backend: Option<BackendChoice>,

    /// The MTU of WireGuard's interface in bytes, instead of the file's [default: the file's, else computed from the way to the endpoint]
    #[arg(long, value_name = "BYTES", value_parser = parse_mtu)]
    pub mtu: Option<u32>,

    /// A resolver for the program, instead of the file's (repeatable)
    #[arg(long, value_name = "ADDRESS", value_parser = parse_resolver)]
    pub dns: Vec<IpAddr>,

    /// A search domain for the program, instead of the file's (repeatable)
    #[arg(long, value_name = "DOMAIN")]
    pub search: Vec<String>,

    /// A port of the host that leads to a port inside, as `[ADDRESS:]PORT:PORT[/udp]`; ranges too (repeatable). With
    /// `,proxy-protocol=v2` appended, the program is told who its client is
    #[arg(long, value_name = "PORTS", value_parser = parse_publish)]
    pub publish: Vec<Ports>,

    /// A port of the host's loopback that the program reaches at host.internal, as `PORT[/udp]`; ranges too (repeatable)
    #[arg(long, value_name = "PORTS", value_parser = parse_host_ports)]
    pub host_port: Vec<HostPorts>,

    /// A network that is reached through the host instead of the tunnel, such as 192.168.1.0/24 (repeatable)
    #[arg(long, value_name = "NETWORK", value_parser = parse_local)]
    pub local: Vec<IpNet>,

    /// Reach all private networks that the host is attached to, through the host
    #[arg(long)]
    pub lan: bool,

    /// A port inside that is reached through the tunnel, as `PORT[/tcp|/udp]`; ranges too (repeatable)
    #[arg(long, value_name = "PORTS", value_parser = parse_open)]
    pub open: Vec<OpenPorts>,

    /// Run the file's PreUp, PostUp, PreDown and PostDown, inside the tunnel's namespace
    #[arg(long)]
    pub allow_hooks: bool,
}

/// Under what identity and with which privileges the program runs.
#[derive(Debug, Args)]
pub struct ProgramArgs {
    /// Run as this user (name or number) [default: who called sudo, else the same user]
    #[arg(short, long, value_name = "USER")]
    pub user: Option<String>,

    /// Run as this group (name or number)
    #[arg(short, long, value_name = "GROUP")]
    pub group: Option<String>,

    /// A capability that the program keeps, such as net_raw (repeatable) [default: none]
    #[arg(long, value_name = "CAPABILITY")]
    pub keep_cap: Vec<String>,

    /// Let the program gain privileges by set-user-ID files (no_new_privs off)
    #[arg(long)]
    pub new_privs: bool,

    /// The message buses that the program can reach: the whole `session` bus, the `system` bus, or `none` (repeatable)
    /// [default: the session bus, filtered]
    #[arg(long, value_name = "BUS", value_enum)]
    pub dbus: Vec<BusChoice>,

    /// A name on the session bus that the program can talk to, besides those of desktop services (repeatable)
    #[arg(long, value_name = "NAME", value_parser = parse_bus_name)]
    pub dbus_talk: Vec<String>,

    /// A unix socket of a process outside the tunnel that the program can connect to; `*` at its end stands for any rest; or `any`
    /// (repeatable)
    #[arg(long, value_name = "PATH", value_parser = parse_socket)]
    pub socket: Vec<String>,
}

/// Which program to run, and how.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Where the tunnel comes from.
    #[command(flatten)]
    pub source: SourceArgs,

    /// What the tunnel is made of.
    #[command(flatten)]
    pub tunnel: TunnelArgs,

    /// Under what identity the program runs.
    #[command(flatten)]
    pub identity: ProgramArgs,

    /// Start the program only after the first handshake, and fail if there is none within SECONDS
    #[arg(short, long, value_name = "SECONDS", value_parser = parse_wait)]
    pub wait: Option<u32>,

    /// Kill what the program leaves behind when it ends, instead of waiting for it
    #[arg(long)]
    pub kill_orphans: bool,

    /// Give the program a terminal of its own, as it has without this option where the caller's belongs to another user
    #[arg(long)]
    pub pty: bool,

    /// The program and its arguments
    #[arg(last = true, value_name = "PROGRAM")]
    pub program: Vec<OsString>,
}

/// Arguments of `vpn-exec plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Where the tunnel comes from.
    #[command(flatten)]
    pub source: SourceArgs,

    /// What the tunnel is made of.
    #[command(flatten)]
    pub tunnel: TunnelArgs,

    /// Under what identity the program would run.
    #[command(flatten)]
    pub identity: ProgramArgs,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `vpn-exec check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Check a profile alone, without the provider's file that it names
    #[arg(long, value_name = "FILE", conflicts_with_all = ["SourceArgs", "TunnelArgs", "ProgramArgs"])]
    pub profile_only: Option<PathBuf>,

    /// Where the tunnel comes from.
    #[command(flatten)]
    pub source: SourceArgs,

    /// What the tunnel is made of.
    #[command(flatten)]
    pub tunnel: TunnelArgs,

    /// Under what identity the program would run.
    #[command(flatten)]
    pub identity: ProgramArgs,
}

/// Which tunnel a command is about that has a configuration.
#[derive(Clone, Debug, Args)]
pub struct TargetArgs {
    /// The profile's name, or the provider's wg-quick file if there is a `/` in it or it ends in `.conf`; `-` is standard input
    #[arg(value_name = "NAME|FILE")]
    pub target: PathBuf,

    /// The tunnel's name, also of its namespace /run/netns/NAME [default: the file's or the profile's name]
    #[arg(long, value_name = "NAME")]
    pub name: Option<TunnelName>,

    /// What the tunnel is made of.
    #[command(flatten)]
    pub tunnel: TunnelArgs,
}

/// Arguments of `vpn-exec up`.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// Which tunnel.
    #[command(flatten)]
    pub target: TargetArgs,

    /// Return only after the first handshake, and take the tunnel down again if there is none within SECONDS
    #[arg(short, long, value_name = "SECONDS", value_parser = parse_wait)]
    pub wait: Option<u32>,

    /// Stay in the foreground and hold the tunnel until SIGTERM or SIGINT, for service managers; SIGHUP reads the file again
    #[arg(short, long)]
    pub foreground: bool,

    /// Put a new keeper in the place of the running one (after an upgrade, say); programs inside go on
    #[arg(long)]
    pub replace: bool,
}

/// Arguments of `vpn-exec reload`.
#[derive(Debug, Args)]
pub struct ReloadArgs {
    /// Which tunnel.
    #[command(flatten)]
    pub target: TargetArgs,

    /// Have the keeper of `up --foreground` read the file or profile again, with the options and credentials that it was started with
    #[arg(long)]
    pub by_keeper: bool,
}

/// Arguments of `vpn-exec down`.
#[derive(Debug, Args)]
pub struct DownArgs {
    /// The tunnel's name.
    pub name: TunnelName,

    /// Take it down even if programs are inside, which are killed
    #[arg(short, long)]
    pub force: bool,

    /// For a service's ExecStopPost=: take away what its keeper has left, if anything, unless that was killed and is started again
    #[arg(long, conflicts_with = "force")]
    pub after_service: bool,
}

/// Arguments of `vpn-exec status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The tunnel's name [default: all]
    pub name: Option<TunnelName>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,

    /// Print it again every second, until interrupted
    #[arg(short, long)]
    pub watch: bool,
}

/// Arguments of `vpn-exec list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `vpn-exec unit`.
#[derive(Debug, Args)]
pub struct UnitArgs {
    /// The service, which stays what it is but for its network and its names
    pub service: ServiceName,

    /// The standing tunnel, which the service vpn-exec@NAME holds
    #[arg(short, long, value_name = "NAME")]
    pub tunnel: TunnelName,

    /// What the service sees of /run besides its own RuntimeDirectory=, such as /run/postgresql (repeatable)
    #[arg(long, value_name = "PATH")]
    pub show: Vec<PathBuf>,

    /// The message buses that the service can reach
    #[arg(long, value_name = "BUSES", default_value = "session", hide_default_value = true)]
    pub dbus: DbusAccess,

    /// Write it to /etc/systemd/system, and have systemd read it
    #[arg(long)]
    pub install: bool,
}

/// What is said on the way.
#[derive(Clone, Copy, Debug, Args)]
pub struct Verbosity {
    /// Say what is done; twice: in detail; three times: what the libraries say, too
    #[arg(short, long, action = ArgAction::Count, global = true)]
    pub verbose: u8,

    /// Say only what went wrong
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,

    /// The form of messages [default: auto]
    #[arg(long, global = true, value_name = "FORM", value_enum, default_value_t, hide_default_value = true)]
    pub log: LogFormat,
}

/// In which form something is said on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// The journal's form if standard error is the journal, else plain
    #[default]
    Auto,
    /// A line for each event, for people
    Plain,
    /// Lines with their levels, for systemd's journal
    Journal,
    /// A line of JSON for each event
    Json,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_declaration_is_sound() {
        Cli::command().debug_assert();
    }

    fn parse(arguments: &[&str]) -> Result<Cli, clap::Error> {
        Cli::parse_checked(arguments.iter().map(OsString::from))
    }

    #[test]
    fn a_program_always_follows_two_dashes() {
        let cli = parse(&["vpn-exec", "-c", "wg0.conf", "--", "plan", "--json"]).expect("valid");
        assert!(cli.command.is_none());
        assert_eq!(cli.run.program, ["plan", "--json"]);
        assert!(parse(&["vpn-exec", "-c", "wg0.conf", "curl"]).is_err());
    }

    #[test]
    fn what_is_not_understood_gets_a_tip() {
        for (arguments, tip) in [
            (&["-c", "wg0.conf", "curl", "-s", "x"][..], "'vpn-exec -c wg0.conf -- curl -s x'"),
            (&["curl"], "'vpn-exec --config FILE -- curl'"),
            (&["staus"], "'status'"),
            (&["help", "up"], "'--help'"),
            (&["check", "wg0.conf"], "'--config wg0.conf'"),
            (&["plan", "mullvad"], "'--tunnel mullvad'"),
            (&["--confg", "wg0.conf", "--", "true"], "'--config'"),
        ] {
            let said = parse(&[&["vpn-exec"], arguments].concat()).expect_err("not understood").to_string();
            assert!(said.contains("tip: ") && said.contains(tip), "{said}");
            assert!(!said.contains("as a value"), "{said}");
        }
        for wait in ["0", "86401", "5s", "-1", "1.5"] {
            let option = format!("--wait={wait}");
            let said = parse(&["vpn-exec", "-c", "f", &option, "--", "true"]).expect_err("no time").to_string();
            assert!(said.contains("whole seconds, from 1 to 86400"), "{said}");
        }
    }

    #[test]
    fn options_of_a_command_follow_it() {
        assert!(parse(&["vpn-exec", "-q", "check", "-c", "wg0.conf"]).is_ok_and(|cli| cli.verbosity.quiet));
        let error = parse(&["vpn-exec", "-c", "wg0.conf", "plan"]).expect_err("it would be ignored");
        assert!(error.to_string().contains("belongs after 'plan'"), "{error}");
    }
}
