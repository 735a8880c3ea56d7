//! The MTU of the WireGuard interface, as the file, the profile and the command line set it.

use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::fragment::Fragment;
use super::value::{ValueError, decimal, parse_argument};

/// The valid MTUs in bytes. The minimum is that of an IPv4 link (RFC 791 section 3.2). The maximum is the largest value
/// of the length fields of IPv4 and IPv6, and the maximum MTU of a TUN device. The plan refuses MTUs that are too small
/// for the tunnel's addresses.
pub(super) const RANGE: RangeInclusive<u32> = 68..=65535;

/// An MTU that the user has set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mtu {
    /// The MTU in bytes.
    pub bytes: u32,
    /// Where it was set.
    pub source: MtuSource,
}

/// The place where an MTU was set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MtuSource {
    /// The provider's file.
    File,
    /// The profile.
    Profile,
    /// The option `--mtu`.
    Option,
}

impl fmt::Display for MtuSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File => "the file",
            Self::Profile => "the profile",
            Self::Option => "--mtu",
        })
    }
}

/// Parses the argument of `--mtu`.
///
/// # Errors
///
/// Returns a message if the text is not a valid MTU in bytes.
pub fn parse_mtu(text: &str) -> Result<u32, String> {
    parse_argument(text, mtu)
}

/// Parses an MTU in bytes.
pub(super) fn mtu(value: Fragment<'_>) -> Result<u32, ValueError> {
    decimal(value.text, *RANGE.end())
        .filter(|mtu| RANGE.contains(mtu))
        .ok_or_else(|| ValueError::new(value, "invalid MTU", format!("expected {}", expected())))
}

/// Returns a phrase that describes valid MTUs.
pub(super) fn expected() -> String {
    format!("a number of bytes from {} to {}", RANGE.start(), RANGE.end())
}
