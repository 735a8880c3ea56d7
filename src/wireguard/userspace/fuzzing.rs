//! An entry point for fuzzing the embedded device: two devices that talk to each other, and an outsider whose messages
//! have valid MACs.

use std::net::SocketAddr;
use std::time::Duration;

use blake2::digest::consts::U16;
use blake2::digest::{Digest, FixedOutput, KeyInit, Update};
use blake2::{Blake2s256, Blake2sMac};

use super::device::{Core, PACKET_BUFFER, Sink};
use crate::keys::{PrivateKey, PublicKey};
use crate::wireguard::{DeviceConfig, PeerConfig};

/// Cuts a frame of a TUN into segments.
pub fn tun_frame(input: &[u8]) {
    super::offload::fuzzing::tun_frame(input);
}

/// Joins received packets.
pub fn received(input: &[u8]) {
    super::offload::fuzzing::received(input);
}

/// The start time of the devices.
const START: Duration = Duration::from_secs(1000);

/// A number of messages that no input of a single step can cause.
const MANY: usize = 300;

#[derive(Default)]
struct Record {
    sent: Vec<(SocketAddr, Vec<u8>)>,
}

impl Sink for Record {
    fn send(&mut self, endpoint: SocketAddr, datagram: &[u8]) -> bool {
        self.sent.push((endpoint, datagram.to_vec()));
        true
    }

    fn handshake_completed(&mut self) {}

    fn handshake_unanswered(&mut self) {}
}

fn private(number: u8) -> PrivateKey {
    [number; 32].into()
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// Returns the configuration of a device whose peer is the other one.
fn config(own: u8, other: u8, allowed: &str) -> DeviceConfig {
    let endpoint = if own == 1 { "192.0.2.2:2" } else { "192.0.2.1:1" };
    let peer = PeerConfig {
        public_key: private(other).public_key(),
        preshared_key: None,
        allowed_ips: vec![allowed.parse().expect("a network")],
        persistent_keepalive: None,
        endpoint: Some(address(endpoint)),
    };
    DeviceConfig { private_key: private(own), listen_port: 0, fwmark: 0, mtu: 1420, peers: vec![peer] }
}

/// Sets the first MAC of a message to the receiver (WireGuard paper, section 5.4.4), which any outsider can compute.
fn sign(receiver: &PublicKey, message: &mut [u8]) {
    let Some(end) = message.len().checked_sub(32) else { return };
    let mut hash = Blake2s256::new();
    Digest::update(&mut hash, b"mac1----");
    Digest::update(&mut hash, receiver.as_bytes());
    let mut mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(&hash.finalize()).expect("a key of 32 bytes");
    Update::update(&mut mac, &message[..end]);
    message[end..end + 16].copy_from_slice(&mac.finalize_fixed());
}

/// Returns an IPv4 packet between two addresses, and its length. The input determines everything after the header.
fn packet(source: [u8; 4], destination: [u8; 4], body: &[u8]) -> (Vec<u8>, usize) {
    let mut buffer = vec![0xff; PACKET_BUFFER];
    buffer[..12].copy_from_slice(&[0x45, 0, 0, 40, 0, 0, 0, 0, 64, 17, 0, 0]);
    buffer[12..16].copy_from_slice(&source);
    buffer[16..20].copy_from_slice(&destination);
    buffer[20..20 + body.len()].copy_from_slice(body);
    (buffer, 20 + body.len())
}

/// Passes a datagram to a device.
fn receive(device: &mut Core, datagram: &mut [u8], from: SocketAddr, now: Duration, record: &mut Record) {
    if let Some(packet) = device.on_datagram(datagram, from, now, record) {
        assert!(datagram[packet].len() >= 20, "a delivered packet has an IP header");
    }
}

/// Runs a script. In each step, the first byte selects the action, and the second is the length of the data that
/// follow.
pub fn device(mut script: &[u8]) {
    let (one, two, outsider) = (address("192.0.2.1:1"), address("192.0.2.2:2"), address("203.0.113.6:6"));
    let mut now = START;
    let mut ours = Core::new(&config(1, 2, "10.0.0.0/24"), now).expect("a device");
    let mut theirs = Core::new(&config(2, 1, "10.0.1.0/24"), now).expect("a device");
    let (mut from_us, mut from_them) = (Record::default(), Record::default());
    let (our_key, their_key) = (private(1).public_key(), private(2).public_key());
    let mut last = vec![0; 148];
    while let [act, length, rest @ ..] = script {
        let (body, rest) = rest.split_at(usize::from(*length).min(rest.len()));
        script = rest;
        let first = body.first().copied().unwrap_or(0);
        match act % 9 {
            0 => receive(&mut ours, &mut body.to_vec(), outsider, now, &mut from_us),
            1 => {
                let mut buffer = vec![0xff; PACKET_BUFFER];
                buffer[..body.len()].copy_from_slice(body);
                ours.on_packet(&mut buffer, body.len(), now, &mut from_us);
            }
            2 => {
                let kind = first % 4 + 1;
                let mut message = body.to_vec();
                let size = [148, 92, 64].get(usize::from(kind) - 1).copied().unwrap_or(body.len().max(32));
                message.resize(size, 0);
                message[..4].copy_from_slice(&[kind, 0, 0, 0]);
                // The index of the last message's session.
                let at = if kind == 2 { 8 } else { 4 };
                if let Some(index) = last.get(4..8) {
                    message[at..at + 4].copy_from_slice(index);
                }
                sign(&our_key, &mut message);
                receive(&mut ours, &mut message, outsider, now, &mut from_us);
            }
            3 => {
                let (mut buffer, length) = packet([10, 0, 0, 1], [10, 0, 1, 1], body);
                theirs.on_packet(&mut buffer, length, now, &mut from_them);
            }
            4 => {
                // The packet is routed to us, whatever its header contains otherwise.
                let (mut buffer, length) = packet([10, 0, 1, 1], [10, 0, 1, 1], body);
                for (byte, change) in buffer.iter_mut().take(16).zip(body) {
                    *byte ^= change;
                }
                if first % 2 == 0 {
                    buffer[0] = 0x45;
                }
                theirs.on_packet(&mut buffer, length, now, &mut from_them);
            }
            5 => {
                now += Duration::from_secs(first.into());
                ours.tick(now, &mut from_us);
                theirs.tick(now, &mut from_them);
            }
            6 => {
                if let Some(index) = ours.index_of(&their_key) {
                    ours.initiate_handshake(index, now, &mut from_us);
                }
            }
            7 => {
                // Authentic messages are modified on their way.
                for (_, message) in &mut from_them.sent {
                    for (byte, change) in
                        message.iter_mut().skip(usize::from(first) % 16 * 8).zip(&body[1.min(body.len())..])
                    {
                        *byte ^= change;
                    }
                }
            }
            _ => {
                let peer = if body.is_empty() { 2 } else { 3 };
                let _ = ours.reconfigure(&config(1, peer, "10.0.0.0/24"), now);
            }
        }
        // In some steps, the messages stay on their way, so that they can be modified.
        if act & 0x80 == 0 {
            for _ in 0..4 {
                for (to, message) in std::mem::take(&mut from_us.sent) {
                    last.clone_from(&message);
                    if to == two {
                        receive(&mut theirs, &mut message.clone(), one, now, &mut from_them);
                    }
                }
                for (to, message) in std::mem::take(&mut from_them.sent) {
                    if to == one {
                        receive(&mut ours, &mut message.clone(), two, now, &mut from_us);
                    }
                }
                assert!(from_us.sent.len() < MANY && from_them.sent.len() < MANY, "a message causes too many others");
            }
        }
        from_us.sent.truncate(MANY);
        from_them.sent.truncate(MANY);
        let _ = (ours.next_tick(), ours.status(now), ours.dropped());
    }
}
