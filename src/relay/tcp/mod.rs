//! Relays TCP: for each connection from a client there is one to the program.
//!
//! - `connection`: a pair of such connections.
//! - `direction`: moves the bytes of one direction.

mod connection;
mod direction;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{self, sockopt};
use rustix::net::SocketFlags;

use self::connection::{Connection, Outcome, connect, reset, use_reno};
use self::direction::Pipes;
use super::budget::{Budget, CONNECTION, Grant, PortBudget};
use super::clients::{Client, Clients, EVICTION_ATTEMPTS};
use super::poller::Poller;
use super::{Destinations, ListenSocket, Targets, proxy_protocol};
use crate::config::ProxyProtocol;

/// How many connections are accepted at one port before the other ports get their turn.
const ACCEPTS_PER_TURN: usize = 64;

/// How often to log that connections are evicted.
const EVICTION_LOG_INTERVAL: Duration = Duration::from_secs(60);

/// All TCP connections of a relay.
pub(super) struct TcpConnections {
    /// The connections, by the token of the client's socket.
    connections: HashMap<u64, Connection>,
    /// The keys of [`Self::connections`], by the tokens of both sockets.
    by_token: HashMap<u64, u64>,
    /// Each port's share of the descriptors, by its token.
    ports: HashMap<u64, PortBudget>,
    clients: Clients<u64>,
    eviction_logged: Option<Instant>,
    pipes: Pipes,
    /// Connections that can move more bytes at once.
    unfinished: Vec<u64>,
}

impl TcpConnections {
    pub(super) fn new(descriptors: Budget) -> Self {
        Self {
            connections: HashMap::new(),
            by_token: HashMap::new(),
            ports: HashMap::new(),
            clients: Clients::new(),
            eviction_logged: None,
            pipes: Pipes::new(descriptors),
            unfinished: Vec::new(),
        }
    }

    /// Adds a port, and reserves a share of the descriptors for it.
    pub(super) fn add_port(&mut self, token: u64) {
        self.ports.insert(token, self.pipes.descriptors.add_port());
    }

    /// Accepts the connections that wait at a port, and begins to connect each to the program. Returns true if more may
    /// be waiting.
    ///
    /// # Errors
    ///
    /// Returns an error if clients may have to wait because there are no descriptors left.
    pub(super) fn accept(
        &mut self,
        token: u64,
        listener: &ListenSocket,
        targets: &Targets,
        poller: &mut Poller,
    ) -> nix::Result<bool> {
        let target_port = listener.port.target_port;
        for _ in 0..ACCEPTS_PER_TURN {
            let grant = self.pipes.take_for_connection(self.ports.get(&token));
            // If there is nothing to evict, the client waits in the kernel's queue instead of being rejected.
            if grant.is_none() && self.connections.is_empty() {
                return Err(Errno::EMFILE);
            }
            // The choice of what to evict depends on the client, so the connection is accepted first. For an instant
            // this uses one descriptor more than the budget has, which is less than the process may open.
            let (client, from) = match accept(listener.socket.as_fd()) {
                Ok(accepted) => accepted,
                Err(Errno::EAGAIN) => return Ok(false),
                // The client has closed the connection, or its network reports an error (accept(2)).
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
            let Some(from) = from.filter(|from| listener.port.allows(from)) else {
                reset(&client);
                continue;
            };
            let grant = grant.or_else(|| self.evict(token, listener.port.port, from.into()));
            let Some(grant) = grant else {
                reset(&client);
                return Err(Errno::EMFILE);
            };
            let to = match local_address(&client) {
                Ok(to) => to,
                Err(error) => {
                    tracing::debug!("a connection to port {target_port} has failed: {error}");
                    reset(&client);
                    continue;
                }
            };
            let addresses: Vec<SocketAddr> = match targets {
                Targets::Addresses(targets) => {
                    let sorted = listener.port.sort_targets(targets);
                    sorted.into_iter().rev().map(|target| SocketAddr::new(target, target_port)).collect()
                }
                // The packet rules have decided already. They may have changed meanwhile.
                Targets::Original(destinations) if destinations.allow(&to) => vec![to],
                Targets::Original(_) => {
                    reset(&client);
                    continue;
                }
            };
            if listener.port.allowed_client.is_some() || from.ip() == to.ip() {
                use_reno(&client);
            }
            let header = match listener.port.proxy_protocol {
                None => Vec::new(),
                Some(ProxyProtocol::V2) => proxy_protocol::header(from, to),
            };
            let to_others = listener.port.is_transparent;
            if let Err(error) = self.begin(token, (client, from), grant, header, (addresses, to_others), poller) {
                tracing::debug!("a connection to port {target_port} has failed: {error}");
            }
        }
        Ok(true)
    }

    /// Makes room for a new client of a port: evicts the longest-idle connection of the client that holds most; not one
    /// of a port that uses no more than its reserved share.
    fn evict(&mut self, token: u64, port: u16, newcomer: Client) -> Option<Grant> {
        let own = self.ports.get(&token)?;
        for _ in 0..EVICTION_ATTEMPTS {
            let may_evict = |port: u64| port == token || self.ports.get(&port).is_some_and(PortBudget::exceeds_share);
            let last_use = |key: &u64| self.connections.get(key).map(|connection| connection.used);
            let (key, client) = self.clients.choose_to_evict(newcomer, may_evict, last_use)?;
            if self.eviction_logged.is_none_or(|at| at.elapsed() > EVICTION_LOG_INTERVAL) {
                self.eviction_logged = Some(Instant::now());
                tracing::warn!(
                    "cannot open more connections for port {port} of the host: the limit of open files is reached. \
                     From now on the longest-idle connection of the address that holds most is closed for each new \
                     one, now of {client}. To allow for more, raise the hard limit (`ulimit -Hn`, LimitNOFILE= of a \
                     service)"
                );
            }
            remove(&mut self.connections, &mut self.by_token, &mut self.clients, key, true);
            if let Some(grant) = own.take(CONNECTION) {
                return Some(grant);
            }
        }
        None
    }

    fn begin(
        &mut self,
        port: u64,
        (client, from): (OwnedFd, SocketAddr),
        grant: Grant,
        header: Vec<u8>,
        (mut addresses, to_others): (Vec<SocketAddr>, bool),
        poller: &mut Poller,
    ) -> io::Result<()> {
        let _ = socket::setsockopt(&client, sockopt::TcpNoDelay, &true);
        // The program's own keepalive probes end at the relay, so the relay has to find out if the client has vanished.
        let _ = socket::setsockopt(&client, sockopt::KeepAlive, &true);
        let program = match connect(&mut addresses, to_others) {
            Ok(program) => program,
            Err(error) => {
                reset(&client);
                return Err(error);
            }
        };
        let tokens = [poller.add(client.as_fd())?, poller.add(program.as_fd())?];
        self.by_token.extend(tokens.map(|token| (token, tokens[0])));
        let connection = Connection::new(port, [client, program], tokens, (addresses, to_others), header, grant);
        self.clients.add(tokens[0], from.into(), port, connection.used);
        self.connections.insert(tokens[0], connection);
        self.unfinished.push(tokens[0]);
        Ok(())
    }

    /// Moves the bytes that can be moved on the connection of a token; `is_urgent` says whether its socket has urgent
    /// data. Returns false if there is no such connection.
    pub(super) fn relay(&mut self, token: u64, is_urgent: bool, poller: &mut Poller) -> bool {
        let Some(key) = self.by_token.get(&token).copied() else { return false };
        let Some(connection) = self.connections.get_mut(&key) else { return false };
        if is_urgent {
            connection.set_urgent(token);
        }
        let before = connection.tokens;
        let outcome = connection.relay(poller, &mut self.pipes);
        let now = connection.tokens;
        if before != now {
            self.by_token.remove(&before[1]);
            self.by_token.insert(now[1], key);
        }
        match outcome {
            Outcome::Wait => {}
            Outcome::Unfinished => self.unfinished.push(key),
            Outcome::End | Outcome::Reset => self.remove(key, outcome == Outcome::Reset),
        }
        true
    }

    fn remove(&mut self, key: u64, is_reset: bool) {
        remove(&mut self.connections, &mut self.by_token, &mut self.clients, key, is_reset);
    }

    /// Removes a port, and resets all its connections.
    pub(super) fn end_all_from(&mut self, port: u64) {
        self.ports.remove(&port);
        let of_port = self.connections.iter().filter(|(_, connection)| connection.port == port).map(|(key, _)| *key);
        for key in of_port.collect::<Vec<_>>() {
            self.remove(key, true);
        }
    }

    /// Resets the connections to destinations that are not allowed.
    pub(super) fn end_unless_allowed(&mut self, destinations: &Destinations) {
        let is_allowed =
            |connection: &Connection| local_address(&connection.sockets[0]).is_ok_and(|to| destinations.allow(&to));
        let ended = self.connections.iter().filter(|(_, connection)| !is_allowed(connection)).map(|(key, _)| *key);
        for key in ended.collect::<Vec<_>>() {
            self.remove(key, true);
        }
    }

    /// Returns whether a connection can move more bytes at once.
    pub(super) fn has_unfinished(&self) -> bool {
        !self.unfinished.is_empty()
    }

    /// Continues with the connections that had to wait for the others' turn.
    pub(super) fn relay_unfinished(&mut self, poller: &mut Poller) {
        for key in std::mem::take(&mut self.unfinished) {
            self.relay(key, false, poller);
        }
    }
}

/// Removes a connection. Takes the fields instead of `self`, as [`TcpConnections::evict`] borrows another.
fn remove(
    connections: &mut HashMap<u64, Connection>,
    by_token: &mut HashMap<u64, u64>,
    clients: &mut Clients<u64>,
    key: u64,
    is_reset: bool,
) {
    let Some(connection) = connections.remove(&key) else { return };
    clients.remove(&key);
    for token in connection.tokens {
        by_token.remove(&token);
    }
    if is_reset {
        connection.sockets.iter().for_each(reset);
    }
}

/// Accepts a connection. Returns its socket and the client's address, which is `None` if the client has left already.
fn accept(listener: BorrowedFd<'_>) -> nix::Result<(OwnedFd, Option<SocketAddr>)> {
    let accepted = rustix::net::acceptfrom_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
    let (client, from) = accepted.map_err(|error| Errno::from_raw(error.raw_os_error()))?;
    Ok((client, from.and_then(|from| from.try_into().ok())))
}

/// Returns the host's address that a client has connected to.
fn local_address(client: &OwnedFd) -> io::Result<SocketAddr> {
    Ok(rustix::net::getsockname(client)?.try_into()?)
}
