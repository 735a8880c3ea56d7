//! The capabilities of a keeper, and how it limits itself once the tunnel is up.

use std::io;

use super::system_calls;
use crate::linux::capabilities::{self, CapabilitySet};
use crate::wireguard::Backend;

/// Returns the capabilities that creating, watching and removing a tunnel needs: for the namespace and its mounts, for
/// the network inside, and for finding and killing the processes that run there.
pub fn needed_capabilities() -> CapabilitySet {
    CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN | CapabilitySet::KILL | CapabilitySet::SYS_PTRACE
}

/// Returns the capability that binding to these ports needs, if one of them is below 1024 (ip(7)).
pub fn capabilities_for_ports(ports: impl IntoIterator<Item = u16>) -> CapabilitySet {
    match ports.into_iter().any(|port| (1..1024).contains(&port)) {
        true => CapabilitySet::NET_BIND_SERVICE,
        false => CapabilitySet::empty(),
    }
}

/// Returns the capabilities that a hook gains when it is executed as root, which are those that configure a network.
/// This is the keeper's bounding set.
pub fn gained_by_hooks(hooks: bool) -> CapabilitySet {
    if hooks { CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW } else { CapabilitySet::empty() }
}

/// Drops all capabilities except the needed ones, and limits the bounding set to [`gained_by_hooks`].
pub(super) fn drop_except(needed: CapabilitySet, hooks: bool) -> io::Result<()> {
    capabilities::limit_bounding_set(gained_by_hooks(hooks), capabilities::last()?)?;
    capabilities::limit(needed, needed)
}

/// Limits the effective capabilities to those of a keeper whose tunnel is up.
pub(super) fn limit_to_running() -> io::Result<()> {
    capabilities::limit(needed_capabilities(), CapabilitySet::NET_ADMIN)
}

/// Runs a function with all of the keeper's permitted capabilities.
///
/// # Errors
/// If the capabilities cannot be raised or dropped again.
pub(super) fn with_all_capabilities<T>(work: impl FnOnce() -> T) -> io::Result<T> {
    capabilities::with_raised(needed_capabilities(), work)
}

/// Installs the keeper's system call filter.
pub(super) fn limit_system_calls(backend: Option<Backend>) -> io::Result<()> {
    let filter = system_calls::keeper()?;
    match backend {
        // The only other thread is the embedded device's, which has a stricter filter.
        Some(Backend::Userspace) => filter.install(),
        _ => filter.install_in_all_threads(),
    }
}

/// Limits the calling thread to the data path's work: moving bytes between descriptors that are open already.
///
/// # Errors
/// Fails if the kernel refuses the filter of system calls, or to drop the capabilities.
pub fn limit_data_path() -> io::Result<()> {
    system_calls::data_path()?.install()?;
    capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty())
}

/// Installs the system call filter of a process that has attached a tunnel to a container's namespace.
pub(crate) fn limit_attached_process() -> io::Result<()> {
    system_calls::attached()?.install()
}

/// Limits the calling thread to a port relay's work: accepting and opening connections, and moving bytes between them.
pub(super) fn limit_relay() -> io::Result<()> {
    system_calls::relay()?.install()?;
    capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty())
}

/// Limits the calling thread to opening the sockets from which the relay to local networks replies.
pub(super) fn limit_replies() -> io::Result<()> {
    system_calls::replies()?.install()?;
    capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty())
}

/// Limits the calling thread to the work of the DNS forwarder: accepting clients, and connecting sockets that are open
/// already.
///
/// # Errors
/// If the kernel refuses.
pub fn limit_dns_forwarder() -> io::Result<()> {
    system_calls::dns_forwarder()?.install()?;
    capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ports_below_1024_need_a_capability() {
        assert_eq!(capabilities_for_ports([]), CapabilitySet::empty());
        // Port 0 lets the kernel choose an unprivileged port.
        assert_eq!(capabilities_for_ports([0, 1024, 51820]), CapabilitySet::empty());
        assert_eq!(capabilities_for_ports([51820, 53]), CapabilitySet::NET_BIND_SERVICE);
    }
}
