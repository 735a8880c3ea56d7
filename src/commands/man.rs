//! `vpn-exec man`: prints the manual page, in troff: one page for all commands.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Arg, Command, CommandFactory};
use clap_mangen::Man;

use super::print_bytes;
use crate::cli::{AFTER_HELP, Cli};
use crate::failure::Failure;

/// A profile with all its keys, as docs/reference/profile.md shows it.
const PROFILE: &str = include_str!("profile.toml");

/// The files that somebody may look for.
const FILES: [(&str, &str); 4] = [
    ("/etc/vpn-exec/NAME.toml", "The profile of the tunnel NAME, see below."),
    (
        "~/.config/vpn-exec/NAME.toml",
        "The same, where there is none in /etc. Under sudo it is root's own, in /root/.config/vpn-exec.",
    ),
    ("/run/netns/NAME", "The namespace of a tunnel that is up, for ip-netns(8) and nsenter(1)."),
    ("/run/vpn-exec/NAME", "The state of a tunnel that is up."),
];

pub(super) fn run() -> Result<ExitCode, Failure> {
    let mut text = Vec::new();
    write_page(&mut text).map_err(|error| Failure::new(format!("cannot write the manual page: {error}")))?;
    print_bytes(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn write_page(page: &mut impl Write) -> io::Result<()> {
    let mut command = Cli::command();
    command.build();
    let man = Man::new(command.clone()).section("1").manual("vpn-exec");
    man.render_title(page)?;
    man.render_name_section(page)?;
    writeln!(page, ".SH SYNOPSIS\n.nf\n{}\n.fi", escaped(&usage(&mut command)))?;
    man.render_description_section(page)?;
    man.render_options_section(page)?;
    writeln!(page, ".SH COMMANDS")?;
    for subcommand in command.get_subcommands() {
        write_command(page, &command, subcommand)?;
    }
    writeln!(page, ".SH FILES")?;
    for (file, what) in FILES {
        writeln!(page, ".TP\n{}\n{}", escaped(file), escaped(what))?;
    }
    writeln!(
        page,
        ".SH PROFILE\nA profile is TOML. Only the first line is needed.\n.PP\n.nf\n{}\n.fi",
        escaped(PROFILE)
    )?;
    for part in AFTER_HELP.split("\n\n") {
        let (heading, text) = part.split_once(":\n").unwrap_or(("", part));
        writeln!(page, ".SH {}\n.nf\n{}\n.fi", heading.to_uppercase(), escaped(text))?;
    }
    writeln!(page, ".SH SEE ALSO\nwg(8), wg\\-quick(8), ip\\-netns(8), network_namespaces(7), systemd.unit(5)")
}

/// What a command does, and which options it has besides those that are described before all commands.
fn write_command(page: &mut impl Write, all: &Command, command: &Command) -> io::Result<()> {
    let mut command = command.clone();
    writeln!(page, ".SS {}", escaped(&usage(&mut command)))?;
    if let Some(about) = command.get_about() {
        writeln!(page, "{}.", escaped(&about.to_string()))?;
    }
    let is_known = |argument: &Arg| {
        let same = |other: &&Arg| {
            other.get_id() == argument.get_id()
                && other.get_help().map(ToString::to_string) == argument.get_help().map(ToString::to_string)
        };
        argument.get_id() == "help" || all.get_arguments().any(|other| same(&other))
    };
    let known: Vec<String> = command
        .get_arguments()
        .filter(|argument| is_known(argument) && !argument.is_global_set() && argument.get_id() != "help")
        .filter_map(|argument| argument.get_long().map(|long| format!("--{long}")))
        .collect();
    if !known.is_empty() {
        writeln!(page, "It also takes, as described above: {}.", escaped(&known.join(", ")))?;
    }
    let own = command.mut_args(|argument| if is_known(&argument) { argument.hide(true) } else { argument });
    let mut options = Vec::new();
    Man::new(own).render_options_section(&mut options)?;
    let options = String::from_utf8_lossy(&options);
    write!(
        page,
        "{}",
        options.lines().filter(|line| !line.starts_with(".SH")).map(|line| format!("{line}\n")).collect::<String>()
    )
}

/// How a command is written, without the word before it.
fn usage(command: &mut Command) -> String {
    let usage = command.render_usage().to_string();
    let lines = usage.trim_start_matches("Usage:").lines().map(str::trim);
    lines.collect::<Vec<_>>().join("\n")
}

/// A text in which troff finds nothing to do.
fn escaped(text: &str) -> String {
    let escape = |line: &str| {
        let line = line.replace('\\', "\\e").replace('-', "\\-");
        if line.starts_with(['.', '\'']) { format!("\\&{line}") } else { line }
    };
    text.lines().map(escape).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_describes_each_option_once_and_every_command() {
        let mut page = Vec::new();
        write_page(&mut page).expect("memory");
        let page = String::from_utf8(page).expect("UTF-8").replace("\\-", "-").replace("\\fB", "").replace("\\fR", "");
        for command in Cli::command().get_subcommands() {
            let usage = format!(".SS vpn-exec {}", command.get_name());
            assert!(page.contains(&usage), "{usage} is missing in:\n{page}");
        }
        for (option, times) in [("--allow-hooks\n", 1), ("--after-service\n", 1), ("--profile-only", 1), ("--show", 1)]
        {
            let found = page.lines().filter(|line| format!("{line}\n").starts_with(option)).count();
            assert_eq!(found, times, "{option}:\n{page}");
        }
        for section in ["SYNOPSIS", "FILES", "PROFILE", "EXIT STATUS", "EXAMPLES"] {
            assert!(page.contains(&format!(".SH {section}\n")), "{section} is missing in:\n{page}");
        }
        assert!(!page.contains("vpn-exec-up"), "there is no such page:\n{page}");
    }
}
