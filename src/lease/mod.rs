//! What the keeper and those who want something of its tunnel say to each other.
//!
//! They speak by messages over a local socket (unix(7), SOCK_SEQPACKET) at `/run/vpn-exec/NAME/socket`. Anybody may ask how the
//! tunnel is; all else is for the keeper's own user alone. Whoever asks to join holds a *lease* from then on: the open
//! connection. The kernel closes it however its holder ends, so nobody needs to say so.

pub mod handover;
pub mod status;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::failure::Failure;
use crate::linux::local_socket;
use crate::linux::memory_file;
use crate::linux::poll::{wait_for, wait_with_signals_unblocked};
use crate::names::TunnelName;
use crate::registry;

/// The longest message. What may be longer is passed as a file in memory.
pub(super) const MESSAGE: usize = 8192;

/// How long a keeper may take before its visitor can be interrupted: longer than killing what is left in a tunnel takes.
const DEAF: Duration = Duration::from_secs(6);

/// How long a keeper may take to answer. Before it answers anybody, it makes its tunnel, with all hooks.
pub(super) const ANSWER: Duration = Duration::from_secs(60);

/// What the keeper tells those who have asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The namespace is there, has its name, and holds nothing but `lo`.
    Named,
    /// The tunnel is made, and closed to all but itself. No handshake may have been completed yet.
    Made,
    /// A handshake has been completed with a peer.
    Connected,
    /// The tunnel could not be made, or it ends. Nothing of it is left, or will be in an instant.
    Failed {
        /// Why.
        reason: String,
        /// What can be done about it.
        advice: Option<String>,
    },
    /// The tunnel's names are taken away. What follows is the kernel's affair.
    Gone,
    /// You hold a lease on a tunnel that is made. With it comes what a successor of the keeper needs.
    Welcome,
    /// Your lease has ended. Others still want the tunnel.
    Left,
    /// What was asked for is not done, and nothing has changed.
    Refused {
        /// Why.
        reason: String,
        /// What can be done about it.
        advice: Option<String>,
    },
    /// What was asked for is done. With it comes the answer, where there is one: JSON in a file in memory.
    Done,
    /// Too many connections of this user are open. Nothing has changed.
    Busy,
    /// The configuration is another now: this is what a successor of the keeper needs from now on.
    Changed,
}

impl Event {
    pub(super) fn failed(error: &Failure) -> Self {
        Self::Failed { reason: error.message.clone(), advice: error.advice.clone() }
    }
}

/// What the keeper is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Request {
    /// A lease on the tunnel.
    Join,
    /// The tunnel shall stay when nobody holds a lease on it.
    Stand,
    /// The program of this lease runs; this is its number.
    Started {
        /// The program's process.
        program: i32,
    },
    /// So many connections of this lease's programs to processes outside the tunnel were refused until now.
    Refused {
        /// How many.
        count: u64,
    },
    /// The lease is not wanted any more; what still runs inside was killed or has ended.
    Leave,
    /// How the tunnel is.
    Report,
    /// Make the tunnel what the configuration says that comes with this. Without one, the keeper reads its own again.
    Reload,
    /// Take the tunnel down.
    Down {
        /// Even if programs are inside, which are killed.
        force: bool,
    },
    /// End, and leave all as it is, for a successor.
    GiveWay,
}

/// How long a keeper may take to say how its tunnel is: it has that at hand.
const REPORT: Duration = Duration::from_secs(2);

/// How long a keeper may take to answer a request.
fn patience_for(request: Request) -> Duration {
    if request == Request::Report { REPORT } else { ANSWER }
}

/// An open connection to a keeper: whoever has asked to join holds a lease by it.
#[derive(Debug)]
pub struct Lease {
    socket: OwnedFd,
    /// What a successor of the keeper needs.
    handover: Option<OwnedFd>,
    /// Whether it is a connection of a user who may only ask how the tunnel is.
    is_public: bool,
}

impl Lease {
    /// Makes a lease for who starts a keeper, and the keeper's end of it. Both are closed at the next exec.
    pub(super) fn pair(handover: OwnedFd) -> io::Result<(Self, OwnedFd)> {
        let (socket, keepers) = local_socket::pair()?;
        Ok((Self { socket, handover: Some(handover), is_public: false }, keepers))
    }

    /// Connects to the keeper of a tunnel, if there is one that answers.
    ///
    /// # Errors
    /// What the system refuses; `TimedOut` if it lets nobody in for `patience`. That nobody is there is none.
    pub(super) fn connect(name: &TunnelName, patience: Duration) -> io::Result<Option<Self>> {
        let connected = local_socket::connect(&registry::socket_of(name), patience).map(|socket| (socket, false));
        let connected = match connected {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                local_socket::connect(&registry::public_socket_of(name), patience).map(|socket| (socket, true))
            }
            other => other,
        };
        let (socket, is_public) = match connected {
            Ok(connected) => connected,
            Err(error) if is_absence(&error) => return Ok(None),
            // Something else is where tunnels have their state: nobody can be behind it, and whoever wants to be is told.
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let late = format!("the tunnel's keeper lets nobody in within {} s", patience.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, late));
            }
            Err(error) => return Err(error),
        };
        Ok(Some(Self { socket, handover: None, is_public }))
    }

    /// Asks for a lease, and waits for it. None if the tunnel ends instead.
    pub(super) fn join(mut self) -> io::Result<Option<Self>> {
        match self.ask(Request::Join, None) {
            Ok(Some((Event::Welcome, _))) => Ok(Some(self)),
            Ok(Some((Event::Refused { reason, .. }, _))) => {
                Err(io::Error::new(io::ErrorKind::PermissionDenied, reason))
            }
            Ok(_) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Asks for something, and waits for the answer: the first that is none of the tunnel's news. None if the keeper ends instead, or has
    /// ended since it was connected to.
    pub(super) fn ask(
        &mut self,
        request: Request,
        passed: Option<BorrowedFd<'_>>,
    ) -> io::Result<Option<(Event, Option<OwnedFd>)>> {
        match self.ask_living(request, passed) {
            Err(error) if is_absence(&error) => Ok(None),
            other => other,
        }
    }

    fn ask_living(
        &mut self,
        request: Request,
        passed: Option<BorrowedFd<'_>>,
    ) -> io::Result<Option<(Event, Option<OwnedFd>)>> {
        // A descriptor of another user would be refused with the request, for whose refusal the keeper has better
        // words.
        send(&self.socket, &request, passed.filter(|_| !self.is_public))?;
        let patience = patience_for(request);
        let begin = Instant::now();
        loop {
            if !self.await_word(patience.saturating_sub(begin.elapsed()))? {
                let keeper = local_socket::peer_credentials(&self.socket)?.pid;
                let late =
                    format!("the tunnel's keeper, process {keeper}, does not answer within {} s", patience.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, late));
            }
            match self.next_with_file() {
                Ok(Some((Event::Named | Event::Made | Event::Connected | Event::Changed, _))) => {}
                Ok(Some((Event::Done, None))) if self.is_public => {
                    let text = self.rest(begin, patience)?;
                    return Ok(Some((Event::Done, Some(memory_file::seal(&text)?))));
                }
                other => return other,
            }
        }
    }

    /// Receives all that follows, up to the end.
    fn rest(&self, begin: Instant, patience: Duration) -> io::Result<Vec<u8>> {
        let (mut text, mut piece) = (Vec::new(), vec![0; MESSAGE]);
        while self.await_word(patience.saturating_sub(begin.elapsed()))? {
            match local_socket::receive(&self.socket, &mut piece)? {
                Some((length, _)) => text.extend_from_slice(&piece[..length]),
                None => return Ok(text),
            }
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "the tunnel's keeper does not finish its answer"))
    }

    /// Waits until the keeper says something, and says whether it does. One that hangs shall not take its visitors with it: after a while,
    /// the signals that the visitor keeps for its program come through, and end it.
    fn await_word(&self, patience: Duration) -> io::Result<bool> {
        let deaf = patience.min(DEAF);
        let said = wait_for(&[self.socket.as_fd()], Some(deaf))?[0];
        Ok(said || wait_with_signals_unblocked(self.socket.as_fd(), patience - deaf)?)
    }

    /// Waits for the next event; none if the keeper has ended.
    pub fn next_event(&mut self) -> io::Result<Option<Event>> {
        Ok(self.next_with_file()?.map(|(event, _)| event))
    }

    fn next_with_file(&mut self) -> io::Result<Option<(Event, Option<OwnedFd>)>> {
        let Some((event, mut file)) = receive(&self.socket)? else { return Ok(None) };
        if matches!(event, Event::Welcome | Event::Changed) {
            self.handover = file.take();
        }
        Ok(Some((event, file)))
    }

    /// What a successor of the keeper needs: see [`handover`].
    pub fn handover(&self) -> Option<BorrowedFd<'_>> {
        self.handover.as_ref().map(AsFd::as_fd)
    }

    /// Has the tunnel stay when nobody holds a lease on it any more.
    pub fn stand(&mut self, name: &TunnelName) -> Result<(), AskError> {
        let answer = self.ask(Request::Stand, None);
        done(name, answer).map(drop)
    }

    /// Says that the program of this lease runs.
    pub fn started(&self, program: i32) {
        // A keeper that has ended is noticed where it is waited for.
        let _ = send(&self.socket, &Request::Started { program }, None);
    }

    /// Says how many connections of the programs to processes outside the tunnel were refused until now.
    pub fn refused(&self, count: u64) {
        // As above.
        let _ = send(&self.socket, &Request::Refused { count }, None);
    }

    /// Says that the tunnel is not wanted any more, and waits until it is gone, or stays for others.
    pub fn leave(self) -> io::Result<()> {
        // A keeper that has ended already cannot be told.
        let _ = send(&self.socket, &Request::Leave, None);
        self.await_end(ANSWER)
    }

    /// Has the keeper end what still runs in the tunnel, as if this process had died, and waits until that is done.
    pub fn abandon(self) -> io::Result<()> {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
        self.await_end(ANSWER)
    }

    /// Waits until the tunnel is gone, or stays for others. A keeper that says nothing for `patience` is not waited for
    /// any longer.
    fn await_end(mut self, patience: Duration) -> io::Result<()> {
        loop {
            if !self.await_word(patience)? {
                let late = format!("the tunnel's keeper says nothing for {} s", patience.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, late));
            }
            match self.next_event()? {
                Some(Event::Gone | Event::Left) => return Ok(()),
                Some(_) => {}
                None => break,
            }
        }
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the keeper has ended without taking the tunnel down"))
    }
}

impl AsFd for Lease {
    /// Readable when there is an event, or when the keeper has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Whether the caller's user may only ask how the tunnel of a name is, because its keeper belongs to another user.
pub(super) fn is_public(name: &TunnelName) -> bool {
    let may = rustix::fs::access(registry::socket_of(name), rustix::fs::Access::WRITE_OK);
    matches!(may, Err(rustix::io::Errno::ACCESS))
}

/// Whether an error says that nobody is there, or not any more.
fn is_absence(error: &io::Error) -> bool {
    let gone = [libc::ENOENT, libc::ECONNREFUSED, libc::ECONNRESET, libc::EPIPE, libc::ENOTCONN];
    error.raw_os_error().is_some_and(|number| gone.contains(&number))
}

/// Asks the keeper of a tunnel for something, and waits for the answer. None if there is no keeper, or none any more.
pub(super) fn ask(
    name: &TunnelName,
    request: Request,
    passed: Option<BorrowedFd<'_>>,
) -> io::Result<Option<(Event, Option<OwnedFd>)>> {
    match Lease::connect(name, patience_for(request))? {
        Some(mut connection) => connection.ask(request, passed),
        None => Ok(None),
    }
}

/// Why a keeper does not do what it was asked for.
#[derive(Debug, Error)]
pub enum AskError {
    /// There is no keeper.
    #[error("the tunnel {0} is not up")]
    Absent(TunnelName),
    /// It has refused, and nothing has changed.
    #[error("{reason}")]
    Refused {
        /// Why.
        reason: String,
        /// What can be done about it.
        advice: Option<String>,
    },
    /// It cannot be asked.
    #[error("cannot talk to the tunnel's keeper: {0}")]
    System(#[from] io::Error),
}

impl From<AskError> for Failure {
    fn from(error: AskError) -> Self {
        match error {
            AskError::Absent(name) => {
                Failure::new(format!("the tunnel {name} is not up")).advise("see `vpn-exec list`")
            }
            AskError::Refused { reason, advice } => Failure { advice, ..Failure::new(reason) },
            AskError::System(_) => Failure::new(error),
        }
    }
}

/// The answer to a request that is done or refused.
fn done(name: &TunnelName, answer: io::Result<Option<(Event, Option<OwnedFd>)>>) -> Result<Option<OwnedFd>, AskError> {
    match answer? {
        Some((Event::Done | Event::Gone, file)) => Ok(file),
        Some((Event::Refused { reason, advice } | Event::Failed { reason, advice }, _)) => {
            Err(AskError::Refused { reason, advice })
        }
        Some((Event::Busy, _)) => {
            Err(io::Error::new(io::ErrorKind::WouldBlock, "too many connections are open").into())
        }
        Some((event, _)) => {
            Err(io::Error::new(io::ErrorKind::InvalidData, format!("an unexpected answer: {event:?}")).into())
        }
        None => Err(AskError::Absent(name.clone())),
    }
}

/// Has the keeper of a tunnel change it to what a configuration says that is handed over ([`handover`]), or, without one, to what
/// the keeper reads where it read its own. Returns what has changed, a phrase each.
pub fn reload(name: &TunnelName, handover: Option<BorrowedFd<'_>>) -> Result<Vec<String>, AskError> {
    let file = done(name, ask(name, Request::Reload, handover))?;
    Ok(read_answer(file)?)
}

/// Has the keeper of a tunnel take it down, even if programs are inside where that is `force`d; waits until it is gone.
pub fn take_down(name: &TunnelName, force: bool) -> Result<(), AskError> {
    let Some(mut connection) = Lease::connect(name, ANSWER)? else { return Err(AskError::Absent(name.clone())) };
    match connection.ask(Request::Down { force }, None) {
        // With force, it says first why programs are ended.
        Ok(Some((Event::Failed { .. }, _))) if force => Ok(connection.await_end(ANSWER)?),
        answer => done(name, answer).map(drop),
    }
}

/// Has the keeper of a tunnel end for a successor, which gets the claim on the tunnel's name.
pub fn give_way(name: &TunnelName) -> Result<OwnedFd, AskError> {
    let claim = done(name, ask(name, Request::GiveWay, None))?;
    claim.ok_or_else(|| AskError::System(io::Error::new(io::ErrorKind::InvalidData, "no claim was passed")))
}

/// Sends a message, with a descriptor if there is one to be passed.
pub(super) fn send(socket: &OwnedFd, message: &impl Serialize, passed: Option<BorrowedFd<'_>>) -> io::Result<()> {
    local_socket::send(socket, &serde_json::to_vec(message)?, passed)
}

/// Receives a message, with a descriptor if one was passed. None at the end.
pub(super) fn receive<T: for<'a> Deserialize<'a>>(socket: &OwnedFd) -> io::Result<Option<(T, Option<OwnedFd>)>> {
    let mut buffer = vec![0; MESSAGE];
    let Some((length, passed)) = local_socket::receive(socket, &mut buffer)? else { return Ok(None) };
    Ok(Some((serde_json::from_slice(&buffer[..length])?, passed)))
}

/// Puts an answer that may be long into a file in memory.
pub(super) fn answer_file(answer: &impl Serialize) -> io::Result<OwnedFd> {
    memory_file::seal(&serde_json::to_vec(answer)?)
}

/// Reads an answer from a file in memory.
pub(super) fn read_answer<T: for<'a> Deserialize<'a>>(file: Option<OwnedFd>) -> io::Result<T> {
    /// More than a machine full of peers.
    const LONGEST: usize = 64 << 20;

    let file = file.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the keeper's answer is missing"))?;
    Ok(serde_json::from_slice(&memory_file::read(file.as_fd(), LONGEST)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A keeper that is killed may leave a connection in its queue, which is broken before anything was said or after.
    #[test]
    fn a_keeper_that_has_ended_since_is_none() {
        for has_heard in [false, true] {
            let (socket, keepers) = local_socket::pair().expect("a pair");
            if has_heard {
                // What was said and not read is an error for who said it, not an end.
                send(&socket, &Request::Report, None).expect("sent");
            }
            drop(keepers);
            let answer = Lease { socket, handover: None, is_public: false }.ask(Request::Down { force: true }, None);
            assert!(matches!(answer, Ok(None)), "{answer:?}");
        }
    }

    #[test]
    fn a_keeper_that_says_nothing_is_not_waited_for() {
        let (socket, _keepers) = local_socket::pair().expect("a pair");
        let lease = Lease { socket, handover: None, is_public: false };
        let error = lease.await_end(Duration::from_millis(10)).expect_err("it says nothing");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
