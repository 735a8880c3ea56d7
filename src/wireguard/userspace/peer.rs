//! A peer: `boringtun`'s state machine, and around it what the kernel's WireGuard has and `boringtun` lacks or hides:
//! roaming, persistent keepalives that never stop, pending handshakes, timers, and counters.
//!
//! Properties of `boringtun` that this file has to handle:
//!
//! - Its time only advances in `update_timers`. So [`PeerState::update`] must be called before anything that follows a
//!   quiet time. Otherwise a new handshake counts as one that began long ago, and is given up.
//! - Between two such calls, everything that was sent and received has the same time. So it may not notice that a reply
//!   is due, and the first packet after a silence looks unanswered at the next call. So the calls are rare, and this
//!   file tracks which side owes a reply, as the kernel does.
//! - It gives up after 90 s without a response, and 540 s after the last handshake. It then stays idle until a new
//!   handshake is requested.
//! - As a responder it may only send once the initiator has confirmed the session with a packet. So queued packets are
//!   sent then, and not together with the response.
//! - It has no jitter for retransmissions, and does not limit the number of packets of a session.

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

/// The upper bound of a retransmission's jitter, in milliseconds (WireGuard paper, section 6.1).
const JITTER_MILLISECONDS: u16 = 334;

/// How far `boringtun`'s time may lag behind.
const CLOCK_STEP: Duration = Duration::from_secs(1);

/// The age at which `boringtun` has certainly dropped a session, as its time may lag behind.
const SESSION_GONE_AFTER: Duration = REJECT_AFTER_TIME.saturating_add(CLOCK_STEP);

/// The size of `boringtun`'s ring of sessions, which is indexed by the low bits of a session index.
const SESSIONS: usize = 8;

// Message types, the first byte of a message (WireGuard paper, section 5.4).
const HANDSHAKE_INITIATION: u8 = 1;
const DATA: u8 = 4;

/// What methods of a peer need: the time of the event, a buffer for one message, and the sink.
pub(super) struct Context<'a, S> {
    pub(super) now: Duration,
    pub(super) scratch: &'a mut [u8],
    pub(super) sink: &'a mut S,
}

/// The result of processing a datagram from a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It was authentic and valid.
    Accepted,
    /// It was not authentic, or not fresh.
    NotAuthentic,
    /// It was authentic, but does not contain an IP packet.
    Malformed,
    /// It was authentic, but the source of its packet is not among the peer's AllowedIPs.
    SourceNotAllowed,
}

/// A handshake that this device has begun, and that has no response yet.
struct Initiation {
    /// The session index in it.
    index: u32,
    /// When its first message was sent.
    begun_at: Duration,
    /// When to send it again.
    retry_at: Duration,
}

/// The age and role of a session.
struct SessionInfo {
    /// When it was established.
    established_at: Duration,
    /// Whether this device has initiated it.
    initiator: bool,
}

/// A peer and its timers.
pub(super) struct PeerState {
    index: PeerIndex,
    public_key: PublicKey,
    /// The preshared key of its sessions; the outer `None` means that the private key has changed since.
    preshared_key: Option<Option<PresharedKey>>,
    tunn: Wiped<Tunn>,
    persistent_keepalive: Option<Duration>,
    endpoint: Option<SocketAddr>,
    endpoint_set_at: Option<Duration>,
    /// Whether a session was needed and did not exist, so that a new endpoint is a reason to try again.
    session_needed: bool,
    initiation: Option<Initiation>,
    /// The newest session, until all keys have expired.
    session: Option<SessionInfo>,
    /// The indices of sessions where this device is the responder and that no packet has confirmed yet.
    unconfirmed: [Option<u32>; SESSIONS],
    updated_at: Duration,
    /// When the first data packet was sent after the last message was received.
    unanswered_since: Option<Duration>,
    /// When the first data packet was received after the last message was sent.
    reply_owed_since: Option<Duration>,
    /// When the last message was sent or received.
    traffic_at: Duration,
    handshake_at: Option<Duration>,
    rx_bytes: u64,
    tx_bytes: u64,
}

impl PeerState {
    /// Returns a peer without a session. It takes over the endpoint and the counters of a former peer with the same
    /// key.
    pub(super) fn new(
        index: PeerIndex,
        config: &PeerConfig,
        tunn: Tunn,
        former: Option<&PeerState>,
        now: Duration,
    ) -> Self {
        let endpoint = config.endpoint.or(former.and_then(|former| former.endpoint));
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
            reply_owed_since: None,
            traffic_at: now,
            handshake_at: None,
            rx_bytes: former.map_or(0, |former| former.rx_bytes),
            tx_bytes: former.map_or(0, |former| former.tx_bytes),
        }
    }

    pub(super) fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    /// Returns whether its sessions use this preshared key, and the current private key.
    pub(super) fn has_preshared_key(&self, preshared_key: Option<&PresharedKey>) -> bool {
        self.preshared_key.as_ref().is_some_and(|key| key.as_ref() == preshared_key)
    }

    /// Notes that the private key has changed: [`Self::has_preshared_key`] is false from now on.
    pub(super) fn invalidate_keys(&mut self) {
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

    /// Begins a handshake if the peer has a persistent keepalive.
    pub(super) fn start<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        if self.persistent_keepalive.is_some() {
            self.initiate(context);
        }
    }

    /// Begins a handshake, unless one is pending or has just been completed: peers treat two handshakes in quick
    /// succession as a flood, and drop the second.
    pub(super) fn initiate<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        self.update(context);
        if self.session.as_ref().is_some_and(|session| context.now < session.established_at + REKEY_TIMEOUT) {
            return;
        }
        self.session_needed = true;
        self.send_initiation(false, context);
    }

    /// Replaces the endpoint. A pending handshake is sent to the new endpoint at once.
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

    /// Responds to a handshake initiation whose MAC has been checked.
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
        self.on_authenticated(from, message.len(), context.now);
        // The response replaces an own pending handshake.
        self.initiation = None;
        self.session = Some(SessionInfo { established_at: context.now, initiator: false });
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
        self.on_authenticated(from, message.len(), context.now);
        // A response to an earlier initiation leaves the last one pending.
        let answered = read_u32(message, 8);
        self.initiation.take_if(|initiation| initiation.index == answered);
        self.session = Some(SessionInfo { established_at: context.now, initiator: true });
        self.transmit(keepalive, context.now, context.sink);
        self.on_established(context);
        Verdict::Accepted
    }

    /// Stores a cookie for the next handshake message. The endpoint stays, as the message is not authenticated by the
    /// peer's key.
    pub(super) fn receive_cookie<S: Sink>(&mut self, message: &[u8], context: &mut Context<'_, S>) -> Verdict {
        self.update(context);
        match self.tunn.decapsulate(None, message, context.scratch) {
            TunnResult::Done => Verdict::Accepted,
            _ => Verdict::NotAuthentic,
        }
    }

    /// Decrypts a data message, and delivers the packet in it if its source is among the peer's AllowedIPs.
    pub(super) fn receive_data<S: Sink>(
        &mut self,
        from: SocketAddr,
        message: &[u8],
        allowed_ips: &AllowedIps,
        context: &mut Context<'_, S>,
    ) -> Verdict {
        // Counters above the limit are not valid, and would overflow in `boringtun`.
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
            // The message itself is well-formed, so its content is not.
            TunnResult::Err(WireGuardError::InvalidPacket) => Verdict::Malformed,
            _ => return Verdict::NotAuthentic,
        };
        self.on_authenticated(from, message.len(), context.now);
        if has_content {
            self.reply_owed_since.get_or_insert(context.now);
        }
        let index = read_u32(message, 4);
        if self.unconfirmed[index as usize % SESSIONS].take_if(|unconfirmed| *unconfirmed == index).is_some() {
            self.on_established(context);
        }
        verdict
    }

    /// Returns when [`Self::tick`] must be called next; `None` while nothing is pending.
    pub(super) fn next_tick(&self) -> Option<Duration> {
        let keys_expire = self.session.as_ref().map(|session| session.established_at + SESSION_GONE_AFTER);
        [
            keys_expire.map(|at| at.max(self.updated_at + CLOCK_STEP)),
            self.initiation.as_ref().map(|initiation| initiation.retry_at),
            self.unanswered_due(),
            self.reply_due(),
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
        // Reported before the message is sent again, here or by `boringtun`.
        if self.initiation.as_ref().is_some_and(|initiation| initiation.retry_at <= now) {
            context.sink.handshake_unanswered();
        }
        // Gives up old attempts and drops old keys, and may already do some of what follows.
        self.update(context);
        let due = |at: Option<Duration>| at.is_some_and(|at| at <= now);
        if self.initiation.as_ref().is_some_and(|initiation| initiation.retry_at <= now) {
            self.send_initiation(true, context);
        }
        if due(self.unanswered_due()) {
            self.unanswered_since = None;
            self.send_initiation(false, context);
        }
        if due(self.reply_due()) {
            self.reply_owed_since = None;
            self.send_keepalive(context);
        }
        if due(self.keepalive_due()) {
            self.send_persistent_keepalive(context);
        }
    }

    /// Advances `boringtun`'s time, and sends what is due by that.
    fn update<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        if context.now < self.updated_at + CLOCK_STEP {
            return;
        }
        self.updated_at = context.now;
        self.session.take_if(|session| context.now >= session.established_at + SESSION_GONE_AFTER);
        match self.tunn.update_timers(context.scratch) {
            TunnResult::WriteToNetwork(message) => self.transmit(message, context.now, context.sink),
            TunnResult::Err(WireGuardError::ConnectionExpired) => self.on_given_up(context),
            _ => {}
        }
    }

    /// Called when `boringtun` has given up. As in the kernel, the next packet or persistent keepalive begins a new
    /// attempt. An attempt that was cut short is repeated at once: it began shortly before the old session was reset,
    /// or before the endpoint was replaced.
    fn on_given_up<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        let cut_short = self.initiation.take().is_some_and(|initiation| {
            let tried_since = self.endpoint_set_at.unwrap_or_default().max(initiation.begun_at);
            // `boringtun`'s time of its beginning may have lagged behind as well.
            context.now + CLOCK_STEP < tried_since + REKEY_ATTEMPT_TIME
        });
        self.session = None;
        self.unanswered_since = None;
        self.reply_owed_since = None;
        self.unconfirmed = [None; SESSIONS];
        if cut_short {
            self.send_initiation(false, context);
        }
    }

    /// Returns when to begin a handshake because sent packets are unanswered.
    fn unanswered_due(&self) -> Option<Duration> {
        self.unanswered_since.map(|at| at + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT)
    }

    /// Returns when to send a keepalive because a received packet is unanswered.
    fn reply_due(&self) -> Option<Duration> {
        self.reply_owed_since.map(|at| at + KEEPALIVE_TIMEOUT)
    }

    /// Returns when to send the persistent keepalive: after silence in both directions.
    fn keepalive_due(&self) -> Option<Duration> {
        self.endpoint?;
        self.persistent_keepalive.map(|interval| self.traffic_at + interval)
    }

    /// Sends the persistent keepalive, or begins the handshake that it needs.
    fn send_persistent_keepalive<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        // The next one is due an interval later, even if this one cannot be sent.
        self.traffic_at = context.now;
        let Some(session) = &self.session else {
            return self.send_initiation(false, context);
        };
        // `boringtun` renews a session for data packets only, the kernel for any message.
        let is_old = session.initiator && context.now >= session.established_at + REKEY_AFTER_TIME;
        self.send_keepalive(context);
        if is_old {
            self.send_initiation(false, context);
        }
    }

    fn send_keepalive<S: Sink>(&mut self, context: &mut Context<'_, S>) {
        // Without a current session, a keepalive would be queued. A responder that waits for confirmation has none.
        if self.tunn.time_since_last_handshake().is_some()
            && let TunnResult::WriteToNetwork(message) = self.tunn.encapsulate(&[], context.scratch)
        {
            self.transmit(message, context.now, context.sink);
        }
    }

    fn send_initiation<S: Sink>(&mut self, even_if_pending: bool, context: &mut Context<'_, S>) {
        let result = self.tunn.format_handshake_initiation(context.scratch, even_if_pending);
        if let TunnResult::WriteToNetwork(message) = result {
            self.transmit(message, context.now, context.sink);
        }
    }

    /// Sends a message to the peer if its endpoint is known.
    fn transmit<S: Sink>(&mut self, message: &[u8], now: Duration, sink: &mut S) {
        if message[0] == HANDSHAKE_INITIATION {
            self.session_needed = true;
            // The bytes after the index are those of a random public key, which serve as jitter.
            let jitter = u16::from_le_bytes([message[8], message[9]]) % JITTER_MILLISECONDS;
            let retry_at = now + REKEY_TIMEOUT + Duration::from_millis(jitter.into());
            let begun_at = self.initiation.as_ref().map_or(now, |initiation| initiation.begun_at);
            self.initiation = Some(Initiation { index: read_u32(message, 4), begun_at, retry_at });
        }
        self.reply_owed_since = None;
        self.traffic_at = now;
        if let Some(endpoint) = self.endpoint
            && sink.send(endpoint, message)
        {
            self.tx_bytes += message.len() as u64;
        }
    }

    /// Called for each authentic message: updates the endpoint (roaming) and the counters.
    fn on_authenticated(&mut self, from: SocketAddr, length: usize, now: Duration) {
        self.endpoint = Some(from);
        self.unanswered_since = None;
        self.traffic_at = now;
        self.rx_bytes += length as u64;
    }

    /// Called when a handshake is completed: sends the queued packets.
    fn on_established<S: Sink>(&mut self, context: &mut Context<'_, S>) {
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

/// Delivers a decrypted packet if its source belongs to the peer that sent it.
fn deliver<S: Sink>(
    index: PeerIndex,
    packet: &[u8],
    source: IpAddr,
    allowed_ips: &AllowedIps,
    sink: &mut S,
) -> Verdict {
    /// The length of the shortest IPv4 header (RFC 791 section 3.1). `boringtun` accepts shorter packets.
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

/// Returns the interval of a persistent keepalive; 0 means none.
fn interval(seconds: Option<u16>) -> Option<Duration> {
    seconds.filter(|seconds| *seconds > 0).map(|seconds| Duration::from_secs(seconds.into()))
}

/// Replaces an IPv4-mapped IPv6 address by the IPv4 address, which needs the IPv4 socket.
fn canonical(endpoint: SocketAddr) -> SocketAddr {
    match endpoint.ip().to_canonical() {
        address @ IpAddr::V4(_) => SocketAddr::new(address, endpoint.port()),
        // Unchanged, including its scope.
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
