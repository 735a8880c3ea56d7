//! A session: the keys that a handshake has made, the counter of what was sent with them, and the window of what was
//! received (WireGuard paper, sections 5.4.6 and 5.4.7).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroizing;

use super::message::{self, DATA_HEADER, DATA_OVERHEAD};
use super::replay::Window;
use crate::wireguard::userspace::wiped::Wiped;

/// The length of an authentication tag (RFC 8439 section 2.8).
pub(in crate::wireguard::userspace) const TAG: usize = 16;

/// The number of messages after which an initiator makes a new session (WireGuard paper, section 6.1).
pub(in crate::wireguard::userspace) const REKEY_AFTER_MESSAGES: u64 = 1 << 60;

/// The number of messages after which a session is not used any more (WireGuard paper, section 6.1).
pub(in crate::wireguard::userspace) const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// The two keys that a handshake makes.
pub(in crate::wireguard::userspace) struct SessionKeys {
    pub(super) sending: Zeroizing<[u8; 32]>,
    pub(super) receiving: Zeroizing<[u8; 32]>,
}

/// A session. Threads share it: whoever seals takes counters from the same source.
pub(in crate::wireguard::userspace) struct Session {
    /// This device's index of the session.
    local: u32,
    /// The peer's index of the session.
    remote: u32,
    sending: Wiped<LessSafeKey>,
    receiving: Wiped<LessSafeKey>,
    /// The counter of the next message.
    next: AtomicU64,
    window: Mutex<Window>,
}

/// Returns the nonce of a message: four zeros and the counter.
pub(super) fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

impl Session {
    /// Creates a session. Returns None if a key cannot be used, which does not happen.
    pub(in crate::wireguard::userspace) fn new(keys: &SessionKeys, local: u32, remote: u32) -> Option<Self> {
        let key = |bytes: &[u8; 32]| {
            UnboundKey::new(&CHACHA20_POLY1305, bytes).ok().map(|key| Wiped::new(LessSafeKey::new(key)))
        };
        Some(Self {
            local,
            remote,
            sending: key(&keys.sending)?,
            receiving: key(&keys.receiving)?,
            next: AtomicU64::new(0),
            window: Mutex::new(Window::default()),
        })
    }

    /// Returns this device's index of the session, by which the peer names it.
    pub(in crate::wireguard::userspace) fn index(&self) -> u32 {
        self.local
    }

    /// Reserves the counters of a number of messages, and returns the first. None if that many are not left: then
    /// nothing is reserved, and the session is at its end.
    pub(in crate::wireguard::userspace) fn reserve(&self, count: u64) -> Option<u64> {
        let advance = |next: u64| next.checked_add(count).filter(|end| *end <= REJECT_AFTER_MESSAGES);
        self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, advance).ok()
    }

    /// Returns the number of messages that were sent.
    pub(in crate::wireguard::userspace) fn sent(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Makes a data message in place. The packet is in `message` between room for the header and for the tag. The
    /// counter comes from [`Self::reserve`], and is used once.
    pub(in crate::wireguard::userspace) fn seal(&self, counter: u64, message: &mut [u8]) -> bool {
        if message.len() < DATA_OVERHEAD {
            return false;
        }
        message::begin(message, message::kind::DATA, self.remote);
        let (header, rest) = message.split_at_mut(DATA_HEADER);
        header[8..].copy_from_slice(&counter.to_le_bytes());
        let (text, end) = rest.split_at_mut(rest.len() - TAG);
        let Ok(tag) = self.sending.seal_in_place_separate_tag(nonce(counter), Aad::empty(), text) else { return false };
        end.copy_from_slice(tag.as_ref());
        true
    }

    /// Opens a data message of this session in place, and returns the packet in it. None if it is not authentic.
    /// [`Self::accept`] decides whether it is new.
    pub(in crate::wireguard::userspace) fn open<'a>(
        &self,
        counter: u64,
        message: &'a mut [u8],
    ) -> Option<&'a mut [u8]> {
        // Not even opened if it cannot be accepted.
        if counter >= REJECT_AFTER_MESSAGES {
            return None;
        }
        let sealed = message.get_mut(DATA_HEADER..)?;
        self.receiving.open_in_place(nonce(counter), Aad::empty(), sealed).ok()
    }

    /// Notes an authentic message. Returns false if it was received before, or is too old to tell.
    pub(in crate::wireguard::userspace) fn accept(&self, counter: u64) -> bool {
        self.window.lock().unwrap_or_else(PoisonError::into_inner).accept(counter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Session, Session) {
        let keys = |sending, receiving| SessionKeys {
            sending: Zeroizing::new([sending; 32]),
            receiving: Zeroizing::new([receiving; 32]),
        };
        let session = |keys, local, remote| Session::new(&keys, local, remote).expect("a session");
        (session(keys(1, 2), 7, 8), session(keys(2, 1), 8, 7))
    }

    #[test]
    fn what_one_end_seals_the_other_opens() {
        let (one, other) = pair();
        for length in [0, 1, 1420, 65_000] {
            let mut message = vec![0x5a; length + DATA_OVERHEAD];
            let counter = one.reserve(1).expect("a counter");
            assert!(one.seal(counter, &mut message));
            assert_eq!(message[..8], [4, 0, 0, 0, 8, 0, 0, 0]);
            assert_eq!(other.open(counter, &mut message).expect("authentic"), vec![0x5a; length]);
            assert!(other.accept(counter));
            assert!(!other.accept(counter), "a replay");
        }
        assert!(!one.seal(9, &mut [0; DATA_OVERHEAD - 1]), "no room for the tag");
        assert_eq!(one.sent(), 4);
    }

    #[test]
    fn a_changed_message_is_not_opened() {
        let (one, other) = pair();
        let mut message = vec![0; DATA_OVERHEAD + 20];
        assert!(one.seal(0, &mut message));
        assert!(other.open(1, &mut message.clone()).is_none(), "another counter");
        assert!(one.open(0, &mut message.clone()).is_none(), "the other direction");
        for bit in DATA_HEADER * 8..message.len() * 8 {
            let mut changed = message.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(other.open(0, &mut changed).is_none(), "bit {bit}");
        }
    }

    #[test]
    fn counters_end_before_they_repeat() {
        let (one, _) = pair();
        one.next.store(REJECT_AFTER_MESSAGES - 3, Ordering::Relaxed);
        assert_eq!(one.reserve(4), None, "they would go beyond the end");
        assert_eq!(one.reserve(2), Some(REJECT_AFTER_MESSAGES - 3));
        assert_eq!(one.reserve(1), Some(REJECT_AFTER_MESSAGES - 1));
        assert_eq!(one.reserve(1), None);
        assert_eq!(one.reserve(u64::MAX), None);
        assert!(one.open(REJECT_AFTER_MESSAGES, &mut [0; 64]).is_none());
    }
}
