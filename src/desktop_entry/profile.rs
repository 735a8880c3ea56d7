//! The programs that a running instance outside keeps apart from one inside only if that has a profile of its own.

use std::path::Path;

/// Browsers and mail programs of Mozilla's kind: `--profile DIR`, of a directory that exists.
const MOZILLA: [&str; 15] = [
    "firefox",
    "firefox-esr",
    "firefox-bin",
    "firefox-beta",
    "firefox-developer-edition",
    "firefox-devedition",
    "firefox-nightly",
    "firefox-trunk",
    "floorp",
    "icecat",
    "librewolf",
    "thunderbird",
    "thunderbird-bin",
    "thunderbird-esr",
    "waterfox",
];

/// Browsers of Chromium's kind: `--user-data-dir=DIR`.
const CHROMIUM: [&str; 20] = [
    "brave",
    "brave-browser",
    "brave-browser-beta",
    "brave-browser-nightly",
    "brave-browser-stable",
    "chromium",
    "chromium-browser",
    "chromium-freeworld",
    "google-chrome",
    "google-chrome-beta",
    "google-chrome-stable",
    "google-chrome-unstable",
    "microsoft-edge",
    "microsoft-edge-beta",
    "microsoft-edge-stable",
    "opera",
    "ungoogled-chromium",
    "vivaldi",
    "vivaldi-snapshot",
    "vivaldi-stable",
];

/// The way in which a program is told its profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProfileOption {
    /// `--profile DIR`.
    Mozilla,
    /// `--user-data-dir=DIR`.
    Chromium,
}

impl ProfileOption {
    /// Returns the option of a program, if it needs one.
    pub(crate) fn of(program: &str) -> Option<Self> {
        if MOZILLA.contains(&program) {
            return Some(Self::Mozilla);
        }
        CHROMIUM.contains(&program).then_some(Self::Chromium)
    }

    /// Returns the words that choose the profile in a directory.
    pub(super) fn words(self, directory: &str) -> Vec<String> {
        match self {
            Self::Mozilla => vec!["--profile".to_owned(), directory.to_owned()],
            Self::Chromium => vec![format!("--user-data-dir={directory}")],
        }
    }

    /// Returns whether a word of a command line chooses a profile already.
    pub(super) fn is_chosen_by(self, word: &str) -> bool {
        let name = word.split('=').next().unwrap_or_default();
        match self {
            Self::Mozilla => ["-P", "-p", "-profile", "--profile"].contains(&name),
            Self::Chromium => name == "--user-data-dir",
        }
    }
}

/// Returns the last component of a program's path.
pub(super) fn base_name(program: &str) -> &str {
    Path::new(program).file_name().and_then(|name| name.to_str()).unwrap_or(program)
}
