//! Tests of the timers, and of how often a device wakes up for them.

use std::time::Duration;

use super::network::*;
use crate::wireguard::PeerConfig;
use crate::wireguard::userspace::clock::travel;

const INITIATION: u8 = 1;
const DATA: u8 = 4;

/// The length of a keepalive.
const KEEPALIVE: usize = 32;

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn with_keepalive(interval: u16) -> (Node, Node) {
    client_and_server_with(PeerConfig {
        persistent_keepalive: Some(interval),
        ..peer(2, &["0.0.0.0/0", "::/0"], Some(SERVER))
    })
}

/// Returns whether packets pass in both directions now.
fn works(client: &mut Node, server: &mut Node) -> bool {
    client.send(&outbound());
    settle(&mut [client, server]);
    server.send(&inbound());
    settle(&mut [client, server]);
    server.take_delivered().contains(&outbound()) && client.take_delivered().contains(&inbound())
}

#[test]
fn an_unused_device_never_wakes_up() {
    let (client, server) = client_and_server();
    assert_eq!((client.core.next_tick(), server.core.next_tick()), (None, None));
}

#[test]
fn a_device_without_traffic_stops_waking_up() {
    let (mut client, mut server) = client_and_server();
    assert!(works(&mut client, &mut server));
    let elapsed = pass(seconds(3_600), &mut [&mut client, &mut server]);
    assert_eq!((client.core.next_tick(), server.core.next_tick()), (None, None));
    // Each device: the keepalive that it owes, and the end of two sessions.
    assert!(elapsed.wakeups <= 2 * 4, "{} wake-ups", elapsed.wakeups);
    assert!(works(&mut client, &mut server), "and wakes up again");
}

#[test]
fn an_unanswered_initiation_is_repeated_with_jitter_and_given_up() {
    let (mut client, _) = client_and_server();
    client.send(&outbound());
    let elapsed = pass(seconds(600), &mut [&mut client]);
    let times = elapsed.times(INITIATION, client.address);
    let gaps: Vec<u128> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(gaps.iter().all(|gap| (5_000..5_400).contains(gap)), "{gaps:?}");
    assert!(gaps.iter().any(|gap| *gap > 5_010), "no jitter: {gaps:?}");
    let last = *times.last().expect("initiations");
    assert!((80_000..91_000).contains(&last), "given up after 90 s: {times:?}");
    assert!(elapsed.wakeups < 25, "{} wake-ups", elapsed.wakeups);
    assert_eq!(client.core.next_tick(), None);
}

#[test]
fn the_next_packet_starts_a_new_attempt() {
    let (mut client, mut server) = client_and_server();
    client.send(&outbound());
    pass(seconds(120), &mut [&mut client]);
    assert!(works(&mut client, &mut server));
}

#[test]
fn a_new_endpoint_starts_a_new_attempt() {
    let (mut client, mut server) = client_and_server_with(peer(2, &["0.0.0.0/0"], Some("198.51.100.66:66")));
    client.send(&outbound());
    pass(seconds(120), &mut [&mut client]);
    client.set_endpoint(0, SERVER);
    settle(&mut [&mut client, &mut server]);
    assert_eq!(client.sink.handshakes, 1);
}

#[test]
fn an_initiation_of_the_other_side_starts_a_new_attempt() {
    let (mut client, mut server) = client_and_server();
    assert!(works(&mut client, &mut server));
    client.sink.unreachable = true;
    client.send(&outbound());
    pass(seconds(700), &mut [&mut client]);
    client.sink.unreachable = false;
    server.send(&inbound());
    settle(&mut [&mut client, &mut server]);
    assert_eq!(client.take_delivered(), [inbound()]);
    pass(seconds(10), &mut [&mut client, &mut server]);
    server.send(&inbound());
    settle(&mut [&mut client, &mut server]);
    assert_eq!(client.take_delivered(), [inbound()], "the session is not taken for an old one");
}

#[test]
fn a_persistent_keepalive_never_gives_up() {
    let (mut client, mut server) = with_keepalive(25);
    let elapsed = pass(seconds(1_000), &mut [&mut client]);
    let times = elapsed.times(INITIATION, client.address);
    assert!(times.windows(2).all(|pair| pair[1] - pair[0] < 26_000), "{times:?}");
    assert!(*times.last().expect("initiations") > 970_000);
    pass(seconds(26), &mut [&mut client, &mut server]);
    assert_eq!(client.sink.handshakes, 1, "the server is back");
}

#[test]
fn a_quiet_period_does_not_end_a_new_handshake() {
    for pause in [60, 100, 200, 539, 541, 3_600, 100_000] {
        let (mut client, mut server) = client_and_server();
        // The machine was suspended, so there were no ticks.
        travel::advance(seconds(pause));
        client.send(&outbound());
        client.take_sent();
        pass(seconds(6), &mut [&mut client, &mut server]);
        assert_eq!(client.sink.handshakes, 1, "after {pause} s");
        assert_eq!(server.take_delivered().len(), 1, "after {pause} s");
        travel::advance(seconds(pause));
        assert!(works(&mut client, &mut server), "after a session and {pause} s");
    }
}

#[test]
fn keys_are_renewed_under_traffic_without_loss() {
    let (mut client, mut server) = client_and_server();
    let mut initiations = Vec::new();
    for second in 0..600 {
        let mut log = Vec::new();
        client.send(&outbound());
        log.extend(settle(&mut [&mut client, &mut server]));
        server.send(&inbound());
        log.extend(settle(&mut [&mut client, &mut server]));
        assert_eq!(server.take_delivered(), [outbound()], "in second {second}");
        assert_eq!(client.take_delivered(), [inbound()], "in second {second}");
        let begun = log.iter().filter(|(.., datagram)| datagram[0] == INITIATION);
        initiations.extend(begun.map(|(from, ..)| (second, *from)));
        assert!(pass(seconds(1), &mut [&mut client, &mut server]).log.is_empty());
    }
    assert!(initiations.iter().all(|(_, from)| *from == client.address), "the responder does not renew");
    let when: Vec<i32> = initiations.iter().map(|(second, _)| *second).collect();
    assert!(when.windows(2).all(|pair| (119..=123).contains(&(pair[1] - pair[0]))), "every 120 s: {when:?}");
    assert_eq!(when.len(), 5, "{when:?}");
    assert!(client.status(0).handshake_age.expect("a handshake") <= seconds(121));
}

#[test]
fn the_persistent_keepalive_is_sent_after_silence_only() {
    let (mut client, mut server) = with_keepalive(25);
    settle(&mut [&mut client, &mut server]);
    let quiet = pass(seconds(101), &mut [&mut client, &mut server]);
    let times = quiet.times(DATA, client.address);
    assert_eq!(times.len(), 3 + 1, "{times:?}");
    assert!(quiet.log.iter().all(|(_, _, datagram)| datagram.len() == KEEPALIVE));
    assert!(
        times.iter().enumerate().all(|(n, at)| (*at as i128 - 25_000 * (n as i128 + 1)).abs() < 1_000),
        "{times:?}"
    );

    let (mut client, mut server) = with_keepalive(25);
    settle(&mut [&mut client, &mut server]);
    for _ in 0..10 {
        assert!(works(&mut client, &mut server));
        let busy = pass(seconds(8), &mut [&mut client, &mut server]);
        assert!(busy.log.is_empty(), "traffic takes its place: {:?}", busy.log);
    }
}

#[test]
fn received_messages_make_persistent_keepalives_unnecessary() {
    let (mut client, mut server) = with_keepalive(5);
    settle(&mut [&mut client, &mut server]);
    for _ in 0..4 {
        let log = pass(seconds(2), &mut [&mut client, &mut server]).log;
        assert!(log.is_empty(), "{log:?}");
        server.send(&inbound());
        settle(&mut [&mut client, &mut server]);
    }
}

#[test]
fn a_tunnel_with_keepalives_only_always_has_a_session() {
    let (mut client, mut server) = with_keepalive(25);
    settle(&mut [&mut client, &mut server]);
    for _ in 0..200 {
        let elapsed = pass(seconds(10), &mut [&mut client, &mut server]);
        assert!(elapsed.wakeups <= 4, "{} wake-ups in 10 s", elapsed.wakeups);
        assert!(client.status(0).handshake_age.expect("a handshake") < seconds(150));
    }
}

#[test]
fn a_receiver_without_traffic_of_its_own_sends_keepalives() {
    let (mut client, mut server) = client_and_server();
    client.send(&outbound());
    settle(&mut [&mut client, &mut server]);
    client.send(&outbound());
    let elapsed = pass(seconds(60), &mut [&mut client, &mut server]);
    let times = elapsed.times(DATA, server.address);
    assert_eq!(times.len(), 1, "{:?}", elapsed.log);
    assert!((9_000..12_000).contains(&times[0]), "{times:?}");
    assert!(elapsed.times(INITIATION, client.address).is_empty(), "so the sender need not ask");
}

#[test]
fn a_peer_that_lost_its_session_gets_a_new_handshake() {
    let (mut client, mut server) = client_and_server();
    assert!(works(&mut client, &mut server));
    let (_, mut restarted) = client_and_server();
    client.send(&outbound());
    let elapsed = pass(seconds(30), &mut [&mut client, &mut restarted]);
    let times = elapsed.times(INITIATION, client.address);
    assert_eq!(times.len(), 1, "{times:?}");
    assert!((14_000..17_000).contains(&times[0]), "{times:?}");
    assert!(works(&mut client, &mut restarted));
}

#[test]
fn an_expired_session_is_not_used_even_without_a_timer() {
    let (mut client, mut server) = client_and_server();
    assert!(works(&mut client, &mut server));
    travel::advance(seconds(181));
    client.send(&outbound());
    let sent = client.take_sent();
    assert!(sent.iter().all(|(_, datagram)| datagram[0] == INITIATION), "{sent:?}");
}
