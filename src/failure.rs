//! The one error type that a user sees: what failed, why, and what to do about it.
//!
//! A failure keeps its shape from the kernel's answer to the terminal: [`Doing::doing`] makes it of a system error, the
//! keeper sends it to its clients as it is, and `main` prints it.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

use crate::linux::errno_of;

/// The exit status of a failure of vpn-exec itself, as in env(1), timeout(1) and chroot(1).
pub const FAILED: u8 = 125;

/// A failure to be reported to the user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What failed, and why. A report of several lines stands for itself.
    pub message: String,
    /// What the user can do about it, if that is known.
    pub advice: Option<String>,
    /// The system's error number, if a system call was refused (errno(3)).
    pub errno: Option<i32>,
    /// The exit status of the process that reports it.
    pub status: u8,
}

impl Failure {
    /// Creates a failure with the exit status [`FAILED`] and without advice.
    pub fn new(message: impl ToString) -> Self {
        Self { message: message.to_string(), advice: None, errno: None, status: FAILED }
    }

    /// Creates the failure of an operation that the system refused: `cannot WHAT: ERROR`, with advice for common
    /// errors.
    ///
    /// A failure inside of the error, as from [`io::Error::other`], keeps its advice and its error number.
    pub fn of(what: impl fmt::Display, error: &io::Error) -> Self {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<Self>());
        let errno = errno_of(error).or_else(|| inner.and_then(|inner| inner.errno));
        let advice = match inner {
            Some(inner) => inner.advice.clone(),
            None => advice_for(error).map(Into::into),
        };
        Self { advice, errno, ..Self::new(format!("cannot {what}: {error}")) }
    }

    /// Replaces the advice.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// Replaces the exit status.
    #[must_use]
    pub fn with_status(mut self, status: u8) -> Self {
        self.status = status;
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<Failure> for io::Error {
    /// Wraps the failure, which [`Failure::of`] finds again.
    fn from(failure: Failure) -> Self {
        Self::other(failure)
    }
}

/// Turns a system error into a [`Failure`] that names the operation.
pub trait Doing<T> {
    /// Names the operation that failed, as it follows "cannot".
    ///
    /// # Errors
    /// The error of the result, as [`Failure::of`] makes it.
    fn doing(self, what: impl fmt::Display) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl fmt::Display) -> Result<T, Failure> {
        self.map_err(|error| Failure::of(what, &error.into()))
    }
}

/// The general advice on a refused step.
pub const MISSING_PRIVILEGE: &str = "run vpn-exec as root, or with CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_SETPCAP";

/// The general advice on a file system that cannot be written.
pub const READ_ONLY: &str = "/run and /proc/sys must be writable; in a container, give it more privileges";

fn advice_for(error: &io::Error) -> Option<&'static str> {
    if error.kind() == io::ErrorKind::NotADirectory {
        return Some("move away the file that stands where a directory is needed");
    }
    match errno_of(error)? {
        libc::EPERM | libc::EACCES => Some(MISSING_PRIVILEGE),
        libc::EROFS => Some(READ_ONLY),
        libc::ENOSPC => Some("a limit is reached: see user.max_net_namespaces in sysctl, and free space in /run"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::capabilities::{self, CapabilitySet};
    use crate::linux::netlink::{Netlink, NetlinkRequest};

    #[test]
    fn a_failure_keeps_its_advice_on_its_way() {
        let refused: Result<(), _> = Err(io::Error::from_raw_os_error(libc::EROFS));
        let first = refused.doing("write a sysctl").expect_err("refused");
        assert_eq!(first.errno, Some(libc::EROFS));
        assert!(first.advice.as_deref().is_some_and(|advice| advice.contains("/proc/sys")));
        let wrapped: Result<(), _> = Err(first.clone());
        let second = wrapped.doing("make the tunnel").expect_err("refused");
        assert_eq!((second.errno, &second.advice), (first.errno, &first.advice));
        assert_eq!(second.message, format!("cannot make the tunnel: {}", first.message));
        let sent = serde_json::to_string(&second).expect("JSON");
        assert_eq!(serde_json::from_str::<Failure>(&sent).expect("a failure"), second);
    }

    #[test]
    fn a_refused_netlink_request_has_its_error_number_and_advice() {
        // The thread gives up all capabilities, so the kernel answers EPERM to root as well.
        let refused = std::thread::spawn(|| {
            capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty()).expect("fewer capabilities");
            let mut netlink = Netlink::open().expect("a socket");
            netlink.execute_one(NetlinkRequest::set_mtu(1, "lo", 1500)).doing("configure the interface")
        });
        let failure = refused.join().expect("a thread").expect_err("refused");
        assert_eq!(failure.errno, Some(libc::EPERM));
        assert!(failure.message.starts_with("cannot configure the interface: cannot set the MTU of lo to 1500: "));
        assert!(failure.advice.is_some_and(|advice| advice.contains("CAP_NET_ADMIN")));
    }

    #[test]
    fn an_error_without_known_advice_has_none() {
        let refused: Result<(), _> = Err(io::Error::from_raw_os_error(libc::EIO));
        assert_eq!(refused.doing("read").expect_err("refused").advice, None);
    }
}
