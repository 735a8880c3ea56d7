//! The capabilities of the process, and how it limits itself once the tunnel is up.

use std::io;

use crate::keeper;
use crate::linux::capabilities::{self, CapabilitySet};

/// Limits the process to what its remaining work needs, and to these capabilities.
pub(super) fn limit(kept: CapabilitySet) -> io::Result<()> {
    // It executes nothing, so the bounding set does not matter. Dropping from it would need CAP_SETPCAP.
    capabilities::set_no_new_privileges()?;
    capabilities::limit(kept, kept)?;
    keeper::limit_attached_process()
}

/// Drops further capabilities of the process, once they are not needed any more.
pub(super) fn keep_only(kept: CapabilitySet) -> io::Result<()> {
    capabilities::limit(kept, kept)
}

/// Limits the calling thread to the data path's work.
pub(super) fn limit_data_path() -> io::Result<()> {
    keeper::limit_data_path()
}
