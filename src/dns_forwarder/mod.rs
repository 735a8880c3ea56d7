//! Split DNS: a forwarder in the namespace of a tunnel. It sends questions about the names of some domains to resolvers
//! in local networks, and all other questions to the tunnel's resolvers ([`ForwarderPlan`]).
//!
//! Each question has one side, which follows from its name alone. If no resolver of that side answers, the client gets
//! a failure: the other side is never asked. An answer is passed on as it came. If it is an alias (CNAME) that leads
//! out of the domain, the forwarder does not follow it; a client that does so asks about another name.
//!
//! - `message`: reads questions and answers, as far as needed.
//! - `routes`: which resolvers a name has.
//! - `sockets`: the sockets, all of which are opened before the thread starts.
//! - `exchange`: a question on its way. `stream`, `tcp_clients`: the same over TCP.
//! - `event_loop`: the thread, which neither opens nor marks a socket, and holds no capability.

mod event_loop;
mod exchange;
mod message;
mod routes;
mod sockets;
mod stream;
mod tcp_clients;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};

use crate::plan::ForwarderPlan;
use event_loop::{Change, EventLoop};
pub use message::{Question, Refusal, Reply};
pub use routes::Routes;
pub use sockets::{Listeners, ResolverSockets};

/// The name of the thread, which `ps -L` and `top -H` show.
const THREAD_NAME: &str = "dns";

/// A running forwarder. Dropping it ends its thread, and closes its sockets.
#[derive(Debug)]
pub struct DnsForwarder {
    addresses: Vec<SocketAddr>,
    changes: Option<mpsc::Sender<Change>>,
    /// An eventfd(2) that wakes the thread when a change was sent.
    wakeup: OwnedFd,
    end: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

/// Makes an eventfd(2) readable when the thread that has it ends, even by a panic.
struct EndSignal(OwnedFd);

impl Drop for EndSignal {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

impl DnsForwarder {
    /// Starts a thread that answers the questions of clients on `listeners` by asking the resolvers of `plan` over
    /// `sockets`, which were opened for it. `on_thread_start` runs first in the thread, to drop privileges.
    ///
    /// The sockets decide about the network namespace; that of the thread does not matter.
    ///
    /// # Errors
    ///
    /// Returns an error if the thread cannot be started, or if `on_thread_start` fails.
    pub fn start(
        plan: &ForwarderPlan,
        listeners: Listeners,
        sockets: ResolverSockets,
        on_thread_start: fn() -> io::Result<()>,
    ) -> io::Result<Self> {
        let addresses = listeners.addresses()?;
        let wakeup = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (changes, queue) = mpsc::channel();
        let event_loop = EventLoop::new(plan, listeners, sockets, wakeup.try_clone()?, queue);
        let end = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let signal = EndSignal(end.try_clone()?);
        let (sender, started) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name(THREAD_NAME.into()).spawn(move || {
            let _signal = signal;
            let limited = on_thread_start();
            let is_limited = limited.is_ok();
            if sender.send(limited).is_err() || !is_limited {
                return;
            }
            if let Err(error) = event_loop.run() {
                tracing::error!("the DNS forwarder has stopped: {error}");
            }
        })?;
        let forwarder = Self { addresses, changes: Some(changes), wakeup, end, thread: Some(thread) };
        started.recv().map_err(|_| ended())??;
        Ok(forwarder)
    }

    /// Returns the addresses at which it listens.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Returns a descriptor that becomes readable for good when the forwarder has ended by itself. A message says why.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    /// Makes the forwarder follow another plan, with sockets that were opened for it. Questions under way begin again.
    ///
    /// # Errors
    ///
    /// Returns an error if the thread has ended.
    pub fn change(&self, plan: ForwarderPlan, sockets: ResolverSockets) -> io::Result<()> {
        let (done, is_done) = mpsc::sync_channel(1);
        let changes = self.changes.as_ref().ok_or_else(ended)?;
        changes.send(Change { plan, sockets, done }).map_err(|_| ended())?;
        rustix::io::write(&self.wakeup, &1_u64.to_ne_bytes())?;
        is_done.recv().map_err(|_| ended())
    }
}

impl Drop for DnsForwarder {
    fn drop(&mut self) {
        self.changes = None;
        let _ = rustix::io::write(&self.wakeup, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed when it happened.
            let _ = thread.join();
        }
    }
}

fn ended() -> io::Error {
    io::Error::other("the DNS forwarder has ended")
}
