//! Validated names of tunnels, services, network interfaces and containers, and suggestions for misspelled ones.

mod container;
mod interface;
mod service;
mod suggestion;
mod tunnel;

use thiserror::Error;

pub use container::ContainerId;
pub use interface::InterfaceName;
pub use service::ServiceName;
pub use suggestion::closest;
pub use tunnel::TunnelName;

/// The reason why a text is not a valid [`TunnelName`], [`ServiceName`], [`InterfaceName`] or [`ContainerId`].
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum NameError {
    /// The name has no characters.
    #[error("the name is empty")]
    Empty,
    /// The name is too long.
    #[error("the name has {length} characters, more than the maximum of {max}")]
    TooLong {
        /// The length of the name.
        length: usize,
        /// The maximum length.
        max: usize,
    },
    /// The name contains an invalid character.
    #[error("invalid character {found:?} in the name; use only {allowed}")]
    Character {
        /// The first invalid character.
        found: char,
        /// A phrase that lists the valid characters.
        allowed: &'static str,
    },
    /// The name begins with a character that is valid only after the first.
    #[error("a name cannot begin with {0:?}")]
    Start(char),
    /// The name is that of another kind of unit.
    #[error("{0:?} is not a service unit")]
    NotService(String),
    /// The kernel reserves the name.
    #[error("{0:?} is reserved and not a valid name")]
    Reserved(String),
}

/// Implements what all names have in common for a newtype of `String` that implements `FromStr`.
macro_rules! impl_name {
    ($name:ident) => {
        impl $name {
            /// Returns the name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = $crate::names::NameError;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

use impl_name;
