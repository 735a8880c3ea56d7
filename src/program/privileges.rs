//! Gives up what the program, and then its supervisor, do not need, and checks that it is gone.

use std::io;

use super::identity::Identity;
use super::{Program, SetupResult};
use crate::linux::capabilities::{self, CapabilitySet, ThreadCapabilities};
use crate::linux::process;
use crate::linux::seccomp::SyscallFilter;
use crate::{fault, keeper};

/// What root may have inside with `--new-privs`, be it that the program is root already or becomes root by a set-user-ID file: what it takes
/// to become another user and to deal with the files of others, as sudo, runuser and apt-get do. Nothing of it brings a network: the namespace
/// cannot be left by it, nor can anything be mounted, and packets pass the rules.
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

/// Makes the calling process the program's user with the program's capabilities and no way to more.
pub(super) fn assume(program: &Program) -> SetupResult<()> {
    if fault::is_broken("privileges") {
        return Ok(());
    }
    let doing = |what| move |error: io::Error| (what, error);
    let kept = program.kept;
    // First, as one that may gain privileges later could not do it without those that are about to go.
    SyscallFilter::for_programs()
        .install_without_speculation_limits()
        .map_err(doing("restrict the program's system calls"))?;
    let gained = if program.new_privileges { of_root() } else { CapabilitySet::empty() };
    capabilities::limit_bounding_set(kept | gained, program.last_capability)
        .map_err(doing("clear the bounding set"))?;
    capabilities::keep_across_user_change().map_err(doing("set the secure bits"))?;
    program.identity.assume().map_err(doing("change to the program's user"))?;
    if program.identity != Identity::Unchanged {
        // A session keyring is inherited, and whoever has it inherited may read its keys, whatever user that is.
        process::join_new_session_keyring().map_err(doing("leave the caller's session keyring"))?;
    }
    let root = nix::unistd::geteuid().is_root();
    // Root has its capabilities by being root, within the bounding set. Only others need the ambient set for that.
    let ambient = !root && !kept.is_empty();
    if ambient {
        capabilities::make_ambient(kept, program.last_capability).map_err(doing("keep the capabilities asked for"))?;
    }
    let root_is_special = program.new_privileges || (root && !kept.is_empty());
    capabilities::lock_secure_bits(root_is_special, program.new_privileges).map_err(doing("lock the secure bits"))?;
    let inheritable = if ambient { kept } else { CapabilitySet::empty() };
    capabilities::set(kept, inheritable).map_err(doing("drop capabilities"))?;
    if !program.new_privileges {
        capabilities::set_no_new_privileges().map_err(doing("forbid new privileges"))?;
    }
    let state = ThreadCapabilities::read().map_err(doing("read the capabilities"))?;
    if !state.is_within(kept) {
        return Err(("drop capabilities", io::Error::other("they are still there")));
    }
    Ok(())
}

/// What remains for the supervisor: it may signal a program of another user, and, should the keeper die, start another one, or take
/// the tunnel down in its place. Nothing of that is effective until it is needed.
pub(super) fn limit_supervisor(program: &Program) -> io::Result<()> {
    // A keeper does this for itself, but one that is started later could not any more.
    if capabilities::permitted()?.contains(CapabilitySet::SETPCAP) {
        capabilities::raise(CapabilitySet::SETPCAP)?;
        capabilities::limit_bounding_set(program.keeper_gains, program.last_capability)?;
    }
    capabilities::limit(keeper::needed_capabilities(), CapabilitySet::KILL)
}
