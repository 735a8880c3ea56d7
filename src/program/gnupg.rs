//! Hides the socket of GnuPG's dirmngr, the service that queries key servers, so that a program inside starts its own
//! dirmngr. Without this, the new dirmngr would replace the host's socket, since gpg starts one wherever it cannot
//! connect.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Uid};
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;

use super::identity::Identity;
use crate::linux::mounts;

/// Prefixes of the sockets of GnuPG's services that do not use the network.
const AGENTS: [&str; 3] = ["S.gpg-agent", "S.keyboxd", "S.scdaemon"];

/// The socket of dirmngr.
const DIRMNGR: &str = "S.dirmngr";

/// The directory, in the program's own `/run`, for the socket of a dirmngr inside if the host's is in a home directory.
const DIRECTORY: &str = "/run/vpn-exec.gnupg";

/// Hides the host's dirmngr in the calling process's mount namespace, and gives a new one a directory for its socket.
///
/// # Errors
/// Returns the error of the system call that failed.
pub(super) fn hide_dirmngr(identity: &Identity) -> io::Result<()> {
    let (user, group) = match identity {
        Identity::Unchanged => (nix::unistd::geteuid(), nix::unistd::getegid()),
        Identity::Other(account) => (Uid::from_raw(account.uid), Gid::from_raw(account.gid)),
    };
    // Root needs CAP_DAC_OVERRIDE for private files of another user, which the launcher does not have.
    let _as_user = FileSystemUser::change_to(user, group)?;
    let runtime = PathBuf::from(format!("/run/user/{user}/gnupg"));
    if fs::symlink_metadata(&runtime).is_ok_and(|found| found.is_dir() && found.uid() == user.as_raw()) {
        cover(&runtime, user, group)?;
    }
    let own = std::env::var_os("GNUPGHOME").map(PathBuf::from).filter(|home| home.is_absolute());
    let home = own.or_else(|| identity.home().map(|home| home.join(".gnupg")));
    let socket = home.map(|home| home.join(DIRMNGR));
    let is_socket = |socket: &PathBuf| fs::symlink_metadata(socket).is_ok_and(|found| found.file_type().is_socket());
    match socket.filter(is_socket) {
        Some(socket) => redirect(&socket, user, group),
        None => Ok(()),
    }
}

/// Covers a directory of GnuPG's sockets, and its subdirectories for other home directories (`d.*`), by one with the
/// sockets of the agents alone.
fn cover(directory: &Path, user: Uid, group: Gid) -> io::Result<()> {
    let mut agents = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(b"d.") && entry.file_type()?.is_dir() {
            cover(&entry.path(), user, group)?;
        }
        let is_for_other_home = name.as_encoded_bytes().starts_with(b"d.");
        if is_for_other_home || AGENTS.iter().any(|agent| name.to_string_lossy().starts_with(agent)) {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            agents.push((rustix::fs::open(directory.join(&name), flags, Mode::empty())?, name));
        }
    }
    mount_private(directory, user, group)?;
    for (socket, name) in agents {
        let place = directory.join(name);
        let source = format!("/proc/self/fd/{}", socket.as_raw_fd());
        match rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&socket)?.st_mode) {
            rustix::fs::FileType::Directory => fs::create_dir(&place)?,
            _ => drop(fs::File::create(&place)?),
        }
        mounts::bind_recursive(Path::new(&source), &place)?;
    }
    Ok(())
}

/// Redirects GnuPG from dirmngr's socket to one in [`DIRECTORY`]: a file with this text stands for a socket elsewhere
/// (Assuan manual, `assuan_sock_set_sockaddr_un`).
fn redirect(socket: &Path, user: Uid, group: Gid) -> io::Result<()> {
    let directory = Path::new(DIRECTORY);
    {
        // The program's own /run belongs to root.
        let _as_root = FileSystemUser::change_to(nix::unistd::geteuid(), nix::unistd::getegid())?;
        fs::create_dir(directory)?;
        mount_private(directory, user, group)?;
    }
    let redirection = directory.join("redirect");
    fs::write(&redirection, format!("%Assuan%\nsocket={}\n", directory.join(DIRMNGR).display()))?;
    mounts::bind(&redirection, socket)
}

/// Mounts a small tmpfs for one user.
fn mount_private(directory: &Path, user: Uid, group: Gid) -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let options = std::ffi::CString::new(format!("mode=0700,size=1m,uid={user},gid={group}"))?;
    Ok(rustix::mount::mount("vpn-exec", directory, c"tmpfs", flags, Some(&*options))?)
}

/// The former user for file access of the calling thread (setfsuid(2)), restored when this is dropped.
struct FileSystemUser {
    user: Uid,
    group: Gid,
}

impl FileSystemUser {
    fn change_to(user: Uid, group: Gid) -> io::Result<Self> {
        // These calls return the former IDs, and no error.
        let former_group = nix::unistd::setfsgid(group);
        let former = Self { user: nix::unistd::setfsuid(user), group: former_group };
        let now = (nix::unistd::setfsuid(user), nix::unistd::setfsgid(group));
        if now == (user, group) { Ok(former) } else { Err(io::Error::from_raw_os_error(libc::EPERM)) }
    }
}

impl Drop for FileSystemUser {
    fn drop(&mut self) {
        nix::unistd::setfsuid(self.user);
        nix::unistd::setfsgid(self.group);
    }
}
