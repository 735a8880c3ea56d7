//! The client's side of the protocol: a lease, and the requests that launchers and commands send.
//!
//! - `connect`: the way to a keeper's socket, and the proof that this process is not in the tunnel.
//! - `answers`: waiting for answers and events.
//! - `commands`: requests to the keeper of a tunnel by the tunnel's name, for commands that hold no lease.

mod answers;
mod commands;
mod connect;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use self::answers::{expect_done, timed_out};
pub(super) use self::commands::{StatusQuery, request_over};
pub use self::commands::{hand_over, not_up, reload, take_down, take_down_if};
pub(super) use self::connect::is_public;
use super::messages::{ClientRequest, KeeperEvent, ViewKey, read_answer, send};
use crate::failure::{Doing, Failure};
use crate::linux::local_socket;
use crate::linux::namespace::NetworkNamespace;
use crate::names::TunnelName;
use crate::registry::Scope;

/// How long a keeper may take to answer. Before its first answer it creates its tunnel and runs the hooks.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// The operation that a failure of the connection names.
const TALKING: &str = "talk to the tunnel's keeper";

/// An open connection to a keeper. A client that has joined holds a lease by it.
#[derive(Debug)]
pub struct Lease {
    socket: OwnedFd,
    /// The file that a successor of the keeper needs.
    handover: Option<OwnedFd>,
    /// The tunnel's network namespace, if it has no name by which it could be found.
    namespace: Option<NetworkNamespace>,
    /// Whether the connection is to the public socket, where users may only query the status.
    is_public: bool,
    /// Whether the keeper has told that the tunnel is connected, also while an answer was waited for.
    is_connected: bool,
}

impl Lease {
    /// Creates the lease of a launcher that starts a keeper, and the keeper's end of the connection. Both are closed on
    /// exec.
    ///
    /// # Errors
    /// If the sockets cannot be created.
    pub(crate) fn pair(handover: OwnedFd) -> io::Result<(Self, OwnedFd)> {
        let (socket, keeper_end) = local_socket::pair()?;
        Ok((Self { handover: Some(handover), ..Self::over(socket, false) }, keeper_end))
    }

    /// Creates a connection that holds no lease yet.
    fn over(socket: OwnedFd, is_public: bool) -> Self {
        Self { socket, handover: None, namespace: None, is_public, is_connected: false }
    }

    /// Requests a lease and waits for it. Returns None if the tunnel ends instead.
    ///
    /// # Errors
    /// If the keeper refuses or does not answer.
    pub(crate) fn join(mut self) -> io::Result<Option<Self>> {
        match self.request(ClientRequest::Join, None)? {
            Some((KeeperEvent::Welcome, _)) if Scope::current() == Scope::System => Ok(Some(self)),
            // Its namespace follows.
            Some((KeeperEvent::Welcome, _)) => {
                if !self.wait_readable(ANSWER_TIMEOUT)? {
                    return Err(self.did_not_answer(ANSWER_TIMEOUT));
                }
                match self.next_event()? {
                    Some(KeeperEvent::Named) if self.namespace.is_some() => Ok(Some(self)),
                    _ => Ok(None),
                }
            }
            Some((KeeperEvent::Refused(failure), _)) => Err(io::Error::other(failure)),
            _ => Ok(None),
        }
    }

    /// Returns whether the keeper has told that the tunnel is connected.
    pub(crate) fn is_connected(&self) -> bool {
        self.is_connected
    }

    /// Returns the file that a successor of the keeper needs ([`super::handover`]).
    pub fn handover(&self) -> Option<BorrowedFd<'_>> {
        self.handover.as_ref().map(AsFd::as_fd)
    }

    /// Returns the tunnel's network namespace, if the tunnel is rootless and its namespace exists.
    pub fn namespace(&self) -> Option<&NetworkNamespace> {
        self.namespace.as_ref()
    }

    /// Makes the tunnel a standing one, which stays up when no lease is left.
    ///
    /// # Errors
    /// If the keeper refuses or has ended.
    pub fn stand(&mut self, name: &TunnelName) -> Result<(), Failure> {
        let answer = self.request(ClientRequest::Stand, None);
        expect_done(answer)?.map(drop).ok_or_else(|| not_up(name))
    }

    /// Asks the keeper to change the tunnel to the configuration of this lease's [handover](super::handover) file.
    ///
    /// # Errors
    /// As [`reload`]; also if the keeper has ended.
    pub fn reload(&mut self, name: &TunnelName) -> Result<Vec<String>, Failure> {
        let handover = self.handover.as_ref().map(OwnedFd::try_clone).transpose().doing(TALKING)?;
        let answer = self.request(ClientRequest::Reload, handover.as_ref().map(AsFd::as_fd));
        read_answer(expect_done(answer)?.ok_or_else(|| not_up(name))?).doing(TALKING)
    }

    /// Tells the keeper that the program of this lease has started.
    pub fn started(&self, program: i32) {
        // The end of the keeper is noticed by the next wait for an event.
        let _ = send(&self.socket, &ClientRequest::Started { program }, None);
    }

    /// Tells the keeper the number of connections to processes outside the tunnel that were refused until now.
    pub fn refused(&self, count: u64) {
        let _ = send(&self.socket, &ClientRequest::Refused { count }, None);
    }

    /// Has the keeper pass a connection on to the view server of a key. An older keeper closes it.
    ///
    /// # Errors
    /// If the keeper has ended.
    pub(crate) fn ask_for_view(&self, key: ViewKey, connection: BorrowedFd<'_>) -> io::Result<()> {
        send(&self.socket, &ClientRequest::View { key }, Some(connection))
    }

    /// Tells the keeper of a new view server, by the keeper's end of its connection.
    ///
    /// # Errors
    /// If the keeper has ended.
    pub(crate) fn add_view_server(&self, key: ViewKey, connection: BorrowedFd<'_>) -> io::Result<()> {
        send(&self.socket, &ClientRequest::ViewServer { key }, Some(connection))
    }

    /// Ends the lease, and waits until the tunnel is gone or stays up for others.
    ///
    /// # Errors
    /// If the keeper has ended without taking the tunnel down, or does not answer.
    pub fn leave(self) -> io::Result<()> {
        // Sending fails if the keeper has ended already. The wait reports that.
        let _ = send(&self.socket, &ClientRequest::Leave, None);
        self.wait_for_end(ANSWER_TIMEOUT)
    }

    /// Ends the lease as if this process had died, so that the keeper kills the processes that its program left behind,
    /// and waits until that is done.
    ///
    /// # Errors
    /// If the keeper has ended without taking the tunnel down, or does not answer.
    pub fn abandon(self) -> io::Result<()> {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
        self.wait_for_end(ANSWER_TIMEOUT)
    }

    /// Requests the end of the tunnel, and waits for it. Returns whether the keeper was still there.
    fn take_down(mut self, force: bool) -> Result<bool, Failure> {
        match self.request(ClientRequest::Down { force }, None) {
            // With force, the keeper first tells why the programs are killed.
            Ok(Some((KeeperEvent::Failed(_), _))) if force => {
                self.wait_for_end(ANSWER_TIMEOUT).doing(TALKING).map(|()| true)
            }
            answer => Ok(expect_done(answer)?.is_some()),
        }
    }

    /// Waits until the tunnel is gone or stays up for others. `timeout` is the longest time between two events.
    fn wait_for_end(mut self, timeout: Duration) -> io::Result<()> {
        loop {
            if !self.wait_readable(timeout)? {
                let seconds = timeout.as_secs();
                return Err(timed_out(format!("the tunnel's keeper sent nothing for {seconds} s")));
            }
            match self.next_event()? {
                Some(KeeperEvent::Gone | KeeperEvent::Left) => return Ok(()),
                Some(_) => {}
                None => {
                    let ended = "the keeper has ended without taking the tunnel down";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, ended));
                }
            }
        }
    }
}

impl AsFd for Lease {
    /// Returns a descriptor that is readable when there is an event or the keeper has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
