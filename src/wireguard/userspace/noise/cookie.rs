//! The MACs of handshake messages, and cookies (WireGuard paper, section 5.3 and 5.4.4 and 5.4.7). The first MAC shows
//! that the sender knows the receiver's public key. A device under load demands the second one as well, whose key is a
//! cookie: it shows that the sender receives what is sent to its address.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::time::Duration;

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Mac, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use chacha20poly1305::aead::AeadInPlace;
use chacha20poly1305::{Tag, XChaCha20Poly1305, XNonce};

use super::message::{COOKIE_REPLY, kind};
use super::rate::RateLimiter;
use super::resolver::fill_random;
use crate::keys::PublicKey;

const LABEL_MAC1: &[u8] = b"mac1----";
const LABEL_COOKIE: &[u8] = b"cookie--";

/// The length of a MAC and of a cookie.
const MAC: usize = 16;

/// How long a cookie is valid (WireGuard paper, section 5.4.7).
const COOKIE_LIFETIME: Duration = Duration::from_secs(120);

/// The number of groups of addresses that are told apart. Each gets one cookie reply a second: a reply costs several
/// times as much as the check of a message, and the data of the peers waits in the same queue.
const GROUPS: usize = 1024;

/// How long a peer's cookie is used: it may have been made some time before it came, as the kernel assumes.
const COOKIE_USE: Duration = COOKIE_LIFETIME.saturating_sub(Duration::from_secs(5));

type Cookie = [u8; MAC];

/// Parts of a cookie reply.
const NONCE: std::ops::Range<usize> = 8..32;
const SEALED: std::ops::Range<usize> = 32..48;
const SEAL: std::ops::Range<usize> = 48..COOKIE_REPLY;

/// Writes the MACs of messages to one peer.
pub(in crate::wireguard::userspace) struct MacWriter {
    mac1_key: [u8; 32],
    cookie_key: [u8; 32],
    /// The last cookie of the peer, and when it came.
    cookie: Option<(Cookie, Duration)>,
    /// The first MAC of the last message, which a cookie reply answers.
    last_mac1: Option<[u8; MAC]>,
}

impl MacWriter {
    /// Creates a writer for messages to a device with this public key.
    pub(in crate::wireguard::userspace) fn new(receiver: &PublicKey) -> Self {
        Self {
            mac1_key: hash(LABEL_MAC1, receiver),
            cookie_key: hash(LABEL_COOKIE, receiver),
            cookie: None,
            last_mac1: None,
        }
    }

    /// Writes both MACs at the end of a handshake message.
    pub(in crate::wireguard::userspace) fn write(&mut self, message: &mut [u8], now: Duration) {
        let Some(end) = message.len().checked_sub(2 * MAC) else { return };
        let mac1 = mac(&self.mac1_key, &[&message[..end]]);
        message[end..end + MAC].copy_from_slice(&mac1);
        self.last_mac1 = Some(mac1);
        // An old one would be refused, and cost the peer another reply.
        self.cookie.take_if(|(_, since)| now >= *since + COOKIE_USE);
        let mac2 = self.cookie.map_or([0; MAC], |(cookie, _)| mac(&cookie, &[&message[..end + MAC]]));
        message[end + MAC..].copy_from_slice(&mac2);
    }

    /// Takes the cookie of a reply to the last message. Returns false if the reply is not authentic.
    pub(in crate::wireguard::userspace) fn take_cookie(&mut self, reply: &[u8; COOKIE_REPLY], now: Duration) -> bool {
        let Some(mac1) = self.last_mac1 else { return false };
        let mut cookie: Cookie = [0; MAC];
        cookie.copy_from_slice(&reply[SEALED]);
        let cipher = XChaCha20Poly1305::new(&self.cookie_key.into());
        let (nonce, tag) = (XNonce::from_slice(&reply[NONCE]), Tag::from_slice(&reply[SEAL]));
        if cipher.decrypt_in_place_detached(nonce, &mac1, &mut cookie, tag).is_err() {
            return false;
        }
        self.cookie = Some((cookie, now));
        // One reply for each message.
        self.last_mac1 = None;
        true
    }
}

/// What a device makes of a handshake message, by its MACs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::wireguard::userspace) enum MacVerdict {
    /// The message is worth the work of the handshake.
    Valid,
    /// The sender does not know this device's public key.
    Invalid,
    /// The device is under load, and the sender has to show a cookie: this reply has one. There is none if the sender's
    /// group of addresses got one in the current second.
    CookieDemanded(Option<[u8; COOKIE_REPLY]>),
    /// The device is under load, and the sender has shown a cookie more often than an address may.
    TooFrequent,
}

/// Checks the MACs of the messages to this device.
pub(in crate::wireguard::userspace) struct MacChecker {
    mac1_key: [u8; 32],
    cookie_key: [u8; 32],
    /// The secret from which cookies are made, and since when it is used.
    secret: [u8; 32],
    secret_since: Duration,
    /// The number of messages with a valid first MAC in the current second, and when that began.
    count: u64,
    second: Duration,
    limit: u64,
    /// The groups of addresses that got a cookie reply in the current second, a bit for each.
    answered: [u64; GROUPS / 64],
    /// Assigns addresses to groups. A sender cannot find out which addresses share its group.
    groups: RandomState,
    /// What the senders with a cookie may still send.
    rates: RateLimiter,
}

impl MacChecker {
    /// Creates a checker. The device is under load after `limit` messages in a second.
    ///
    /// # Errors
    /// If the kernel has no random bytes.
    pub(in crate::wireguard::userspace) fn new(own: &PublicKey, limit: u64, now: Duration) -> std::io::Result<Self> {
        let mut secret = [0; 32];
        fill_random(&mut secret)?;
        Ok(Self {
            mac1_key: hash(LABEL_MAC1, own),
            cookie_key: hash(LABEL_COOKIE, own),
            secret,
            secret_since: now,
            count: 0,
            second: now,
            limit,
            answered: [0; GROUPS / 64],
            groups: RandomState::new(),
            rates: RateLimiter::default(),
        })
    }

    /// Returns whether a message has the first MAC, at any load.
    pub(in crate::wireguard::userspace) fn has_first(&self, message: &[u8]) -> bool {
        self.checked(message).is_some()
    }

    /// Returns the text and the MACs of a message with the first MAC.
    fn checked<'a>(&self, message: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        let (text, macs) = message.split_at_checked(message.len().checked_sub(2 * MAC)?)?;
        is_mac(&self.mac1_key, &[text], &macs[..MAC]).then_some((text, macs))
    }

    /// Checks a handshake message before any expensive work.
    pub(in crate::wireguard::userspace) fn check(
        &mut self,
        message: &[u8],
        from: std::net::SocketAddr,
        now: Duration,
    ) -> MacVerdict {
        let Some((text, macs)) = self.checked(message) else { return MacVerdict::Invalid };
        if now >= self.second + Duration::from_secs(1) {
            (self.second, self.count, self.answered) = (now, 0, [0; GROUPS / 64]);
        }
        self.count += 1;
        if self.count <= self.limit {
            return MacVerdict::Valid;
        }
        let (word, bit) = self.group_of(from.ip());
        let is_answered = self.answered[word] & bit != 0;
        // A sender without a cookie leaves the second MAC empty.
        let has_cookie = macs[MAC..] != [0; MAC];
        if is_answered && !has_cookie {
            return MacVerdict::CookieDemanded(None);
        }
        let cookie = self.cookie_of(from, now);
        if has_cookie && is_mac(&cookie, &[text, &macs[..MAC]], &macs[MAC..]) {
            return if self.rates.allows(from.ip(), now) { MacVerdict::Valid } else { MacVerdict::TooFrequent };
        }
        if is_answered {
            return MacVerdict::CookieDemanded(None);
        }
        self.answered[word] |= bit;
        MacVerdict::CookieDemanded(self.demand(message, &macs[..MAC], cookie))
    }

    /// Returns the place of the bit of an address's group.
    fn group_of(&self, address: IpAddr) -> (usize, u64) {
        let group = self.groups.hash_one(address) as usize % GROUPS;
        (group / 64, 1 << (group % 64))
    }

    /// Returns the cookie of an address and port. A new secret ends all cookies after two minutes.
    fn cookie_of(&mut self, from: std::net::SocketAddr, now: Duration) -> Cookie {
        if now >= self.secret_since + COOKIE_LIFETIME && fill_random(&mut self.secret).is_ok() {
            self.secret_since = now;
        }
        let port = from.port().to_be_bytes();
        match from.ip() {
            IpAddr::V4(address) => mac(&self.secret, &[&address.octets(), &port]),
            IpAddr::V6(address) => mac(&self.secret, &[&address.octets(), &port]),
        }
    }

    fn demand(&self, message: &[u8], mac1: &[u8], cookie: Cookie) -> Option<[u8; COOKIE_REPLY]> {
        let mut reply = [0; COOKIE_REPLY];
        reply[..4].copy_from_slice(&kind::COOKIE_REPLY.to_le_bytes());
        // The sender's index of the handshake.
        reply[4..8].copy_from_slice(message.get(4..8)?);
        fill_random(&mut reply[NONCE]).ok()?;
        reply[SEALED].copy_from_slice(&cookie);
        let nonce = *XNonce::from_slice(&reply[NONCE]);
        let cipher = XChaCha20Poly1305::new(&self.cookie_key.into());
        let tag = cipher.encrypt_in_place_detached(&nonce, mac1, &mut reply[SEALED]).ok()?;
        reply[SEAL].copy_from_slice(&tag);
        Some(reply)
    }
}

fn hash(label: &[u8], key: &PublicKey) -> [u8; 32] {
    Blake2s256::new().chain(label).chain(key.as_bytes()).finalize().into()
}

fn keyed(key: &[u8], parts: &[&[u8]]) -> Option<Blake2sMac<U16>> {
    // Keys of up to 32 bytes are valid (RFC 7693 section 2.1), and all here are 16 or 32.
    let mut mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(key).ok()?;
    parts.iter().for_each(|part| Update::update(&mut mac, part));
    Some(mac)
}

fn mac(key: &[u8], parts: &[&[u8]]) -> [u8; MAC] {
    keyed(key, parts).map_or([0; MAC], |mac| mac.finalize_fixed().into())
}

/// Compares in constant time.
fn is_mac(key: &[u8], parts: &[&[u8]], claimed: &[u8]) -> bool {
    keyed(key, parts).is_some_and(|mac| mac.verify_slice(claimed).is_ok())
}
