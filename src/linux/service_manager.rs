//! What a service tells its manager (sd_notify(3)), by the manager's own protocol: texts in datagrams to the socket that it names in
//! the environment.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

/// How long a manager may take to make room for a message. One that does not answer shall not hang its services.
const PATIENCE: Duration = Duration::from_secs(1);

/// The variable that names the socket.
pub const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// The manager of the calling process, which is a service.
#[derive(Debug)]
pub struct ServiceManager {
    socket: OwnedFd,
    address: SocketAddrUnix,
    watchdog: Option<Duration>,
}

impl ServiceManager {
    /// The one that the environment names, if any. `variable` reads the environment.
    ///
    /// # Errors
    /// If it names a socket of another kind.
    pub fn find(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> io::Result<Option<Self>> {
        let Some(name) = variable(NOTIFY_SOCKET).filter(|name| !name.is_empty()) else { return Ok(None) };
        let address = address(&name)?;
        let number = |name| variable(name)?.to_str()?.parse::<u64>().ok();
        let is_meant = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|usec| *usec > 0 && is_meant).map(Duration::from_micros);
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
        Ok(Some(Self { socket, address, watchdog }))
    }

    /// How often it must be told that the service lives, if it wants to be (sd_watchdog_enabled(3)).
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Tells it something: lines of `NAME=value`.
    pub fn tell(&self, text: &str) -> io::Result<()> {
        rustix::net::sendto(&self.socket, text.as_bytes(), SendFlags::NOSIGNAL, &self.address)?;
        Ok(())
    }
}

/// The address of the socket that the environment names: a path, or with a `@` a name that is in no file system.
fn address(name: &OsStr) -> io::Result<SocketAddrUnix> {
    let invalid = || {
        let what = format!("{NOTIFY_SOCKET} is {}, which is no local socket's address", name.display());
        io::Error::new(io::ErrorKind::InvalidInput, what)
    };
    match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddrUnix::new_abstract_name(rest).map_err(|_| invalid()),
        [b'/', ..] => SocketAddrUnix::new(Path::new(name)).map_err(|_| invalid()),
        _ => Err(invalid()),
    }
}

/// Now, by the manager's clock, in microseconds: what `MONOTONIC_USEC=` says.
pub fn monotonic_usec() -> u128 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    now.as_micros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables<'a>(list: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<std::ffi::OsString> + 'a {
        move |name| list.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).into())
    }

    #[test]
    fn who_has_no_manager_tells_nobody() {
        for list in [&[][..], &[("NOTIFY_SOCKET", "")]] {
            assert!(ServiceManager::find(variables(list)).expect("that is fine").is_none());
        }
        let error = ServiceManager::find(variables(&[("NOTIFY_SOCKET", "vsock:2:1")])).expect_err("no local socket");
        assert!(error.to_string().contains("vsock:2:1"), "{error}");
    }

    #[test]
    fn a_watchdog_is_for_the_process_that_it_names() {
        let own = std::process::id().to_string();
        let found = |pid: &str, usec: &str| {
            let list = [("NOTIFY_SOCKET", "/nowhere"), ("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)];
            ServiceManager::find(variables(&list)).expect("fine").expect("a manager").watchdog()
        };
        assert_eq!(found(&own, "3000000"), Some(Duration::from_secs(3)));
        assert_eq!((found("1", "3000000"), found(&own, "0")), (None, None));
    }
}
