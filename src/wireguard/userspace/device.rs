//! The device without its input and output: receives packets of the TUN and datagrams of the sockets, finds the peer of
//! each, and sends through a [`Sink`].

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

use super::allowed_ips::{AllowedIps, PeerIndex};
use super::ip;
use super::noise::{DATA_OVERHEAD, MacChecker, MacVerdict, Message, Responder};
use super::peer::{Context, DatagramVerdict, PeerState, Reserved, SESSION_INDEX_BITS};
use crate::keys::{PrivateKey, PublicKey};
use crate::wireguard::{DeviceConfig, PeerStatus};

/// The maximum length of an IP packet and of a datagram, whose length fields have 16 bits.
pub(super) const MAX_PACKET: usize = 65_535;

/// The multiple to which packets are padded (WireGuard paper, section 5.4.6).
const PADDING_MULTIPLE: usize = 16;

/// The size of a buffer for packets, which are padded in place.
pub(super) const PACKET_BUFFER: usize = MAX_PACKET.next_multiple_of(PADDING_MULTIPLE);

/// The number of handshake messages per second above which the device is under load and demands cookies.
const HANDSHAKES_PER_SECOND: u64 = 100;

/// The bits of a session index that identify the peer.
const PEER_INDEX_BITS: u32 = u32::BITS - SESSION_INDEX_BITS;

/// The output of the device: the sockets, or their replacement in a test.
pub(super) trait Sink {
    /// Sends a datagram, and returns whether it was sent.
    fn send(&mut self, endpoint: SocketAddr, datagram: &[u8]) -> bool;
    /// Reports that a handshake was completed.
    fn handshake_completed(&mut self);
    /// Reports that a handshake was not answered in time.
    fn handshake_unanswered(&mut self);
}

/// The number of dropped packets and datagrams, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Packets of the TUN whose destination is in no peer's AllowedIPs.
    pub no_peer: u64,
    /// Packets of the TUN that are not IP packets.
    pub not_ip: u64,
    /// Packets of a peer whose source is not in its AllowedIPs.
    pub source_not_allowed: u64,
    /// Packets of a peer that are not IP packets.
    pub malformed: u64,
    /// Datagrams that are not WireGuard messages, not for this device, not authentic, or replayed.
    pub not_authentic: u64,
    /// Handshake messages without a cookie, under load. Some are answered with one.
    pub cookie_demanded: u64,
    /// Handshake messages with a cookie, under load, beyond the rate of their address.
    pub too_frequent: u64,
    /// Packets of a peer that met congestion, and whose transport learns of it by their loss (RFC 6040 section 4.2).
    pub congested: u64,
    /// Datagrams that the network refused or had no room for.
    pub not_sent: u64,
    /// Packets that the TUN refused, because it is down or has no room.
    pub not_delivered: u64,
}

/// The context of an event for one of the device's peers, which is borrowed at the same time.
macro_rules! context {
    ($core:ident, $now:ident, $sink:ident) => {
        Context { now: $now, private_key: &$core.private_key, scratch: &mut $core.scratch, sink: $sink }
    };
}

/// The device's state: keys, peers and routing.
pub(super) struct Core {
    private_key: PrivateKey,
    public_key: PublicKey,
    mtu: usize,
    /// A peer keeps its index while it exists, since the session indices on the wire contain it.
    peers: Vec<Option<PeerState>>,
    by_key: HashMap<PublicKey, PeerIndex>,
    allowed_ips: AllowedIps,
    /// Hides the peers' indices in the session indices on the wire.
    index_mask: u32,
    macs: MacChecker,
    scratch: Box<[u8]>,
    dropped: Dropped,
}

impl Core {
    pub(super) fn new(config: &DeviceConfig, now: Duration) -> io::Result<Self> {
        check_peers(config)?;
        let public_key = config.private_key.public_key();
        let random = RandomState::new().hash_one(now) as u32;
        let mut core = Self {
            public_key,
            mtu: config.mtu as usize,
            peers: Vec::with_capacity(config.peers.len()),
            by_key: HashMap::with_capacity(config.peers.len()),
            allowed_ips: AllowedIps::default(),
            index_mask: random >> SESSION_INDEX_BITS,
            macs: MacChecker::new(&public_key, HANDSHAKES_PER_SECOND, now)?,
            scratch: vec![0; PACKET_BUFFER + DATA_OVERHEAD].into_boxed_slice(),
            dropped: Dropped::default(),
            private_key: config.private_key.clone(),
        };
        core.replace_peers(config, true, now);
        Ok(core)
    }

    /// Applies another configuration, and returns the new peers. Peers whose keys are the same keep their sessions.
    ///
    /// # Errors
    /// Fails if the configuration is invalid. Then nothing has changed.
    pub(super) fn reconfigure(&mut self, config: &DeviceConfig, now: Duration) -> io::Result<Vec<PeerIndex>> {
        check_peers(config)?;
        let public_key = config.private_key.public_key();
        let has_new_key = public_key != self.public_key;
        if has_new_key {
            self.macs = MacChecker::new(&public_key, HANDSHAKES_PER_SECOND, now)?;
            (self.private_key, self.public_key) = (config.private_key.clone(), public_key);
        }
        self.mtu = config.mtu as usize;
        Ok(self.replace_peers(config, has_new_key, now))
    }

    /// Replaces the peers, and returns the new ones. Sessions end with the private key; the peers keep their endpoints.
    fn replace_peers(&mut self, config: &DeviceConfig, has_new_key: bool, now: Duration) -> Vec<PeerIndex> {
        for peer in &mut self.peers {
            peer.take_if(|peer| !config.peers.iter().any(|configured| configured.public_key == *peer.public_key()));
        }
        self.by_key.clear();
        self.allowed_ips = AllowedIps::default();
        let mut new = Vec::new();
        for configured in &config.peers {
            let is_it = |peer: &Option<PeerState>| {
                peer.as_ref().is_some_and(|peer| *peer.public_key() == configured.public_key)
            };
            let free = || self.peers.iter().position(Option::is_none);
            let index = self.peers.iter().position(is_it).or_else(free).unwrap_or(self.peers.len());
            if index == self.peers.len() {
                self.peers.push(None);
            }
            let before = self.peers[index].take();
            self.peers[index] = Some(match before {
                Some(mut peer) if !has_new_key && peer.has_key(configured.preshared_key.as_ref()) => {
                    peer.set_persistent_keepalive(configured.persistent_keepalive);
                    peer
                }
                before => {
                    new.push(index);
                    PeerState::new(index, session_base(index, self.index_mask), configured, before.as_ref(), now)
                }
            });
            self.by_key.insert(configured.public_key, index);
            for prefix in &configured.allowed_ips {
                self.allowed_ips.claim(*prefix, index);
            }
        }
        new
    }

    /// Returns the index of a peer.
    pub(super) fn index_of(&self, peer: &PublicKey) -> Option<PeerIndex> {
        self.by_key.get(peer).copied()
    }

    /// Starts the handshakes of peers with a persistent keepalive.
    pub(super) fn start<S: Sink>(&mut self, now: Duration, sink: &mut S) {
        for peer in self.peers.iter_mut().flatten() {
            peer.start(&mut context!(self, now, sink));
        }
    }

    /// Starts the handshake of a new peer if it has a persistent keepalive.
    pub(super) fn start_peer<S: Sink>(&mut self, index: PeerIndex, now: Duration, sink: &mut S) {
        if let Some(Some(peer)) = self.peers.get_mut(index) {
            peer.start(&mut context!(self, now, sink));
        }
    }

    /// Counts a packet of the TUN that is not what its header says.
    pub(super) fn drop_malformed(&mut self) {
        self.dropped.not_ip += 1;
    }

    /// Counts a packet that met congestion, and whose transport would not learn of it otherwise.
    pub(super) fn drop_congested(&mut self) {
        self.dropped.congested += 1;
    }

    /// Processes a packet of the TUN: the first `length` bytes of `buffer`. The rest is room for padding.
    pub(super) fn on_packet<S: Sink>(&mut self, buffer: &mut [u8], length: usize, now: Duration, sink: &mut S) {
        let Some(destination) = ip::destination(&buffer[..length]) else {
            self.dropped.not_ip += 1;
            return;
        };
        let Some(index) = self.allowed_ips.peer_of(destination) else {
            self.dropped.no_peer += 1;
            return;
        };
        let padded = padded_length(length, self.mtu).min(buffer.len());
        buffer[length..padded].fill(0);
        if let Some(Some(peer)) = self.peers.get_mut(index) {
            peer.send(&buffer[..padded], &mut context!(self, now, sink));
        }
    }

    /// Reserves the counters of packets of the TUN that have the same addresses, of which `packet` begins with the IP
    /// header. `bytes` is the length of all messages. None if they have to go one by one by [`Self::on_packet`].
    pub(super) fn reserve<S: Sink>(
        &mut self,
        packet: &[u8],
        count: usize,
        bytes: usize,
        now: Duration,
        sink: &mut S,
    ) -> Option<(PeerIndex, Reserved)> {
        let index = self.allowed_ips.peer_of(ip::destination(packet)?)?;
        let context = &mut context!(self, now, sink);
        let reserved = self.peers.get_mut(index)?.as_mut()?.reserve(count as u64, bytes as u64, context)?;
        Some((index, reserved))
    }

    /// Notes that some bytes of reserved packets were not sent.
    pub(super) fn not_sent(&mut self, peer: PeerIndex, bytes: u64) {
        if let Some(Some(peer)) = self.peers.get_mut(peer) {
            peer.not_sent(bytes);
        }
    }

    /// Returns the length of the message that a packet of this length makes.
    pub(super) fn message_length(&self, length: usize) -> usize {
        padded_length(length, self.mtu) + DATA_OVERHEAD
    }

    /// Processes a datagram of a socket, which is decrypted in place. Returns where in it a packet for the TUN is.
    pub(super) fn on_datagram<S: Sink>(
        &mut self,
        datagram: &mut [u8],
        from: SocketAddr,
        now: Duration,
        sink: &mut S,
    ) -> Option<Range<usize>> {
        let verdict = match Message::parse(datagram) {
            Some(Message::Data { receiver, counter }) => match self.peer_of_session(receiver) {
                Some(peer) => {
                    let context = &mut context!(self, now, sink);
                    self.peers[peer].as_mut().map_or(DatagramVerdict::NotAuthentic, |peer| {
                        peer.receive_data(from, (receiver, counter), datagram, &self.allowed_ips, context)
                    })
                }
                None => DatagramVerdict::NotAuthentic,
            },
            Some(message) => self.on_handshake(message, from, now, sink),
            None => DatagramVerdict::NotAuthentic,
        };
        match verdict {
            DatagramVerdict::Accepted => {}
            DatagramVerdict::NotAuthentic => self.dropped.not_authentic += 1,
            DatagramVerdict::Malformed => self.dropped.malformed += 1,
            DatagramVerdict::SourceNotAllowed => self.dropped.source_not_allowed += 1,
            DatagramVerdict::Packet(range) => return Some(range),
        }
        None
    }

    fn on_handshake<S: Sink>(
        &mut self,
        message: Message<'_>,
        from: SocketAddr,
        now: Duration,
        sink: &mut S,
    ) -> DatagramVerdict {
        // Before any expensive work.
        let has_valid_macs = match &message {
            Message::Initiation(text) => self.has_valid_macs(*text, from, now, sink),
            Message::Response(text) => self.is_awaited(*text).then_some(()).ok_or(DatagramVerdict::NotAuthentic),
            _ => Ok(()),
        };
        if let Err(verdict) = has_valid_macs {
            return verdict;
        }
        let mut responder = None;
        let index = match &message {
            // The message contains the peer's public key, encrypted for this device.
            Message::Initiation(text) => {
                responder = Responder::open(&self.private_key, text);
                responder.as_ref().and_then(|responder| self.by_key.get(responder.peer()).copied())
            }
            Message::Response(text) => self.peer_of_session(receiver_of(*text, 8)),
            Message::CookieReply(text) => self.peer_of_session(receiver_of(*text, 4)),
            Message::Data { .. } => None,
        };
        let Some(Some(peer)) = index.and_then(|index| self.peers.get_mut(index)) else {
            return DatagramVerdict::NotAuthentic;
        };
        let context = &mut context!(self, now, sink);
        match (message, responder) {
            (Message::Initiation(_), Some(responder)) => peer.receive_initiation(from, responder, context),
            (Message::Response(text), _) => peer.receive_response(from, text, context),
            (Message::CookieReply(text), _) => peer.receive_cookie(text, now),
            _ => DatagramVerdict::NotAuthentic,
        }
    }

    /// Returns the time at which [`Self::tick`] must be called, or none while nothing is pending.
    pub(super) fn next_tick(&self) -> Option<Duration> {
        self.peers.iter().flatten().filter_map(PeerState::next_tick).min()
    }

    /// Does what is due: retransmissions, keepalives, renewal and expiry of keys.
    pub(super) fn tick<S: Sink>(&mut self, now: Duration, sink: &mut S) {
        for peer in self.peers.iter_mut().flatten() {
            peer.tick(&mut context!(self, now, sink));
        }
    }

    /// Replaces the endpoint of a peer.
    pub(super) fn set_endpoint<S: Sink>(
        &mut self,
        index: PeerIndex,
        endpoint: SocketAddr,
        now: Duration,
        sink: &mut S,
    ) {
        if let Some(Some(peer)) = self.peers.get_mut(index) {
            peer.set_endpoint(endpoint, &mut context!(self, now, sink));
        }
    }

    /// Starts a handshake with a peer, unless one is in flight or was just completed.
    pub(super) fn initiate_handshake<S: Sink>(&mut self, index: PeerIndex, now: Duration, sink: &mut S) {
        if let Some(Some(peer)) = self.peers.get_mut(index) {
            peer.initiate(&mut context!(self, now, sink));
        }
    }

    /// Returns the status of each peer.
    pub(super) fn status(&self, now: Duration) -> Vec<PeerStatus> {
        self.peers.iter().flatten().map(|peer| peer.status(now)).collect()
    }

    /// Returns the number of packets dropped here, by reason.
    pub(super) fn dropped(&self) -> Dropped {
        self.dropped
    }

    /// Returns whether a response answers an initiation of this device. Its index and the first MAC tell that at any
    /// load: whoever floods the device does not see the index, and the peer's answers need no cookie.
    fn is_awaited(&mut self, response: &[u8]) -> bool {
        let index = receiver_of(response, 8);
        let Some(peer) = self.peer_of_session(index) else { return false };
        self.peers[peer].as_mut().is_some_and(|peer| peer.awaits(index)) && self.macs.has_first(response)
    }

    /// Checks the MACs of an initiation. Under load, a cookie is demanded.
    fn has_valid_macs<S: Sink>(
        &mut self,
        message: &[u8],
        from: SocketAddr,
        now: Duration,
        sink: &mut S,
    ) -> Result<(), DatagramVerdict> {
        match self.macs.check(message, from, now) {
            MacVerdict::Valid => Ok(()),
            MacVerdict::Invalid => Err(DatagramVerdict::NotAuthentic),
            MacVerdict::CookieDemanded(reply) => {
                self.dropped.cookie_demanded += 1;
                if let Some(reply) = reply {
                    sink.send(from, &reply);
                }
                // It is counted already.
                Err(DatagramVerdict::Accepted)
            }
            MacVerdict::TooFrequent => {
                self.dropped.too_frequent += 1;
                Err(DatagramVerdict::Accepted)
            }
        }
    }

    /// Returns the peer of a session index that this device has issued.
    fn peer_of_session(&self, session: u32) -> Option<PeerIndex> {
        let index = usize::try_from((session >> SESSION_INDEX_BITS) ^ self.index_mask).ok()?;
        self.peers.get(index)?.as_ref().map(|_| index)
    }
}

/// Returns the bits that all session indices of a peer have in common. The mask hides how many peers there are.
fn session_base(peer: PeerIndex, mask: u32) -> u32 {
    ((peer as u32 & ((1 << PEER_INDEX_BITS) - 1)) ^ mask) << SESSION_INDEX_BITS
}

/// Reads the receiver's session index of a message.
fn receiver_of(message: &[u8], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&message[at..at + 4]);
    u32::from_le_bytes(bytes)
}

/// Returns the length to which a packet is padded with zeros: a multiple of 16, but at most the MTU, as in Linux. Of a
/// packet longer than the MTU, which the TUN should not produce, the part beyond the MTU is padded, as in Linux.
fn padded_length(length: usize, mtu: usize) -> usize {
    let multiple = |length: usize| length.next_multiple_of(PADDING_MULTIPLE);
    if mtu == 0 {
        return multiple(length);
    }
    let whole = if length > mtu { length - length % mtu } else { 0 };
    whole + multiple(length - whole).min(mtu)
}

/// Refuses invalid peers.
fn check_peers(config: &DeviceConfig) -> io::Result<()> {
    let private_key = x25519_dalek::StaticSecret::from(*config.private_key.as_bytes());
    let mut seen = HashSet::with_capacity(config.peers.len());
    for peer in &config.peers {
        let peer_key = x25519_dalek::PublicKey::from(*peer.public_key.as_bytes());
        if !private_key.diffie_hellman(&peer_key).was_contributory() {
            return Err(invalid(format!("the public key of the peer {} is weak", peer.public_key)));
        }
        if !seen.insert(peer.public_key) {
            return Err(invalid(format!("the peer {} is configured twice", peer.public_key)));
        }
    }
    Ok(())
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}
