//! Ports that lead elsewhere: what comes to a port of the host goes on to a port inside, and back; or to one of the host's loopback. A
//! relay, without any translation of addresses: it works for connections from the host itself, from its networks, over IPv4 and IPv6
//! alike, takes no forwarding, and no rule of anybody's firewall but that which lets the port be reached.
//!
//! - `entrance`: where one comes in, and who takes the ports for that.
//! - `stream`: TCP: bytes are moved inside the kernel (splice(2)), each direction ends by itself.
//! - `proxy_protocol`: how a program is told who its client is, where that was asked for.
//! - `datagram`: UDP: a flow for each client, until it is idle.
//!
//! - `descriptors`: how many may be open.
//! - `clients`: who holds what, and gives way where there are not enough.
//! - `change`: what turns the entrances that there are into others.
//!
//! [`bind()`] takes the ports, in the host's namespace; [`Relay::start`] moves what comes, in a thread that lives in the namespace that it
//! goes to.

mod change;
mod clients;
mod datagram;
mod descriptors;
mod entrance;
pub(crate) mod proxy_protocol;
mod stream;

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType};
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

use crate::config::Protocol;
use crate::linux::namespace::NetworkNamespace;
pub use change::Change;
use datagram::Datagrams;
pub use descriptors::Allowance;
pub use entrance::{BindError, Bound, Entrance, OtherEnd, bind};
use stream::Streams;

/// How many events are taken at a time.
const EVENTS: usize = 256;

/// How long nothing is accepted after the process has run out of descriptors.
const BREATH: Duration = Duration::from_millis(50);

/// The token of the descriptor that tells of an order. All others are given by [`Poller::add`].
const ORDER: u64 = 0;

/// Whether a socket is connected to itself. One that nobody listens for may have been given the very port that it was to be connected to: TCP
/// lets it meet itself then (RFC 9293 section 3.5), and UDP anyway.
fn is_own_peer(socket: &OwnedFd) -> bool {
    let (own, peer) = (rustix::net::getsockname(socket), rustix::net::getpeername(socket));
    matches!((own, peer), (Ok(own), Ok(Some(peer))) if own == peer)
}

fn new_socket(address: SocketAddr, kind: SockType) -> nix::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket::socket(family, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)
}

/// How much a relay may do.
#[derive(Clone, Debug)]
pub struct Limits {
    /// How many descriptors it may have open, together with others.
    pub descriptors: Allowance,
    /// How long a flow of datagrams may be idle.
    pub idle: Duration,
}

impl Limits {
    /// The usual ones.
    pub fn new(descriptors: Allowance) -> Self {
        Self { descriptors, idle: datagram::IDLE }
    }
}

/// A relay at work. Ends, with all that it carries, when it is dropped.
#[derive(Debug)]
pub struct Relay {
    entrances: Vec<Entrance>,
    orders: Option<mpsc::Sender<(Order, mpsc::SyncSender<()>)>>,
    bell: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

/// What a relay's thread is told to do.
#[derive(Debug)]
enum Order {
    /// Let go of these sockets that listen. What has come by them goes on.
    LetGo(Vec<Entrance>),
    /// Listen by these sockets again.
    TakeBack(Vec<Bound>),
    /// Change the entrances. What has come by one that is closed, or that leads elsewhere now, ends.
    Change(Change, Vec<Bound>),
    /// Lead whoever comes from now on to the first of these addresses that takes it.
    Aim(Vec<IpAddr>),
}

impl Relay {
    /// Starts to move what comes to `ports` to the first of `targets` that takes it, which are addresses in `namespace`; in the caller's
    /// if there is none.
    ///
    /// `on_thread_start` runs first in the new thread, which then is in the namespace already.
    ///
    /// # Errors
    /// If there can be no such thread, or `on_thread_start` fails.
    pub fn start(
        ports: Vec<Bound>,
        targets: Vec<IpAddr>,
        namespace: Option<NetworkNamespace>,
        limits: Limits,
        on_thread_start: fn() -> io::Result<()>,
    ) -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let heard = bell.try_clone()?;
        let (orders, queue) = mpsc::channel();
        let entrances = ports.iter().map(|bound| bound.entrance.clone()).collect();
        let (sender, begun) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name("relay".into()).spawn(move || {
            let entered = namespace.as_ref().map_or(Ok(()), NetworkNamespace::enter);
            let made =
                entered.and_then(|()| on_thread_start()).and_then(|()| Work::new(ports, targets, limits, heard, queue));
            drop(namespace);
            let work = match made {
                Ok(work) => {
                    let _ = sender.send(Ok(()));
                    work
                }
                Err(error) => return drop(sender.send(Err(error))),
            };
            if let Err(error) = work.go_on() {
                tracing::error!("ports are not relayed any more: {error}");
            }
        })?;
        begun.recv().map_err(|_| io::Error::other("the relay's thread has ended"))??;
        Ok(Self { entrances, orders: Some(orders), bell, thread: Some(thread) })
    }

    /// Where one comes in.
    pub fn entrances(&self) -> &[Entrance] {
        &self.entrances
    }

    /// Lets go of sockets that listen, so that others can be bound in their places. What has come by them goes on.
    ///
    /// # Errors
    /// If the relay has ended by itself.
    pub fn let_go(&self, entrances: &[Entrance]) -> io::Result<()> {
        self.order(Order::LetGo(entrances.to_vec()))
    }

    /// Puts back what was let go of.
    ///
    /// # Errors
    /// If the relay has ended by itself.
    pub fn take_back(&self, bound: Vec<Bound>) -> io::Result<()> {
        self.order(Order::TakeBack(bound))
    }

    /// Changes the entrances. `bound` is what is new of them, as far as it is to be listened at.
    ///
    /// What has come by an entrance that is closed ends: whoever has a port not published any more means that nobody shall be inside by
    /// it, and a connection may last for ever. What has come by one that leads elsewhere ends, too, for where it led is closed.
    ///
    /// # Errors
    /// If the relay has ended by itself.
    pub fn change(&mut self, change: Change, bound: Vec<Bound>) -> io::Result<()> {
        let closed: HashSet<&Entrance> = change.close.iter().collect();
        let turned: HashMap<&Entrance, &Entrance> = change.turn.iter().map(|(from, to)| (from, to)).collect();
        let stay = self.entrances.iter().filter(|entrance| !closed.contains(entrance));
        let mut entrances: Vec<Entrance> =
            stay.map(|entrance| (*turned.get(entrance).unwrap_or(&entrance)).clone()).collect();
        entrances.extend(bound.iter().map(|bound| bound.entrance.clone()));
        self.order(Order::Change(change, bound))?;
        self.entrances = entrances;
        Ok(())
    }

    /// Has whoever comes from now on led to the first of these addresses that takes it. Who has come goes on.
    ///
    /// # Errors
    /// If the relay has ended by itself.
    pub fn aim(&self, targets: Vec<IpAddr>) -> io::Result<()> {
        self.order(Order::Aim(targets))
    }

    /// Has something done, and waits for it.
    fn order(&self, order: Order) -> io::Result<()> {
        let gone = || io::Error::other("the relay has ended");
        let (sender, done) = mpsc::sync_channel(1);
        self.orders.as_ref().and_then(|orders| orders.send((order, sender)).ok()).ok_or_else(gone)?;
        rustix::io::write(&self.bell, &1_u64.to_ne_bytes())?;
        done.recv().map_err(|_| gone())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.orders = None;
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waiting (epoll(7)), and the tokens by which its events are told apart.
struct Poller {
    epoll: OwnedFd,
    next: u64,
}

impl Poller {
    fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?, next: ORDER + 1 })
    }

    /// Watches a socket that listens: of TCP for what is told once, as all of it is accepted each time.
    fn add_listener(&mut self, bound: &Bound) -> io::Result<u64> {
        let token = self.next_token();
        self.add_listener_as(bound, token)?;
        Ok(token)
    }

    fn add_listener_as(&self, bound: &Bound, token: u64) -> io::Result<()> {
        let once = match bound.entrance.protocol {
            Protocol::Tcp => epoll::EventFlags::ET,
            Protocol::Udp => epoll::EventFlags::empty(),
        };
        self.add_as(bound.socket.as_fd(), token, epoll::EventFlags::IN | once)
    }

    /// Watches a descriptor, until it is closed, for everything, which is told once.
    fn add(&mut self, fd: BorrowedFd<'_>) -> io::Result<u64> {
        let everything = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::PRI;
        self.add_next(fd, epoll::EventFlags::ET | everything)
    }

    /// Watches a descriptor, until it is closed, for something to read, which is told for as long as there is something.
    fn add_reader(&mut self, fd: BorrowedFd<'_>) -> io::Result<u64> {
        self.add_next(fd, epoll::EventFlags::IN)
    }

    fn add_next(&mut self, fd: BorrowedFd<'_>, flags: epoll::EventFlags) -> io::Result<u64> {
        let token = self.next_token();
        self.add_as(fd, token, flags)?;
        Ok(token)
    }

    fn next_token(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    fn add_as(&self, fd: BorrowedFd<'_>, token: u64, flags: epoll::EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), flags | epoll::EventFlags::RDHUP)?)
    }
}

/// What the thread works on.
struct Work {
    poller: Poller,
    /// Those who listen, by their tokens.
    ports: HashMap<u64, Bound>,
    /// Those who did, until it is clear whether they shall again.
    let_go: HashMap<u64, Entrance>,
    targets: Vec<IpAddr>,
    streams: Streams,
    datagrams: Datagrams,
    bell: OwnedFd,
    orders: mpsc::Receiver<(Order, mpsc::SyncSender<()>)>,
    /// Ports where more may be waiting than was accepted, so that others have their turn.
    waiting: Vec<u64>,
    /// The same, for want of descriptors, and when to try again.
    hungry: Vec<u64>,
    /// Whether that was said.
    starving: bool,
    again_at: Option<Instant>,
}

impl Work {
    fn new(
        ports: Vec<Bound>,
        targets: Vec<IpAddr>,
        limits: Limits,
        bell: OwnedFd,
        orders: mpsc::Receiver<(Order, mpsc::SyncSender<()>)>,
    ) -> io::Result<Self> {
        let poller = Poller::new()?;
        poller.add_as(bell.as_fd(), ORDER, epoll::EventFlags::IN)?;
        let mut work = Self {
            poller,
            ports: HashMap::with_capacity(ports.len()),
            let_go: HashMap::new(),
            targets,
            streams: Streams::new(limits.descriptors.clone()),
            datagrams: Datagrams::new(limits),
            bell,
            orders,
            waiting: Vec::new(),
            hungry: Vec::new(),
            starving: false,
            again_at: None,
        };
        for bound in ports {
            work.listen(bound)?;
        }
        Ok(work)
    }

    fn go_on(mut self) -> io::Result<()> {
        let mut buffer = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; EVENTS];
        loop {
            let told = |event: &epoll::Event| {
                let flags = event.flags;
                (event.data.u64(), flags.contains(epoll::EventFlags::PRI))
            };
            let events: Vec<(u64, bool)> = match epoll::wait(&self.poller.epoll, &mut buffer, self.patience().as_ref())
            {
                Ok((events, _)) => events.iter().map(told).collect(),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            for (token, is_urgent) in events {
                if token == ORDER {
                    if self.obey()? {
                        return Ok(());
                    }
                } else if self.ports.contains_key(&token) {
                    self.answer(token);
                } else if !self.streams.work(token, is_urgent, &mut self.poller) {
                    self.datagrams.work(token, &self.ports, &mut self.poller);
                }
            }
            self.streams.work_on(&mut self.poller);
            for token in std::mem::take(&mut self.waiting) {
                self.answer(token);
            }
            if self.again_at.is_some_and(|at| at <= Instant::now()) {
                self.again_at = None;
                for token in std::mem::take(&mut self.hungry) {
                    self.answer(token);
                }
                self.starving &= !self.hungry.is_empty();
            }
            self.datagrams.forget_idle();
        }
    }

    /// Does what was ordered; true if nothing more will be.
    fn obey(&mut self) -> io::Result<bool> {
        let _ = rustix::io::read(&self.bell, &mut [0_u8; 8]);
        loop {
            match self.orders.try_recv() {
                Ok((order, done)) => {
                    self.follow(order)?;
                    let _ = done.send(());
                }
                Err(mpsc::TryRecvError::Empty) => return Ok(false),
                Err(mpsc::TryRecvError::Disconnected) => return Ok(true),
            }
        }
    }

    fn follow(&mut self, order: Order) -> io::Result<()> {
        match order {
            Order::LetGo(entrances) => {
                let tokens = self.tokens();
                for token in entrances.iter().filter_map(|entrance| tokens.get(entrance).copied()) {
                    self.let_go.extend(self.ports.remove(&token).map(|bound| (token, bound.entrance)));
                }
            }
            Order::TakeBack(bounds) => {
                for bound in bounds {
                    // Its token stays, by which is known what has come by it.
                    let former = self.let_go.iter().find(|(_, entrance)| **entrance == bound.entrance);
                    if let Some(token) = former.map(|(token, _)| *token) {
                        self.let_go.remove(&token);
                        self.poller.add_listener_as(&bound, token)?;
                        self.ports.insert(token, bound);
                    }
                }
            }
            Order::Change(change, bounds) => {
                let tokens = self.tokens();
                for token in change.close.iter().filter_map(|entrance| tokens.get(entrance).copied()) {
                    self.ports.remove(&token);
                    self.let_go.remove(&token);
                    self.end(token);
                }
                for (from, to) in change.turn {
                    if let Some(token) = tokens.get(&from).copied()
                        && let Some(Bound { socket, .. }) = self.ports.remove(&token)
                    {
                        self.end(token);
                        // What has come by it from now on has another token.
                        epoll::delete(&self.poller.epoll, &socket)?;
                        self.listen(Bound { entrance: to, socket })?;
                    }
                }
                for bound in bounds {
                    self.listen(bound)?;
                }
            }
            Order::Aim(targets) => self.targets = targets,
        }
        Ok(())
    }

    fn listen(&mut self, bound: Bound) -> io::Result<()> {
        let token = self.poller.add_listener(&bound)?;
        match bound.entrance.protocol {
            Protocol::Tcp => self.streams.begin_at(token),
            Protocol::Udp => self.datagrams.begin_at(token),
        }
        self.ports.insert(token, bound);
        Ok(())
    }

    /// The tokens of all entrances.
    fn tokens(&self) -> HashMap<Entrance, u64> {
        let listening = self.ports.iter().map(|(token, bound)| (bound.entrance.clone(), *token));
        listening.chain(self.let_go.iter().map(|(token, entrance)| (entrance.clone(), *token))).collect()
    }

    /// Ends what has come by an entrance.
    fn end(&mut self, token: u64) {
        self.waiting.retain(|waiting| *waiting != token);
        self.hungry.retain(|hungry| *hungry != token);
        self.streams.end(token);
        self.datagrams.end(token);
    }

    /// How long to wait for events.
    fn patience(&self) -> Option<Timespec> {
        let patience = if self.streams.has_more() || !self.waiting.is_empty() {
            Duration::ZERO
        } else if let Some(at) = self.again_at {
            at.saturating_duration_since(Instant::now())
        } else if self.datagrams.is_empty() {
            return None;
        } else {
            self.datagrams.sweep()
        };
        patience.try_into().ok()
    }

    /// Takes what waits at a port.
    fn answer(&mut self, token: u64) {
        let Some(bound) = self.ports.get(&token) else { return };
        let taken = match bound.entrance.protocol {
            Protocol::Tcp => self.streams.accept(token, bound, &self.targets, &mut self.poller),
            Protocol::Udp => self.datagrams.receive(token, bound, &self.targets, &mut self.poller).map(|()| false),
        };
        if taken == Ok(true) && !self.waiting.contains(&token) {
            self.waiting.push(token);
        }
        if let Err(error) = taken {
            if !std::mem::replace(&mut self.starving, true) {
                tracing::warn!("nobody more can come by port {} of the host for now: {error}", bound.entrance.port);
            }
            // Once, and no later, however many more come meanwhile.
            if !self.hungry.contains(&token) {
                self.hungry.push(token);
            }
            self.again_at.get_or_insert_with(|| Instant::now() + BREATH);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpStream};

    use super::*;

    #[test]
    fn a_port_whose_clients_wait_is_tried_again_once_however_many_come() {
        let entrance = Entrance {
            address: Some(Ipv4Addr::LOCALHOST.into()),
            only: None,
            port: 0,
            protocol: Protocol::Tcp,
            to: 1,
            proxy_protocol: None,
        };
        let bound = bind(&[entrance]).expect("a port");
        let name: SocketAddr =
            rustix::net::getsockname(&bound[0].socket).expect("a name").try_into().expect("an address");
        let (_orders, queue) = mpsc::channel();
        let bell = eventfd(0, EventfdFlags::CLOEXEC).expect("a bell");
        let mut work = Work::new(bound, Vec::new(), Limits::new(Allowance::of(0)), bell, queue).expect("a relay");
        let token = *work.ports.keys().next().expect("a port");
        let mut clients = Vec::new();
        let mut tried_at = None;
        for _ in 0..3 {
            clients.push(TcpStream::connect(name).expect("a place in the queue"));
            work.answer(token);
            assert_eq!(work.hungry, [token]);
            // Nor later, so that who comes does not keep those who wait from their turn.
            assert_eq!(*tried_at.get_or_insert(work.again_at), work.again_at);
        }
    }
}
