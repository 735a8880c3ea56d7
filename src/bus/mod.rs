//! The session bus as a program inside sees it: a filter between the program and the bus.
//!
//! A program inside the tunnel must not hand its work to one outside by accident, and most of those that do go by the
//! session bus: they find a running instance of themselves by its name, have a service started, or call one that opens
//! or fetches. The filter is one process with one thread, which listens where the program looks for its bus and
//! connects to the real one for each client.
//!
//! ```text
//! program ─► listener ─► Connection: client ─ judge ─ bus ─► the session bus
//! ```
//!
//! - [`address`]: where the real bus is.
//! - [`policy`]: who may be called and which names may be owned: a plain value that can be printed.
//! - [`message`]: D-Bus on the wire; [`authentication`]: what comes before the first message.
//! - `connection`: decides about each message; `side` holds what is on its way, within bounds; `names` has the names
//!   that only those inside know.
//! - [`BusRefusal`]: what was refused, in a sentence that says how to allow it.
//!
//! What a client sees: itself, the other clients of the same filter, and the services of the policy. Any name that it
//! requests it is granted among the clients of the filter, even if a program outside has it, so that it starts inside.
//! The names that the policy lets it own are requested from the bus. All other names neither exist nor can be started.

pub mod address;
pub mod authentication;
mod buffered_socket;
mod connection;
pub mod message;
mod names;
pub mod policy;
mod refusal;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{getsockopt, sockopt};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::SocketFlags;

pub use address::BusAddress;
pub use policy::{Pattern, Policy};
pub use refusal::BusRefusal;

use connection::{Connection, Shared};
use names::ClientId;

/// How many clients are served at once. Others wait until one has left.
const MAX_CLIENTS: usize = 512;

/// Serves the session bus to the processes of this process's user that connect to `listener`, until `stop` is readable
/// or closed.
///
/// `connect` makes a connection to the real bus, one for each client ([`address::connect`]). `report` is told of each
/// refusal before the client is, and how often there was such a one so far: 1 is the first. It must not block: nothing
/// else happens meanwhile.
///
/// The process needs two descriptors for each client, and those that pass by. Services outside take it for the client:
/// portals look at its `/proc/PID/root`, so it must stay dumpable (`PR_SET_DUMPABLE`) and in a mount namespace of the
/// user's.
///
/// # Errors
/// What poll(2) says, or accept(2), if it is not about a single client.
pub fn serve(
    listener: BorrowedFd<'_>,
    mut connect: impl FnMut() -> io::Result<OwnedFd>,
    policy: &Policy,
    mut report: impl FnMut(&BusRefusal, u64),
    stop: BorrowedFd<'_>,
) -> io::Result<()> {
    rustix::io::ioctl_fionbio(listener, true)?;
    let mut shared = Shared::new(policy, &mut report);
    let mut connections: Vec<Connection> = Vec::new();
    let mut next: ClientId = 0;
    // There were no descriptors for another client. Only something else that happens can have changed that.
    let mut exhausted = false;
    loop {
        let accepting = !exhausted && connections.len() < MAX_CLIENTS;
        exhausted = false;
        let ready = wait(listener, stop, accepting, &connections)?;
        if ready.stop {
            return Ok(());
        }
        for (connection, sides) in connections.iter_mut().zip(ready.connections) {
            if sides.client || sides.bus {
                connection.go_on(&mut shared, sides.client, sides.bus);
            }
        }
        settle(&mut connections, &mut shared);
        if ready.listener {
            match accept(listener) {
                Ok(Some(client)) => {
                    let connection = connect().and_then(|bus| Connection::new(next, client, bus));
                    next += 1;
                    match connection {
                        Ok(mut connection) => {
                            connection.advance(&mut shared);
                            connections.push(connection);
                        }
                        Err(error) => shared.refuse(BusRefusal::NoBus(error.to_string())),
                    }
                }
                Ok(None) => {}
                Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) if !connections.is_empty() => {
                    exhausted = true;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// What can be gone on with.
struct Ready {
    stop: bool,
    listener: bool,
    connections: Vec<Sides>,
}

#[derive(Clone, Copy, Default)]
struct Sides {
    client: bool,
    bus: bool,
}

fn wait(
    listener: BorrowedFd<'_>,
    stop: BorrowedFd<'_>,
    accepting: bool,
    connections: &[Connection],
) -> io::Result<Ready> {
    let mut entries = vec![PollFd::from_borrowed_fd(stop, PollFlags::IN)];
    if accepting {
        entries.push(PollFd::from_borrowed_fd(listener, PollFlags::IN));
    }
    // A descriptor from which nothing is wanted is left out: that its other end is closed would be said again and
    // again.
    let mut places = Vec::with_capacity(connections.len());
    for connection in connections {
        let blocked = connection.is_blocked();
        let client = add_side(&mut entries, &connection.client, blocked);
        let bus = add_side(&mut entries, &connection.bus, blocked);
        places.push((client, bus));
    }
    loop {
        match rustix::event::poll(&mut entries, None) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let is_ready = |place: Option<usize>| place.is_some_and(|place: usize| !entries[place].revents().is_empty());
    Ok(Ready {
        stop: is_ready(Some(0)),
        listener: accepting && is_ready(Some(1)),
        connections: places
            .iter()
            .map(|&(client, bus)| Sides { client: is_ready(client), bus: is_ready(bus) })
            .collect(),
    })
}

/// Adds a side to what is waited for, and returns its place there.
fn add_side<'a>(
    entries: &mut Vec<PollFd<'a>>,
    side: &'a buffered_socket::BufferedSocket,
    blocked: bool,
) -> Option<usize> {
    let mut wanted = PollFlags::empty();
    wanted.set(PollFlags::IN, !blocked && side.wants_input());
    wanted.set(PollFlags::OUT, side.has_output());
    (!wanted.is_empty()).then(|| {
        entries.push(PollFd::from_borrowed_fd(side.as_fd(), wanted));
        entries.len() - 1
    })
}

/// Drops the connections that are over, and tells the remaining ones which names have another owner.
fn settle(connections: &mut Vec<Connection>, shared: &mut Shared<'_>) {
    let left: Vec<ClientId> =
        connections.iter().filter(|connection| connection.is_over()).map(Connection::token).collect();
    connections.retain(|connection| !connection.is_over());
    for &token in &left {
        let changes = shared.names.forget(token);
        shared.changes.extend(changes.into_iter().map(|change| (token, change)));
    }
    for (by, change) in std::mem::take(&mut shared.changes) {
        connections.iter_mut().for_each(|connection| connection.tell(shared, &change, by));
    }
    left.into_iter().for_each(|token| shared.forget(token));
}

fn accept(listener: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Errno> {
    match rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
        Ok(socket) => {
            // The bus knows its clients by their user, which it takes the filter's for.
            let peer = getsockopt(&socket, sockopt::PeerCredentials).ok();
            Ok(peer.is_some_and(|peer| peer.uid() == rustix::process::geteuid().as_raw()).then_some(socket))
        }
        Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => Ok(None),
        Err(error) => Err(error),
    }
}
