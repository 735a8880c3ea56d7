//! The thread of a relay: waits for events, and dispatches them to the TCP connections and UDP flows.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::event::Timespec;

use super::poller::{Event, Poller, WAKEUP};
use super::tcp::TcpConnections;
use super::udp::UdpFlows;
use super::{Limits, ListenSocket, RelayCommand, RelayedPort, Targets};
use crate::config::Protocol;

/// How long to wait before accepting again after the process has run out of descriptors.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(50);

/// The state of a relay's thread.
pub(super) struct EventLoop {
    poller: Poller,
    /// The sockets that listen, by token.
    sockets: HashMap<u64, ListenSocket>,
    /// The ports of released sockets, by token, until they are restored or closed.
    released: HashMap<u64, RelayedPort>,
    targets: Targets,
    connections: TcpConnections,
    flows: UdpFlows,
    wakeup: OwnedFd,
    commands: mpsc::Receiver<(RelayCommand, mpsc::SyncSender<()>)>,
    /// Ports where more clients may wait than were accepted in one turn.
    unfinished: Vec<u64>,
    /// Ports where clients wait for descriptors.
    deferred: Vec<u64>,
    /// When to try the deferred ports again.
    retry_at: Option<Instant>,
    /// Whether the shortage of descriptors has been logged.
    shortage_logged: bool,
}

impl EventLoop {
    pub(super) fn new(
        sockets: Vec<ListenSocket>,
        targets: Targets,
        limits: Limits,
        wakeup: OwnedFd,
        commands: mpsc::Receiver<(RelayCommand, mpsc::SyncSender<()>)>,
    ) -> io::Result<Self> {
        let poller = Poller::new()?;
        poller.add_wakeup(wakeup.as_fd())?;
        let mut event_loop = Self {
            poller,
            sockets: HashMap::with_capacity(sockets.len()),
            released: HashMap::new(),
            targets,
            connections: TcpConnections::new(limits.descriptors.clone()),
            flows: UdpFlows::new(limits),
            wakeup,
            commands,
            unfinished: Vec::new(),
            deferred: Vec::new(),
            retry_at: None,
            shortage_logged: false,
        };
        for socket in sockets {
            event_loop.listen(socket)?;
        }
        Ok(event_loop)
    }

    /// Relays until the sender of commands is dropped.
    pub(super) fn run(mut self) -> io::Result<()> {
        loop {
            for Event { token, is_urgent } in self.poller.wait(self.timeout().as_ref())? {
                if token == WAKEUP {
                    if self.run_commands()? {
                        return Ok(());
                    }
                } else if self.sockets.contains_key(&token) {
                    self.accept(token);
                } else if !self.connections.relay(token, is_urgent, &mut self.poller) {
                    self.flows.relay_replies(token, &self.sockets, &mut self.poller);
                }
            }
            self.connections.relay_unfinished(&mut self.poller);
            for token in std::mem::take(&mut self.unfinished) {
                self.accept(token);
            }
            if self.retry_at.is_some_and(|at| at <= Instant::now()) {
                self.retry_at = None;
                for token in std::mem::take(&mut self.deferred) {
                    self.accept(token);
                }
                self.shortage_logged &= !self.deferred.is_empty();
            }
            self.flows.end_idle();
        }
    }

    /// Runs the commands that were sent. Returns true if no more will be sent.
    fn run_commands(&mut self) -> io::Result<bool> {
        let _ = rustix::io::read(&self.wakeup, &mut [0_u8; 8]);
        loop {
            match self.commands.try_recv() {
                Ok((command, done)) => {
                    self.run_command(command)?;
                    let _ = done.send(());
                }
                Err(mpsc::TryRecvError::Empty) => return Ok(false),
                Err(mpsc::TryRecvError::Disconnected) => return Ok(true),
            }
        }
    }

    fn run_command(&mut self, command: RelayCommand) -> io::Result<()> {
        match command {
            RelayCommand::Release(ports) => {
                let tokens = self.tokens();
                for token in ports.iter().filter_map(|port| tokens.get(port).copied()) {
                    self.released.extend(self.sockets.remove(&token).map(|socket| (token, socket.port)));
                }
            }
            RelayCommand::Restore(sockets) => {
                for socket in sockets {
                    // The port keeps its token, which identifies its connections.
                    let released = self.released.iter().find(|(_, port)| **port == socket.port);
                    if let Some(token) = released.map(|(token, _)| *token) {
                        self.released.remove(&token);
                        self.poller.add_listen_socket_as(&socket, token)?;
                        self.sockets.insert(token, socket);
                    }
                }
            }
            RelayCommand::Apply(diff, sockets) => {
                let tokens = self.tokens();
                for token in diff.close.iter().filter_map(|port| tokens.get(port).copied()) {
                    self.sockets.remove(&token);
                    self.released.remove(&token);
                    self.end_all_from(token);
                }
                for (from, to) in diff.retarget {
                    if let Some(token) = tokens.get(&from).copied()
                        && let Some(ListenSocket { socket, .. }) = self.sockets.remove(&token)
                    {
                        self.end_all_from(token);
                        // Connections to the new target get a new token.
                        self.poller.remove(socket.as_fd())?;
                        self.listen(ListenSocket { port: to, socket })?;
                    }
                }
                for socket in sockets {
                    self.listen(socket)?;
                }
            }
            RelayCommand::SetTargets(targets) => self.targets = Targets::Addresses(targets),
            RelayCommand::SetDestinations(allowed) => {
                if let Targets::Original(destinations) = &mut self.targets {
                    destinations.set_allowed(allowed);
                    self.connections.end_unless_allowed(destinations);
                    self.flows.end_unless_allowed(destinations);
                }
            }
        }
        Ok(())
    }

    fn listen(&mut self, socket: ListenSocket) -> io::Result<()> {
        let token = self.poller.add_listen_socket(&socket)?;
        match socket.port.protocol {
            Protocol::Tcp => self.connections.add_port(token),
            Protocol::Udp => self.flows.add_port(token),
        }
        self.sockets.insert(token, socket);
        Ok(())
    }

    /// Returns the token of each port, released ones included.
    fn tokens(&self) -> HashMap<RelayedPort, u64> {
        let listening = self.sockets.iter().map(|(token, socket)| (socket.port.clone(), *token));
        listening.chain(self.released.iter().map(|(token, port)| (port.clone(), *token))).collect()
    }

    /// Ends all connections and flows of a port.
    fn end_all_from(&mut self, token: u64) {
        self.unfinished.retain(|unfinished| *unfinished != token);
        self.deferred.retain(|deferred| *deferred != token);
        self.connections.end_all_from(token);
        self.flows.end_all_from(token);
    }

    /// Returns how long to wait for events.
    fn timeout(&self) -> Option<Timespec> {
        let timeout = if self.connections.has_unfinished() || !self.unfinished.is_empty() {
            Duration::ZERO
        } else if let Some(at) = self.retry_at {
            at.saturating_duration_since(Instant::now())
        } else if self.flows.is_empty() {
            return None;
        } else {
            self.flows.idle_check_interval()
        };
        timeout.try_into().ok()
    }

    /// Accepts the connections, or relays the datagrams, that wait at a port.
    fn accept(&mut self, token: u64) {
        let Some(socket) = self.sockets.get(&token) else { return };
        let accepted = match socket.port.protocol {
            Protocol::Tcp => self.connections.accept(token, socket, &self.targets, &mut self.poller),
            Protocol::Udp => self.flows.receive(token, socket, &self.targets, &mut self.poller).map(|()| false),
        };
        if accepted == Ok(true) && !self.unfinished.contains(&token) {
            self.unfinished.push(token);
        }
        if let Err(error) = accepted {
            if !std::mem::replace(&mut self.shortage_logged, true) {
                tracing::warn!("cannot accept another connection on port {} for now: {error}", socket.port.port);
            }
            // The port is retried once, at the time that was set first, however many more clients arrive meanwhile.
            if !self.deferred.contains(&token) {
                self.deferred.push(token);
            }
            self.retry_at.get_or_insert_with(|| Instant::now() + ACCEPT_RETRY_DELAY);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr, TcpStream};

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;
    use crate::relay::{Budget, bind};

    #[test]
    fn a_port_without_descriptors_is_retried_once_however_many_clients_arrive() {
        let port = RelayedPort {
            address: Some(Ipv4Addr::LOCALHOST.into()),
            allowed_client: None,
            port: 0,
            protocol: Protocol::Tcp,
            target_port: 1,
            proxy_protocol: None,
            is_transparent: false,
        };
        let sockets = bind(&[port]).expect("a port");
        let address: SocketAddr =
            rustix::net::getsockname(&sockets[0].socket).expect("a name").try_into().expect("an address");
        let (_commands, queue) = mpsc::channel();
        let wakeup = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
        let limits = Limits::new(Budget::new(0));
        let mut event_loop =
            EventLoop::new(sockets, Targets::Addresses(Vec::new()), limits, wakeup, queue).expect("a relay");
        let token = *event_loop.sockets.keys().next().expect("a port");
        let mut clients = Vec::new();
        let mut first_retry = None;
        for _ in 0..3 {
            clients.push(TcpStream::connect(address).expect("a place in the backlog"));
            event_loop.accept(token);
            assert_eq!(event_loop.deferred, [token]);
            // A later client does not delay the retry for those that already wait.
            assert_eq!(*first_retry.get_or_insert(event_loop.retry_at), event_loop.retry_at);
        }
    }
}
