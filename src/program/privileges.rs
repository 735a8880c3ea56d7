//! Drops the privileges that the program, and later the launcher, do not need, and checks that they are gone.

use std::io;

use super::Program;
use super::identity::Identity;
use crate::failure::{Doing, Failure};
use crate::linux::capabilities::{self, CapabilitySet, ThreadCapabilities};
use crate::linux::process;
use crate::linux::seccomp::SyscallFilter;
use crate::{fault, keeper};

/// Returns the capabilities that root may have inside with `--new-privs`: those that sudo, runuser and apt-get need to
/// become another user, and to access the files of other users. None of them allows to leave the network namespace, to
/// mount, or to bypass the packet rules.
fn of_root() -> CapabilitySet {
    CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::FOWNER
        | CapabilitySet::FSETID
        | CapabilitySet::KILL
        | CapabilitySet::SETGID
        | CapabilitySet::SETUID
        | CapabilitySet::AUDIT_WRITE
}

/// Gives the calling process the program's user and capabilities, without a way to gain more.
///
/// # Errors
/// Returns an error if a privilege cannot be dropped.
pub(super) fn assume(program: &Program) -> Result<(), Failure> {
    if keeps_privileges() {
        return Ok(());
    }
    let kept = program.kept;
    // Before capabilities are dropped: without no_new_privs, as with --new-privs, this needs CAP_SYS_ADMIN
    // (seccomp(2)).
    SyscallFilter::for_programs().install_without_speculation_limits().doing("restrict the program's system calls")?;
    let gained = if program.new_privileges { of_root() } else { CapabilitySet::empty() };
    capabilities::limit_bounding_set(kept | gained, program.last_capability).doing("clear the bounding set")?;
    capabilities::keep_across_user_change().doing("set the secure bits")?;
    program.identity.assume().doing("change to the program's user")?;
    if program.identity != Identity::Unchanged {
        // A process that inherits a session keyring may read its keys, whatever its user.
        process::join_new_session_keyring().doing("leave the caller's session keyring")?;
    }
    let root = nix::unistd::geteuid().is_root();
    // Root keeps capabilities across execve(2) by its user ID. Other users need the ambient set for that.
    let ambient = !root && !kept.is_empty();
    if ambient {
        capabilities::make_ambient(kept, program.last_capability).doing("keep the capabilities asked for")?;
    }
    let root_is_special = program.new_privileges || (root && !kept.is_empty());
    capabilities::lock_secure_bits(root_is_special, program.new_privileges).doing("lock the secure bits")?;
    let inheritable = if ambient { kept } else { CapabilitySet::empty() };
    capabilities::set(kept, inheritable).doing("drop capabilities")?;
    if !program.new_privileges {
        capabilities::set_no_new_privileges().doing("forbid new privileges")?;
    }
    let state = ThreadCapabilities::read(program.last_capability).doing("read the capabilities")?;
    if !state.is_within(kept) || !state.is_bounded_by(kept | gained) {
        return Err(io::Error::other("the system calls had no effect")).doing("drop capabilities");
    }
    Ok(())
}

/// Returns whether a test has the program keep all privileges.
fn keeps_privileges() -> bool {
    fault::is_broken("privileges")
}

/// Reduces the launcher's capabilities to those for signals to a program of another user, and, if the keeper dies, for
/// starting another keeper or taking the tunnel down. All but CAP_KILL are ineffective until they are needed.
///
/// # Errors
/// Returns the error of the system call that failed.
pub(super) fn limit_supervisor(program: &Program) -> io::Result<()> {
    // A keeper limits its own bounding set, but one that this launcher starts later cannot any more.
    if capabilities::permitted()?.contains(CapabilitySet::SETPCAP) {
        capabilities::raise(CapabilitySet::SETPCAP)?;
        capabilities::limit_bounding_set(program.keeper_bounding_set, program.last_capability)?;
    }
    capabilities::limit(keeper::needed_capabilities(), CapabilitySet::KILL)
}
