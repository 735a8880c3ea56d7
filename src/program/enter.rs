//! Gives the calling process a mount namespace of its own, and joins the tunnel's network namespace.

use std::io;
use std::path::{Path, PathBuf};

use super::{Program, SetupResult, gnupg, view};
use crate::fault;
use crate::linux::mirror::Mirror;
use crate::linux::mounts;
use crate::linux::namespace::{NameLookup, NamesDirectory};

/// What a process needs from the host's side of its mount namespace, once it has one of its own.
pub(super) struct Isolated {
    names: NamesDirectory,
    directory: io::Result<PathBuf>,
    /// Its view of the host's files, to be kept up to date.
    pub(super) mirror: Mirror,
}

/// Moves the calling process into a mount namespace of its own, with its own view of names. The tunnel need not be there yet.
pub(super) fn isolate(program: &Program) -> SetupResult<Isolated> {
    let doing = |what| move |error: io::Error| (what, error);
    let names = NamesDirectory::open().map_err(doing("open the tunnel's namespace"))?;
    let directory = std::env::current_dir();
    mounts::unshare().map_err(doing("make a mount namespace"))?;
    let mirror = view::show(program)?;
    // Where all sockets are open, the host's own services are wanted.
    if !program.sockets.any && !fault::is_broken("sockets") {
        gnupg::provide(&program.identity).map_err(doing("give the program places of its own"))?;
    }
    Ok(Isolated { names, directory, mirror })
}

/// Moves the calling process, which is isolated already, into the program's network namespace.
pub(super) fn enter(program: &Program, isolated: Isolated) -> SetupResult<()> {
    let doing = |what| move |error: io::Error| (what, error);
    match isolated.names.look_up(&program.namespace).map_err(doing("open the tunnel's namespace"))? {
        NameLookup::Namespace(_) if fault::is_broken("namespace") => {}
        NameLookup::Namespace(namespace) => namespace.enter().map_err(doing("enter the tunnel's namespace"))?,
        NameLookup::File(_) | NameLookup::Free => {
            return Err(("open the tunnel's namespace", io::Error::from(io::ErrorKind::NotFound)));
        }
    }
    // A sysfs shows the network namespace in which it was mounted, so this comes last.
    show_own_sys().map_err(doing("mount /sys for the tunnel's namespace"))?;
    if !program.new_privileges
        && let Err(error) = mounts::set_nosuid_everywhere()
    {
        // Nothing is gained by a file in any case. But where a file has capabilities that a program cannot have, as Debian's ping has, the
        // kernel does not execute it at all, though it may do without them.
        tracing::debug!(%error, "files with capabilities cannot be executed");
    }
    // The working directory may lie in what is covered now; by its name it is found as the program will see it. From one that it does
    // not see, it could look around in what is covered.
    let found = isolated.directory.and_then(std::env::set_current_dir);
    found.or_else(|_| std::env::set_current_dir("/")).map_err(doing("find the working directory"))
}

fn show_own_sys() -> io::Result<()> {
    if !Path::new("/sys/class/net").exists() {
        return Ok(());
    }
    mounts::replace_sysfs().or_else(|error| {
        tracing::debug!(%error, "/sys cannot be mounted anew, so the interfaces in it are hidden");
        mounts::hide_sysfs_interfaces()
    })
}
