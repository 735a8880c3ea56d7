//! Stamps: each attempt of a leak test carries the name of its vector and of the stage in which it was made, so that a
//! leak identifies itself wherever it is seen.

use std::collections::BTreeSet;
use std::str::FromStr;

/// The abstract unix socket (unix(7)) at which a process listens in the host's network namespace.
pub const ABSTRACT_SOCKET: &str = "leaks-relay";

/// A stamp, in a form that can be part of a host name.
#[derive(Clone, Debug)]
pub struct Stamp {
    /// One label of a host name.
    pub label: String,
}

impl Stamp {
    /// Returns the stamp of an attempt.
    pub fn new(vector: &str, stage: &str) -> Self {
        Self { label: format!("leak-{vector}-at-{stage}") }
    }

    /// Returns a host name to look up, which no server knows.
    pub fn host_name(&self) -> String {
        format!("{}.example", self.label)
    }

    /// Returns the payload to send.
    pub fn payload(&self) -> Vec<u8> {
        format!("{}.", self.label).into_bytes()
    }
}

/// Returns the vectors and the stages of all stamps in some bytes.
pub fn stamps_in(bytes: &[u8]) -> BTreeSet<(String, String)> {
    let begins = bytes.windows(5).enumerate().filter(|(_, window)| window == b"leak-").map(|(at, _)| at + 5);
    begins
        .filter_map(|at| {
            let rest = &bytes[at..];
            let length =
                rest.iter().position(|byte| !byte.is_ascii_alphanumeric() && *byte != b'-').unwrap_or(rest.len());
            let (vector, stage) = std::str::from_utf8(&rest[..length]).ok()?.split_once("-at-")?;
            Some((vector.to_owned(), stage.to_owned()))
        })
        .collect()
}

/// The protection that stops a vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// The program's network namespace.
    Namespace,
    /// The network namespace and its packet rules.
    Rules,
    /// The network namespace; the C library sends on the program's behalf.
    Library,
    /// The program's view of files.
    Files,
    /// The socket guard before unix sockets of processes outside.
    Sockets,
    /// The program's lack of privileges.
    Privileges,
    /// The closing of inherited descriptors.
    Descriptors,
}

impl FromStr for Protection {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let all = [
            Self::Namespace,
            Self::Rules,
            Self::Library,
            Self::Files,
            Self::Sockets,
            Self::Privileges,
            Self::Descriptors,
        ];
        all.into_iter().find(|one| format!("{one:?}") == name).ok_or_else(|| format!("no protection {name:?}"))
    }
}
