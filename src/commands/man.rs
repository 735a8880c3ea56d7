//! `vpn-exec man`: prints a man page in roff, or writes all of them: `vpn-exec(1)` and one for each command.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::{Command, CommandFactory};
use clap_mangen::Man;

use super::{declaration, print_raw};
use crate::cli::{AFTER_HELP, Cli, ManArgs};
use crate::failure::{Doing, Failure};

/// A profile with all its keys, as docs/reference/profile.md shows it.
const PROFILE: &str = include_str!("profile.toml");

/// The files of vpn-exec.
const FILES: [(&str, &str); 5] = [
    ("/etc/vpn-exec/NAME.toml", "The profile NAME, see PROFILE in vpn-exec(1)."),
    (
        "~/.config/vpn-exec/NAME.toml",
        "The user's own profile, used if there is none in /etc. Under sudo it is root's, in /root/.config/vpn-exec.",
    ),
    (
        "/etc/wireguard/NAME.conf",
        "The wg-quick file NAME, used if there is no profile and no running tunnel of that name.",
    ),
    ("/run/netns/NAME", "The network namespace of a running tunnel, for ip-netns(8) and nsenter(1)."),
    ("/run/vpn-exec/NAME", "The state of a running tunnel."),
];

/// The section of AFTER_HELP that the pages of commands have as well.
const ENVIRONMENT: &str = "Environment";

pub(super) fn run(arguments: &ManArgs) -> Result<ExitCode, Failure> {
    match (&arguments.dir, &arguments.command) {
        (Some(folder), _) => write_all(folder)?,
        (None, Some(name)) => print_raw(&page_of(&declaration(name)?)?)?,
        (None, None) => print_raw(&main_page()?)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes all pages to a folder.
fn write_all(folder: &Path) -> Result<(), Failure> {
    let write = |name: &str, page: Vec<u8>| {
        let path = folder.join(format!("{name}.1"));
        fs::write(&path, page).doing(format!("write {}", path.display()))
    };
    fs::create_dir_all(folder).doing(format!("create {}", folder.display()))?;
    write("vpn-exec", main_page()?)?;
    for command in built().get_subcommands() {
        write(&title_of(command), page_of(command)?)?;
    }
    Ok(())
}

/// Returns the declaration with the names of all commands.
fn built() -> Command {
    let mut command = Cli::command();
    command.build();
    command
}

/// Returns the main page.
fn main_page() -> Result<Vec<u8>, Failure> {
    let mut page = Vec::new();
    write_main_page(&mut page).doing("write the man page")?;
    Ok(page)
}

/// Returns the page of a command.
fn page_of(command: &Command) -> Result<Vec<u8>, Failure> {
    let mut page = Vec::new();
    write_page(&mut page, command).doing("write the man page")?;
    Ok(page)
}

fn write_main_page(page: &mut impl Write) -> io::Result<()> {
    let command = built();
    write_head(page, &command, "vpn-exec")?;
    writeln!(page, ".SH COMMANDS")?;
    for command in command.get_subcommands() {
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        writeln!(page, ".TP\n.BR {} (1)\n{}.", escaped(&title_of(command)), escaped(&about))?;
    }
    for (heading, text) in sections() {
        write_verbatim(page, &heading.to_uppercase(), text)?;
    }
    write_files(page)?;
    write_verbatim(page, "PROFILE", &format!("A profile is TOML. Only the first line is needed.\n\n{PROFILE}"))?;
    let pages: Vec<String> = command.get_subcommands().map(|command| format!("{}(1)", title_of(command))).collect();
    let others = "wg(8), wg-quick(8), ip-netns(8), network_namespaces(7), systemd.unit(5)";
    writeln!(page, ".SH SEE ALSO\n{}", escaped(&format!("{}, {others}", pages.join(", "))))
}

fn write_page(page: &mut impl Write, command: &Command) -> io::Result<()> {
    write_head(page, command, &title_of(command))?;
    let own = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    if let Some((heading, text)) = own.split_once(":\n") {
        // Such as "Exit status of --check".
        write_verbatim(page, &heading.to_uppercase(), text)?;
    }
    if !own.starts_with("Exit status") {
        writeln!(page, ".SH EXIT STATUS")?;
        match command.get_name() {
            "shell" => writeln!(page, "{}", escaped("That of the shell; 125 if vpn-exec fails."))?,
            _ => writeln!(page, "0 on success, 125 on failure.")?,
        }
    }
    for (heading, text) in sections().filter(|(heading, _)| *heading == ENVIRONMENT) {
        write_verbatim(page, &heading.to_uppercase(), text)?;
    }
    write_files(page)?;
    writeln!(page, ".SH SEE ALSO\n{}", escaped("vpn-exec(1), for the rules of NAME|FILE, profiles and examples"))
}

/// Writes the sections that all pages begin with.
fn write_head(page: &mut impl Write, command: &Command, title: &str) -> io::Result<()> {
    let man = Man::new(command.clone()).title(title).section("1").source("vpn-exec").manual("vpn-exec");
    man.render_title(page)?;
    man.render_name_section(page)?;
    let usage = command.clone().render_usage().to_string();
    let usage: Vec<&str> = usage.trim_start_matches("Usage:").lines().map(str::trim).collect();
    write_verbatim(page, "SYNOPSIS", &usage.join("\n"))?;
    man.render_description_section(page)?;
    man.render_options_section(page)
}

fn write_files(page: &mut impl Write) -> io::Result<()> {
    writeln!(page, ".SH FILES")?;
    for (file, text) in FILES {
        writeln!(page, ".TP\n{}\n{}", escaped(file), escaped(text))?;
    }
    Ok(())
}

fn write_verbatim(page: &mut impl Write, heading: &str, text: &str) -> io::Result<()> {
    writeln!(page, ".SH {}\n.nf\n{}\n.fi", escaped(heading), escaped(text.trim_end()))
}

/// Returns the headings and the texts of the end of the help.
fn sections() -> impl Iterator<Item = (&'static str, &'static str)> {
    AFTER_HELP.split("\n\n").filter_map(|part| part.split_once(":\n"))
}

/// Returns the title of a command's page.
fn title_of(command: &Command) -> String {
    format!("vpn-exec-{}", command.get_name())
}

/// Escapes a text so that roff prints it as it is.
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

    fn text(page: Vec<u8>) -> String {
        String::from_utf8(page).expect("UTF-8").replace("\\-", "-").replace("\\fB", "").replace("\\fR", "")
    }

    #[test]
    fn the_main_page_lists_the_commands_and_the_options() {
        let page = text(main_page().expect("a page"));
        for command in built().get_subcommands() {
            assert!(page.contains(&format!(".BR vpn-exec-{} (1)\n", command.get_name())), "{command}:\n{page}");
        }
        for option in ["--allow-hooks", "--kill-orphans", "--keep-cap"] {
            assert_eq!(page.lines().filter(|line| line.starts_with(option)).count(), 1, "{option}:\n{page}");
        }
        for section in ["SYNOPSIS", "NAME|FILE", "ENVIRONMENT", "FILES", "PROFILE", "EXIT STATUS", "EXAMPLES"] {
            assert!(page.contains(&format!(".SH {section}\n")), "{section} is missing in:\n{page}");
        }
    }

    #[test]
    fn each_command_has_a_page_with_all_sections() {
        for command in built().get_subcommands() {
            let page = text(page_of(command).expect("a page"));
            assert!(page.contains(&format!("vpn-exec-{} - ", command.get_name())), "{page}");
            for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "EXIT STATUS", "ENVIRONMENT", "FILES", "SEE ALSO"] {
                assert!(page.contains(&format!(".SH {section}")), "{section} is missing in:\n{page}");
            }
            for option in command.get_arguments().filter_map(|argument| argument.get_long()) {
                assert!(page.contains(&format!("--{option}")), "{option} is missing in:\n{page}");
            }
        }
    }
}
