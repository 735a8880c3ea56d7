//! Tests of the protocol: routing, roaming, padding, cookies, replays, and endpoints that become known late.

use std::net::SocketAddr;
use std::time::Duration;

use super::network::*;
use crate::keys::PresharedKey;
use crate::wireguard::userspace::clock::{self, travel};
use crate::wireguard::userspace::device::{Core, Dropped};
use crate::wireguard::{DeviceConfig, PeerConfig};

const ELSEWHERE: &str = "203.0.113.7:4000";

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

#[test]
fn queued_packets_arrive_in_order_and_both_ways() {
    let (mut client, mut server) = client_and_server();
    let packets = [
        packet("10.0.0.1", "10.0.0.2", 20),
        packet("2001:db8::1", "2001:db8::2", 40),
        packet("10.0.0.1", "192.0.2.200", MTU as usize),
    ];
    for packet in &packets {
        client.send(packet);
    }
    let kinds: Vec<u8> = settle(&mut [&mut client, &mut server]).iter().map(|(_, _, d)| d[0]).collect();
    assert_eq!(kinds, [1, 2, 4, 4, 4], "one handshake and the packets, which need no keepalive");
    assert_eq!(server.take_delivered(), packets);
    assert_eq!((client.sink.handshakes, server.sink.handshakes), (1, 1));

    let answers = [packet("2001:db8::2", "2001:db8::1", 1000), packet("10.0.0.2", "10.0.0.1", 333)];
    for packet in &answers {
        server.send(packet);
    }
    settle(&mut [&mut client, &mut server]);
    assert_eq!(client.take_delivered(), answers);
    assert_eq!(client.core.dropped(), Dropped::default());
    assert_eq!(server.core.dropped(), Dropped::default());
}

#[test]
fn counters_count_encrypted_bytes() {
    let (mut client, mut server) = client_and_server();
    client.send(&packet("10.0.0.1", "10.0.0.2", 100));
    settle(&mut [&mut client, &mut server]);
    // Initiation, and 100 bytes padded to 112; response.
    let (up, down) = (148 + 112 + 32, 92);
    let (at_client, at_server) = (client.status(0), server.status(0));
    assert_eq!((at_client.tx_bytes, at_client.rx_bytes), (up, down));
    assert_eq!((at_server.tx_bytes, at_server.rx_bytes), (down, up));
    assert!(at_client.handshake_age.expect("a handshake") < Duration::from_secs(5));

    client.sink.unreachable = true;
    client.send(&outbound());
    assert_eq!(client.status(0).tx_bytes, up, "what was not sent does not count");
}

#[test]
fn the_longest_prefix_selects_the_peer_and_validates_sources() {
    let mut hub = Node::new(
        SERVER,
        &device(1, vec![peer(2, &["10.0.0.0/8"], Some("192.0.2.2:2")), peer(3, &["10.3.0.0/16"], Some("192.0.2.3:3"))]),
    );
    let spoke = |number: u8| {
        Node::new(&format!("192.0.2.{number}:{number}"), &device(number, vec![peer(1, &["0.0.0.0/0"], Some(SERVER))]))
    };
    let (mut two, mut three) = (spoke(2), spoke(3));

    let (to_two, to_three) = (packet("10.9.9.9", "10.2.0.1", 60), packet("10.9.9.9", "10.3.0.1", 60));
    hub.send(&to_two);
    hub.send(&to_three);
    hub.send(&packet("10.9.9.9", "11.0.0.1", 60));
    settle(&mut [&mut hub, &mut two, &mut three]);
    assert_eq!(two.take_delivered(), [to_two]);
    assert_eq!(three.take_delivered(), [to_three]);
    assert_eq!(hub.core.dropped(), Dropped { no_peer: 1, ..Dropped::default() });

    // 10.3.0.1 lies in the prefix of peer 2 as well, but belongs to peer 3.
    let honest = packet("10.3.0.1", "10.9.9.9", 60);
    two.send(&honest);
    three.send(&honest);
    three.send(&packet("10.2.0.1", "10.9.9.9", 60));
    three.send(&packet("172.16.0.1", "10.9.9.9", 60));
    settle(&mut [&mut hub, &mut two, &mut three]);
    assert_eq!(hub.take_delivered(), [honest]);
    assert_eq!(hub.core.dropped().source_not_allowed, 3);
}

#[test]
fn padding_is_to_16_bytes_but_not_beyond_the_mtu() {
    let (mut client, mut server) = client_and_server();
    client.send(&outbound());
    settle(&mut [&mut client, &mut server]);
    server.take_delivered();
    let mtu = MTU as usize;
    for (length, padded) in [
        (20, 32),
        (32, 32),
        (33, 48),
        (1400, 1408),
        (mtu - 1, mtu),
        (mtu, mtu),
        // Longer than the MTU: as Linux, by what exceeds it.
        (mtu + 1, mtu + 16),
        (2 * mtu - 1, 2 * mtu),
    ] {
        let packet = packet("10.0.0.1", "10.0.0.2", length);
        client.send(&packet);
        let sent = settle(&mut [&mut client, &mut server]);
        assert_eq!(sent[0].2.len(), padded + 32, "a packet of {length} bytes");
        assert_eq!(server.take_delivered(), [packet], "the padding is gone again");
    }
}

#[test]
fn a_peer_roams_by_authentic_messages_only() {
    let (mut client, mut server) = client_and_server();
    client.send(&outbound());
    settle(&mut [&mut client, &mut server]);
    assert_eq!(server.status(0).endpoint, Some(address(CLIENT)));

    // A message that is tampered with, a replay, garbage with a right session index, a cookie reply: none moves it.
    client.send(&outbound());
    let (_, fresh) = client.take_sent().remove(0);
    let mut forged = fresh.clone();
    *forged.last_mut().expect("a byte") ^= 1;
    server.receive(&forged, address(ELSEWHERE));
    assert_eq!(server.status(0).endpoint, Some(address(CLIENT)));
    server.receive(&fresh, address(CLIENT));
    server.receive(&fresh, address(ELSEWHERE));
    assert_eq!(server.status(0).endpoint, Some(address(CLIENT)));
    let mut garbage = vec![0x55; 64];
    garbage[..8].copy_from_slice(&[3, 0, 0, 0, fresh[4], fresh[5], fresh[6], fresh[7]]);
    server.receive(&garbage, address(ELSEWHERE));
    garbage[0] = 4;
    server.receive(&garbage, address(ELSEWHERE));
    assert_eq!(server.status(0).endpoint, Some(address(CLIENT)));

    // An initiation that is replayed does not either, but a fresh one and data do.
    clock::travel::advance(Duration::from_secs(6));
    client.initiate(0);
    let (_, initiation) = client.take_sent().remove(0);
    server.receive(&initiation, address(CLIENT));
    server.receive(&initiation, address(ELSEWHERE));
    assert_eq!(server.status(0).endpoint, Some(address(CLIENT)));
    server.take_sent();
    client.address = address(ELSEWHERE);
    client.send(&outbound());
    settle(&mut [&mut client, &mut server]);
    assert_eq!(server.status(0).endpoint, Some(address(ELSEWHERE)));
    client.address = address("[2001:db8::77]:77");
    // Of two initiations with the same timestamp, the second one would be a replay.
    clock::travel::advance(Duration::from_secs(1));
    let mut fresh_client = Node::new("[2001:db8::77]:77", &device(1, vec![peer(2, &["0.0.0.0/0"], Some(SERVER))]));
    fresh_client.send(&outbound());
    settle(&mut [&mut fresh_client, &mut server]);
    assert_eq!(server.status(0).endpoint, Some(address("[2001:db8::77]:77")));
    server.take_delivered();
    server.send(&inbound());
    settle(&mut [&mut fresh_client, &mut server]);
    assert_eq!(fresh_client.take_delivered(), [inbound()], "answers follow it");
}

#[test]
fn an_authentic_cookie_reply_does_not_change_the_endpoint() {
    let (mut client, mut server) = client_and_server();
    exhaust(&mut server);
    client.send(&outbound());
    let (_, initiation) = client.take_sent().remove(0);
    server.receive(&initiation, address(CLIENT));
    let (_, reply) = server.take_sent().pop().expect("a cookie reply");
    assert_eq!(reply[0], 3);
    client.receive(&reply, address(ELSEWHERE));
    assert_eq!(client.core.dropped(), Dropped::default(), "the cookie was taken");
    assert_eq!(client.status(0).endpoint, Some(address(SERVER)));
}

fn exhaust(server: &mut Node) {
    flood(server, 2);
}

/// Sends enough initiations with a valid first MAC to put the device with this number under load.
fn flood(server: &mut Node, number: u8) {
    let mut stranger = Node::new(ELSEWHERE, &device(9, vec![peer(number, &["0.0.0.0/0"], Some(SERVER))]));
    for _ in 0..100 {
        stranger.set_endpoint(0, SERVER);
        stranger.set_endpoint(0, "198.51.100.9:9");
        stranger.initiate(0);
        let (_, initiation) = stranger.take_sent().remove(0);
        server.receive(&initiation, address(ELSEWHERE));
    }
    assert!(server.take_sent().iter().all(|(_, datagram)| datagram[0] == 3), "a stranger is never answered");
}

/// A flood from many addresses can leave no cookie for the peer's.
#[test]
fn under_load_the_answer_of_a_peer_needs_no_cookie() {
    let (mut client, mut server) = client_and_server();
    client.send(&outbound());
    let (_, initiation) = client.take_sent().remove(0);
    flood(&mut client, 1);
    flood(&mut client, 1);
    assert!(client.core.dropped().cookie_demanded > 0);
    server.receive(&initiation, address(CLIENT));
    settle(&mut [&mut client, &mut server]);
    assert_eq!(server.take_delivered(), [outbound()]);
}

#[test]
fn under_load_a_cookie_is_demanded_and_accepted() {
    let (mut client, mut server) = client_and_server();
    exhaust(&mut server);
    client.send(&outbound());
    let kinds: Vec<u8> = settle(&mut [&mut client, &mut server]).iter().map(|(_, _, d)| d[0]).collect();
    assert_eq!(kinds, [1, 3], "the initiation is answered with a cookie");
    assert!(server.core.dropped().cookie_demanded > 0);

    // The client shows the cookie when it tries again; the server is still under load then.
    let sent = pass(Duration::from_secs(6), &mut [&mut client]).log;
    assert_eq!(sent.len(), 1);
    exhaust(&mut server);
    let mut without = sent[0].2.clone();
    without[132..].fill(0);
    server.receive(&without, address(CLIENT));
    assert_eq!(server.take_sent().pop().expect("a reply").1[0], 3, "without the cookie it is refused");
    server.receive(&sent[0].2, address(ELSEWHERE));
    assert_eq!(server.take_sent().pop().expect("a reply").1[0], 3, "a cookie is for one address");
    server.receive(&sent[0].2, address(CLIENT));
    settle(&mut [&mut client, &mut server]);
    assert_eq!(server.take_delivered(), [outbound()]);

    // One address cannot have the device do the work of a handshake again and again.
    let before = server.core.dropped();
    for _ in 0..10 {
        server.receive(&sent[0].2, address(CLIENT));
    }
    let after = server.core.dropped();
    assert_eq!((after.not_authentic - before.not_authentic, after.too_frequent), (4, 6), "replays, beyond the burst");
}

#[test]
fn the_load_ends() {
    let (mut client, mut server) = client_and_server();
    exhaust(&mut server);
    clock::travel::advance(Duration::from_secs(1));
    client.send(&outbound());
    settle(&mut [&mut client, &mut server]);
    assert_eq!(server.take_delivered(), [outbound()]);
}

#[test]
fn a_replayed_packet_is_delivered_once() {
    let (mut client, mut server) = client_and_server();
    client.send(&outbound());
    settle(&mut [&mut client, &mut server]);
    server.take_delivered();
    client.send(&outbound());
    let (_, datagram) = client.take_sent().remove(0);
    server.receive(&datagram, address(CLIENT));
    server.receive(&datagram, address(CLIENT));
    assert_eq!(server.take_delivered(), [outbound()]);
    assert_eq!(server.core.dropped(), Dropped { not_authentic: 1, ..Dropped::default() });
}

#[test]
fn a_late_endpoint_receives_the_queued_packets() {
    let (mut client, mut server) = client_and_server_with(peer(2, &["0.0.0.0/0"], None));
    client.send(&outbound());
    client.send(&outbound());
    assert!(pass(Duration::from_secs(60), &mut [&mut client, &mut server]).log.is_empty());
    client.set_endpoint(0, SERVER);
    settle(&mut [&mut client, &mut server]);
    assert_eq!(server.take_delivered(), [outbound(), outbound()]);
}

#[test]
fn a_very_late_endpoint_still_receives_a_handshake() {
    let (mut client, mut server) = client_and_server_with(peer(2, &["0.0.0.0/0"], None));
    client.send(&outbound());
    pass(Duration::from_secs(600), &mut [&mut client, &mut server]);
    client.set_endpoint(0, SERVER);
    settle(&mut [&mut client, &mut server]);
    assert_eq!(client.sink.handshakes, 1);
}

#[test]
fn a_new_endpoint_receives_nothing_without_need() {
    let (mut client, _) = client_and_server_with(peer(2, &["0.0.0.0/0"], None));
    client.set_endpoint(0, SERVER);
    assert!(client.take_sent().is_empty());
}

#[test]
fn a_handshake_in_flight_is_sent_to_a_new_endpoint_at_once() {
    let (mut client, mut server) = client_and_server_with(peer(2, &["0.0.0.0/0"], Some("198.51.100.66:66")));
    client.send(&outbound());
    assert_eq!(client.take_sent().len(), 1);
    client.set_endpoint(0, "198.51.100.66:66");
    assert!(client.take_sent().is_empty(), "the endpoint has not changed");
    client.set_endpoint(0, "[::ffff:198.51.100.1]:51820");
    assert_eq!(client.status(0).endpoint, Some(address(SERVER)), "a mapped address is the address");
    settle(&mut [&mut client, &mut server]);
    assert_eq!(server.take_delivered(), [outbound()]);
}

#[test]
fn an_answer_to_an_earlier_initiation_completes_the_handshake() {
    let (mut client, mut server) = client_and_server();
    client.send(&outbound());
    let (_, first) = client.take_sent().remove(0);
    client.set_endpoint(0, ELSEWHERE);
    client.take_sent();
    server.receive(&first, address(CLIENT));
    settle(&mut [&mut client, &mut server]);
    assert_eq!(server.take_delivered(), [outbound()]);
    assert_eq!(client.status(0).endpoint, Some(address(SERVER)), "where the answer came from");
    let sent = pass(Duration::from_secs(60), &mut [&mut client, &mut server]).log;
    assert!(sent.iter().all(|(_, _, datagram)| datagram[0] == 4), "the last one is not repeated: {sent:?}");
}

/// The server knows the last session that it has answered only, so the first one leads nowhere.
#[test]
fn the_answer_to_a_later_initiation_counts_after_that_to_an_earlier_one() {
    let (mut client, mut server) = client_and_server();
    client.send(&outbound());
    let (_, first) = client.take_sent().remove(0);
    // Two initiations of the same moment are a replay.
    travel::advance(Duration::from_millis(40));
    client.set_endpoint(0, ELSEWHERE);
    let (_, second) = client.take_sent().remove(0);
    for initiation in [&first, &second] {
        // The server takes two that follow too closely for a flood.
        travel::advance(Duration::from_millis(40));
        server.receive(initiation, address(CLIENT));
        let (_, answer) = server.take_sent().remove(0);
        client.receive(&answer, address(SERVER));
    }
    assert_eq!(client.sink.handshakes, 2);
    client.take_sent();
    client.send(&outbound());
    settle(&mut [&mut client, &mut server]);
    assert_eq!(server.take_delivered(), [outbound()]);
}

#[test]
fn no_handshake_begins_right_after_one_was_answered() {
    let (mut client, mut server) = client_and_server();
    client.send(&outbound());
    let (_, initiation) = client.take_sent().remove(0);
    server.receive(&initiation, address(CLIENT));
    assert_eq!(server.take_sent().len(), 1);
    server.send(&inbound());
    assert!(server.take_sent().is_empty(), "the client's first packet opens the session");
    travel::advance(Duration::from_secs(5));
    server.send(&inbound());
    assert_eq!(server.take_sent().len(), 1, "that packet was lost");
}

#[test]
fn a_late_endpoint_receives_a_full_attempt() {
    let (mut client, mut server) = client_and_server_with(peer(2, &["0.0.0.0/0"], None));
    client.send(&outbound());
    pass(Duration::from_secs(88), &mut [&mut client]);
    client.set_endpoint(0, SERVER);
    // The server is away for some seconds, in which the attempt that began without an endpoint comes to its end.
    pass(Duration::from_secs(10), &mut [&mut client]);
    pass(Duration::from_secs(6), &mut [&mut client, &mut server]);
    assert_eq!(client.sink.handshakes, 1);
}

#[test]
fn a_persistent_keepalive_starts_a_handshake() {
    let keepalive = |endpoint| PeerConfig { persistent_keepalive: Some(25), ..peer(2, &["0.0.0.0/0"], endpoint) };
    let (mut client, mut server) = client_and_server_with(keepalive(Some(SERVER)));
    settle(&mut [&mut client, &mut server]);
    assert_eq!((client.sink.handshakes, server.sink.handshakes), (1, 1));

    let (mut client, mut server) = client_and_server_with(keepalive(None));
    pass(Duration::from_secs(600), &mut [&mut client]);
    client.set_endpoint(0, SERVER);
    settle(&mut [&mut client, &mut server]);
    assert_eq!((client.sink.handshakes, server.sink.handshakes), (1, 1));
}

#[test]
fn a_responder_queues_packets_until_the_session_is_confirmed() {
    let (mut client, mut server) = client_and_server();
    client.initiate(0);
    let (_, initiation) = client.take_sent().remove(0);
    server.receive(&initiation, address(CLIENT));
    let (_, response) = server.take_sent().remove(0);
    assert_eq!((server.sink.handshakes, server.status(0).handshake_age), (0, None), "nothing is confirmed yet");
    server.send(&inbound());
    assert!(server.take_sent().iter().all(|(_, datagram)| datagram[0] != 4), "no data yet");
    client.receive(&response, address(SERVER));
    settle(&mut [&mut client, &mut server]);
    assert_eq!(client.take_delivered(), [inbound()]);
    assert_eq!(server.sink.handshakes, 1);
}

#[test]
fn a_handshake_is_not_repeated_right_after_its_completion() {
    let (mut client, mut server) = client_and_server();
    client.send(&outbound());
    settle(&mut [&mut client, &mut server]);
    client.initiate(0);
    server.initiate(0);
    assert!(settle(&mut [&mut client, &mut server]).is_empty());
    clock::travel::advance(Duration::from_secs(6));
    client.initiate(0);
    settle(&mut [&mut client, &mut server]);
    assert_eq!((client.sink.handshakes, server.sink.handshakes), (2, 2));
}

#[test]
fn packets_other_than_ip_are_dropped() {
    let (mut client, mut server) = client_and_server();
    client.send(&outbound());
    settle(&mut [&mut client, &mut server]);
    server.take_delivered();
    for bytes in [vec![], vec![0x45; 19], vec![0x60; 39], vec![0x70; 100]] {
        client.send(&bytes);
    }
    assert_eq!(client.core.dropped(), Dropped { not_ip: 4, ..Dropped::default() });
    assert!(client.take_sent().is_empty());
    // Headers whose length is less than their own, and more than there is.
    for length in [0, 19, 200] {
        let mut packet = outbound();
        packet[3] = length;
        client.send(&packet);
    }
    settle(&mut [&mut client, &mut server]);
    assert!(server.take_delivered().is_empty());
    assert_eq!(server.core.dropped(), Dropped { malformed: 3, ..Dropped::default() });
}

#[test]
fn a_different_preshared_key_makes_no_session() {
    let with = |byte| Some(PresharedKey::from([byte; 32]));
    let to_server = |byte| PeerConfig { preshared_key: with(byte), ..peer(2, &["0.0.0.0/0"], Some(SERVER)) };
    let (mut client, mut server) = client_and_server_with(to_server(7));
    client.send(&outbound());
    settle(&mut [&mut client, &mut server]);
    assert_eq!(server.take_delivered(), [outbound()]);

    let mut other = Node::new(CLIENT, &device(1, vec![to_server(8)]));
    other.send(&outbound());
    settle(&mut [&mut other, &mut server]);
    assert_eq!(other.sink.handshakes, 0);
    assert!(server.take_delivered().is_empty());
}

#[test]
fn invalid_configurations_are_refused() {
    let refuse = |config: &DeviceConfig| match Core::new(config, clock::now()) {
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput),
        Ok(_) => panic!("accepted"),
    };
    refuse(&device(1, vec![peer(2, &[], None), peer(2, &["10.0.0.0/8"], None)]));
    refuse(&device(1, vec![PeerConfig { public_key: [0; 32].into(), ..peer(2, &[], None) }]));
}
