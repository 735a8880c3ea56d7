//! TCP: each connection to the host's port has one inside.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{self, SockType, SockaddrStorage, sockopt};
use rustix::net::{Shutdown, SocketFlags};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use super::{Bound, Poller, new_socket};

/// How much is moved at once, in bytes: what a pipe is to hold. If the kernel does not grant that (pipe(7): `pipe-user-pages-soft`), it
/// holds less, and is full earlier.
const PIPE: usize = 256 << 10;

/// How often one connection moves before the others have their turn.
const TURNS: usize = 8;

/// How many pipes are kept for the next who needs one.
const SPARE_PIPES: usize = 64;

/// A pipe: where it is read, and where it is written.
type Pipe = (OwnedFd, OwnedFd);

/// All connections.
#[derive(Default)]
pub(super) struct Streams {
    connections: HashMap<u64, Connection>,
    /// Which connection the tokens of its two sockets lead to: that of the first.
    by_token: HashMap<u64, u64>,
    pipes: Vec<Pipe>,
    /// Connections that have more to move at once.
    more: Vec<u64>,
}

struct Connection {
    /// From the client, and the one inside.
    sockets: [OwnedFd; 2],
    tokens: [u64; 2],
    /// Until the one inside is connected: where else to try.
    trying: Option<Vec<SocketAddr>>,
    /// To the program, and back.
    directions: [Direction; 2],
}

/// What goes one way.
#[derive(Default)]
struct Direction {
    pipe: Option<Pipe>,
    /// How much is in the pipe, in bytes.
    buffered: usize,
    /// Whether the source has ended.
    ended: bool,
    /// Whether the sink knows that.
    told: bool,
}

/// What is to become of a connection.
#[derive(PartialEq, Eq)]
enum Next {
    Wait,
    More,
    End,
    Break,
}

impl Streams {
    /// Accepts all that wait at an entrance, and begins to connect them to where it leads.
    pub(super) fn accept(&mut self, at: &Bound, targets: &[IpAddr], poller: &mut Poller) -> nix::Result<()> {
        let port = at.entrance.to;
        loop {
            let (client, from) = match accept(at.socket.as_fd()) {
                Ok(accepted) => accepted,
                Err(Errno::EAGAIN) => return Ok(()),
                // One that has gone again already, or whose network has trouble (accept(2)).
                Err(
                    Errno::ECONNABORTED
                    | Errno::EINTR
                    | Errno::EPROTO
                    | Errno::ENETDOWN
                    | Errno::ENOPROTOOPT
                    | Errno::EHOSTDOWN
                    | Errno::ENONET
                    | Errno::EHOSTUNREACH
                    | Errno::ENETUNREACH
                    | Errno::EPERM,
                ) => continue,
                Err(error) => return Err(error),
            };
            if !from.is_some_and(|from| at.entrance.admits(&from)) {
                reset(&client);
                continue;
            }
            let to = targets.iter().rev().map(|target| SocketAddr::new(*target, port)).collect();
            if let Err(error) = self.begin(client, to, poller) {
                tracing::debug!("a connection to port {port} has failed: {error}");
            }
        }
    }

    fn begin(&mut self, client: OwnedFd, mut to: Vec<SocketAddr>, poller: &mut Poller) -> io::Result<()> {
        let _ = socket::setsockopt(&client, sockopt::TcpNoDelay, &true);
        let server = match connect(&mut to) {
            Ok(server) => server,
            Err(error) => {
                reset(&client);
                return Err(error);
            }
        };
        let tokens = [poller.add(client.as_fd())?, poller.add(server.as_fd())?];
        self.by_token.extend(tokens.map(|token| (token, tokens[0])));
        let directions = Default::default();
        let connection = Connection { sockets: [client, server], tokens, trying: Some(to), directions };
        self.connections.insert(tokens[0], connection);
        self.more.push(tokens[0]);
        Ok(())
    }

    /// Moves what can be moved on the connection that a token belongs to; false if there is none.
    pub(super) fn work(&mut self, token: u64, poller: &mut Poller) -> bool {
        let Some(key) = self.by_token.get(&token).copied() else { return false };
        let Some(connection) = self.connections.get_mut(&key) else { return false };
        let before = connection.tokens;
        let next = connection.work(poller, &mut self.pipes);
        let now = connection.tokens;
        if before != now {
            self.by_token.remove(&before[1]);
            self.by_token.insert(now[1], key);
        }
        match next {
            Next::Wait => {}
            Next::More => self.more.push(key),
            Next::End | Next::Break => {
                for token in now {
                    self.by_token.remove(&token);
                }
                if let Some(connection) = self.connections.remove(&key)
                    && next == Next::Break
                {
                    connection.sockets.iter().for_each(reset);
                }
            }
        }
        true
    }

    /// Whether a connection has more to move at once.
    pub(super) fn has_more(&self) -> bool {
        !self.more.is_empty()
    }

    /// Lets those move on that had to let others have their turn.
    pub(super) fn work_on(&mut self, poller: &mut Poller) {
        for key in std::mem::take(&mut self.more) {
            self.work(key, poller);
        }
    }
}

/// Accepts a connection, and tells from whom, unless that one has gone already.
fn accept(listener: BorrowedFd<'_>) -> nix::Result<(OwnedFd, Option<SocketAddr>)> {
    let accepted = rustix::net::acceptfrom_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
    let (client, from) = accepted.map_err(|error| Errno::from_raw(error.raw_os_error()))?;
    Ok((client, from.and_then(|from| from.try_into().ok())))
}

/// Begins to connect to the last of some addresses, or of those left if one cannot be tried.
fn connect(to: &mut Vec<SocketAddr>) -> io::Result<OwnedFd> {
    let mut last = Errno::ECONNREFUSED;
    while let Some(address) = to.pop() {
        let begun = new_socket(address, SockType::Stream).and_then(|socket| {
            socket::setsockopt(&socket, sockopt::TcpNoDelay, &true)?;
            match socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
                Err(Errno::EINPROGRESS) | Ok(()) => Ok(socket),
                Err(error) => Err(error),
            }
        });
        match begun {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last.into())
}

/// Has a peer see that a connection was broken off, and not brought to its end.
fn reset(socket: &OwnedFd) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let _ = socket::setsockopt(socket, sockopt::Linger, &linger);
}

impl Connection {
    fn work(&mut self, poller: &mut Poller, pipes: &mut Vec<Pipe>) -> Next {
        if let Some(left) = &mut self.trying {
            match is_connected(&self.sockets[1]) {
                Ok(false) => return Next::Wait,
                Ok(true) => self.trying = None,
                Err(_) => {
                    let other = connect(left).and_then(|other| Ok((poller.add(other.as_fd())?, other)));
                    let Ok((token, other)) = other else { return Next::Break };
                    (self.sockets[1], self.tokens[1]) = (other, token);
                    return Next::More;
                }
            }
        }
        let mut next = Next::Wait;
        for (number, direction) in self.directions.iter_mut().enumerate() {
            match direction.work(&self.sockets[number], &self.sockets[1 - number], pipes) {
                Ok(true) => next = Next::More,
                Ok(false) => {}
                Err(_) => return Next::Break,
            }
        }
        if self.directions.iter().all(|direction| direction.told) { Next::End } else { next }
    }
}

/// Whether a socket that was to be connected is.
fn is_connected(socket: &OwnedFd) -> io::Result<bool> {
    let error = socket::getsockopt(socket, sockopt::SocketError)?;
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    match rustix::net::getpeername(socket) {
        Ok(_) => Ok(true),
        Err(rustix::io::Errno::NOTCONN) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn new_pipe() -> rustix::io::Result<Pipe> {
    let pipe = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    let _ = fcntl_setpipe_size(&pipe.1, PIPE);
    Ok(pipe)
}

impl Direction {
    /// Moves what can be moved; true if there is more.
    fn work(&mut self, source: &OwnedFd, sink: &OwnedFd, pipes: &mut Vec<Pipe>) -> io::Result<bool> {
        let mut turns = 0;
        while !self.told && turns < TURNS {
            turns += 1;
            let moved = self.fill(source, pipes)? | self.drain(sink)?;
            if self.ended && self.buffered == 0 {
                match rustix::net::shutdown(sink, Shutdown::Write) {
                    // It is broken off; the other direction tells.
                    Ok(()) | Err(rustix::io::Errno::NOTCONN) => self.told = true,
                    Err(error) => return Err(error.into()),
                }
            }
            if !moved {
                break;
            }
        }
        if self.buffered == 0
            && let Some(pipe) = self.pipe.take()
            && pipes.len() < SPARE_PIPES
        {
            pipes.push(pipe);
        }
        Ok(turns == TURNS && !self.told)
    }

    /// Moves from the source into the pipe.
    fn fill(&mut self, source: &OwnedFd, pipes: &mut Vec<Pipe>) -> io::Result<bool> {
        if self.ended || self.buffered >= PIPE {
            return Ok(false);
        }
        let pipe = match self.pipe.take() {
            Some(pipe) => pipe,
            None => pipes.pop().map_or_else(new_pipe, Ok)?,
        };
        let (_, end) = self.pipe.insert(pipe);
        match splice(source, None, end, None, PIPE - self.buffered, SpliceFlags::MOVE | SpliceFlags::NONBLOCK) {
            Ok(0) => {
                self.ended = true;
                Ok(true)
            }
            Ok(length) => {
                self.buffered += length;
                Ok(true)
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Moves from the pipe into the sink.
    fn drain(&mut self, sink: &OwnedFd) -> io::Result<bool> {
        let Some((end, _)) = self.pipe.as_ref().filter(|_| self.buffered > 0) else { return Ok(false) };
        match splice(end, None, sink, None, self.buffered, SpliceFlags::MOVE | SpliceFlags::NONBLOCK) {
            Ok(length) => {
                self.buffered -= length;
                Ok(length > 0)
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}
