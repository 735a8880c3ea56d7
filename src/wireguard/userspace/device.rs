//! The device without its input and output: takes packets from the TUN and datagrams from the sockets, and says through a
//! [`Sink`] what to send and what to deliver. Finds the peer that each belongs to; what a peer then does is its own affair.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use boringtun::x25519;

use super::allowed_ips::{AllowedIps, PeerIndex};
use super::peer::{Context, Peer, Verdict};
use crate::keys::PublicKey;
use crate::wireguard::{DeviceConfig, PeerStatus};

/// The longest IP packet and the longest datagram: what 16 bits of length can say.
pub(super) const MAX_PACKET: usize = 65_535;

/// Packets are padded to a multiple of this (WireGuard paper, section 5.4.6).
const PADDING_MULTIPLE: usize = 16;

/// The size of a buffer that a packet is read into: it is padded in place.
pub(super) const PACKET_BUFFER: usize = MAX_PACKET.next_multiple_of(PADDING_MULTIPLE);

/// What a data message adds to its packet: header and authentication tag (WireGuard paper, section 5.4.6).
const DATA_OVERHEAD: usize = 32;

/// A cookie reply's length (WireGuard paper, section 5.4.7).
const COOKIE_REPLY: usize = 64;

/// Handshake messages a second from which on the device counts as under load, and asks for cookies.
const HANDSHAKES_PER_SECOND: u64 = 100;

/// Session indices have 24 bits for the peer and 8 for the session, which `boringtun` counts up.
const PEER_INDEX_BITS: u32 = 24;

/// The outside world: the TUN and the sockets, or what stands for them in a test.
pub(super) trait Sink {
    /// Sends a datagram; whether it went out.
    fn send(&mut self, endpoint: SocketAddr, datagram: &[u8]) -> bool;
    /// Hands a packet to the TUN.
    fn deliver(&mut self, packet: &[u8]);
    /// A handshake has just been completed.
    fn handshake_completed(&mut self);
    /// A handshake that was begun is not answered in its time.
    fn handshake_unanswered(&mut self);
}

/// How many packets and datagrams were dropped, and why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// From the TUN: no peer has the destination among its AllowedIPs.
    pub no_peer: u64,
    /// From the TUN: not an IP packet.
    pub not_ip: u64,
    /// From a peer: the packet's source is not among its AllowedIPs.
    pub source_not_allowed: u64,
    /// From a peer: not an IP packet.
    pub malformed: u64,
    /// From anybody: not WireGuard's, not for us, not authentic, or a replay.
    pub not_authentic: u64,
    /// Handshake messages answered with a cookie, under load.
    pub cookie_demanded: u64,
    /// The network refused to send it or had no room.
    pub not_sent: u64,
    /// The TUN refused it: it is down or has no room.
    pub not_delivered: u64,
}

/// The device's state: keys, peers and routing.
pub(super) struct Core {
    private_key: x25519::StaticSecret,
    public_key: x25519::PublicKey,
    mtu: usize,
    /// A peer keeps its place as long as it is one: the session indices on the wire have the place in them.
    peers: Vec<Option<Peer>>,
    by_key: HashMap<PublicKey, PeerIndex>,
    allowed_ips: AllowedIps,
    /// Hides the peers' numbers in the session indices that are on the wire.
    index_mask: u32,
    limiter: RateLimiter,
    scratch: Box<[u8]>,
    dropped: Dropped,
}

impl Core {
    pub(super) fn new(config: &DeviceConfig, now: Duration) -> io::Result<Self> {
        let private_key = x25519::StaticSecret::from(*config.private_key.as_bytes());
        let public_key = x25519::PublicKey::from(&private_key);
        let random = RandomState::new().hash_one(now) as u32;
        let mut core = Self {
            public_key,
            mtu: config.mtu as usize,
            peers: Vec::with_capacity(config.peers.len()),
            by_key: HashMap::with_capacity(config.peers.len()),
            allowed_ips: AllowedIps::default(),
            index_mask: random >> (u32::BITS - PEER_INDEX_BITS),
            limiter: RateLimiter::new(&public_key, HANDSHAKES_PER_SECOND),
            scratch: vec![0; PACKET_BUFFER + DATA_OVERHEAD].into_boxed_slice(),
            dropped: Dropped::default(),
            private_key,
        };
        core.replace_peers(config, now)?;
        Ok(core)
    }

    /// Becomes what another configuration says. Peers whose keys are the same go on with their sessions. Returns those that are new.
    ///
    /// # Errors
    /// If no device can be made from it. Then nothing has changed.
    pub(super) fn reconfigure(&mut self, config: &DeviceConfig, now: Duration) -> io::Result<Vec<PeerIndex>> {
        let former = (self.private_key.clone(), self.public_key);
        let private_key = x25519::StaticSecret::from(*config.private_key.as_bytes());
        let public_key = x25519::PublicKey::from(&private_key);
        let has_new_key = public_key != self.public_key;
        (self.private_key, self.public_key) = (private_key, public_key);
        if let Err(error) = check_peers(&self.private_key, config) {
            (self.private_key, self.public_key) = former;
            return Err(error);
        }
        if has_new_key {
            self.limiter = RateLimiter::new(&self.public_key, HANDSHAKES_PER_SECOND);
            // No session outlives the key that it was made with. Where the peers are is known still.
            for peer in self.peers.iter_mut().flatten() {
                peer.forget_keys();
            }
        }
        self.mtu = config.mtu as usize;
        self.replace_peers(config, now)
    }

    fn replace_peers(&mut self, config: &DeviceConfig, now: Duration) -> io::Result<Vec<PeerIndex>> {
        check_peers(&self.private_key, config)?;
        // Each peer's `Tunn` checks the MAC again and counts again; the device's limiter is the one that decides.
        let no_limit = Arc::new(RateLimiter::new(&self.public_key, u64::MAX));
        for peer in &mut self.peers {
            peer.take_if(|peer| !config.peers.iter().any(|wanted| wanted.public_key == *peer.public_key()));
        }
        self.by_key.clear();
        self.allowed_ips = AllowedIps::default();
        let mut new = Vec::new();
        for wanted in &config.peers {
            let is_it = |peer: &Option<Peer>| peer.as_ref().is_some_and(|peer| *peer.public_key() == wanted.public_key);
            let free = || self.peers.iter().position(Option::is_none);
            let index = self.peers.iter().position(is_it).or_else(free).unwrap_or(self.peers.len());
            if index == self.peers.len() {
                self.peers.push(None);
            }
            let before = self.peers[index].take();
            self.peers[index] = Some(match before {
                Some(mut peer) if peer.has_key(wanted.preshared_key.as_ref()) => {
                    peer.set_persistent_keepalive(wanted.persistent_keepalive);
                    peer
                }
                before => {
                    new.push(index);
                    let tunn = Tunn::new(
                        self.private_key.clone(),
                        x25519::PublicKey::from(*wanted.public_key.as_bytes()),
                        wanted.preshared_key.as_ref().map(|key| *key.as_bytes()),
                        // The persistent keepalive is the peer's own affair.
                        None,
                        index as u32 ^ self.index_mask,
                        Some(Arc::clone(&no_limit)),
                    );
                    Peer::new(index, wanted, tunn, before.as_ref(), now)
                }
            });
            self.by_key.insert(wanted.public_key, index);
            for prefix in &wanted.allowed_ips {
                self.allowed_ips.claim(*prefix, index);
            }
        }
        Ok(new)
    }

    /// The place of a peer.
    pub(super) fn index_of(&self, peer: &PublicKey) -> Option<PeerIndex> {
        self.by_key.get(peer).copied()
    }

    /// The device is up: peers with a persistent keepalive begin their handshakes.
    pub(super) fn start<S: Sink>(&mut self, now: Duration, sink: &mut S) {
        for peer in self.peers.iter_mut().flatten() {
            peer.start(&mut Context { now, scratch: &mut self.scratch, sink });
        }
    }

    /// A peer is new: it begins its handshake if it has a persistent keepalive.
    pub(super) fn start_peer<S: Sink>(&mut self, index: PeerIndex, now: Duration, sink: &mut S) {
        if let Some(Some(peer)) = self.peers.get_mut(index) {
            peer.start(&mut Context { now, scratch: &mut self.scratch, sink });
        }
    }

    /// Takes a packet from the TUN: the first `length` bytes of `buffer`. What follows is used for padding.
    pub(super) fn on_packet<S: Sink>(&mut self, buffer: &mut [u8], length: usize, now: Duration, sink: &mut S) {
        let Some(destination) = Tunn::dst_address(&buffer[..length]) else {
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
            peer.send(&buffer[..padded], &mut Context { now, scratch: &mut self.scratch, sink });
        }
    }

    /// Takes a datagram from one of the sockets.
    pub(super) fn on_datagram<S: Sink>(&mut self, datagram: &[u8], from: SocketAddr, now: Duration, sink: &mut S) {
        let Ok(packet) = Tunn::parse_incoming_packet(datagram) else {
            self.dropped.not_authentic += 1;
            return;
        };
        if matches!(packet, Packet::HandshakeInit(_) | Packet::HandshakeResponse(_))
            && !self.passes_limiter(datagram, from, sink)
        {
            return;
        }
        let index = match &packet {
            // Whose it is stands inside, encrypted to us.
            Packet::HandshakeInit(initiation) => parse_handshake_anon(&self.private_key, &self.public_key, initiation)
                .ok()
                .and_then(|half| self.by_key.get(&PublicKey::from(half.peer_static_public)).copied()),
            Packet::HandshakeResponse(response) => self.peer_of_session(response.receiver_idx),
            Packet::PacketCookieReply(reply) => self.peer_of_session(reply.receiver_idx),
            Packet::PacketData(data) => self.peer_of_session(data.receiver_idx),
        };
        let Some(Some(peer)) = index.and_then(|index| self.peers.get_mut(index)) else {
            self.dropped.not_authentic += 1;
            return;
        };
        let mut context = Context { now, scratch: &mut self.scratch, sink };
        let verdict = match packet {
            Packet::HandshakeInit(_) => peer.receive_initiation(from, datagram, &mut context),
            Packet::HandshakeResponse(_) => peer.receive_response(from, datagram, &mut context),
            Packet::PacketCookieReply(_) => peer.receive_cookie(datagram, &mut context),
            Packet::PacketData(_) => peer.receive_data(from, datagram, &self.allowed_ips, &mut context),
        };
        match verdict {
            Verdict::Accepted => {}
            Verdict::NotAuthentic => self.dropped.not_authentic += 1,
            Verdict::Malformed => self.dropped.malformed += 1,
            Verdict::SourceNotAllowed => self.dropped.source_not_allowed += 1,
        }
    }

    /// When [`Self::tick`] is to be called next, whatever happens until then; `None` while nothing is pending.
    pub(super) fn next_tick(&self) -> Option<Duration> {
        self.peers.iter().flatten().filter_map(Peer::next_tick).min()
    }

    /// Does what is due: retransmissions, keepalives, new keys, the end of old ones.
    pub(super) fn tick<S: Sink>(&mut self, now: Duration, sink: &mut S) {
        for peer in self.peers.iter_mut().flatten() {
            peer.tick(&mut Context { now, scratch: &mut self.scratch, sink });
        }
    }

    /// Points a peer at an endpoint.
    pub(super) fn set_endpoint<S: Sink>(
        &mut self,
        index: PeerIndex,
        endpoint: SocketAddr,
        now: Duration,
        sink: &mut S,
    ) {
        if let Some(Some(peer)) = self.peers.get_mut(index) {
            peer.set_endpoint(endpoint, &mut Context { now, scratch: &mut self.scratch, sink });
        }
    }

    /// Begins a handshake with a peer, unless one is in flight or has just been completed.
    pub(super) fn initiate_handshake<S: Sink>(&mut self, index: PeerIndex, now: Duration, sink: &mut S) {
        if let Some(Some(peer)) = self.peers.get_mut(index) {
            peer.initiate(&mut Context { now, scratch: &mut self.scratch, sink });
        }
    }

    /// What each peer is doing.
    pub(super) fn status(&self, now: Duration) -> Vec<PeerStatus> {
        self.peers.iter().flatten().map(|peer| peer.status(now)).collect()
    }

    /// What was dropped here.
    pub(super) fn dropped(&self) -> Dropped {
        self.dropped
    }

    /// Checks a handshake message's MAC, before anything expensive, and under load also that its sender can receive at its
    /// address; asks for that with a cookie reply.
    fn passes_limiter<S: Sink>(&mut self, datagram: &[u8], from: SocketAddr, sink: &mut S) -> bool {
        // Does nothing until a second has passed.
        self.limiter.reset_count();
        let mut reply = [0; COOKIE_REPLY];
        match self.limiter.verify_packet(Some(from.ip()), datagram, &mut reply) {
            Ok(_) => true,
            Err(TunnResult::WriteToNetwork(reply)) => {
                self.dropped.cookie_demanded += 1;
                sink.send(from, reply);
                false
            }
            Err(_) => {
                self.dropped.not_authentic += 1;
                false
            }
        }
    }

    /// Which peer a session index of ours was given to.
    fn peer_of_session(&self, session: u32) -> Option<PeerIndex> {
        let index = (session >> (u32::BITS - PEER_INDEX_BITS)) ^ self.index_mask;
        usize::try_from(index).ok()
    }
}

/// The length to which a packet is padded with zeros: a multiple of 16, but not beyond the MTU, as Linux has it. A packet
/// that is longer than the MTU, which the TUN should not give us, is treated as Linux does: by what exceeds the MTU.
fn padded_length(length: usize, mtu: usize) -> usize {
    let multiple = |length: usize| length.next_multiple_of(PADDING_MULTIPLE);
    if mtu == 0 {
        return multiple(length);
    }
    let whole = if length > mtu { length - length % mtu } else { 0 };
    whole + multiple(length - whole).min(mtu)
}

/// Refuses peers of which no device can be made.
fn check_peers(private_key: &x25519::StaticSecret, config: &DeviceConfig) -> io::Result<()> {
    let mut seen = HashSet::with_capacity(config.peers.len());
    for peer in &config.peers {
        let peer_key = x25519::PublicKey::from(*peer.public_key.as_bytes());
        if !private_key.diffie_hellman(&peer_key).was_contributory() {
            return Err(invalid(format!("no tunnel can be made with the peer {}: its key is weak", peer.public_key)));
        }
        if !seen.insert(peer.public_key) {
            return Err(invalid(format!("the peer {} is there twice", peer.public_key)));
        }
    }
    Ok(())
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}
