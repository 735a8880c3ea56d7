//! The entries of the installed programs.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::Entry;
use crate::names::closest;

/// An entry is not larger than that, in bytes.
const MAX_SIZE: u64 = 1 << 20;

/// The folders of programs' data ([XDG Base Directory
/// Specification](https://specifications.freedesktop.org/basedir-spec/latest/)).
#[derive(Clone, Debug)]
pub(crate) struct DataFolders {
    /// The user's own.
    pub(crate) own: PathBuf,
    /// The machine's, in their order.
    pub(crate) others: Vec<PathBuf>,
}

impl DataFolders {
    /// Finds the folders. `None` if there is neither `XDG_DATA_HOME` nor `HOME`. `variable` reads the environment.
    pub(crate) fn find(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> Option<Self> {
        // The specification has relative paths ignored.
        let absolute = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let own = absolute("XDG_DATA_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/share")))?;
        let others = variable("XDG_DATA_DIRS").filter(|value| !value.is_empty());
        let others = others.unwrap_or_else(|| "/usr/local/share:/usr/share".into());
        let others = std::env::split_paths(&others).filter(|path| path.is_absolute()).collect();
        Some(Self { own, others })
    }

    /// Returns the folder of the user's own entries.
    pub(crate) fn own_entries(&self) -> PathBuf {
        self.own.join("applications")
    }

    /// Reads the entries of installed programs, by their IDs without `.desktop`. Those of vpn-exec are left out.
    pub(crate) fn programs(&self) -> Vec<Installed> {
        let mut found = BTreeMap::new();
        let mut visited = HashSet::new();
        for folder in std::iter::once(&self.own).chain(&self.others) {
            search(&folder.join("applications"), "", &mut visited, &mut found);
        }
        let entries = found.into_iter().map(|(id, (path, entry))| Installed { id, path, entry });
        entries.filter(|installed| !installed.entry.is("Hidden") && installed.entry.tunnel().is_none()).collect()
    }
}

/// An installed program's entry.
#[derive(Clone, Debug)]
pub(crate) struct Installed {
    /// The desktop file ID, without `.desktop`.
    pub(crate) id: String,
    pub(crate) path: PathBuf,
    pub(crate) entry: Entry,
}

/// The reason why a word stands for no entry.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotFound {
    /// There is none. Similar IDs may exist.
    None(Vec<String>),
    /// There are several, with these IDs.
    Several(Vec<String>),
}

/// Adds the entries of a folder that was not visited yet. `prefix` is the beginning of their IDs. The first entry of an
/// ID counts.
fn search(folder: &Path, prefix: &str, visited: &mut HashSet<PathBuf>, found: &mut BTreeMap<String, (PathBuf, Entry)>) {
    let is_new = fs::canonicalize(folder).is_ok_and(|folder| visited.insert(folder));
    let files = is_new.then(|| fs::read_dir(folder).ok()).flatten().into_iter().flatten().flatten();
    for path in files.map(|entry| entry.path()) {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if path.is_dir() {
            search(&path, &format!("{prefix}{name}-"), visited, found);
        } else if let Some(stem) = name.strip_suffix(".desktop")
            && let Some(entry) = read(&path)
        {
            found.entry(format!("{prefix}{stem}")).or_insert((path, entry));
        }
    }
}

/// Reads an entry. `None` if it cannot be read.
pub(crate) fn read(path: &Path) -> Option<Entry> {
    let is_small = fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() <= MAX_SIZE);
    is_small.then(|| fs::read_to_string(path).ok()).flatten().map(|text| Entry::parse(&text))
}

/// Finds the entry that a word stands for: by its ID, its program, its name in any language, or the last part of its
/// ID, whatever the case. An entry that menus show goes before those that they do not.
///
/// # Errors
/// If there is none, or more than one.
pub(crate) fn find<'a>(word: &str, programs: &'a [Installed]) -> Result<&'a Installed, NotFound> {
    let word = word.strip_suffix(".desktop").unwrap_or(word).to_lowercase();
    let is = |text: &str| text.to_lowercase() == word;
    let ways: [&dyn Fn(&Installed) -> bool; 4] = [
        &|installed| is(&installed.id),
        &|installed| installed.entry.program().is_some_and(|program| is(&program)),
        &|installed| installed.entry.names().any(is),
        &|installed| installed.id.rsplit('.').next().is_some_and(is),
    ];
    for way in ways {
        let matching: Vec<&Installed> = programs.iter().filter(|installed| way(installed)).collect();
        let shown: Vec<&Installed> = matching.iter().copied().filter(|found| !found.entry.is("NoDisplay")).collect();
        match (matching.as_slice(), shown.as_slice()) {
            ([], _) => {}
            ([one], _) | (_, [one]) => return Ok(one),
            _ => return Err(NotFound::Several(matching.iter().map(|found| found.id.clone()).collect())),
        }
    }
    let contains = |installed: &&Installed| {
        let has = |text: &str| text.to_lowercase().contains(&word);
        has(&installed.id) || installed.entry.names().any(has)
    };
    let mut similar: Vec<String> = programs.iter().filter(contains).map(|found| found.id.clone()).collect();
    if similar.is_empty() {
        similar.extend(closest(&word, programs.iter().map(|found| found.id.as_str())).map(str::to_owned));
    }
    Err(NotFound::None(similar))
}
