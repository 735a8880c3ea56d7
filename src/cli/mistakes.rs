//! Explains mistakes in a command line: what is wrong, and a command line that works.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory};

use super::Cli;
use super::source::is_file;
use crate::failure::Failure;
use crate::names::closest;

/// Commands of other programs, and the command that does the same here. None stands for running a program.
const OTHER_NAMES: [(&str, Option<&str>); 10] = [
    ("exec", None),
    ("run", None),
    ("start", Some("up")),
    ("connect", Some("up")),
    ("stop", Some("down")),
    ("disconnect", Some("down")),
    ("restart", Some("reload")),
    ("ls", Some("list")),
    ("ps", Some("status")),
    ("log", Some("logs")),
];

/// The placeholder of a tunnel in advice.
const ANY_TUNNEL: &str = "NAME|FILE";

/// The words of a command line.
struct Words<'a> {
    /// All words before the first `--`.
    before: &'a [String],
    /// The words from the first `--` on; empty if there is none.
    rest: &'a [String],
    /// The index in `before` of the first word that is neither an option nor an option's value.
    first: Option<usize>,
    /// Whether an option names the tunnel.
    has_tunnel_option: bool,
}

/// Returns what is wrong with a command line that Clap has parsed, but that has neither a command nor a program; or
/// whose tunnel is called like a command of another program, and does not exist.
pub(super) fn missing_program(cli: &Cli, arguments: &[OsString], names: &dyn Fn() -> Vec<String>) -> Option<Failure> {
    let word = cli.run.launch.source.target.as_ref().and_then(|word| word.to_str());
    let other_name = word.filter(|word| other_name(word).is_some());
    if cli.command.is_some() || !cli.run.program.is_empty() && other_name.is_none() {
        return None;
    }
    let names = names();
    // A tunnel may well be called `run`.
    if !cli.run.program.is_empty() && other_name.is_some_and(|word| names.iter().any(|name| name == word)) {
        return None;
    }
    let (texts, command) = (texts(arguments), Cli::command());
    Some(Words::new(&texts, &command).explain(&command, &names))
}

/// Turns Clap's error into a failure of one line, and one line of advice.
pub(super) fn explain(
    error: &clap::Error,
    command: &Command,
    arguments: &[OsString],
    names: &dyn Fn() -> Vec<String>,
) -> Failure {
    let texts = texts(arguments);
    let words = Words::new(&texts, command);
    let named = words.first_word().and_then(|word| command.find_subcommand(word));
    let unknown = text_of(error, ContextKind::InvalidArg);
    if named.is_none() && error.kind() == ErrorKind::UnknownArgument {
        // Where a program or a command begins too early, Clap takes its options for those of vpn-exec.
        let is_option = |word: &String| unknown.as_ref().is_some_and(|unknown| word.starts_with(unknown));
        let place = words.before.iter().position(is_option);
        let is_late = words.first.is_some_and(|first| place.is_none_or(|place| place >= first));
        if is_late && (words.rest.is_empty() || words.first_word().is_some_and(|word| other_name(word).is_some())) {
            return words.explain(command, &names());
        }
    }
    let message = match (error.kind(), &unknown) {
        (ErrorKind::UnknownArgument, Some(unknown)) if unknown.starts_with('-') => {
            format!("unknown option '{unknown}'")
        }
        (ErrorKind::UnknownArgument, Some(unknown)) => format!("unexpected argument '{unknown}'"),
        _ => summary(error),
    };
    Failure::new(message).advise(advice(error, &words, command, named))
}

/// Returns what to do about an error of Clap's, in one line.
fn advice(error: &clap::Error, words: &Words<'_>, command: &Command, named: Option<&Command>) -> String {
    let similar = [ContextKind::SuggestedArg, ContextKind::SuggestedValue, ContextKind::SuggestedSubcommand];
    if let Some(similar) = similar.into_iter().find_map(|kind| text_of(error, kind)) {
        return format!("did you mean '{similar}'?");
    }
    if let Some(values) = text_of(error, ContextKind::ValidValue) {
        return format!("possible values: {values}");
    }
    let misplaced = words.before.iter().position(|word| command.find_subcommand(word).is_some());
    match (error.kind(), named, misplaced) {
        // The command does not come first. Either it belongs there, or it is the name of a program.
        (ErrorKind::ArgumentConflict, _, Some(place)) if place > 0 => {
            let (before, after) = words.before.split_at(place);
            let program = format!("`vpn-exec {} -- {}`", quoted(before), quoted(after));
            let reordered = [&after[..1], before, &after[1..]].concat();
            format!("`vpn-exec {}`; or, to run a program of that name, {program}", quoted(&reordered))
        }
        (ErrorKind::MissingRequiredArgument, Some(named), _) => {
            let mut named = named.clone().bin_name(format!("vpn-exec {}", named.get_name()));
            let usage = named.render_usage().to_string();
            usage.trim().trim_start_matches("Usage:").trim().replacen("vpn-exec", "usage: vpn-exec", 1)
        }
        (_, Some(named), _) => format!("see `vpn-exec {} --help`", named.get_name()),
        _ => "see `vpn-exec --help`".to_owned(),
    }
}

impl<'a> Words<'a> {
    fn new(texts: &'a [String], command: &Command) -> Self {
        let texts = texts.get(1..).unwrap_or_default();
        let dashes = texts.iter().position(|word| word == "--").unwrap_or(texts.len());
        let (before, rest) = texts.split_at(dashes);
        let mut first = None;
        let mut has_tunnel_option = false;
        let mut index = 0;
        while let Some(word) = before.get(index) {
            if word == "-" || !word.starts_with('-') {
                first = Some(index);
                break;
            }
            let option = command.get_arguments().find(|argument| is_option(argument, word));
            has_tunnel_option |= option.is_some_and(|option| matches!(option.get_id().as_str(), "config" | "tunnel"));
            let has_own_value = word.contains('=') || !word.starts_with("--") && word.chars().count() > 2;
            let takes_value = option.is_some_and(|option| option.get_action().takes_values());
            index += if takes_value && !has_own_value { 2 } else { 1 };
        }
        Self { before, rest, first, has_tunnel_option }
    }

    fn first_word(&self) -> Option<&'a str> {
        self.first.map(|first| self.before[first].as_str())
    }

    /// Explains a command line without a command whose program is missing or in the wrong place.
    fn explain(&self, command: &Command, names: &[String]) -> Failure {
        let Some(first) = self.first else {
            let failure = Failure::new("there is no program to run");
            let options = if self.has_tunnel_option { quoted(self.before) } else { ANY_TUNNEL.to_owned() };
            return failure.advise(format!("`vpn-exec {options} -- PROGRAM [ARG]...` runs one; see `vpn-exec --help`"));
        };
        let (options, words) = self.before.split_at(first);
        let (word, following) = (&words[0], &words[1..]);
        let is_known = |word: &String| is_file(word) || names.contains(word);
        if self.has_tunnel_option {
            // The tunnel is named, so this is the program.
            return missing_dashes(&format!("vpn-exec {} -- {}", quoted(options), quoted(words)));
        }
        if is_known(word) {
            // Options of vpn-exec may follow the tunnel.
            let own = following.iter().take_while(|word| is_flag(command, word)).count();
            let (own, program) = following.split_at(own);
            let tunnel = [options, &words[..1], own].concat();
            if program.is_empty() {
                return Failure::new("there is no program to run").advise(format!(
                    "`vpn-exec {0} -- PROGRAM` runs a program in the tunnel, `vpn-exec up {0}` only creates the tunnel",
                    quoted(&tunnel)
                ));
            }
            return missing_dashes(&format!("vpn-exec {} -- {}", quoted(&tunnel), quoted(program)));
        }
        let unknown = Failure::new(format!("there is no command '{word}'"));
        if let Some(other) = other_name(word) {
            return unknown.advise(format!("use `vpn-exec {}`", self.translated(other, following, &is_known)));
        }
        let commands: Vec<&str> = command.get_subcommands().map(Command::get_name).collect();
        let (near_command, near_name) = (closest(word, commands), closest(word, names.iter().map(String::as_str)));
        match (near_command, near_name) {
            (Some(name), _) => {
                let words = [&[name.to_owned()], following].concat();
                unknown.advise(format!("did you mean `vpn-exec {}`?", quoted(&words)))
            }
            (None, Some(name)) => Failure::new(format!("there is no command and no tunnel '{word}'"))
                .advise(format!("a similar tunnel exists: {name}")),
            (None, None) => unknown
                .advise(format!("to run a program, name a tunnel first: `vpn-exec {ANY_TUNNEL} -- {}`", quoted(words))),
        }
    }

    /// Returns the command line that does here what another program's command does.
    fn translated(&self, other: Option<&str>, following: &[String], is_known: &dyn Fn(&String) -> bool) -> String {
        let Some(name) = other else {
            return match (following, self.rest) {
                ([], []) => format!("{ANY_TUNNEL} -- PROGRAM"),
                ([], rest) => format!("{ANY_TUNNEL} {}", quoted(rest)),
                ([tunnel], []) if is_known(tunnel) => format!("{} -- PROGRAM", quoted(following)),
                ([tunnel, program @ ..], []) if is_known(tunnel) => {
                    format!("{} -- {}", quoted(&following[..1]), quoted(program))
                }
                (program, []) => format!("{ANY_TUNNEL} -- {}", quoted(program)),
                (_, rest) => format!("{} {}", quoted(following), quoted(rest)),
            };
        };
        let following = match (name, following) {
            ("up" | "reload", []) => ANY_TUNNEL.to_owned(),
            ("down" | "logs", []) => "NAME".to_owned(),
            _ => quoted(following),
        };
        format!("{name} {following}").trim_end().to_owned()
    }
}

fn missing_dashes(right: &str) -> Failure {
    Failure::new("'--' is missing before the program").advise(format!("use `{right}`"))
}

fn other_name(word: &str) -> Option<Option<&'static str>> {
    OTHER_NAMES.iter().find(|(other, _)| *other == word).map(|(_, name)| *name)
}

fn is_option(argument: &clap::Arg, word: &str) -> bool {
    match word.strip_prefix("--") {
        Some(long) => argument.get_long() == Some(long.split('=').next().unwrap_or(long)),
        None => argument.get_short().is_some() && argument.get_short() == word.chars().nth(1),
    }
}

/// Returns whether a word is an option of vpn-exec that is complete without the next word.
fn is_flag(command: &Command, word: &str) -> bool {
    word.starts_with('-')
        && command
            .get_arguments()
            .any(|argument| is_option(argument, word) && (!argument.get_action().takes_values() || word.contains('=')))
}

/// Returns the first paragraph of an error of Clap's in one line, without its label.
fn summary(error: &clap::Error) -> String {
    let text = error.to_string();
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    let lines = paragraph.lines().map(str::trim).filter(|line| !line.starts_with("[possible values"));
    let line = lines.collect::<Vec<_>>().join(" ");
    line.trim_start_matches("error:")
        .trim()
        .replace("the following required arguments were not provided", "missing argument")
}

fn text_of(error: &clap::Error, kind: ContextKind) -> Option<String> {
    match error.get(kind)? {
        ContextValue::String(text) => Some(text.clone()),
        ContextValue::Strings(texts) if !texts.is_empty() => Some(texts.join(", ")),
        _ => None,
    }
}

fn texts(arguments: &[OsString]) -> Vec<String> {
    arguments.iter().map(|argument| argument.to_string_lossy().into_owned()).collect()
}

/// Joins words so that a shell would split them the same way.
fn quoted(words: &[String]) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+=@%:,|".contains(c);
    let quote = |word: &String| match !word.is_empty() && word.chars().all(is_plain) {
        true => word.clone(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    };
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}
