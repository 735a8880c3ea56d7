//! The handshake (WireGuard paper, sections 5.4.1 to 5.4.5): `Noise_IKpsk2` of the Noise protocol framework, by
//! [`snow`].

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use snow::{Builder, HandshakeState};
use zeroize::Zeroizing;

use super::message::{self, INITIATION, RESPONSE, kind, read_u32};
use super::resolver::Primitives;
use super::session::SessionKeys;
use crate::keys::{PresharedKey, PrivateKey, PublicKey};
use crate::wireguard::userspace::wiped::Wiped;

pub(super) const PATTERN: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";

/// The place of the preshared key in the pattern: after the second message.
const PSK: usize = 2;

/// The parts of the messages that Noise makes. Before them are type and session indices, after them the MACs.
const NOISE_OF_INITIATION: std::ops::Range<usize> = 8..116;
const NOISE_OF_RESPONSE: std::ops::Range<usize> = 12..60;

/// A time as initiations contain it, in the format TAI64N. Of two, the later one is greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::wireguard::userspace) struct Timestamp([u8; 12]);

impl Timestamp {
    /// The label of the time 1970-01-01 00:00:00 UTC, which was ten seconds later in TAI. It is the kernel's, and leap
    /// seconds since are not counted: a peer refuses whoever is behind its last initiation, so all implementations
    /// with the same key have to agree.
    const EPOCH: u64 = (1 << 62) + 10;

    /// Returns the time of day. Its resolution is about 17 ms, as in the kernel's WireGuard: a finer one would tell the
    /// peer more of this machine than it needs.
    pub(in crate::wireguard::userspace) fn now() -> Self {
        // A clock before 1970 is wrong, and only has to go forward.
        Self::of(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
    }

    fn of(since_1970: Duration) -> Self {
        const RESOLUTION: u32 = 1 << 24;
        let nanoseconds = since_1970.subsec_nanos() & !(RESOLUTION - 1);
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&(Self::EPOCH + since_1970.as_secs()).to_be_bytes());
        bytes[8..].copy_from_slice(&nanoseconds.to_be_bytes());
        Self(bytes)
    }
}

/// A handshake that this device has begun.
pub(in crate::wireguard::userspace) struct Initiator {
    state: Wiped<HandshakeState>,
    index: u32,
}

impl Initiator {
    /// Begins a handshake with a peer. Writes the initiation, but for its MACs. `index` will be this device's index of
    /// the session. Returns None if the peer's key is weak, or if the kernel has no random bytes.
    pub(in crate::wireguard::userspace) fn begin(
        own: &PrivateKey,
        peer: &PublicKey,
        index: u32,
        now: Timestamp,
        initiation: &mut [u8; INITIATION],
    ) -> Option<Self> {
        let builder = builder(own)?.remote_public_key(peer.as_bytes()).ok()?;
        let mut state = Wiped::new(builder.build_initiator().ok()?);
        *initiation = [0; INITIATION];
        message::begin(initiation, kind::INITIATION, index);
        state.write_message(&now.0, &mut initiation[NOISE_OF_INITIATION]).ok()?;
        Some(Self { state, index })
    }

    /// Returns the session index that the initiation offered.
    pub(in crate::wireguard::userspace) fn index(&self) -> u32 {
        self.index
    }

    /// Completes the handshake with a response to it. Returns the keys, and the peer's index of the session. None if
    /// the response is not authentic: the handshake still waits for one.
    pub(in crate::wireguard::userspace) fn complete(
        &mut self,
        preshared_key: Option<&PresharedKey>,
        response: &[u8; RESPONSE],
    ) -> Option<(SessionKeys, u32)> {
        if read_u32(response, 8)? != self.index {
            return None;
        }
        set_preshared_key(&mut self.state, preshared_key)?;
        self.state.read_message(&response[NOISE_OF_RESPONSE], &mut []).ok()?;
        let (sending, receiving) = split(&mut self.state);
        Some((SessionKeys { sending, receiving }, read_u32(response, 4)?))
    }
}

/// An authentic initiation of a peer.
pub(in crate::wireguard::userspace) struct Responder {
    state: Wiped<HandshakeState>,
    peer: PublicKey,
    timestamp: Timestamp,
    index: u32,
}

impl Responder {
    /// Opens an initiation, which says whose it is. None if it is not authentic, or not for this device.
    pub(in crate::wireguard::userspace) fn open(own: &PrivateKey, initiation: &[u8; INITIATION]) -> Option<Self> {
        let mut state = Wiped::new(builder(own)?.build_responder().ok()?);
        let mut timestamp = [0; 12];
        let length = state.read_message(&initiation[NOISE_OF_INITIATION], &mut timestamp).ok()?;
        let peer: [u8; 32] = state.get_remote_static()?.try_into().ok()?;
        let index = read_u32(initiation, 4)?;
        (length == timestamp.len()).then(|| Self { state, peer: peer.into(), timestamp: Timestamp(timestamp), index })
    }

    /// Returns the peer that began the handshake.
    pub(in crate::wireguard::userspace) fn peer(&self) -> &PublicKey {
        &self.peer
    }

    /// Returns the time that the initiation contains. One that is not later than the last is a replay.
    pub(in crate::wireguard::userspace) fn timestamp(&self) -> Timestamp {
        self.timestamp
    }

    /// Completes the handshake: writes the response, but for its MACs. Returns the keys, and the peer's index of the
    /// session.
    pub(in crate::wireguard::userspace) fn respond(
        mut self,
        preshared_key: Option<&PresharedKey>,
        index: u32,
        response: &mut [u8; RESPONSE],
    ) -> Option<(SessionKeys, u32)> {
        *response = [0; RESPONSE];
        message::begin(response, kind::RESPONSE, index);
        response[8..12].copy_from_slice(&self.index.to_le_bytes());
        set_preshared_key(&mut self.state, preshared_key)?;
        self.state.write_message(&[], &mut response[NOISE_OF_RESPONSE]).ok()?;
        let (receiving, sending) = split(&mut self.state);
        Some((SessionKeys { sending, receiving }, self.index))
    }
}

fn builder(own: &PrivateKey) -> Option<Builder<'_>> {
    let parameters = PATTERN.parse().ok()?;
    let builder = Builder::with_resolver(parameters, Box::new(Primitives));
    builder.local_private_key(own.as_bytes()).ok()?.prologue(PROLOGUE).ok()
}

/// Without a preshared key, 32 zeros take its place (WireGuard paper, section 5.2).
fn set_preshared_key(state: &mut HandshakeState, key: Option<&PresharedKey>) -> Option<()> {
    state.set_psk(PSK, key.map_or(&[0; 32], |key| key.as_bytes())).ok()
}

/// Returns the keys from the initiator to the responder, and back.
fn split(state: &mut HandshakeState) -> (Zeroizing<[u8; 32]>, Zeroizing<[u8; 32]>) {
    let (to_responder, to_initiator) = state.dangerously_get_raw_split();
    (Zeroizing::new(to_responder), Zeroizing::new(to_initiator))
}
