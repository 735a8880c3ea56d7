//! The command line: its declaration, from which the help, the completions and the man pages are made.

pub mod arguments;
pub mod completion;
mod mistakes;
mod source;

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::builder::StyledStr;
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

pub use arguments::*;
pub use source::{Source, SourceArgs, SourceError};

use crate::failure::Failure;

/// Run a program in a network namespace whose only way to the Internet is a WireGuard tunnel.
#[derive(Debug, Parser)]
#[command(
    name = "vpn-exec",
    version,
    long_about = LONG_ABOUT,
    after_help = SHORT_AFTER_HELP,
    after_long_help = AFTER_HELP,
    disable_help_subcommand = true,
    override_usage = "vpn-exec [OPTIONS] NAME|FILE -- PROGRAM [ARG]...\n       vpn-exec COMMAND [OPTIONS]",
    max_term_width = 100
)]
pub struct Cli {
    /// The command; none runs a program.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// The program to run, and its tunnel.
    #[command(flatten)]
    pub run: RunArgs,

    /// The amount and the form of messages.
    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// The reason why a command line yields no [`Cli`].
#[derive(Debug)]
pub enum NotParsed {
    /// The user asked for the help or the version, which is this text.
    Help(StyledStr),
    /// The command line is invalid.
    Invalid(Failure),
}

impl Cli {
    /// Returns whether the command is a container's process, whose log is all that its user sees of it.
    pub fn is_daemon(&self) -> bool {
        matches!(&self.command, Some(Command::Attach(arguments)) if !arguments.check)
    }

    /// Parses a command line whose first word is the program's name. `names` lists the tunnels and profiles of this
    /// machine; it is called only to explain a mistake.
    ///
    /// # Errors
    /// [`NotParsed::Help`] if the command line asks for help, [`NotParsed::Invalid`] if it is invalid.
    pub fn parse_checked(
        arguments: impl IntoIterator<Item = OsString>,
        names: impl Fn() -> Vec<String>,
    ) -> Result<Self, NotParsed> {
        let mut command = Self::command();
        let arguments = with_command_of_link(arguments.into_iter().collect());
        let parsed = command.try_get_matches_from_mut(&arguments).and_then(|matches| {
            require_order(&mut command, &matches)?;
            Self::from_arg_matches(&matches)
        });
        match parsed {
            Ok(cli) => match mistakes::missing_program(&cli, &arguments, &names) {
                Some(failure) => Err(NotParsed::Invalid(failure)),
                None => Ok(cli),
            },
            Err(error) if !error.use_stderr() => Err(NotParsed::Help(error.render())),
            Err(error) => Err(NotParsed::Invalid(mistakes::explain(&error, &command, &arguments, &names))),
        }
    }
}

/// The name of the link by which container runtimes run vpn-exec as a network plugin, without arguments.
const CNI_LINK: &str = "vpn-exec-cni";

/// Returns the command line that a link to the program stands for.
fn with_command_of_link(arguments: Vec<OsString>) -> Vec<OsString> {
    let called = arguments.first().and_then(|path| Path::new(path).file_name());
    if called == Some(OsStr::new(CNI_LINK)) {
        return ["vpn-exec".into(), "cni".into()].into_iter().chain(arguments.into_iter().skip(1)).collect();
    }
    arguments
}

/// Refuses options and a tunnel that stand before a command, where they would be ignored. Clap's
/// `args_conflicts_with_subcommands` would refuse `vpn-exec -v plan` as well.
fn require_order(command: &mut clap::Command, matches: &clap::ArgMatches) -> Result<(), clap::Error> {
    let Some((name, _)) = matches.subcommand() else { return Ok(()) };
    let given = |id: &&clap::Id| matches.value_source(id.as_str()) == Some(ValueSource::CommandLine);
    let misplaced = matches.ids().filter(given).find(|id| !matches!(id.as_str(), "verbose" | "quiet" | "log"));
    let argument = command.get_arguments().find(|argument| Some(argument.get_id()) == misplaced);
    match argument.map(ToString::to_string) {
        None => Ok(()),
        Some(argument) => {
            let message = format!("the argument '{argument}' belongs after '{name}', not before it");
            Err(command.error(ErrorKind::ArgumentConflict, message))
        }
    }
}

const LONG_ABOUT: &str = "\
Run a program in a network namespace whose only way to the Internet is a WireGuard tunnel.

The namespace holds the WireGuard interface wg0 and a link to the host, and nothing else. While the tunnel is down, the \
program has no Internet access (kill switch). The host and all other programs keep their network (split tunnel).";

const SHORT_AFTER_HELP: &str = "\
Example: sudo vpn-exec wg0.conf -- curl https://ifconfig.me
See 'vpn-exec --help' for the rules of NAME|FILE, and 'vpn-exec help COMMAND' for a command.";

/// The end of the help, and the last sections of the main man page. An empty line separates sections.
pub const AFTER_HELP: &str = "\
NAME|FILE:
  A word with a '/' in it or '.conf' at its end is a FILE: the provider's
  wg-quick file, unchanged. '-' is standard input.
  Any other word is a NAME. It stands for the first of these that exists:
    1. the profile /etc/vpn-exec/NAME.toml, else ~/.config/vpn-exec/NAME.toml
    2. the running tunnel NAME
    3. the file /etc/wireguard/NAME.conf
  The name of a command is always the command. Use --tunnel NAME for a tunnel
  that is called like a command, and --config FILE for any file.

Environment:
  VPN_EXEC_CONFIG  the FILE, if the command line names no tunnel
  VPN_EXEC_TUNNEL  the NAME, if there is no VPN_EXEC_CONFIG either
  NO_COLOR         not empty: no colors. Nor are there any with TERM=dumb, or
                   if the output is not a terminal
  A program in a tunnel finds the tunnel's name in VPN_EXEC_TUNNEL, for its
  prompt, and no VPN_EXEC_CONFIG. sudo removes these variables; to pass one on:
  sudo VPN_EXEC_TUNNEL=NAME vpn-exec -- PROGRAM

Exit status:
  That of the program. If a signal ends the program, it ends vpn-exec, too.
  125  vpn-exec failed
  126  the program cannot be executed
  127  the program was not found
  'vpn-exec status --check' has its own: see 'vpn-exec help status'.

Examples:
  sudo vpn-exec wg0.conf -- curl https://ifconfig.me
  sudo vpn-exec up wg0.conf --wait 10
  sudo vpn-exec wg0 -- transmission-daemon --foreground
  sudo vpn-exec shell wg0
  vpn-exec plan wg0.conf";

/// The commands. Their arguments are declared only for the command that is run.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Command {
    /// Create a standing tunnel, which stays up until `vpn-exec down`
    Up(UpArgs),
    /// Remove a tunnel
    Down(DownArgs),
    /// Apply a changed configuration to a running tunnel without interrupting the programs inside
    Reload(ReloadArgs),
    /// Run a shell in a tunnel
    #[command(after_help = SHELL_AFTER_HELP)]
    Shell(ShellArgs),
    /// Show the state of tunnels: handshakes, traffic and the programs inside
    #[command(after_help = STATUS_AFTER_HELP)]
    Status(StatusArgs),
    /// List all tunnels, one per line
    List(ListArgs),
    /// Put a tunnel into the network namespace of this process: that of a container or a pod
    #[command(after_help = ATTACH_AFTER_HELP)]
    Attach(AttachArgs),
    /// Show the messages of a tunnel's keeper
    Logs(LogsArgs),
    /// Show all that would be done, and change nothing
    Plan(PlanArgs),
    /// Check a configuration and explain its mistakes
    Check(CheckArgs),
    /// Print the systemd drop-in that puts a service into a standing tunnel
    Unit(UnitArgs),
    /// Write the launcher entry of a program that starts it in a tunnel, for the menus of desktops
    #[command(after_help = DESKTOP_AFTER_HELP)]
    Desktop(DesktopArgs),
    /// Make or remove the tunnel of a container, as a hook of its OCI runtime
    #[command(after_help = OCI_HOOK_AFTER_HELP)]
    OciHook(OciHookArgs),
    /// Print the CDI file that makes tunnels devices of containers: `--device vpn-exec.io/tunnel=NAME`
    #[command(after_help = CDI_AFTER_HELP)]
    Cdi(CdiArgs),
    /// Make or remove the tunnel of a pod, as a plugin in a chain of network plugins (CNI)
    #[command(after_help = CNI_AFTER_HELP)]
    Cni,
    /// Print the script that sets up a shell's completions
    #[command(after_help = COMPLETIONS_AFTER_HELP)]
    Completions(CompletionsArgs),
    /// Print a man page, or write all of them to a directory
    Man(ManArgs),
    /// Print the help of a command
    Help(HelpArgs),
    /// Print the version
    Version,
}

const SHELL_AFTER_HELP: &str = "\
Prompt:
  The variable VPN_EXEC_TUNNEL holds the tunnel's name. For a prompt of bash that shows it, add to ~/.bashrc:
    PS1=\"${VPN_EXEC_TUNNEL:+($VPN_EXEC_TUNNEL) }$PS1\"";

const ATTACH_AFTER_HELP: &str = "\
It needs the capability NET_ADMIN, and /dev/net/tun for the embedded WireGuard. It needs no other capability, no \
writable file system and no kernel parameter.

It closes the namespace first. Then packets leave it by the tunnel and to the networks of --local only. With the \
kernel's WireGuard it exits when the tunnel is set up, unless --dns-for is given. Otherwise it stays until SIGTERM or \
SIGINT, and the namespace stays closed after it.

Exit status of --check:
  0    the namespace is closed, and the last handshake is at most 135 s old
  3    the namespace is closed, but the tunnel is not up; or the rules were changed
  4    no tunnel is attached
  125  vpn-exec failed

Example of a pod's sidecar:
  vpn-exec attach /etc/wireguard/wg0.conf --local 10.42.0.0/16 --local 10.43.0.0/16";

const STATUS_AFTER_HELP: &str = "\
Exit status of --check:
  0    the tunnel is up: the last handshake is at most 135 s old
  3    the tunnel exists, but is connecting, stale, busy or failed
  4    there is no such tunnel
  125  vpn-exec failed";

const DESKTOP_AFTER_HELP: &str = "\
The entry is written to applications/ in $XDG_DATA_HOME (~/.local/share). Browsers and Thunderbird get a profile of \
their own in vpn-exec/NAME/PROGRAM there, as an instance outside may use the ordinary one. The entry opens no types of \
files: these stay with the program outside.

Examples:
  vpn-exec desktop firefox --tunnel mullvad
  vpn-exec desktop firefox --tunnel mullvad --remove";

const OCI_HOOK_AFTER_HELP: &str = "\
The runtime passes the container's state on standard input. Without NAME, the container's annotation vpn-exec.tunnel \
names a profile in /etc/vpn-exec; without an annotation, nothing happens. The profile needs the line \
`containers = true`.";

const CDI_AFTER_HELP: &str = "\
Examples:
  sudo vpn-exec cdi | sudo tee /etc/cdi/vpn-exec.json
  podman run --device vpn-exec.io/tunnel=mullvad IMAGE
  docker run --device vpn-exec.io/tunnel=mullvad IMAGE";

const CNI_AFTER_HELP: &str = "\
The runtime passes the request in CNI_ variables and on standard input. It runs the plugin without arguments, so \
install a symbolic link named vpn-exec-cni to vpn-exec, which runs this command.";

const COMPLETIONS_AFTER_HELP: &str = "\
Examples:
  vpn-exec completions bash >/usr/share/bash-completion/completions/vpn-exec
  vpn-exec completions zsh >/usr/local/share/zsh/site-functions/_vpn-exec
  vpn-exec completions fish >~/.config/fish/completions/vpn-exec.fish";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_declaration_is_sound() {
        Cli::command().debug_assert();
    }

    fn parse(arguments: &[&str]) -> Result<Cli, Failure> {
        let names = || vec!["mullvad".to_owned(), "office".to_owned()];
        Cli::parse_checked(["vpn-exec"].iter().chain(arguments).map(OsString::from), names).map_err(|error| match error
        {
            NotParsed::Invalid(failure) => failure,
            NotParsed::Help(text) => Failure::new(text),
        })
    }

    #[test]
    fn the_program_follows_two_dashes() {
        let cli = parse(&["-c", "wg0.conf", "--", "plan", "--json"]).expect("valid");
        assert!(cli.command.is_none());
        assert_eq!(cli.run.program, ["plan", "--json"]);
        let cli = parse(&["mullvad", "--lan", "--", "curl", "-s"]).expect("valid");
        assert_eq!(cli.run.launch.source.target.as_deref(), Some(std::path::Path::new("mullvad")));
        assert_eq!((cli.run.launch.tunnel.lan, cli.run.program), (true, vec!["curl".into(), "-s".into()]));
        for arguments in [&["-c", "wg0.conf", "curl"][..], &["mullvad", "-c", "wg0.conf", "--", "curl"]] {
            assert!(parse(arguments).is_err(), "{arguments:?}");
        }
    }

    #[test]
    fn a_mistake_gets_advice_that_can_be_followed() {
        for (arguments, advice) in [
            // The two dashes are missing.
            (&["-c", "wg0.conf", "curl", "-s", "x"][..], "`vpn-exec -c wg0.conf -- curl -s x`"),
            (&["mullvad", "firefox"], "`vpn-exec mullvad -- firefox`"),
            (&["./a file.conf", "curl", "-s"], "`vpn-exec './a file.conf' -- curl -s`"),
            (&["mullvad", "--lan", "curl", "x"], "`vpn-exec mullvad --lan -- curl x`"),
            (&["wg0.conf"], "`vpn-exec wg0.conf -- PROGRAM`"),
            // So is the tunnel.
            (&["curl"], "`vpn-exec NAME|FILE -- curl`"),
            (&["curl", "-s", "x"], "`vpn-exec NAME|FILE -- curl -s x`"),
            (&[], "`vpn-exec NAME|FILE -- PROGRAM [ARG]...`"),
            // A command that other programs have.
            (&["run", "mullvad", "--", "curl", "x"], "`vpn-exec mullvad -- curl x`"),
            (&["exec", "wg0.conf", "curl"], "`vpn-exec wg0.conf -- curl`"),
            (&["exec", "curl", "x"], "`vpn-exec NAME|FILE -- curl x`"),
            (&["exec"], "`vpn-exec NAME|FILE -- PROGRAM`"),
            (&["start", "mullvad"], "`vpn-exec up mullvad`"),
            (&["connect"], "`vpn-exec up NAME|FILE`"),
            (&["stop", "mullvad", "--force"], "`vpn-exec down mullvad --force`"),
            (&["disconnect", "mullvad"], "`vpn-exec down mullvad`"),
            (&["ls", "--json"], "`vpn-exec list --json`"),
            (&["ps"], "`vpn-exec status`"),
            // A near match.
            (&["staus"], "`vpn-exec status`"),
            (&["staus", "mullvad"], "`vpn-exec status mullvad`"),
            (&["mulvad"], "a similar tunnel exists: mullvad"),
            (&["--confg", "wg0.conf", "--", "true"], "--config"),
            (&["up", "--foregound", "x"], "--foreground"),
            (&["down"], "vpn-exec down [OPTIONS] <NAME>"),
            (&["mullvad", "status"], "`vpn-exec mullvad -- status`"),
            (&["-c", "wg0.conf", "plan"], "`vpn-exec plan -c wg0.conf`"),
            (&["completions", "bsh"], "'bash'"),
            (&["-c", "wg0.conf", "--log", "xml", "--", "true"], "possible values: auto, plain, journal, json"),
        ] {
            let failure = parse(arguments).expect_err("a mistake");
            let said = failure.advice.as_deref().unwrap_or_default();
            assert!(said.contains(advice), "{arguments:?}: {}: {said:?}", failure.message);
            assert!(!failure.message.contains('\n'), "{arguments:?}: {}", failure.message);
        }
        for wait in ["0", "86401", "5s", "-1", "1.5"] {
            let option = format!("--wait={wait}");
            let failure = parse(&["-c", "f", &option, "--", "true"]).expect_err("an invalid time");
            assert!(failure.message.contains("whole seconds, from 1 to 86400"), "{failure}");
        }
    }

    #[test]
    fn a_link_stands_for_the_network_plugin() {
        for program in ["vpn-exec-cni", "/opt/cni/bin/vpn-exec-cni"] {
            let cli = Cli::parse_checked([OsString::from(program)], Vec::new);
            assert!(matches!(cli, Ok(Cli { command: Some(Command::Cni), .. })), "{program}");
        }
        assert!(Cli::parse_checked([OsString::from("/usr/bin/vpn-exec")], Vec::new).is_err());
    }

    #[test]
    fn options_of_a_command_follow_it() {
        assert!(parse(&["-q", "check", "-c", "wg0.conf"]).is_ok_and(|cli| cli.verbosity.quiet));
        let failure = parse(&["-c", "wg0.conf", "plan"]).expect_err("it would be ignored");
        assert!(failure.message.contains("belongs after 'plan'"), "{failure}");
    }
}
