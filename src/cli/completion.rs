//! Completion of a command line that a user is typing.
//!
//! The script of `vpn-exec completions SHELL` calls vpn-exec with `_VPN_EXEC_COMPLETE` set to the shell's name, `--`,
//! and the words so far. The answer is on standard output. A completion needs no privileges and never prints an error:
//! what cannot be read is not offered.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use clap::{Arg, Command, CommandFactory};
use clap_complete::engine::{ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter};
use clap_complete::env::Shells;

use super::Cli;
use crate::desktop_entry::DataFolders;
use crate::lookup;

/// The environment variable that asks for a completion. It is not `COMPLETE`, the default of `clap_complete`: a
/// variable of that name in a user's environment would keep vpn-exec from running programs.
const VARIABLE: &str = "_VPN_EXEC_COMPLETE";

/// The environment variable in which bash and zsh pass the index of the word to complete. Other shells complete the
/// last word.
const INDEX_VARIABLE: &str = "_CLAP_COMPLETE_INDEX";

/// The folders of systemd's units (systemd.unit(5)).
const UNIT_FOLDERS: [&str; 5] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

/// Answers a completion request on standard output. Returns whether this process was started for one.
pub fn answer() -> bool {
    let shell = std::env::var_os(VARIABLE).filter(|shell| !shell.is_empty());
    let Some(shell) = shell else { return false };
    let words: Vec<OsString> = std::env::args_os().skip_while(|word| word != "--").skip(1).collect();
    let index = std::env::var(INDEX_VARIABLE).ok().and_then(|index| index.parse().ok());
    let index = index.unwrap_or(words.len().saturating_sub(1));
    let mut text = Vec::new();
    if let Some(shell) = Shells::builtins().completer(&shell.to_string_lossy())
        && !words.is_empty()
    {
        let (mut command, words) = request(words, index);
        let folder = std::env::current_dir().ok();
        // It fails where there is nothing to complete, such as after a last argument.
        if shell.write_complete(&mut command, words, folder.as_deref(), &mut text).is_ok() {
            let _ = io::stdout().write_all(&text);
        }
    }
    true
}

/// Writes the script that registers the completions with a shell.
///
/// # Errors
/// If there is no such shell.
pub fn write_registration(shell: &str, script: &mut impl Write) -> io::Result<()> {
    let shells = Shells::builtins();
    let shell = shells.completer(shell).ok_or_else(|| io::Error::other(format!("unknown shell {shell:?}")))?;
    shell.write_registration(VARIABLE, "vpn-exec", "vpn-exec", "vpn-exec", script)
}

/// Returns the command and the words with which the engine of `clap_complete` completes the word at `index`. The engine
/// does not know what follows `--`: it takes a program for the tunnel, or for a command of vpn-exec.
fn request(mut words: Vec<OsString>, index: usize) -> (Command, Vec<OsString>) {
    let dashes = words.iter().position(|word| word == "--").filter(|dashes| (1..index).contains(dashes));
    let Some(dashes) = dashes else { return (Cli::command(), words) };
    let complete = if index == dashes + 1 { programs } else { files };
    let rest = Arg::new("words").num_args(0..).add(ArgValueCompleter::new(complete));
    words[1..=dashes].fill("x".into());
    words[1] = "--".into();
    (Command::new("vpn-exec").disable_help_flag(true).arg(rest), words)
}

/// Offers files for an argument of the program.
fn files(current: &OsStr) -> Vec<CompletionCandidate> {
    PathCompleter::any().complete(current)
}

/// Offers programs: those in `PATH`, and paths to executable files.
fn programs(current: &OsStr) -> Vec<CompletionCandidate> {
    let text = current.to_string_lossy();
    if text.contains('/') {
        return PathCompleter::any().filter(|path| path.is_dir() || is_executable(path)).complete(current);
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let mut names = BTreeSet::new();
    for folder in std::env::split_paths(&folders) {
        for name in file_names(&folder).filter(|name| name.starts_with(&*text)) {
            if is_executable(&folder.join(&name)) {
                names.insert(name);
            }
        }
    }
    candidates(names)
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

/// Offers tunnels, profiles and provider's files.
pub(super) fn names_and_files(current: &OsStr) -> Vec<CompletionCandidate> {
    let text = current.to_string_lossy();
    let names = lookup::names().into_iter().filter(|name| name.starts_with(&*text));
    let is_config = |path: &Path| path.is_dir() || path.extension() == Some(OsStr::new("conf"));
    let files = PathCompleter::any().filter(is_config).complete(current);
    candidates(names).into_iter().chain(files).collect()
}

/// Offers tunnels and profiles.
pub(super) fn names() -> Vec<CompletionCandidate> {
    candidates(lookup::names())
}

/// Offers running tunnels.
pub(super) fn running() -> Vec<CompletionCandidate> {
    candidates(lookup::running())
}

/// Offers the services that systemd has units for.
pub(super) fn services() -> Vec<CompletionCandidate> {
    let names = UNIT_FOLDERS.iter().flat_map(|folder| file_names(&PathBuf::from(folder)).collect::<Vec<_>>());
    let services: BTreeSet<String> = names.filter_map(|name| Some(name.strip_suffix(".service")?.to_owned())).collect();
    candidates(services)
}

/// Offers the programs that have an entry in menus.
pub(super) fn applications() -> Vec<CompletionCandidate> {
    let folders = DataFolders::find(|name| std::env::var_os(name));
    candidates(folders.map(|folders| folders.programs()).unwrap_or_default().into_iter().map(|found| found.id))
}

/// Offers the commands of vpn-exec.
pub(super) fn commands() -> Vec<CompletionCandidate> {
    candidates(Cli::command().get_subcommands().map(|command| command.get_name().to_owned()))
}

fn file_names(folder: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

fn candidates(values: impl IntoIterator<Item = String>) -> Vec<CompletionCandidate> {
    values.into_iter().map(CompletionCandidate::new).collect()
}
