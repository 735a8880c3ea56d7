//! The state of a tunnel.

use serde::{Deserialize, Serialize};

use super::Mark;
use crate::linux::namespace::NamespaceId;
use crate::linux::process::ProcessId;
use crate::wireguard::Backend;

/// The state of a tunnel. It is written before anything is created that could outlive the keeper, and at every change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelState {
    /// The mark of the tunnel's own objects.
    pub mark: Mark,
    /// The tunnel's network namespace.
    pub namespace: NamespaceId,
    /// The keeper's process ID.
    pub keeper: u32,
    /// The WireGuard implementation, once the tunnel is completely created. Until then it cannot be taken over.
    pub made: Option<Backend>,
    /// Whether the tunnel stays up when no lease is left.
    pub standing: bool,
    /// The launchers that hold a lease.
    pub holders: Vec<Holder>,
}

/// A launcher that holds a lease on a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The launcher's process.
    pub process: ProcessId,
    /// The mount namespace of its program, once it runs. It identifies the processes that the program leaves behind.
    pub mounts: Option<NamespaceId>,
}
