//! What a tunnel leaves on disk while it lives, under `/run/vpn-exec/NAME`: a lock that says whether it lives, and a mark that
//! says what is its own.
//!
//! The lock is taken on the directory itself (flock(2)), so it ends with the last process that holds it, however that ends. The
//! mark is a random number that is written here and into everything that could outlive a killed keeper: the alias of `lo` in
//! the namespace, the file that becomes the namespace's name, the alias of the veth's host end. Only what carries the mark is
//! ever removed.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::linux::namespace::{self, NamesMade, NamespaceId};
use crate::linux::process;
use crate::names::TunnelName;

/// The file, beside the tunnels' directories, that says what had to be made for `/run/netns`.
const NAMES_MADE: &str = ".netns";

/// Where tunnels keep their state.
pub const BASE: &str = "/run/vpn-exec";

/// The mode of the directories: who may open one may lock it (flock(2)), and so keep its owner waiting. Their files, whose names are
/// known, can be read by anybody.
const DIRECTORY_MODE: u32 = 0o711;

/// How long a start waits for a tunnel of the same name that is coming or going down.
const STOPPING: Duration = Duration::from_secs(5);

/// How long a start waits for a tunnel of the same name that may be about to go down.
const IN_USE: Duration = Duration::from_millis(100);

/// What marks the things of one tunnel: its name and a random number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Mark(String);

impl Mark {
    /// A new one, with 128 random bits.
    pub fn random(name: &TunnelName) -> io::Result<Self> {
        let mut bytes = [0; 16];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
        }
        let number: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self(Self::of_name(name) + &number))
    }

    /// The text that marks a file, and an interface as its alias.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// How the marks of all tunnels of a name begin. A name has no colon, so no other name's begin so.
    pub fn of_name(name: &TunnelName) -> String {
        format!("vpn-exec:{name}:")
    }
}

/// What is written down about a tunnel before anything that could outlive its keeper is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// What marks the tunnel's own things.
    pub mark: Mark,
    /// Its namespace.
    pub namespace: NamespaceId,
    /// The process that holds the tunnel.
    pub keeper: u32,
    /// The process that wants it: the tunnel is going down once this has ended.
    pub launcher: u32,
}

/// Why a name could not be claimed.
#[derive(Debug, Error)]
pub enum ClaimError {
    /// A living tunnel has it.
    #[error("the tunnel {name} is up already{}", keeper.map(|pid| format!(", held by process {pid}")).unwrap_or_default())]
    InUse {
        /// The name.
        name: TunnelName,
        /// The process that holds it.
        keeper: Option<u32>,
    },
    /// The system refused.
    #[error("cannot use {path}: {error}")]
    System {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// A claimed name: a locked directory. Removed when it is released; what is left when the process is killed is found by the
/// next claim.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    lock: File,
}

impl Directory {
    /// Claims a name: makes its directory and locks it. Waits for a tunnel of that name that is going down.
    pub fn claim(name: &TunnelName) -> Result<Self, ClaimError> {
        let path = Path::new(BASE).join(name.as_str());
        let begin = Instant::now();
        loop {
            let system = |error| ClaimError::System { path: path.clone(), error };
            let lock = open_directory(&path).map_err(|error| {
                let _ = release_base();
                system(error)
            })?;
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if is_at(&lock, &path) => return Ok(Self { path, lock }),
                // It was released and removed since it was opened.
                Ok(()) => continue,
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(error) => return Err(system(error.into())),
            }
            let state = read_state(&path).ok().flatten();
            let keeper = state.as_ref().map(|state| state.keeper);
            // Without a state it is just coming, or going. One that was killed, or whose launcher was, may take its time.
            let ending =
                |state: State| [state.keeper, state.launcher].map(u32::cast_signed).into_iter().any(process::is_ending);
            let passing = state.is_none_or(ending) || path.join("stopping").exists();
            if begin.elapsed() > if passing { STOPPING } else { IN_USE } {
                return Err(ClaimError::InUse { name: name.clone(), keeper });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What a tunnel that was killed has left here.
    pub fn state(&self) -> io::Result<Option<State>> {
        read_state(&self.path)
    }

    /// Writes down what is about to be made.
    pub fn write(&self, state: &State) -> io::Result<()> {
        let text = serde_json::to_vec(state)?;
        let temporary = self.path.join("state.new");
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&temporary)?;
        file.set_permissions(Permissions::from_mode(0o644))?;
        file.write_all(&text)?;
        drop(file);
        fs::rename(temporary, self.path.join("state"))
    }

    /// Says that the tunnel is going down, so that a start of the same name waits instead of failing.
    pub fn announce_stop(&self) -> io::Result<()> {
        File::create(self.path.join("stopping")).map(drop)
    }

    /// A place for the program's private file systems to be mounted on, in a mount namespace of its own.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes `/run/netns` ready, and writes down what had to be made for that, for whoever goes last.
    pub fn prepare_names(&self) -> io::Result<()> {
        let _base = lock_base()?;
        let needed = namespace::names_needed()?;
        if needed != NamesMade::default() {
            // Written down first, so that it is taken away even if this process is killed, or the disk is full, half-way.
            let before = read_names_made()?;
            let made =
                NamesMade { directory: needed.directory || before.directory, mount: needed.mount || before.mount };
            fs::write(names_made_file(), serde_json::to_vec(&made)?)?;
        }
        namespace::prepare_names()
    }

    /// Gives the name back: removes the directory and, for the last tunnel, what the first had to make.
    pub fn release(self) -> io::Result<()> {
        for file in ["state", "state.new", "stopping"] {
            remove_file(&self.path.join(file))?;
        }
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        drop(self.lock);
        release_base()
    }
}

/// What is written down about the tunnel of a name, living or killed. Anybody may read it.
pub fn read(name: &TunnelName) -> io::Result<Option<State>> {
    read_state(&Path::new(BASE).join(name.as_str()))
}

/// Opens a directory, made if need be, and the base with it. What was made is removed after an error.
fn open_directory(path: &Path) -> io::Result<File> {
    let mut made = false;
    loop {
        for directory in [Path::new(BASE), path] {
            match fs::DirBuilder::new().mode(DIRECTORY_MODE).create(directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                Err(_) => {}
                Ok(()) => made |= directory == path,
            }
        }
        match fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(path) {
            // Another tunnel that went last has removed the base in between. But without /run there is no use in trying.
            Err(error) if error.kind() == io::ErrorKind::NotFound && Path::new("/run").exists() => {}
            Err(error) => {
                if made {
                    let _ = fs::remove_dir(path);
                }
                return Err(error);
            }
            Ok(directory) => return Ok(directory),
        }
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(there)) => (open.dev(), open.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

fn read_state(path: &Path) -> io::Result<Option<State>> {
    match fs::read(path.join("state")) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| {
            let file = path.join("state");
            let advice = "if no tunnel of that name is up, remove the file";
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{} is not what was written there ({error}): {advice}", file.display()),
            )
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn names_made_file() -> PathBuf {
    Path::new(BASE).join(NAMES_MADE)
}

fn read_names_made() -> io::Result<NamesMade> {
    match fs::read(names_made_file()) {
        Ok(text) => Ok(serde_json::from_slice(&text).unwrap_or_default()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(NamesMade::default()),
        Err(error) => Err(error),
    }
}

/// Locks the base against other tunnels that come or go. Held for an instant only.
fn lock_base() -> io::Result<File> {
    let base = File::open(BASE)?;
    rustix::fs::flock(base.as_fd(), FlockOperation::LockExclusive)?;
    Ok(base)
}

/// Whether the base has a tunnel's directory. Takes no descriptor besides: there may be none left.
fn has_others(base: &File) -> io::Result<bool> {
    let mut buffer = [std::mem::MaybeUninit::uninit(); 2048];
    let mut entries = rustix::fs::RawDir::new(base, &mut buffer);
    while let Some(entry) = entries.next() {
        if ![".", "..", NAMES_MADE].map(str::as_bytes).contains(&entry?.file_name().to_bytes()) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Removes the base if no tunnel is left.
fn release_base() -> io::Result<()> {
    let base = match lock_base() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        base => base?,
    };
    if !is_at(&base, Path::new(BASE)) {
        return Ok(());
    }
    if has_others(&base)? {
        return Ok(());
    }
    namespace::unprepare_names(read_names_made()?)?;
    remove_file(&names_made_file())?;
    match fs::remove_dir(BASE) {
        // A tunnel that is just coming does not lock the base to make its directory.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTEMPTY | libc::ENOENT)) => Ok(()),
        other => other,
    }
}
