//! A client's question on its way: which resolver is asked, on which socket, and until when.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::message::{Question, Reply};
use super::sockets::{Kind, Transport, connect};
use super::stream::MessageStream;
use crate::linux::poll::Interest;
use crate::plan::ResolverPlan;

/// How long a resolver may take over UDP before the next one is asked, or the same one again.
const UDP_PATIENCE: Duration = Duration::from_millis(1500);

/// The same over TCP, including the connection.
const TCP_PATIENCE: Duration = Duration::from_secs(3);

/// When a client gets an answer at the latest. The C library waits for 5 seconds by default (`timeout` of
/// resolv.conf(5)), twice.
const GIVE_UP: Duration = Duration::from_secs(5);

/// How often resolvers are asked at least.
const MIN_TRIES: usize = 3;

/// How many messages that are not the answer may arrive before another ID and port are used. An attacker who guesses
/// has 16 bits of ID, and 15 of port, for each of so many guesses.
const MAX_STRAYS: usize = 32;

/// The largest UDP message.
const MAX_MESSAGE: usize = 65_535;

/// The client that asked.
#[derive(Clone, Copy, Debug)]
pub(super) enum Client {
    /// The index of the socket that received the question, and the client's address.
    Udp(usize, SocketAddr),
    /// The client's number.
    Tcp(u64),
}

impl Client {
    /// Returns the transport protocol, which is used towards the resolvers too. A client that gets a truncated answer
    /// over UDP asks again over TCP.
    pub(super) fn transport(self) -> Transport {
        match self {
            Self::Udp(..) => Transport::Udp,
            Self::Tcp(_) => Transport::Tcp,
        }
    }
}

/// A question of a client, until it is answered.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) client: Client,
    pub(super) question: Question,
    /// The resolvers of its name, in the order in which they are asked.
    resolvers: Vec<ResolverPlan>,
    tries: usize,
    /// The answer of a resolver that cannot answer.
    failure: Option<Vec<u8>>,
    pub(super) give_up_at: Instant,
    pub(super) attempt: Option<Attempt>,
}

/// What follows from an event.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Wait,
    AskNext,
    Finish(Vec<u8>),
}

impl Exchange {
    pub(super) fn new(client: Client, question: Question, resolvers: Vec<ResolverPlan>, now: Instant) -> Self {
        let give_up_at = now + GIVE_UP;
        Self { client, question, resolvers, tries: 0, failure: None, give_up_at, attempt: None }
    }

    /// Returns the resolver to ask next. `None` if all have been asked often enough.
    pub(super) fn next_resolver(&self, now: Instant) -> Option<ResolverPlan> {
        let enough = self.tries >= MIN_TRIES.max(self.resolvers.len()) || now >= self.give_up_at;
        let resolver = self.resolvers.get(self.tries % self.resolvers.len().max(1)).copied();
        resolver.filter(|_| !enough)
    }

    /// Asks a resolver over an unused socket. Returns the socket if that fails.
    pub(super) fn ask(&mut self, resolver: ResolverPlan, socket: OwnedFd, now: Instant) -> Result<(), OwnedFd> {
        self.tries += 1;
        match Attempt::start(resolver, self.client.transport(), &self.question, socket, now) {
            Ok(attempt) => {
                self.attempt = Some(attempt);
                Ok(())
            }
            Err((error, socket)) => {
                tracing::debug!("cannot ask the resolver {}: {error}", resolver.address);
                Err(socket)
            }
        }
    }

    /// Returns the answer for a client whose question no resolver has answered.
    pub(super) fn failed(&mut self) -> Vec<u8> {
        self.failure.take().unwrap_or_else(|| self.question.server_failure())
    }

    /// Reads what has arrived, or continues to send.
    pub(super) fn proceed(&mut self) -> Step {
        let Some(attempt) = &mut self.attempt else { return Step::Wait };
        let reply = match attempt.proceed(&self.question) {
            Ok(None) => return Step::Wait,
            Ok(Some(reply)) => reply,
            Err(error) => {
                tracing::debug!("the resolver {} does not answer: {error}", attempt.resolver.address);
                return Step::AskNext;
            }
        };
        match reply {
            Reply::Answer(answer) => Step::Finish(answer),
            Reply::Failure(answer) => {
                self.failure = answer.or(self.failure.take());
                // A resolver that cannot answer is not asked again.
                if self.tries < self.resolvers.len() { Step::AskNext } else { Step::Finish(self.failed()) }
            }
            Reply::Stray => Step::AskNext,
        }
    }
}

/// A question that was sent to a resolver.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) kind: Kind,
    pub(super) resolver: ResolverPlan,
    pub(super) socket: OwnedFd,
    pub(super) until: Instant,
    id: u16,
    strays: usize,
    /// The messages of a TCP connection.
    stream: Option<MessageStream>,
}

impl Attempt {
    fn start(
        resolver: ResolverPlan,
        transport: Transport,
        question: &Question,
        socket: OwnedFd,
        now: Instant,
    ) -> Result<Self, (io::Error, OwnedFd)> {
        match send_first(resolver, transport, question, &socket) {
            Ok((id, stream)) => {
                let patience = if stream.is_some() { TCP_PATIENCE } else { UDP_PATIENCE };
                let kind = Kind::of(&resolver, transport);
                Ok(Self { kind, resolver, socket, until: now + patience, id, strays: 0, stream })
            }
            Err(error) => Err((error, socket)),
        }
    }

    /// Returns the socket with the event to wait for.
    pub(super) fn descriptor(&self) -> (BorrowedFd<'_>, Interest) {
        let sends = self.stream.as_ref().is_some_and(MessageStream::has_to_send);
        (self.socket.as_fd(), if sends { Interest::Writable } else { Interest::Readable })
    }

    /// Reads what has arrived, or continues to send. Returns a reply if there is one.
    fn proceed(&mut self, question: &Question) -> io::Result<Option<Reply>> {
        let Some(stream) = &mut self.stream else { return self.receive(question) };
        if stream.has_to_send() {
            stream.send(&self.socket)?;
            return Ok(None);
        }
        stream.receive(&self.socket)?;
        Ok(stream.next_message().map(|message| question.reply(&message, self.id)))
    }

    /// Reads datagrams until the answer has come, or too many others.
    fn receive(&mut self, question: &Question) -> io::Result<Option<Reply>> {
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((length, _)) => match question.reply(&buffer[..length], self.id) {
                    Reply::Stray if self.strays < MAX_STRAYS => self.strays += 1,
                    reply => return Ok(Some(reply)),
                },
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                // Such as the ICMP error of a host on which no resolver listens.
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Connects to a resolver, and sends it a question with a random ID. The kernel chooses a random port.
fn send_first(
    resolver: ResolverPlan,
    transport: Transport,
    question: &Question,
    socket: &OwnedFd,
) -> io::Result<(u16, Option<MessageStream>)> {
    let mut id = [0; 2];
    rustix::rand::getrandom(&mut id[..], rustix::rand::GetRandomFlags::empty())?;
    let id = u16::from_ne_bytes(id);
    connect(socket, resolver.address)?;
    let message = question.with_id(id);
    match transport {
        Transport::Udp => {
            rustix::net::send(socket, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
            Ok((id, None))
        }
        Transport::Tcp => {
            let mut stream = MessageStream::default();
            stream.queue(&message);
            Ok((id, Some(stream)))
        }
    }
}
