//! Traffic across many handshakes, with counters that were reserved under a former session.

use std::time::Duration;

use super::network::*;
use crate::wireguard::userspace::clock::{self, travel};
use crate::wireguard::userspace::noise::{DATA_HEADER, DATA_OVERHEAD};

/// The packets that are on their way together, and the rounds, of a second each.
const BURST: usize = 20;
const ROUNDS: usize = 3_000;

/// Reserves counters for a packet many times, as a packet of several segments does, and returns the messages unsealed.
fn reserve(node: &mut Node, packet: &[u8]) -> impl FnOnce() -> Vec<Vec<u8>> + use<> {
    let length = node.core.message_length(packet.len());
    let (_, reserved) = node
        .core
        .reserve(packet, BURST, BURST * length, clock::now(), &mut node.sink)
        .expect("there is a session all the time");
    let packet = packet.to_vec();
    move || {
        let message = |counter| {
            let mut message = vec![0; length.max(packet.len() + DATA_OVERHEAD)];
            message[DATA_HEADER..DATA_HEADER + packet.len()].copy_from_slice(&packet);
            assert!(reserved.session.seal(counter, &mut message));
            message
        };
        (reserved.first..).take(BURST).map(message).collect()
    }
}

/// Packets are sealed and arrive a round after their counters were reserved, in another order, while handshakes go on.
#[test]
fn packets_on_their_way_during_handshakes_arrive() {
    let (mut client, mut server) = client_and_server();
    client.send(&outbound());
    settle(&mut [&mut client, &mut server]);
    assert_eq!(server.take_delivered(), [outbound()]);
    let (mut up, mut down) = (Vec::new(), Vec::new());
    let mut handshakes = 0;
    for round in 0..ROUNDS {
        let (to_server, to_client) = (reserve(&mut client, &outbound()), reserve(&mut server, &inbound()));
        for (messages, node, from) in [(&mut up, &mut server, CLIENT), (&mut down, &mut client, SERVER)] {
            let mut messages: Vec<Vec<u8>> = std::mem::take(messages);
            let middle = round % BURST.min(messages.len().max(1));
            messages.rotate_left(middle);
            let (count, from) = (messages.len(), from.parse().expect("an address"));
            messages.iter().for_each(|message| node.receive(message, from));
            assert_eq!(node.take_delivered().len(), count, "in round {round}");
        }
        (up, down) = (to_server(), to_client());
        let log = pass(Duration::from_secs(1), &mut [&mut client, &mut server]).log;
        handshakes += log.iter().filter(|(.., datagram)| datagram[0] == 1).count();
        travel::advance(Duration::from_millis(1));
    }
    assert!((24..=26).contains(&handshakes), "{handshakes} handshakes in {ROUNDS} s");
    assert_eq!(client.core.dropped().not_authentic + server.core.dropped().not_authentic, 0);
}
