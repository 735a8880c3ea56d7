//! The directory of all tunnels: its lock, the files that the tunnels share, and its removal by the last tunnel.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

use rustix::fs::FlockOperation;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::directory::is_at;
use super::{Scope, read_json, remove_file, temporary};
use crate::linux::namespace::{self, NamesSetup};

/// The shared file that records what the first tunnel had to set up for `/run/netns`.
const NETNS_FILE: &str = ".netns";

/// The shared file that records which of the host's interfaces forward for tunnels.
pub(crate) const FORWARDING_FILE: &str = ".forwarding";

/// A lock that keeps other tunnels from choosing addresses and names at the same time. A launcher holds it from before
/// it reads the machine's facts until its plan is written down.
#[derive(Debug)]
pub struct PlanningLock {
    _base: File,
}

impl PlanningLock {
    /// Waits until no other launcher is planning, and takes the lock.
    ///
    /// # Errors
    /// If there is no directory of tunnels.
    pub fn take() -> io::Result<Self> {
        lock().map(|_base| Self { _base })
    }
}

/// Locks the directory of tunnels against other tunnels that start or end. Held briefly.
fn lock() -> io::Result<File> {
    let base = File::open(Scope::current().directory())?;
    rustix::fs::flock(base.as_fd(), FlockOperation::LockExclusive)?;
    Ok(base)
}

/// Prepares `/run/netns` for the names of namespaces, and records what had to be set up, so that the last tunnel
/// reverts it.
pub(super) fn prepare_names() -> io::Result<()> {
    let _base = lock()?;
    let missing = namespace::missing_names_setup()?;
    if missing != NamesSetup::default() {
        // Recorded first, so that it is reverted even if this process is killed or the disk is full half-way.
        let before = read_names_setup()?;
        let all = NamesSetup { directory: missing.directory || before.directory, mount: missing.mount || before.mount };
        fs::write(shared_file(NETNS_FILE), serde_json::to_vec(&all)?)?;
    }
    namespace::set_up_names_directory()
}

/// Changes a shared file under the lock. An empty value is not stored. After an error the file is as it was.
///
/// # Errors
/// If the file cannot be read or written, or the change fails.
pub(crate) fn change_shared<T, R>(
    file: &str,
    is_empty: impl Fn(&T) -> bool,
    change: impl FnOnce(&mut T) -> io::Result<R>,
) -> io::Result<R>
where
    T: Default + Serialize + DeserializeOwned,
{
    let _base = match lock() {
        // Without a directory of tunnels there is no shared file.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return change(&mut T::default()),
        base => base?,
    };
    let path = shared_file(file);
    let mut shared: T = match read_json(&path) {
        // A damaged file must not keep tunnels from starting or ending.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            tracing::error!("{error}");
            T::default()
        }
        other => other?.unwrap_or_default(),
    };
    let before = serde_json::to_vec(&shared)?;
    let value = change(&mut shared)?;
    let after = serde_json::to_vec(&shared)?;
    if is_empty(&shared) {
        remove_file(&path)?;
    } else if before != after {
        fs::write(temporary(&path), &after)?;
        fs::rename(temporary(&path), &path)?;
    }
    Ok(value)
}

/// Removes the directory of tunnels and reverts the setup of `/run/netns`, if no tunnel is left.
pub(super) fn release() -> io::Result<()> {
    let base = match lock() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        base => base?,
    };
    let path = Scope::current().directory();
    if !is_at(&base, &path) || has_tunnels(&base)? {
        return Ok(());
    }
    if Scope::current() == Scope::System {
        namespace::tear_down_names_directory(read_names_setup()?)?;
    }
    // A temporary file remains if a keeper was killed while it wrote.
    let forwarding = shared_file(FORWARDING_FILE);
    for file in [shared_file(NETNS_FILE), temporary(&forwarding), forwarding] {
        remove_file(&file)?;
    }
    match fs::remove_dir(path) {
        // A tunnel that starts does not take the lock to create its directory.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTEMPTY | libc::ENOENT)) => Ok(()),
        other => other,
    }
}

/// Returns whether the directory contains a tunnel's. Opens no descriptor, since the process may have none left.
fn has_tunnels(base: &File) -> io::Result<bool> {
    let mut buffer = [std::mem::MaybeUninit::uninit(); 2048];
    let mut entries = rustix::fs::RawDir::new(base, &mut buffer);
    while let Some(entry) = entries.next() {
        // The names of shared files begin with a dot, and a tunnel's name does not.
        if !entry?.file_name().to_bytes().starts_with(b".") {
            return Ok(true);
        }
    }
    Ok(false)
}

fn shared_file(name: &str) -> PathBuf {
    Scope::current().directory().join(name)
}

fn read_names_setup() -> io::Result<NamesSetup> {
    match fs::read(shared_file(NETNS_FILE)) {
        Ok(text) => Ok(serde_json::from_slice(&text).unwrap_or_default()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(NamesSetup::default()),
        Err(error) => Err(error),
    }
}
