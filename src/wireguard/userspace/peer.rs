//! One peer: `boringtun`'s state machine for it, and around that what the kernel's WireGuard has and `boringtun` lacks or
//! hides: roaming, the persistent keepalive that never gives up, what is in flight, when to look at the clock again, and
//! the counters.
//!
//! `boringtun`'s traps that this file exists to handle:
//!
//! - Its idea of the time only moves in `update_timers`. Whoever does anything after a quiet time calls [`Peer::update`]
//!   first, or a handshake that has just begun is taken for one that began long ago, and given up.
//! - Between two calls of that, what was sent and what was received happened at the same time to it, so it may overlook that
//!   an answer is owed; and the first packet after a silence looks unanswered to it at the next call. So the calls are
//!   seldom, and who owes whom an answer is watched here, as in the kernel.
//! - It gives up after 90 s without an answer, and 540 s after the last handshake, and stays so until somebody begins a
//!   new handshake.
//! - As a responder it may send only once the initiator has confirmed the session with a packet, so the packets that wait
//!   are sent then and not together with the response.
//! - It has no jitter for retransmissions and enforces no limit on a session's packets.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::{Tunn, TunnResult};

use super::allowed_ips::{AllowedIps, PeerIndex};
use super::device::Sink;
use super::wiped::Wiped;
use crate::keys::{PresharedKey, PublicKey};
use crate::wireguard::{PeerConfig, PeerStatus};

// The WireGuard paper, section 6.1.
const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// The jitter of a retransmission is below this (WireGuard paper, section 6.1), in milliseconds.
const JITTER_MILLISECONDS: u16 = 334;

/// How stale `boringtun`'s time may be when something happens.
const CLOCK_STEP: Duration = Duration::from_secs(1);

/// When `boringtun` has dropped a session for certain, counted from when it was made: it rounds to its own time.
const SESSION_GONE_AFTER: Duration = REJECT_AFTER_TIME.saturating_add(CLOCK_STEP);

/// `boringtun`'s ring of sessions, by the low bits of their index.
const SESSIONS: usize = 8;

// Message types, the first byte of a message (WireGuard paper, section 5.4).
const HANDSHAKE_INITIATION: u8 = 1;
const DATA: u8 = 4;

/// What a peer's methods work with: the time of the event, room for one message, and the outside world.
pub(super) struct Context<'a, S> {
    pub(super) now: Duration,
    pub(super) scratch: &'a mut [u8],
    pub(super) sink: &'a mut S,
}

/// What became of a datagram that was handed to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It was authentic, and did what it should.
    Accepted,
    /// It was not authentic, or not fresh.
    NotAuthentic,
    /// It was authentic, but holds no IP packet.
    Malformed,
    /// It was authentic, but its packet's source is not the peer's.
    SourceNotAllowed,
}

/// A handshake that we began and that nobody has answered yet.
struct Initiation {
    /// The session index that it offers.
    index: u32,
    /// When the first one was sent that nobody answered.
    begun_at: Duration,
    /// When it is to be sent again.
    again_at: Duration,
}

/// A session as far as its times matter.
struct Session {
    /// When the newest one was made.
    made_at: Duration,
    /// Whether we began it.
    initiator: bool,
}

pub(super) struct Peer {
    index: PeerIndex,
    public_key: PublicKey,
    /// The key that its sessions are made with besides; none once they are to be made with other keys.
    preshared_key: Option<Option<PresharedKey>>,
    tunn: Wiped<Tunn>,
    persistent_keepalive: Option<Duration>,
    endpoint: Option<SocketAddr>,
    endpoint_set_at: Option<Duration>,
    /// Somebody wanted a session and there was none; a new endpoint is reason enough to try again.
    wanted: bool,
    initiation: Option<Initiation>,
    /// The newest session, until all keys are past their time.
    session: Option<Session>,
    /// Sessions that we offered as a responder and that no packet has confirmed yet.
    unconfirmed: [Option<u32>; SESSIONS],
    updated_at: Duration,
    /// The first packet with content that was sent since anything was received.
    unanswered_since: Option<Duration>,
    /// The first packet with content that was received since anything was sent.
    owed_since: Option<Duration>,
    /// The last message, sent or received.
    traffic_at: Duration,
    handshake_at: Option<Duration>,
    rx_bytes: u64,
    tx_bytes: u64,
}

impl Peer {
    /// A peer without a session. Where it is, and what was counted, it takes over from the one `before` it, of the same key.
    pub(super) fn new(index: PeerIndex, config: &PeerConfig, tunn: Tunn, before: Option<&Peer>, now: Duration) -> Self {
        let endpoint = config.endpoint.or(before.and_then(|before| before.endpoint));
        Self {
            index,
            public_key: config.public_key,
            preshared_key: Some(config.preshared_key.clone()),
            tunn: Wiped::new(tunn),
            persistent_keepalive: interval(config.persistent_keepalive),
            endpoint: endpoint.map(canonical),
            endpoint_set_at: endpoint.map(|_| now),
            wanted: false,
            initiation: None,
            session: None,
            unconfirmed: [None; SESSIONS],
            updated_at: now,
            unanswered_since: None,
            owed_since: None,
            traffic_at: now,
            handshake_at: None,
            rx_bytes: before.map_or(0, |before| before.rx_bytes),
            tx_bytes: before.map_or(0, |before| before.tx_bytes),
        }
    }

    pub(super) fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    /// Whether its sessions are made with this key besides.
    pub(super) fn has_key(&self, preshared_key: Option<&PresharedKey>) -> bool {
        self.preshared_key.as_ref().is_some_and(|key| key.as_ref() == preshared_key)
    }

    /// Its sessions are to be made with other keys: [`Self::has_key`] none any more.
    pub(super) fn forget_keys(&mut self) {
        self.preshared_key = None;
    }

    pub(super) fn set_persistent_keepalive(&mut self, seconds: Option<u16>) {
        self.persistent_keepalive = interval(seconds);
    }

    pub(super) fn status(&self, now: Duration) -> PeerStatus {
        PeerStatus {
            public_key: self.public_key,
            endpoint: self.endpoint,
            handshake_age: self.handshake_at.map(|at| now.saturating_sub(at)),
            rx_bytes: self.rx_bytes,
            tx_bytes: self.tx_bytes,
            unanswered_for: self
                .initiation
                .as_ref()
                .map(|initiation| now.saturating_sub(initiation.begun_at))
                .filter(|since| *since >= REKEY_TIMEOUT),
        }
    }

    /// The device is up: a peer with a persistent keepalive begins by itself.
    pub(super) fn start<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        if self.persistent_keepalive.is_some() {
            self.initiate(context);
        }
    }

    /// Begins a handshake, unless one is in flight or has just been completed: a peer takes one begun too soon after another
    /// for a flood, and drops it.
    pub(super) fn initiate<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        self.update(context);
        if self.session.as_ref().is_some_and(|session| context.now < session.made_at + REKEY_TIMEOUT) {
            return;
        }
        self.wanted = true;
        self.send_initiation(false, context);
    }

    /// Points the peer elsewhere. Whatever waits for an answer from the former endpoint is asked of the new one at once.
    pub(super) fn set_endpoint<S: Sink>(&mut self, endpoint: SocketAddr, context: &mut Context<'_, S>) {
        let endpoint = canonical(endpoint);
        self.update(context);
        let changed = self.endpoint.replace(endpoint) != Some(endpoint);
        self.endpoint_set_at = Some(context.now);
        if self.initiation.is_some() {
            if changed {
                self.send_initiation(true, context);
            }
        } else if self.session.is_none() && (self.wanted || self.persistent_keepalive.is_some()) {
            self.send_initiation(false, context);
        }
    }

    /// Sends a packet, padded already; queues it while there is no session.
    pub(super) fn send<S: Sink>(&mut self, packet: &[u8], context: &mut Context<'_, S>) {
        self.update(context);
        match self.tunn.encapsulate(packet, context.scratch) {
            TunnResult::WriteToNetwork(message) => {
                if message[0] == DATA {
                    self.unanswered_since.get_or_insert(context.now);
                }
                self.transmit(message, context.now, context.sink);
            }
            _ => self.wanted = true,
        }
    }

    /// Answers a handshake initiation whose MAC has been checked.
    pub(super) fn receive_initiation<S: Sink>(
        &mut self,
        from: SocketAddr,
        message: &[u8],
        context: &mut Context<'_, S>,
    ) -> Verdict {
        self.update(context);
        let TunnResult::WriteToNetwork(response) = self.tunn.decapsulate(None, message, context.scratch) else {
            return Verdict::NotAuthentic;
        };
        self.authenticated(from, message.len(), context.now);
        // Its answer takes the place of whatever we had asked ourselves.
        self.initiation = None;
        self.session = Some(Session { made_at: context.now, initiator: false });
        let index = read_u32(response, 4);
        self.unconfirmed[index as usize % SESSIONS] = Some(index);
        self.transmit(response, context.now, context.sink);
        Verdict::Accepted
    }

    /// Completes a handshake with its response, whose MAC has been checked.
    pub(super) fn receive_response<S: Sink>(
        &mut self,
        from: SocketAddr,
        message: &[u8],
        context: &mut Context<'_, S>,
    ) -> Verdict {
        self.update(context);
        let TunnResult::WriteToNetwork(keepalive) = self.tunn.decapsulate(None, message, context.scratch) else {
            return Verdict::NotAuthentic;
        };
        self.authenticated(from, message.len(), context.now);
        // An answer to the initiation before the last leaves the last one in flight.
        let answered = read_u32(message, 8);
        self.initiation.take_if(|initiation| initiation.index == answered);
        self.session = Some(Session { made_at: context.now, initiator: true });
        self.transmit(keepalive, context.now, context.sink);
        self.established(context);
        Verdict::Accepted
    }

    /// Takes a cookie, to be shown with the next handshake message. No reason to roam: it is not authenticated by the
    /// peer's key.
    pub(super) fn receive_cookie<S: Sink>(&mut self, message: &[u8], context: &mut Context<'_, S>) -> Verdict {
        self.update(context);
        match self.tunn.decapsulate(None, message, context.scratch) {
            TunnResult::Done => Verdict::Accepted,
            _ => Verdict::NotAuthentic,
        }
    }

    /// Decrypts a data message and delivers the packet in it, if the peer may send from that source.
    pub(super) fn receive_data<S: Sink>(
        &mut self,
        from: SocketAddr,
        message: &[u8],
        allowed_ips: &AllowedIps,
        context: &mut Context<'_, S>,
    ) -> Verdict {
        // Beyond the limit no counter is valid, and `boringtun`'s arithmetic would overflow.
        if read_u64(message, 8) >= REJECT_AFTER_MESSAGES {
            return Verdict::NotAuthentic;
        }
        self.update(context);
        let mut has_content = true;
        let verdict = match self.tunn.decapsulate(None, message, context.scratch) {
            TunnResult::Done => {
                has_content = false;
                Verdict::Accepted
            }
            TunnResult::WriteToTunnelV4(packet, source) => {
                deliver(self.index, packet, source.into(), allowed_ips, context.sink)
            }
            TunnResult::WriteToTunnelV6(packet, source) => {
                deliver(self.index, packet, source.into(), allowed_ips, context.sink)
            }
            // The message itself is well formed, so it is what it holds that is not.
            TunnResult::Err(WireGuardError::InvalidPacket) => Verdict::Malformed,
            _ => return Verdict::NotAuthentic,
        };
        self.authenticated(from, message.len(), context.now);
        if has_content {
            self.owed_since.get_or_insert(context.now);
        }
        let index = read_u32(message, 4);
        if self.unconfirmed[index as usize % SESSIONS].take_if(|unconfirmed| *unconfirmed == index).is_some() {
            self.established(context);
        }
        verdict
    }

    /// When [`Self::tick`] is to be called next; `None` while nothing is pending.
    pub(super) fn next_tick(&self) -> Option<Duration> {
        let keys_expire = self.session.as_ref().map(|session| session.made_at + SESSION_GONE_AFTER);
        [
            keys_expire.map(|at| at.max(self.updated_at + CLOCK_STEP)),
            self.initiation.as_ref().map(|initiation| initiation.again_at),
            self.answer_overdue(),
            self.answer_due(),
            self.keepalive_due(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Does what is due by now.
    pub(super) fn tick<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        let now = context.now;
        if self.next_tick().is_none_or(|at| at > now) {
            return;
        }
        // Before it is sent again, whoever does that.
        if self.initiation.as_ref().is_some_and(|initiation| initiation.again_at <= now) {
            context.sink.handshake_unanswered();
        }
        // Gives up what has been tried for too long, and drops old keys; may do some of the rest.
        self.update(context);
        let due = |at: Option<Duration>| at.is_some_and(|at| at <= now);
        if self.initiation.as_ref().is_some_and(|initiation| initiation.again_at <= now) {
            self.send_initiation(true, context);
        }
        if due(self.answer_overdue()) {
            self.unanswered_since = None;
            self.send_initiation(false, context);
        }
        if due(self.answer_due()) {
            self.owed_since = None;
            self.send_keepalive(context);
        }
        if due(self.keepalive_due()) {
            self.persist(context);
        }
    }

    /// Tells `boringtun` the time, and sends what that makes due.
    fn update<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        if context.now < self.updated_at + CLOCK_STEP {
            return;
        }
        self.updated_at = context.now;
        self.session.take_if(|session| context.now >= session.made_at + SESSION_GONE_AFTER);
        match self.tunn.update_timers(context.scratch) {
            TunnResult::WriteToNetwork(message) => self.transmit(message, context.now, context.sink),
            TunnResult::Err(WireGuardError::ConnectionExpired) => self.given_up(context),
            _ => {}
        }
    }

    /// `boringtun` has given up. As with the kernel, the next packet or persistent keepalive begins again. At once does so an
    /// attempt that was not a full one, because it began shortly before all was reset for age, or because the endpoint is
    /// newer than it.
    fn given_up<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        let cut_short = self.initiation.take().is_some_and(|initiation| {
            let tried_since = self.endpoint_set_at.unwrap_or_default().max(initiation.begun_at);
            // Its beginning was as stale to `boringtun` as its time.
            context.now + CLOCK_STEP < tried_since + REKEY_ATTEMPT_TIME
        });
        self.session = None;
        self.unanswered_since = None;
        self.owed_since = None;
        self.unconfirmed = [None; SESSIONS];
        if cut_short {
            self.send_initiation(false, context);
        }
    }

    /// When a handshake is to find out why nothing answers what was sent.
    fn answer_overdue(&self) -> Option<Duration> {
        self.unanswered_since.map(|at| at + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT)
    }

    /// When the peer is to be told that what it sent has arrived.
    fn answer_due(&self) -> Option<Duration> {
        self.owed_since.map(|at| at + KEEPALIVE_TIMEOUT)
    }

    /// When the persistent keepalive is to be sent: after silence in both directions.
    fn keepalive_due(&self) -> Option<Duration> {
        self.endpoint?;
        self.persistent_keepalive.map(|interval| self.traffic_at + interval)
    }

    /// Sends the persistent keepalive, or begins the handshake that it needs.
    fn persist<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        // Whether or not it can be sent: the next one is due an interval later.
        self.traffic_at = context.now;
        let Some(session) = &self.session else {
            return self.send_initiation(false, context);
        };
        // `boringtun` renews a session for packets with content only; the kernel for any.
        let stale = session.initiator && context.now >= session.made_at + REKEY_AFTER_TIME;
        self.send_keepalive(context);
        if stale {
            self.send_initiation(false, context);
        }
    }

    fn send_keepalive<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        // Without a current session, as a responder that awaits confirmation has none, a keepalive would be queued.
        if self.tunn.time_since_last_handshake().is_some()
            && let TunnResult::WriteToNetwork(message) = self.tunn.encapsulate(&[], context.scratch)
        {
            self.transmit(message, context.now, context.sink);
        }
    }

    fn send_initiation<S: Sink>(&mut self, even_if_in_flight: bool, context: &mut Context<'_, S>) {
        let result = self.tunn.format_handshake_initiation(context.scratch, even_if_in_flight);
        if let TunnResult::WriteToNetwork(message) = result {
            self.transmit(message, context.now, context.sink);
        }
    }

    /// Sends a message to the peer, if it is known where that is.
    fn transmit<S: Sink>(&mut self, message: &[u8], now: Duration, sink: &mut S) {
        if message[0] == HANDSHAKE_INITIATION {
            self.wanted = true;
            // Its first bytes after the index are those of a random public key, and as good a jitter as any.
            let jitter = u16::from_le_bytes([message[8], message[9]]) % JITTER_MILLISECONDS;
            let again_at = now + REKEY_TIMEOUT + Duration::from_millis(jitter.into());
            let begun_at = self.initiation.as_ref().map_or(now, |initiation| initiation.begun_at);
            self.initiation = Some(Initiation { index: read_u32(message, 4), begun_at, again_at });
        }
        self.owed_since = None;
        self.traffic_at = now;
        if let Some(endpoint) = self.endpoint
            && sink.send(endpoint, message)
        {
            self.tx_bytes += message.len() as u64;
        }
    }

    /// The peer's key vouches for a message: it may roam, and it counts.
    fn authenticated(&mut self, from: SocketAddr, length: usize, now: Duration) {
        self.endpoint = Some(from);
        self.unanswered_since = None;
        self.traffic_at = now;
        self.rx_bytes += length as u64;
    }

    /// A handshake is complete: packets that waited for it are sent.
    fn established<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        self.wanted = false;
        self.handshake_at = Some(context.now);
        while let TunnResult::WriteToNetwork(message) = self.tunn.decapsulate(None, &[], context.scratch) {
            if message[0] == DATA {
                self.unanswered_since.get_or_insert(context.now);
            }
            self.transmit(message, context.now, context.sink);
        }
        context.sink.handshake_completed();
    }
}

/// Hands a decrypted packet to the TUN, if its source belongs to the peer that sent it.
fn deliver<S: Sink>(
    index: PeerIndex,
    packet: &[u8],
    source: IpAddr,
    allowed_ips: &AllowedIps,
    sink: &mut S,
) -> Verdict {
    /// The shortest IPv4 header (RFC 791 section 3.1), which `boringtun` does not ask the packet's own length to cover.
    const IPV4_HEADER: usize = 20;
    if packet.len() < IPV4_HEADER {
        return Verdict::Malformed;
    }
    if allowed_ips.peer_of(source) != Some(index) {
        return Verdict::SourceNotAllowed;
    }
    sink.deliver(packet);
    Verdict::Accepted
}

/// The interval of a persistent keepalive. 0 is none.
fn interval(seconds: Option<u16>) -> Option<Duration> {
    seconds.filter(|seconds| *seconds > 0).map(|seconds| Duration::from_secs(seconds.into()))
}

/// An IPv4 address mapped into IPv6 belongs to the IPv4 socket.
fn canonical(endpoint: SocketAddr) -> SocketAddr {
    match endpoint.ip().to_canonical() {
        address @ IpAddr::V4(_) => SocketAddr::new(address, endpoint.port()),
        // As it was, with its scope.
        IpAddr::V6(_) => endpoint,
    }
}

fn read_u32(message: &[u8], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&message[at..at + 4]);
    u32::from_le_bytes(bytes)
}

fn read_u64(message: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&message[at..at + 8]);
    u64::from_le_bytes(bytes)
}
