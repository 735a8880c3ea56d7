//! The view of files that the programs of a tunnel share, so that one process keeps it up to date for all of them.
//!
//! The first program that joins the tunnel has a process made, the *view server* ([`server`]). It lives in a mount
//! namespace of its own, the template, in which all but the program's `/run` is covered by copies. For each program the
//! server makes a copy of that namespace, which takes a tenth of the time of making the copies of files, and covers
//! `/run` there: programs write to it, so each has its own.
//!
//! - Launchers and servers meet at the keeper, over the leases of the launchers. So no process inside can stand in for
//!   either of them.
//! - A server serves only launchers in the place that its template was made from: see [`key`]. All others, and those
//!   that the server does not answer, make a view of their own.
//! - The server ends a moment after the last program, or at once if the keeper has ended as well.

mod key;
mod server;

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::enter::Starter;
use super::{Program, view};
use crate::failure::{Doing, Failure};
use crate::lease::{self, Lease};
use crate::linux::capabilities::CapabilitySet;
use crate::linux::local_socket;
use crate::linux::mounts::MountNamespace;
use crate::linux::poll::{Interest, wait_for, wait_for_each};
use crate::linux::process::{self, Forked};
use crate::linux::user_namespace;
use server::NewServer;

/// How long a launcher waits for the keeper and the server, before it makes a view of its own.
const PATIENCE: Duration = Duration::from_secs(2);

/// The server's answer, which passes the program's mount namespace.
const VIEW: u8 = 1;

/// A launcher's question for the mount namespace of its program, which was sent to the keeper.
#[derive(Debug)]
pub(super) struct ViewQuery {
    key: lease::ViewKey,
    connection: OwnedFd,
}

/// A launcher's connection to a view server, which may still have to be started. The server keeps the program's view up
/// to date for as long as the launcher has the connection open.
#[derive(Debug)]
pub(super) struct SharedView {
    source: Source,
    connection: OwnedFd,
}

#[derive(Debug)]
enum Source {
    /// The mount namespace that a server has made for the program.
    Made(MountNamespace),
    /// What a new server needs.
    New(NewServer),
}

impl ViewQuery {
    /// Asks the keeper for the view of a program. Returns none if the program must have a view of its own.
    pub(super) fn send(program: &Program, lease: &Lease) -> Option<Self> {
        if !can_share(program) {
            return None;
        }
        let sent = || -> io::Result<Self> {
            let key = key::of(program)?;
            let (connection, theirs) = local_socket::pair()?;
            lease.ask_for_view(key, theirs.as_fd())?;
            Ok(Self { key, connection })
        };
        sent().inspect_err(|error| tracing::debug!(%error, "cannot ask for the view of the tunnel's programs")).ok()
    }

    /// Waits for the answer. Without a view server, prepares one, and tells the keeper of it. Returns none if
    /// the program must have a view of its own.
    pub(super) fn answer(self, lease: &Lease) -> Option<SharedView> {
        self.try_answer(lease).unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot share the view of the tunnel's programs");
            None
        })
    }

    fn try_answer(self, lease: &Lease) -> io::Result<Option<SharedView>> {
        match await_answer(&self.connection)? {
            Answer::View(namespace) => {
                Ok(Some(SharedView { source: Source::Made(namespace), connection: self.connection }))
            }
            Answer::NoServer => {
                let (connection, first) = local_socket::pair()?;
                let (keepers, orders) = local_socket::pair()?;
                lease.add_view_server(self.key, keepers.as_fd())?;
                Ok(Some(SharedView { source: Source::New(NewServer { first, orders }), connection }))
            }
        }
    }
}

impl SharedView {
    /// Returns the connection, which the launcher keeps for as long as its program runs.
    pub(super) fn into_connection(self) -> OwnedFd {
        self.connection
    }

    /// Moves the calling process into the mount namespace with the program's view. Starts the server if there is none
    /// yet, as a child of the launcher.
    ///
    /// # Errors
    /// If the server does not do its part. Then the process is where it was.
    pub(super) fn enter(self, program: &Program, starter: &Starter<'_>) -> Result<(), Failure> {
        let Self { source, connection } = self;
        let entered = match source {
            Source::Made(namespace) => namespace.enter().doing("enter the view that programs share"),
            Source::New(new) => start_server(new, program, starter)
                .and_then(|()| match await_answer(&connection)? {
                    Answer::View(namespace) => namespace.enter(),
                    Answer::NoServer => Err(io::ErrorKind::InvalidData.into()),
                })
                .doing("start the view server"),
        };
        if entered.is_err() {
            // The server and the launcher learn that the program does without.
            let _ = rustix::net::shutdown(&connection, rustix::net::Shutdown::Both);
        }
        entered
    }
}

fn start_server(new: NewServer, program: &Program, starter: &Starter<'_>) -> io::Result<()> {
    match process::fork_sibling()? {
        Forked::Parent(_) => Ok(()),
        Forked::Child => process::exit_now(i32::from(server::run(program, new, starter).is_err())),
    }
}

/// Returns whether the server at the other end of a connection has ended, or the program has a view of its own.
pub(super) fn has_ended(connection: &OwnedFd) -> bool {
    // A late answer, for which the program did not wait, does not mean that the server has ended.
    let closed = wait_for_each(&[(connection.as_fd(), Interest::Closed)], Some(Duration::ZERO));
    closed.is_ok_and(|closed| closed == [true])
}

/// Returns whether a program may use a view together with others. Programs that may mount must not: they could change
/// what the server sees. Neither may those that see the host's files for a test, nor those on a machine where more
/// directories than `/run` are written to.
fn can_share(program: &Program) -> bool {
    let is_directory = |path: &str| fs::symlink_metadata(path).is_ok_and(|found| found.is_dir());
    program.joins
        && !program.kept.contains(CapabilitySet::SYS_ADMIN)
        && !view::shows_host_names()
        && view::linked_directories().is_empty()
        && !is_directory("/var/run")
        && is_directory("/run")
}

/// The answer to a question for a view.
enum Answer {
    View(MountNamespace),
    /// The keeper knows no view server of the key.
    NoServer,
}

fn await_answer(connection: &OwnedFd) -> io::Result<Answer> {
    if wait_for(&[connection.as_fd()], Some(PATIENCE))? != [true] {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut answer = [0; 1];
    match local_socket::receive(connection, &mut answer)?.ok_or(io::ErrorKind::UnexpectedEof)? {
        (_, Some(namespace)) if answer == [VIEW] && user_namespace::owns(namespace.as_fd())? => {
            Ok(Answer::View(namespace.into()))
        }
        (_, None) if answer == [lease::NO_VIEW_SERVER] => Ok(Answer::NoServer),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
