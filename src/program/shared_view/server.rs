//! The view server: it makes a mount namespace for each program, and keeps the copies in all of them up to date.
//!
//! It reads nothing from launchers. The keeper passes their connections, and the end of a connection is that of its
//! program. One further namespace is kept ready, so that the next program need not wait for it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use super::super::enter::Starter;
use super::super::{Program, helpers, view};
use super::VIEW;
use crate::lease;
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::local_socket;
use crate::linux::mirror::Mirror;
use crate::linux::mounts::{self, MountNamespace};
use crate::linux::poll::{Interest, wait_for_each};
use crate::linux::process::{self, ProcessHandle};
use crate::linux::seccomp::SyscallFilter;

/// How long the server stays for the next program.
const LINGER: Duration = Duration::from_secs(10);

/// How long the server does nothing after its last work, before it makes a namespace for the next program: a launch
/// that it has just served needs the processors.
const REST: Duration = Duration::from_millis(20);

/// The number of programs of one server. Further ones get views of their own.
const MAX_PROGRAMS: usize = 256;

/// The system calls of the server, besides [`helpers::BASE_CALLS`] and those of a view's helper.
const CALLS: &[libc::c_long] = &[
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_mount,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_ioctl,
    libc::SYS_getsockopt,
    libc::SYS_pidfd_open,
];

/// What a new server needs.
#[derive(Debug)]
pub(super) struct NewServer {
    /// The server's end of the connection to the launcher that starts it.
    pub(super) first: OwnedFd,
    /// The server's end of the connection to the keeper, which passes those of other launchers.
    pub(super) orders: OwnedFd,
}

/// The view server.
struct Server<'a> {
    /// The program whose process has started the server. Its view is that of the others.
    program: &'a Program,
    template: MountNamespace,
    mirror: Mirror,
    /// The list of mounts of the namespace that the template was made from (proc_pid_mounts(5)). Its poll(2) reports
    /// changes. While it is open, the namespace's number belongs to no other one.
    host_mounts: File,
    /// The connection to the keeper. None once it is closed, or the host's mounts have changed.
    orders: Option<OwnedFd>,
    /// The namespace for the next program.
    spare: Option<View>,
    programs: Vec<ServedProgram>,
}

/// A program that has a view, which ends with its launcher.
struct ServedProgram {
    connection: OwnedFd,
    /// The successor of a keeper, which a launcher starts, may keep the connection open.
    launcher: ProcessHandle,
    view: View,
}

/// The mount namespace of a program, and its own copies there.
struct View {
    namespace: MountNamespace,
    mirror: Mirror,
}

impl Drop for View {
    fn drop(&mut self) {
        self.mirror.unwatch();
    }
}

/// What the server waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Event {
    Orders,
    Changes,
    End(usize),
}

/// Makes the calling process the view server of a program and those that follow, until no program is left.
pub(super) fn run(program: &Program, new: NewServer, starter: &Starter<'_>) -> io::Result<()> {
    helpers::announce(starter.helpers)?;
    let mut server = Server::start(program, new.orders, &new.first, starter)?;
    server.serve_program(new.first)?;
    server.serve()
}

impl<'a> Server<'a> {
    /// Makes the template. Leaves the process only the right to mount, in the template and the namespaces copied from
    /// it, and to read directories.
    fn start(program: &'a Program, orders: OwnedFd, first: &OwnedFd, starter: &Starter<'_>) -> io::Result<Self> {
        for socket in [&orders, first] {
            rustix::io::ioctl_fionbio(socket, true)?;
        }
        // Before the mounts are copied, so that no change is missed.
        let host_mounts = File::open("/proc/self/mountinfo")?;
        mounts::unshare()?;
        let mut mirror = Mirror::new(view::hidden_paths(program, &[]), &program.staging);
        if mirror.changes().is_none() {
            return Err(io::Error::other("the host's directories cannot be watched"));
        }
        view::cover_shared(program, &mut mirror, &[], true).map_err(io::Error::other)?;
        mounts::share()?;
        let template = MountNamespace::current()?;
        // Programs enter the namespace at its root, which must be that of the launcher.
        if !mounts::enter_own_root(&template)? {
            return Err(io::Error::other("the root directory was changed"));
        }
        let own = [orders.as_fd(), first.as_fd(), template.as_fd(), host_mounts.as_fd()];
        let mut kept: Vec<i32> = mirror.descriptors().chain(own.map(|descriptor| descriptor.as_raw_fd())).collect();
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
        Ok(Self { program, template, mirror, host_mounts, orders: Some(orders), spare: None, programs: Vec::new() })
    }

    /// Serves until no program is left.
    fn serve(mut self) -> io::Result<()> {
        let mut deadline = Instant::now() + LINGER;
        let mut spare_failed = false;
        loop {
            let lacks_spare = self.spare.is_none() && self.orders.is_some() && !spare_failed;
            let mut left = lacks_spare.then_some(REST);
            if self.programs.is_empty() {
                let rest = deadline.saturating_duration_since(Instant::now());
                if self.orders.is_none() || rest.is_zero() {
                    return Ok(());
                }
                left = Some(left.map_or(rest, |left| left.min(rest)));
            }
            let events = self.wait(left)?;
            if events.is_empty() && lacks_spare {
                // Without one, the next program waits for its own.
                self.spare = self.make_view().ok();
                spare_failed = self.spare.is_none();
            }
            for event in events.into_iter().rev() {
                // From the last program to the first, so that the numbers of those to come stay right.
                match event {
                    Event::End(number) => {
                        self.programs.remove(number);
                        deadline = Instant::now() + LINGER;
                    }
                    Event::Changes => self.follow_host()?,
                    Event::Orders => {
                        self.take_order()?;
                        spare_failed = false;
                        deadline = Instant::now() + LINGER;
                    }
                }
            }
        }
    }

    fn wait(&self, timeout: Option<Duration>) -> io::Result<Vec<Event>> {
        let mut sources: Vec<(Event, BorrowedFd<'_>, Interest)> = Vec::new();
        sources.extend(self.orders.iter().map(|orders| (Event::Orders, orders.as_fd(), Interest::Readable)));
        sources.extend(self.mirror.changes().map(|changes| (Event::Changes, changes, Interest::Readable)));
        for (number, program) in self.programs.iter().enumerate() {
            sources.push((Event::End(number), program.connection.as_fd(), Interest::Closed));
            sources.push((Event::End(number), program.launcher.as_fd(), Interest::Readable));
        }
        let descriptors: Vec<_> = sources.iter().map(|(_, descriptor, interest)| (*descriptor, *interest)).collect();
        let ready = wait_for_each(&descriptors, timeout)?;
        let ready = sources.iter().zip(ready).filter(|(_, ready)| *ready);
        let mut events: Vec<Event> = ready.map(|((event, ..), _)| *event).collect();
        events.dedup();
        Ok(events)
    }

    /// Receives the connection of a launcher from the keeper, and serves its program.
    fn take_order(&mut self) -> io::Result<()> {
        let Some(orders) = &self.orders else { return Ok(()) };
        match local_socket::receive(orders, &mut [0; 1]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The keeper has ended, or knows another server.
            Ok(None) | Err(_) => self.orders = None,
            // No descriptor arrives at the limit of open files. Then the launcher's connection is closed.
            Ok(Some((_, None))) => {}
            Ok(Some((_, Some(connection)))) => {
                if rustix::io::ioctl_fionbio(&connection, true).is_ok() {
                    return self.serve_program(connection);
                }
            }
        }
        Ok(())
    }

    /// Passes a mount namespace to a launcher. A connection that is closed instead tells the launcher to make a view of
    /// its own.
    fn serve_program(&mut self, connection: OwnedFd) -> io::Result<()> {
        if self.have_host_mounts_changed() {
            self.orders = None;
            let _ = local_socket::send(&connection, &[lease::NO_VIEW_SERVER], None);
            return Ok(());
        }
        if self.programs.len() >= MAX_PROGRAMS {
            return Ok(());
        }
        self.follow_host()?;
        let Ok(view) = self.spare.take().map_or_else(|| self.make_view(), Ok) else { return Ok(()) };
        let sent = local_socket::send(&connection, &[VIEW], Some(view.namespace.as_fd()));
        let launcher = sent.and_then(|()| local_socket::peer_credentials(&connection));
        if let Ok(launcher) = launcher.and_then(|launcher| ProcessHandle::of(launcher.pid)) {
            self.programs.push(ServedProgram { connection, launcher, view });
        }
        Ok(())
    }

    /// Returns whether a mount of the host has appeared, disappeared or changed. Not all spread to the template.
    fn have_host_mounts_changed(&self) -> bool {
        // The list is always readable, and reports a change as an error.
        let changed = wait_for_each(&[(self.host_mounts.as_fd(), Interest::Closed)], Some(Duration::ZERO));
        changed.is_ok_and(|changed| changed != [false])
    }

    /// Makes the mount namespace of a program.
    ///
    /// # Errors
    /// Then the process is in the template again. If that fails, the process ends: it must not mount elsewhere.
    fn make_view(&self) -> io::Result<View> {
        let made = self.make_view_here();
        if self.template.enter().is_err() {
            process::exit_now(1);
        }
        made
    }

    fn make_view_here(&self) -> io::Result<View> {
        mounts::unshare()?;
        let mut mirror = self.mirror.beside(view::hidden_paths(self.program, &[]), &self.program.staging);
        view::cover_run(self.program, &mut mirror).map_err(io::Error::other)?;
        Ok(View { namespace: MountNamespace::current()?, mirror })
    }

    /// Brings the template and the copies of each program up to date. After an error the process must end, as it may be
    /// in the namespace of a program.
    fn follow_host(&mut self) -> io::Result<()> {
        let events = self.mirror.read_events()?;
        if events.is_empty() {
            return Ok(());
        }
        self.mirror.follow(&events);
        for view in self.programs.iter_mut().map(|program| &mut program.view).chain(&mut self.spare) {
            view.namespace.enter()?;
            view.mirror.follow(&events);
        }
        self.template.enter()
    }
}
