//! What a tunnel leaves on disk while it lives, under `/run/vpn-exec/NAME`: a lock that says whether it lives, a mark that says
//! what is its own, and what a successor of its keeper must know. No secret is among it.
//!
//! The lock is taken on the directory itself (flock(2)), so it ends with the last process that holds it, however that ends. The
//! mark is a random number that is written here and into everything that could outlive a killed keeper: the alias of `lo` in
//! the namespace, the file that becomes the namespace's name, the alias of the veth's host end. Only what carries the mark is
//! ever removed, or taken over.
//!
//! - `plan`: the [`Plan`], which also reserves the addresses and the interface's name among the machine's tunnels.
//! - `state`: the [`State`].
//! - `socket`: where the keeper can be reached ([`crate::lease`]).
//! - `resolv.conf`: what the programs inside see as `/etc/resolv.conf`; `hosts` and `nsswitch.conf`, the same for services, whose
//!   mounts are their manager's to make.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::linux::namespace::{self, NamesSetup, NamespaceId};
use crate::linux::process::ProcessId;
use crate::names::TunnelName;
use crate::plan::{DnsPlan, Plan, VethPlan};
use crate::wireguard::Backend;

/// The file, beside the tunnels' directories, that says what had to be made for `/run/netns`.
const NAMES_MADE: &str = ".netns";

/// The file, beside the tunnels' directories, that says which of the host's interfaces forward for tunnels.
pub(super) const FORWARDING: &str = ".forwarding";

/// Where users who may not use that socket can ask how the tunnel is.
pub fn public_socket_of(name: &TunnelName) -> PathBuf {
    path_of(name).join("public")
}

/// The file that the programs inside see as `/etc/resolv.conf`.
const RESOLV_CONF: &str = "resolv.conf";

/// The host's own names of hosts (hosts(5)).
pub const HOSTS: &str = "/etc/hosts";

/// By which ways the host looks up what (nsswitch.conf(5)).
pub const NSSWITCH_CONF: &str = "/etc/nsswitch.conf";

/// Where tunnels keep their state.
pub const BASE: &str = "/run/vpn-exec";

/// The mode of the directories: who may open one may lock it (flock(2)), and so keep its owner waiting. Their files, whose names are
/// known, can be read by anybody.
const DIRECTORY_MODE: u32 = 0o711;

/// The files in a tunnel's directory.
const FILES: [&str; 9] =
    ["state", "state.new", "plan", "plan.new", "socket", "public", "resolv.conf", "hosts", "nsswitch.conf"];

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

/// What is written down about a tunnel before anything that could outlive its keeper is made, and whenever it changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// What marks the tunnel's own things.
    pub mark: Mark,
    /// Its namespace.
    pub namespace: NamespaceId,
    /// The process that holds the tunnel.
    pub keeper: u32,
    /// Which WireGuard it has, once all of it is made. What was killed before cannot be taken over.
    pub made: Option<Backend>,
    /// Whether it stays when nobody holds a lease on it.
    pub standing: bool,
    /// Who holds a lease on it.
    pub holders: Vec<Holder>,
}

/// Who holds a lease on a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its process.
    pub process: ProcessId,
    /// The mount namespace of its program, once that runs: by it, what the program leaves behind is found.
    pub mounts: Option<NamespaceId>,
}

/// Why a name could not be claimed.
#[derive(Debug, Error)]
#[error("cannot use {path}: {error}")]
pub struct ClaimError {
    /// Which file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub error: io::Error,
}

/// A claimed name: a locked directory. Removed when it is released; what is left when the process is killed is found by the
/// next claim.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    lock: File,
}

impl Directory {
    /// Claims a name, unless somebody has it: makes its directory and locks it.
    pub fn try_claim(name: &TunnelName) -> Result<Option<Self>, ClaimError> {
        let path = path_of(name);
        loop {
            let system = |error| ClaimError { path: path.clone(), error };
            let lock = open_directory(&path).map_err(|error| {
                let _ = release_base();
                system(error)
            })?;
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if is_at(&lock, &path) => return Ok(Some(Self { path, lock })),
                // It was released and removed since it was opened.
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(system(error.into())),
            }
        }
    }

    /// What a tunnel that was killed has left here.
    pub fn state(&self) -> io::Result<Option<State>> {
        read_state(&self.path)
    }

    /// What was planned for a tunnel that was killed.
    pub fn plan(&self) -> io::Result<Option<Plan>> {
        read_json(&self.path.join("plan"))
    }

    /// Writes down what is about to be made, or has changed.
    pub fn write(&self, state: &State) -> io::Result<()> {
        self.replace("state", 0o644, &serde_json::to_vec(state)?)
    }

    /// Writes down what is planned.
    pub fn write_plan(&self, plan: &Plan) -> io::Result<()> {
        // It has the hooks' commands, in which there may be a secret.
        self.replace("plan", 0o600, &serde_json::to_vec(plan)?)
    }

    fn replace(&self, name: &str, mode: u32, text: &[u8]) -> io::Result<()> {
        let temporary = self.path.join(format!("{name}.new"));
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(text)?;
        drop(file);
        fs::rename(temporary, self.path.join(name))
    }

    /// Writes what is seen inside of names: the files that a program's or a service's own `/etc` has.
    pub fn write_names(&self, names: &DnsPlan) -> io::Result<()> {
        self.write_resolv_conf(&names.resolv_conf)?;
        self.write_seen("hosts", &names.hosts_file(&read_host_file(HOSTS.as_ref())?))?;
        self.write_seen("nsswitch.conf", &names.nsswitch_file(&read_host_file(NSSWITCH_CONF.as_ref())?))
    }

    /// Writes what the programs inside see as `/etc/resolv.conf`.
    pub fn write_resolv_conf(&self, text: &str) -> io::Result<()> {
        self.write_seen(RESOLV_CONF, text)
    }

    /// Writes a file that is seen inside: into the one that is seen already, if there is one.
    ///
    /// A reader at the same instant sees the old text, the new one, or the new one with empty lines after it: it is written by one
    /// call, as long as the longer of the two, before the file is cut to its length.
    fn write_seen(&self, name: &str, text: &str) -> io::Result<()> {
        let path = self.path.join(name);
        let file = fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o644).open(path)?;
        file.set_permissions(Permissions::from_mode(0o644))?;
        let before = usize::try_from(file.metadata()?.len()).unwrap_or_default();
        let mut padded = text.as_bytes().to_vec();
        padded.resize(padded.len().max(before), b'\n');
        file.write_all_at(&padded, 0)?;
        if padded.len() > text.len() { file.set_len(text.len() as u64) } else { Ok(()) }
    }

    /// Where the keeper can be reached.
    pub fn socket(&self) -> PathBuf {
        self.path.join("socket")
    }

    /// Where users who may not use that socket can ask how the tunnel is.
    pub fn public_socket(&self) -> PathBuf {
        self.path.join("public")
    }

    /// The claim itself: whoever is passed this descriptor shares it (flock(2)).
    pub fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    /// Takes a claim that was passed by who had it.
    ///
    /// # Errors
    /// If the descriptor is not that of the tunnel's directory.
    pub fn from_lock(name: &TunnelName, claim: OwnedFd) -> io::Result<Self> {
        let (path, lock) = (path_of(name), File::from(claim));
        if is_at(&lock, &path) { Ok(Self { path, lock }) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    /// Lets nobody reach the keeper any more.
    pub fn remove_socket(&self) -> io::Result<()> {
        remove_file(&self.socket()).and(remove_file(&self.public_socket()))
    }

    /// A place for the program's private file systems to be mounted on, in a mount namespace of its own.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes `/run/netns` ready, and writes down what had to be made for that, for whoever goes last.
    pub fn prepare_names(&self) -> io::Result<()> {
        let _base = lock_base()?;
        let needed = namespace::missing_names_setup()?;
        if needed != NamesSetup::default() {
            // Written down first, so that it is taken away even if this process is killed, or the disk is full, half-way.
            let before = read_names_made()?;
            let made =
                NamesSetup { directory: needed.directory || before.directory, mount: needed.mount || before.mount };
            fs::write(names_made_file(), serde_json::to_vec(&made)?)?;
        }
        namespace::set_up_names_directory()
    }

    /// Gives the name back: removes the directory and, for the last tunnel, what the first had to make.
    pub fn release(self) -> io::Result<()> {
        for file in FILES {
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

/// Keeps other tunnels from choosing their addresses and names at the same time. Held from before the machine's facts are read
/// until what was chosen is written down.
#[derive(Debug)]
pub struct Choosing {
    _base: File,
}

impl Choosing {
    /// Waits for others who are choosing.
    pub fn begin() -> io::Result<Self> {
        lock_base().map(|_base| Self { _base })
    }
}

/// The directory of a tunnel.
pub fn path_of(name: &TunnelName) -> PathBuf {
    Path::new(BASE).join(name.as_str())
}

/// Where the keeper of a tunnel can be reached.
pub fn socket_of(name: &TunnelName) -> PathBuf {
    path_of(name).join("socket")
}

/// The file that the programs inside see as `/etc/resolv.conf`.
pub fn resolv_conf_of(name: &TunnelName) -> PathBuf {
    path_of(name).join(RESOLV_CONF)
}

/// The text of a host's file, whose last line ends; empty if there is none, as what is no file is none for the C library, too: a directory, a
/// link that leads in a circle, or a pipe, of which nobody is to wait for the other end.
///
/// # Errors
/// If there is one that cannot be read. The error names it.
pub fn read_host_file(path: &Path) -> io::Result<String> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let nothing = Ok(String::new());
    let mut file = match fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path) {
        Ok(file) => file,
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::ENXIO)) =>
        {
            return nothing;
        }
        Err(error) => return Err(named(error)),
    };
    if !file.metadata().map_err(named)?.is_file() {
        return nothing;
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(named)?;
    let mut text = String::from_utf8_lossy(&bytes).into_owned();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

/// What is written down about the tunnel of a name, living or killed. Anybody may read it.
pub fn read(name: &TunnelName) -> io::Result<Option<State>> {
    read_state(&path_of(name))
}

/// What is planned for the tunnel of a name, living or killed.
pub fn read_plan(name: &TunnelName) -> io::Result<Option<Plan>> {
    read_json(&path_of(name).join("plan"))
}

/// The names of all tunnels, living or killed, in order. Those who may not read the directory of tunnels are told the ones whose
/// namespaces have their names already.
pub fn names() -> io::Result<Vec<TunnelName>> {
    let unreadable =
        |path: &str, error: io::Error| io::Error::new(error.kind(), format!("cannot read {path}: {error}"));
    let entries = match fs::read_dir(BASE) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => match fs::read_dir(namespace::NAMES_DIRECTORY)
        {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|error| unreadable(namespace::NAMES_DIRECTORY, error))?,
        },
        other => other.map_err(|error| unreadable(BASE, error))?,
    };
    let name =
        |entry: io::Result<fs::DirEntry>| -> Option<TunnelName> { entry.ok()?.file_name().to_str()?.parse().ok() };
    let mut names: Vec<TunnelName> = entries.filter_map(name).filter(|name| path_of(name).is_dir()).collect();
    names.sort_unstable();
    Ok(names)
}

/// What other tunnels of this machine have chosen for their links to the host, living or just being made.
pub fn chosen_by_others(own: &TunnelName) -> io::Result<Vec<VethPlan>> {
    let others = names()?.into_iter().filter(|name| name != own);
    // One that cannot be read is shown by its interface, if there is one.
    Ok(others.filter_map(|name| Some(read_plan(&name).ok()??.veth)).collect())
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
    read_json(&path.join("state"))
}

fn read_json<T: DeserializeOwned>(file: &Path) -> io::Result<Option<T>> {
    match fs::read(file) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| {
            let advice = "if no tunnel of that name is up, remove the file";
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{} is not what was written there ({error}): {advice}", file.display()),
            )
        }),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
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

/// Where a file is written before it takes the place of the one before.
fn new(file: &Path) -> PathBuf {
    file.with_extension("new")
}

fn read_names_made() -> io::Result<NamesSetup> {
    match fs::read(names_made_file()) {
        Ok(text) => Ok(serde_json::from_slice(&text).unwrap_or_default()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(NamesSetup::default()),
        Err(error) => Err(error),
    }
}

/// Has something changed that is written down for all tunnels of the machine together, in a file beside their directories; nobody else
/// does meanwhile. What is empty is not written down. After an error it stays as it was written down.
pub(super) fn change_shared<T, R>(
    file: &str,
    is_empty: impl Fn(&T) -> bool,
    change: impl FnOnce(&mut T) -> io::Result<R>,
) -> io::Result<R>
where
    T: Default + Serialize + DeserializeOwned,
{
    let _base = match lock_base() {
        // Without any tunnel there is nothing.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return change(&mut T::default()),
        base => base?,
    };
    let path = Path::new(BASE).join(file);
    let mut shared: T = match read_json(&path) {
        // Nothing can be undone by it, and it shall keep nobody from anything else.
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
        fs::write(new(&path), &after)?;
        fs::rename(new(&path), &path)?;
    }
    Ok(value)
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
        // No tunnel's name begins with a dot.
        if !entry?.file_name().to_bytes().starts_with(b".") {
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
    namespace::tear_down_names_directory(read_names_made()?)?;
    // What was shared, and one that was killed while it wrote.
    for file in [names_made_file(), new(&Path::new(BASE).join(FORWARDING)), Path::new(BASE).join(FORWARDING)] {
        remove_file(&file)?;
    }
    match fs::remove_dir(BASE) {
        // A tunnel that is just coming does not lock the base to make its directory.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTEMPTY | libc::ENOENT)) => Ok(()),
        other => other,
    }
}
