//! The MTU of WireGuard's interface, as the file, the profile and the command line set it.

use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::fragment::Fragment;
use super::network::{self, ValueError, decimal};

/// The MTUs that can be asked for, in bytes: from the smallest of an IPv4 link (RFC 791 section 3.2) to the largest packet that the length
/// fields of IPv4 and IPv6 can say, which is also a TUN device's largest MTU. The plan refuses those that are too small for the tunnel.
pub(super) const RANGE: RangeInclusive<u32> = 68..=65535;

/// An MTU that the user has set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mtu {
    /// The MTU in bytes.
    pub bytes: u32,
    /// Where it was set.
    pub source: MtuSource,
}

/// Where an MTU was set.
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

/// Reads the argument of `--mtu`.
///
/// # Errors
/// If it is not a number of bytes that an MTU can be.
pub fn parse_mtu(text: &str) -> Result<u32, String> {
    network::parse(text, mtu)
}

/// Reads an MTU in bytes.
pub(super) fn mtu(value: Fragment<'_>) -> Result<u32, ValueError> {
    decimal(value.text, *RANGE.end())
        .filter(|mtu| RANGE.contains(mtu))
        .ok_or_else(|| ValueError::new(value, "this is no MTU", format!("expected {}", expected())))
}

/// What an MTU can be, as a phrase.
pub(super) fn expected() -> String {
    format!("a number of bytes from {} to {}", RANGE.start(), RANGE.end())
}
