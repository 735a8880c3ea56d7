//! Finds the endpoint by which each peer answers, and finds it again when the peer or the host has moved.
//!
//! A peer's endpoint may be a name that does not resolve yet, or one that resolves to several addresses of which some are dead.
//! Names are resolved here, in the host's namespace: inside the tunnel that can never work before the tunnel is up. Each address
//! gets its time; when all of them had theirs in vain, the name is resolved again. Nothing is pinged: the handshake is the
//! proof.
//!
//! A peer that has answered is left alone until its last handshake is older than [`STALE`]. Then, if something was sent in vain, it
//! is searched for again; if the tunnel was merely idle, its name is resolved again, and only if that leads elsewhere by now is it
//! searched for. A change of the host's network is a reason to search at once.
//!
//! [`Search`] decides for one peer, without a clock or a network of its own; [`Resolver`] asks for names on a thread.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;
use std::time::Duration;

use rustix::event::EventfdFlags;

use crate::config::Endpoint;
use crate::keys::PublicKey;
use crate::wireguard::PeerStatus;

/// When a handshake is old: a tunnel in use makes a new one after 120 s (REKEY_AFTER_TIME of the WireGuard paper, section 6.1), and has
/// had the time for three attempts 15 s later. It is also when `reresolve-dns.sh` of wireguard-tools looks again.
pub(super) const STALE: Duration = Duration::from_secs(135);

/// The first delay before a name that does not resolve is asked for again; each further one is twice as long.
const FIRST_DELAY: Duration = Duration::from_secs(1);

/// The longest delay between two questions while the peer is searched for.
const LONGEST_DELAY: Duration = Duration::from_secs(60);

/// The first delay between two questions while the tunnel is idle; each further one is twice as long.
const FIRST_IDLE_DELAY: Duration = Duration::from_secs(60);

/// The longest delay between two questions while the tunnel is idle.
const LONGEST_IDLE_DELAY: Duration = Duration::from_secs(300);

/// What is to be done for a peer now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Point the peer at this address, and begin a handshake.
    Try(SocketAddr),
    /// Resolve the peer's endpoint.
    Resolve,
}

/// How a peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Health {
    /// It has never answered.
    Connecting,
    /// The last handshake is at most [`STALE`] old.
    Up,
    /// It is older.
    Stale,
}

/// The search for one peer's endpoint. All times are since boot ([`crate::linux::clock::boot_time`]): a laptop's sleep counts.
#[derive(Debug)]
pub(super) struct Search {
    /// Which addresses are tried, in their order.
    candidates: Vec<SocketAddr>,
    /// The candidate that is being tried, and since when.
    trying: Option<(usize, Duration)>,
    /// When to resolve the next time, unless an answer is awaited.
    resolve_at: Option<Duration>,
    delay: Duration,
    /// How long each candidate is tried.
    patience: Duration,
    /// Since when the peer is searched for. None while it need not be.
    searching_since: Option<Duration>,
    /// When the last handshake was completed.
    handshake_at: Option<Duration>,
    /// Where the peer answered last.
    in_use: Option<SocketAddr>,
    /// How much had been sent when the handshake was first seen to be old.
    sent_before: Option<u64>,
}

impl Search {
    /// Begins a search, with the addresses that are known already (none for a name). Each is tried for `patience`.
    pub(super) fn new(known: Vec<SocketAddr>, patience: Duration, now: Duration) -> Self {
        Self {
            resolve_at: known.is_empty().then_some(now),
            candidates: known,
            trying: None,
            delay: FIRST_DELAY,
            patience,
            // Whenever it was: a tunnel that is taken over may be connected already.
            searching_since: Some(Duration::ZERO),
            handshake_at: None,
            in_use: None,
            sent_before: None,
        }
    }

    /// What to do now, if anything.
    pub(super) fn step(&mut self, now: Duration) -> Option<Step> {
        if self.resolve_at.is_some_and(|at| at <= now) {
            self.resolve_at = None;
            return Some(Step::Resolve);
        }
        self.searching_since?;
        let next = match self.trying {
            None => 0,
            Some((_, since)) if now.saturating_sub(since) < self.patience => return None,
            Some((index, _)) => index + 1,
        };
        match self.candidates.get(next) {
            Some(candidate) => {
                self.trying = Some((next, now));
                Some(Step::Try(*candidate))
            }
            None => {
                // Each had its time. The device goes on with the last one by itself, and it may yet answer.
                if !self.candidates.is_empty() {
                    self.candidates.clear();
                    if self.resolve_at.is_none() {
                        self.resolve_later(now);
                    }
                }
                None
            }
        }
    }

    /// When to look at the device and to ask for the next step, if nothing else happens.
    pub(super) fn due(&self) -> Option<Duration> {
        let next = match self.searching_since {
            Some(_) => self.trying.filter(|_| !self.candidates.is_empty()).map(|(_, since)| since + self.patience),
            None if self.sent_before.is_none() => self.handshake_at.map(|at| at + STALE),
            None => None,
        };
        [next, self.resolve_at].into_iter().flatten().min()
    }

    /// Takes the answer to [`Step::Resolve`].
    pub(super) fn resolved(&mut self, answer: Option<Vec<SocketAddr>>, now: Duration) {
        let answer = answer.filter(|addresses| !addresses.is_empty());
        if self.searching_since.is_none() {
            // Asked while the peer was idle, or silent; it has answered since if nothing is old any more.
            return match answer {
                _ if self.sent_before.is_none() => {}
                Some(addresses) if !self.in_use.is_some_and(|in_use| addresses.contains(&in_use)) => {
                    self.begin(now);
                    self.resolve_at = None;
                    self.candidates = addresses;
                }
                _ => {
                    self.resolve_at = Some(now + self.delay);
                    self.delay = (self.delay * 2).min(LONGEST_IDLE_DELAY);
                }
            };
        }
        let Some(mut addresses) = answer else { return self.resolve_later(now) };
        // What has worked is the likeliest to work again.
        if let Some(position) = addresses.iter().position(|address| Some(*address) == self.in_use) {
            addresses[..=position].rotate_right(1);
        }
        let tried = self.trying.and_then(|(index, since)| Some((*self.candidates.get(index)?, since)));
        self.trying = tried.filter(|(address, _)| addresses.first() == Some(address)).map(|(_, since)| (0, since));
        self.candidates = addresses;
    }

    /// Takes note of what the device says of the peer.
    pub(super) fn observe(&mut self, status: &PeerStatus, now: Duration) {
        let Some(age) = status.handshake_age else { return };
        let at = now.saturating_sub(age);
        self.handshake_at = Some(at);
        if self.searching_since.is_some_and(|since| since <= at) {
            self.searching_since = None;
            self.candidates.clear();
            self.trying = None;
            self.resolve_at = None;
        }
        if self.searching_since.is_some() {
            return;
        }
        self.in_use = status.endpoint.or(self.in_use);
        if age < STALE {
            self.sent_before = None;
            // A question that was due because the peer was silent is so no more.
            self.resolve_at = None;
            return;
        }
        let before = *self.sent_before.get_or_insert_with(|| {
            self.delay = FIRST_IDLE_DELAY;
            self.resolve_at = Some(now);
            status.tx_bytes
        });
        if status.unanswered_for.is_some() || status.tx_bytes > before {
            self.begin(now);
        }
    }

    /// The host's network has changed, or the machine has slept: what worked may work no more, and the peer does not know where the host
    /// is by now.
    pub(super) fn network_changed(&mut self, now: Duration) {
        self.begin(now);
        self.candidates = self.in_use.into_iter().collect();
    }

    /// How the peer is.
    pub(super) fn health(&self, now: Duration) -> Health {
        match self.handshake_at {
            None => Health::Connecting,
            Some(at) if now.saturating_sub(at) <= STALE => Health::Up,
            Some(_) => Health::Stale,
        }
    }

    fn begin(&mut self, now: Duration) {
        self.searching_since = Some(now);
        self.candidates.clear();
        self.trying = None;
        self.resolve_at = Some(now);
        self.delay = FIRST_DELAY;
        self.sent_before = None;
    }

    fn resolve_later(&mut self, now: Duration) {
        self.resolve_at = Some(now + self.delay);
        self.delay = (self.delay * 2).min(LONGEST_DELAY);
    }
}

/// The answer to one question: all addresses of an endpoint, in the order in which the host's resolver prefers them
/// (getaddrinfo(3), RFC 6724).
#[derive(Debug)]
pub(super) struct Answer {
    /// Whose endpoint was asked for.
    pub peer: PublicKey,
    /// What was found.
    pub addresses: io::Result<Vec<SocketAddr>>,
}

/// Resolves endpoints on threads: the host's resolver may take its time, and nothing here may wait for it.
#[derive(Debug)]
pub(super) struct Resolver {
    answers: mpsc::Receiver<Answer>,
    sender: mpsc::Sender<Answer>,
    ready: OwnedFd,
}

impl Resolver {
    /// Makes a resolver without any question yet.
    pub(super) fn new() -> io::Result<Self> {
        let (sender, answers) = mpsc::channel();
        let ready = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { answers, sender, ready })
    }

    /// Asks for the addresses of a peer's endpoint.
    pub(super) fn ask(&self, peer: PublicKey, endpoint: Endpoint) -> io::Result<()> {
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
    pub(super) fn next(&self) -> Option<Answer> {
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
pub(super) fn resolve(endpoint: &Endpoint) -> io::Result<Vec<SocketAddr>> {
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
    /// A machine that has been up for a while.
    const BEGIN: Duration = Duration::from_secs(10_000);

    fn addresses(list: &[&str]) -> Vec<SocketAddr> {
        list.iter().map(|text| text.parse().expect("an address")).collect()
    }

    /// What a device says whose last handshake is that old.
    fn status(age: Option<Duration>, endpoint: SocketAddr, tx_bytes: u64) -> PeerStatus {
        PeerStatus {
            public_key: PublicKey::from([7; 32]),
            endpoint: Some(endpoint),
            handshake_age: age,
            rx_bytes: 0,
            tx_bytes,
            unanswered_for: None,
        }
    }

    const NOW: Option<Duration> = Some(Duration::ZERO);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// A peer that has just answered at the first of these addresses.
    fn connected(all: &[SocketAddr]) -> Search {
        let mut search = Search::new(vec![], PATIENCE, BEGIN);
        assert_eq!(search.step(BEGIN), Some(Step::Resolve));
        search.resolved(Some(all.to_vec()), BEGIN);
        assert_eq!(search.step(BEGIN), Some(Step::Try(all[0])));
        search.observe(&status(NOW, all[0], 148), BEGIN);
        search
    }

    #[test]
    fn a_dead_address_leads_to_the_next_one() {
        let both = addresses(&["192.0.2.1:51820", "[2001:db8::1]:51820"]);
        let mut search = Search::new(vec![], PATIENCE, BEGIN);
        assert_eq!(search.step(BEGIN), Some(Step::Resolve));
        assert_eq!(search.step(BEGIN), None, "one question at a time");
        search.resolved(Some(both.clone()), BEGIN);
        assert_eq!(search.step(BEGIN), Some(Step::Try(both[0])));
        assert_eq!(search.step(BEGIN + PATIENCE / 2), None, "each has its time");
        assert_eq!(search.due(), Some(BEGIN + PATIENCE));
        assert_eq!(search.step(BEGIN + PATIENCE), Some(Step::Try(both[1])));
        assert_eq!(search.step(BEGIN + PATIENCE * 2), None);
        assert_eq!(search.step(BEGIN + PATIENCE * 2 + FIRST_DELAY), Some(Step::Resolve), "and all over again");
        assert_eq!(search.health(BEGIN), Health::Connecting);
    }

    #[test]
    fn a_name_that_does_not_resolve_is_asked_for_with_growing_delays() {
        let mut now = BEGIN;
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
        let mut search = Search::new(vec![], PATIENCE, BEGIN);
        assert_eq!(search.step(BEGIN), Some(Step::Resolve));
        search.resolved(Some(vec![]), BEGIN);
        assert_eq!(search.due(), Some(BEGIN + FIRST_DELAY));
    }

    #[test]
    fn an_answering_peer_ends_the_search_until_its_handshake_is_old() {
        let known = addresses(&["192.0.2.1:51820", "192.0.2.2:51820"]);
        let mut search = connected(&known);
        assert_eq!(search.health(BEGIN + STALE), Health::Up);
        assert_eq!(search.health(BEGIN + STALE + seconds(1)), Health::Stale);
        assert_eq!(search.step(BEGIN + PATIENCE), None);
        assert_eq!(search.due(), Some(BEGIN + STALE), "nothing is to be done before");
        // A new handshake puts it off.
        search.observe(&status(NOW, known[0], 300), BEGIN + seconds(120));
        assert_eq!(search.due(), Some(BEGIN + seconds(120) + STALE));
    }

    #[test]
    fn a_known_address_that_is_dead_is_tried_again_later() {
        let known = addresses(&["192.0.2.1:51820"]);
        let mut search = Search::new(known.clone(), PATIENCE, BEGIN);
        assert_eq!(search.step(BEGIN), Some(Step::Try(known[0])));
        assert_eq!(search.step(BEGIN + PATIENCE), None);
        assert_eq!(search.step(BEGIN + PATIENCE + FIRST_DELAY), Some(Step::Resolve));
    }

    #[test]
    fn a_tunnel_that_is_taken_over_connected_is_not_searched_for() {
        let known = addresses(&["192.0.2.1:51820"]);
        let mut search = Search::new(known.clone(), PATIENCE, BEGIN);
        search.observe(&status(Some(seconds(60)), known[0], 148), BEGIN);
        assert_eq!((search.step(BEGIN), search.due()), (None, Some(BEGIN - seconds(60) + STALE)));
    }

    #[test]
    fn an_idle_tunnel_asks_seldom_and_tries_nothing() {
        let all = addresses(&["192.0.2.1:51820", "192.0.2.2:51820"]);
        let mut search = connected(&all);
        let (mut now, mut questions) = (BEGIN, 0);
        while now < BEGIN + seconds(86_400) {
            now = search.due().expect("a next time");
            search.observe(&status(Some(now - BEGIN), all[0], 148), now);
            match search.step(now) {
                Some(Step::Resolve) => {
                    questions += 1;
                    // In whatever order they come.
                    search.resolved(Some(vec![all[1], all[0]]), now);
                }
                None => {}
                Some(Step::Try(address)) => panic!("{address} is tried though nothing is sent"),
            }
        }
        assert!((200..300).contains(&questions), "{questions} questions a day");
    }

    #[test]
    fn an_idle_tunnel_follows_a_name_that_leads_elsewhere() {
        let (old, new) = (addresses(&["192.0.2.1:51820"]), addresses(&["198.51.100.1:51820"]));
        let mut search = connected(&old);
        let now = BEGIN + STALE;
        search.observe(&status(Some(STALE), old[0], 148), now);
        assert_eq!(search.step(now), Some(Step::Resolve));
        search.resolved(Some(new.clone()), now);
        assert_eq!(search.step(now), Some(Step::Try(new[0])));
        search.observe(&status(NOW, new[0], 500), now + seconds(1));
        assert_eq!((search.step(now + seconds(9)), search.health(now + seconds(9))), (None, Health::Up));
    }

    #[test]
    fn a_silent_peer_is_searched_for_when_something_is_sent_in_vain() {
        let (old, new) = (addresses(&["192.0.2.1:51820"]), addresses(&["198.51.100.1:51820", "192.0.2.1:51820"]));
        // The kernel's device only counts.
        let mut search = connected(&old);
        let now = BEGIN + STALE;
        search.observe(&status(Some(STALE), old[0], 1000), now);
        assert_eq!(search.step(now), Some(Step::Resolve));
        search.resolved(Some(old.clone()), now);
        assert_eq!(search.step(now), None, "it may be idle");
        let now = now + seconds(10);
        search.observe(&status(Some(now - BEGIN), old[0], 1148), now);
        assert_eq!(search.step(now), Some(Step::Resolve));
        search.resolved(Some(new.clone()), now);
        assert_eq!(search.step(now), Some(Step::Try(old[0])), "the one in use has its turn first");
        assert_eq!(search.step(now + PATIENCE), Some(Step::Try(new[0])));
        search.observe(&status(Some(now + PATIENCE - BEGIN), new[0], 1300), now + PATIENCE);
        assert_eq!(search.health(now + PATIENCE), Health::Stale, "an old handshake is no answer");
        search.observe(&status(NOW, new[0], 1400), now + PATIENCE + seconds(1));
        assert_eq!(search.step(now + PATIENCE * 2), None, "the one that answers is kept");

        // The embedded one knows.
        let mut search = connected(&old);
        let waiting = PeerStatus { unanswered_for: Some(seconds(5)), ..status(Some(STALE), old[0], 1000) };
        search.observe(&waiting, BEGIN + STALE);
        assert_eq!(search.step(BEGIN + STALE), Some(Step::Resolve));
        search.resolved(Some(old.clone()), BEGIN + STALE);
        assert_eq!(search.step(BEGIN + STALE), Some(Step::Try(old[0])));
    }

    #[test]
    fn after_a_change_of_the_network_all_families_are_tried() {
        let all = addresses(&["[2001:db8::1]:51820", "192.0.2.1:51820"]);
        let mut search = connected(&all);
        let now = BEGIN + seconds(10);
        search.network_changed(now);
        assert_eq!(search.step(now), Some(Step::Resolve), "at once");
        assert_eq!(search.step(now), Some(Step::Try(all[0])), "and what worked is tried meanwhile");
        search.observe(&status(Some(seconds(10)), all[0], 300), now);
        search.resolved(Some(vec![all[1], all[0]]), now + seconds(1));
        assert_eq!(search.step(now + seconds(1)), None, "it keeps its time");
        assert_eq!(search.step(now + PATIENCE), Some(Step::Try(all[1])));
        search.observe(&status(NOW, all[1], 600), now + PATIENCE + seconds(1));
        assert_eq!(search.step(now + PATIENCE * 2), None);
    }

    #[test]
    fn a_network_without_names_does_not_keep_from_trying_what_worked() {
        let all = addresses(&["192.0.2.1:51820"]);
        let mut search = connected(&all);
        let now = BEGIN + seconds(10);
        search.network_changed(now);
        assert_eq!(search.step(now), Some(Step::Resolve));
        search.resolved(None, now);
        assert_eq!(search.step(now), Some(Step::Try(all[0])));
        let (mut at, mut rounds) = (now, 0);
        // For an hour there is neither a name nor a way.
        while at < now + seconds(3600) {
            rounds += 1;
            assert!(rounds < 200, "it does not rest");
            at = search.due().expect("a next time");
            if search.step(at) == Some(Step::Resolve) {
                search.resolved(None, at);
            }
        }
        let at = search.due().expect("a next time");
        assert_eq!(search.step(at), Some(Step::Resolve));
        search.resolved(Some(all.clone()), at);
        assert_eq!(search.step(at), Some(Step::Try(all[0])));
    }

    #[test]
    fn a_late_answer_does_not_disturb_a_peer_that_answers() {
        let all = addresses(&["192.0.2.1:51820"]);
        let mut search = connected(&all);
        let now = BEGIN + seconds(10);
        search.network_changed(now);
        assert_eq!(search.step(now), Some(Step::Resolve));
        assert_eq!(search.step(now), Some(Step::Try(all[0])));
        search.observe(&status(NOW, all[0], 300), now + seconds(1));
        search.resolved(Some(addresses(&["198.51.100.9:1"])), now + seconds(2));
        assert_eq!(search.step(now + seconds(2)), None);
    }

    #[test]
    fn a_peer_that_has_roamed_is_kept_where_it_is() {
        let all = addresses(&["192.0.2.1:51820"]);
        let roamed = addresses(&["203.0.113.5:40000"]);
        let mut search = connected(&all);
        search.observe(&status(NOW, roamed[0], 300), BEGIN + seconds(100));
        let now = BEGIN + seconds(200);
        search.network_changed(now);
        assert_eq!(search.step(now), Some(Step::Resolve));
        assert_eq!(search.step(now), Some(Step::Try(roamed[0])));
    }
}
