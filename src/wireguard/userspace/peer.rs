//! One peer: its handshakes, its sessions and its timers (WireGuard paper, section 6), as in the kernel's WireGuard.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::allowed_ips::{AllowedIps, PeerIndex};
use super::device::Sink;
use super::ip;
use super::noise::{
    COOKIE_REPLY, DATA_HEADER, DATA_OVERHEAD, INITIATION, Initiator, MacWriter, REKEY_AFTER_MESSAGES, RESPONSE,
    Responder, Session, SessionKeys, Timestamp,
};
use super::sessions::{Active, REJECT_AFTER_TIME, Sessions};
use crate::keys::{PresharedKey, PrivateKey, PublicKey};
use crate::wireguard::{PeerConfig, PeerStatus};

// Constants of the WireGuard paper, section 6.1.
const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// The exclusive upper bound of a retransmission's jitter in milliseconds (WireGuard paper, section 6.1).
const JITTER_MILLISECONDS: u16 = 334;

/// The least time between two initiations of a peer that are answered, as in the kernel.
const INITIATION_INTERVAL: Duration = Duration::from_millis(20);

/// The number of packets that wait for a session, as in the kernel. After that the oldest is dropped.
const MAX_QUEUED: usize = 128;

/// The bits of a session index that are free for a peer's sessions. The others identify the peer.
pub(super) const SESSION_INDEX_BITS: u32 = 8;

/// The arguments of a peer's methods: the time of the event, the device's key, a buffer for one message, and the
/// output.
pub(super) struct Context<'a, S> {
    pub(super) now: Duration,
    pub(super) private_key: &'a PrivateKey,
    pub(super) scratch: &'a mut [u8],
    pub(super) sink: &'a mut S,
}

/// The result of processing a datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DatagramVerdict {
    /// It was authentic and was processed.
    Accepted,
    /// It was authentic, and has a packet for the TUN in this part.
    Packet(Range<usize>),
    /// It was not authentic, or not fresh.
    NotAuthentic,
    /// It was authentic, but does not contain an IP packet.
    Malformed,
    /// It was authentic, but the source of its packet is not in the peer's AllowedIPs.
    SourceNotAllowed,
}

/// A newer initiation than the one that was answered. The peer may answer it as well, and then knows that session only.
struct Overtaken {
    initiator: Initiator,
    since: Duration,
}

/// A handshake that this device has started and the peer has not answered yet.
struct Attempt {
    initiator: Initiator,
    /// The initiation before this one, which the peer may still answer.
    earlier: Option<Initiator>,
    /// The time of the first unanswered initiation.
    begun_at: Duration,
    /// The time of the next retransmission.
    again_at: Duration,
}

/// What it takes to seal and send packets.
pub(super) struct Reserved {
    pub(super) session: Arc<Session>,
    /// The counter of the first packet. Each of the others has the next one.
    pub(super) first: u64,
    pub(super) endpoint: SocketAddr,
}

/// A peer of the device.
pub(super) struct PeerState {
    index: PeerIndex,
    public_key: PublicKey,
    preshared_key: Option<PresharedKey>,
    macs: MacWriter,
    persistent_keepalive: Option<Duration>,
    endpoint: Option<SocketAddr>,
    endpoint_set_at: Duration,
    /// Whether a session was needed and there was none. If so, a new endpoint starts an attempt.
    session_needed: bool,
    attempt: Option<Attempt>,
    overtaken: Option<Overtaken>,
    /// The time of the last message of a handshake to the peer.
    handshake_sent_at: Option<Duration>,
    sessions: Sessions,
    /// Whether the current session was renewed because it was about to expire, which is tried once.
    is_renewed: bool,
    /// The upper bits of all session indices of the peer, and the lower bits of the last one.
    index_base: u32,
    last_session: u32,
    /// The timestamp of the last initiation of the peer, and when it came. An earlier one is a replay.
    last_initiation: Option<(Timestamp, Duration)>,
    /// Padded packets that wait for a session.
    queue: VecDeque<Box<[u8]>>,
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
    /// the same public key, and its last timestamp. `index_base` has the upper bits of its session indices.
    pub(super) fn new(
        index: PeerIndex,
        index_base: u32,
        config: &PeerConfig,
        before: Option<&PeerState>,
        now: Duration,
    ) -> Self {
        let endpoint = config.endpoint.or(before.and_then(|before| before.endpoint));
        Self {
            index,
            public_key: config.public_key,
            preshared_key: config.preshared_key.clone(),
            macs: MacWriter::new(&config.public_key),
            persistent_keepalive: interval(config.persistent_keepalive),
            endpoint: endpoint.map(canonical),
            endpoint_set_at: now,
            session_needed: false,
            attempt: None,
            overtaken: None,
            handshake_sent_at: None,
            sessions: Sessions::default(),
            is_renewed: false,
            index_base,
            last_session: before.map_or(0, |before| before.last_session),
            last_initiation: before.and_then(|before| before.last_initiation),
            queue: VecDeque::new(),
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

    /// Returns whether the peer has this preshared key.
    pub(super) fn has_key(&self, preshared_key: Option<&PresharedKey>) -> bool {
        self.preshared_key.as_ref() == preshared_key
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
                .attempt
                .as_ref()
                .map(|attempt| now.saturating_sub(attempt.begun_at))
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
        if self.sessions.last_made().is_some_and(|made_at| context.now < made_at + REKEY_TIMEOUT) {
            return;
        }
        self.request_session(context);
    }

    /// Replaces the endpoint. A handshake in flight is sent to the new endpoint at once.
    pub(super) fn set_endpoint<S: Sink>(&mut self, endpoint: SocketAddr, context: &mut Context<'_, S>) {
        let endpoint = canonical(endpoint);
        let changed = self.endpoint.replace(endpoint) != Some(endpoint);
        self.endpoint_set_at = context.now;
        if self.attempt.is_some() {
            if changed {
                self.send_initiation(context);
            }
        } else if self.sessions.last_made().is_none() && (self.session_needed || self.persistent_keepalive.is_some()) {
            self.send_initiation(context);
        }
    }

    /// Reserves the counters of a number of packets, which the caller seals and sends. `bytes` is the length of their
    /// messages. None if there is no session or no endpoint: then the packets go one by one by [`Self::send`].
    pub(super) fn reserve<S: Sink>(
        &mut self,
        count: u64,
        bytes: u64,
        context: &mut Context<'_, S>,
    ) -> Option<Reserved> {
        let endpoint = self.endpoint?;
        let active = self.sessions.current(context.now)?.clone();
        let first = active.session.reserve(count)?;
        self.unanswered_since.get_or_insert(context.now);
        self.keepalive_owed_since = None;
        self.traffic_at = context.now;
        self.tx_bytes += bytes;
        self.renew_if_old(&active, context);
        Some(Reserved { session: active.session, first, endpoint })
    }

    /// Notes that some bytes of reserved packets were not sent.
    pub(super) fn not_sent(&mut self, bytes: u64) {
        self.tx_bytes = self.tx_bytes.saturating_sub(bytes);
    }

    /// Sends a padded packet, or queues it while there is no session.
    pub(super) fn send<S: Sink>(&mut self, packet: &[u8], context: &mut Context<'_, S>) {
        if !self.send_data(packet, context) {
            if self.queue.len() == MAX_QUEUED {
                self.queue.pop_front();
            }
            self.queue.push_back(packet.into());
            self.request_session(context);
        }
    }

    /// Answers a handshake initiation of this peer, whose MAC has been checked.
    pub(super) fn receive_initiation<S: Sink>(
        &mut self,
        from: SocketAddr,
        responder: Responder,
        context: &mut Context<'_, S>,
    ) -> DatagramVerdict {
        let timestamp = responder.timestamp();
        let is_replay_or_flood = |(last, at): (Timestamp, Duration)| {
            timestamp <= last || context.now < at.saturating_add(INITIATION_INTERVAL)
        };
        if self.last_initiation.is_some_and(is_replay_or_flood) {
            return DatagramVerdict::NotAuthentic;
        }
        let (index, mut response) = (self.new_index(), [0; RESPONSE]);
        let session = responder
            .respond(self.preshared_key.as_ref(), index, &mut response)
            .and_then(|made| self.session(made, index, false, context.now));
        let Some(session) = session else { return DatagramVerdict::NotAuthentic };
        self.last_initiation = Some((timestamp, context.now));
        self.authenticated(from, INITIATION, context.now);
        self.sessions.add_answered(session);
        self.macs.write(&mut response, context.now);
        self.handshake_sent_at = Some(context.now);
        self.transmit(&response, context.now, context.sink);
        DatagramVerdict::Accepted
    }

    /// Returns whether a handshake with this session index has begun and was not answered yet.
    pub(super) fn awaits(&mut self, index: u32) -> bool {
        Self::begun(&mut self.attempt, &mut self.overtaken).any(|initiator| initiator.index() == index)
    }

    /// Completes a handshake with its response, whose MAC has been checked.
    pub(super) fn receive_response<S: Sink>(
        &mut self,
        from: SocketAddr,
        response: &[u8; RESPONSE],
        context: &mut Context<'_, S>,
    ) -> DatagramVerdict {
        let now = context.now;
        self.overtaken.take_if(|overtaken| now >= overtaken.since + REKEY_TIMEOUT);
        let preshared_key = self.preshared_key.as_ref();
        let made = Self::begun(&mut self.attempt, &mut self.overtaken)
            .find_map(|initiator| initiator.complete(preshared_key, response).map(|made| (made, initiator.index())));
        let session = made.and_then(|(made, index)| self.session(made, index, true, now));
        let Some(session) = session else { return DatagramVerdict::NotAuthentic };
        self.authenticated(from, RESPONSE, context.now);
        let index = session.session.index();
        self.sessions.add_begun(session);
        let newer = self.attempt.take().map(|attempt| attempt.initiator).filter(|newer| newer.index() != index);
        self.overtaken = newer.map(|initiator| Overtaken { initiator, since: now });
        self.is_renewed = false;
        // The peer may only send after it has received something.
        if self.queue.is_empty() {
            self.send_data(&[], context);
        }
        self.established(context);
        DatagramVerdict::Accepted
    }

    /// Stores a cookie for the next handshake message. The endpoint stays, since the peer's key does not authenticate a
    /// cookie.
    pub(super) fn receive_cookie(&mut self, reply: &[u8; COOKIE_REPLY], now: Duration) -> DatagramVerdict {
        match self.macs.take_cookie(reply, now) {
            true => DatagramVerdict::Accepted,
            false => DatagramVerdict::NotAuthentic,
        }
    }

    /// Decrypts a data message in place, and says where in it the packet is, if the source is in the peer's AllowedIPs.
    pub(super) fn receive_data<S: Sink>(
        &mut self,
        from: SocketAddr,
        (receiver, counter): (u32, u64),
        message: &mut [u8],
        allowed_ips: &AllowedIps,
        context: &mut Context<'_, S>,
    ) -> DatagramVerdict {
        let length = message.len();
        let Some(active) = self.sessions.by_index(receiver, context.now).cloned() else {
            return DatagramVerdict::NotAuthentic;
        };
        let Some(packet) = active.session.open(counter, message) else { return DatagramVerdict::NotAuthentic };
        if !active.session.accept(counter) {
            return DatagramVerdict::NotAuthentic;
        }
        self.authenticated(from, length, context.now);
        if self.sessions.confirm(receiver) {
            self.is_renewed = false;
            self.established(context);
        }
        self.renew_before_expiry(&active, context);
        if packet.is_empty() {
            return DatagramVerdict::Accepted;
        }
        self.keepalive_owed_since.get_or_insert(context.now);
        let Some((source, length)) = ip::source_and_length(packet) else { return DatagramVerdict::Malformed };
        if allowed_ips.peer_of(source) != Some(self.index) {
            return DatagramVerdict::SourceNotAllowed;
        }
        DatagramVerdict::Packet(DATA_HEADER..DATA_HEADER + length)
    }

    /// Returns the time at which [`Self::tick`] must be called, or none while nothing is pending.
    pub(super) fn next_tick(&self) -> Option<Duration> {
        [
            self.sessions.next_expiry(),
            self.attempt.as_ref().map(|attempt| attempt.again_at),
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
        self.sessions.expire(now);
        if self.attempt.as_ref().is_some_and(|attempt| attempt.again_at <= now) {
            context.sink.handshake_unanswered();
            self.try_again(context);
        }
        let due = |at: Option<Duration>| at.is_some_and(|at| at <= now);
        if due(self.answer_overdue()) {
            self.unanswered_since = None;
            self.request_session(context);
        }
        if due(self.answer_due()) {
            self.keepalive_owed_since = None;
            self.send_data(&[], context);
        }
        if due(self.keepalive_due()) {
            // The next one is due an interval later, even if this one cannot be sent.
            self.traffic_at = now;
            if !self.send_data(&[], context) {
                self.request_session(context);
            }
        }
    }

    /// Repeats an unanswered initiation, or gives the attempt up: the next packet or persistent keepalive starts
    /// another one. A new endpoint gets a full attempt.
    fn try_again<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        let tried_since = self.attempt.as_ref().map(|attempt| attempt.begun_at.max(self.endpoint_set_at));
        if tried_since.is_some_and(|since| context.now < since + REKEY_ATTEMPT_TIME) {
            return self.send_initiation(context);
        }
        self.attempt = None;
        self.queue.clear();
        self.unanswered_since = None;
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

    /// Starts a handshake, unless one was started a short time ago.
    fn request_session<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        self.session_needed = true;
        if self.handshake_sent_at.is_none_or(|sent_at| context.now >= sent_at + REKEY_TIMEOUT) {
            self.send_initiation(context);
        }
    }

    /// Sends an initiation, if the endpoint is known.
    fn send_initiation<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        self.session_needed = true;
        if self.endpoint.is_none() {
            return;
        }
        let (index, mut message, now) = (self.new_index(), [0; INITIATION], context.now);
        let timestamp = Timestamp::now();
        let Some(initiator) = Initiator::begin(context.private_key, &self.public_key, index, timestamp, &mut message)
        else {
            // The kernel has no random bytes, which does not happen after it was seeded.
            return;
        };
        // These bytes belong to an ephemeral public key, so they are random.
        let jitter = u16::from_le_bytes([message[8], message[9]]) % JITTER_MILLISECONDS;
        let former = self.attempt.take();
        self.attempt = Some(Attempt {
            initiator,
            begun_at: former.as_ref().map_or(now, |attempt| attempt.begun_at),
            earlier: former.map(|attempt| attempt.initiator),
            again_at: now + REKEY_TIMEOUT + Duration::from_millis(jitter.into()),
        });
        self.macs.write(&mut message, now);
        self.handshake_sent_at = Some(now);
        self.transmit(&message, now, context.sink);
    }

    /// Returns the handshakes that the peer may answer.
    fn begun<'a>(
        attempt: &'a mut Option<Attempt>,
        overtaken: &'a mut Option<Overtaken>,
    ) -> impl Iterator<Item = &'a mut Initiator> {
        let attempt = attempt.iter_mut().flat_map(|attempt| [Some(&mut attempt.initiator), attempt.earlier.as_mut()]);
        attempt.flatten().chain(overtaken.iter_mut().map(|overtaken| &mut overtaken.initiator))
    }

    /// Returns a session index that none of the peer's sessions has.
    fn new_index(&mut self) -> u32 {
        let begun = Self::begun(&mut self.attempt, &mut self.overtaken);
        let of_handshakes = begun.map(|initiator| initiator.index());
        let used: Vec<u32> = of_handshakes.chain(self.sessions.all().map(|active| active.session.index())).collect();
        loop {
            self.last_session = self.last_session.wrapping_add(1) % (1 << SESSION_INDEX_BITS);
            let index = self.index_base | self.last_session;
            if !used.contains(&index) {
                return index;
            }
        }
    }

    fn session(
        &self,
        (keys, remote): (SessionKeys, u32),
        local: u32,
        is_initiator: bool,
        now: Duration,
    ) -> Option<Active> {
        let session = Arc::new(Session::new(&keys, local, remote)?);
        Some(Active { session, made_at: now, is_initiator })
    }

    /// Sends a padded packet in the current session. Returns false if there is none. An empty one is a keepalive.
    fn send_data<S: Sink>(&mut self, packet: &[u8], context: &mut Context<'_, S>) -> bool {
        let Some(active) = self.sessions.current(context.now).cloned() else { return false };
        let Some(counter) = active.session.reserve(1) else { return false };
        let message = &mut context.scratch[..packet.len() + DATA_OVERHEAD];
        message[DATA_HEADER..DATA_HEADER + packet.len()].copy_from_slice(packet);
        if !active.session.seal(counter, message) {
            return false;
        }
        if !packet.is_empty() {
            self.unanswered_since.get_or_insert(context.now);
        }
        let length = message.len();
        let now = context.now;
        self.transmit(&context.scratch[..length], now, context.sink);
        self.renew_if_old(&active, context);
        true
    }

    /// Renews a session that is sent on.
    fn renew_if_old<S: Sink>(&mut self, active: &Active, context: &mut Context<'_, S>) {
        let is_old = active.age(context.now) >= REKEY_AFTER_TIME || active.session.sent() > REKEY_AFTER_MESSAGES;
        if active.is_initiator && is_old {
            self.request_session(context);
        }
    }

    /// Renews a session that is about to expire and is received on, but not sent on.
    fn renew_before_expiry<S: Sink>(&mut self, active: &Active, context: &mut Context<'_, S>) {
        const LAST_CHANCE: Duration = REJECT_AFTER_TIME.saturating_sub(KEEPALIVE_TIMEOUT).saturating_sub(REKEY_TIMEOUT);
        if active.is_initiator && !self.is_renewed && active.age(context.now) >= LAST_CHANCE {
            self.is_renewed = true;
            self.request_session(context);
        }
    }

    /// Sends a message to the peer if its endpoint is known.
    fn transmit<S: Sink>(&mut self, message: &[u8], now: Duration, sink: &mut S) {
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
        self.attempt = None;
        self.handshake_at = Some(context.now);
        for packet in std::mem::take(&mut self.queue) {
            self.send_data(&packet, context);
        }
        context.sink.handshake_completed();
    }
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
