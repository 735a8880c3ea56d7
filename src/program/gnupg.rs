//! Places of the program's own, for services that take over from those outside. GnuPG's dirmngr asks key servers; a program that is refused
//! by one outside starts another, which puts its socket in the place of the host's. So the host's socket is not there inside.

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

/// The sockets of GnuPG that ask nobody for anything.
const AGENTS: [&str; 3] = ["S.gpg-agent", "S.keyboxd", "S.scdaemon"];

/// The service that asks key servers.
const DIRMNGR: &str = "S.dirmngr";

/// Where dirmngr listens that is started inside, if the host's would be in the user's home directory: in the program's own `/run`.
const PLACE: &str = "/run/vpn-exec.gnupg";

/// Gives the program places of its own, in the calling process's mount namespace, where the user has some on the host.
///
/// # Errors
/// What the system refuses.
pub(super) fn provide(identity: &Identity) -> io::Result<()> {
    let (user, group) = match identity {
        Identity::Unchanged => (nix::unistd::geteuid(), nix::unistd::getegid()),
        Identity::Other(account) => (Uid::from_raw(account.uid), Gid::from_raw(account.gid)),
    };
    // What belongs to the user may be closed to root: without CAP_DAC_OVERRIDE, root is a stranger there.
    let _as_user = FileUser::become_user(user, group)?;
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

/// Covers GnuPG's directory of sockets with one that has those of the agents alone, here and in the directories for other homes (`d.*`).
fn cover(directory: &Path, user: Uid, group: Gid) -> io::Result<()> {
    let mut agents = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(b"d.") && entry.file_type()?.is_dir() {
            cover(&entry.path(), user, group)?;
        }
        let is_other = name.as_encoded_bytes().starts_with(b"d.");
        if is_other || AGENTS.iter().any(|agent| name.to_string_lossy().starts_with(agent)) {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            agents.push((rustix::fs::open(directory.join(&name), flags, Mode::empty())?, name));
        }
    }
    memory_of(directory, user, group)?;
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

/// Has GnuPG find dirmngr's socket at a place of the program's own: a file with these words stands for a socket elsewhere (assuan(3),
/// `assuan_sock_set_sockaddr_un`).
fn redirect(socket: &Path, user: Uid, group: Gid) -> io::Result<()> {
    let place = Path::new(PLACE);
    {
        // The program's own /run is root's.
        let _as_root = FileUser::become_user(nix::unistd::geteuid(), nix::unistd::getegid())?;
        fs::create_dir(place)?;
        memory_of(place, user, group)?;
    }
    let words = place.join("redirect");
    fs::write(&words, format!("%Assuan%\nsocket={}\n", place.join(DIRMNGR).display()))?;
    mounts::bind(&words, socket)
}

/// Mounts a file system in memory for one user.
fn memory_of(directory: &Path, user: Uid, group: Gid) -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let options = std::ffi::CString::new(format!("mode=0700,size=1m,uid={user},gid={group}"))?;
    Ok(rustix::mount::mount("vpn-exec", directory, c"tmpfs", flags, Some(&*options))?)
}

/// While it lives, the calling thread uses files as another user (setfsuid(2)).
struct FileUser {
    user: Uid,
    group: Gid,
}

impl FileUser {
    fn become_user(user: Uid, group: Gid) -> io::Result<Self> {
        // The former ones are what these calls return, which tell of no error.
        let former_group = nix::unistd::setfsgid(group);
        let former = Self { user: nix::unistd::setfsuid(user), group: former_group };
        let now = (nix::unistd::setfsuid(user), nix::unistd::setfsgid(group));
        if now == (user, group) { Ok(former) } else { Err(io::Error::from_raw_os_error(libc::EPERM)) }
    }
}

impl Drop for FileUser {
    fn drop(&mut self) {
        nix::unistd::setfsuid(self.user);
        nix::unistd::setfsgid(self.group);
    }
}
