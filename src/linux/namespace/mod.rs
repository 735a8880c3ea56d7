//! Network namespaces (network_namespaces(7)): creating them, working inside of them, and their names in `/run/netns`.

mod names;
mod sockets;
mod thread;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use rustix::thread::LinkNameSpaceType;
use serde::{Deserialize, Serialize};

pub use names::{
    NAMES_DIRECTORY, NameLookup, NamesDirectory, NamesSetup, bind_name, look_up, missing_names_setup, path_of,
    remove_name, set_up_names_directory, tear_down_names_directory,
};
pub use sockets::share_namespace;
pub use thread::NamespaceThread;

/// A network namespace, kept alive by an open descriptor.
#[derive(Debug)]
pub struct NetworkNamespace(OwnedFd);

/// The identity of a namespace while it lives (namespaces(7)). The kernel may reuse it afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NamespaceId {
    device: u64,
    inode: u64,
}

impl AsFd for NetworkNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for NetworkNamespace {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<NetworkNamespace> for OwnedFd {
    fn from(namespace: NetworkNamespace) -> OwnedFd {
        namespace.0
    }
}

impl NetworkNamespace {
    /// Opens the namespace of the calling thread.
    ///
    /// # Errors
    /// Fails as open(2) does.
    pub fn current() -> io::Result<Self> {
        File::open("/proc/thread-self/ns/net").map(|file| Self(file.into()))
    }

    /// Creates a namespace, and runs `inside` in it before any other code can run there.
    ///
    /// A thread that ends with this call does the work, so the calling thread stays in its namespace even on errors.
    ///
    /// # Errors
    /// Fails with `EPERM` without CAP_SYS_ADMIN, with `ENOSPC` at the limit of namespaces, and as `inside` does.
    pub fn create<T: Send>(inside: impl FnOnce() -> io::Result<T> + Send) -> io::Result<(Self, T)> {
        thread::run_scoped(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET)?;
            let namespace = Self::current()?;
            let value = inside()?;
            Ok((namespace, value))
        })
    }

    /// Duplicates the descriptor of the namespace.
    ///
    /// # Errors
    /// Fails as dup(2) does.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Returns the identity of the namespace.
    ///
    /// # Errors
    /// Fails as fstat(2) does.
    pub fn id(&self) -> io::Result<NamespaceId> {
        NamespaceId::of(&self.0)
    }

    /// Runs `inside` in the namespace, on a thread that ends with this call.
    ///
    /// # Errors
    /// Fails as [`Self::enter`] and `inside` do.
    pub fn run<T: Send>(&self, inside: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        thread::run_scoped(|| {
            self.enter()?;
            inside()
        })
    }

    /// Moves the calling thread into the namespace for good. Does nothing if the thread is there already, which needs
    /// no capability.
    ///
    /// # Errors
    /// Fails with `EPERM` without CAP_SYS_ADMIN in the namespace's user namespace and in the caller's.
    pub fn enter(&self) -> io::Result<()> {
        let own = self.id()?;
        if Self::current().and_then(|current| current.id()).is_ok_and(|current| current == own) {
            return Ok(());
        }
        Ok(rustix::thread::move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))?)
    }
}

impl NamespaceId {
    /// Returns the identity of an open namespace.
    ///
    /// # Errors
    /// Fails as fstat(2) does.
    pub fn of(namespace: impl AsFd) -> io::Result<Self> {
        let status = rustix::fs::fstat(namespace)?;
        Ok(Self { device: status.st_dev, inode: status.st_ino })
    }

    /// Returns the network namespace of a process: that of its first thread, or of another one if the first has ended.
    ///
    /// # Errors
    /// Fails if the process has ended, and with `EACCES` without permission to trace it (ptrace(2)).
    pub fn of_process(pid: i32) -> io::Result<Self> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        match Self::of_thread(&process) {
            // A thread that has ended is in no namespace.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let threads = fs::read_dir(process.join("task"))?;
                threads.filter_map(|thread| Self::of_thread(&thread.ok()?.path()).ok()).next().ok_or(error)
            }
            other => other,
        }
    }

    /// Returns the mount namespace of a process.
    ///
    /// # Errors
    /// Fails as [`Self::of_process`] does.
    pub fn of_mounts(pid: i32) -> io::Result<Self> {
        let status = fs::metadata(format!("/proc/{pid}/ns/mnt"))?;
        Ok(Self { device: status.dev(), inode: status.ino() })
    }

    fn of_thread(thread: &Path) -> io::Result<Self> {
        let status = fs::metadata(thread.join("ns/net"))?;
        Ok(Self { device: status.dev(), inode: status.ino() })
    }
}
