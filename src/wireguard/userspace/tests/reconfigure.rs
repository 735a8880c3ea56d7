//! Tests of reconfiguration: unchanged peers keep their sessions, new peers start, and removed peers are gone.

use std::time::Duration;

use super::network::*;
use crate::keys::PresharedKey;
use crate::wireguard::userspace::clock;
use crate::wireguard::{DeviceConfig, PeerConfig};

const EVERYTHING: [&str; 2] = ["0.0.0.0/0", "::/0"];

fn reconfigure(node: &mut Node, config: &DeviceConfig) {
    let new = node.core.reconfigure(config, clock::now()).expect("a device");
    for peer in new {
        node.core.start_peer(peer, clock::now(), &mut node.sink);
    }
}

/// Returns the types of the messages that are sent when the client sends one packet.
fn kinds(client: &mut Node, server: &mut Node) -> Vec<u8> {
    client.send(&outbound());
    settle(&mut [client, server]).iter().map(|(_, _, datagram)| datagram[0]).collect()
}

#[test]
fn an_unchanged_peer_keeps_its_session_endpoint_and_counters() {
    let (mut client, mut server) = client_and_server();
    assert_eq!(kinds(&mut client, &mut server)[..2], [1, 2]);
    let before = client.status(0);
    let other = peer(3, &["10.9.0.0/16"], Some("203.0.113.7:4000"));
    let stays = PeerConfig { persistent_keepalive: Some(25), ..peer(2, &EVERYTHING, None) };
    // In another order, with one more, and with a keepalive.
    reconfigure(&mut client, &device(1, vec![other, stays]));
    let statuses = client.core.status(clock::now());
    let after = statuses.iter().find(|status| status.public_key == public_key(2)).expect("the peer");
    assert_eq!((after.endpoint, after.rx_bytes, after.tx_bytes), (before.endpoint, before.rx_bytes, before.tx_bytes));
    assert_eq!(kinds(&mut client, &mut server), [4], "no new handshake");
    assert_eq!(server.take_delivered().len(), 2);
    let elapsed = pass(Duration::from_secs(60), &mut [&mut client, &mut server]);
    assert!(elapsed.times(4, client.address).len() >= 2, "the keepalive that is new is sent");
}

#[test]
fn a_removed_peer_is_gone_in_both_directions_and_its_index_admits_no_message() {
    let (mut client, mut server) = client_and_server();
    kinds(&mut client, &mut server);
    server.take_delivered();
    // Somebody else takes its place, and its addresses.
    reconfigure(&mut server, &device(2, vec![peer(5, &["10.0.0.1/32", "2001:db8::1/128"], None)]));
    assert_eq!(server.core.status(clock::now()).len(), 1);
    assert_eq!(kinds(&mut client, &mut server), [4], "the removed peer got a response");
    assert!(server.take_delivered().is_empty(), "and nothing comes in");
    assert_eq!(server.core.dropped().not_authentic, 1);
    server.send(&inbound());
    assert!(settle(&mut [&mut client, &mut server]).is_empty(), "who is in its place is not known to be anywhere");
}

#[test]
fn other_keys_require_other_sessions() {
    let (mut client, mut server) = client_and_server();
    kinds(&mut client, &mut server);
    let shared = |number| Some(PresharedKey::from([number; 32]));
    let customer = |preshared_key| PeerConfig { preshared_key, ..peer(1, &["10.0.0.1/32", "2001:db8::1/128"], None) };
    reconfigure(&mut client, &device(1, vec![PeerConfig { preshared_key: shared(9), ..peer(2, &EVERYTHING, None) }]));
    reconfigure(&mut server, &device(2, vec![customer(shared(9))]));
    server.take_delivered();
    // Of two initiations with the same timestamp, the second one would be a replay.
    clock::travel::advance(Duration::from_secs(1));
    assert_eq!(kinds(&mut client, &mut server)[..2], [1, 2], "where the server is is known still");
    assert_eq!(server.take_delivered(), [outbound()]);

    // The client has another key of its own, which the server learns.
    reconfigure(&mut client, &device(4, vec![peer(2, &EVERYTHING, None)]));
    reconfigure(&mut server, &device(2, vec![peer(4, &["10.0.0.1/32", "2001:db8::1/128"], None)]));
    assert_eq!(kinds(&mut client, &mut server)[..2], [1, 2]);
    assert_eq!(server.take_delivered(), [outbound()]);
}

#[test]
fn allowed_ips_move_from_one_peer_to_another() {
    let near = peer(2, &["10.0.0.2/32"], Some(SERVER));
    let far = peer(3, &["192.0.2.0/24"], Some("203.0.113.7:4000"));
    let mut client = Node::new(CLIENT, &device(1, vec![near, far]));
    reconfigure(&mut client, &device(1, vec![peer(2, &["192.0.2.0/24"], None), peer(3, &["10.0.0.2/32"], None)]));
    client.send(&outbound());
    let sent = client.take_sent();
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].0.to_string(), "203.0.113.7:4000");
}

#[test]
fn an_invalid_configuration_changes_nothing() {
    let (mut client, mut server) = client_and_server();
    kinds(&mut client, &mut server);
    let mut weak = peer(3, &EVERYTHING, None);
    weak.public_key = [0; 32].into();
    let twice = vec![peer(3, &EVERYTHING, None), peer(3, &EVERYTHING, None)];
    for peers in [vec![weak], twice] {
        assert!(client.core.reconfigure(&device(9, peers), clock::now()).is_err());
    }
    server.take_delivered();
    assert_eq!(kinds(&mut client, &mut server), [4]);
    assert_eq!(server.take_delivered(), [outbound()]);
}

#[test]
fn an_unanswered_handshake_is_reported_with_its_duration() {
    let (mut client, _) = client_and_server();
    client.send(&outbound());
    assert_eq!(client.status(0).unanswered_for, None, "it has its time");
    pass(Duration::from_secs(12), &mut [&mut client]);
    assert!(client.sink.unanswered >= 2);
    assert!(client.status(0).unanswered_for.expect("a time") >= Duration::from_secs(12));
}
