//! The device without its input and output: receives packets of the TUN and datagrams of the sockets, finds the peer of
//! each, and sends and delivers through a [`Sink`].

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
use super::peer::{Context, DatagramVerdict, PeerState};
use crate::keys::PublicKey;
use crate::wireguard::{DeviceConfig, PeerStatus};

/// The maximum length of an IP packet and of a datagram, whose length fields have 16 bits.
pub(super) const MAX_PACKET: usize = 65_535;

/// The multiple to which packets are padded (WireGuard paper, section 5.4.6).
const PADDING_MULTIPLE: usize = 16;

/// The size of a buffer for packets, which are padded in place.
pub(super) const PACKET_BUFFER: usize = MAX_PACKET.next_multiple_of(PADDING_MULTIPLE);

/// The length of the header and the authentication tag of a data message (WireGuard paper, section 5.4.6).
const DATA_OVERHEAD: usize = 32;

/// The length of a cookie reply (WireGuard paper, section 5.4.7).
const COOKIE_REPLY: usize = 64;

/// The number of handshake messages per second above which the device is under load and demands cookies.
const HANDSHAKES_PER_SECOND: u64 = 100;

/// The bits of a session index that identify the peer. `boringtun` numbers sessions in the other 8 bits.
const PEER_INDEX_BITS: u32 = 24;

/// The output of the device: the TUN and the sockets, or their replacement in a test.
pub(super) trait Sink {
    /// Sends a datagram, and returns whether it was sent.
    fn send(&mut self, endpoint: SocketAddr, datagram: &[u8]) -> bool;
    /// Delivers a packet to the TUN.
    fn deliver(&mut self, packet: &[u8]);
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
    /// Handshake messages that were answered with a cookie, under load.
    pub cookie_demanded: u64,
    /// Datagrams that the network refused or had no room for.
    pub not_sent: u64,
    /// Packets that the TUN refused, because it is down or has no room.
    pub not_delivered: u64,
}

/// The device's state: keys, peers and routing.
pub(super) struct Core {
    private_key: x25519::StaticSecret,
    public_key: x25519::PublicKey,
    mtu: usize,
    /// A peer keeps its index while it exists, since the session indices on the wire contain it.
    peers: Vec<Option<PeerState>>,
    by_key: HashMap<PublicKey, PeerIndex>,
    allowed_ips: AllowedIps,
    /// Hides the peers' indices in the session indices on the wire.
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

    /// Applies another configuration, and returns the new peers. Peers whose keys are the same keep their sessions.
    ///
    /// # Errors
    /// Fails if the configuration is invalid. Then nothing has changed.
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
            // Sessions end with the private key. The peers keep their endpoints.
            for peer in self.peers.iter_mut().flatten() {
                peer.forget_keys();
            }
        }
        self.mtu = config.mtu as usize;
        self.replace_peers(config, now)
    }

    fn replace_peers(&mut self, config: &DeviceConfig, now: Duration) -> io::Result<Vec<PeerIndex>> {
        check_peers(&self.private_key, config)?;
        // Each `Tunn` has a limiter that checks and counts again. The limiter of the device decides alone.
        let no_limit = Arc::new(RateLimiter::new(&self.public_key, u64::MAX));
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
                Some(mut peer) if peer.has_key(configured.preshared_key.as_ref()) => {
                    peer.set_persistent_keepalive(configured.persistent_keepalive);
                    peer
                }
                before => {
                    new.push(index);
                    let tunn = Tunn::new(
                        self.private_key.clone(),
                        x25519::PublicKey::from(*configured.public_key.as_bytes()),
                        configured.preshared_key.as_ref().map(|key| *key.as_bytes()),
                        // `PeerState` sends the persistent keepalives.
                        None,
                        index as u32 ^ self.index_mask,
                        Some(Arc::clone(&no_limit)),
                    );
                    PeerState::new(index, configured, tunn, before.as_ref(), now)
                }
            });
            self.by_key.insert(configured.public_key, index);
            for prefix in &configured.allowed_ips {
                self.allowed_ips.claim(*prefix, index);
            }
        }
        Ok(new)
    }

    /// Returns the index of a peer.
    pub(super) fn index_of(&self, peer: &PublicKey) -> Option<PeerIndex> {
        self.by_key.get(peer).copied()
    }

    /// Starts the handshakes of peers with a persistent keepalive.
    pub(super) fn start<S: Sink>(&mut self, now: Duration, sink: &mut S) {
        for peer in self.peers.iter_mut().flatten() {
            peer.start(&mut Context { now, scratch: &mut self.scratch, sink });
        }
    }

    /// Starts the handshake of a new peer if it has a persistent keepalive.
    pub(super) fn start_peer<S: Sink>(&mut self, index: PeerIndex, now: Duration, sink: &mut S) {
        if let Some(Some(peer)) = self.peers.get_mut(index) {
            peer.start(&mut Context { now, scratch: &mut self.scratch, sink });
        }
    }

    /// Processes a packet of the TUN: the first `length` bytes of `buffer`. The rest is room for padding.
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

    /// Processes a datagram of a socket.
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
            // The message contains the peer's public key, encrypted for this device.
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
            DatagramVerdict::Accepted => {}
            DatagramVerdict::NotAuthentic => self.dropped.not_authentic += 1,
            DatagramVerdict::Malformed => self.dropped.malformed += 1,
            DatagramVerdict::SourceNotAllowed => self.dropped.source_not_allowed += 1,
        }
    }

    /// Returns the time at which [`Self::tick`] must be called, or none while nothing is pending.
    pub(super) fn next_tick(&self) -> Option<Duration> {
        self.peers.iter().flatten().filter_map(PeerState::next_tick).min()
    }

    /// Does what is due: retransmissions, keepalives, renewal and expiry of keys.
    pub(super) fn tick<S: Sink>(&mut self, now: Duration, sink: &mut S) {
        for peer in self.peers.iter_mut().flatten() {
            peer.tick(&mut Context { now, scratch: &mut self.scratch, sink });
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
            peer.set_endpoint(endpoint, &mut Context { now, scratch: &mut self.scratch, sink });
        }
    }

    /// Starts a handshake with a peer, unless one is in flight or was just completed.
    pub(super) fn initiate_handshake<S: Sink>(&mut self, index: PeerIndex, now: Duration, sink: &mut S) {
        if let Some(Some(peer)) = self.peers.get_mut(index) {
            peer.initiate(&mut Context { now, scratch: &mut self.scratch, sink });
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

    /// Checks the MAC of a handshake message before any expensive work. Under load, also checks with a cookie reply
    /// that the sender receives packets at its address.
    fn passes_limiter<S: Sink>(&mut self, datagram: &[u8], from: SocketAddr, sink: &mut S) -> bool {
        // This resets the count once per second.
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

    /// Returns the peer of a session index that this device has issued.
    fn peer_of_session(&self, session: u32) -> Option<PeerIndex> {
        let index = (session >> (u32::BITS - PEER_INDEX_BITS)) ^ self.index_mask;
        usize::try_from(index).ok()
    }
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
fn check_peers(private_key: &x25519::StaticSecret, config: &DeviceConfig) -> io::Result<()> {
    let mut seen = HashSet::with_capacity(config.peers.len());
    for peer in &config.peers {
        let peer_key = x25519::PublicKey::from(*peer.public_key.as_bytes());
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
