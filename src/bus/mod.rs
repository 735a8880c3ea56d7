//! The session bus filter, between a program inside the tunnel and its user's session bus.
//!
//! A program inside must not hand its work to a process outside by accident. Programs do that mostly through the
//! session bus: they find a running instance of themselves by its name, start a service, or call one that opens or
//! fetches URLs. The filter is one process with one thread. It listens where the program looks for its session bus, and
//! connects to the real one once for each client.
//!
//! ```text
//! program ─► listener ─► BusConnection: client ─ judge ─ bus ─► the session bus
//! ```
//!
//! - [`address`]: the address of the real bus.
//! - [`policy`]: the services that may be called and the names that may be owned, as a plain value.
//! - [`message`]: D-Bus messages on the wire; [`authentication`]: what precedes the first message.
//! - `connection`: decides about each message; `buffered_socket`: bounded buffers for input and output;
//!   `private_names`: names that only clients of the filter see; `shared`: the state that all clients share.
//! - [`BusRefusal`]: a refused request, as a message that names the option which would allow it.
//!
//! A client sees itself, the other clients of the filter, and the services of the policy. Other names do not exist for
//! it, and cannot be started. A name that it requests becomes a private name, even if a process outside owns it, so a
//! single-instance program starts inside. Names that the policy lets it own are requested from the real bus.

pub mod address;
pub mod authentication;
mod buffered_socket;
mod connection;
pub mod message;
pub mod policy;
mod private_names;
mod refusal;
mod shared;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{getsockopt, sockopt};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::SocketFlags;

pub use address::BusAddress;
pub use policy::{BusPolicy, Pattern};
pub use refusal::BusRefusal;

use buffered_socket::BufferedSocket;
use connection::BusConnection;
use private_names::BusClientId;
use shared::Shared;

/// The maximum number of clients at once. Further clients wait until one disconnects.
const MAX_CLIENTS: usize = 512;

/// Runs the filter for clients of this process's user that connect to `listener`, until `stop` is readable or closed.
///
/// `connect` makes a connection to the real bus, one for each client ([`address::connect`]). `report` is called for
/// each refusal before the client gets an error, with the number of such refusals so far, from 1 on. It must not block,
/// since the filter has only one thread.
///
/// The process needs two file descriptors for each client, and one for each that passes through. Services outside take
/// this process for the client. Portals look at its `/proc/PID/root`, so it must stay dumpable (`PR_SET_DUMPABLE`), and
/// in a mount namespace of the user's.
///
/// # Errors
/// Returns the error of poll(2), or of accept(2) unless it concerns a single client.
pub fn serve(
    listener: BorrowedFd<'_>,
    mut connect: impl FnMut() -> io::Result<OwnedFd>,
    policy: &BusPolicy,
    mut report: impl FnMut(&BusRefusal, u64),
    stop: BorrowedFd<'_>,
) -> io::Result<()> {
    rustix::io::ioctl_fionbio(listener, true)?;
    let mut shared = Shared::new(policy, &mut report);
    let mut connections: Vec<BusConnection> = Vec::new();
    let mut next: BusClientId = 0;
    // Set after accept(2) found no free descriptor: it is retried after any other event, which may have closed some.
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
                connection.read(&mut shared, sides.client, sides.bus);
            }
        }
        remove_closed(&mut connections, &mut shared);
        if ready.listener {
            match accept(listener) {
                Ok(Some(client)) => {
                    let connection = connect().and_then(|bus| BusConnection::new(next, client, bus));
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

/// The result of poll(2).
struct Ready {
    stop: bool,
    listener: bool,
    connections: Vec<Sides>,
}

/// The ready sides of a connection.
#[derive(Clone, Copy, Default)]
struct Sides {
    client: bool,
    bus: bool,
}

fn wait(
    listener: BorrowedFd<'_>,
    stop: BorrowedFd<'_>,
    accepting: bool,
    connections: &[BusConnection],
) -> io::Result<Ready> {
    let mut entries = vec![PollFd::from_borrowed_fd(stop, PollFlags::IN)];
    if accepting {
        entries.push(PollFd::from_borrowed_fd(listener, PollFlags::IN));
    }
    // Sides with no interest are left out, as poll(2) always reports POLLHUP, which would make this a busy loop.
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

/// Adds a side to the entries for poll(2), and returns its index. Returns `None` if there is nothing to wait for.
fn add_side<'a>(entries: &mut Vec<PollFd<'a>>, side: &'a BufferedSocket, blocked: bool) -> Option<usize> {
    let mut events = PollFlags::empty();
    events.set(PollFlags::IN, !blocked && side.wants_input());
    events.set(PollFlags::OUT, side.has_output());
    (!events.is_empty()).then(|| {
        entries.push(PollFd::from_borrowed_fd(side.as_fd(), events));
        entries.len() - 1
    })
}

/// Removes closed connections, and tells the remaining clients about changes of owners of private names.
fn remove_closed(connections: &mut Vec<BusConnection>, shared: &mut Shared<'_>) {
    let left: Vec<BusClientId> =
        connections.iter().filter(|connection| connection.is_closed()).map(BusConnection::id).collect();
    connections.retain(|connection| !connection.is_closed());
    for &id in &left {
        let changes = shared.names.forget(id);
        shared.owner_changes.extend(changes.into_iter().map(|change| (id, change)));
    }
    for (by, change) in std::mem::take(&mut shared.owner_changes) {
        connections.iter_mut().for_each(|connection| connection.signal_owner_change(shared, &change, by));
    }
    left.into_iter().for_each(|id| shared.forget_unique_name(id));
}

/// Accepts a client. Returns `None` if none waits, or if it belongs to another user.
fn accept(listener: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Errno> {
    match rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
        Ok(socket) => {
            // To the bus, every client is of the filter's user.
            let peer = getsockopt(&socket, sockopt::PeerCredentials).ok();
            Ok(peer.is_some_and(|peer| peer.uid() == rustix::process::geteuid().as_raw()).then_some(socket))
        }
        Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => Ok(None),
        Err(error) => Err(error),
    }
}
