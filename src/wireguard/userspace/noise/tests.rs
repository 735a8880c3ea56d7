//! Tests of the protocol against `boringtun`, which is another implementation of both ends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;

use super::cookie::{MacChecker, MacVerdict, MacWriter};
use super::handshake::{Initiator, Responder, Timestamp};
use super::message::{COOKIE_REPLY, DATA_HEADER, DATA_OVERHEAD, INITIATION, Message, RESPONSE};
use super::session::{Session, SessionKeys};
use crate::keys::{PresharedKey, PrivateKey, PublicKey};

const OURS: u32 = 0x0102_0304;
const NOW: Duration = Duration::from_secs(1_000);

fn private(number: u8) -> PrivateKey {
    [number; 32].into()
}

fn public(number: u8) -> PublicKey {
    private(number).public_key()
}

fn preshared() -> PresharedKey {
    [5; 32].into()
}

fn from() -> SocketAddr {
    "192.0.2.1:1000".parse().expect("an address")
}

/// Returns the other implementation's end, with the private key of a number and us as its peer.
fn theirs(number: u8, us: u8, preshared_key: Option<[u8; 32]>) -> Tunn {
    let key = x25519::StaticSecret::from([number; 32]);
    Tunn::new(key, x25519::PublicKey::from(*public(us).as_bytes()), preshared_key, None, 9, None)
}

/// Returns an IPv4 packet of 40 bytes.
fn packet() -> Vec<u8> {
    let mut packet = vec![0x11; 40];
    packet[..4].copy_from_slice(&[0x45, 0, 0, 40]);
    packet
}

fn sealed(session: &Session) -> Vec<u8> {
    let mut message = vec![0; DATA_OVERHEAD + 40];
    message[DATA_HEADER..DATA_HEADER + 40].copy_from_slice(&packet());
    let counter = session.reserve(1).expect("a counter");
    assert!(session.seal(counter, &mut message));
    message
}

fn opened(session: &Session, message: &[u8]) -> Option<Vec<u8>> {
    let mut message = message.to_vec();
    let Some(Message::Data { receiver, counter }) = Message::parse(&message) else { panic!("not a data message") };
    assert_eq!(receiver, session.index());
    session.open(counter, &mut message).map(|packet| packet.to_vec())
}

fn session((keys, remote): (SessionKeys, u32)) -> Session {
    Session::new(&keys, OURS, remote).expect("a session")
}

fn begin(own: u8, peer: u8) -> (Initiator, [u8; INITIATION]) {
    let mut message = [0; INITIATION];
    let begun = Initiator::begin(&private(own), &public(peer), OURS, Timestamp::now(), &mut message);
    MacWriter::new(&public(peer)).write(&mut message, NOW);
    (begun.expect("begun"), message)
}

fn sent<'a>(result: TunnResult<'a>) -> Option<Vec<u8>> {
    match result {
        TunnResult::WriteToNetwork(message) => Some(message.to_vec()),
        _ => None,
    }
}

#[test]
fn a_handshake_that_we_begin_is_completed_by_another_implementation() {
    for preshared_key in [None, Some(preshared())] {
        let mut other = theirs(2, 1, preshared_key.as_ref().map(|key| *key.as_bytes()));
        let (mut begun, message) = begin(1, 2);
        let mut buffer = [0; 2048];
        let response = sent(other.decapsulate(None, &message, &mut buffer)).expect("a response");
        let response: [u8; RESPONSE] = response.try_into().expect("of the right length");
        let session = session(begun.complete(preshared_key.as_ref(), &response).expect("completed"));
        let received = other.decapsulate(None, &sealed(&session), &mut buffer);
        assert!(matches!(received, TunnResult::WriteToTunnelV4(text, _) if *text == packet()));
        let answer = sent(other.encapsulate(&packet(), &mut buffer)).expect("a session");
        assert_eq!(opened(&session, &answer), Some(packet()));
    }
}

#[test]
fn a_handshake_that_another_implementation_begins_is_completed() {
    for preshared_key in [None, Some(preshared())] {
        let mut other = theirs(2, 1, preshared_key.as_ref().map(|key| *key.as_bytes()));
        let mut buffer = [0; 2048];
        let message = sent(other.format_handshake_initiation(&mut buffer, false)).expect("an initiation");
        let mut checker = MacChecker::new(&public(1), 1, NOW).expect("random bytes");
        assert_eq!(checker.check(&message, from(), NOW), MacVerdict::Valid);
        let message: [u8; INITIATION] = message.try_into().expect("of the right length");
        let known = Responder::open(&private(1), &message).expect("authentic");
        assert_eq!(*known.peer(), public(2));
        let mut response = [0; RESPONSE];
        let session = session(known.respond(preshared_key.as_ref(), OURS, &mut response).expect("completed"));
        MacWriter::new(&public(2)).write(&mut response, NOW);
        let keepalive = sent(other.decapsulate(None, &response, &mut buffer)).expect("a keepalive");
        assert_eq!(opened(&session, &keepalive), Some(Vec::new()));
        let received = other.decapsulate(None, &sealed(&session), &mut buffer);
        assert!(matches!(received, TunnResult::WriteToTunnelV4(text, _) if *text == packet()));
    }
}

#[test]
fn a_forged_response_leaves_the_handshake_waiting() {
    let mut other = theirs(2, 1, None);
    let (mut begun, message) = begin(1, 2);
    let response = sent(other.decapsulate(None, &message, &mut [0; 2048])).expect("a response");
    let response: [u8; RESPONSE] = response.try_into().expect("of the right length");
    for byte in 8..60 {
        let mut forged = response;
        forged[byte] ^= 1;
        assert!(begun.complete(None, &forged).is_none(), "byte {byte}");
    }
    assert!(begun.complete(Some(&preshared()), &response).is_none(), "another preshared key");
    let session = session(begun.complete(None, &response).expect("completed"));
    assert!(matches!(other.decapsulate(None, &sealed(&session), &mut [0; 2048]), TunnResult::WriteToTunnelV4(..)));
}

#[test]
fn a_changed_initiation_is_not_opened() {
    let (_, message) = begin(2, 1);
    let known = Responder::open(&private(1), &message).expect("authentic");
    assert_eq!(*known.peer(), public(2));
    assert!(Responder::open(&private(3), &message).is_none(), "for another device");
    for byte in 8..116 {
        let mut changed = message;
        changed[byte] ^= 1;
        assert!(Responder::open(&private(1), &changed).is_none(), "byte {byte}");
    }
}

/// A public key of small order makes every exchange zero (RFC 7748 section 6.1).
#[test]
fn a_weak_public_key_is_refused() {
    let weak = |own: u8, key: [u8; 32]| {
        Initiator::begin(&private(own), &key.into(), OURS, Timestamp::now(), &mut [0; INITIATION])
    };
    assert!(weak(1, [0; 32]).is_none());
    let mut one = [0; 32];
    one[0] = 1;
    assert!(weak(1, one).is_none());
    // As the ephemeral key of a peer that is not honest.
    let (_, mut message) = begin(2, 1);
    message[8..40].fill(0);
    assert!(Responder::open(&private(1), &message).is_none());
    let (mut begun, message) = begin(1, 2);
    let response = sent(theirs(2, 1, None).decapsulate(None, &message, &mut [0; 2048])).expect("a response");
    let mut response: [u8; RESPONSE] = response.try_into().expect("of the right length");
    response[12..44].fill(0);
    assert!(begun.complete(None, &response).is_none());
}

#[test]
fn later_timestamps_are_greater() {
    let first = Timestamp::now();
    std::thread::sleep(Duration::from_millis(20));
    assert!(Timestamp::now() > first);
    let (_, message) = begin(2, 1);
    assert!(Responder::open(&private(1), &message).expect("authentic").timestamp() > first);
}

/// The other implementation demands a cookie, and accepts ours; and the other way around.
#[test]
fn cookies_are_exchanged_with_another_implementation() {
    let (_, mut message) = begin(1, 2);
    let strict = RateLimiter::new(&x25519::PublicKey::from(*public(2).as_bytes()), 0);
    let mut writer = MacWriter::new(&public(2));
    writer.write(&mut message, NOW);
    let mut buffer = [0; 2048];
    let Err(TunnResult::WriteToNetwork(reply)) = strict.verify_packet(Some(from().ip()), &message, &mut buffer) else {
        panic!("no cookie is demanded");
    };
    let reply: [u8; COOKIE_REPLY] = (&*reply).try_into().expect("of the right length");
    assert!(!MacWriter::new(&public(2)).take_cookie(&reply, NOW), "for somebody who has sent nothing");
    let mut forged = reply;
    forged[40] ^= 1;
    assert!(!writer.take_cookie(&forged, NOW));
    assert!(writer.take_cookie(&reply, NOW));
    assert!(!writer.take_cookie(&reply, NOW), "once");
    writer.write(&mut message, NOW);
    assert!(strict.verify_packet(Some(from().ip()), &message, &mut buffer).is_ok());
    writer.write(&mut message, NOW + Duration::from_secs(120));
    assert_eq!(message[132..], [0; 16], "an old cookie is not shown");

    // Their end shows ours.
    let limiter = Arc::new(RateLimiter::new(&x25519::PublicKey::from(*public(2).as_bytes()), u64::MAX));
    let key = x25519::StaticSecret::from([2; 32]);
    let us = x25519::PublicKey::from(*public(1).as_bytes());
    let mut other = Tunn::new(key, us, None, None, 9, Some(limiter));
    let mut checker = MacChecker::new(&public(1), 0, NOW).expect("random bytes");
    let initiation = sent(other.format_handshake_initiation(&mut buffer, false)).expect("an initiation");
    let MacVerdict::CookieDemanded(reply) = checker.check(&initiation, from(), NOW) else { panic!("not demanded") };
    assert!(matches!(other.decapsulate(None, &reply, &mut buffer), TunnResult::Done));
    let again = sent(other.format_handshake_initiation(&mut buffer, true)).expect("an initiation");
    assert_eq!(checker.check(&again, from(), NOW), MacVerdict::Valid);
    let elsewhere = "192.0.2.1:1001".parse().expect("an address");
    assert!(matches!(checker.check(&again, elsewhere, NOW), MacVerdict::CookieDemanded(_)), "another port");
    let later = NOW + Duration::from_secs(120);
    assert!(matches!(checker.check(&again, from(), later), MacVerdict::CookieDemanded(_)), "an old cookie");
    let mut changed = again.clone();
    changed[20] ^= 1;
    assert_eq!(checker.check(&changed, from(), NOW), MacVerdict::Invalid);
    assert_eq!(checker.check(&again[..31], from(), NOW), MacVerdict::Invalid);
}

#[test]
fn the_load_is_counted_by_the_second() {
    let (_, message) = begin(2, 1);
    let mut checker = MacChecker::new(&public(1), 2, NOW).expect("random bytes");
    for _ in 0..2 {
        assert_eq!(checker.check(&message, from(), NOW), MacVerdict::Valid);
    }
    assert!(matches!(checker.check(&message, from(), NOW), MacVerdict::CookieDemanded(_)));
    assert_eq!(checker.check(&message, from(), NOW + Duration::from_secs(1)), MacVerdict::Valid);
}
