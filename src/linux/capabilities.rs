//! The capabilities (capabilities(7)) of the calling thread, its secure bits and `no_new_privs`.
//!
//! Sets are changed with rustix: one capset(2) changes the permitted, effective and inheritable set at once, error
//! numbers are kept, and capabilities that no library has a name for yet are included. [`ThreadCapabilities`], which
//! verifies the result, reads the bounding and the ambient set with the `caps` crate.

use std::fmt;
use std::fs;
use std::io;
use std::sync::OnceLock;

use caps::CapSet;
pub use rustix::thread::CapabilitySet;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySets};

/// Returns the number of the running kernel's last capability.
///
/// # Errors
/// Fails if `/proc/sys/kernel/cap_last_cap` cannot be read.
pub fn last() -> io::Result<u8> {
    static LAST: OnceLock<u8> = OnceLock::new();
    if let Some(last) = LAST.get() {
        return Ok(*last);
    }
    let last = fs::read_to_string("/proc/sys/kernel/cap_last_cap")?.trim().parse().map_err(io::Error::other)?;
    Ok(*LAST.get_or_init(|| last))
}

/// Returns the set that holds only the capability of a number. It is empty for numbers above 63.
pub fn from_number(number: u8) -> CapabilitySet {
    CapabilitySet::from_bits_retain(1_u64.checked_shl(number.into()).unwrap_or(0))
}

/// Limits the calling thread to the `permitted` and the `effective` capabilities, and clears the inheritable set.
///
/// Capabilities outside of `permitted` are gone for good. Capabilities that the thread does not have are ignored: an
/// ordinary user has none.
///
/// # Errors
/// Fails as capset(2) does.
pub fn limit(permitted: CapabilitySet, effective: CapabilitySet) -> io::Result<()> {
    let now = rustix::thread::capabilities(None)?;
    let permitted = permitted & now.permitted;
    let sets = CapabilitySets { permitted, effective: effective & permitted, inheritable: CapabilitySet::empty() };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

/// Makes permitted capabilities effective.
///
/// # Errors
/// Fails as capset(2) does.
pub fn raise(capabilities: CapabilitySet) -> io::Result<()> {
    let mut sets = rustix::thread::capabilities(None)?;
    sets.effective |= capabilities & sets.permitted;
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

/// Runs `work` with permitted capabilities made effective, and restores the sets afterwards.
///
/// # Errors
/// Fails as capset(2) does.
pub fn with_raised<T>(capabilities: CapabilitySet, work: impl FnOnce() -> T) -> io::Result<T> {
    let former = rustix::thread::capabilities(None)?;
    raise(capabilities)?;
    let result = work();
    rustix::thread::set_capabilities(None, former)?;
    Ok(result)
}

/// Returns the permitted set of the calling thread.
///
/// # Errors
/// Fails as capget(2) does.
pub fn permitted() -> io::Result<CapabilitySet> {
    Ok(rustix::thread::capabilities(None)?.permitted)
}

/// Returns the effective set of the calling thread.
///
/// # Errors
/// Fails as capget(2) does.
pub fn effective() -> io::Result<CapabilitySet> {
    Ok(rustix::thread::capabilities(None)?.effective)
}

/// Removes all capabilities but `kept` from the bounding set, up to the kernel's `last` capability. A program that is
/// executed later cannot gain them from a file.
///
/// # Errors
/// Fails with `EPERM` without CAP_SETPCAP, unless there was nothing to remove.
pub fn limit_bounding_set(kept: CapabilitySet, last: u8) -> io::Result<()> {
    for capability in (0..=last).map(from_number) {
        if !kept.contains(capability) && rustix::thread::capability_is_in_bounding_set(capability)? {
            rustix::thread::remove_capability_from_bounding_set(capability)?;
        }
    }
    Ok(())
}

/// Replaces the permitted and the effective set by `kept`, and the inheritable set by `inheritable`.
///
/// # Errors
/// Fails with `EPERM` if one of the capabilities is not permitted.
pub fn set(kept: CapabilitySet, inheritable: CapabilitySet) -> io::Result<()> {
    Ok(rustix::thread::set_capabilities(None, CapabilitySets { permitted: kept, effective: kept, inheritable })?)
}

/// Makes `kept` inheritable and ambient, so that programs executed by a user other than root have them.
///
/// # Errors
/// Fails with `EPERM` if one of the capabilities is not permitted.
pub fn make_ambient(kept: CapabilitySet, last: u8) -> io::Result<()> {
    let mut sets = rustix::thread::capabilities(None)?;
    sets.inheritable = kept;
    rustix::thread::set_capabilities(None, sets)?;
    rustix::thread::clear_ambient_capability_set()?;
    for capability in (0..=last).map(from_number) {
        if kept.contains(capability) {
            rustix::thread::configure_capability_in_ambient_set(capability, true)?;
        }
    }
    Ok(())
}

/// Keeps capabilities across a change from root to another user, until they are dropped explicitly.
///
/// # Errors
/// Fails with `EPERM` without CAP_SETPCAP.
pub fn keep_across_user_change() -> io::Result<()> {
    Ok(rustix::thread::set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)?)
}

/// Sets and locks the secure bits. No more capabilities can be made ambient.
///
/// Unless `fix_up`, a change of user neither adds nor removes capabilities. Unless `root_is_special`, user ID 0 alone
/// brings no capabilities. None of this can be undone.
///
/// `PR_SET_KEEPCAPS` stays allowed. It has no effect without the fix-up, and programs that use it, such as ping(8),
/// exit if they may not.
///
/// # Errors
/// Fails with `EPERM` without CAP_SETPCAP.
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

/// Sets `no_new_privs`: neither the calling thread nor any program that it executes can gain privileges by executing a
/// file (prctl(2)).
///
/// # Errors
/// Fails as prctl(2) does.
pub fn set_no_new_privileges() -> io::Result<()> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}

/// All capability sets of the calling thread.
pub struct ThreadCapabilities {
    sets: CapabilitySets,
    ambient: CapabilitySet,
    bounding: CapabilitySet,
}

impl ThreadCapabilities {
    /// Reads the sets of the calling thread. `last` is the kernel's last capability.
    ///
    /// # Errors
    /// Fails as capget(2) and prctl(2) do.
    pub fn read(last: u8) -> io::Result<Self> {
        let known = |set: CapSet| {
            let capabilities = caps::read(None, set).map_err(io::Error::other)?;
            Ok::<_, io::Error>(
                capabilities.into_iter().fold(CapabilitySet::empty(), |all, one| all | from_number(one.index())),
            )
        };
        let mut bounding = known(CapSet::Bounding)?;
        let first_unnamed = caps::all().iter().map(caps::Capability::index).max().map_or(0, |last| last + 1);
        for capability in (first_unnamed..=last).map(from_number) {
            if rustix::thread::capability_is_in_bounding_set(capability)? {
                bounding |= capability;
            }
        }
        // Only permitted and inheritable capabilities can be ambient, so `sets` covers those without a name.
        Ok(Self { sets: rustix::thread::capabilities(None)?, ambient: known(CapSet::Ambient)?, bounding })
    }

    /// Returns whether the permitted, effective, inheritable and ambient sets hold nothing but `kept`.
    pub fn is_within(&self, kept: CapabilitySet) -> bool {
        let CapabilitySets { permitted, effective, inheritable } = self.sets;
        (permitted | effective | inheritable | self.ambient).difference(kept).is_empty()
    }

    /// Returns whether the bounding set holds nothing but `kept`.
    pub fn is_bounded_by(&self, kept: CapabilitySet) -> bool {
        self.bounding.difference(kept).is_empty()
    }
}

impl fmt::Debug for ThreadCapabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sets, ambient, bounding } = self;
        write!(f, "{sets:?}, ambient {ambient:?}, bounding {bounding:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sets_read_are_those_that_the_kernel_shows() {
        let status = fs::read_to_string("/proc/thread-self/status").expect("a status");
        let shown = |name: &str| {
            let mask = status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
            CapabilitySet::from_bits_retain(u64::from_str_radix(mask.trim(), 16).expect(name))
        };
        let read = ThreadCapabilities::read(last().expect("the last capability")).expect("the sets");
        assert_eq!((read.bounding, read.ambient), (shown("CapBnd:"), shown("CapAmb:")));
        assert_eq!(read.sets.permitted, shown("CapPrm:"));
        assert!(read.is_within(shown("CapPrm:") | shown("CapInh:")) && read.is_bounded_by(shown("CapBnd:")));
    }

    #[test]
    fn a_capability_that_is_left_over_is_noticed() {
        let last = last().expect("the last capability");
        let sets = CapabilitySets {
            permitted: CapabilitySet::empty(),
            effective: CapabilitySet::empty(),
            inheritable: CapabilitySet::empty(),
        };
        for number in [0, last, last + 1, 63] {
            let (one, none) = (from_number(number), CapabilitySet::empty());
            let ambient = ThreadCapabilities { sets, ambient: one, bounding: none };
            assert!(!ambient.is_within(none) && ambient.is_within(one));
            let bounding = ThreadCapabilities { sets, ambient: none, bounding: one };
            assert!(!bounding.is_bounded_by(none) && bounding.is_bounded_by(one));
        }
    }
}
