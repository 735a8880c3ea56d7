//! Names of network interfaces.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{NameError, impl_name};

/// The name of a network interface.
///
/// The kernel's `dev_valid_name()` (net/core/dev.c) allows 1 to 15 bytes without `/`, `:` and white space, except for
/// `.` and `..`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InterfaceName(String);

impl_name!(InterfaceName);

impl InterfaceName {
    /// The maximum length in bytes: `IFNAMSIZ` without the terminating zero.
    pub const MAX: usize = 15;
}

impl FromStr for InterfaceName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > Self::MAX {
            return Err(NameError::TooLong { length: text.len(), max: Self::MAX });
        }
        if let Some(found) = text.chars().find(|c| matches!(c, '/' | ':') || c.is_whitespace() || c.is_control()) {
            let allowed = "characters other than '/', ':', white space and control characters";
            return Err(NameError::Character { found, allowed });
        }
        if text == "." || text == ".." {
            return Err(NameError::Reserved(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_rules_of_the_kernel() {
        for valid in ["wg0", "ve-mullvad", "123456789012345"] {
            assert!(valid.parse::<InterfaceName>().is_ok());
        }
        for invalid in ["", ".", "..", "1234567890123456", "a/b", "a:b", "a b"] {
            assert!(invalid.parse::<InterfaceName>().is_err(), "{invalid:?}");
        }
    }
}
