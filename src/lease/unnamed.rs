//! What a successor of a rootless tunnel's keeper has to get from it. The machine's tunnels have it on the disk.

use std::io;

use super::Lease;
use super::handover::Handover;
use crate::linux::namespace::NetworkNamespace;
use crate::plan::Plan;
use crate::registry::TunnelState;

/// What a keeper of a rootless tunnel passes on, since other programs of its user can replace what is on the disk.
#[derive(Debug)]
pub struct UnnamedTunnel {
    /// Its plan.
    pub plan: Plan,
    /// Its network namespace, which has no name.
    pub namespace: NetworkNamespace,
}

impl UnnamedTunnel {
    /// Fails unless a state from the disk is this tunnel's. A replaced state with the right namespace can name another
    /// mark, which fails later, or other launchers, whose programs in this namespace the successor may end.
    ///
    /// # Errors
    /// If it is another's.
    pub fn require_state(&self, state: &TunnelState) -> io::Result<()> {
        if state.namespace == self.namespace.id()? && state.container.is_none() {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "its state on the disk is that of another tunnel"))
    }
}

impl Lease {
    /// Returns what a successor of a rootless tunnel's keeper needs besides the configuration.
    ///
    /// # Errors
    /// If the keeper has not passed it.
    pub fn unnamed(&self) -> io::Result<UnnamedTunnel> {
        let missing =
            || io::Error::new(io::ErrorKind::InvalidData, "its keeper did not pass its plan and its namespace");
        let handover = Handover::open(self.handover().ok_or_else(missing)?)?;
        let namespace = self.namespace().ok_or_else(missing)?.try_clone()?;
        let plan = handover.plan().ok_or_else(missing)?.clone();
        if !plan.rootless || plan.hooks.iter().any(|hook| hook.run) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "its keeper passed the plan of another kind of tunnel",
            ));
        }
        Ok(UnnamedTunnel { plan, namespace })
    }
}
