//! The view of files that the programs of a tunnel share, so that one process keeps it up to date for all of them.
//!
//! The first program that joins the tunnel has a process made, the *view server*. It lives in a mount namespace of its
//! own, the template, in which all but the program's `/run` is covered by copies. A program's process copies that
//! namespace, which takes a tenth of the time of making the copies, and the server covers `/run` for it: that is a
//! separate copy for each program, since programs write there.
//!
//! - Mounts of the template appear in the namespaces copied from it, and never the other way round.
//! - The template serves only launchers in the place that it was made from: see [`key`]. All others, and those that the
//!   server does not answer, make a view of their own.
//! - The server ends a moment after the last program, or at once if the keeper has ended as well.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD};

use super::enter::Starter;
use super::{Program, helpers, view};
use crate::failure::{Doing, Failure};
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::local_socket::{self, LocalListener};
use crate::linux::mirror::Mirror;
use crate::linux::mounts::{self, MountNamespace, Whereabouts};
use crate::linux::namespace::NamespaceId;
use crate::linux::poll::wait_for;
use crate::linux::process::{self, Forked, ProcessHandle};
use crate::linux::seccomp::SyscallFilter;
use crate::linux::user_namespace;
use crate::registry::{self, HOSTS, NSSWITCH_CONF, Scope};

/// How long the server stays for the next program.
const LINGER: Duration = Duration::from_secs(10);

/// How long a launcher waits for the server, before it makes a view of its own.
const PATIENCE: Duration = Duration::from_secs(2);

/// The server's answer to a request that it has carried out.
const DONE: &[u8] = &[1];

/// The longest message: a key.
const MAX_MESSAGE: usize = 128;

/// The system calls of the server, besides [`helpers::BASE_CALLS`] and those of a view's helper.
const CALLS: &[libc::c_long] = &[
    libc::SYS_setns,
    libc::SYS_mount,
    // Serving launchers. ioctl(2) tells whose a namespace is.
    libc::SYS_accept4,
    libc::SYS_getsockopt,
    libc::SYS_pidfd_open,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_ioctl,
];

/// A launcher's connection to the view server of its tunnel, which may still have to be started. The server keeps the
/// program's view up to date for as long as the connection is open and the launcher lives.
#[derive(Debug)]
pub(super) struct SharedView {
    template: Template,
    connection: OwnedFd,
}

#[derive(Debug)]
enum Template {
    /// The template of a server.
    Made(MountNamespace),
    /// What a new server needs.
    New(NewServer),
}

#[derive(Debug)]
struct NewServer {
    key: String,
    listener: ViewListener,
    /// The server's end of the first connection.
    first: OwnedFd,
    keeper: ProcessHandle,
}

impl SharedView {
    /// Connects to the view server of a program's tunnel, or prepares one. Returns none if the program must have a view
    /// of its own.
    pub(super) fn find(program: &Program) -> Option<Self> {
        if !can_share(program) {
            return None;
        }
        let found = Self::try_find(program);
        found.unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot share the view of the tunnel's programs");
            None
        })
    }

    fn try_find(program: &Program) -> io::Result<Option<Self>> {
        let key = key(program)?;
        let path = registry::view_socket_of(&program.tunnel);
        match ask(&path, &key) {
            Ok((template, connection)) => return Ok(Some(Self { template: Template::Made(template), connection })),
            Err(error) => tracing::debug!(%error, "there is no view to share"),
        }
        let state = registry::read(&program.tunnel)?.filter(|state| state.shares_views);
        let Some(state) = state else { return Ok(None) };
        let keeper = ProcessHandle::of(state.keeper.cast_signed())?;
        let (connection, first) = local_socket::pair()?;
        rustix::io::ioctl_fionbio(&first, true)?;
        let listener = ViewListener::bind(path)?;
        let new = NewServer { key, listener, first, keeper };
        Ok(Some(Self { template: Template::New(new), connection }))
    }

    /// Returns the connection, which the launcher keeps for as long as its program runs.
    pub(super) fn into_connection(self) -> OwnedFd {
        self.connection
    }

    /// Moves the calling process into a mount namespace with the program's view. Starts the server if there is none
    /// yet, as a child of the launcher.
    ///
    /// # Errors
    /// If the server does not do its part. Then the process is where it was.
    pub(super) fn enter(self, program: &Program, starter: &Starter<'_>) -> Result<(), Failure> {
        let before = Whereabouts::current().doing("open the mount namespace")?;
        let entered = self.enter_and_cover(program, starter);
        if entered.is_err() {
            before.return_to().doing("return from the view that programs share")?;
        }
        entered
    }

    fn enter_and_cover(self, program: &Program, starter: &Starter<'_>) -> Result<(), Failure> {
        match self.template {
            Template::Made(template) => template.enter().doing("enter the template")?,
            Template::New(new) => {
                mounts::unshare().doing("make a mount namespace")?;
                let mut mirror = Mirror::new(view::hidden_paths(program, &[]), &program.staging);
                view::cover_shared(program, &mut mirror, &[], true)?;
                mounts::share().doing("share the view")?;
                if let Forked::Child = process::fork_sibling().doing("start the view server")? {
                    let served = Server::start(program, new, mirror, starter);
                    process::exit_now(i32::from(served.and_then(Server::serve).is_err()));
                }
            }
        }
        mounts::unshare().doing("make a mount namespace")?;
        let own = MountNamespace::current().doing("open the mount namespace")?;
        local_socket::send(&self.connection, DONE, Some(own.as_fd()))
            .and_then(|()| await_answer(&self.connection))
            .map(drop)
            .doing("have /run covered")
    }
}

/// The socket at which launchers connect to the server.
#[derive(Debug)]
struct ViewListener {
    socket: LocalListener,
    path: PathBuf,
    /// The device and the inode of the socket's file.
    file: (u64, u64),
}

impl ViewListener {
    fn bind(path: PathBuf) -> io::Result<Self> {
        let socket = LocalListener::bind(&path, 0o600)?;
        let file = file_at(&path)?;
        Ok(Self { socket, path, file })
    }

    /// Removes the socket's file, unless another server has replaced it.
    fn remove(self) {
        if file_at(&self.path).is_ok_and(|file| file == self.file) {
            let _ = rustix::fs::unlinkat(CWD, &self.path, AtFlags::empty());
        }
    }
}

fn file_at(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

/// Returns whether the server at the other end of a connection has ended, once the program runs.
pub(super) fn has_ended(connection: &OwnedFd) -> bool {
    wait_for(&[connection.as_fd()], Some(Duration::ZERO)).is_ok_and(|ready| ready == [true])
}

/// Returns whether a program may use a view together with others. Programs that may mount must not: they could change
/// what the server sees. Neither may those of a user's own tunnel, as all processes of the user could stand in for the
/// server, nor those that see the host's files for a test, nor those on a machine where more directories than `/run`
/// are written to.
fn can_share(program: &Program) -> bool {
    let is_directory = |path: &str| fs::symlink_metadata(path).is_ok_and(|found| found.is_dir());
    program.joins
        && Scope::current() == Scope::System
        && !program.kept.contains(CapabilitySet::SYS_ADMIN)
        && !view::shows_host_names()
        && view::linked_directories().is_empty()
        && !is_directory("/var/run")
        && is_directory("/run")
}

/// Returns the identity of all that a view is made from: the same key means the same view. A template is used only
/// where the launcher's mounts, its root directory, the files that are copied by their contents, and the plan are those
/// that it was made from.
fn key(program: &Program) -> io::Result<String> {
    let version = env!("CARGO_PKG_VERSION");
    let namespace = NamespaceId::of(fs::File::open("/proc/self/ns/mnt")?)?;
    // Mounts that are not shared with other namespaces would be missing in the template, and attributes change.
    let mounts = fs::read("/proc/self/mountinfo")?;
    let identity = |path: &Path| {
        let found = fs::symlink_metadata(path).ok()?;
        Some((found.dev(), found.ino(), found.created().ok()))
    };
    let contents = |path: &str| {
        let found = fs::metadata(path).ok()?;
        Some((found.size(), found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec()))
    };
    let places: Vec<_> =
        ["/", "/proc", "/var"].into_iter().chain(view::COVERED).chain([HOSTS, NSSWITCH_CONF]).collect();
    let places: Vec<_> = places.into_iter().map(|path| identity(path.as_ref())).collect();
    let files = [HOSTS, NSSWITCH_CONF].map(contents);
    let resolv_conf = (&program.resolv_conf, identity(&program.resolv_conf));
    let plan = (&program.names, &program.hidden, &program.emptied, &program.staging, &program.tunnel);
    let text = format!("{:?}", (version, namespace, places, files, resolv_conf, plan));
    let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
    digest.update(text.as_bytes());
    digest.update(&mounts);
    Ok(digest.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Asks the server at a path for its template.
fn ask(path: &Path, key: &str) -> io::Result<(MountNamespace, OwnedFd)> {
    let connection = local_socket::connect(path, PATIENCE)?;
    local_socket::send(&connection, key.as_bytes(), None)?;
    let template = await_answer(&connection)?.ok_or(io::ErrorKind::InvalidData)?;
    // In a rootless tunnel, a program is of the launcher's user. It cannot make a namespace that passes this check.
    if !user_namespace::owns(template.as_fd())? {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok((MountNamespace::from(template), connection))
}

/// Waits until the server has carried out a request. Returns the descriptor that it has passed, if any.
fn await_answer(connection: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    if wait_for(&[connection.as_fd()], Some(PATIENCE))? != [true] {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let answer = local_socket::receive(connection, &mut [0; MAX_MESSAGE])?;
    answer.map(|(_, passed)| passed).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// The view server.
struct Server<'a> {
    /// The program whose process has started the server. Its view is that of the others.
    program: &'a Program,
    key: String,
    template: MountNamespace,
    mirror: Mirror,
    /// The socket at which launchers connect. None once the keeper has ended: its successor may be of another version.
    listener: Option<ViewListener>,
    /// The tunnel's keeper.
    keeper: ProcessHandle,
    clients: Vec<Client>,
}

/// A launcher, and the mount namespace and the copies of its program.
struct Client {
    launcher: ProcessHandle,
    connection: OwnedFd,
    view: Option<(MountNamespace, Mirror)>,
}

/// What the server waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Listener,
    Keeper,
    Changes,
    Connection(usize),
    Launcher(usize),
}

impl<'a> Server<'a> {
    /// Makes the calling process, which is in the template, the server. It keeps only the right to mount, in the
    /// template and the namespaces copied from it, and to read directories.
    fn start(program: &'a Program, new: NewServer, mirror: Mirror, starter: &Starter<'_>) -> io::Result<Self> {
        helpers::announce(starter.helpers)?;
        if mirror.changes().is_none() {
            return Err(io::Error::other("the host's directories cannot be watched"));
        }
        let NewServer { key, listener, first, keeper } = new;
        let launcher = ProcessHandle::of(starter.launcher.cast_signed())?;
        let template = MountNamespace::current()?;
        // Programs enter the namespace at its root, which must be that of the launcher.
        if !mounts::enter_own_root(&template)? {
            return Err(io::Error::other("the root directory was changed"));
        }
        let own = [&listener.socket.as_fd(), &first.as_fd(), &keeper.as_fd(), &launcher.as_fd(), &template.as_fd()];
        let mut kept: Vec<i32> = mirror.descriptors().chain(own.map(AsRawFd::as_raw_fd)).collect();
        helpers::detach(&mut kept)?;
        process::raise_file_limit()?;
        // A service manager ends it by SIGTERM, with the other processes of the launcher's unit.
        starter.inherited.restore()?;
        capabilities::raise(CapabilitySet::SETPCAP)?;
        capabilities::limit_bounding_set(CapabilitySet::empty(), program.last_capability)?;
        let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_CHROOT;
        capabilities::limit(needed, needed)?;
        capabilities::set_no_new_privileges()?;
        SyscallFilter::allow_only(&[helpers::BASE_CALLS, view::CALLS, CALLS].concat(), &[])?.install()?;
        let clients = vec![Client { launcher, connection: first, view: None }];
        Ok(Self { program, key, template, mirror, listener: Some(listener), keeper, clients })
    }

    /// Serves until no program is left.
    fn serve(mut self) -> io::Result<()> {
        let mut deadline = Instant::now() + LINGER;
        loop {
            let mut left = None;
            if self.clients.is_empty() {
                let rest = deadline.saturating_duration_since(Instant::now());
                if self.listener.is_none() || rest.is_zero() {
                    self.stop_listening();
                    return Ok(());
                }
                left = Some(rest);
            }
            for source in self.wait(left)?.into_iter().rev() {
                // From the last client to the first, so that the numbers of those to come stay right.
                if !self.handle(source)? {
                    if let Source::Connection(number) | Source::Launcher(number) = source {
                        self.clients.remove(number);
                    }
                    deadline = Instant::now() + LINGER;
                    break;
                }
            }
        }
    }

    fn stop_listening(&mut self) {
        if let Some(listener) = self.listener.take() {
            listener.remove();
        }
    }

    fn wait(&self, timeout: Option<Duration>) -> io::Result<Vec<Source>> {
        let mut sources: Vec<(Source, BorrowedFd<'_>)> = Vec::new();
        if let Some(listener) = &self.listener {
            sources.extend([(Source::Listener, listener.socket.as_fd()), (Source::Keeper, self.keeper.as_fd())]);
        }
        sources.extend(self.mirror.changes().map(|changes| (Source::Changes, changes)));
        for (number, client) in self.clients.iter().enumerate() {
            sources.push((Source::Connection(number), client.connection.as_fd()));
            sources.push((Source::Launcher(number), client.launcher.as_fd()));
        }
        let descriptors: Vec<_> = sources.iter().map(|(_, descriptor)| *descriptor).collect();
        let ready = wait_for(&descriptors, timeout)?;
        Ok(sources.iter().zip(ready).filter(|(_, ready)| *ready).map(|((source, _), _)| *source).collect())
    }

    /// Handles an event. Returns false if a client is to be removed.
    fn handle(&mut self, source: Source) -> io::Result<bool> {
        match source {
            Source::Listener => {
                let accepted = self.listener.as_ref().map_or(Ok(None), |listener| listener.socket.accept())?;
                if let Some((connection, peer)) = accepted
                    && let Ok(launcher) = ProcessHandle::of(peer.pid)
                {
                    self.clients.push(Client { launcher, connection, view: None });
                }
            }
            Source::Keeper => self.stop_listening(),
            Source::Changes => self.follow_host()?,
            Source::Launcher(_) => return Ok(false),
            Source::Connection(number) => return Ok(self.answer(number).is_ok()),
        }
        Ok(true)
    }

    /// Brings the template and the copies of each program up to date.
    fn follow_host(&mut self) -> io::Result<()> {
        let events = self.mirror.read_events()?;
        self.mirror.follow(&events);
        for (namespace, mirror) in self.clients.iter_mut().filter_map(|client| client.view.as_mut()) {
            namespace.enter()?;
            mirror.follow(&events);
        }
        self.template.enter()
    }

    /// Answers a client's message: its key, for the template, or its program's namespace, for a copy of `/run` there.
    fn answer(&mut self, number: usize) -> io::Result<()> {
        let Some(client) = self.clients.get_mut(number) else { return Ok(()) };
        let mut message = [0; MAX_MESSAGE];
        match local_socket::receive(&client.connection, &mut message)?.ok_or(io::ErrorKind::UnexpectedEof)? {
            (length, None) if &message[..length] == self.key.as_bytes() => {
                local_socket::send(&client.connection, DONE, Some(self.template.as_fd()))
            }
            (_, Some(passed)) if client.view.is_none() && user_namespace::owns(passed.as_fd())? => {
                let namespace = MountNamespace::from(passed);
                namespace.enter()?;
                let mut mirror = self.mirror.beside(view::hidden_paths(self.program, &[]), &self.program.staging);
                let covered = view::cover_run(self.program, &mut mirror).map_err(io::Error::other);
                self.template.enter()?;
                covered?;
                client.view = Some((namespace, mirror));
                local_socket::send(&client.connection, DONE, None)
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}
