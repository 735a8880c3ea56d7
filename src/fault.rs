//! Makes a chosen step of a set-up fail, so that a test can see each failure undo itself; and takes a chosen protection away, so that a
//! test can be seen to miss it. Only in builds with debug assertions; a release has none of it.

use crate::failure::Failure;

/// The points of a set-up, in their order.
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

/// The points of taking a tunnel down, in their order. They can only be killed at: no failure keeps the rest from being done.
pub const TAKE_DOWN: [&str; 4] = [
    "after the socket is gone",
    "after the name is gone",
    "after the host's rules are gone",
    "before the state is gone",
];

/// The points of the starts of a program's guards. They can only fail.
pub const GUARDS: [&str; 2] = ["in the socket guard", "in the session bus filter"];

/// What can be taken away: the program's namespace, its view of names, that it has no privileges and no files but its own, that routes
/// lead into the tunnel, the rules for packets inside, and the gate before the sockets of processes outside; of a keeper, that the kernel
/// refuses descriptors of other users (as before Linux 6.16), and that their connections are closed apart.
pub const PROTECTIONS: [&str; 9] =
    ["namespace", "names", "privileges", "descriptors", "routes", "rules", "sockets", "passrights", "apart"];

/// Fails if the test has chosen this point: the environment variable `VPN_EXEC_TEST_FAIL` holds its name, or `kill:` and its name
/// to have the process killed there instead. It holds `stop`, or `stop:` and a name, to have the process stopped at every point, or at that
/// one, until it is told to go on.
#[cfg(debug_assertions)]
pub(super) fn point(name: &str) -> Result<(), Failure> {
    use crate::failure::Doing;
    use nix::sys::signal::{Signal, raise};

    assert!(SET_UP.contains(&name) || TAKE_DOWN.contains(&name), "{name:?} is in no list, so no test would choose it");
    match std::env::var("VPN_EXEC_TEST_FAIL") {
        Ok(chosen) if chosen == name => Err(std::io::Error::other("a test has it fail")).doing(format!("go on {name}")),
        Ok(chosen) if chosen.strip_prefix("kill:") == Some(name) => {
            raise(Signal::SIGKILL).map_err(std::io::Error::from).doing("be killed")
        }
        Ok(chosen) if chosen == "stop" || chosen.strip_prefix("stop:") == Some(name) => {
            raise(Signal::SIGSTOP).map_err(std::io::Error::from).doing("be stopped")
        }
        _ => Ok(()),
    }
}

/// Fails if the test has chosen this point of a guard's start, as in [`point`].
#[cfg(debug_assertions)]
pub(crate) fn fail_at(name: &str) -> Result<(), Failure> {
    assert!(GUARDS.contains(&name), "{name:?} is in no list, so no test would choose it");
    match std::env::var("VPN_EXEC_TEST_FAIL").is_ok_and(|chosen| chosen == name) {
        true => Err(Failure::new(format!("cannot go on {name}: a test has it fail"))),
        false => Ok(()),
    }
}

/// Does nothing in a release.
#[cfg(not(debug_assertions))]
pub(crate) fn fail_at(_name: &str) -> Result<(), Failure> {
    Ok(())
}

/// Has the calling process killed at a point of a program's beginning, if the test has chosen it as in [`point`].
#[cfg(debug_assertions)]
pub(crate) fn die_at(name: &str) {
    if std::env::var("VPN_EXEC_TEST_FAIL").is_ok_and(|chosen| chosen.strip_prefix("kill:") == Some(name)) {
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    }
}

/// Does nothing in a release.
#[cfg(not(debug_assertions))]
pub(crate) fn die_at(_name: &str) {}

/// Whether the test has taken a protection away: the environment variable `VPN_EXEC_TEST_BREAK` holds the names of such, with commas
/// between them.
#[cfg(debug_assertions)]
pub(crate) fn is_broken(protection: &str) -> bool {
    assert!(PROTECTIONS.contains(&protection), "{protection:?} is not in the list, so no test would choose it");
    std::env::var("VPN_EXEC_TEST_BREAK").is_ok_and(|broken| broken.split(',').any(|name| name == protection))
}

/// All protections are there in a release.
#[cfg(not(debug_assertions))]
pub(crate) fn is_broken(_protection: &str) -> bool {
    false
}

/// Does nothing in a release.
#[cfg(not(debug_assertions))]
pub(super) fn point(_name: &str) -> Result<(), Failure> {
    Ok(())
}
