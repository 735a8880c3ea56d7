//! Finds the namespaces of a rootless tunnel, which have no names, by the processes in them.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;

use crate::failure::{Doing, Failure};
use crate::fault;
use crate::linux::namespace::NetworkNamespace;
use crate::linux::netlink::Netlink;
use crate::linux::process::{self, Forked};
use crate::linux::user_namespace;
use crate::registry::TunnelState;

/// Opens a tunnel's namespace, if the calling user may look into a process there. The caller has to check its mark:
/// another namespace may have the number of one that has ended.
pub fn find_namespace(state: &TunnelState) -> Option<NetworkNamespace> {
    let inside = process::in_namespace(state.namespace).unwrap_or_default();
    let opened = inside.into_iter().filter_map(|pid| File::open(format!("/proc/{pid}/ns/net")).ok());
    opened
        .map(|file| NetworkNamespace::from(std::os::fd::OwnedFd::from(file)))
        .find(|namespace| namespace.id().is_ok_and(|id| id == state.namespace))
}

/// Moves the calling process, which must have one thread, into the user namespace of a rootless tunnel. It has all
/// capabilities there.
///
/// # Errors
/// If it belongs to another user.
pub fn enter_user_namespace(of: &NetworkNamespace) -> Result<(), Failure> {
    enter_owner(of).doing("enter the tunnel's user namespace")
}

fn enter_owner(of: &NetworkNamespace) -> io::Result<()> {
    if fault::is_broken("user-namespace") { Ok(()) } else { user_namespace::enter_owner(of.as_fd()) }
}

/// Returns the alias of a namespace's `lo`. A child process looks, as the caller cannot leave a user namespace again.
pub(super) fn alias_of_loopback(namespace: &NetworkNamespace) -> io::Result<Option<String>> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    match process::fork()? {
        Forked::Child => {
            drop(reader);
            let alias = enter_owner(namespace)
                .and_then(|()| namespace.run(|| Ok(Netlink::open()?.link("lo")?.and_then(|lo| lo.alias))));
            if let Ok(Some(alias)) = alias {
                let _ = rustix::io::write(&writer, alias.as_bytes());
            }
            process::exit_now(0)
        }
        Forked::Parent(pid) => {
            drop(writer);
            let mut alias = String::new();
            let read = File::from(reader).read_to_string(&mut alias);
            nix::sys::wait::waitpid(pid, None)?;
            read?;
            Ok((!alias.is_empty()).then_some(alias))
        }
    }
}
