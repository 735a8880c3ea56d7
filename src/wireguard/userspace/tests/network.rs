//! A simulated network: devices at addresses, datagrams that arrive at once, and a clock that jumps to the next event.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use crate::keys::{PrivateKey, PublicKey};
use crate::wireguard::userspace::clock::{self, travel};
use crate::wireguard::userspace::device::{Core, PACKET_BUFFER, Sink};
use crate::wireguard::{DeviceConfig, PeerConfig, PeerStatus};

/// The MTU of all devices. It is not a multiple of 16, to show where padding ends.
pub(super) const MTU: u32 = 1420 - 5;

/// The output of a device.
#[derive(Default)]
pub(super) struct Recorder {
    pub(super) sent: Vec<(SocketAddr, Vec<u8>)>,
    pub(super) delivered: Vec<Vec<u8>>,
    pub(super) handshakes: usize,
    pub(super) unanswered: usize,
    pub(super) unreachable: bool,
}

impl Sink for Recorder {
    fn send(&mut self, endpoint: SocketAddr, datagram: &[u8]) -> bool {
        if !self.unreachable {
            self.sent.push((endpoint, datagram.to_vec()));
        }
        !self.unreachable
    }

    fn handshake_completed(&mut self) {
        self.handshakes += 1;
    }

    fn handshake_unanswered(&mut self) {
        self.unanswered += 1;
    }
}

/// A device and its address.
pub(super) struct Node {
    pub(super) core: Core,
    pub(super) sink: Recorder,
    pub(super) address: SocketAddr,
}

impl Node {
    /// Creates a device. From then on, time passes by [`pass`] and [`travel::advance`] alone.
    pub(super) fn new(address: &str, config: &DeviceConfig) -> Self {
        travel::stand_still();
        let mut node = Node {
            core: Core::new(config, clock::now()).expect("a device"),
            sink: Recorder::default(),
            address: address.parse().expect("an address"),
        };
        node.core.start(clock::now(), &mut node.sink);
        node
    }

    /// Passes a packet of the TUN to the device.
    pub(super) fn send(&mut self, packet: &[u8]) {
        let mut buffer = vec![0xff; PACKET_BUFFER];
        buffer[..packet.len()].copy_from_slice(packet);
        self.core.on_packet(&mut buffer, packet.len(), clock::now(), &mut self.sink);
    }

    pub(super) fn receive(&mut self, datagram: &[u8], from: SocketAddr) {
        let mut datagram = datagram.to_vec();
        if let Some(packet) = self.core.on_datagram(&mut datagram, from, clock::now(), &mut self.sink) {
            self.sink.delivered.push(datagram[packet].to_vec());
        }
    }

    pub(super) fn tick(&mut self) {
        self.core.tick(clock::now(), &mut self.sink);
    }

    pub(super) fn set_endpoint(&mut self, peer: usize, endpoint: &str) {
        self.core.set_endpoint(peer, endpoint.parse().expect("an endpoint"), clock::now(), &mut self.sink);
    }

    pub(super) fn initiate(&mut self, peer: usize) {
        self.core.initiate_handshake(peer, clock::now(), &mut self.sink);
    }

    pub(super) fn status(&self, peer: usize) -> PeerStatus {
        self.core.status(clock::now()).swap_remove(peer)
    }

    /// Returns the datagrams sent since the last call, with their destinations.
    pub(super) fn take_sent(&mut self) -> Vec<(SocketAddr, Vec<u8>)> {
        std::mem::take(&mut self.sink.sent)
    }

    pub(super) fn take_delivered(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.sink.delivered)
    }
}

/// Delivers datagrams until none is left, and returns them as (from, to, datagram). Those to an unknown address are
/// lost.
pub(super) fn settle(nodes: &mut [&mut Node]) -> Vec<(SocketAddr, SocketAddr, Vec<u8>)> {
    let mut log = Vec::new();
    loop {
        let batch: Vec<_> = nodes
            .iter_mut()
            .flat_map(|node| {
                let from = node.address;
                node.take_sent().into_iter().map(move |(to, datagram)| (from, to, datagram))
            })
            .collect();
        if batch.is_empty() {
            return log;
        }
        assert!(log.len() < 10_000, "the network never falls silent");
        for (from, to, datagram) in batch {
            if let Some(node) = nodes.iter_mut().find(|node| node.address == to) {
                node.receive(&datagram, from);
            }
            log.push((from, to, datagram));
        }
    }
}

/// The events of [`pass`].
#[derive(Debug, Default)]
pub(super) struct Elapsed {
    /// The number of wake-ups.
    pub(super) wakeups: usize,
    /// The datagrams as (time since the start, from, datagram).
    pub(super) log: Vec<(Duration, SocketAddr, Vec<u8>)>,
}

impl Elapsed {
    /// Returns the times in milliseconds at which an address sent messages of a type.
    pub(super) fn times(&self, kind: u8, from: SocketAddr) -> Vec<u128> {
        self.log.iter().filter(|(_, f, d)| *f == from && d[0] == kind).map(|(at, ..)| at.as_millis()).collect()
    }
}

/// Lets time pass: jumps to the next time that a device has asked for, and wakes the devices that are due.
pub(super) fn pass(time: Duration, nodes: &mut [&mut Node]) -> Elapsed {
    let start = clock::now();
    let end = start + time;
    let mut elapsed = Elapsed::default();
    loop {
        for (from, _, datagram) in settle(nodes) {
            elapsed.log.push((clock::now() - start, from, datagram));
        }
        let next = nodes.iter().filter_map(|node| node.core.next_tick()).min();
        match next {
            Some(at) if at <= end => {
                travel::advance(at.saturating_sub(clock::now()));
                let now = clock::now();
                for node in nodes.iter_mut().filter(|node| node.core.next_tick().is_some_and(|at| at <= now)) {
                    elapsed.wakeups += 1;
                    node.tick();
                    assert!(
                        node.core.next_tick().is_none_or(|at| at > now),
                        "a tick left something due: it would spin"
                    );
                }
            }
            _ => {
                travel::advance(end.saturating_sub(clock::now()));
                return elapsed;
            }
        }
    }
}

pub(super) fn private_key(number: u8) -> PrivateKey {
    PrivateKey::from([number; 32])
}

pub(super) fn public_key(number: u8) -> PublicKey {
    private_key(number).public_key()
}

/// Returns the configuration of a device whose private key is derived from a number.
pub(super) fn device(number: u8, peers: Vec<PeerConfig>) -> DeviceConfig {
    DeviceConfig { private_key: private_key(number), listen_port: 0, fwmark: 0, mtu: MTU, peers }
}

/// Returns the configuration of a peer whose private key is derived from a number.
pub(super) fn peer(number: u8, allowed_ips: &[&str], endpoint: Option<&str>) -> PeerConfig {
    PeerConfig {
        public_key: public_key(number),
        preshared_key: None,
        allowed_ips: allowed_ips.iter().map(|prefix| prefix.parse::<IpNet>().expect("a prefix")).collect(),
        persistent_keepalive: None,
        endpoint: endpoint.map(|endpoint| endpoint.parse().expect("an endpoint")),
    }
}

pub(super) const CLIENT: &str = "192.0.2.1:1000";
pub(super) const SERVER: &str = "198.51.100.1:51820";

/// Creates a client that knows the endpoint of its server and sends everything to it, and a server that does not know
/// its client's endpoint.
pub(super) fn client_and_server() -> (Node, Node) {
    client_and_server_with(peer(2, &["0.0.0.0/0", "::/0"], Some(SERVER)))
}

pub(super) fn client_and_server_with(server: PeerConfig) -> (Node, Node) {
    let preshared_key = server.preshared_key.clone();
    let client = Node::new(CLIENT, &device(1, vec![server]));
    let peer = PeerConfig { preshared_key, ..peer(1, &["10.0.0.1/32", "2001:db8::1/128"], None) };
    (client, Node::new(SERVER, &device(2, vec![peer])))
}

/// Returns an IP packet of a total length between two addresses of one family.
pub(super) fn packet(from: &str, to: &str, length: usize) -> Vec<u8> {
    let mut packet = vec![0xaa; length];
    match (from.parse().expect("an address"), to.parse().expect("an address")) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&(length as u16).to_be_bytes());
            packet[12..16].copy_from_slice(&from.octets());
            packet[16..20].copy_from_slice(&to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet[0] = 0x60;
            packet[4..6].copy_from_slice(&(length as u16 - 40).to_be_bytes());
            packet[8..24].copy_from_slice(&from.octets());
            packet[24..40].copy_from_slice(&to.octets());
        }
        _ => panic!("two families"),
    }
    packet
}

/// Returns a packet from the client of [`client_and_server`] to the server.
pub(super) fn outbound() -> Vec<u8> {
    packet("10.0.0.1", "10.0.0.2", 100)
}

/// Returns a packet from the server to the client.
pub(super) fn inbound() -> Vec<u8> {
    packet("10.0.0.2", "10.0.0.1", 100)
}
