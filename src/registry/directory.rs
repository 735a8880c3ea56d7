//! The locked directory of a tunnel.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::lookup_files::{HOSTS, NSSWITCH_CONF, read_host_file, write_mounted};
use super::{
    PLAN, PUBLIC_SOCKET, RESOLV_CONF, SOCKET, STATE, Scope, TunnelState, base, path_of, read_json, remove_file,
    temporary,
};
use crate::failure::Failure;
use crate::names::TunnelName;
use crate::plan::{DnsPlan, Plan};

/// The files in a tunnel's directory.
const FILES: [&str; 9] =
    [STATE, "state.new", PLAN, "plan.new", SOCKET, PUBLIC_SOCKET, RESOLV_CONF, "hosts", "nsswitch.conf"];

/// A claim on a tunnel's name: its locked directory.
///
/// The lock is on the directory itself (flock(2)), so it ends with the last process that holds it, however that process
/// ends. [`TunnelDirectory::release`] removes the directory. If the process is killed, the next claim finds what is
/// left.
#[derive(Debug)]
pub struct TunnelDirectory {
    path: PathBuf,
    lock: File,
}

impl TunnelDirectory {
    /// Claims a name: creates its directory and locks it. Returns None if another process holds the name.
    ///
    /// # Errors
    /// If the directory cannot be created or locked.
    pub fn try_claim(name: &TunnelName) -> Result<Option<Self>, Failure> {
        let path = path_of(name);
        loop {
            let failed = |error: &io::Error| {
                let failure = Failure::of(format!("use {}", path.display()), error);
                match error.kind() {
                    io::ErrorKind::NotADirectory => failure,
                    _ => failure.advise(Scope::current().advice()),
                }
            };
            let lock = open_directory(&path).map_err(|error| {
                let _ = base::release();
                failed(&error)
            })?;
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if is_at(&lock, &path) => return Ok(Some(Self { path, lock })),
                // The former holder removed the directory before this process locked it.
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(failed(&error.into())),
            }
        }
    }

    /// Takes over a claim from the lock that its former holder has passed.
    ///
    /// # Errors
    /// If the descriptor is not that of the tunnel's directory.
    pub fn from_lock(name: &TunnelName, lock: OwnedFd) -> io::Result<Self> {
        let (path, lock) = (path_of(name), File::from(lock));
        if is_at(&lock, &path) { Ok(Self { path, lock }) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    /// Returns the lock. A process that gets this descriptor shares it (flock(2)).
    pub fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    /// Returns the directory's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of the keeper's socket.
    pub fn socket(&self) -> PathBuf {
        self.path.join(SOCKET)
    }

    /// Returns the path of the keeper's socket for users who may only query the status.
    pub fn public_socket(&self) -> PathBuf {
        self.path.join(PUBLIC_SOCKET)
    }

    /// Removes both sockets.
    ///
    /// # Errors
    /// If one cannot be removed.
    pub fn remove_sockets(&self) -> io::Result<()> {
        remove_file(&self.socket()).and(remove_file(&self.public_socket()))
    }

    /// Reads the state that a killed keeper has left.
    ///
    /// # Errors
    /// If it cannot be read, or is damaged.
    pub fn state(&self) -> io::Result<Option<TunnelState>> {
        read_json(&self.path.join(STATE))
    }

    /// Reads the plan of the tunnel that a killed keeper has left.
    ///
    /// # Errors
    /// If it cannot be read, or is damaged.
    pub fn plan(&self) -> io::Result<Option<Plan>> {
        read_json(&self.path.join(PLAN))
    }

    /// Writes the state.
    ///
    /// # Errors
    /// If it cannot be written. Then the former one stays.
    pub fn write(&self, state: &TunnelState) -> io::Result<()> {
        self.replace(STATE, 0o644, &serde_json::to_vec(state)?)
    }

    /// Writes the plan. Other users cannot read it, because hooks in it may contain secrets.
    ///
    /// # Errors
    /// If it cannot be written. Then the former one stays.
    pub fn write_plan(&self, plan: &Plan) -> io::Result<()> {
        self.replace(PLAN, 0o600, &serde_json::to_vec(plan)?)
    }

    fn replace(&self, name: &str, mode: u32, text: &[u8]) -> io::Result<()> {
        let path = self.path.join(name);
        let new = temporary(&path);
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&new)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(text)?;
        drop(file);
        fs::rename(new, path)
    }

    /// Writes the files that replace the host's inside: `resolv.conf`, `hosts` and `nsswitch.conf`.
    ///
    /// # Errors
    /// If one of the host's cannot be read, or one cannot be written.
    pub fn write_names(&self, names: &DnsPlan) -> io::Result<()> {
        self.write_resolv_conf(&names.resolv_conf)?;
        let (hosts, nsswitch) = (read_host_file(HOSTS.as_ref())?, read_host_file(NSSWITCH_CONF.as_ref())?);
        write_mounted(&self.path.join("hosts"), &names.hosts_file(&hosts))?;
        write_mounted(&self.path.join("nsswitch.conf"), &names.nsswitch_file(&nsswitch))
    }

    /// Writes the file that the programs inside see as `/etc/resolv.conf`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_resolv_conf(&self, text: &str) -> io::Result<()> {
        write_mounted(&self.path.join(RESOLV_CONF), text)
    }

    /// Prepares `/run/netns` for the namespace's name. The last tunnel reverts that.
    ///
    /// # Errors
    /// If it cannot be created or mounted.
    pub fn prepare_names(&self) -> io::Result<()> {
        if Scope::current() == Scope::User {
            // A user cannot mount anything that others see.
            return Ok(());
        }
        base::prepare_names()
    }

    /// Releases the name: removes the directory. The last tunnel also removes what the first one had to set up.
    ///
    /// # Errors
    /// If a file cannot be removed.
    pub fn release(self) -> io::Result<()> {
        for file in FILES {
            remove_file(&self.path.join(file))?;
        }
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        drop(self.lock);
        base::release()
    }
}

/// Opens a tunnel's directory. Creates it and the directory of tunnels if needed. Removes what it created after an
/// error.
fn open_directory(path: &Path) -> io::Result<File> {
    let scope = Scope::current();
    let mut is_created = false;
    loop {
        scope.create_directory()?;
        match fs::DirBuilder::new().mode(scope.mode()).create(path) {
            Ok(()) => is_created = true,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => {}
            Err(error) => return Err(error),
        }
        match fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(path) {
            // The last tunnel has removed the directory of tunnels meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                if is_created {
                    let _ = fs::remove_dir(path);
                }
                return Err(error);
            }
            Ok(directory) => return Ok(directory),
        }
    }
}

/// Returns whether an open file is the one at a path.
pub(super) fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(there)) => (open.dev(), open.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}
