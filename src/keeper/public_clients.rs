//! Clients of users who may only query the tunnel's status. They have a socket of their own, so that neither their
//! waiting nor their open connections keep the keeper's own user waiting.
//!
//! The event loop does nothing that could block on an object of theirs:
//!
//! - It peeks at their requests and leaves them unread, so it never receives, and never has to close, a descriptor that
//!   they pass. Where the kernel supports it, the kernel rejects such descriptors (SO_PASSRIGHTS, Linux 6.16).
//! - Each client is answered once, with bytes only: descriptors that wait to be received count against the keeper's own
//!   limit.
//! - Their connections are closed on another thread.
//!
//! The process of an attached tunnel serves its clients in the same way. There, a process of another container may have
//! the same user. It has another PID namespace as a rule, so the clients whose process ID is not visible here are
//! counted apart, and leave room for the others.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use super::clients::ConnectionId;
use crate::fault;
use crate::lease::{self, KeeperEvent, MAX_MESSAGE, Received};
use crate::linux::background_close::close_in_background;
use crate::linux::local_socket::{self, LocalListener};
use crate::linux::poll::Interest;

/// The mode of the socket: any user may connect.
const SOCKET_MODE: u32 = 0o666;

/// The number of open connections. Further ones wait at the socket.
const MAX_OPEN: usize = 128;

/// The number of open connections of other PID namespaces. The rest is for the clients of this one.
const MAX_OPEN_OF_OTHER_NAMESPACES: usize = MAX_OPEN / 2;

/// The number of connections of one user that are served at a time.
const MAX_SERVED_PER_USER: usize = 16;

/// The number of open connections of one user. Those beyond [`MAX_SERVED_PER_USER`] are told that there are too many,
/// and those beyond this are closed.
const MAX_OPEN_PER_USER: usize = 2 * MAX_SERVED_PER_USER;

/// The number of connections accepted in a row before other events are handled. A user can connect again as fast as
/// connections are closed.
const MAX_ACCEPTED_AT_ONCE: usize = 16;

/// How long a connection may stay open. A client sends its request when it connects, and leaves when it has the answer.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Whose connections are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holder {
    user: u32,
    /// Whether the process is in this PID namespace, or in one below it.
    is_visible: bool,
}

/// A connection.
struct PublicClient {
    socket: OwnedFd,
    holder: Holder,
    /// The time since boot at which it is closed.
    until: Duration,
    /// Whether the answer was sent, so that the keeper only waits for the client to close the connection. If the keeper
    /// closed it with the request unread, the client would get ECONNRESET instead of the answer (unix(7)).
    is_answered: bool,
}

/// All clients of users who may only query the status.
pub(crate) struct PublicClients {
    listener: Option<LocalListener>,
    all: BTreeMap<ConnectionId, PublicClient>,
    next: ConnectionId,
}

impl PublicClients {
    /// Listens at the public socket.
    pub(crate) fn listen(path: &Path) -> io::Result<Self> {
        Self::listen_on(LocalListener::bind(path, SOCKET_MODE)?)
    }

    /// Listens with a socket.
    pub(crate) fn listen_on(listener: LocalListener) -> io::Result<Self> {
        if !fault::is_broken("passrights") && !listener.refuse_descriptors()? {
            tracing::debug!("this kernel cannot reject descriptors that other users pass");
        }
        Ok(Self { listener: Some(listener), all: BTreeMap::new(), next: 0 })
    }

    /// The socket at which clients connect, unless there are too many connections.
    pub(crate) fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().filter(|_| self.all.len() < MAX_OPEN).map(AsFd::as_fd)
    }

    /// Accepts some of the connections that wait.
    pub(crate) fn accept(&mut self, now: Duration) -> io::Result<()> {
        for _ in 0..MAX_ACCEPTED_AT_ONCE {
            let Some(listener) = self.listener.as_ref().filter(|_| self.all.len() < MAX_OPEN) else { break };
            let Some((socket, credentials)) = listener.accept()? else { break };
            let holder = Holder { user: credentials.uid, is_visible: credentials.pid != 0 };
            let open = self.all.values().filter(|client| client.holder == holder).count();
            let invisible = self.all.values().filter(|client| !client.holder.is_visible).count();
            let mut client = PublicClient { socket, holder, until: now + TIMEOUT, is_answered: false };
            let has_room = holder.is_visible || invisible < MAX_OPEN_OF_OTHER_NAMESPACES;
            if open >= MAX_OPEN_PER_USER || !has_room {
                client.close();
                continue;
            }
            if open >= MAX_SERVED_PER_USER {
                client.answer(&KeeperEvent::Busy, &[]);
            }
            self.all.insert(self.next, client);
            self.next += 1;
        }
        Ok(())
    }

    /// The connections, and what the keeper waits for on each.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = (ConnectionId, BorrowedFd<'_>, Interest)> {
        self.all.iter().map(|(id, client)| {
            let interest = if client.is_answered { Interest::Closed } else { Interest::Readable };
            (*id, client.socket.as_fd(), interest)
        })
    }

    /// Returns a client's request. Closes the connection if the client has, or if its message is not a request.
    pub(crate) fn receive(&mut self, id: ConnectionId) -> Option<Received> {
        let client = self.all.get(&id)?;
        let mut message = vec![0; MAX_MESSAGE];
        let request = match local_socket::peek(&client.socket, &mut message) {
            _ if client.is_answered => None,
            Ok(Some(length)) => Received::decode(&message[..length]).ok(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            Ok(None) | Err(_) => None,
        };
        if request.is_none() {
            self.close(id);
        }
        request
    }

    /// Answers a client with an event, and a text that may be empty.
    pub(crate) fn answer(&mut self, id: ConnectionId, event: &KeeperEvent, text: &[u8]) {
        if let Some(client) = self.all.get_mut(&id) {
            client.answer(event, text);
        }
    }

    fn close(&mut self, id: ConnectionId) {
        if let Some(client) = self.all.remove(&id) {
            client.close();
        }
    }

    /// Returns the time since boot at which the next connection is closed.
    pub(crate) fn due(&self) -> Option<Duration> {
        self.all.values().map(|client| client.until).min()
    }

    /// Closes the connections that have been open for too long.
    pub(crate) fn close_idle(&mut self, now: Duration) {
        let late: Vec<ConnectionId> =
            self.all.iter().filter(|(_, client)| client.until <= now).map(|(id, _)| *id).collect();
        late.into_iter().for_each(|id| self.close(id));
    }
}

impl PublicClient {
    /// Sends the event and then the text in pieces, without waiting for a client that does not read, and shuts the
    /// connection down for writing.
    fn answer(&mut self, event: &KeeperEvent, text: &[u8]) {
        let mut pieces = text.chunks(MAX_MESSAGE);
        let sent = lease::send(&self.socket, event, None)
            .and_then(|()| pieces.try_for_each(|piece| local_socket::send(&self.socket, piece, None)));
        if let Err(error) = sent {
            tracing::debug!(%error, "cannot answer a client of another user");
        }
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
        self.is_answered = true;
    }

    fn close(self) {
        close(self.socket);
    }
}

impl Drop for PublicClients {
    fn drop(&mut self) {
        // Closing the listener closes the connections that wait at it.
        self.listener.take().into_iter().for_each(|listener| close(listener.into()));
        std::mem::take(&mut self.all).into_values().for_each(PublicClient::close);
    }
}

/// Closes a socket that another user may have passed a descriptor to. Closing that descriptor could block.
fn close(socket: OwnedFd) {
    if fault::is_broken("apart") { drop(socket) } else { close_in_background(socket) }
}
