//! Names that are checked where they are made: of tunnels, of services and of network interfaces.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The name of a tunnel: of its namespace `/run/netns/NAME`, its profile and its state.
///
/// 1 to 64 characters of `a-z A-Z 0-9 _ = + . -`, the first neither `.` nor `-`: what wg-quick(8) takes, but longer,
/// always a plain file name, and never mistaken for an option.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TunnelName(String);

/// Why a string is no [`TunnelName`], [`ServiceName`] or [`InterfaceName`].
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum NameError {
    /// It has no characters at all.
    #[error("the name is empty")]
    Empty,
    /// It has more characters than fit.
    #[error("the name has {length} characters; at most {max} are allowed")]
    TooLong {
        /// How many it has.
        length: usize,
        /// How many it may have.
        max: usize,
    },
    /// It has a character that is not allowed.
    #[error("the name has the character {found:?}; allowed are {allowed}")]
    Character {
        /// The first such character.
        found: char,
        /// What is allowed.
        allowed: &'static str,
    },
    /// Its first character is allowed later only.
    #[error("the name begins with {0:?}; it must begin with a letter, a digit, '_', '=' or '+'")]
    Start(char),
    /// It is a unit of another kind.
    #[error("{0:?} is a unit, but no service")]
    NoService(String),
    /// The kernel keeps this name for itself.
    #[error("{0:?} is not a name")]
    Reserved(String),
}

impl TunnelName {
    /// The most characters that a tunnel's name may have.
    pub const MAX: usize = 64;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TunnelName {
    type Err = NameError;

    fn from_str(s: &str) -> Result<Self, NameError> {
        let Some(first) = s.chars().next() else { return Err(NameError::Empty) };
        if let Some(found) = s.chars().find(|c| !(c.is_ascii_alphanumeric() || "_=+.-".contains(*c))) {
            return Err(NameError::Character { found, allowed: "letters, digits and _ = + . -" });
        }
        if matches!(first, '.' | '-') {
            return Err(NameError::Start(first));
        }
        if s.len() > Self::MAX {
            return Err(NameError::TooLong { length: s.len(), max: Self::MAX });
        }
        Ok(Self(s.to_owned()))
    }
}

impl TryFrom<String> for TunnelName {
    type Error = NameError;

    fn try_from(s: String) -> Result<Self, NameError> {
        s.parse()
    }
}

impl From<TunnelName> for String {
    fn from(name: TunnelName) -> String {
        name.0
    }
}

impl fmt::Display for TunnelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// The name of a systemd service's unit (systemd.unit(5)), with its `.service`, which may be left out where it is parsed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServiceName(String);

impl ServiceName {
    /// The most characters that a unit's name may have.
    pub const MAX: usize = 255;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is a template, of which there are instances only.
    pub fn is_template(&self) -> bool {
        self.0.ends_with("@.service")
    }

    /// Of a template or an instance of one, what precedes the `@`.
    pub fn prefix(&self) -> Option<&str> {
        self.0.split_once('@').map(|(prefix, _)| prefix)
    }
}

impl FromStr for ServiceName {
    type Err = NameError;

    fn from_str(s: &str) -> Result<Self, NameError> {
        if s.is_empty() {
            return Err(NameError::Empty);
        }
        if let Some(found) = s.chars().find(|c| !(c.is_ascii_alphanumeric() || ":-_.\\@".contains(*c))) {
            return Err(NameError::Character { found, allowed: "letters, digits and : - _ . \\ @" });
        }
        if let Some(first) = s.chars().next().filter(|first| matches!(first, '.' | '-' | '@')) {
            return Err(NameError::Start(first));
        }
        let kinds = ["socket", "timer", "target", "mount", "automount", "swap", "path", "slice", "scope", "device"];
        if s.rsplit_once('.').is_some_and(|(_, kind)| kinds.contains(&kind)) {
            return Err(NameError::NoService(s.to_owned()));
        }
        let name = if s.ends_with(".service") { s.to_owned() } else { format!("{s}.service") };
        if name.len() > Self::MAX {
            return Err(NameError::TooLong { length: name.len(), max: Self::MAX });
        }
        Ok(Self(name))
    }
}

impl TryFrom<String> for ServiceName {
    type Error = NameError;

    fn try_from(s: String) -> Result<Self, NameError> {
        s.parse()
    }
}

impl From<ServiceName> for String {
    fn from(name: ServiceName) -> String {
        name.0
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// The name of a network interface, as the kernel's `dev_valid_name()` allows it: 1 to 15 bytes without `/`, `:` and
/// white space, and neither `.` nor `..`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InterfaceName(String);

impl InterfaceName {
    /// The most bytes that an interface's name may have: IFNAMSIZ less the terminating zero.
    pub const MAX: usize = 15;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InterfaceName {
    type Err = NameError;

    fn from_str(s: &str) -> Result<Self, NameError> {
        if s.is_empty() {
            return Err(NameError::Empty);
        }
        if s.len() > Self::MAX {
            return Err(NameError::TooLong { length: s.len(), max: Self::MAX });
        }
        if let Some(found) = s.chars().find(|c| matches!(c, '/' | ':') || c.is_whitespace() || c.is_control()) {
            return Err(NameError::Character {
                found,
                allowed: "any but '/', ':', white space and control characters",
            });
        }
        if s == "." || s == ".." {
            return Err(NameError::Reserved(s.to_owned()));
        }
        Ok(Self(s.to_owned()))
    }
}

impl TryFrom<String> for InterfaceName {
    type Error = NameError;

    fn try_from(s: String) -> Result<Self, NameError> {
        s.parse()
    }
}

impl From<InterfaceName> for String {
    fn from(name: InterfaceName) -> String {
        name.0
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tunnel_names_are_plain_file_names() {
        for good in ["wg0", "mullvad", "a", "se-got.wg_001=+", &"x".repeat(64)] {
            assert_eq!(good.parse::<TunnelName>().map(|n| n.to_string()).as_deref(), Ok(good));
        }
        assert_eq!("".parse::<TunnelName>(), Err(NameError::Empty));
        assert_eq!("..".parse::<TunnelName>(), Err(NameError::Start('.')));
        assert_eq!("-v".parse::<TunnelName>(), Err(NameError::Start('-')));
        assert_eq!("x".repeat(65).parse::<TunnelName>(), Err(NameError::TooLong { length: 65, max: 64 }));
        for bad in ["a/b", "a b", "a\n", "é", "a\0"] {
            assert!(matches!(bad.parse::<TunnelName>(), Err(NameError::Character { .. })), "{bad:?}");
        }
    }

    #[test]
    fn interface_names_are_the_kernels() {
        for good in ["wg0", "ve-mullvad", "123456789012345"] {
            assert!(good.parse::<InterfaceName>().is_ok());
        }
        for bad in ["", ".", "..", "1234567890123456", "a/b", "a:b", "a b"] {
            assert!(bad.parse::<InterfaceName>().is_err(), "{bad:?}");
        }
    }
}
