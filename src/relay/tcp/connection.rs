//! A relayed connection: a socket that is connected to the client, and one that is connected to the program.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::socket::{self, MsgFlags, SockType, SockaddrStorage, sockopt};

use super::super::budget::Grant;
use super::super::poller::Poller;
use super::super::{is_connected_to_itself, new_socket};
use super::direction::{Direction, Pipes};

/// A relayed connection.
pub(super) struct Connection {
    _grant: Grant,
    /// The token of its port.
    pub(super) port: u64,
    /// The client's socket, and the program's.
    pub(super) sockets: [OwnedFd; 2],
    pub(super) tokens: [u64; 2],
    /// While the program's socket is being connected: the addresses to try next; the next is last.
    connecting: Option<Vec<SocketAddr>>,
    /// Whether they are addresses of other hosts.
    to_others: bool,
    /// The rest of the PROXY protocol header, which is sent before the client's first byte.
    header: Vec<u8>,
    /// From client to program, and back.
    directions: [Direction; 2],
    /// When bytes were last moved in either direction.
    pub(super) used: Instant,
}

/// What to do with a connection after its bytes were moved.
#[derive(PartialEq, Eq)]
pub(super) enum Outcome {
    /// Wait for an event.
    Wait,
    /// Continue without an event once the other connections had their turn.
    Unfinished,
    /// Close it: both directions have ended.
    End,
    /// Reset it after an error.
    Reset,
}

impl Connection {
    /// Returns a connection of a port whose program's socket is being connected.
    pub(super) fn new(
        port: u64,
        sockets: [OwnedFd; 2],
        tokens: [u64; 2],
        (remaining, to_others): (Vec<SocketAddr>, bool),
        header: Vec<u8>,
        grant: Grant,
    ) -> Self {
        Self {
            _grant: grant,
            port,
            sockets,
            tokens,
            connecting: Some(remaining),
            to_others,
            header,
            directions: Default::default(),
            used: Instant::now(),
        }
    }

    /// Notes that the socket of a token has urgent data.
    pub(super) fn set_urgent(&mut self, token: u64) {
        self.directions[usize::from(self.tokens[1] == token)].set_urgent();
    }

    /// Moves the bytes that can be moved.
    pub(super) fn relay(&mut self, poller: &mut Poller, pipes: &mut Pipes) -> Outcome {
        if let Some(remaining) = &mut self.connecting {
            match is_connected(&self.sockets[1]) {
                Ok(false) => return Outcome::Wait,
                Ok(true) => self.connecting = None,
                Err(_) => {
                    // A reset frees the port of a socket that was connected to itself.
                    reset(&self.sockets[1]);
                    let next =
                        connect(remaining, self.to_others).and_then(|next| Ok((poller.add(next.as_fd())?, next)));
                    let Ok((token, next)) = next else { return Outcome::Reset };
                    (self.sockets[1], self.tokens[1]) = (next, token);
                    return Outcome::Unfinished;
                }
            }
        }
        if send_header(&self.sockets[1], &mut self.header).is_err() {
            return Outcome::Reset;
        }
        let mut outcome = Outcome::Wait;
        let mut has_moved = false;
        for (number, direction) in self.directions.iter_mut().enumerate() {
            if number == 0 && !self.header.is_empty() {
                continue;
            }
            match direction.relay(&self.sockets[number], &self.sockets[1 - number], pipes, &mut has_moved) {
                Ok(true) => outcome = Outcome::Unfinished,
                Ok(false) => {}
                Err(_) => return Outcome::Reset,
            }
        }
        if has_moved {
            self.used = Instant::now();
        }
        if self.directions.iter().all(Direction::has_ended) { Outcome::End } else { outcome }
    }
}

/// Begins to connect to the last address that can be tried, and removes it and those after it from the list.
/// `to_others` says whether the addresses are those of other hosts.
pub(super) fn connect(addresses: &mut Vec<SocketAddr>, to_others: bool) -> io::Result<OwnedFd> {
    let mut last_error = Errno::ECONNREFUSED;
    while let Some(address) = addresses.pop() {
        let connecting = new_socket(address, SockType::Stream).and_then(|socket| {
            socket::setsockopt(&socket, sockopt::TcpNoDelay, &true)?;
            if !to_others {
                use_reno(&socket);
            }
            let _ = socket::setsockopt(&socket, sockopt::OobInline, &true);
            match socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
                Err(Errno::EINPROGRESS) | Ok(()) => Ok(socket),
                Err(error) => Err(error),
            }
        });
        match connecting {
            Ok(socket) => return Ok(socket),
            Err(error) => last_error = error,
        }
    }
    Err(last_error.into())
}

/// Selects the simplest congestion control for a connection that never leaves the machine. There is no congestion, and
/// an algorithm that paces, such as BBR, costs more than everything else a relay does. Every kernel has Reno and lets
/// every process select it.
pub(super) fn use_reno(socket: &OwnedFd) {
    let _ = socket::setsockopt(socket, sockopt::TcpCongestion, &"reno".into());
}

/// Makes the peer see a reset instead of an orderly end when the socket is closed.
pub(super) fn reset(socket: &OwnedFd) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let _ = socket::setsockopt(socket, sockopt::Linger, &linger);
}

/// Sends as much of a header as the socket accepts, and keeps the rest.
fn send_header(socket: &OwnedFd, header: &mut Vec<u8>) -> nix::Result<()> {
    while !header.is_empty() {
        match socket::send(socket.as_raw_fd(), header, MsgFlags::MSG_NOSIGNAL) {
            Ok(length) => drop(header.drain(..length)),
            Err(Errno::EINTR) => {}
            // An event announces when the socket accepts more.
            Err(Errno::EAGAIN) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Returns whether a socket is connected by now, or an error if it cannot be.
fn is_connected(socket: &OwnedFd) -> io::Result<bool> {
    let error = socket::getsockopt(socket, sockopt::SocketError)?;
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    match rustix::net::getpeername(socket) {
        Ok(_) if is_connected_to_itself(socket) => Err(io::ErrorKind::ConnectionRefused.into()),
        Ok(_) => Ok(true),
        Err(rustix::io::Errno::NOTCONN) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::super::direction::tests::pair;
    use super::*;
    use crate::relay::Budget;

    /// The program may make room at any instant, so this is tried often. If the client's bytes did not wait for the
    /// header, nearly all attempts would fail.
    #[test]
    fn the_header_comes_first_whenever_the_program_reads() {
        for _ in 0..100 {
            let budget = Budget::new(10);
            let (mut client, from_client) = pair();
            let (mut program, to_program) = pair();
            let header: Vec<u8> = (0..52).collect();
            // The program's socket is full at first, and the client has sent something already.
            let mut full = 0;
            while let Ok(length) = rustix::io::write(&to_program, &[b'.'; 4096]) {
                full += length;
            }
            client.write_all(b"the client").expect("room");
            client.shutdown(std::net::Shutdown::Write).expect("a socket");
            let grant = budget.take(2).expect("descriptors");
            let mut connection =
                Connection::new(0, [from_client, to_program], [1, 2], (Vec::new(), false), header.clone(), grant);
            connection.connecting = None;
            let (mut poller, mut pipes) = (Poller::new().expect("a poller"), Pipes::new(budget));
            assert!(connection.relay(&mut poller, &mut pipes) == Outcome::Wait && !connection.header.is_empty());
            let expected = [vec![b'.'; full], header, b"the client".to_vec()].concat();
            let length = expected.len();
            let reader = std::thread::spawn(move || {
                let mut received = vec![0; length];
                program.read_exact(&mut received).map(|()| received)
            });
            while !connection.directions[0].has_ended() {
                assert!(connection.relay(&mut poller, &mut pipes) != Outcome::Reset);
            }
            let received = reader.join().expect("a thread").expect("all bytes");
            assert!(received == expected, "{:?}", String::from_utf8_lossy(&received[full..]));
        }
    }
}
