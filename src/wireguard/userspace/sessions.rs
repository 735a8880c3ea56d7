//! The sessions of a peer: the current one, the one before it, and one that the peer has still to confirm (WireGuard
//! paper, section 6.3).

use std::sync::Arc;
use std::time::Duration;

use super::noise::Session;

/// How long a session is used (WireGuard paper, section 6.1).
pub(super) const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);

/// A session, with the facts that its timers need.
#[derive(Clone)]
pub(super) struct Active {
    pub(super) session: Arc<Session>,
    /// The time of its handshake.
    pub(super) made_at: Duration,
    /// Whether this device began the handshake. If so, it renews the session.
    pub(super) is_initiator: bool,
}

impl Active {
    pub(super) fn age(&self, now: Duration) -> Duration {
        now.saturating_sub(self.made_at)
    }

    fn is_usable(&self, now: Duration) -> bool {
        self.age(now) < REJECT_AFTER_TIME
    }
}

/// The sessions of a peer. Dropping one wipes its keys.
#[derive(Default)]
pub(super) struct Sessions {
    /// The session of packets to send.
    current: Option<Active>,
    /// The session that was replaced. Packets of it may still be on their way.
    previous: Option<Active>,
    /// A session that the peer began, until a packet of the peer shows that it has the session as well.
    next: Option<Active>,
}

impl Sessions {
    /// Returns the session of packets to send.
    pub(super) fn current(&self, now: Duration) -> Option<&Active> {
        self.current.as_ref().filter(|active| active.is_usable(now))
    }

    /// Returns the session of this device's index.
    pub(super) fn by_index(&self, index: u32, now: Duration) -> Option<&Active> {
        self.all().find(|active| active.session.index() == index && active.is_usable(now))
    }

    /// Adds a session that this device has begun, which can be used at once.
    pub(super) fn add_begun(&mut self, active: Active) {
        let replaced = self.current.replace(active);
        self.previous = self.next.take().or(replaced);
    }

    /// Adds a session that the peer has begun, and has to confirm.
    pub(super) fn add_answered(&mut self, active: Active) {
        self.next = Some(active);
        self.previous = None;
    }

    /// Notes an authentic packet of a session. Returns true if that confirms the session.
    pub(super) fn confirm(&mut self, index: u32) -> bool {
        let Some(confirmed) = self.next.take_if(|next| next.session.index() == index) else { return false };
        self.previous = self.current.replace(confirmed);
        true
    }

    /// Returns the time of the youngest session's handshake, confirmed or not.
    pub(super) fn last_made(&self) -> Option<Duration> {
        self.all().map(|active| active.made_at).max()
    }

    /// Returns the time at which [`Self::expire`] has something to do.
    pub(super) fn next_expiry(&self) -> Option<Duration> {
        self.all().map(|active| active.made_at + REJECT_AFTER_TIME).min()
    }

    /// Drops sessions that are too old.
    pub(super) fn expire(&mut self, now: Duration) {
        for slot in [&mut self.current, &mut self.previous, &mut self.next] {
            slot.take_if(|active| !active.is_usable(now));
        }
    }

    /// Returns all sessions.
    pub(super) fn all(&self) -> impl Iterator<Item = &Active> {
        [&self.current, &self.previous, &self.next].into_iter().flatten()
    }
}
