//! The state of a tunnel.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Mark;
use crate::failure::Failure;
use crate::linux::namespace::{self, NameLookup, NamespaceId};
use crate::linux::process::ProcessId;
use crate::names::{ContainerId, TunnelName};
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
    /// The container whose network namespace the tunnel is in. None if the namespace is the tunnel's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<Container>,
}

/// The container, or the pod, that a tunnel was made for. Its network namespace belongs to its engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// The engine's identifier of the container or of the pod's sandbox.
    pub id: ContainerId,
    /// The container's first process, with which the tunnel ends. None for a pod, whose network exists before its
    /// processes.
    pub process: Option<ProcessId>,
    /// The pod's attachment to a network, if a network plugin (CNI) made the tunnel.
    pub attachment: Option<NetworkAttachment>,
}

/// A pod's attachment to a network, by which its engine removes the tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkAttachment {
    /// The network's name.
    pub network: String,
    /// The name of the interface in the pod.
    pub interface: String,
    /// The engine's path of the pod's network namespace. The engine removes it with the pod.
    pub path: PathBuf,
    /// That namespace.
    pub namespace: NamespaceId,
}

impl NetworkAttachment {
    /// Returns whether the engine's path still leads to the pod's namespace. When in doubt, the answer is yes.
    fn exists(&self) -> bool {
        match namespace::look_up(&self.path) {
            Ok(NameLookup::Namespace(found)) => found.id().map_or(true, |id| id == self.namespace),
            Ok(NameLookup::Free | NameLookup::File(_)) => false,
            // Not every process may look at every path.
            Err(_) => true,
        }
    }
}

impl fmt::Display for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.attachment.is_some() { "pod" } else { "container" };
        write!(f, "{kind} {}", self.id)
    }
}

impl Container {
    /// Returns whether the container's first process is alive, or the pod's network namespace exists.
    pub fn is_alive(&self) -> bool {
        let has_network = || self.attachment.as_ref().is_none_or(NetworkAttachment::exists);
        self.process.map_or_else(has_network, |process| process.is_alive())
    }

    /// Returns whether another value stands for the same container, or for the same pod, which may be attached to
    /// several networks.
    pub fn is_same(&self, other: &Self) -> bool {
        let namespace = |it: &Self| it.attachment.as_ref().map(|attachment| attachment.namespace);
        self.id == other.id && self.process == other.process && namespace(self) == namespace(other)
    }

    /// Returns the refusal of another use of the container's tunnel.
    pub fn refuse_other_use(&self, name: &TunnelName) -> Failure {
        Failure::new(format!("the tunnel {name} serves the {self}: a key cannot serve two")).advise(
            "give each container a profile with a key of its own; to run a program in that container, use its engine, \
             for example `podman exec`",
        )
    }

    /// Fails if the container is still running.
    ///
    /// # Errors
    /// The refusal to remove its tunnel.
    pub fn require_ended(&self, name: &TunnelName) -> Result<(), Failure> {
        if !self.is_alive() {
            return Ok(());
        }
        Err(Failure::new(format!("the {self} is running in the tunnel {name}"))
            .advise("stop it first; with --force, the tunnel is removed, and the container stays cut off"))
    }
}

/// A launcher that holds a lease on a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The launcher's process.
    pub process: ProcessId,
    /// The mount namespace of its program, once it runs. It identifies the processes that the program leaves behind.
    pub mounts: Option<NamespaceId>,
}
