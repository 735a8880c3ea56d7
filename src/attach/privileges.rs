//! The capabilities of the process, and how it limits itself once the tunnel is up.

use std::io;

use crate::keeper;
use crate::linux::capabilities::{self, CapabilitySet};

/// Limits the process to what its remaining work needs. It keeps CAP_NET_ADMIN only if the packet rules have to follow
/// an endpoint whose address may change.
pub(super) fn limit(keeps_net_admin: bool) -> io::Result<()> {
    let kept = if keeps_net_admin { CapabilitySet::NET_ADMIN } else { CapabilitySet::empty() };
    // It executes nothing, so the bounding set does not matter. Dropping from it would need CAP_SETPCAP.
    capabilities::set_no_new_privileges()?;
    capabilities::limit(kept, kept)?;
    keeper::limit_attached_process()
}

/// Limits the calling thread to the data path's work.
pub(super) fn limit_data_path() -> io::Result<()> {
    keeper::limit_data_path()
}
