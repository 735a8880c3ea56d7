//! Makes a chosen step of a set-up fail, so that a test can see each failure undo itself. Only in builds with debug
//! assertions; a release has none of it.

use super::TunnelError;

/// Fails if the test has chosen this point: the environment variable `VPN_EXEC_TEST_FAIL` holds its name, or `kill:` and its name
/// to have the process killed there instead.
#[cfg(debug_assertions)]
pub(super) fn point(name: &str) -> Result<(), TunnelError> {
    use super::Doing;
    use nix::sys::signal::{Signal, raise};

    match std::env::var("VPN_EXEC_TEST_FAIL") {
        Ok(chosen) if chosen == name => Err(std::io::Error::other("a test has it fail")).doing(format!("go on {name}")),
        Ok(chosen) if chosen.strip_prefix("kill:") == Some(name) => {
            raise(Signal::SIGKILL).map_err(std::io::Error::from).doing("be killed")
        }
        _ => Ok(()),
    }
}

/// Does nothing in a release.
#[cfg(not(debug_assertions))]
pub(super) fn point(_name: &str) -> Result<(), TunnelError> {
    Ok(())
}
