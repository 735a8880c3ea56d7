//! Capabilities (capabilities(7)) of the calling thread, the secure bits and `no_new_privs`.

use std::fmt;
use std::fs;
use std::io;

pub use rustix::thread::CapabilitySet;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySets};

/// The number of the highest capability that the running kernel knows.
pub fn last() -> io::Result<u8> {
    fs::read_to_string("/proc/sys/kernel/cap_last_cap")?.trim().parse().map_err(io::Error::other)
}

/// The set that holds only the capability of a number. Empty for a number that no set can hold.
pub fn from_number(number: u8) -> CapabilitySet {
    CapabilitySet::from_bits_retain(1_u64.checked_shl(number.into()).unwrap_or(0))
}

/// Makes `permitted` all that the calling thread can have, and `effective` what it has now; no inheritable ones. What is in
/// neither is gone for good. Capabilities that the thread does not have are left out silently: an ordinary user has none.
pub fn limit(permitted: CapabilitySet, effective: CapabilitySet) -> io::Result<()> {
    let now = rustix::thread::capabilities(None)?;
    let permitted = permitted & now.permitted;
    let sets = CapabilitySets { permitted, effective: effective & permitted, inheritable: CapabilitySet::empty() };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

/// Makes permitted capabilities effective.
pub fn raise(capabilities: CapabilitySet) -> io::Result<()> {
    let mut sets = rustix::thread::capabilities(None)?;
    sets.effective |= capabilities & sets.permitted;
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

/// Does something with permitted capabilities made effective, and leaves all as it was.
pub fn with_raised<T>(capabilities: CapabilitySet, work: impl FnOnce() -> T) -> io::Result<T> {
    let former = rustix::thread::capabilities(None)?;
    raise(capabilities)?;
    let done = work();
    rustix::thread::set_capabilities(None, former)?;
    Ok(done)
}

/// The capabilities that the calling thread may make effective.
pub fn permitted() -> io::Result<CapabilitySet> {
    Ok(rustix::thread::capabilities(None)?.permitted)
}

/// Removes all but `kept` from the bounding set, up to the kernel's last capability, so that no program executed later can gain
/// them from a file.
///
/// # Errors
/// `EPERM` without CAP_SETPCAP, unless there was nothing to remove.
pub fn limit_bounding_set(kept: CapabilitySet, last: u8) -> io::Result<()> {
    for number in 0..=last {
        let capability = from_number(number);
        if !kept.contains(capability) && rustix::thread::capability_is_in_bounding_set(capability)? {
            rustix::thread::remove_capability_from_bounding_set(capability)?;
        }
    }
    Ok(())
}

/// Makes exactly `kept` permitted and effective, and `inheritable` inheritable.
///
/// # Errors
/// `EPERM` if one of them is not permitted.
pub fn set(kept: CapabilitySet, inheritable: CapabilitySet) -> io::Result<()> {
    Ok(rustix::thread::set_capabilities(None, CapabilitySets { permitted: kept, effective: kept, inheritable })?)
}

/// Makes `kept` inheritable and ambient, so that a program executed by a user who is not root has them.
///
/// # Errors
/// `EPERM` if one of them is not permitted.
pub fn make_ambient(kept: CapabilitySet, last: u8) -> io::Result<()> {
    let mut sets = rustix::thread::capabilities(None)?;
    sets.inheritable = kept;
    rustix::thread::set_capabilities(None, sets)?;
    rustix::thread::clear_ambient_capability_set()?;
    for number in 0..=last {
        let capability = from_number(number);
        if kept.contains(capability) {
            rustix::thread::configure_capability_in_ambient_set(capability, true)?;
        }
    }
    Ok(())
}

/// Lets capabilities survive a change from root to another user, until they are dropped by name.
///
/// # Errors
/// `EPERM` without CAP_SETPCAP.
pub fn keep_across_user_change() -> io::Result<()> {
    Ok(rustix::thread::set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)?)
}

/// Locks the secure bits: no more capabilities can be made ambient, no change of users brings or takes any unless `fix_up`, and, unless
/// `root_is_special`, user ID 0 has none by being 0. None of this can be undone.
///
/// PR_SET_KEEPCAPS stays allowed. It says what setuid(2) takes away, which is nothing without the fix-up; programs that ask for it, such as
/// ping(8), end where they may not.
///
/// # Errors
/// `EPERM` without CAP_SETPCAP.
pub fn lock_secure_bits(root_is_special: bool, fix_up: bool) -> io::Result<()> {
    let mut bits = CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    if !fix_up {
        bits |= CapabilitiesSecureBits::NO_SETUID_FIXUP;
    }
    if !root_is_special {
        bits |= CapabilitiesSecureBits::NO_ROOT;
    }
    Ok(rustix::thread::set_capabilities_secure_bits(bits)?)
}

/// Forbids the calling thread, and all that it executes, to gain privileges by executing a file (prctl(2)).
pub fn set_no_new_privileges() -> io::Result<()> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}

/// All capability sets of the calling thread: what a test or a check compares.
pub struct ThreadCapabilities(CapabilitySets);

impl ThreadCapabilities {
    /// Reads them.
    pub fn read() -> io::Result<Self> {
        Ok(Self(rustix::thread::capabilities(None)?))
    }

    /// Whether nothing but `kept` is in any set.
    pub fn is_within(&self, kept: CapabilitySet) -> bool {
        (self.0.permitted | self.0.effective | self.0.inheritable).difference(kept).is_empty()
    }
}

impl fmt::Debug for ThreadCapabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}
