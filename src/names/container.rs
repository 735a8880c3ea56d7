//! Identifiers of containers.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{NameError, impl_name};

/// The identifier that an engine has given to a container, or to a pod's sandbox.
///
/// It has 1 to 256 of the characters `a-z A-Z 0-9 _ + . -` and begins with a letter or a digit. That covers what runc
/// and crun accept, and the identifiers of the CNI specification (version 1.1, section 2).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

impl_name!(ContainerId);

impl ContainerId {
    /// The maximum length in characters.
    pub const MAX: usize = 256;

    /// The number of characters that engines show of their usual identifiers, which have 64 hexadecimal digits.
    const SHORT: usize = 12;

    /// Returns the beginning of an identifier of 64 hexadecimal digits, as engines show it, and any other identifier
    /// whole.
    pub fn short(&self) -> &str {
        let is_usual = self.0.len() == 64 && self.0.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_usual { &self.0[..Self::SHORT] } else { &self.0 }
    }
}

impl FromStr for ContainerId {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let Some(first) = text.chars().next() else { return Err(NameError::Empty) };
        if let Some(found) = text.chars().find(|c| !(c.is_ascii_alphanumeric() || "_+.-".contains(*c))) {
            return Err(NameError::Character { found, allowed: "letters, digits and _ + . -" });
        }
        if !first.is_ascii_alphanumeric() {
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
    fn identifiers_are_plain_words() {
        for valid in ["a", "0f", "my_pod.1-x+2", &"x".repeat(256)] {
            assert_eq!(valid.parse::<ContainerId>().map(String::from).as_deref(), Ok(valid));
        }
        for invalid in ["", "-x", ".", "..", "_a", "a/b", "a b", "a\n", "é", "a\0", "a\u{1b}[m", &"x".repeat(257)] {
            assert!(invalid.parse::<ContainerId>().is_err(), "{invalid:?}");
        }
    }

    #[test]
    fn only_the_usual_identifiers_are_shortened() {
        let short = |id: &str| id.parse::<ContainerId>().expect("an identifier").short().to_owned();
        assert_eq!(short(&"0123456789abcdef".repeat(4)), "0123456789ab");
        assert_eq!(short("web-1"), "web-1");
        assert_eq!(short(&"web-1-container-".repeat(4)), "web-1-container-".repeat(4));
    }
}
