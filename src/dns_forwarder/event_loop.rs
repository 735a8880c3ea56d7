//! The thread of a forwarder: it waits for clients and resolvers, and passes their messages on.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::SocketFlags;

use super::exchange::{Client, Exchange, Step};
use super::message::{Question, Refusal};
use super::routes::Routes;
use super::sockets::{Kind, Listeners, ResolverSockets};
use super::tcp_clients::TcpClients;
use crate::fault;
use crate::linux::poll::{Interest, wait_for_each};
use crate::plan::{ForwarderPlan, ResolverPlan};

/// How many questions of a kind may wait for a socket. A further one fails.
const MAX_WAITING: usize = 256;

/// How many questions are received from a socket before others get their turn.
const TURN: usize = 64;

/// The largest question. Clients on the loopback interface may send that much.
const MAX_QUESTION: usize = 65_535;

/// How long a resolver that did not answer in time is asked after the others.
const DISTRUST: Duration = Duration::from_secs(30);

/// How long no clients are accepted after an error, such as a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A change that the thread carries out before it reports back.
pub(super) struct Change {
    pub(super) plan: ForwarderPlan,
    pub(super) sockets: ResolverSockets,
    pub(super) done: mpsc::SyncSender<()>,
}

/// The state of a forwarder's thread.
pub(super) struct EventLoop {
    listeners: Listeners,
    routes: Routes,
    sockets: ResolverSockets,
    clients: TcpClients,
    /// The questions under way, by number.
    exchanges: BTreeMap<u64, Exchange>,
    next: u64,
    /// The questions that wait for a socket.
    waiting: BTreeMap<Kind, VecDeque<u64>>,
    /// The resolvers that did not answer in time, and until when they are asked last.
    distrusted: HashMap<IpAddr, Instant>,
    accept_at: Option<Instant>,
    wakeup: OwnedFd,
    changes: mpsc::Receiver<Change>,
}

/// A descriptor that the thread waits for.
#[derive(Clone, Copy, Debug)]
enum Source {
    Wakeup,
    Questions(usize),
    Connections(usize),
    Client(u64),
    Exchange(u64),
}

impl EventLoop {
    pub(super) fn new(
        plan: &ForwarderPlan,
        listeners: Listeners,
        sockets: ResolverSockets,
        wakeup: OwnedFd,
        changes: mpsc::Receiver<Change>,
    ) -> Self {
        Self {
            listeners,
            routes: Routes::new(plan),
            sockets,
            clients: TcpClients::default(),
            exchanges: BTreeMap::new(),
            next: 0,
            waiting: BTreeMap::new(),
            distrusted: HashMap::new(),
            accept_at: None,
            wakeup,
            changes,
        }
    }

    /// Forwards until the sender of changes is dropped.
    pub(super) fn run(mut self) -> io::Result<()> {
        loop {
            for source in self.wait()? {
                let now = Instant::now();
                match source {
                    Source::Wakeup => {
                        if self.take_changes(now) {
                            return Ok(());
                        }
                    }
                    Source::Questions(index) => {
                        fault::fail_at("in the DNS forwarder")?;
                        self.receive(index, now);
                    }
                    Source::Connections(index) => self.accept(index, now),
                    Source::Client(number) => self.clients.handle(number, now),
                    Source::Exchange(number) => self.proceed(number, now),
                }
            }
            let now = Instant::now();
            while let Some((number, message)) = self.clients.next_question() {
                self.begin(Client::Tcp(number), message, now);
            }
            self.end_overdue(now);
            self.clients.close_idle(now);
            self.serve_waiting(now);
        }
    }

    fn wait(&self) -> io::Result<Vec<Source>> {
        let now = Instant::now();
        let mut sources: Vec<(Source, BorrowedFd<'_>, Interest)> =
            vec![(Source::Wakeup, self.wakeup.as_fd(), Interest::Readable)];
        let udp = self.listeners.udp.iter().enumerate();
        sources.extend(udp.map(|(index, socket)| (Source::Questions(index), socket.as_fd(), Interest::Readable)));
        if self.accept_at.is_none_or(|at| at <= now) {
            let tcp = self.listeners.tcp.iter().enumerate();
            sources.extend(tcp.map(|(index, socket)| (Source::Connections(index), socket.as_fd(), Interest::Readable)));
        }
        let clients = self.clients.descriptors();
        sources.extend(clients.map(|(number, socket, interest)| (Source::Client(number), socket, interest)));
        for (number, exchange) in &self.exchanges {
            if let Some(attempt) = &exchange.attempt {
                let (socket, interest) = attempt.descriptor();
                sources.push((Source::Exchange(*number), socket, interest));
            }
        }
        let exchanges = self.exchanges.values();
        let due = exchanges.map(|exchange| match &exchange.attempt {
            Some(attempt) => attempt.until.min(exchange.give_up_at),
            None => exchange.give_up_at,
        });
        let due = due.chain(self.clients.due()).chain(self.accept_at.filter(|at| *at > now)).min();
        let timeout = due.map(|due| due.saturating_duration_since(now));
        let descriptors: Vec<_> = sources.iter().map(|(_, socket, interest)| (*socket, *interest)).collect();
        let ready = wait_for_each(&descriptors, timeout)?;
        Ok(sources.into_iter().zip(ready).filter(|(_, ready)| *ready).map(|((source, ..), _)| source).collect())
    }

    /// Applies changes. Returns true if there will be none any more.
    fn take_changes(&mut self, now: Instant) -> bool {
        let _ = rustix::io::read(&self.wakeup, &mut [0_u8; 8]);
        loop {
            match self.changes.try_recv() {
                Ok(change) => {
                    self.change(&change.plan, change.sockets, now);
                    let _ = change.done.send(());
                }
                Err(mpsc::TryRecvError::Empty) => return false,
                Err(mpsc::TryRecvError::Disconnected) => return true,
            }
        }
    }

    /// Follows another plan. Questions under way begin again: their resolvers may be others now.
    fn change(&mut self, plan: &ForwarderPlan, sockets: ResolverSockets, now: Instant) {
        (self.routes, self.sockets) = (Routes::new(plan), sockets);
        self.waiting.clear();
        self.distrusted.clear();
        for exchange in std::mem::take(&mut self.exchanges).into_values() {
            let Exchange { client, question, .. } = exchange;
            self.ask(client, question, now);
        }
    }

    /// Receives questions over UDP.
    fn receive(&mut self, index: usize, now: Instant) {
        let mut buffer = vec![0; MAX_QUESTION];
        for _ in 0..TURN {
            let Some(socket) = self.listeners.udp.get(index) else { return };
            match socket.recv_from(&mut buffer) {
                Ok((length, from)) => self.begin(Client::Udp(index, from), buffer[..length].to_vec(), now),
                Err(_) => return,
            }
        }
    }

    /// Accepts connections of clients.
    fn accept(&mut self, index: usize, now: Instant) {
        self.accept_at = None;
        for _ in 0..TURN {
            let Some(socket) = self.listeners.tcp.get(index) else { return };
            match rustix::net::accept_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(client) => self.clients.add(client, now),
                Err(Errno::AGAIN) => return,
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(error) => {
                    tracing::warn!("cannot accept a DNS client: {error}");
                    self.accept_at = Some(now + ACCEPT_PAUSE);
                    return;
                }
            }
        }
    }

    /// Deals with the message of a client.
    fn begin(&mut self, client: Client, message: Vec<u8>, now: Instant) {
        match (Question::read(message), client) {
            (Ok(question), _) => self.ask(client, question, now),
            (Err(Refusal::Answer(answer)), _) => self.answer(client, &answer, now),
            (Err(Refusal::Ignore), Client::Tcp(number)) => self.clients.close(number),
            (Err(Refusal::Ignore), Client::Udp(..)) => {}
        }
    }

    /// Sends a question to the resolvers of its name.
    fn ask(&mut self, client: Client, question: Question, now: Instant) {
        let mut resolvers = self.routes.resolvers(question.labels()).to_vec();
        self.distrusted.retain(|_, until| *until > now);
        // The sort is stable.
        resolvers.sort_by_key(|ResolverPlan { address, .. }| self.distrusted.contains_key(address));
        let number = self.next;
        self.next += 1;
        self.exchanges.insert(number, Exchange::new(client, question, resolvers, now));
        self.ask_next(number, now);
    }

    /// Asks the next resolver of a question, or ends it.
    fn ask_next(&mut self, number: u64, now: Instant) {
        let Some(exchange) = self.exchanges.get_mut(&number) else { return };
        if let Some(attempt) = exchange.attempt.take() {
            self.sockets.put_back(attempt.kind, attempt.socket);
        }
        while let Some(resolver) = exchange.next_resolver(now) {
            let kind = Kind::of(&resolver, exchange.client.transport());
            let Some(socket) = self.sockets.take(kind) else {
                let waiting = self.waiting.entry(kind).or_default();
                if waiting.len() < MAX_WAITING {
                    return waiting.push_back(number);
                }
                break;
            };
            match exchange.ask(resolver, socket, now) {
                Ok(()) => return,
                Err(socket) => self.sockets.put_back(kind, socket),
            }
        }
        let failure = exchange.failed();
        self.finish(number, &failure, now);
    }

    /// Deals with what a resolver has sent.
    fn proceed(&mut self, number: u64, now: Instant) {
        let Some(exchange) = self.exchanges.get_mut(&number) else { return };
        match exchange.proceed() {
            Step::Wait => {}
            Step::AskNext => self.ask_next(number, now),
            Step::Finish(answer) => {
                if let Some(attempt) = &exchange.attempt {
                    self.distrusted.remove(&attempt.resolver.address);
                }
                self.finish(number, &answer, now);
            }
        }
    }

    /// Ends a question with its answer.
    fn finish(&mut self, number: u64, answer: &[u8], now: Instant) {
        let Some(exchange) = self.exchanges.remove(&number) else { return };
        if let Some(attempt) = exchange.attempt {
            self.sockets.put_back(attempt.kind, attempt.socket);
        }
        self.answer(exchange.client, answer, now);
    }

    fn answer(&mut self, client: Client, answer: &[u8], now: Instant) {
        match client {
            Client::Udp(index, address) => {
                if let Some(socket) = self.listeners.udp.get(index) {
                    // The client may be gone by now.
                    let _ = socket.send_to(answer, address);
                }
            }
            Client::Tcp(number) => self.clients.answer(number, answer, now),
        }
    }

    /// Asks the next resolver where one has not answered in time, and gives up where that took too long.
    fn end_overdue(&mut self, now: Instant) {
        let is_overdue = |exchange: &Exchange| {
            let late = exchange.attempt.as_ref().is_some_and(|attempt| attempt.until <= now);
            late || exchange.give_up_at <= now
        };
        let overdue = self.exchanges.iter().filter(|(_, exchange)| is_overdue(exchange));
        for number in overdue.map(|(number, _)| *number).collect::<Vec<_>>() {
            let attempt = self.exchanges.get(&number).and_then(|exchange| exchange.attempt.as_ref());
            if let Some(attempt) = attempt {
                self.distrusted.insert(attempt.resolver.address, now + DISTRUST);
            }
            self.ask_next(number, now);
        }
    }

    /// Asks the questions that have waited for a socket, as long as there are unused ones.
    fn serve_waiting(&mut self, now: Instant) {
        for kind in self.waiting.keys().copied().collect::<Vec<_>>() {
            while self.sockets.has(kind)
                && let Some(number) = self.waiting.get_mut(&kind).and_then(VecDeque::pop_front)
            {
                let waits = self.exchanges.get(&number).is_some_and(|exchange| exchange.attempt.is_none());
                if waits {
                    self.ask_next(number, now);
                }
            }
        }
    }
}
