//! The messages of the protocol, each of which is a JSON document, with a descriptor where the message says so.
//!
//! A keeper lives for as long as its tunnel, so clients of a newer version talk to it after an update. It answers a
//! request that it does not know with [`KeeperEvent::Refused`], and the lease lives on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::linux::local_socket;
use crate::linux::memory_file;

/// The most bytes of a message. Longer content is passed as a file in memory.
pub(crate) const MAX_MESSAGE: usize = 8192;

/// The most bytes of a failure's text that fit into a message.
const MAX_REASON: usize = 4096;

/// The most bytes of an answer: more than a machine full of peers.
const MAX_ANSWER: usize = 64 << 20;

/// The identity of all that a view of files is made from ([`crate::program`]).
pub(crate) type ViewKey = [u8; 32];

/// The message over a launcher's connection for a view if no view server of its key is known.
pub(crate) const NO_VIEW_SERVER: u8 = 0;

/// An event that the keeper sends to a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeeperEvent {
    /// The namespace exists, and contains only `lo`. It has its name, or is passed if the tunnel is rootless.
    Named,
    /// The tunnel is up: programs can start, and nothing passes but through WireGuard. There may be no handshake yet.
    Made,
    /// A handshake with a peer was completed.
    Connected,
    /// The tunnel could not be created, or is ending. [`KeeperEvent::Gone`] follows when nothing is left.
    Failed(Failure),
    /// The names of the tunnel are removed. The kernel removes the rest in its own time.
    Gone,
    /// The client holds a lease on a tunnel that is up. Passes the [handover](super::handover) file.
    Welcome,
    /// The client's lease has ended, and the tunnel stays up for others.
    Left,
    /// A request was refused, and nothing has changed.
    Refused(Failure),
    /// A request was carried out. Passes the answer, if there is one, as a file in memory that contains JSON.
    Done,
    /// This user has too many open connections. Nothing has changed.
    Busy,
    /// The configuration has changed. Passes the new [handover](super::handover) file.
    Changed,
}

impl KeeperEvent {
    /// Creates the refusal of a request. Shortens a long reason to the size of a message.
    pub(crate) fn refused(mut failure: Failure) -> Self {
        let message = &mut failure.message;
        if message.len() > MAX_REASON {
            let end = (0..=MAX_REASON).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
            message.truncate(end);
            message.push('…');
        }
        Self::Refused(failure)
    }
}

/// A request that a client sends to the keeper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ClientRequest {
    /// Note that the client is not in the tunnel, if the user namespace that is passed is the one in which the keeper
    /// began, and if the client's socket is in the keeper's network namespace. The keeper of a user's tunnel wants to
    /// know that before all requests but [`Self::Report`]. Not answered.
    Outside,
    /// Give the client a lease.
    Join,
    /// Keep the tunnel up when no lease is left.
    Stand,
    /// Note that the lease's program has started. Not answered.
    Started {
        /// The program's process ID.
        program: i32,
    },
    /// Note the number of connections to processes outside the tunnel that were refused to the lease's programs. Not
    /// answered.
    Refused {
        /// The number until now.
        count: u64,
    },
    /// Pass the connection that comes with this on to the view server of a key. Answered over that connection only: by
    /// the server, or with [`NO_VIEW_SERVER`].
    View {
        /// The identity of the view.
        key: ViewKey,
    },
    /// Note the view server of a key. Its end of a connection to the keeper comes with this. Not answered.
    ViewServer {
        /// The identity of its views.
        key: ViewKey,
    },
    /// End the lease. The client has killed the processes that its program left behind, or they are meant to stay.
    Leave,
    /// Report the tunnel's status.
    Report,
    /// Change the tunnel to the configuration that is passed in a [handover](super::handover) file. Without one, read
    /// the configuration again.
    Reload,
    /// Take the tunnel down.
    Down {
        /// Whether to kill the programs inside. Otherwise the request is refused if there are any.
        force: bool,
    },
    /// Pass the lock of the tunnel's directory to the client, and end without taking the tunnel down.
    HandOver,
}

/// A request as the keeper receives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Received {
    Known(ClientRequest),
    /// The name of a request that this keeper does not know.
    Unknown(String),
}

impl Received {
    /// Decodes a message.
    ///
    /// # Errors
    /// If the message is not JSON, or does not have the shape of a request.
    pub(crate) fn decode(message: &[u8]) -> io::Result<Self> {
        let value: serde_json::Value = serde_json::from_slice(message)?;
        if let Ok(request) = ClientRequest::deserialize(&value) {
            return Ok(Self::Known(request));
        }
        // Requests without fields are strings, those with fields are objects with one key, the name.
        let name = match &value {
            serde_json::Value::String(name) => Some(name),
            serde_json::Value::Object(fields) if fields.len() == 1 => fields.keys().next(),
            _ => None,
        };
        name.cloned().map(Self::Unknown).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a request"))
    }
}

/// Sends a message, with a descriptor if there is one to pass.
///
/// # Errors
/// If the peer has closed the connection, or does not read its messages.
pub(crate) fn send(socket: &OwnedFd, message: &impl Serialize, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    local_socket::send(socket, &serde_json::to_vec(message)?, descriptor)
}

/// Receives a client's request, with a descriptor if one was passed. Returns None if the client has closed the
/// connection.
///
/// # Errors
/// `WouldBlock` if there is no message; otherwise if the message is not a request.
pub(crate) fn receive_request(socket: &OwnedFd) -> io::Result<Option<(Received, Option<OwnedFd>)>> {
    let Some((message, descriptor)) = receive(socket)? else { return Ok(None) };
    Ok(Some((Received::decode(&message)?, descriptor)))
}

/// Receives a keeper's event, with a descriptor if one was passed. Returns None if the keeper has closed the
/// connection.
///
/// # Errors
/// If the message is not an event.
pub(super) fn receive_event(socket: &OwnedFd) -> io::Result<Option<(KeeperEvent, Option<OwnedFd>)>> {
    let Some((message, descriptor)) = receive(socket)? else { return Ok(None) };
    Ok(Some((serde_json::from_slice(&message)?, descriptor)))
}

fn receive(socket: &OwnedFd) -> io::Result<Option<(Vec<u8>, Option<OwnedFd>)>> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let Some((length, descriptor)) = local_socket::receive(socket, &mut buffer)? else { return Ok(None) };
    buffer.truncate(length);
    Ok(Some((buffer, descriptor)))
}

/// Writes an answer that may be long into a file in memory.
///
/// # Errors
/// If the file cannot be created.
pub(crate) fn answer_file(answer: &impl Serialize) -> io::Result<OwnedFd> {
    memory_file::seal(&serde_json::to_vec(answer)?)
}

/// Reads an answer from a file in memory.
///
/// # Errors
/// If there is no file, or it does not contain such an answer.
pub(super) fn read_answer<T: for<'a> Deserialize<'a>>(file: Option<OwnedFd>) -> io::Result<T> {
    let file = file.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the keeper's answer has no content"))?;
    Ok(serde_json::from_slice(&memory_file::read(file.as_fd(), MAX_ANSWER)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_is_decoded_as_it_was_sent() {
        for request in [
            ClientRequest::Outside,
            ClientRequest::Join,
            ClientRequest::Started { program: 7 },
            ClientRequest::Refused { count: u64::MAX },
            ClientRequest::Down { force: true },
            ClientRequest::HandOver,
            ClientRequest::View { key: [255; 32] },
        ] {
            let message = serde_json::to_vec(&request).expect("JSON");
            assert_eq!(Received::decode(&message).expect("a request"), Received::Known(request));
        }
    }

    #[test]
    fn a_request_of_a_newer_version_is_unknown_and_not_invalid() {
        let unknown = |text: &str| Received::decode(text.as_bytes()).expect("a request");
        assert_eq!(unknown(r#""Teleport""#), Received::Unknown("Teleport".into()));
        assert_eq!(unknown(r#"{"Teleport":{"to":"Mars"}}"#), Received::Unknown("Teleport".into()));
        // A known request with other fields, too.
        assert_eq!(unknown(r#"{"Down":{"gracefully":true}}"#), Received::Unknown("Down".into()));
        // An additional field does not make a request unknown.
        let down = Received::Known(ClientRequest::Down { force: false });
        assert_eq!(unknown(r#"{"Down":{"force":false,"reason":"update"}}"#), down);
    }

    #[test]
    fn other_messages_are_invalid() {
        for text in ["", "{", "7", "[]", "{}", r#"{"Down":1,"Join":2}"#, "\u{0}"] {
            assert!(Received::decode(text.as_bytes()).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_long_refusal_fits_into_a_message() {
        let long = Failure::new("ü".repeat(MAX_MESSAGE)).advise("do something else");
        let KeeperEvent::Refused(failure) = KeeperEvent::refused(long) else { unreachable!("a refusal") };
        assert!(failure.message.len() <= MAX_REASON + '…'.len_utf8() && failure.message.ends_with("ü…"));
        let message = serde_json::to_vec(&KeeperEvent::Refused(failure)).expect("JSON");
        assert!(message.len() <= MAX_MESSAGE);
    }
}
