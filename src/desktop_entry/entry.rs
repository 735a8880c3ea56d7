//! The text of a desktop entry, and the entry that starts its program in a tunnel.

use std::collections::BTreeSet;

use thiserror::Error;

use super::exec::{self, Word};
use super::profile::{ProfileOption, base_name};

/// The first group of an entry.
const MAIN: &str = "Desktop Entry";

/// The key by which an entry is known as one of vpn-exec's: the tunnel's name.
const TUNNEL: &str = "X-Vpn-Exec-Tunnel";

/// The keys of the main group that are left out: what would start the program by the session bus, outside the tunnel;
/// what would hide the entry; and the types of files, as the user has chosen a program for these.
const LEFT_OUT: [&str; 4] = ["DBusActivatable", "Hidden", "MimeType", "NoDisplay"];

/// The keys of the main group whose values are shown as the program's name.
const NAMES: [&str; 2] = ["Name", "X-GNOME-FullName"];

/// The reason why no entry can be made of another.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(crate) enum EntryError {
    #[error("it is not the entry of a program")]
    NoProgram,
    #[error("it has no Exec line")]
    NoExec,
    #[error("its Exec line is not valid: {0:?}")]
    InvalidExec(String),
    #[error("it is a flatpak, whose data vpn-exec cannot keep apart from those of an instance outside")]
    Flatpak,
    #[error("it is a snap, whose start needs privileges (snap-confine) that a program inside cannot gain")]
    Snap,
}

impl EntryError {
    /// Returns what the user can do about it.
    pub(crate) fn advice(&self) -> &'static str {
        match self {
            Self::Flatpak | Self::Snap => {
                "install the program as an ordinary package, which on Ubuntu its maker may have"
            }
            _ => "name another entry, or start the program in a terminal: `vpn-exec NAME -- PROGRAM`",
        }
    }
}

/// A desktop entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    groups: Vec<Group>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Group {
    /// The name of the group. `None` for what stands before the first one.
    name: Option<String>,
    lines: Vec<Line>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Line {
    /// A key with its locale, if any, and its value.
    Pair(String, String),
    /// Anything else: a comment, or an empty line.
    Other(String),
}

/// An entry that starts a program inside.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Confined {
    pub(crate) text: String,
    /// The program, as its entry calls it, without its directory.
    pub(crate) program: String,
    /// The directories of the program's own profile, usually one or none.
    pub(crate) profiles: BTreeSet<String>,
}

impl Entry {
    /// Parses a text. Lines that are not valid are kept as they are.
    pub(crate) fn parse(text: &str) -> Self {
        let mut groups = vec![Group::default()];
        for line in text.lines() {
            let trimmed = line.trim();
            let name = trimmed.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
            let line = match line.split_once('=') {
                _ if trimmed.starts_with('#') => Line::Other(line.to_owned()),
                Some((key, value)) => Line::Pair(key.trim().to_owned(), value.trim().to_owned()),
                None => Line::Other(line.to_owned()),
            };
            match (name, groups.last_mut()) {
                (None, Some(group)) => group.lines.push(line),
                _ => groups.push(Group { name: name.map(str::to_owned), lines: Vec::new() }),
            }
        }
        Self { groups }
    }

    /// Returns the value of a key in the main group.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.main().and_then(|group| group.get(key))
    }

    /// Returns whether a key of the main group is true.
    pub(crate) fn is(&self, key: &str) -> bool {
        self.get(key) == Some("true")
    }

    /// Returns the program's name, in all languages.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.main().into_iter().flat_map(Group::pairs).filter(|(key, _)| is_of(key, "Name")).map(|(_, value)| value)
    }

    /// Returns the tunnel of an entry that vpn-exec has made.
    pub(crate) fn tunnel(&self) -> Option<&str> {
        self.get(TUNNEL)
    }

    /// Returns the program without its directory.
    pub(crate) fn program(&self) -> Option<String> {
        let line = exec::unescaped(self.get("Exec")?);
        let words = exec::words(&line)?;
        program_in(&words).map(|program| base_name(&program.value).to_owned())
    }

    fn main(&self) -> Option<&Group> {
        self.groups.iter().find(|group| group.name.as_deref() == Some(MAIN))
    }

    /// Returns the entry that starts the program in a tunnel. `launcher` is the command line of vpn-exec up to `--`.
    /// `profile_of` returns the directory of a program's own profile.
    ///
    /// # Errors
    /// If this is not the entry of a program, or of one that cannot run inside.
    pub(crate) fn confine(
        &self,
        tunnel: &str,
        launcher: &[String],
        profile_of: impl Fn(&str) -> String,
    ) -> Result<Confined, EntryError> {
        let main = self.main().ok_or(EntryError::NoProgram)?;
        if main.get("Type") != Some("Application") {
            return Err(EntryError::NoProgram);
        }
        let command = main.get("Exec").ok_or(EntryError::NoExec)?;
        let line = exec::unescaped(command);
        let words = exec::words(&line).ok_or_else(|| EntryError::InvalidExec(command.to_owned()))?;
        let program = program_in(&words).ok_or_else(|| EntryError::InvalidExec(command.to_owned()))?;
        let name = base_name(&program.value);
        if name == "flatpak" || main.get("X-Flatpak").is_some() {
            return Err(EntryError::Flatpak);
        }
        if name == "snap" || program.value.starts_with("/snap/") || main.get("X-SnapInstanceName").is_some() {
            return Err(EntryError::Snap);
        }
        let launcher: Vec<String> = launcher.iter().map(|word| exec::quoted(word)).collect();
        let launcher = launcher.join(" ");

        let mut confined = self.clone();
        let mut profiles = BTreeSet::new();
        confined.drop_actions_of_the_bus();
        for group in &mut confined.groups {
            // KDE's library takes `Exec[xx]` and `Exec[$e]` before `Exec`.
            group.lines.retain(|line| line.key().is_none_or(|key| !key.starts_with("Exec[")));
            // Also those of actions, and of groups that only some desktops know: no line may start it outside.
            for (_, value) in group.lines.iter_mut().filter_map(Line::pair_mut).filter(|(key, _)| *key == "Exec") {
                let wrapped = wrap(value, &launcher, &profile_of, &mut profiles);
                *value = wrapped.ok_or_else(|| EntryError::InvalidExec(value.clone()))?;
            }
            if group.name.as_deref() == Some(MAIN) {
                group.lines.retain(|line| line.key().is_none_or(|key| !LEFT_OUT.contains(&key) && key != TUNNEL));
                for (key, value) in group.lines.iter_mut().filter_map(Line::pair_mut) {
                    if NAMES.iter().any(|name| is_of(key, name)) {
                        *value = format!("{value} ({tunnel})");
                    }
                }
                let end =
                    group.lines.iter().rposition(|line| matches!(line, Line::Pair(..))).map_or(0, |last| last + 1);
                group.lines.insert(end, Line::Pair(TUNNEL.to_owned(), tunnel.to_owned()));
            }
        }
        Ok(Confined { text: confined.text(), program: name.to_owned(), profiles })
    }

    /// Removes the actions without a command line: the session bus would start these outside.
    fn drop_actions_of_the_bus(&mut self) {
        let is_action = |group: &Group| group.name.as_deref().is_some_and(|name| name.starts_with("Desktop Action "));
        self.groups.retain(|group| !is_action(group) || group.get("Exec").is_some());
        let left: Vec<String> = self.groups.iter().filter_map(|group| group.name.clone()).collect();
        for (key, value) in self.groups.iter_mut().flat_map(|group| group.lines.iter_mut().filter_map(Line::pair_mut)) {
            if key == "Actions" {
                let exists = |action: &&str| left.contains(&format!("Desktop Action {action}"));
                *value = value.split(';').filter(exists).map(|action| format!("{action};")).collect();
            }
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for group in &self.groups {
            if let Some(name) = &group.name {
                text += &format!("[{name}]\n");
            }
            for line in &group.lines {
                match line {
                    Line::Pair(key, value) => text += &format!("{key}={value}\n"),
                    Line::Other(other) => text += &format!("{other}\n"),
                }
            }
        }
        text
    }
}

impl Group {
    fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.lines.iter().filter_map(|line| match line {
            Line::Pair(key, value) => Some((key.as_str(), value.as_str())),
            Line::Other(_) => None,
        })
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.pairs().find(|(other, _)| *other == key).map(|(_, value)| value)
    }
}

impl Line {
    fn key(&self) -> Option<&str> {
        match self {
            Self::Pair(key, _) => Some(key),
            Self::Other(_) => None,
        }
    }

    fn pair_mut(&mut self) -> Option<(&str, &mut String)> {
        match self {
            Self::Pair(key, value) => Some((key, value)),
            Self::Other(_) => None,
        }
    }
}

/// Returns whether a key is another one, in any language.
fn is_of(key: &str, name: &str) -> bool {
    key.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('['))
}

/// Returns the program among the words of a command line: the first one, or the first one after env(1) and its
/// variables.
fn program_in(words: &[Word]) -> Option<&Word> {
    let mut words = words.iter();
    let first = words.next()?;
    if base_name(&first.value) != "env" {
        return Some(first);
    }
    words.find(|word| !word.value.contains('=') || word.value.starts_with('/')).or(Some(first))
}

/// Puts the launcher before a command line, and the words that choose a profile behind its program. Adds the profile's
/// directory to `profiles`.
fn wrap(
    value: &str,
    launcher: &str,
    profile_of: impl Fn(&str) -> String,
    profiles: &mut BTreeSet<String>,
) -> Option<String> {
    let line = exec::unescaped(value);
    let words = exec::words(&line)?;
    let program = program_in(&words)?;
    let name = base_name(&program.value);
    let option = ProfileOption::of(name).filter(|option| !words.iter().any(|word| option.is_chosen_by(&word.value)));
    let mut chosen = String::new();
    if let Some(option) = option {
        let profile = profile_of(name);
        chosen.extend(option.words(&profile).iter().map(|word| format!(" {}", exec::quoted(word))));
        profiles.insert(profile);
    }
    let (before, after) = line.split_at(program.place.end);
    Some(exec::escaped(&format!("{launcher} {before}{chosen}{after}")))
}
