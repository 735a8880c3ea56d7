//! What the keeper and who wants its tunnel say to each other.
//!
//! A lease is an open connection to the keeper. The kernel closes it however its holder ends, so nobody needs to say so.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};

use super::error::TunnelError;

/// The longest message between a keeper and a lease.
const MESSAGE: usize = 8192;

/// What the keeper tells the holder of a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The namespace is there, has its name, and holds nothing but `lo`.
    Named,
    /// The tunnel is made, and closed to all but itself. No handshake may have been completed yet.
    Made,
    /// A handshake has been completed with a peer.
    Connected,
    /// The tunnel could not be made, or its device has ended. Nothing of it is left, or will be in an instant.
    Failed {
        /// Why.
        reason: String,
        /// What can be done about it.
        advice: Option<String>,
    },
    /// The tunnel's names are taken away. What follows is the kernel's affair.
    Gone,
}

impl Event {
    pub(super) fn failed(error: &TunnelError) -> Self {
        Self::Failed { reason: error.to_string(), advice: error.advice.clone() }
    }
}

/// What the holder of a lease tells the keeper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Command {
    /// The tunnel is not wanted any more; what still runs inside was killed or has ended.
    Leave,
}

/// A lease on a tunnel.
#[derive(Debug)]
pub struct Lease {
    socket: OwnedFd,
}

impl Lease {
    /// Makes a lease, and the keeper's end of it. Both are closed at the next exec.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (socket, keepers) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self { socket }, keepers))
    }

    /// Waits for the next event; none if the keeper has ended.
    pub fn next_event(&self) -> io::Result<Option<Event>> {
        receive(&self.socket)
    }

    /// Says that the tunnel is not wanted any more, and waits until its names are gone.
    pub fn leave(self) -> io::Result<()> {
        // A keeper that has ended already cannot be told.
        let _ = send(&self.socket, &Command::Leave);
        self.await_end()
    }

    /// Has the keeper end what still runs in the tunnel, as if this process had died, and waits until the tunnel's names are gone.
    pub fn abandon(self) -> io::Result<()> {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
        self.await_end()
    }

    fn await_end(self) -> io::Result<()> {
        while let Some(event) = receive::<Event>(&self.socket)? {
            if event == Event::Gone {
                return Ok(());
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

pub(super) fn send(socket: &OwnedFd, message: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    rustix::net::send(socket, &text, SendFlags::NOSIGNAL)?;
    Ok(())
}

pub(super) fn receive<T: for<'a> Deserialize<'a>>(socket: &OwnedFd) -> io::Result<Option<T>> {
    let mut buffer = vec![0; MESSAGE];
    match rustix::net::recv(socket, &mut buffer[..], RecvFlags::empty()) {
        Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => Ok(None),
        Ok((length, _)) => Ok(Some(serde_json::from_slice(&buffer[..length])?)),
        Err(error) => Err(error.into()),
    }
}
