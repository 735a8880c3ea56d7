//! The search for the endpoint at which a peer answers, and the decision to search again when the peer or the host has
//! moved.
//!
//! A peer's endpoint may be a name that does not resolve yet, or one that resolves to several addresses of which some
//! do not answer. Each address is tried for a while. When all were tried without success, the name is resolved again. A
//! completed handshake is the proof that an address works; nothing is pinged.
//!
//! A peer that has answered is left alone until its last handshake is stale ([`stale_after`]). Then there are two
//! cases. If the peer was sent packets since, it does not answer, and the search begins again. If not, the tunnel is
//! merely idle: only the name is resolved again, and the search begins if it has other addresses now. A change of the
//! host's network begins a search at once.
//!
//! [`Search`] decides for one peer. It uses no clock and no network of its own.

use std::net::SocketAddr;
use std::time::Duration;

use crate::fault;
use crate::wireguard::PeerStatus;

/// The age at which a handshake is stale. A tunnel in use repeats the handshake after 120 s (REKEY_AFTER_TIME,
/// WireGuard paper, section 6.1). 15 s later it has had time for three attempts. `reresolve-dns.sh` of wireguard-tools
/// uses the same limit.
const STALE: Duration = Duration::from_secs(135);

/// The delay before the first repeated lookup of a name that does not resolve. Each further delay is twice as long.
const FIRST_DELAY: Duration = Duration::from_secs(1);

/// The longest delay between two lookups during a search.
const LONGEST_DELAY: Duration = Duration::from_secs(60);

/// The delay before the first repeated lookup while the tunnel is idle. Each further delay is twice as long.
const FIRST_IDLE_DELAY: Duration = Duration::from_secs(60);

/// The longest delay between two lookups while the tunnel is idle.
const LONGEST_IDLE_DELAY: Duration = Duration::from_secs(300);

/// Returns the age at which a handshake is stale.
pub fn stale_after() -> Duration {
    fault::stale_after().unwrap_or(STALE)
}

/// The next action for a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SearchAction {
    /// Set the peer's endpoint to this address, and initiate a handshake.
    Try(SocketAddr),
    /// Resolve the peer's endpoint.
    Resolve,
}

/// The state of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Health {
    /// It has not completed a handshake yet.
    Connecting,
    /// The last handshake is at most [`STALE`] old.
    Up,
    /// The last handshake is older.
    Stale,
}

/// The search for one peer's endpoint. All times are since boot and include sleep ([`crate::linux::clock::boot_time`]).
#[derive(Debug)]
pub(super) struct Search {
    /// The addresses to try, in order.
    candidates: Vec<SocketAddr>,
    /// The index of the candidate that is being tried, and since when.
    trying: Option<(usize, Duration)>,
    /// When to resolve the endpoint. None while a lookup is running or no lookup is needed.
    resolve_at: Option<Duration>,
    /// The delay before the lookup after that.
    delay: Duration,
    /// How long each candidate is tried.
    try_for: Duration,
    /// When the search began. None while the peer answers or the tunnel is idle.
    searching_since: Option<Duration>,
    /// When the last handshake was completed.
    handshake_at: Option<Duration>,
    /// The address at which the peer answered last.
    in_use: Option<SocketAddr>,
    /// The number of bytes sent when the handshake was first seen to be stale.
    sent_before: Option<u64>,
}

impl Search {
    /// Begins a search with the addresses that are known without a lookup. Each address is tried for `try_for`.
    pub(super) fn new(known: Vec<SocketAddr>, try_for: Duration, now: Duration) -> Self {
        Self {
            resolve_at: known.is_empty().then_some(now),
            candidates: known,
            trying: None,
            delay: FIRST_DELAY,
            try_for,
            // The peer of a tunnel that is taken over may have completed its handshake at any time before.
            searching_since: Some(Duration::ZERO),
            handshake_at: None,
            in_use: None,
            sent_before: None,
        }
    }

    /// Returns the next action, if one is due.
    pub(super) fn next_action(&mut self, now: Duration) -> Option<SearchAction> {
        if self.resolve_at.is_some_and(|at| at <= now) {
            self.resolve_at = None;
            return Some(SearchAction::Resolve);
        }
        self.searching_since?;
        let next = match self.trying {
            None => 0,
            Some((_, since)) if now.saturating_sub(since) < self.try_for => return None,
            Some((index, _)) => index + 1,
        };
        match self.candidates.get(next) {
            Some(candidate) => {
                self.trying = Some((next, now));
                Some(SearchAction::Try(*candidate))
            }
            None => {
                // All candidates were tried. The device keeps trying the last one, which may still answer.
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

    /// Returns when to read the device's status and to ask for the next action, if nothing happens before.
    pub(super) fn due(&self) -> Option<Duration> {
        let next = match self.searching_since {
            Some(_) => self.trying.filter(|_| !self.candidates.is_empty()).map(|(_, since)| since + self.try_for),
            None if self.sent_before.is_none() => self.handshake_at.map(|at| at + stale_after()),
            None => None,
        };
        [next, self.resolve_at].into_iter().flatten().min()
    }

    /// Takes the answer to [`SearchAction::Resolve`]. None if the lookup failed.
    pub(super) fn resolved(&mut self, answer: Option<Vec<SocketAddr>>, now: Duration) {
        let answer = answer.filter(|addresses| !addresses.is_empty());
        if self.searching_since.is_none() {
            // The lookup began while the handshake was stale. If it is stale no longer, the peer has answered
            // meanwhile.
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
        // The address that has worked is the likeliest to work again.
        if let Some(position) = addresses.iter().position(|address| Some(*address) == self.in_use) {
            addresses[..=position].rotate_right(1);
        }
        let tried = self.trying.and_then(|(index, since)| Some((*self.candidates.get(index)?, since)));
        self.trying = tried.filter(|(address, _)| addresses.first() == Some(address)).map(|(_, since)| (0, since));
        self.candidates = addresses;
    }

    /// Takes the device's status of the peer.
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
        if age < stale_after() {
            self.sent_before = None;
            // The peer answers, so a lookup that was scheduled because it did not is no longer needed.
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

    /// Begins a search, because the host's network has changed or the machine has slept. The address in use may not
    /// work any more, and the peer does not know the host's new address.
    pub(super) fn network_changed(&mut self, now: Duration) {
        self.begin(now);
        self.candidates = self.in_use.into_iter().collect();
    }

    /// Returns whether there is an address that was not tried yet, or a lookup that may find one.
    pub(super) fn has_alternatives(&self) -> bool {
        let next = self.trying.map_or(0, |(index, _)| index + 1);
        let is_looking_up = self.candidates.is_empty() && self.trying.is_none();
        self.searching_since.is_some() && (next < self.candidates.len() || is_looking_up)
    }

    /// Returns the state of the peer.
    pub(super) fn health(&self, now: Duration) -> Health {
        match self.handshake_at {
            None => Health::Connecting,
            Some(at) if now.saturating_sub(at) <= stale_after() => Health::Up,
            Some(_) => Health::Stale,
        }
    }

    /// Returns whether the last handshake is stale and no search is under way, because nothing was sent since.
    pub(super) fn is_idle(&self, now: Duration) -> bool {
        self.searching_since.is_none() && self.health(now) == Health::Stale
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::PublicKey;

    const TRY_FOR: Duration = Duration::from_secs(5);
    /// The time since boot at which each test begins.
    const BEGIN: Duration = Duration::from_secs(10_000);

    fn addresses(list: &[&str]) -> Vec<SocketAddr> {
        list.iter().map(|text| text.parse().expect("an address")).collect()
    }

    /// The device's status of a peer whose last handshake has this age.
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

    /// Returns the search for a peer that has just answered at the first of these addresses.
    fn connected(all: &[SocketAddr]) -> Search {
        let mut search = Search::new(vec![], TRY_FOR, BEGIN);
        assert_eq!(search.next_action(BEGIN), Some(SearchAction::Resolve));
        search.resolved(Some(all.to_vec()), BEGIN);
        assert_eq!(search.next_action(BEGIN), Some(SearchAction::Try(all[0])));
        search.observe(&status(NOW, all[0], 148), BEGIN);
        search
    }

    #[test]
    fn the_next_address_is_tried_when_one_does_not_answer() {
        let both = addresses(&["192.0.2.1:51820", "[2001:db8::1]:51820"]);
        let mut search = Search::new(vec![], TRY_FOR, BEGIN);
        assert_eq!(search.next_action(BEGIN), Some(SearchAction::Resolve));
        assert_eq!(search.next_action(BEGIN), None, "one lookup at a time");
        search.resolved(Some(both.clone()), BEGIN);
        assert_eq!(search.next_action(BEGIN), Some(SearchAction::Try(both[0])));
        assert_eq!(search.next_action(BEGIN + TRY_FOR / 2), None, "each address has its time");
        assert_eq!(search.due(), Some(BEGIN + TRY_FOR));
        assert_eq!(search.next_action(BEGIN + TRY_FOR), Some(SearchAction::Try(both[1])));
        assert_eq!(search.next_action(BEGIN + TRY_FOR * 2), None);
        assert_eq!(
            search.next_action(BEGIN + TRY_FOR * 2 + FIRST_DELAY),
            Some(SearchAction::Resolve),
            "then the search starts over"
        );
        assert_eq!(search.health(BEGIN), Health::Connecting);
    }

    #[test]
    fn a_failing_lookup_is_repeated_with_growing_delays() {
        let mut now = BEGIN;
        let mut search = Search::new(vec![], TRY_FOR, now);
        let mut delays = Vec::new();
        for _ in 0..9 {
            assert_eq!(search.next_action(now), Some(SearchAction::Resolve));
            search.resolved(None, now);
            let due = search.due().expect("a next time");
            delays.push((due - now).as_secs());
            now = due;
        }
        assert_eq!(delays, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
    }

    #[test]
    fn an_answer_without_addresses_counts_as_a_failed_lookup() {
        let mut search = Search::new(vec![], TRY_FOR, BEGIN);
        assert_eq!(search.next_action(BEGIN), Some(SearchAction::Resolve));
        search.resolved(Some(vec![]), BEGIN);
        assert_eq!(search.due(), Some(BEGIN + FIRST_DELAY));
    }

    #[test]
    fn a_peer_that_answers_ends_the_search_until_its_handshake_is_stale() {
        let known = addresses(&["192.0.2.1:51820", "192.0.2.2:51820"]);
        let mut search = connected(&known);
        assert_eq!(search.health(BEGIN + STALE), Health::Up);
        assert_eq!(search.health(BEGIN + STALE + seconds(1)), Health::Stale);
        assert_eq!(search.next_action(BEGIN + TRY_FOR), None);
        assert_eq!(search.due(), Some(BEGIN + STALE), "no work is due before");
        // A new handshake postpones that.
        search.observe(&status(NOW, known[0], 300), BEGIN + seconds(120));
        assert_eq!(search.due(), Some(BEGIN + seconds(120) + STALE));
    }

    #[test]
    fn a_numeric_endpoint_that_does_not_answer_is_tried_again_later() {
        let known = addresses(&["192.0.2.1:51820"]);
        let mut search = Search::new(known.clone(), TRY_FOR, BEGIN);
        assert_eq!(search.next_action(BEGIN), Some(SearchAction::Try(known[0])));
        assert_eq!(search.next_action(BEGIN + TRY_FOR), None);
        assert_eq!(search.next_action(BEGIN + TRY_FOR + FIRST_DELAY), Some(SearchAction::Resolve));
    }

    #[test]
    fn no_search_begins_when_a_connected_tunnel_is_taken_over() {
        let known = addresses(&["192.0.2.1:51820"]);
        let mut search = Search::new(known.clone(), TRY_FOR, BEGIN);
        search.observe(&status(Some(seconds(60)), known[0], 148), BEGIN);
        assert_eq!((search.next_action(BEGIN), search.due()), (None, Some(BEGIN - seconds(60) + STALE)));
    }

    #[test]
    fn an_idle_tunnel_resolves_rarely_and_tries_no_address() {
        let all = addresses(&["192.0.2.1:51820", "192.0.2.2:51820"]);
        let mut search = connected(&all);
        let (mut now, mut lookups) = (BEGIN, 0);
        while now < BEGIN + seconds(86_400) {
            now = search.due().expect("a next time");
            search.observe(&status(Some(now - BEGIN), all[0], 148), now);
            match search.next_action(now) {
                Some(SearchAction::Resolve) => {
                    lookups += 1;
                    // The order of the addresses does not matter.
                    search.resolved(Some(vec![all[1], all[0]]), now);
                }
                None => {}
                Some(SearchAction::Try(address)) => panic!("{address} is tried although nothing was sent"),
            }
        }
        assert!((200..300).contains(&lookups), "{lookups} lookups a day");
    }

    #[test]
    fn an_idle_tunnel_follows_a_name_that_has_moved() {
        let (old, new) = (addresses(&["192.0.2.1:51820"]), addresses(&["198.51.100.1:51820"]));
        let mut search = connected(&old);
        let now = BEGIN + STALE;
        search.observe(&status(Some(STALE), old[0], 148), now);
        assert_eq!(search.next_action(now), Some(SearchAction::Resolve));
        search.resolved(Some(new.clone()), now);
        assert_eq!(search.next_action(now), Some(SearchAction::Try(new[0])));
        search.observe(&status(NOW, new[0], 500), now + seconds(1));
        assert_eq!((search.next_action(now + seconds(9)), search.health(now + seconds(9))), (None, Health::Up));
    }

    #[test]
    fn a_search_begins_when_packets_to_a_silent_peer_are_not_answered() {
        let (old, new) = (addresses(&["192.0.2.1:51820"]), addresses(&["198.51.100.1:51820", "192.0.2.1:51820"]));
        // The kernel's device only counts the bytes sent.
        let mut search = connected(&old);
        let now = BEGIN + STALE;
        search.observe(&status(Some(STALE), old[0], 1000), now);
        assert_eq!(search.next_action(now), Some(SearchAction::Resolve));
        search.resolved(Some(old.clone()), now);
        assert_eq!(search.next_action(now), None, "the tunnel may be idle");
        let now = now + seconds(10);
        search.observe(&status(Some(now - BEGIN), old[0], 1148), now);
        assert_eq!(search.next_action(now), Some(SearchAction::Resolve));
        search.resolved(Some(new.clone()), now);
        assert_eq!(search.next_action(now), Some(SearchAction::Try(old[0])), "the address in use is tried first");
        assert_eq!(search.next_action(now + TRY_FOR), Some(SearchAction::Try(new[0])));
        search.observe(&status(Some(now + TRY_FOR - BEGIN), new[0], 1300), now + TRY_FOR);
        assert_eq!(search.health(now + TRY_FOR), Health::Stale, "an old handshake is not an answer");
        search.observe(&status(NOW, new[0], 1400), now + TRY_FOR + seconds(1));
        assert_eq!(search.next_action(now + TRY_FOR * 2), None, "the address that answers is kept");

        // The embedded device reports unanswered packets.
        let mut search = connected(&old);
        let waiting = PeerStatus { unanswered_for: Some(seconds(5)), ..status(Some(STALE), old[0], 1000) };
        search.observe(&waiting, BEGIN + STALE);
        assert_eq!(search.next_action(BEGIN + STALE), Some(SearchAction::Resolve));
        search.resolved(Some(old.clone()), BEGIN + STALE);
        assert_eq!(search.next_action(BEGIN + STALE), Some(SearchAction::Try(old[0])));
    }

    #[test]
    fn all_address_families_are_tried_after_a_change_of_the_network() {
        let all = addresses(&["[2001:db8::1]:51820", "192.0.2.1:51820"]);
        let mut search = connected(&all);
        let now = BEGIN + seconds(10);
        search.network_changed(now);
        assert_eq!(search.next_action(now), Some(SearchAction::Resolve), "at once");
        assert_eq!(
            search.next_action(now),
            Some(SearchAction::Try(all[0])),
            "and the address in use is tried meanwhile"
        );
        search.observe(&status(Some(seconds(10)), all[0], 300), now);
        search.resolved(Some(vec![all[1], all[0]]), now + seconds(1));
        assert_eq!(search.next_action(now + seconds(1)), None, "the attempt is not cut short");
        assert_eq!(search.next_action(now + TRY_FOR), Some(SearchAction::Try(all[1])));
        search.observe(&status(NOW, all[1], 600), now + TRY_FOR + seconds(1));
        assert_eq!(search.next_action(now + TRY_FOR * 2), None);
    }

    #[test]
    fn the_address_in_use_is_tried_even_if_lookups_fail() {
        let all = addresses(&["192.0.2.1:51820"]);
        let mut search = connected(&all);
        let now = BEGIN + seconds(10);
        search.network_changed(now);
        assert_eq!(search.next_action(now), Some(SearchAction::Resolve));
        search.resolved(None, now);
        assert_eq!(search.next_action(now), Some(SearchAction::Try(all[0])));
        let (mut at, mut rounds) = (now, 0);
        // For an hour neither lookups nor handshakes succeed.
        while at < now + seconds(3600) {
            rounds += 1;
            assert!(rounds < 200, "the search does not pause");
            at = search.due().expect("a next time");
            if search.next_action(at) == Some(SearchAction::Resolve) {
                search.resolved(None, at);
            }
        }
        let at = search.due().expect("a next time");
        assert_eq!(search.next_action(at), Some(SearchAction::Resolve));
        search.resolved(Some(all.clone()), at);
        assert_eq!(search.next_action(at), Some(SearchAction::Try(all[0])));
    }

    #[test]
    fn a_late_lookup_does_not_disturb_a_peer_that_answers() {
        let all = addresses(&["192.0.2.1:51820"]);
        let mut search = connected(&all);
        let now = BEGIN + seconds(10);
        search.network_changed(now);
        assert_eq!(search.next_action(now), Some(SearchAction::Resolve));
        assert_eq!(search.next_action(now), Some(SearchAction::Try(all[0])));
        search.observe(&status(NOW, all[0], 300), now + seconds(1));
        search.resolved(Some(addresses(&["198.51.100.9:1"])), now + seconds(2));
        assert_eq!(search.next_action(now + seconds(2)), None);
    }

    #[test]
    fn the_address_of_a_peer_that_has_roamed_is_kept() {
        let all = addresses(&["192.0.2.1:51820"]);
        let roamed = addresses(&["203.0.113.5:40000"]);
        let mut search = connected(&all);
        search.observe(&status(NOW, roamed[0], 300), BEGIN + seconds(100));
        let now = BEGIN + seconds(200);
        search.network_changed(now);
        assert_eq!(search.next_action(now), Some(SearchAction::Resolve));
        assert_eq!(search.next_action(now), Some(SearchAction::Try(roamed[0])));
    }
}
