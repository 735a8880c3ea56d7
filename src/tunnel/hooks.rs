//! Runs the file's hooks, if the user has allowed them. They run inside the namespace, so they change the routes and
//! firewall of the tunnel and never see the host's network.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use crate::linux::namespace::NetworkNamespace;
use crate::linux::signals;
use crate::plan::HookPlan;

/// Runs a hook with `/bin/sh` and waits for it.
///
/// # Errors
/// If it cannot be started, or fails. The error does not contain its command, which may hold a secret.
pub(super) fn run(namespace: &NetworkNamespace, hook: &HookPlan) -> io::Result<()> {
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(&hook.command).stdin(Stdio::null()).process_group(0);
    // The keeper blocks all signals.
    signals::unblock_all_in(&mut command);
    // The thread enters the namespace, and its child starts there.
    let status = namespace.run(|| command.status())?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("the command ended with {status}"))) }
}
