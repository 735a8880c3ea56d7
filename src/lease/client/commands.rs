//! Requests to the keeper of a tunnel by the tunnel's name, for commands that hold no lease.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use super::answers::{REPORT_TIMEOUT, Reply, expect_done, timeout_of};
use super::connect::is_absence;
use super::{ANSWER_TIMEOUT, Lease, TALKING};
use crate::failure::{Doing, Failure};
use crate::lease::messages::{ClientRequest, read_answer};
use crate::lease::unnamed::UnnamedTunnel;
use crate::names::TunnelName;
use crate::registry::{self, Scope, TunnelState};

/// A question for the status of a tunnel that was sent to its keeper.
pub(in crate::lease) struct StatusQuery {
    connection: Lease,
    sent: Instant,
}

impl StatusQuery {
    /// Sends the question. Returns None if there is no keeper.
    pub(in crate::lease) fn send(name: &TunnelName) -> io::Result<Option<Self>> {
        let sent = Instant::now();
        let Some(connection) = Lease::connect(name, REPORT_TIMEOUT)? else { return Ok(None) };
        match connection.send_request(&ClientRequest::Report, None) {
            Ok(()) => Ok(Some(Self { connection, sent })),
            Err(error) if is_absence(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits for the answer. Returns None if the keeper ends first.
    pub(in crate::lease) fn answer(mut self) -> io::Result<Option<Reply>> {
        match self.connection.wait_for_answer(ClientRequest::Report, self.sent) {
            Err(error) if is_absence(&error) => Ok(None),
            other => other,
        }
    }
}

/// Sends a request to the keeper of a tunnel and waits for the answer. Returns None if there is no keeper, or if it
/// ends first.
fn request(name: &TunnelName, request: ClientRequest, passed: Option<BorrowedFd<'_>>) -> io::Result<Option<Reply>> {
    match Lease::connect(name, timeout_of(request))? {
        Some(mut connection) => connection.request(request, passed),
        None => Ok(None),
    }
}

/// Sends a request over a connection to a public socket and waits for the answer. Returns None if the process at the
/// other end ends first.
pub(in crate::lease) fn request_over(socket: OwnedFd, request: ClientRequest) -> io::Result<Option<Reply>> {
    Lease::over(socket, true).request(request, None)
}

/// Returns the failure of a request to a tunnel that has no keeper.
pub fn not_up(name: &TunnelName) -> Failure {
    Failure::new(format!("the tunnel {name} is not up")).advise("see `vpn-exec list`")
}

/// Asks the keeper of a tunnel to change it to the configuration in a [handover](crate::lease::handover) file. Without
/// one, the keeper reads the configuration again. Returns a phrase for each change, or None if there is no keeper.
///
/// # Errors
/// If the keeper refuses or does not answer. If it refuses, nothing has changed.
pub fn reload(name: &TunnelName, handover: Option<BorrowedFd<'_>>) -> Result<Option<Vec<String>>, Failure> {
    let Some(file) = expect_done(request(name, ClientRequest::Reload, handover))? else { return Ok(None) };
    read_answer(file).doing(TALKING).map(Some)
}

/// Asks the keeper of a tunnel to take it down, and waits until it is gone. With `force`, the keeper kills the programs
/// inside. Returns whether there is a keeper.
///
/// # Errors
/// If the keeper refuses because programs are inside, or does not answer.
pub fn take_down(name: &TunnelName, force: bool) -> Result<bool, Failure> {
    let Some(connection) = Lease::connect(name, ANSWER_TIMEOUT).doing(TALKING)? else { return Ok(false) };
    connection.take_down(force)
}

/// Asks the keeper of a tunnel to take it down, with its programs, if `is_meant` selects its state. Waits until the
/// tunnel is gone. Returns whether there was such a keeper.
///
/// # Errors
/// If the state cannot be read, or the keeper does not answer.
pub fn take_down_if(name: &TunnelName, is_meant: &dyn Fn(&TunnelState) -> bool) -> Result<bool, Failure> {
    let Some(connection) = Lease::connect(name, ANSWER_TIMEOUT).doing(TALKING)? else { return Ok(false) };
    // Read after the connection is made: it is one to the keeper of this state, or to a former one that is ending. So
    // no other tunnel that gets the name meanwhile is removed.
    let state = registry::read(name).map_err(Failure::new)?;
    if !state.is_some_and(|state| is_meant(&state)) {
        return Ok(false);
    }
    connection.take_down(true)
}

/// Asks the keeper of a tunnel to hand it over: the keeper passes the lock of the tunnel's directory, and ends. Returns
/// None if there is no keeper.
///
/// # Errors
/// If the keeper refuses or does not answer.
pub fn hand_over(name: &TunnelName) -> Result<Option<(OwnedFd, Option<UnnamedTunnel>)>, Failure> {
    let Some(mut connection) = Lease::connect(name, ANSWER_TIMEOUT).doing(TALKING)? else { return Ok(None) };
    let Some(lock) = expect_done(connection.request(ClientRequest::HandOver, None))? else { return Ok(None) };
    let missing = || io::Error::new(io::ErrorKind::InvalidData, "it did not pass the lock");
    let lock = lock.ok_or_else(missing).doing(TALKING)?;
    let unnamed = (Scope::current() == Scope::User).then(|| connection.unnamed()).transpose().doing(TALKING)?;
    Ok(Some((lock, unnamed)))
}
