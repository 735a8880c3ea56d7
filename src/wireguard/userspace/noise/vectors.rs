//! The published test vectors of the Noise protocol framework for WireGuard's pattern, made by the implementation
//! Cacophony.

use snow::Builder;

use super::handshake::PATTERN;
use super::message::{DATA_HEADER, DATA_OVERHEAD};
use super::resolver::Primitives;
use super::session::{Session, SessionKeys};

const PROLOGUE: &str = "4a6f686e2047616c74";
const PRESHARED_KEY: &str = "54686973206973206d7920417573747269616e20706572737065637469766521";
const INITIATOR: [&str; 2] = [
    "e61ef9919cde45dd5f82166404bd08e38bceb5dfdfded0a34c8df7ed542214d1",
    "893e28b9dc6ca8d611ab664754b8ceb7bac5117349a4439a6b0569da977c464a",
];
const RESPONDER: [&str; 2] = [
    "4a3acbfdb163dec651dfa3194dece676d437029c62a408b4c5ea9114246e4893",
    "bbdb4cdbd309f1a1f2e1456967fe288cadd6f712d65dc7b7793d5e63da6b375b",
];
const RESPONDER_PUBLIC: &str = "31e0303fd6418d2f8c0e78b91f22e8caed0fbe48656dcf4767e4834f701b8f62";
const HASH: &str = "f5191b875290abcd41347ac3622d9679688a7e980229cb937ef748336cfde0e5";

/// The contents and messages of the handshake.
const HANDSHAKE: [[&str; 2]; 2] = [
    [
        "4c756477696720766f6e204d69736573",
        "ca35def5ae56cec33dc2036731ab14896bc4c75dbb07a61f879f8e3afa4c7944001e21de9f98ddd8e2ad57527207feb56253c9c94a9e\
         496782ecfcb2a75fbcaf1b52948cc48daefe660c62119ab5000980c84831215f2441eba616548e832985464cf17e51ee93109008399a\
         21f7e13f",
    ],
    [
        "4d757272617920526f746862617264",
        "95ebc60d2b1fa672c1f46a8aa265ef51bfe38e7ccb39ec5be34069f144808843cb765f2caef0751b8f007572dab0322217755c0632f3\
         65717edbf34d33e87a",
    ],
];

/// The contents and messages after it, of which the initiator sends the first.
const TRANSPORT: [[&str; 2]; 4] = [
    ["462e20412e20486179656b", "8153ca9833bc3c1b91a7e66e5f4d4f5b59bf9e64c2f20d15f0bba7"],
    ["4361726c204d656e676572", "07af0c9c86e1b4e80f36b04ff7688d51141af3debd0332f0a705ef"],
    ["4a65616e2d426170746973746520536179", "6ab1467c0448cc78394494abaaf23afce0e234315d6e2624dcbfa8a21c1c4d073d"],
    [
        "457567656e2042f6686d20766f6e2042617765726b",
        "dfc346c0d2296ae6cf1acf6f12b8456a1dba228cf8d8b774aacf1c47fc53aa80ebc7a4c292",
    ],
];

fn bytes(hex: &str) -> Vec<u8> {
    let digit = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("two digits");
    (0..hex.len()).step_by(2).map(digit).collect()
}

/// The handshake with the primitives of the resolver, and the packets after it with those of a session.
#[test]
fn the_published_vectors_of_noise_pass() {
    let [psk, prologue, public] = [PRESHARED_KEY, PROLOGUE, RESPONDER_PUBLIC].map(bytes);
    let psk: [u8; 32] = psk.try_into().expect("32 bytes");
    let keys = [INITIATOR, RESPONDER].map(|keys| keys.map(bytes));
    let builder = |[key, ephemeral]: &'static [Vec<u8>; 2]| {
        let builder = Builder::with_resolver(PATTERN.parse().expect("a pattern"), Box::new(Primitives));
        let builder = builder.local_private_key(key).expect("a key").fixed_ephemeral_key_for_testing_only(ephemeral);
        builder.psk(2, &psk).expect("a key").prologue(&prologue).expect("a prologue")
    };
    let [initiator, responder] = keys;
    let (initiator, responder) = (Box::leak(Box::new(initiator)), Box::leak(Box::new(responder)));
    let builder_of_initiator = builder(initiator).remote_public_key(&public).expect("a key");
    let mut initiator = builder_of_initiator.build_initiator().expect("an initiator");
    let mut responder = builder(responder).build_responder().expect("a responder");
    let (mut message, mut content) = ([0; 200], [0; 200]);
    for (number, [text, sealed]) in HANDSHAKE.into_iter().enumerate() {
        let (from, to) = if number == 0 { (&mut initiator, &mut responder) } else { (&mut responder, &mut initiator) };
        let length = from.write_message(&bytes(text), &mut message).expect("written");
        assert_eq!(message[..length], bytes(sealed));
        let read = to.read_message(&message[..length], &mut content).expect("read");
        assert_eq!(content[..read], bytes(text));
    }
    assert_eq!(initiator.get_handshake_hash(), bytes(HASH));
    assert_eq!(responder.get_handshake_hash(), bytes(HASH));

    let (there, back) = initiator.dangerously_get_raw_split();
    assert_eq!(responder.dangerously_get_raw_split(), (there, back));
    let session = |sending: [u8; 32], receiving: [u8; 32]| {
        Session::new(&SessionKeys { sending: sending.into(), receiving: receiving.into() }, 1, 2).expect("a session")
    };
    let (initiator, responder) = (session(there, back), session(back, there));
    for (number, [text, sealed]) in TRANSPORT.into_iter().enumerate() {
        let (from, to) = if number % 2 == 0 { (&initiator, &responder) } else { (&responder, &initiator) };
        let text = bytes(text);
        let mut message = vec![0; text.len() + DATA_OVERHEAD];
        message[DATA_HEADER..DATA_HEADER + text.len()].copy_from_slice(&text);
        let counter = from.reserve(1).expect("a counter");
        assert!(from.seal(counter, &mut message));
        assert_eq!(message[DATA_HEADER..], bytes(sealed));
        assert_eq!(to.open(counter, &mut message).expect("authentic"), text);
    }
}
