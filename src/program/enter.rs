//! Moves the program's process into its own mount namespace, and then into the tunnel's network namespace.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::shared_view::SharedView;
use super::{Program, gnupg, view};
use crate::failure::{Doing, Failure};
use crate::fault;
use crate::linux::mounts;
use crate::linux::namespace::{NameLookup, NamesDirectory, NetworkNamespace};
use crate::linux::signals::InheritedSignals;

/// A process in its own mount namespace, with what it has kept from the host's.
pub(super) struct Isolated {
    /// The host's directory of namespace names, if the tunnel's namespace has one.
    names: Option<NamesDirectory>,
    /// The working directory.
    directory: io::Result<PathBuf>,
    /// The mounts below `/sys`.
    in_sysfs: io::Result<Vec<PathBuf>>,
}

/// The process that starts the program's process, and what that needs of it.
pub(super) struct Starter<'a> {
    /// The launcher's PID.
    pub(super) launcher: u32,
    /// The socket at which helpers announce themselves.
    pub(super) helpers: &'a OwnedFd,
    /// The signal mask from before the launcher blocked signals.
    pub(super) inherited: InheritedSignals,
}

/// Moves the calling process into its own mount namespace, with the program's view of files: the one that the tunnel's
/// programs share, or one of its own. Starts the process that keeps it up to date. Does not need the tunnel yet.
///
/// # Errors
/// Returns an error if a file system cannot be mounted, or a file of the host not be read.
pub(super) fn isolate(
    program: &Program,
    shared: Option<SharedView>,
    starter: &Starter<'_>,
) -> Result<Isolated, Failure> {
    let has_name = program.namespace.is_some();
    let names = has_name.then(NamesDirectory::open).transpose().doing("open the tunnel's namespace")?;
    let directory = std::env::current_dir();
    // Read before the view is made: that has hundreds of mounts, which the kernel would list as well.
    let in_sysfs = mounts::mounted_below("/sys");
    let entered = shared.map(|view| view.enter(program, starter));
    if let Some(Err(failure)) = &entered {
        tracing::debug!(%failure, "the program gets a view of its own");
    }
    if !matches!(entered, Some(Ok(()))) {
        mounts::unshare().doing("make a mount namespace")?;
        let mut mirror = view::show(program)?;
        if let Err(error) = view::keep_up_to_date(&mut mirror, program.last_capability, starter) {
            // The program then misses later changes of the host's files.
            tracing::debug!(%error, "cannot keep the program's view up to date");
        }
    }
    // With `--socket any` the program is to use the host's services.
    if program.has_guarded_sockets() {
        gnupg::hide_dirmngr(&program.identity).doing("hide GnuPG's dirmngr")?;
    }
    Ok(Isolated { names, directory, in_sysfs })
}

/// Moves an isolated process into the tunnel's network namespace, which is `passed` if it has no name.
///
/// # Errors
/// Returns an error if the namespace does not exist, or cannot be entered.
pub(super) fn enter(program: &Program, isolated: Isolated, passed: Option<NetworkNamespace>) -> Result<(), Failure> {
    let what = "open the tunnel's namespace";
    let namespace = match (isolated.names, &program.namespace) {
        (Some(names), Some(path)) => match names.look_up(path).doing(what)? {
            NameLookup::Namespace(namespace) => Some(namespace),
            NameLookup::File(_) | NameLookup::Free => None,
        },
        _ => passed,
    };
    let namespace = namespace.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound)).doing(what)?;
    join(namespace).doing("enter the tunnel's namespace")?;
    // A sysfs shows the network namespace in which it was mounted.
    mount_sysfs(isolated.in_sysfs).doing("mount /sys for the tunnel's namespace")?;
    if !program.new_privileges
        && let Err(error) = mounts::set_nosuid_everywhere()
    {
        // The program gains nothing by a file in any case. But the kernel refuses to execute a file with capabilities
        // that the program cannot have, such as Debian's ping, which works without.
        tracing::debug!(%error, "files with capabilities cannot be executed");
    }
    // The old working directory may be covered now, and give access to what is covered.
    let entered = isolated.directory.and_then(std::env::set_current_dir);
    entered.or_else(|_| std::env::set_current_dir("/")).doing("enter the working directory")
}

fn join(namespace: NetworkNamespace) -> io::Result<()> {
    if fault::is_broken("namespace") { Ok(()) } else { namespace.enter() }
}

/// Mounts a sysfs for the tunnel's namespace, or hides the interfaces in the host's.
fn mount_sysfs(below: io::Result<Vec<PathBuf>>) -> io::Result<()> {
    if !Path::new("/sys/class/net").exists() {
        return Ok(());
    }
    below.and_then(|below| mounts::replace_sysfs(&below)).or_else(|error| {
        tracing::debug!(%error, "cannot mount a sysfs, so its interfaces are hidden");
        mounts::hide_sysfs_interfaces()
    })
}
