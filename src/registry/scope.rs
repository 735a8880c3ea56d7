//! Whose tunnels a process deals with: the machine's, which root makes, or those of the calling user.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// The directory of the machine's tunnels.
const SYSTEM_DIRECTORY: &str = "/run/vpn-exec";

/// Whether this process deals with the tunnels of its user.
static IS_USER: AtomicBool = AtomicBool::new(false);

/// Whose tunnels a process deals with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The machine's. Making one needs privileges.
    System,
    /// Those of the calling user, which are made in a user namespace (user_namespaces(7)) and need no privilege.
    User,
}

impl Scope {
    /// Returns the scope of this process. It is [`Scope::System`] until [`Scope::enter`] is called.
    pub fn current() -> Self {
        if IS_USER.load(Ordering::Relaxed) { Self::User } else { Self::System }
    }

    /// Makes this the scope of the process. A command does so before it looks for a tunnel.
    pub fn enter(self) {
        IS_USER.store(self == Self::User, Ordering::Relaxed);
    }

    /// Returns the directory of all tunnels.
    ///
    /// A user's is `$XDG_RUNTIME_DIR/vpn-exec`. Where that variable is not set, as after su(1), it is below
    /// `/run/user`, and on a machine without it, in `/tmp`; root's is below `/run`. It is found once: a program of the
    /// user may change what is there.
    pub fn directory(self) -> PathBuf {
        match self {
            Self::System => SYSTEM_DIRECTORY.into(),
            Self::User => {
                static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
                DIRECTORY.get_or_init(user_directory).clone()
            }
        }
    }

    /// Returns the mode of the directory of all tunnels, and of theirs. A user who can open one for reading can lock it
    /// (flock(2)) and keep its owner waiting, so other users can only reach the files in it, whose names are known.
    pub(super) fn mode(self) -> u32 {
        match self {
            Self::System => 0o711,
            Self::User => 0o700,
        }
    }

    /// Checks that a user's directory of tunnels, if it exists, is the user's alone, and that no other user can replace
    /// it. In `/tmp`, any user can make one of that name first.
    ///
    /// # Errors
    /// If it belongs to another user, or others may write to it; or if that is so of `$XDG_RUNTIME_DIR`.
    pub(crate) fn check(self) -> io::Result<()> {
        if self == Self::System {
            return Ok(());
        }
        let path = self.directory();
        let refuse = |what: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
        if let Some(runtime) = named_directory().filter(|runtime| runtime.exists() && !is_private(runtime)) {
            return refuse(format!("{} belongs to another user, or others may write to it", runtime.display()));
        }
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Ok(found) if found.is_dir() && is_own(&found) && found.mode() & 0o077 == 0 => Ok(()),
            Ok(_) => refuse(format!("{} is not a directory of this user alone", path.display())),
            Err(error) => Err(error),
        }
    }

    /// Returns what to do where the directory of all tunnels cannot be used.
    pub(crate) fn advice(self) -> &'static str {
        match self {
            Self::System => "/run must exist and be writable for root",
            Self::User => "XDG_RUNTIME_DIR must name a directory of yours that nobody else can write to",
        }
    }

    /// Creates the directory of all tunnels, unless it exists.
    pub(super) fn create_directory(self) -> io::Result<()> {
        self.check()?;
        match fs::DirBuilder::new().mode(self.mode()).create(self.directory()) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => self.check(),
        }
    }
}

/// Returns `$XDG_RUNTIME_DIR`. A relative path is to be ignored (XDG Base Directory Specification).
fn named_directory() -> Option<PathBuf> {
    std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute())
}

fn user_directory() -> PathBuf {
    let usual = || Some(usual_runtime_directory()).filter(|path| is_private(path));
    named_directory().or_else(usual).map_or_else(directory_without_runtime, |runtime| runtime.join("vpn-exec"))
}

/// Returns the directories in which tunnels of the user may be. Those of a login without `XDG_RUNTIME_DIR` are not in
/// the directory of this process.
pub(crate) fn user_directories() -> Vec<PathBuf> {
    let usual = [usual_runtime_directory().join("vpn-exec"), directory_without_runtime()];
    let own = Scope::User.directory();
    let others = usual.into_iter().filter(|path| *path != own).collect::<Vec<_>>();
    std::iter::once(own).chain(others).collect()
}

fn usual_runtime_directory() -> PathBuf {
    format!("/run/user/{}", nix::unistd::geteuid()).into()
}

fn directory_without_runtime() -> PathBuf {
    match nix::unistd::geteuid() {
        uid if uid.is_root() => "/run/vpn-exec-rootless".into(),
        uid => format!("/tmp/vpn-exec-{uid}").into(),
    }
}

/// Returns whether a directory is the user's, and nobody else may write to it.
fn is_private(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.is_dir() && is_own(&found) && found.mode() & 0o022 == 0)
}

fn is_own(found: &fs::Metadata) -> bool {
    found.uid() == nix::unistd::geteuid().as_raw()
}
