//! The port relay: passes connections and datagrams that arrive at a port on to another port, in user space.
//!
//! A keeper runs up to three relays. One passes traffic from published ports of the host (`--publish`) to the program.
//! Another passes traffic from the program to ports of the host's loopback (`--host-port`). The third passes traffic
//! from the program of a rootless tunnel to local networks (`--local`). Its ports are transparent: they receive packets
//! to all addresses of these networks, and it connects to the original destination. A relay translates no addresses, so
//! it needs neither IP forwarding nor rules of the host's firewall, and serves IPv4 and IPv6 clients alike.
//!
//! - `listen`: which ports are relayed, and the sockets that listen on them.
//! - `event_loop`: the relay's thread, which waits for events (`poller`) and dispatches them.
//! - `tcp`: relays connections; the bytes stay in the kernel (splice(2)).
//! - `udp`: relays datagrams; each client has a flow that ends when it is idle.
//! - `destinations`: where clients of a transparent port are relayed to.
//! - `proxy_protocol`: tells the program its client's address where that was requested.
//! - `budget` and `clients`: how many descriptors are in use, and which client's connection is evicted when there are
//!   no more.
//! - `port_diff`: what changes when a configuration lists other ports.
//!
//! [`bind()`] creates the sockets in the namespace where clients connect. [`Relay::start`] then relays in a thread that
//! runs in the namespace of the targets.

mod budget;
mod clients;
mod destinations;
mod event_loop;
mod listen;
mod poller;
mod port_diff;
pub(crate) mod proxy_protocol;
mod tcp;
mod udp;

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType};
use rustix::event::{EventfdFlags, eventfd};

use crate::linux::namespace::NetworkNamespace;
pub use budget::Budget;
pub use destinations::{AllowedDestinations, Destinations};
use event_loop::EventLoop;
pub use listen::{AllowedClient, ListenSocket, RelayedPort, bind};
pub use port_diff::PortDiff;

/// Returns whether a socket is connected to itself. If no process listens on the target port, the kernel may choose
/// that very port for the connecting socket. TCP allows such a self-connection (RFC 9293 section 3.5), and so does UDP.
fn is_connected_to_itself(socket: &OwnedFd) -> bool {
    let (own, peer) = (rustix::net::getsockname(socket), rustix::net::getpeername(socket));
    matches!((own, peer), (Ok(own), Ok(Some(peer))) if own == peer)
}

fn new_socket(address: SocketAddr, kind: SockType) -> nix::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket::socket(family, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)
}

/// The limits of a relay.
#[derive(Clone, Debug)]
pub struct Limits {
    /// How many descriptors may be open; shared with the other relays of the process.
    pub descriptors: Budget,
    /// How long a UDP flow may be idle before it ends.
    pub idle: Duration,
}

impl Limits {
    /// Returns the default limits.
    pub fn new(descriptors: Budget) -> Self {
        Self { descriptors, idle: udp::IDLE }
    }
}

/// A running relay. Dropping it ends its thread and all connections and flows.
#[derive(Debug)]
pub struct Relay {
    ports: Vec<RelayedPort>,
    /// Each command comes with a channel on which the thread reports that it is done.
    commands: Option<mpsc::Sender<(RelayCommand, mpsc::SyncSender<()>)>>,
    /// An eventfd(2) that wakes the thread when a command was sent.
    wakeup: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

/// A command from a [`Relay`] to its thread.
#[derive(Debug)]
enum RelayCommand {
    /// Close the sockets that listen on these ports; their connections continue.
    Release(Vec<RelayedPort>),
    /// Listen again on ports that were released.
    Restore(Vec<ListenSocket>),
    /// Apply a diff, whose new ports have these sockets.
    Apply(PortDiff, Vec<ListenSocket>),
    /// Connect new clients to the first of these addresses that accepts.
    SetTargets(Vec<IpAddr>),
    /// Relay to these destinations, and end the connections to others.
    SetDestinations(AllowedDestinations),
}

/// Where clients are relayed to.
#[derive(Debug)]
pub enum Targets {
    /// To the port's target port of the first of these addresses that accepts.
    Addresses(Vec<IpAddr>),
    /// To the address that the client has sent to. For transparent ports.
    Original(Destinations),
}

impl Relay {
    /// Starts a thread that relays traffic from `sockets` to `targets`.
    ///
    /// The targets are addresses in `namespace`, or in the caller's network namespace if that is `None`. The thread
    /// enters the namespace, then calls `on_thread_start`, then begins to relay.
    ///
    /// # Errors
    ///
    /// Returns an error if the thread cannot be started or cannot enter the namespace, or if `on_thread_start` fails.
    pub fn start(
        sockets: Vec<ListenSocket>,
        targets: Targets,
        namespace: Option<NetworkNamespace>,
        limits: Limits,
        on_thread_start: fn() -> io::Result<()>,
    ) -> io::Result<Self> {
        let wakeup = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let thread_wakeup = wakeup.try_clone()?;
        let (commands, queue) = mpsc::channel();
        let ports = sockets.iter().map(|socket| socket.port.clone()).collect();
        let (sender, started) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name("relay".into()).spawn(move || {
            let entered = namespace.as_ref().map_or(Ok(()), NetworkNamespace::enter);
            let created = entered
                .and_then(|()| on_thread_start())
                .and_then(|()| EventLoop::new(sockets, targets, limits, thread_wakeup, queue));
            drop(namespace);
            let event_loop = match created {
                Ok(event_loop) => {
                    let _ = sender.send(Ok(()));
                    event_loop
                }
                Err(error) => return drop(sender.send(Err(error))),
            };
            if let Err(error) = event_loop.run() {
                tracing::error!("the port relay has stopped: {error}");
            }
        })?;
        started.recv().map_err(|_| io::Error::other("the relay's thread has ended"))??;
        Ok(Self { ports, commands: Some(commands), wakeup, thread: Some(thread) })
    }

    /// Returns the ports that are relayed.
    pub fn ports(&self) -> &[RelayedPort] {
        &self.ports
    }

    /// Stops listening on some ports, so that other sockets can be bound in their place. Their connections continue.
    ///
    /// # Errors
    ///
    /// Returns an error if the relay's thread has ended.
    pub fn release(&self, ports: &[RelayedPort]) -> io::Result<()> {
        self.send(RelayCommand::Release(ports.to_vec()))
    }

    /// Listens again on ports that [`Self::release`] released.
    ///
    /// # Errors
    ///
    /// Returns an error if the relay's thread has ended.
    pub fn restore(&self, sockets: Vec<ListenSocket>) -> io::Result<()> {
        self.send(RelayCommand::Restore(sockets))
    }

    /// Applies a diff. `sockets` listen on the ports that it opens; a port without a socket is left out.
    ///
    /// Connections and flows of a closed port end: a user who unpublishes a port expects that no client remains
    /// connected through it, and a connection may last for ever. Those of a port with a new target port end, too,
    /// because the old target is no longer published.
    ///
    /// # Errors
    ///
    /// Returns an error if the relay's thread has ended.
    pub fn apply(&mut self, diff: PortDiff, sockets: Vec<ListenSocket>) -> io::Result<()> {
        let closed: HashSet<&RelayedPort> = diff.close.iter().collect();
        let retargeted: HashMap<&RelayedPort, &RelayedPort> =
            diff.retarget.iter().map(|(from, to)| (from, to)).collect();
        let kept = self.ports.iter().filter(|port| !closed.contains(port));
        let mut ports: Vec<RelayedPort> = kept.map(|port| (*retargeted.get(port).unwrap_or(&port)).clone()).collect();
        ports.extend(sockets.iter().map(|socket| socket.port.clone()));
        self.send(RelayCommand::Apply(diff, sockets))?;
        self.ports = ports;
        Ok(())
    }

    /// Replaces the addresses to which new clients are connected. Existing connections continue.
    ///
    /// # Errors
    ///
    /// Returns an error if the relay's thread has ended.
    pub fn set_targets(&self, targets: Vec<IpAddr>) -> io::Result<()> {
        self.send(RelayCommand::SetTargets(targets))
    }

    /// Replaces the destinations to which clients of transparent ports are relayed. Connections and flows to others
    /// end.
    ///
    /// # Errors
    ///
    /// Returns an error if the relay's thread has ended.
    pub fn set_destinations(&self, allowed: AllowedDestinations) -> io::Result<()> {
        self.send(RelayCommand::SetDestinations(allowed))
    }

    /// Sends a command to the thread, and waits until it is done.
    fn send(&self, command: RelayCommand) -> io::Result<()> {
        let ended = || io::Error::other("the relay has ended");
        let (sender, done) = mpsc::sync_channel(1);
        self.commands.as_ref().and_then(|commands| commands.send((command, sender)).ok()).ok_or_else(ended)?;
        rustix::io::write(&self.wakeup, &1_u64.to_ne_bytes())?;
        done.recv().map_err(|_| ended())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.commands = None;
        let _ = rustix::io::write(&self.wakeup, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
