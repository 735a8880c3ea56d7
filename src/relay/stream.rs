//! TCP: each connection to the host's port has one inside.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{self, MsgFlags, SockType, SockaddrStorage, sockopt};
use rustix::net::{SendFlags, Shutdown, SocketFlags};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use super::clients::{ATTEMPTS, Client, Clients};
use super::descriptors::{Allowance, CONNECTION, Port, Share};
use super::{Bound, Poller, is_own_peer, new_socket, proxy_protocol};
use crate::config::ProxyProtocol;

/// How much a large pipe holds, in bytes: the most that one without privileges is granted (pipe(7): `pipe-max-size`). The more is moved at
/// once, the less it costs.
const LARGE: usize = 1 << 20;

/// How many pipes of a relay are large: a quarter of what a user's may hold together (pipe(7): `pipe-user-pages-soft`). Those of others
/// would be tiny otherwise.
const LARGE_PIPES: usize = 16;

/// How much any other pipe holds, in bytes (pipe(7)). If the kernel does not grant that, it holds less, and is full earlier.
const SMALL: usize = 64 << 10;

/// How it is moved.
const SPLICE: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);

/// How often one connection moves before the others have their turn.
const TURNS: usize = 2;

/// How many pipes are kept for the next who needs one.
const SPARE_PIPES: usize = 16;

/// How much is moved at once where there are no descriptors for a pipe, in bytes.
const MEMORY: usize = 16 << 10;

/// How many connections are accepted at one port before the others have their turn.
const ACCEPTED: usize = 64;

/// How often it is said that connections give way.
const SAID_EVERY: Duration = Duration::from_secs(60);

/// A pipe: where it is read, and where it is written.
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    /// How much it holds, in bytes.
    size: usize,
    /// Counts the large ones.
    _large: Option<Arc<()>>,
    _share: Share,
}

/// Pipes for whoever needs one.
struct Pipes {
    spare: Vec<Pipe>,
    large: Arc<()>,
    descriptors: Allowance,
}

/// Where what was read from one socket is until the other takes it.
enum Store {
    /// In a pipe, so that it stays in the kernel.
    Pipe(Pipe),
    /// In memory, from a place on, where no pipe can be had: nobody has to wait because others have all of them.
    Memory(Box<[u8]>, usize),
}

impl Store {
    fn memory() -> Self {
        Self::Memory(vec![0; MEMORY].into_boxed_slice(), 0)
    }
}

/// All connections.
pub(super) struct Streams {
    connections: HashMap<u64, Connection>,
    /// Which connection the tokens of its two sockets lead to: that of the first.
    by_token: HashMap<u64, u64>,
    /// The ports' shares of the descriptors, by the tokens of their entrances.
    ports: HashMap<u64, Port>,
    /// Whose the connections are.
    clients: Clients<u64>,
    /// When it was last said that connections give way.
    said: Option<Instant>,
    pipes: Pipes,
    /// Connections that have more to move at once.
    more: Vec<u64>,
}

struct Connection {
    _share: Share,
    /// The token of the entrance that it came by.
    by: u64,
    /// From the client, and the one inside.
    sockets: [OwnedFd; 2],
    tokens: [u64; 2],
    /// Until the one inside is connected: where else to try.
    trying: Option<Vec<SocketAddr>>,
    /// What the one inside has yet to be told before anything that the client says.
    greeting: Vec<u8>,
    /// To the program, and back.
    directions: [Direction; 2],
    /// When something was last moved, either way.
    used: Instant,
}

/// What goes one way.
#[derive(Default)]
struct Direction {
    /// None while there is nothing to be kept.
    store: Option<Store>,
    /// How much is in it, in bytes.
    buffered: usize,
    /// Whether the source has ended.
    ended: bool,
    /// Whether the sink knows that.
    told: bool,
    /// Whether the source has ever had urgent data (tcp(7)), at which splice(2) stops.
    urgent: bool,
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
    pub(super) fn new(descriptors: Allowance) -> Self {
        let pipes = Pipes { spare: Vec::new(), large: Arc::default(), descriptors };
        Self {
            connections: HashMap::new(),
            by_token: HashMap::new(),
            ports: HashMap::new(),
            clients: Clients::new(),
            said: None,
            pipes,
            more: Vec::new(),
        }
    }

    /// Reserves a share of the descriptors for what comes by an entrance.
    pub(super) fn begin_at(&mut self, token: u64) {
        self.ports.insert(token, self.pipes.descriptors.port());
    }

    /// Accepts what waits at an entrance, and begins to connect it to where it leads. True if more may be waiting.
    ///
    /// # Errors
    /// If somebody may have to wait, because there are not as many descriptors.
    pub(super) fn accept(
        &mut self,
        token: u64,
        at: &Bound,
        targets: &[IpAddr],
        poller: &mut Poller,
    ) -> nix::Result<bool> {
        let port = at.entrance.to;
        let targets = at.entrance.order(targets);
        for _ in 0..ACCEPTED {
            let share = self.pipes.room(self.ports.get(&token));
            // Where nothing can give way, the client waits in the kernel's queue instead of being turned away.
            if share.is_none() && self.connections.is_empty() {
                return Err(Errno::EMFILE);
            }
            // Who comes decides about who gives way, so that is known first. For an instant this is one descriptor more than the allowance
            // has, which is less than what the process may open.
            let (client, from) = match accept(at.socket.as_fd()) {
                Ok(accepted) => accepted,
                Err(Errno::EAGAIN) => return Ok(false),
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
            let Some(from) = from.filter(|from| at.entrance.admits(from)) else {
                reset(&client);
                continue;
            };
            let share = share.or_else(|| self.make_room(token, at.entrance.port, from.into()));
            let Some(share) = share else {
                reset(&client);
                return Err(Errno::EMFILE);
            };
            let to = match local_address(&client) {
                Ok(to) => to,
                Err(error) => {
                    tracing::debug!("a connection to port {port} has failed: {error}");
                    reset(&client);
                    continue;
                }
            };
            if at.entrance.only.is_some() || from.ip() == to.ip() {
                stay_on_machine(&client);
            }
            let greeting = match at.entrance.proxy_protocol {
                None => Vec::new(),
                Some(ProxyProtocol::V2) => proxy_protocol::header(from, to),
            };
            let to = targets.iter().rev().map(|target| SocketAddr::new(*target, port)).collect();
            if let Err(error) = self.begin(token, (client, from), share, greeting, to, poller) {
                tracing::debug!("a connection to port {port} has failed: {error}");
            }
        }
        Ok(true)
    }

    /// Makes room for one more connection of a client's that has come by an entrance: of the client that holds most the longest-idle
    /// connection gives way, unless it came by a port that has no more than its reserved share.
    fn make_room(&mut self, token: u64, port: u16, newcomer: Client) -> Option<Share> {
        let own = self.ports.get(&token)?;
        for _ in 0..ATTEMPTS {
            let may_give_way = |by: u64| by == token || self.ports.get(&by).is_some_and(Port::is_over);
            let last_use = |key: &u64| self.connections.get(key).map(|connection| connection.used);
            let (key, client) = self.clients.giving_way(newcomer, may_give_way, last_use)?;
            if self.said.is_none_or(|at| at.elapsed() > SAID_EVERY) {
                self.said = Some(Instant::now());
                tracing::warn!(
                    "cannot open more connections for port {port} of the host: the limit of open files is reached. From now on the \
                     longest-idle connection of the address that holds most is closed for each new one, now of {client}. To allow for \
                     more, raise the hard limit (`ulimit -Hn`, LimitNOFILE= of a service)"
                );
            }
            remove(&mut self.connections, &mut self.by_token, &mut self.clients, key, true);
            if let Some(share) = own.take(CONNECTION) {
                return Some(share);
            }
        }
        None
    }

    fn begin(
        &mut self,
        by: u64,
        (client, from): (OwnedFd, SocketAddr),
        share: Share,
        greeting: Vec<u8>,
        mut to: Vec<SocketAddr>,
        poller: &mut Poller,
    ) -> io::Result<()> {
        let _ = socket::setsockopt(&client, sockopt::TcpNoDelay, &true);
        // The program cannot find out that its client has vanished: what it probes is this end.
        let _ = socket::setsockopt(&client, sockopt::KeepAlive, &true);
        let server = match connect(&mut to) {
            Ok(server) => server,
            Err(error) => {
                reset(&client);
                return Err(error);
            }
        };
        let tokens = [poller.add(client.as_fd())?, poller.add(server.as_fd())?];
        self.by_token.extend(tokens.map(|token| (token, tokens[0])));
        let (directions, used) = (Default::default(), Instant::now());
        let (sockets, trying) = ([client, server], Some(to));
        let connection = Connection { _share: share, by, sockets, tokens, trying, greeting, directions, used };
        self.connections.insert(tokens[0], connection);
        self.clients.add(tokens[0], from.into(), by, used);
        self.more.push(tokens[0]);
        Ok(())
    }

    /// Moves what can be moved on the connection that a token belongs to; false if there is none. `is_urgent` says that its socket has
    /// urgent data.
    pub(super) fn work(&mut self, token: u64, is_urgent: bool, poller: &mut Poller) -> bool {
        let Some(key) = self.by_token.get(&token).copied() else { return false };
        let Some(connection) = self.connections.get_mut(&key) else { return false };
        if is_urgent {
            connection.directions[usize::from(connection.tokens[1] == token)].urgent = true;
        }
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
            Next::End | Next::Break => self.remove(key, next == Next::Break),
        }
        true
    }

    fn remove(&mut self, key: u64, broken: bool) {
        remove(&mut self.connections, &mut self.by_token, &mut self.clients, key, broken);
    }

    /// Breaks off all connections that came by an entrance, by which no more will come.
    pub(super) fn end(&mut self, by: u64) {
        self.ports.remove(&by);
        let came = self.connections.iter().filter(|(_, connection)| connection.by == by).map(|(key, _)| *key);
        for key in came.collect::<Vec<_>>() {
            self.remove(key, true);
        }
    }

    /// Whether a connection has more to move at once.
    pub(super) fn has_more(&self) -> bool {
        !self.more.is_empty()
    }

    /// Lets those move on that had to let others have their turn.
    pub(super) fn work_on(&mut self, poller: &mut Poller) {
        for key in std::mem::take(&mut self.more) {
            self.work(key, false, poller);
        }
    }
}

fn remove(
    connections: &mut HashMap<u64, Connection>,
    by_token: &mut HashMap<u64, u64>,
    clients: &mut Clients<u64>,
    key: u64,
    broken: bool,
) {
    let Some(connection) = connections.remove(&key) else { return };
    clients.remove(&key);
    for token in connection.tokens {
        by_token.remove(&token);
    }
    if broken {
        connection.sockets.iter().for_each(reset);
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
            stay_on_machine(&socket);
            let _ = socket::setsockopt(&socket, sockopt::OobInline, &true);
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

/// Takes the plainest congestion control for a connection that never leaves the machine: there is no congestion, and one that paces what
/// is sent, as the widespread BBR does, costs more than all else that is done here. Every kernel has it, and lets everybody use it.
fn stay_on_machine(socket: &OwnedFd) {
    let _ = socket::setsockopt(socket, sockopt::TcpCongestion, &"reno".into());
}

/// Has a peer see that a connection was broken off, and not brought to its end.
fn reset(socket: &OwnedFd) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let _ = socket::setsockopt(socket, sockopt::Linger, &linger);
}

impl Connection {
    fn work(&mut self, poller: &mut Poller, pipes: &mut Pipes) -> Next {
        if let Some(left) = &mut self.trying {
            match is_connected(&self.sockets[1]) {
                Ok(false) => return Next::Wait,
                Ok(true) => self.trying = None,
                Err(_) => {
                    // What has met itself keeps its port no longer than that.
                    reset(&self.sockets[1]);
                    let other = connect(left).and_then(|other| Ok((poller.add(other.as_fd())?, other)));
                    let Ok((token, other)) = other else { return Next::Break };
                    (self.sockets[1], self.tokens[1]) = (other, token);
                    return Next::More;
                }
            }
        }
        if greet(&self.sockets[1], &mut self.greeting).is_err() {
            return Next::Break;
        }
        let mut next = Next::Wait;
        let mut moved = false;
        for (number, direction) in self.directions.iter_mut().enumerate() {
            if number == 0 && !self.greeting.is_empty() {
                continue;
            }
            match direction.work(&self.sockets[number], &self.sockets[1 - number], pipes, &mut moved) {
                Ok(true) => next = Next::More,
                Ok(false) => {}
                Err(_) => return Next::Break,
            }
        }
        if moved {
            self.used = Instant::now();
        }
        if self.directions.iter().all(|direction| direction.told) { Next::End } else { next }
    }
}

/// Sends what is to come before everything else, and keeps what the socket does not take.
fn greet(socket: &OwnedFd, greeting: &mut Vec<u8>) -> nix::Result<()> {
    while !greeting.is_empty() {
        match socket::send(socket.as_raw_fd(), greeting, MsgFlags::MSG_NOSIGNAL) {
            Ok(length) => drop(greeting.drain(..length)),
            Err(Errno::EINTR) => {}
            // It is told when there is room.
            Err(Errno::EAGAIN) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The host's address that a client has come to.
fn local_address(client: &OwnedFd) -> io::Result<SocketAddr> {
    Ok(rustix::net::getsockname(client)?.try_into()?)
}

/// Whether a socket that was to be connected is.
fn is_connected(socket: &OwnedFd) -> io::Result<bool> {
    let error = socket::getsockopt(socket, sockopt::SocketError)?;
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    match rustix::net::getpeername(socket) {
        Ok(_) if is_own_peer(socket) => Err(io::ErrorKind::ConnectionRefused.into()),
        Ok(_) => Ok(true),
        Err(rustix::io::Errno::NOTCONN) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

impl Pipes {
    fn take(&mut self) -> Option<Pipe> {
        self.spare.pop().or_else(|| {
            let _share = self.descriptors.take(2)?;
            let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
            let large = Some(&self.large).filter(|large| Arc::strong_count(large) <= LARGE_PIPES).cloned();
            let large = large.filter(|_| fcntl_setpipe_size(&write, LARGE).is_ok());
            let size = if large.is_some() { LARGE } else { SMALL };
            Some(Pipe { read, write, size, _large: large, _share })
        })
    }

    /// Keeps an empty one for the next.
    fn give_back(&mut self, pipe: Pipe) {
        if self.spare.len() < SPARE_PIPES {
            self.spare.push(pipe);
        }
    }

    /// Room for the sockets of one more connection of a port, if need be in place of pipes that nobody needs.
    fn room(&mut self, port: Option<&Port>) -> Option<Share> {
        let port = port?;
        port.take(CONNECTION).or_else(|| {
            self.spare.clear();
            port.take(CONNECTION)
        })
    }
}

impl Direction {
    /// Moves what can be moved, and says whether that was anything; true if there is more.
    fn work(&mut self, source: &OwnedFd, sink: &OwnedFd, pipes: &mut Pipes, has_moved: &mut bool) -> io::Result<bool> {
        let mut turns = 0;
        while !self.told && turns < TURNS {
            turns += 1;
            let moved = self.fill(source, pipes)? | self.drain(sink)?;
            *has_moved |= moved;
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
        // Who has nothing to say keeps neither a pipe nor memory.
        if self.buffered == 0
            && let Some(store) = self.store.take()
        {
            match store {
                Store::Pipe(pipe) => pipes.give_back(pipe),
                Store::Memory(..) => {}
            }
        }
        Ok(turns == TURNS && !self.told)
    }

    /// Moves from the source into the store.
    fn fill(&mut self, source: &OwnedFd, pipes: &mut Pipes) -> io::Result<bool> {
        if self.ended {
            return Ok(false);
        }
        let filled = self.take_from(source, pipes);
        // Nothing comes past urgent data but by an ordinary read.
        let is_held_up = self.urgent && self.buffered == 0 && matches!(filled, Err(rustix::io::Errno::AGAIN));
        let filled = match self.store.take() {
            Some(Store::Pipe(pipe)) if is_held_up => {
                pipes.give_back(pipe);
                self.store = Some(Store::memory());
                self.take_from(source, pipes)
            }
            store => {
                self.store = store;
                filled
            }
        };
        match filled {
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

    /// Moves what there is room for into the store, and says how much: `EAGAIN` if there is no room, or nothing to move.
    fn take_from(&mut self, source: &OwnedFd, pipes: &mut Pipes) -> rustix::io::Result<usize> {
        match self.store.get_or_insert_with(|| pipes.take().map_or_else(Store::memory, Store::Pipe)) {
            Store::Pipe(pipe) if self.buffered >= pipe.size => Err(rustix::io::Errno::AGAIN),
            Store::Pipe(pipe) => splice(source, None, &pipe.write, None, pipe.size - self.buffered, SPLICE),
            // Not before all of it is gone.
            Store::Memory(..) if self.buffered > 0 => Err(rustix::io::Errno::AGAIN),
            Store::Memory(bytes, start) => {
                *start = 0;
                rustix::io::read(source, &mut **bytes)
            }
        }
    }

    /// Moves from the store into the sink.
    fn drain(&mut self, sink: &OwnedFd) -> io::Result<bool> {
        let Some(store) = self.store.as_mut().filter(|_| self.buffered > 0) else { return Ok(false) };
        let drained = match store {
            Store::Pipe(pipe) => splice(&pipe.read, None, sink, None, self.buffered, SPLICE),
            Store::Memory(bytes, start) => {
                let sent = rustix::net::send(sink, &bytes[*start..*start + self.buffered], SendFlags::NOSIGNAL);
                *start += sent.unwrap_or(0);
                sent
            }
        };
        match drained {
            Ok(length) => {
                self.buffered -= length;
                Ok(length > 0)
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A socket that does not block, as all of a relay's.
    fn pair() -> (UnixStream, OwnedFd) {
        let (outer, own) = UnixStream::pair().expect("sockets");
        own.set_nonblocking(true).expect("a socket");
        (outer, own.into())
    }

    /// The program makes room at any instant, so it is tried often: without the care that is tested, nearly all attempts fail.
    #[test]
    fn a_greeting_comes_first_whenever_the_program_takes_it() {
        for _ in 0..100 {
            let allowance = Allowance::of(10);
            let (mut client, from_client) = pair();
            let (mut program, to_program) = pair();
            let greeting: Vec<u8> = (0..52).collect();
            // There is no room at first, and the client has spoken already.
            let mut full = 0;
            while let Ok(length) = rustix::io::write(&to_program, &[b'.'; 4096]) {
                full += length;
            }
            client.write_all(b"the client").expect("room");
            client.shutdown(std::net::Shutdown::Write).expect("a socket");
            let mut connection = Connection {
                _share: allowance.take(2).expect("descriptors"),
                by: 0,
                sockets: [from_client, to_program],
                tokens: [1, 2],
                trying: None,
                greeting: greeting.clone(),
                directions: Default::default(),
                used: Instant::now(),
            };
            let (mut poller, mut pipes) = (Poller::new().expect("a poller"), Streams::new(allowance).pipes);
            assert!(connection.work(&mut poller, &mut pipes) == Next::Wait && !connection.greeting.is_empty());
            let expected = [vec![b'.'; full], greeting, b"the client".to_vec()].concat();
            let wanted = expected.len();
            let reading = std::thread::spawn(move || {
                let mut heard = vec![0; wanted];
                program.read_exact(&mut heard).map(|()| heard)
            });
            while !connection.directions[0].told {
                assert!(connection.work(&mut poller, &mut pipes) != Next::Break);
            }
            let heard = reading.join().expect("a thread").expect("all of it");
            assert!(heard == expected, "{:?}", String::from_utf8_lossy(&heard[full..]));
        }
    }
    #[test]
    fn without_descriptors_for_pipes_all_arrives_the_same() {
        const MUCH: usize = 3 << 20;
        let sent: Vec<u8> = (0..MUCH).map(|at| (at % 251) as u8).collect();
        for (descriptors, in_memory) in [(0, true), (2, false)] {
            let (mut client, from_client) = pair();
            let (mut program, to_program) = pair();
            let mut pipes = Streams::new(Allowance::of(descriptors)).pipes;
            let text = sent.clone();
            let writing = std::thread::spawn(move || client.write_all(&text));
            let mut direction = Direction::default();
            // As long as nobody reads, something is kept in the end.
            while direction.buffered == 0 {
                direction.work(&from_client, &to_program, &mut pipes, &mut false).expect("it moves");
            }
            assert_eq!(matches!(direction.store, Some(Store::Memory(..))), in_memory);
            let reading = std::thread::spawn(move || {
                let mut heard = Vec::new();
                program.read_to_end(&mut heard).map(|_| heard)
            });
            while !direction.told {
                direction.work(&from_client, &to_program, &mut pipes, &mut false).expect("it moves");
            }
            assert!(direction.store.is_none());
            drop(to_program);
            writing.join().expect("a thread").expect("all of it");
            assert!(reading.join().expect("a thread").expect("an end") == sent);
        }
    }
}
