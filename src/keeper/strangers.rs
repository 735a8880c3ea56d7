//! The connections of users who may do no more than ask how the tunnel is. They have a socket of their own, so that
//! neither the connections that wait at it nor those that are open keep anybody else waiting.
//!
//! Nothing that could block on an object of theirs is done in the keeper's loop. What they send is looked at and left
//! unread, so no descriptor that they pass is ever opened or closed here; where it can, the kernel refuses such
//! descriptors. Each may ask once, is answered by bytes alone (descriptors that wait to be received count against the
//! keeper's own limit), and its connection is closed apart.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use super::visitors::Number;
use crate::fault;
use crate::lease::{self, Event, MESSAGE, Request};
use crate::linux::background_close::close_in_background;
use crate::linux::local_socket::{self, LocalListener};
use crate::linux::poll::Interest;

/// The mode of the socket: any user may connect.
const SOCKET_MODE: u32 = 0o666;

/// How many connections may be open. When there are as many, more wait at the socket.
const TOTAL: usize = 128;

/// How many connections of one user are served at a time.
const SERVED: usize = 16;

/// How many connections of one user may be open: those beyond [`SERVED`] are told that there are too many, those beyond
/// this are closed.
const OPEN: usize = 2 * SERVED;

/// How many connections are accepted before others have their turn: a user can connect again as fast as connections are
/// closed.
const AT_ONCE: usize = 16;

/// How long one may stay: a client asks as soon as it has connected, and leaves as soon as it has its answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// One connection.
struct Stranger {
    socket: OwnedFd,
    user: u32,
    until: Duration,
    /// Whether it has its answer, so that only its end is waited for: if the keeper closed a connection with something
    /// unread in it, the client could not read the answer (unix(7) has it `ECONNRESET`).
    is_answered: bool,
}

/// All of them.
pub(super) struct Strangers {
    door: Option<LocalListener>,
    all: BTreeMap<Number, Stranger>,
    next: Number,
}

impl Strangers {
    /// Opens the socket for them.
    pub(super) fn listen(path: &Path) -> io::Result<Self> {
        let door = LocalListener::bind(path, SOCKET_MODE)?;
        if !fault::is_broken("passrights") && !door.refuse_descriptors()? {
            tracing::debug!("this kernel cannot refuse descriptors that other users pass");
        }
        Ok(Self { door: Some(door), all: BTreeMap::new(), next: 0 })
    }

    /// The socket, if one more can be let in.
    pub(super) fn door(&self) -> Option<BorrowedFd<'_>> {
        self.door.as_ref().filter(|_| self.all.len() < TOTAL).map(AsFd::as_fd)
    }

    /// Lets in some of those who wait.
    pub(super) fn open_door(&mut self, now: Duration) -> io::Result<()> {
        for _ in 0..AT_ONCE {
            let Some(door) = self.door.as_ref().filter(|_| self.all.len() < TOTAL) else { break };
            let Some((socket, who)) = door.accept()? else { break };
            let open = self.all.values().filter(|stranger| stranger.user == who.uid).count();
            let mut stranger = Stranger { socket, user: who.uid, until: now + PATIENCE, is_answered: false };
            if open >= OPEN {
                stranger.close();
                continue;
            }
            if open >= SERVED {
                stranger.answer(&Event::Busy, &[]);
            }
            self.all.insert(self.next, stranger);
            self.next += 1;
        }
        Ok(())
    }

    /// What to wait for.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = (Number, BorrowedFd<'_>, Interest)> {
        self.all.iter().map(|(number, stranger)| {
            let awaited = if stranger.is_answered { Interest::Closed } else { Interest::Readable };
            (*number, stranger.socket.as_fd(), awaited)
        })
    }

    /// What one asks for. It is closed if it has ended, or cannot be understood.
    pub(super) fn hear(&mut self, number: Number) -> Option<Request> {
        let stranger = self.all.get(&number)?;
        let mut message = vec![0; MESSAGE];
        let heard = match local_socket::peek(&stranger.socket, &mut message) {
            _ if stranger.is_answered => None,
            Ok(Some(length)) => serde_json::from_slice(&message[..length]).ok(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            Ok(None) | Err(_) => None,
        };
        if heard.is_none() {
            self.close(number);
        }
        heard
    }

    /// Answers one, with a text where there is one.
    pub(super) fn answer(&mut self, number: Number, event: &Event, text: &[u8]) {
        if let Some(stranger) = self.all.get_mut(&number) {
            stranger.answer(event, text);
        }
    }

    fn close(&mut self, number: Number) {
        if let Some(stranger) = self.all.remove(&number) {
            stranger.close();
        }
    }

    /// When the next one has stayed for long enough.
    pub(super) fn due(&self) -> Option<Duration> {
        self.all.values().map(|stranger| stranger.until).min()
    }

    /// Closes the connections of those who have stayed for long enough.
    pub(super) fn dismiss_idle(&mut self, now: Duration) {
        let late: Vec<Number> =
            self.all.iter().filter(|(_, stranger)| stranger.until <= now).map(|(number, _)| *number).collect();
        late.into_iter().for_each(|number| self.close(number));
    }
}

impl Stranger {
    /// Sends the event, and the text in pieces up to the end. One that does not receive them is not waited for.
    fn answer(&mut self, event: &Event, text: &[u8]) {
        let mut pieces = text.chunks(MESSAGE);
        let sent = lease::send(&self.socket, event, None)
            .and_then(|()| pieces.try_for_each(|piece| local_socket::send(&self.socket, piece, None)));
        if let Err(error) = sent {
            tracing::debug!(%error, "another user's client does not receive its answer");
        }
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
        self.is_answered = true;
    }

    fn close(self) {
        close(self.socket);
    }
}

impl Drop for Strangers {
    fn drop(&mut self) {
        // With the socket go the connections that wait at it.
        self.door.take().into_iter().for_each(|door| close(door.into()));
        std::mem::take(&mut self.all).into_values().for_each(Stranger::close);
    }
}

fn close(socket: OwnedFd) {
    if fault::is_broken("apart") { drop(socket) } else { close_in_background(socket) }
}
