//! Finds the endpoint by which each peer answers.
//!
//! A peer's endpoint may be a name that does not resolve yet, or one that resolves to several addresses of which some are dead.
//! Names are resolved here, in the host's namespace: inside the tunnel that can never work before the tunnel is up. Each address
//! gets its time; when all of them had theirs in vain, the name is resolved again. Nothing is pinged: the handshake is the
//! proof.
//!
//! [`Search`] decides for one peer, without a clock or a network of its own; [`Resolver`] asks for names on a thread.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;

use crate::config::Endpoint;
use crate::keys::PublicKey;

/// The first delay before a name that does not resolve is asked for again; each further one is twice as long.
const FIRST_DELAY: Duration = Duration::from_secs(1);

/// The longest delay between two questions.
const LONGEST_DELAY: Duration = Duration::from_secs(60);

/// What is to be done for a peer now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Point the peer at this address, and begin a handshake.
    Try(SocketAddr),
    /// Resolve the peer's endpoint.
    Resolve,
}

/// The search for one peer's endpoint.
#[derive(Debug)]
pub struct Search {
    candidates: Vec<SocketAddr>,
    /// The candidate that is being tried, and since when.
    trying: Option<(usize, Instant)>,
    /// When to resolve the next time, unless an answer is awaited.
    resolve_at: Option<Instant>,
    delay: Duration,
    /// How long each candidate is tried.
    patience: Duration,
    done: bool,
}

impl Search {
    /// Begins a search, with the addresses that are known already (none for a name). Each is tried for `patience`.
    pub fn new(known: Vec<SocketAddr>, patience: Duration, now: Instant) -> Self {
        let resolve_at = known.is_empty().then_some(now);
        Self { candidates: known, trying: None, resolve_at, delay: FIRST_DELAY, patience, done: false }
    }

    /// What to do now, if anything.
    pub fn step(&mut self, now: Instant) -> Option<Step> {
        if self.done {
            return None;
        }
        if self.resolve_at.is_some_and(|at| at <= now) {
            self.resolve_at = None;
            return Some(Step::Resolve);
        }
        let next = match self.trying {
            None => 0,
            Some((_, since)) if now.duration_since(since) < self.patience => return None,
            Some((index, _)) => index + 1,
        };
        match self.candidates.get(next) {
            Some(candidate) => {
                self.trying = Some((next, now));
                Some(Step::Try(*candidate))
            }
            None => {
                // Each had its time. The device goes on with the last one by itself, and it may yet answer.
                if self.resolve_at.is_none() && !self.candidates.is_empty() {
                    self.candidates.clear();
                    self.resolve_later(now);
                }
                None
            }
        }
    }

    /// When to ask for the next step, if nothing else happens.
    pub fn due(&self) -> Option<Instant> {
        if self.done {
            return None;
        }
        let trying = self.trying.filter(|_| !self.candidates.is_empty()).map(|(_, since)| since + self.patience);
        [trying, self.resolve_at].into_iter().flatten().min()
    }

    /// Takes the answer to [`Step::Resolve`].
    pub fn resolved(&mut self, answer: Option<Vec<SocketAddr>>, now: Instant) {
        match answer.filter(|addresses| !addresses.is_empty()) {
            Some(addresses) => {
                self.candidates = addresses;
                self.trying = None;
            }
            None => self.resolve_later(now),
        }
    }

    /// Ends the search: the peer has answered.
    pub fn succeeded(&mut self) {
        self.done = true;
    }

    /// Whether the peer has answered.
    pub fn is_done(&self) -> bool {
        self.done
    }

    fn resolve_later(&mut self, now: Instant) {
        self.resolve_at = Some(now + self.delay);
        self.delay = (self.delay * 2).min(LONGEST_DELAY);
    }
}

/// The answer to one question: all addresses of an endpoint, in the order in which the host's resolver prefers them
/// (getaddrinfo(3), RFC 6724).
#[derive(Debug)]
pub struct Answer {
    /// Whose endpoint was asked for.
    pub peer: PublicKey,
    /// What was found.
    pub addresses: io::Result<Vec<SocketAddr>>,
}

/// Resolves endpoints on threads: the host's resolver may take its time, and nothing here may wait for it.
#[derive(Debug)]
pub struct Resolver {
    answers: mpsc::Receiver<Answer>,
    sender: mpsc::Sender<Answer>,
    ready: OwnedFd,
}

impl Resolver {
    /// Makes a resolver without any question yet.
    pub fn new() -> io::Result<Self> {
        let (sender, answers) = mpsc::channel();
        let ready = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { answers, sender, ready })
    }

    /// Asks for the addresses of a peer's endpoint.
    pub fn ask(&self, peer: PublicKey, endpoint: Endpoint) -> io::Result<()> {
        let (sender, ready) = (self.sender.clone(), self.ready.try_clone()?);
        std::thread::Builder::new().name("resolver".into()).spawn(move || {
            let addresses = resolve(&endpoint);
            // Nobody listens any more when the tunnel is being taken down.
            if sender.send(Answer { peer, addresses }).is_ok() {
                let _ = rustix::io::write(&ready, &1_u64.to_ne_bytes());
            }
        })?;
        Ok(())
    }

    /// The next answer, if there is one.
    pub fn next(&self) -> Option<Answer> {
        let _ = rustix::io::read(&self.ready, &mut [0_u8; 8]);
        self.answers.try_recv().ok()
    }
}

impl AsFd for Resolver {
    /// Readable when there may be an answer.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

/// Resolves an endpoint in the calling thread's network namespace.
pub fn resolve(endpoint: &Endpoint) -> io::Result<Vec<SocketAddr>> {
    match endpoint {
        Endpoint::Name { host, port } => Ok((host.as_str(), *port).to_socket_addrs()?.collect()),
        Endpoint::Address { address, zone: None } => Ok(vec![*address]),
        Endpoint::Address { address, zone: Some(zone) } => {
            let index = nix::net::if_::if_nametoindex(zone.as_str())?;
            let mut address = *address;
            if let SocketAddr::V6(address) = &mut address {
                address.set_scope_id(index);
            }
            Ok(vec![address])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn addresses(list: &[&str]) -> Vec<SocketAddr> {
        list.iter().map(|text| text.parse().expect("an address")).collect()
    }

    #[test]
    fn a_dead_address_leads_to_the_next_one() {
        let begin = Instant::now();
        let both = addresses(&["192.0.2.1:51820", "[2001:db8::1]:51820"]);
        let mut search = Search::new(vec![], PATIENCE, begin);
        assert_eq!(search.step(begin), Some(Step::Resolve));
        assert_eq!(search.step(begin), None, "one question at a time");
        search.resolved(Some(both.clone()), begin);
        assert_eq!(search.step(begin), Some(Step::Try(both[0])));
        assert_eq!(search.step(begin + PATIENCE / 2), None, "each has its time");
        assert_eq!(search.due(), Some(begin + PATIENCE));
        assert_eq!(search.step(begin + PATIENCE), Some(Step::Try(both[1])));
        assert_eq!(search.step(begin + PATIENCE * 2), None);
        assert_eq!(search.step(begin + PATIENCE * 2 + FIRST_DELAY), Some(Step::Resolve), "and all over again");
    }

    #[test]
    fn a_name_that_does_not_resolve_is_asked_for_with_growing_delays() {
        let mut now = Instant::now();
        let mut search = Search::new(vec![], PATIENCE, now);
        let mut delays = Vec::new();
        for _ in 0..9 {
            assert_eq!(search.step(now), Some(Step::Resolve));
            search.resolved(None, now);
            let due = search.due().expect("a next time");
            delays.push((due - now).as_secs());
            now = due;
        }
        assert_eq!(delays, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
    }

    #[test]
    fn an_empty_answer_is_none() {
        let now = Instant::now();
        let mut search = Search::new(vec![], PATIENCE, now);
        assert_eq!(search.step(now), Some(Step::Resolve));
        search.resolved(Some(vec![]), now);
        assert_eq!(search.due(), Some(now + FIRST_DELAY));
    }

    #[test]
    fn an_answering_peer_ends_the_search() {
        let now = Instant::now();
        let known = addresses(&["192.0.2.1:51820", "192.0.2.2:51820"]);
        let mut search = Search::new(known.clone(), PATIENCE, now);
        assert_eq!(search.step(now), Some(Step::Try(known[0])));
        search.succeeded();
        assert_eq!((search.step(now + PATIENCE), search.due()), (None, None));
    }

    #[test]
    fn a_known_address_that_is_dead_is_tried_again_later() {
        let now = Instant::now();
        let known = addresses(&["192.0.2.1:51820"]);
        let mut search = Search::new(known.clone(), PATIENCE, now);
        assert_eq!(search.step(now), Some(Step::Try(known[0])));
        assert_eq!(search.step(now + PATIENCE), None);
        assert_eq!(search.step(now + PATIENCE + FIRST_DELAY), Some(Step::Resolve));
    }
}
