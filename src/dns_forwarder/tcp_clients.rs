//! The connections of clients that ask over TCP. Each has at most one question under way; further ones wait in the
//! socket, so a client that asks without reading delays only itself.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use super::stream::MessageStream;
use crate::linux::poll::Interest;

/// How many clients may be connected. A further one replaces the client that has been silent longest.
const MAX_CLIENTS: usize = 32;

/// How long a client may be silent before its connection is closed.
const IDLE: Duration = Duration::from_secs(10);

/// The connected clients, by number.
#[derive(Debug, Default)]
pub(super) struct TcpClients {
    clients: BTreeMap<u64, TcpClient>,
    next: u64,
}

#[derive(Debug)]
struct TcpClient {
    socket: OwnedFd,
    stream: MessageStream,
    /// Whether its question is under way.
    waits: bool,
    active: Instant,
}

impl TcpClients {
    /// Adds a client that has connected.
    pub(super) fn add(&mut self, socket: OwnedFd, now: Instant) {
        if self.clients.len() >= MAX_CLIENTS {
            let oldest = self.clients.iter().min_by_key(|(_, client)| client.active).map(|(number, _)| *number);
            oldest.map(|number| self.clients.remove(&number));
        }
        let client = TcpClient { socket, stream: MessageStream::default(), waits: false, active: now };
        self.clients.insert(self.next, client);
        self.next += 1;
    }

    /// Returns the sockets with the events to wait for.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>, Interest)> {
        self.clients.iter().map(|(number, client)| {
            let interest = match (client.stream.has_to_send(), client.waits) {
                (true, _) => Interest::Writable,
                (false, true) => Interest::Closed,
                (false, false) => Interest::Readable,
            };
            (*number, client.socket.as_fd(), interest)
        })
    }

    /// Returns when the first client will have been silent for too long.
    pub(super) fn due(&self) -> Option<Instant> {
        self.clients.values().filter(|client| !client.waits).map(|client| client.active + IDLE).min()
    }

    /// Closes the connections of clients that have been silent for too long.
    pub(super) fn close_idle(&mut self, now: Instant) {
        self.clients.retain(|_, client| client.waits || client.active + IDLE > now);
    }

    /// Receives from a client, or sends what is queued for it. Closes its connection if that fails.
    pub(super) fn handle(&mut self, number: u64, now: Instant) {
        let Some(client) = self.clients.get_mut(&number) else { return };
        let handled = match (client.stream.has_to_send(), client.waits) {
            (true, _) => client.stream.send(&client.socket).map(drop),
            (false, false) => client.stream.receive(&client.socket),
            // It was waiting for its end alone.
            (false, true) => Err(std::io::ErrorKind::ConnectionReset.into()),
        };
        client.active = now;
        if handled.is_err() {
            self.close(number);
        }
    }

    /// Takes the next question that has arrived whole, with the number of its client, which then waits.
    pub(super) fn next_question(&mut self) -> Option<(u64, Vec<u8>)> {
        let idle = self.clients.iter_mut().filter(|(_, client)| !client.waits && !client.stream.has_to_send());
        let mut asking = idle.filter_map(|(number, client)| Some((*number, client.stream.next_message()?, client)));
        let (number, message, client) = asking.next()?;
        client.waits = true;
        Some((number, message))
    }

    /// Sends an answer to a client, which may be gone.
    pub(super) fn answer(&mut self, number: u64, message: &[u8], now: Instant) {
        let Some(client) = self.clients.get_mut(&number) else { return };
        client.stream.queue(message);
        (client.waits, client.active) = (false, now);
        if client.stream.send(&client.socket).is_err() {
            self.close(number);
        }
    }

    /// Closes a client's connection.
    pub(super) fn close(&mut self, number: u64) {
        self.clients.remove(&number);
    }
}
