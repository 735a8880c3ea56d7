//! One peer: `boringtun`'s state machine, and the parts of the kernel's WireGuard that `boringtun` lacks or hides:
//! roaming, persistent keepalives without end, the handshake in flight, the time of the next timer, and counters.
//!
//! Properties of `boringtun` that this file deals with:
//!
//! - Its time only advances in `update_timers`. After a quiet period, every method calls [`PeerState::update`] first.
//!   Otherwise a new handshake would seem to have started long ago, and would be given up.
//! - All messages between two calls of that have the same time. So it can overlook that a keepalive is due, and the
//!   first packet after a silence seems unanswered at the next call. For this reason the calls are rare, and unanswered
//!   packets and due keepalives are tracked here, as in the kernel.
//! - It gives up after 90 s without an answer, and 540 s after the last handshake, until a new handshake is started.
//! - A responder may only send after the initiator has confirmed the session with a packet, so queued packets are sent
//!   then, and not together with the response.
//! - It has no jitter for retransmissions, and does not limit the number of a session's packets.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::{Tunn, TunnResult};

use super::allowed_ips::{AllowedIps, PeerIndex};
use super::device::Sink;
use super::wiped::Wiped;
use crate::keys::{PresharedKey, PublicKey};
use crate::wireguard::{PeerConfig, PeerStatus};

// Constants of the WireGuard paper, section 6.1.
const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// The exclusive upper bound of a retransmission's jitter in milliseconds (WireGuard paper, section 6.1).
const JITTER_MILLISECONDS: u16 = 334;

/// The maximum age of `boringtun`'s time when a message is processed.
const CLOCK_STEP: Duration = Duration::from_secs(1);

/// The age at which `boringtun` has certainly dropped a session, given that it rounds to its own time.
const SESSION_GONE_AFTER: Duration = REJECT_AFTER_TIME.saturating_add(CLOCK_STEP);

/// The size of `boringtun`'s ring of sessions, which the low bits of their index select.
const SESSIONS: usize = 8;

// Message types, the first byte of a message (WireGuard paper, section 5.4).
const HANDSHAKE_INITIATION: u8 = 1;
const DATA: u8 = 4;

/// The arguments of a peer's methods: the time of the event, a buffer for one message, and the output.
pub(super) struct Context<'a, S> {
    pub(super) now: Duration,
    pub(super) scratch: &'a mut [u8],
    pub(super) sink: &'a mut S,
}

/// The result of processing a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DatagramVerdict {
    /// It was authentic and was processed.
    Accepted,
    /// It was not authentic, or not fresh.
    NotAuthentic,
    /// It was authentic, but does not contain an IP packet.
    Malformed,
    /// It was authentic, but the source of its packet is not in the peer's AllowedIPs.
    SourceNotAllowed,
}

/// A handshake that this device has started and the peer has not answered yet.
struct Initiation {
    /// The session index that it offers.
    index: u32,
    /// The time of the first unanswered initiation.
    begun_at: Duration,
    /// The time of the next retransmission.
    again_at: Duration,
}

/// The times of the newest session.
struct SessionTimes {
    /// The time of its handshake.
    made_at: Duration,
    /// Whether this device was the initiator.
    initiator: bool,
}

/// A peer of the device.
pub(super) struct PeerState {
    index: PeerIndex,
    public_key: PublicKey,
    /// The preshared key. The outer option is none once the private key was replaced.
    preshared_key: Option<Option<PresharedKey>>,
    tunn: Wiped<Tunn>,
    persistent_keepalive: Option<Duration>,
    endpoint: Option<SocketAddr>,
    endpoint_set_at: Option<Duration>,
    /// Whether a session was needed and there was none. If so, a new endpoint starts another attempt.
    session_needed: bool,
    initiation: Option<Initiation>,
    /// The newest session, until all keys have expired.
    session: Option<SessionTimes>,
    /// Sessions as a responder that no packet of the initiator has confirmed yet.
    unconfirmed: [Option<u32>; SESSIONS],
    updated_at: Duration,
    /// The time of the first non-empty packet sent since the last received message.
    unanswered_since: Option<Duration>,
    /// The time of the first non-empty packet received since the last sent message.
    keepalive_owed_since: Option<Duration>,
    /// The time of the last message, sent or received.
    traffic_at: Duration,
    handshake_at: Option<Duration>,
    rx_bytes: u64,
    tx_bytes: u64,
}

impl PeerState {
    /// Creates a peer without a session. It takes over the endpoint and the counters of the peer `before` it, which has
    /// the same public key.
    pub(super) fn new(
        index: PeerIndex,
        config: &PeerConfig,
        tunn: Tunn,
        before: Option<&PeerState>,
        now: Duration,
    ) -> Self {
        let endpoint = config.endpoint.or(before.and_then(|before| before.endpoint));
        Self {
            index,
            public_key: config.public_key,
            preshared_key: Some(config.preshared_key.clone()),
            tunn: Wiped::new(tunn),
            persistent_keepalive: interval(config.persistent_keepalive),
            endpoint: endpoint.map(canonical),
            endpoint_set_at: endpoint.map(|_| now),
            session_needed: false,
            initiation: None,
            session: None,
            unconfirmed: [None; SESSIONS],
            updated_at: now,
            unanswered_since: None,
            keepalive_owed_since: None,
            traffic_at: now,
            handshake_at: None,
            rx_bytes: before.map_or(0, |before| before.rx_bytes),
            tx_bytes: before.map_or(0, |before| before.tx_bytes),
        }
    }

    pub(super) fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    /// Returns whether the peer's sessions use this preshared key.
    pub(super) fn has_key(&self, preshared_key: Option<&PresharedKey>) -> bool {
        self.preshared_key.as_ref().is_some_and(|key| key.as_ref() == preshared_key)
    }

    /// Makes [`Self::has_key`] return false, since the private key was replaced.
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

    /// Starts a handshake if the peer has a persistent keepalive.
    pub(super) fn start<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        if self.persistent_keepalive.is_some() {
            self.initiate(context);
        }
    }

    /// Starts a handshake, unless one is in flight or was just completed. Peers drop a handshake that follows another
    /// one too soon as a flood.
    pub(super) fn initiate<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        self.update(context);
        if self.session.as_ref().is_some_and(|session| context.now < session.made_at + REKEY_TIMEOUT) {
            return;
        }
        self.session_needed = true;
        self.send_initiation(false, context);
    }

    /// Replaces the endpoint. A handshake in flight is sent to the new endpoint at once.
    pub(super) fn set_endpoint<S: Sink>(&mut self, endpoint: SocketAddr, context: &mut Context<'_, S>) {
        let endpoint = canonical(endpoint);
        self.update(context);
        let changed = self.endpoint.replace(endpoint) != Some(endpoint);
        self.endpoint_set_at = Some(context.now);
        if self.initiation.is_some() {
            if changed {
                self.send_initiation(true, context);
            }
        } else if self.session.is_none() && (self.session_needed || self.persistent_keepalive.is_some()) {
            self.send_initiation(false, context);
        }
    }

    /// Sends a padded packet, or queues it while there is no session.
    pub(super) fn send<S: Sink>(&mut self, packet: &[u8], context: &mut Context<'_, S>) {
        self.update(context);
        match self.tunn.encapsulate(packet, context.scratch) {
            TunnResult::WriteToNetwork(message) => {
                if message[0] == DATA {
                    self.unanswered_since.get_or_insert(context.now);
                }
                self.transmit(message, context.now, context.sink);
            }
            _ => self.session_needed = true,
        }
    }

    /// Answers a handshake initiation whose MAC has been checked.
    pub(super) fn receive_initiation<S: Sink>(
        &mut self,
        from: SocketAddr,
        message: &[u8],
        context: &mut Context<'_, S>,
    ) -> DatagramVerdict {
        self.update(context);
        let TunnResult::WriteToNetwork(response) = self.tunn.decapsulate(None, message, context.scratch) else {
            return DatagramVerdict::NotAuthentic;
        };
        self.authenticated(from, message.len(), context.now);
        // The new session replaces a handshake of this device's own.
        self.initiation = None;
        self.session = Some(SessionTimes { made_at: context.now, initiator: false });
        let index = read_u32(response, 4);
        self.unconfirmed[index as usize % SESSIONS] = Some(index);
        self.transmit(response, context.now, context.sink);
        DatagramVerdict::Accepted
    }

    /// Completes a handshake with its response, whose MAC has been checked.
    pub(super) fn receive_response<S: Sink>(
        &mut self,
        from: SocketAddr,
        message: &[u8],
        context: &mut Context<'_, S>,
    ) -> DatagramVerdict {
        self.update(context);
        let TunnResult::WriteToNetwork(keepalive) = self.tunn.decapsulate(None, message, context.scratch) else {
            return DatagramVerdict::NotAuthentic;
        };
        self.authenticated(from, message.len(), context.now);
        // An answer to an earlier initiation leaves the last one in flight.
        let answered = read_u32(message, 8);
        self.initiation.take_if(|initiation| initiation.index == answered);
        self.session = Some(SessionTimes { made_at: context.now, initiator: true });
        self.transmit(keepalive, context.now, context.sink);
        self.established(context);
        DatagramVerdict::Accepted
    }

    /// Stores a cookie for the next handshake message. The endpoint stays, since the peer's key does not authenticate a
    /// cookie.
    pub(super) fn receive_cookie<S: Sink>(&mut self, message: &[u8], context: &mut Context<'_, S>) -> DatagramVerdict {
        self.update(context);
        match self.tunn.decapsulate(None, message, context.scratch) {
            TunnResult::Done => DatagramVerdict::Accepted,
            _ => DatagramVerdict::NotAuthentic,
        }
    }

    /// Decrypts a data message and delivers its packet if the source is in the peer's AllowedIPs.
    pub(super) fn receive_data<S: Sink>(
        &mut self,
        from: SocketAddr,
        message: &[u8],
        allowed_ips: &AllowedIps,
        context: &mut Context<'_, S>,
    ) -> DatagramVerdict {
        // Counters beyond the limit are invalid, and would overflow in `boringtun`.
        if read_u64(message, 8) >= REJECT_AFTER_MESSAGES {
            return DatagramVerdict::NotAuthentic;
        }
        self.update(context);
        let mut has_content = true;
        let verdict = match self.tunn.decapsulate(None, message, context.scratch) {
            TunnResult::Done => {
                has_content = false;
                DatagramVerdict::Accepted
            }
            TunnResult::WriteToTunnelV4(packet, source) => {
                deliver(self.index, packet, source.into(), allowed_ips, context.sink)
            }
            TunnResult::WriteToTunnelV6(packet, source) => {
                deliver(self.index, packet, source.into(), allowed_ips, context.sink)
            }
            // The message was parsed before, so its content is malformed.
            TunnResult::Err(WireGuardError::InvalidPacket) => DatagramVerdict::Malformed,
            _ => return DatagramVerdict::NotAuthentic,
        };
        self.authenticated(from, message.len(), context.now);
        if has_content {
            self.keepalive_owed_since.get_or_insert(context.now);
        }
        let index = read_u32(message, 4);
        if self.unconfirmed[index as usize % SESSIONS].take_if(|unconfirmed| *unconfirmed == index).is_some() {
            self.established(context);
        }
        verdict
    }

    /// Returns the time at which [`Self::tick`] must be called, or none while nothing is pending.
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

    /// Does what is due.
    pub(super) fn tick<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        let now = context.now;
        if self.next_tick().is_none_or(|at| at > now) {
            return;
        }
        // Reported before the retransmission, which `update` may do as well.
        if self.initiation.as_ref().is_some_and(|initiation| initiation.again_at <= now) {
            context.sink.handshake_unanswered();
        }
        // Gives up attempts that took too long, drops old keys, and may do some of the rest.
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
            self.keepalive_owed_since = None;
            self.send_keepalive(context);
        }
        if due(self.keepalive_due()) {
            self.persist(context);
        }
    }

    /// Advances `boringtun`'s time, and sends what is due by that.
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

    /// Resets the peer after `boringtun` has given up. As in the kernel, the next packet or persistent keepalive starts
    /// a new attempt. A new attempt starts at once if the last one was cut short: it started shortly before the reset,
    /// or the endpoint is newer than the attempt.
    fn given_up<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        let cut_short = self.initiation.take().is_some_and(|initiation| {
            let tried_since = self.endpoint_set_at.unwrap_or_default().max(initiation.begun_at);
            // To `boringtun`, the attempt may have started earlier by the age of its time.
            context.now + CLOCK_STEP < tried_since + REKEY_ATTEMPT_TIME
        });
        self.session = None;
        self.unanswered_since = None;
        self.keepalive_owed_since = None;
        self.unconfirmed = [None; SESSIONS];
        if cut_short {
            self.send_initiation(false, context);
        }
    }

    /// Returns the time of a new handshake because the peer does not answer packets.
    fn answer_overdue(&self) -> Option<Duration> {
        self.unanswered_since.map(|at| at + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT)
    }

    /// Returns the time of the keepalive that confirms received packets.
    fn answer_due(&self) -> Option<Duration> {
        self.keepalive_owed_since.map(|at| at + KEEPALIVE_TIMEOUT)
    }

    /// Returns the time of the next persistent keepalive, which follows silence in both directions.
    fn keepalive_due(&self) -> Option<Duration> {
        self.endpoint?;
        self.persistent_keepalive.map(|interval| self.traffic_at + interval)
    }

    /// Sends the persistent keepalive, or starts the handshake that it needs.
    fn persist<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        // The next one is due an interval later, even if this one cannot be sent.
        self.traffic_at = context.now;
        let Some(session) = &self.session else {
            return self.send_initiation(false, context);
        };
        // `boringtun` renews a session for non-empty packets only, the kernel for all packets.
        let stale = session.initiator && context.now >= session.made_at + REKEY_AFTER_TIME;
        self.send_keepalive(context);
        if stale {
            self.send_initiation(false, context);
        }
    }

    fn send_keepalive<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        // Without a current session, `boringtun` would queue the keepalive. A responder has none until it is confirmed.
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

    /// Sends a message to the peer if its endpoint is known.
    fn transmit<S: Sink>(&mut self, message: &[u8], now: Duration, sink: &mut S) {
        if message[0] == HANDSHAKE_INITIATION {
            self.session_needed = true;
            // The bytes after the index belong to an ephemeral public key, so they are random.
            let jitter = u16::from_le_bytes([message[8], message[9]]) % JITTER_MILLISECONDS;
            let again_at = now + REKEY_TIMEOUT + Duration::from_millis(jitter.into());
            let begun_at = self.initiation.as_ref().map_or(now, |initiation| initiation.begun_at);
            self.initiation = Some(Initiation { index: read_u32(message, 4), begun_at, again_at });
        }
        self.keepalive_owed_since = None;
        self.traffic_at = now;
        if let Some(endpoint) = self.endpoint
            && sink.send(endpoint, message)
        {
            self.tx_bytes += message.len() as u64;
        }
    }

    /// Accounts for an authenticated message, and updates the endpoint (roaming).
    fn authenticated(&mut self, from: SocketAddr, length: usize, now: Duration) {
        self.endpoint = Some(from);
        self.unanswered_since = None;
        self.traffic_at = now;
        self.rx_bytes += length as u64;
    }

    /// Sends queued packets after a completed handshake.
    fn established<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        self.session_needed = false;
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

/// Delivers a decrypted packet if its source is in the AllowedIPs of the peer that sent it.
fn deliver<S: Sink>(
    index: PeerIndex,
    packet: &[u8],
    source: IpAddr,
    allowed_ips: &AllowedIps,
    sink: &mut S,
) -> DatagramVerdict {
    /// The minimum length of an IPv4 header (RFC 791 section 3.1), which `boringtun` does not check.
    const IPV4_HEADER: usize = 20;
    if packet.len() < IPV4_HEADER {
        return DatagramVerdict::Malformed;
    }
    if allowed_ips.peer_of(source) != Some(index) {
        return DatagramVerdict::SourceNotAllowed;
    }
    sink.deliver(packet);
    DatagramVerdict::Accepted
}

/// Returns the interval of a persistent keepalive. 0 means none.
fn interval(seconds: Option<u16>) -> Option<Duration> {
    seconds.filter(|seconds| *seconds > 0).map(|seconds| Duration::from_secs(seconds.into()))
}

/// Converts an IPv4-mapped IPv6 address to IPv4, for the IPv4 socket.
fn canonical(endpoint: SocketAddr) -> SocketAddr {
    match endpoint.ip().to_canonical() {
        address @ IpAddr::V4(_) => SocketAddr::new(address, endpoint.port()),
        // Unchanged, with its scope ID.
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
