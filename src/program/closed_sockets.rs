//! The notes of `vpn-exec plan` about unix sockets on which host processes listen now, and which are closed to the
//! program.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::identity::Identity;
use crate::linux::mirror::HiddenPaths;
use crate::linux::process;
use crate::linux::unix_sockets::{BoundSocket, UnixSockets};
use crate::plan::Plan;
use crate::plan::host_sockets;

/// Returns a note for each unix socket that the program's user can connect to on the host, but not inside.
///
/// # Errors
/// Returns an error if the kernel's list of unix sockets cannot be read; `NotFound` if the kernel has none.
pub(crate) fn notes(plan: &Plan, identity: &Identity) -> io::Result<Vec<String>> {
    if plan.sockets.any {
        return Ok(Vec::new());
    }
    let user = match identity {
        Identity::Unchanged => nix::unistd::geteuid().as_raw(),
        Identity::Other(account) => account.uid,
    };
    let home = identity.home();
    let hidden = HiddenPaths::new(plan.hidden.iter().cloned());
    let is_hidden = |path: &Path| {
        let path: PathBuf = path.components().collect();
        path.ancestors().any(|part| hidden.has(part))
    };
    let is_closed = |bound: &BoundSocket| {
        bound.is_listening
            && bound.path.is_absolute()
            && !is_hidden(&bound.path)
            && may_connect(&bound.path, user)
            && !plan.sockets.allows(&bound.path, home.as_deref())
    };
    let mut closed: Vec<BoundSocket> = UnixSockets::open()?.bound()?.into_iter().filter(is_closed).collect();
    closed.sort_by(|one, other| one.path.cmp(&other.path));
    closed.dedup_by(|one, other| one.path == other.path);
    Ok(closed.iter().map(note).collect())
}

fn note(bound: &BoundSocket) -> String {
    let path = bound.path.display();
    let who = match (process::socket_owner(bound.inode), host_sockets::known_listener(&bound.path)) {
        (Some((pid, name)), _) => format!(" ({name}, pid {pid})"),
        (None, Some(who)) => format!(" ({who})"),
        (None, None) => String::new(),
    };
    format!("{path}{who} listens outside the tunnel now, and is closed: --socket {path} opens it.")
}

/// Returns whether the permissions of a socket's file allow a user to connect, which needs write permission (unix(7)).
fn may_connect(path: &Path, user: u32) -> bool {
    std::fs::metadata(path).is_ok_and(|found| {
        let write = if found.uid() == user { 0o200 } else { 0o022 };
        found.file_type().is_socket() && (user == 0 || found.mode() & write != 0)
    })
}
