//! Properties of the device for all inputs: it does not panic, and nothing of an outsider gets through.

use proptest::prelude::*;

use super::network::*;
use crate::wireguard::userspace::clock::travel;

/// An input to a pair of devices.
#[derive(Clone, Debug)]
enum Event {
    /// Arbitrary bytes from the TUN.
    Packet(Vec<u8>),
    /// A packet from the TUN with a valid IP version and arbitrary bytes otherwise.
    Headed(bool, Vec<u8>),
    /// Arbitrary bytes from the network.
    Datagram(Vec<u8>),
    /// A message from the network with a valid type, a session index and arbitrary bytes otherwise.
    Message(u8, u8, Vec<u8>),
    /// An authentic packet, of which one bit may be changed on its way.
    Genuine(Option<usize>),
    /// Arbitrary bytes that the peer has encrypted with the right keys.
    FromPeer(Vec<u8>),
    /// A pause.
    Pause(u16),
    Endpoint(bool),
    Initiate,
}

fn event() -> impl Strategy<Value = Event> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..200);
    prop_oneof![
        bytes().prop_map(Event::Packet),
        (any::<bool>(), bytes()).prop_map(|(v6, bytes)| Event::Headed(v6, bytes)),
        bytes().prop_map(Event::Datagram),
        (1u8..=4, any::<u8>(), prop::collection::vec(any::<u8>(), 24..160))
            .prop_map(|(kind, session, bytes)| Event::Message(kind, session, bytes)),
        prop::option::of(any::<usize>()).prop_map(Event::Genuine),
        bytes().prop_map(Event::FromPeer),
        any::<u16>().prop_map(Event::Pause),
        any::<bool>().prop_map(Event::Endpoint),
        Just(Event::Initiate),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_input_panics(events in prop::collection::vec(event(), 1..40)) {
        let (mut client, mut server) = client_and_server();
        for event in events {
            match event {
                Event::Packet(bytes) => client.send(&bytes),
                Event::Headed(v6, mut bytes) => {
                    if let Some(first) = bytes.first_mut() {
                        *first = if v6 { 0x60 } else { 0x45 };
                    }
                    client.send(&bytes);
                }
                Event::Datagram(bytes) => client.receive(&bytes, server.address),
                Event::Message(kind, session, mut bytes) => {
                    bytes.resize(match kind { 1 => 148, 2 => 92, 3 => 64, _ => bytes.len().max(32) }, 0);
                    bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
                    // Its own sessions' index, as far as it is to be guessed.
                    let known = client.sink.sent.last().map_or([0; 3], |(_, d)| [d[5], d[6], d[7]]);
                    bytes[4] = session;
                    bytes[5..8].copy_from_slice(&known);
                    client.receive(&bytes, server.address);
                }
                Event::Genuine(change) => {
                    server.send(&inbound());
                    for (_, mut datagram) in server.take_sent() {
                        if let Some(bit) = change {
                            let bit = bit % (datagram.len() * 8);
                            datagram[bit / 8] ^= 1 << (bit % 8);
                        }
                        client.receive(&datagram, server.address);
                    }
                }
                Event::FromPeer(mut bytes) => {
                    // The server's own routing wants a destination; what the client makes of the rest is the question.
                    let honest = inbound();
                    let kept = bytes.len().min(16);
                    bytes[..kept].copy_from_slice(&honest[..kept]);
                    if bytes.len() >= 20 {
                        bytes[16..20].copy_from_slice(&honest[16..20]);
                        bytes[2] = 0;
                        bytes[3] = bytes[19].wrapping_add(bytes[bytes.len() - 1]);
                    }
                    server.send(&bytes);
                }
                Event::Pause(seconds) => {
                    travel::advance(std::time::Duration::from_millis(u64::from(seconds) * 10));
                    client.tick();
                    server.tick();
                }
                Event::Endpoint(right) => client.set_endpoint(0, if right { SERVER } else { "192.0.2.99:99" }),
                Event::Initiate => client.initiate(0),
            }
            settle(&mut [&mut client, &mut server]);
        }
    }

    #[test]
    fn an_outsider_changes_nothing(
        datagrams in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..20),
    ) {
        let (mut client, mut server) = client_and_server();
        client.send(&outbound());
        settle(&mut [&mut client, &mut server]);
        let before = server.status(0);
        server.take_delivered();
        for mut datagram in datagrams {
            if let [kind, reserved @ ..] = datagram.as_mut_slice() {
                *kind = *kind % 4 + 1;
                reserved.iter_mut().take(3).for_each(|byte| *byte = 0);
            }
            server.receive(&datagram, "203.0.113.66:66".parse().expect("an address"));
        }
        let after = server.status(0);
        prop_assert_eq!(before.endpoint, after.endpoint);
        prop_assert_eq!((before.rx_bytes, before.tx_bytes), (after.rx_bytes, after.tx_bytes));
        prop_assert!(server.take_delivered().is_empty());
        prop_assert!(server.take_sent().is_empty());
    }
}
