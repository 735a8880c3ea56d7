//! Why a tunnel could not be made or taken down, and what the user can do about it.

use std::io;

use thiserror::Error;

use crate::relay::BindError;

/// Why a tunnel could not be made, or not be taken down.
#[derive(Debug, Error)]
#[error("cannot {what}: {error}")]
pub struct TunnelError {
    pub(super) what: String,
    #[source]
    pub(super) error: io::Error,
    /// What the user can do about it, where that is known.
    pub advice: Option<String>,
}

/// Turns the system's error into one that says what was being done.
pub(super) trait Doing<T> {
    fn doing(self, what: impl Into<String>) -> Result<T, TunnelError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl Into<String>) -> Result<T, TunnelError> {
        self.map_err(|error| {
            let error = error.into();
            let advice = advice_for(&error);
            TunnelError { what: what.into(), error, advice }
        })
    }
}

impl From<BindError> for TunnelError {
    fn from(error: BindError) -> Self {
        if let Some(port) = error.privileged() {
            let missing = io::Error::other("the right to use a port below 1024 is not there, or was given up");
            let advice = format!("take the tunnel down and up again as root, or choose another port than {port}");
            return Self { what: error.what(), error: missing, advice: Some(advice) };
        }
        let advice = error.advice().map(String::from);
        Self { what: error.what(), error: error.into(), advice }
    }
}

fn advice_for(error: &io::Error) -> Option<String> {
    if error.kind() == io::ErrorKind::NotADirectory {
        return Some("move away what is there: it has to be a directory".into());
    }
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            Some("run vpn-exec as root, or with CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_SETPCAP".into())
        }
        Some(libc::EROFS) => {
            Some("/run and /proc/sys must be writable; in a container, give it more privileges".into())
        }
        Some(libc::ENOSPC) => {
            Some("a limit is reached: see user.max_net_namespaces in sysctl, and free space in /run".into())
        }
        _ => None,
    }
}
