//! Fault injection for tests: makes a step fail, kills or stops the process at a step, or leaves a protection out.
//!
//! A test that expects a failure to be undone, or a leak to be found, must see both happen. The environment variables
//! `VPN_EXEC_TEST_FAIL` and `VPN_EXEC_TEST_BREAK` choose what does, and `VPN_EXEC_TEST_STALE` shortens a wait. They
//! work only in builds with debug assertions. In a release these functions are empty.

#[cfg(not(debug_assertions))]
pub(crate) use disabled::{die_at, fail_at, is_broken, point, stale_after};
#[cfg(debug_assertions)]
pub(crate) use enabled::{die_at, fail_at, is_broken, point, stale_after};

/// The points of creating a tunnel, in order.
pub const SET_UP: [&str; 9] = [
    "after the namespace",
    "after the state",
    "after the directory of names",
    "after the name",
    "after the veth pair",
    "after the host's rules",
    "after the WireGuard device",
    "after the routes",
    "at the end",
];

/// The point after the tunnel was announced. A program may run then.
pub const ANNOUNCED: [&str; 1] = ["after the announcement"];

/// The points of taking a tunnel down, in order. A process can be killed or stopped there. A failure does not keep the
/// other steps from being taken.
pub const TAKE_DOWN: [&str; 4] = [
    "after the socket is gone",
    "after the name is gone",
    "after the host's rules are gone",
    "before the state is gone",
];

/// The points of attaching a tunnel to the namespace of the process, in order.
pub const ATTACHING: [&str; 5] = [
    "after the attached rules",
    "after closing the namespace",
    "after the attached device",
    "after the attached routes",
    "after the resolvers",
];

/// The points at which the start of a program's guard can fail.
pub const GUARDS: [&str; 2] = ["in the socket guard", "in the session bus filter"];

/// The points at which a thread can fail while it runs.
pub const THREADS: [&str; 1] = ["in the DNS forwarder"];

/// The protections that can be left out.
///
/// Of a program: its network namespace, its view of the files for lookups, the loss of privileges and of inherited
/// descriptors, the routes into the tunnel, the packet rules, and the socket guard. Of a keeper: that the
/// kernel rejects descriptors of other users (as before Linux 6.16), and that their connections are closed in the
/// background. Of a rootless tunnel: its gateway, without which its link leads to the host, as that of root's tunnels;
/// its user namespace, without which root's privileges hold for the host; and that its keeper looks at the network
/// namespace of its clients, as before Linux 5.14.
pub const PROTECTIONS: [&str; 12] = [
    "namespace",
    "names",
    "privileges",
    "descriptors",
    "routes",
    "rules",
    "sockets",
    "passrights",
    "apart",
    "gateway",
    "user-namespace",
    "client-namespace",
];

#[cfg(debug_assertions)]
mod enabled {
    use std::io;
    use std::time::Duration;

    use nix::sys::signal::{Signal, raise};

    use super::{ANNOUNCED, ATTACHING, GUARDS, PROTECTIONS, SET_UP, TAKE_DOWN, THREADS};
    use crate::failure::{Doing, Failure};

    /// The points of creating or taking down a tunnel: `POINT` makes the point fail, `kill:POINT` kills the process
    /// there, `stop:POINT` stops it there, and `stop` stops it at every point.
    const FAIL: &str = "VPN_EXEC_TEST_FAIL";

    /// The protections that are left out, separated by commas.
    const BREAK: &str = "VPN_EXEC_TEST_BREAK";

    /// The age in seconds at which handshakes are stale.
    const STALE: &str = "VPN_EXEC_TEST_STALE";

    /// Fails, kills the process or stops it, if the test has chosen this point.
    pub(crate) fn point(name: &str) -> Result<(), Failure> {
        let is_listed = SET_UP.iter().chain(&ANNOUNCED).chain(&TAKE_DOWN).chain(&ATTACHING).any(|point| *point == name);
        assert!(is_listed, "{name:?} is missing in the lists of points");
        let Ok(chosen) = std::env::var(FAIL) else { return Ok(()) };
        match chosen.as_str() {
            chosen if chosen == name => Err(io::Error::other("a test made it fail")).doing(format!("continue {name}")),
            chosen if chosen.strip_prefix("kill:") == Some(name) => {
                raise(Signal::SIGKILL).map_err(io::Error::from).doing("kill this process")
            }
            chosen if chosen == "stop" || chosen.strip_prefix("stop:") == Some(name) => {
                raise(Signal::SIGSTOP).map_err(io::Error::from).doing("stop this process")
            }
            _ => Ok(()),
        }
    }

    /// Fails, if the test has chosen this point of a guard's start, or of a thread.
    pub(crate) fn fail_at(name: &str) -> Result<(), Failure> {
        let is_listed = GUARDS.iter().chain(&THREADS).any(|point| *point == name);
        assert!(is_listed, "{name:?} is missing in the lists of points");
        match std::env::var(FAIL).is_ok_and(|chosen| chosen == name) {
            true => Err(Failure::new(format!("cannot continue {name}: a test made it fail"))),
            false => Ok(()),
        }
    }

    /// Kills the process, if the test has chosen this point of starting a program.
    pub(crate) fn die_at(name: &str) {
        if std::env::var(FAIL).is_ok_and(|chosen| chosen.strip_prefix("kill:") == Some(name)) {
            let _ = raise(Signal::SIGKILL);
        }
    }

    /// Returns whether the test leaves a protection out.
    pub(crate) fn is_broken(protection: &str) -> bool {
        assert!(PROTECTIONS.contains(&protection), "{protection:?} is missing in the list of protections");
        std::env::var(BREAK).is_ok_and(|broken| broken.split(',').any(|name| name == protection))
    }

    /// Returns the age at which handshakes are stale, if the test has chosen one.
    pub(crate) fn stale_after() -> Option<Duration> {
        std::env::var(STALE).ok()?.parse().ok().map(Duration::from_secs)
    }
}

#[cfg(not(debug_assertions))]
mod disabled {
    use std::time::Duration;

    use crate::failure::Failure;

    pub(crate) fn point(_name: &str) -> Result<(), Failure> {
        Ok(())
    }

    pub(crate) fn fail_at(_name: &str) -> Result<(), Failure> {
        Ok(())
    }

    pub(crate) fn die_at(_name: &str) {}

    pub(crate) fn is_broken(_protection: &str) -> bool {
        false
    }

    pub(crate) fn stale_after() -> Option<Duration> {
        None
    }
}
