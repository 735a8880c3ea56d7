//! The way to a keeper's socket, and the proof that this process is not in the tunnel.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::Lease;
use super::answers::timed_out;
use crate::lease::messages::{ClientRequest, send};
use crate::linux::{local_socket, user_namespace};
use crate::names::TunnelName;
use crate::registry::{self, Scope};

impl Lease {
    /// Connects to the keeper of a tunnel. Returns None if there is no keeper.
    ///
    /// # Errors
    /// `TimedOut` if the keeper does not accept the connection in time; `PermissionDenied` if it is another user's
    /// process, although the tunnel is one of this user.
    pub(crate) fn connect(name: &TunnelName, timeout: Duration) -> io::Result<Option<Self>> {
        let scope = Scope::current();
        scope.check()?;
        let connected = match local_socket::connect(&registry::socket_of(name), timeout) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                local_socket::connect(&registry::public_socket_of(name), timeout).map(|socket| (socket, true))
            }
            other => other.map(|socket| (socket, false)),
        };
        match connected {
            Ok((socket, is_public)) => {
                if scope == Scope::User && !is_public {
                    match introduce(&socket) {
                        Err(error) if is_absence(&error) => return Ok(None),
                        introduced => introduced?,
                    }
                }
                Ok(Some(Self::over(socket, is_public)))
            }
            Err(error) if is_absence(&error) => Ok(None),
            // A file stands where the tunnels' directory belongs, so there is no keeper. Claiming the name reports the
            // file.
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let seconds = timeout.as_secs();
                Err(timed_out(format!("the tunnel's keeper did not accept the connection within {seconds} s")))
            }
            Err(error) => Err(error),
        }
    }
}

/// Checks that the process at the other end of a connection is of the calling user, and proves to it that the caller is
/// not in the tunnel.
fn introduce(socket: &OwnedFd) -> io::Result<()> {
    let (own, peer) = (nix::unistd::geteuid().as_raw(), local_socket::peer_credentials(socket)?.uid);
    if peer != own {
        let what = format!("the tunnel's socket is that of the user {peer}");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
    }
    send(socket, &ClientRequest::Outside, Some(user_namespace::original()?))
}

/// Returns whether the calling user may only query the status of a tunnel, because another user holds it.
pub(in crate::lease) fn is_public(name: &TunnelName) -> bool {
    let may = rustix::fs::access(registry::socket_of(name), rustix::fs::Access::WRITE_OK);
    matches!(may, Err(rustix::io::Errno::ACCESS))
}

/// Returns whether an error means that the keeper is absent or has ended.
pub(super) fn is_absence(error: &io::Error) -> bool {
    let gone = [libc::ENOENT, libc::ECONNREFUSED, libc::ECONNRESET, libc::EPIPE, libc::ENOTCONN];
    error.raw_os_error().is_some_and(|number| gone.contains(&number))
}
