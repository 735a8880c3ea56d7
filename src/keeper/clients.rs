//! The keeper's clients: processes of the keeper's own user, or of root. They may hold a lease and request changes, and
//! the keeper receives descriptors from them. Other users connect to another socket ([`super::public_clients`]).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use crate::fault;
use crate::lease::{self, ClientRequest, KeeperEvent, Received};
use crate::linux::local_socket::{LocalListener, PeerCredentials};
use crate::linux::namespace::share_namespace;
use crate::linux::user_namespace;
use crate::registry::Holder;

/// The mode of the keeper's socket: only its own user may connect.
const SOCKET_MODE: u32 = 0o600;

/// The number of connections that another user may have open: root's, at the keeper of an ordinary user.
const MAX_UNTRUSTED: usize = 128;

/// How long a client may stay connected without a request.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// The number of a connection, unique in the life of a keeper.
pub(crate) type ConnectionId = u64;

/// A connection.
#[derive(Debug)]
pub(super) struct KeeperClient {
    socket: OwnedFd,
    /// Whether it is the keeper's own user, who may request anything.
    pub(super) trusted: bool,
    pub(super) pid: i32,
    /// Whether it is certain to be outside of a rootless tunnel.
    pub(super) is_outside: bool,
    /// Whether it made its socket in the keeper's network namespace, where no program of a tunnel can make one.
    shares_namespace: bool,
    pub(super) role: Role,
    /// The number of connections to processes outside the tunnel that were refused to its programs.
    refused_connections: u64,
}

/// What a connection is used for.
#[derive(Debug)]
pub(super) enum Role {
    /// The client has not requested anything since this time since boot.
    Idle(Duration),
    /// The client holds a lease. The holder is unknown if it lives in another PID namespace.
    Lease(Option<Holder>),
    /// The client waits for the tunnel's end. Its requests are not read any more.
    Leaving,
}

/// The result of reading a client's next message.
pub(super) enum Message {
    /// A request, and a descriptor if one was passed.
    Request(ClientRequest, Option<OwnedFd>),
    /// A request that this keeper does not know, by its name.
    Unknown(String),
    /// A message that is not a request.
    Invalid(String),
    /// The client has closed its connection.
    Closed,
    /// There is no message yet.
    None,
}

/// All clients.
#[derive(Debug, Default)]
pub(super) struct KeeperClients {
    listener: Option<LocalListener>,
    all: BTreeMap<ConnectionId, KeeperClient>,
    next: ConnectionId,
    /// The launcher that forked the keeper. It shares the keeper's standard error.
    starter: Option<ConnectionId>,
    refused_connections: u64,
}

impl KeeperClients {
    /// Creates a list without clients that does not listen yet.
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Listens at the keeper's socket.
    pub(super) fn listen(&mut self, path: &Path) -> io::Result<()> {
        self.listener = Some(LocalListener::bind(path, SOCKET_MODE)?);
        Ok(())
    }

    /// Closes the keeper's socket, and with it the connections that wait to be accepted.
    pub(super) fn stop_listening(&mut self) {
        self.listener = None;
    }

    /// Adds the launcher that forked the keeper, which holds a lease.
    pub(super) fn add_starter(&mut self, socket: OwnedFd, holder: Holder) {
        let pid = holder.process.pid;
        self.starter = Some(self.next);
        let role = Role::Lease(Some(holder));
        self.add(KeeperClient {
            socket,
            trusted: true,
            pid,
            is_outside: true,
            shares_namespace: true,
            role,
            refused_connections: 0,
        });
    }

    /// Accepts all connections that wait.
    pub(super) fn accept(&mut self, now: Duration) -> io::Result<()> {
        while let Some((socket, credentials)) = self.listener.as_ref().map_or(Ok(None), LocalListener::accept)? {
            self.admit(socket, &credentials, now);
        }
        Ok(())
    }

    /// Adds a connection, or closes it if its user has too many.
    fn admit(&mut self, socket: OwnedFd, credentials: &PeerCredentials, now: Duration) {
        let trusted = nix::unistd::geteuid().as_raw() == credentials.uid;
        let untrusted = self.all.values().filter(|client| !client.trusted).count();
        if trusted || untrusted < MAX_UNTRUSTED {
            let pid = credentials.pid;
            let role = Role::Idle(now);
            let shares_namespace = self.is_in_own_namespace(&socket);
            self.add(KeeperClient {
                socket,
                trusted,
                pid,
                is_outside: false,
                shares_namespace,
                role,
                refused_connections: 0,
            });
        }
    }

    /// Returns whether a client made its socket in the keeper's network namespace. Linux before 5.14 does not tell, so
    /// there the user namespace that the client passes has to do.
    fn is_in_own_namespace(&self, socket: &OwnedFd) -> bool {
        let Some(listener) = &self.listener else { return false };
        fault::is_broken("client-namespace")
            || share_namespace(listener, socket).is_ok_and(|shares| shares.unwrap_or(true))
    }

    fn add(&mut self, client: KeeperClient) {
        self.all.insert(self.next, client);
        self.next += 1;
    }

    /// The socket at which clients connect.
    pub(super) fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().map(AsFd::as_fd)
    }

    /// The connections whose requests are read.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = (ConnectionId, BorrowedFd<'_>)> {
        let is_read = |client: &KeeperClient| !matches!(client.role, Role::Leaving);
        self.all.iter().filter(move |(_, client)| is_read(client)).map(|(id, client)| (*id, client.socket.as_fd()))
    }

    /// Reads a client's next message.
    pub(super) fn receive(&self, id: ConnectionId) -> Message {
        let Some(client) = self.all.get(&id) else { return Message::None };
        match lease::receive_request(&client.socket) {
            Ok(Some((Received::Known(request), descriptor))) => Message::Request(request, descriptor),
            Ok(Some((Received::Unknown(name), _))) => Message::Unknown(name),
            Ok(None) => Message::Closed,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Message::None,
            Err(error) => Message::Invalid(error.to_string()),
        }
    }

    pub(super) fn get(&mut self, id: ConnectionId) -> Option<&mut KeeperClient> {
        self.all.get_mut(&id)
    }

    /// Returns whether a client is the launcher that forked the keeper.
    pub(super) fn is_starter(&self, id: ConnectionId) -> bool {
        self.starter == Some(id)
    }

    /// Closes a connection.
    pub(super) fn close(&mut self, id: ConnectionId) {
        self.all.remove(&id);
    }

    /// Sends an event to a client, without waiting for a client that does not read. Returns whether it was sent.
    pub(super) fn send(&self, id: ConnectionId, event: &KeeperEvent, descriptor: Option<BorrowedFd<'_>>) -> bool {
        let Some(client) = self.all.get(&id) else { return false };
        let sent = lease::send(&client.socket, event, descriptor);
        if let Err(error) = &sent {
            tracing::debug!(%error, "cannot send an event to a client");
        }
        sent.is_ok()
    }

    /// Sends an event to all clients that hold a lease or wait for the tunnel's end.
    pub(super) fn broadcast(&self, event: &KeeperEvent) {
        self.broadcast_with(event, None);
    }

    /// Like [`KeeperClients::broadcast`], and passes a descriptor to each.
    pub(super) fn broadcast_with(&self, event: &KeeperEvent, descriptor: Option<BorrowedFd<'_>>) {
        for (id, client) in &self.all {
            if !matches!(client.role, Role::Idle(_)) {
                self.send(*id, event, descriptor);
            }
        }
    }

    /// Returns the known launchers that hold a lease.
    pub(super) fn holders(&self) -> Vec<Holder> {
        self.all
            .values()
            .filter_map(|client| match &client.role {
                Role::Lease(holder) => holder.clone(),
                _ => None,
            })
            .collect()
    }

    /// Returns the number of leases.
    pub(super) fn leases(&self) -> usize {
        self.all.values().filter(|client| matches!(client.role, Role::Lease(_))).count()
    }

    /// Updates the number of connections that were refused to a lease's programs until now.
    pub(super) fn set_refused_connections(&mut self, id: ConnectionId, count: u64) {
        if let Some(client) = self.all.get_mut(&id) {
            let before = std::mem::replace(&mut client.refused_connections, count);
            self.refused_connections = self.refused_connections.saturating_add(count.saturating_sub(before));
        }
    }

    /// Returns the number of connections to processes outside the tunnel that were refused to programs.
    pub(super) fn refused_connections(&self) -> u64 {
        self.refused_connections
    }

    /// Returns the time since boot at which the next idle connection is closed.
    pub(super) fn due(&self) -> Option<Duration> {
        let idle = self.all.values().filter_map(|client| match client.role {
            Role::Idle(since) => Some(since + IDLE_TIMEOUT),
            _ => None,
        });
        idle.min()
    }

    /// Closes the connections that have been idle for too long.
    pub(super) fn close_idle(&mut self, now: Duration) {
        self.all.retain(|_, client| !matches!(client.role, Role::Idle(since) if since + IDLE_TIMEOUT <= now));
    }
}

impl KeeperClient {
    /// Notes whether a client is outside of a rootless tunnel, by the user namespace that it passes as a proof.
    ///
    /// The descriptor alone would not do: a process that listens at the place of the keeper's socket gets that of each
    /// client.
    pub(super) fn prove(&mut self, proof: Option<OwnedFd>) {
        let is_original = |passed: OwnedFd| user_namespace::is_original(passed.as_fd()).unwrap_or(false);
        self.is_outside = self.shares_namespace && proof.is_some_and(is_original);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::local_socket;

    const NOW: Duration = Duration::from_secs(1000);

    /// Adds a connection of a user, and returns the other end.
    fn connect(clients: &mut KeeperClients, uid: u32) -> OwnedFd {
        let (client_end, keeper_end) = local_socket::pair().expect("a socket pair");
        rustix::io::ioctl_fionbio(&keeper_end, true).expect("a socket that does not block");
        clients.admit(keeper_end, &PeerCredentials { pid: 1, uid, gid: 0 }, NOW);
        client_end
    }

    fn own_user() -> u32 {
        nix::unistd::geteuid().as_raw()
    }

    #[test]
    fn only_idle_connections_time_out() {
        let mut clients = KeeperClients::new();
        let _ends = [connect(&mut clients, own_user()), connect(&mut clients, own_user())];
        clients.get(0).expect("the first client").role = Role::Lease(None);
        assert_eq!(clients.due(), Some(NOW + IDLE_TIMEOUT));
        clients.close_idle(NOW + IDLE_TIMEOUT);
        assert!(clients.get(0).is_some() && clients.get(1).is_none());
        assert_eq!((clients.due(), clients.leases()), (None, 1));
    }

    #[test]
    fn another_user_cannot_take_all_connections() {
        let mut clients = KeeperClients::new();
        let ends: Vec<OwnedFd> = (0..MAX_UNTRUSTED + 5).map(|_| connect(&mut clients, own_user() + 1)).collect();
        assert_eq!(clients.descriptors().count(), MAX_UNTRUSTED);
        let _own = connect(&mut clients, own_user());
        assert_eq!(clients.descriptors().count(), MAX_UNTRUSTED + 1);
        drop(ends);
    }

    #[test]
    fn a_request_of_a_newer_client_is_told_from_garbage() {
        let mut clients = KeeperClients::new();
        let client = connect(&mut clients, own_user());
        local_socket::send(&client, br#"{"Teleport":{"to":"Mars"}}"#, None).expect("sent");
        local_socket::send(&client, br#""Report""#, None).expect("sent");
        local_socket::send(&client, b"\xff", None).expect("sent");
        assert!(matches!(clients.receive(0), Message::Unknown(name) if name == "Teleport"));
        assert!(matches!(clients.receive(0), Message::Request(ClientRequest::Report, None)));
        assert!(matches!(clients.receive(0), Message::Invalid(_)));
        assert!(matches!(clients.receive(0), Message::None));
        drop(client);
        assert!(matches!(clients.receive(0), Message::Closed));
    }

    #[test]
    fn refused_connections_are_counted_once() {
        let mut clients = KeeperClients::new();
        let _ends = [connect(&mut clients, own_user()), connect(&mut clients, own_user())];
        for (id, count) in [(0, 3), (1, 2), (0, 5)] {
            clients.set_refused_connections(id, count);
        }
        clients.close(0);
        assert_eq!(clients.refused_connections(), 7);
    }
}
