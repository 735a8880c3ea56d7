//! Names of tunnels.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::str::FromStr;

use blake2::{Blake2s256, Digest};
use serde::{Deserialize, Serialize};

use super::{NameError, impl_name};

/// The name of a tunnel, of its namespace `/run/netns/NAME`, its profile and its state directory.
///
/// It has 1 to 64 of the characters `a-z A-Z 0-9 _ = + . -`, and begins with neither `.` nor `-`. These are the
/// characters that wg-quick(8) allows. Such a name is always a plain file name, and never mistaken for an option.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TunnelName(String);

impl_name!(TunnelName);

impl TunnelName {
    /// The maximum length in characters.
    pub const MAX: usize = 64;

    /// Derives the tunnel's name from a file name without its extension.
    ///
    /// A valid name is kept. In any other, each run of invalid characters becomes a `-`, and a hyphen with eight digits
    /// of a hash of the whole file name is appended. The result is always the same for a file name. Different file
    /// names get different tunnels, such as `a b` and `a:b`.
    pub fn from_file_stem(stem: &OsStr) -> Self {
        if let Some(name) = stem.to_str().and_then(|stem| stem.parse().ok()) {
            return name;
        }
        let digits: String =
            Blake2s256::digest(stem.as_bytes()).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        let text = stem.to_string_lossy();
        let words = text.split(|c| !is_valid_character(c)).filter(|word| !word.is_empty());
        let readable = words.collect::<Vec<_>>().join("-");
        let readable = readable.trim_start_matches(['.', '-']);
        // All characters are ASCII by now.
        let readable = &readable[..readable.len().min(Self::MAX - 1 - digits.len())];
        let readable = Some(readable.trim_end_matches('-')).filter(|text| !text.is_empty()).unwrap_or("vpn");
        Self(format!("{readable}-{digits}"))
    }
}

fn is_valid_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_=+.-".contains(c)
}

impl FromStr for TunnelName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let Some(first) = text.chars().next() else { return Err(NameError::Empty) };
        if let Some(found) = text.chars().find(|c| !is_valid_character(*c)) {
            return Err(NameError::Character { found, allowed: "letters, digits and _ = + . -" });
        }
        if matches!(first, '.' | '-') {
            return Err(NameError::Start(first));
        }
        if text.len() > Self::MAX {
            return Err(NameError::TooLong { length: text.len(), max: Self::MAX });
        }
        Ok(Self(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_file_names() {
        for valid in ["wg0", "mullvad", "a", "se-got.wg_001=+", &"x".repeat(64)] {
            assert_eq!(valid.parse::<TunnelName>().map(|n| n.to_string()).as_deref(), Ok(valid));
        }
        assert_eq!("".parse::<TunnelName>(), Err(NameError::Empty));
        assert_eq!("..".parse::<TunnelName>(), Err(NameError::Start('.')));
        assert_eq!("-v".parse::<TunnelName>(), Err(NameError::Start('-')));
        assert_eq!("x".repeat(65).parse::<TunnelName>(), Err(NameError::TooLong { length: 65, max: 64 }));
        for invalid in ["a/b", "a b", "a\n", "é", "a\0"] {
            assert!(matches!(invalid.parse::<TunnelName>(), Err(NameError::Character { .. })), "{invalid:?}");
        }
    }

    fn derived(stem: &str) -> String {
        TunnelName::from_file_stem(OsStr::new(stem)).to_string()
    }

    #[test]
    fn valid_file_name_is_the_tunnel_name() {
        for stem in ["wg0", "se-got.wg_001=+", &"x".repeat(64)] {
            assert_eq!(derived(stem), stem);
        }
    }

    #[test]
    fn invalid_file_name_becomes_a_stable_name() {
        // Names of state directories depend on these: they must not change between versions.
        assert_eq!(derived("Zürich (1)"), "Z-rich-1-16b20aa2");
        assert_eq!(derived("東京"), "vpn-9b5c7fe7");
        assert_eq!(derived("-v"), "v-2f801511");
        for stem in ["", ".", "..", "- -", "\n", &"x".repeat(65), &"名".repeat(200), &format!("{} ", "-a".repeat(40))]
        {
            let name = derived(stem);
            assert_eq!(name.parse::<TunnelName>().map(|name| name.to_string()), Ok(name), "{stem:?}");
        }
    }

    #[test]
    fn different_file_names_get_different_tunnels() {
        let stems = ["a b", "a:b", "a  b", " a b", "a-b", &"x".repeat(65), &"x".repeat(66)];
        let names: std::collections::HashSet<String> = stems.iter().map(|stem| derived(stem)).collect();
        assert_eq!(names.len(), stems.len(), "{names:?}");
        // Bytes that are not UTF-8 look alike, but differ.
        let [one, two] = [b"a\xfe", b"a\xff"].map(|bytes| TunnelName::from_file_stem(OsStr::from_bytes(bytes)));
        assert_ne!(one, two);
    }
}
