//! Confines the process of a guard.

use crate::failure::{Doing, Failure};
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::process;
use crate::linux::seccomp::SyscallFilter;
use crate::program::helpers;
use crate::program::identity::Identity;

/// The system calls of every guard, besides [`helpers::BASE_CALLS`]: those for its messages.
const CALLS: &[libc::c_long] =
    &[libc::SYS_ioctl, libc::SYS_sendto, libc::SYS_sendmsg, libc::SYS_recvfrom, libc::SYS_recvmsg];

/// The confinement of a guard.
pub(super) struct Confinement<'a> {
    /// The program's identity, which is also the guard's.
    pub(super) identity: &'a Identity,
    /// The launcher's PID. The guard ends with the launcher.
    pub(super) launcher: u32,
    /// The descriptors that stay open.
    pub(super) descriptors: &'a mut [i32],
    pub(super) capabilities: CapabilitySet,
    /// The system calls besides those of every guard.
    pub(super) calls: &'a [libc::c_long],
    /// The families of sockets that it may create.
    pub(super) families: &'a [libc::c_int],
    /// Whether other processes of the user may inspect it in `/proc`.
    pub(super) is_inspectable: bool,
}

impl Confinement<'_> {
    /// Confines the calling process.
    ///
    /// # Errors
    /// Returns an error if a privilege cannot be dropped.
    pub(super) fn apply(self) -> Result<(), Failure> {
        let calls = [helpers::BASE_CALLS, CALLS, self.calls].concat();
        let filter = SyscallFilter::allow_only(&calls, self.families).doing("make a filter of system calls")?;
        helpers::detach(self.descriptors).doing("close inherited files")?;
        let last = capabilities::last().doing("read the kernel's last capability")?;
        capabilities::limit_bounding_set(CapabilitySet::empty(), last).doing("clear the bounding set")?;
        capabilities::keep_across_user_change().doing("set the secure bits")?;
        self.identity.assume().doing("change to the program's user")?;
        capabilities::limit(self.capabilities, self.capabilities).doing("drop capabilities")?;
        capabilities::set_no_new_privileges().doing("forbid new privileges")?;
        let inspection = match self.is_inspectable {
            true => process::enable_ptrace_and_core_dumps(),
            false => process::disable_ptrace_and_core_dumps(),
        };
        inspection.doing("set whether other processes may inspect it")?;
        // The change of the user above would undo it.
        helpers::end_with_parent(self.launcher).doing("end with the launcher")?;
        filter.install().doing("restrict system calls")
    }
}
