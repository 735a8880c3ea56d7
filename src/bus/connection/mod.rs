//! A client of the filter together with its own connection to the bus: decides about each message from one to the
//! other.
//!
//! Each client has its own connection to the bus, so it has its own unique name there, and the bus keeps the order of
//! its messages and applies its limits as usual.
//!
//! The filter calls methods of the bus itself only between the client's `Hello` and its next message, so the serial
//! numbers of these calls cannot collide with the client's. Later it sends only replies and signals, which have no
//! reply.
//!
//! The filter learns about owners of names on the same connection (`NameOwnerChanged`). The bus sends that signal
//! before the first message of the new owner.

mod bus_messages;
mod client_messages;
mod replies;
mod streaming;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::os::fd::OwnedFd;

use super::authentication::{self, AuthReply, BusAuthentication, ClientAuthentication, MAX_AUTH_BYTES};
use super::buffered_socket::BufferedSocket;
use super::message::Malformed;
use super::private_names::BusClientId;
use super::refusal::BusRefusal;
use super::shared::Shared;
use streaming::StreamProgress;

/// The name, the path and the interfaces of the bus itself.
const BUS: &str = "org.freedesktop.DBus";
const BUS_PATH: &str = "/org/freedesktop/DBus";
const PEER: &str = "org.freedesktop.DBus.Peer";
const INTROSPECTABLE: &str = "org.freedesktop.DBus.Introspectable";

/// The number of bytes of output from which on a client counts as full: then nothing more is read from it or from the
/// bus for it. It has room for some ten thousand replies, since many clients send a batch of calls before they read a
/// reply.
const CLIENT_LIMIT: usize = 4 << 20;

/// The same for the bus.
const BUS_LIMIT: usize = 1 << 20;

/// The serial number of the filter's `ListNames`. Its other calls have the numbers around it.
const FIRST_CALL: u32 = 0x7000_0000;

/// The phase of a connection.
#[derive(Debug)]
enum Phase {
    /// The filter authenticates to the bus.
    AuthenticatingToBus(BusAuthentication),
    /// The client authenticates to the filter.
    AuthenticatingClient {
        bus: BusAuthentication,
        client: ClientAuthentication,
        /// The number of bytes that the client has sent for it so far.
        length: usize,
    },
    /// The client's first message, `Hello`, has not arrived yet.
    AwaitingHello,
    /// The bus has not replied yet to `Hello`, which has this serial number.
    AwaitingHelloReply(u32),
    /// The filter queries names and owners. The calls with these serial numbers have no reply yet.
    Querying(HashMap<u32, Query>),
    /// Messages pass in both directions.
    Open,
    /// The connection has ended.
    Closed,
}

/// A query of the filter to the bus.
#[derive(Debug)]
enum Query {
    /// All names.
    Names,
    /// The names of services that the bus can start.
    ActivatableNames,
    /// The owner of this name.
    Owner(String),
}

/// A connection outside that the client exchanges messages with.
#[derive(Debug, Default)]
struct Contact {
    /// The names through which the client may call it. They remain until it disconnects: a client that has called a
    /// name may use the owner's unique name from then on.
    names: BTreeSet<String>,
}

/// A connection of a client through the filter to the bus.
#[derive(Debug)]
pub(super) struct BusConnection {
    id: BusClientId,
    pub(super) client: BufferedSocket,
    pub(super) bus: BufferedSocket,
    phase: Phase,
    /// The client's name on the bus. Empty before the reply to `Hello`.
    unique_name: String,
    /// The owners outside of the names that the client may see.
    visible_owners: HashMap<String, String>,
    /// The connections outside by their unique names.
    contacts: HashMap<String, Contact>,
    /// The owned names outside that the client may not see. Calls of these are refused with a message; all other names
    /// do not exist.
    hidden_names: HashSet<String>,
    /// The names of services that the bus can start.
    activatable: HashSet<String>,
    /// The names that the client owns on the real bus.
    public_names: HashSet<String>,
    /// Whether the client has a match rule for changes of owners.
    watches_owners: bool,
    /// The serial numbers of the client's calls of `ListNames` that have no reply yet.
    pending_lists: HashSet<u32>,
}

impl BusConnection {
    /// Starts a connection with the socket of a client and one to the bus.
    ///
    /// # Errors
    /// Returns an error if a socket cannot be made non-blocking.
    pub(super) fn new(id: BusClientId, client: OwnedFd, bus: OwnedFd) -> std::io::Result<Self> {
        let mut bus = BufferedSocket::new(bus, BUS_LIMIT)?;
        bus.push(authentication::REQUEST_TO_BUS, Vec::new());
        Ok(Self {
            id,
            client: BufferedSocket::new(client, CLIENT_LIMIT)?,
            bus,
            phase: Phase::AuthenticatingToBus(BusAuthentication::default()),
            unique_name: String::new(),
            visible_owners: HashMap::new(),
            contacts: HashMap::new(),
            hidden_names: HashSet::new(),
            activatable: HashSet::new(),
            public_names: HashSet::new(),
            watches_owners: false,
            pending_lists: HashSet::new(),
        })
    }

    pub(super) fn id(&self) -> BusClientId {
        self.id
    }

    /// Returns whether the connection has ended.
    pub(super) fn is_closed(&self) -> bool {
        matches!(self.phase, Phase::Closed)
    }

    /// Returns whether a side has too much output for more input to be processed.
    pub(super) fn is_blocked(&self) -> bool {
        self.client.is_full() || self.bus.is_full()
    }

    /// Reads from the sides that are readable, and processes the input.
    pub(super) fn read(&mut self, shared: &mut Shared<'_>, from_client: bool, from_bus: bool) {
        if from_client && !self.is_blocked() && self.client.wants_input() {
            self.client.fill();
        }
        if from_bus && !self.is_blocked() && self.bus.wants_input() {
            self.bus.fill();
        }
        self.advance(shared);
    }

    /// Processes input and sends output until both need to wait.
    pub(super) fn advance(&mut self, shared: &mut Shared<'_>) {
        loop {
            let mut moved = false;
            while self.process(shared, Self::process_bus_input) {
                moved = true;
            }
            while self.process(shared, Self::process_client_input) {
                moved = true;
            }
            moved |= self.client.flush();
            moved |= self.bus.flush();
            if !moved {
                break;
            }
        }
        // Messages that a side sent before it disconnected still reach the other side.
        let client_left = self.client.input_ended && !self.bus.has_output() && !self.is_client_waiting_for_bus();
        let bus_left = self.bus.input_ended && !self.client.has_output();
        if !self.is_blocked() && (client_left || bus_left) {
            self.phase = Phase::Closed;
        }
    }

    /// Processes input of one side once. Returns whether anything was processed. A refusal ends the connection.
    fn process(
        &mut self,
        shared: &mut Shared<'_>,
        process_input: impl FnOnce(&mut Self, &mut Shared<'_>) -> Result<StreamProgress, BusRefusal>,
    ) -> bool {
        if self.is_closed() || self.is_blocked() {
            return false;
        }
        match process_input(self, shared) {
            Ok(progress) => progress == StreamProgress::Moved,
            Err(refusal) => {
                shared.refuse(refusal);
                self.phase = Phase::Closed;
                false
            }
        }
    }

    /// Returns whether there is input of the client that cannot be processed before the bus has answered.
    fn is_client_waiting_for_bus(&self) -> bool {
        let waits =
            matches!(self.phase, Phase::AuthenticatingToBus(_) | Phase::AwaitingHelloReply(_) | Phase::Querying(_));
        waits && !self.client.unread().is_empty()
    }

    fn process_bus_input(&mut self, shared: &mut Shared<'_>) -> Result<StreamProgress, BusRefusal> {
        if matches!(self.phase, Phase::AuthenticatingToBus(_)) {
            return self.authenticate_to_bus();
        }
        if let Some(progress) = streaming::pass_pending_body(&mut self.bus, &mut self.client) {
            return Ok(progress);
        }
        let Some(message) = streaming::next(&mut self.bus, bus_messages::body_needed)? else {
            return Ok(StreamProgress::Blocked);
        };
        let delivery = self.judge_from_bus(shared, &message.header, &message.body)?;
        streaming::deliver(&mut self.bus, &mut self.client, message, delivery)?;
        Ok(StreamProgress::Moved)
    }

    fn authenticate_to_bus(&mut self) -> Result<StreamProgress, BusRefusal> {
        let Phase::AuthenticatingToBus(state) = &mut self.phase else { return Ok(StreamProgress::Blocked) };
        match authentication::first_line(self.bus.unread()) {
            Ok(Some((line, length))) => {
                let outcome = state.process_line(line);
                self.bus.consume(length);
                let is_last = outcome
                    .map_err(|line| BusRefusal::NoBus(format!("it answers the authentication with {line:?}")))?;
                if is_last {
                    let (bus, client) = (std::mem::take(state), ClientAuthentication::default());
                    self.phase = Phase::AuthenticatingClient { bus, client, length: 0 };
                }
                Ok(StreamProgress::Moved)
            }
            Ok(None) if self.bus.input_ended => {
                Err(BusRefusal::NoBus("it closes the connection during authentication".to_owned()))
            }
            Ok(None) if self.bus.unread().len() < MAX_AUTH_BYTES => {
                self.bus.need = self.bus.unread().len() + 1;
                Ok(StreamProgress::Blocked)
            }
            _ => Err(BusRefusal::NoBus("it answers the authentication with something else than lines".to_owned())),
        }
    }

    fn process_client_input(&mut self, shared: &mut Shared<'_>) -> Result<StreamProgress, BusRefusal> {
        match &self.phase {
            Phase::AuthenticatingClient { .. } => return self.authenticate_client(),
            Phase::AwaitingHello | Phase::Open => {}
            Phase::AuthenticatingToBus(_) | Phase::AwaitingHelloReply(_) | Phase::Querying(_) | Phase::Closed => {
                self.client.need = 1;
                return Ok(StreamProgress::Blocked);
            }
        }
        if let Some(progress) = streaming::pass_pending_body(&mut self.client, &mut self.bus) {
            return Ok(progress);
        }
        let Some(message) = streaming::next(&mut self.client, client_messages::body_needed)? else {
            return Ok(StreamProgress::Blocked);
        };
        let delivery = self.judge_from_client(shared, &message.header, &message.body)?;
        streaming::deliver(&mut self.client, &mut self.bus, message, delivery)?;
        Ok(StreamProgress::Moved)
    }

    fn authenticate_client(&mut self) -> Result<StreamProgress, BusRefusal> {
        let Phase::AuthenticatingClient { bus, client, length: total } = &mut self.phase else {
            return Ok(StreamProgress::Blocked);
        };
        match authentication::client_line(self.client.unread(), *total == 0) {
            Ok(Some((line, length))) => {
                let reply = client.process_line(line, bus);
                *total += length;
                let is_too_long = *total > MAX_AUTH_BYTES;
                self.client.consume(length);
                match reply {
                    AuthReply::Send(_) if is_too_long => {
                        return Err(Malformed("the authentication is longer than 16 KiB").into());
                    }
                    AuthReply::Send(line) => self.client.push(format!("{line}\r\n").as_bytes(), Vec::new()),
                    AuthReply::Begin => self.phase = Phase::AwaitingHello,
                    AuthReply::Close => self.phase = Phase::Closed,
                }
                Ok(StreamProgress::Moved)
            }
            Ok(None) if self.client.unread().len() < MAX_AUTH_BYTES => {
                self.client.need = self.client.unread().len() + 1;
                Ok(StreamProgress::Blocked)
            }
            _ => Err(Malformed("the authentication is not lines of ASCII text").into()),
        }
    }
}
