//! Tests of the data path with each offload switched off, and with calls that the kernel refuses at run time. Pairs of
//! unix sockets stand for TUNs whose packets have a header; the UDP sockets are real ones on the loopback interface.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use etherparse::PacketBuilder;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::network::{device, peer};
use crate::linux::datagrams::forced::{self, Call};
use crate::linux::datagrams::{self, Ecn, Inbox, Outbox};
use crate::linux::poll::wait_for;
use crate::linux::tun::Offloads;
use crate::wireguard::DeviceConfig;
use crate::wireguard::userspace::offload::{HEADER, Header, Segments};
use crate::wireguard::userspace::tun_io::TunIo;
use crate::wireguard::userspace::{Dropped, Levels, Sockets, UserspaceDevice};

const PATIENCE: Duration = Duration::from_secs(20);

/// The contents of each segment, and the number of segments of a large packet.
const SIZE: usize = 1_300;
const COUNT: usize = 20;

/// What the kernel's headers are named in linux/virtio_net.h.
const NEEDS_CHECKSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const GSO_UDP_L4: u8 = 5;

/// Starts a device, and returns the test's end of its TUN.
fn start(levels: Levels, config: &DeviceConfig, forced: &[(Call, Errno, usize)]) -> (OwnedFd, UserspaceDevice) {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("a socket pair");
    let given = Offloads { tcp: levels.tun_tcp, udp: levels.tun_udp };
    let same = theirs.try_clone().expect("a descriptor");
    let tun = TunIo::with_header(theirs, given, levels);
    let forced = forced.to_vec();
    let hook = move || {
        forced.iter().for_each(|(call, errno, times)| forced::fail(*call, *errno, *times));
        Ok(())
    };
    let sockets = Sockets::bind(0, 0).expect("sockets");
    (ours, UserspaceDevice::start_on((tun, same), levels, config, sockets, hook).expect("a device"))
}

struct Pair {
    client: (OwnedFd, UserspaceDevice),
    server: (OwnedFd, UserspaceDevice),
}

fn pair(host: &str, levels: Levels, forced: &[(Call, Errno, usize)]) -> Pair {
    let server = start(levels, &device(2, vec![peer(1, &["10.0.0.1/32"], None)]), forced);
    let endpoint = format!("{host}:{}", server.1.listen_port());
    let client = start(levels, &device(1, vec![peer(2, &["0.0.0.0/0"], Some(&endpoint))]), forced);
    Pair { client, server }
}

/// Returns the segments of a packet of TCP or UDP, whose contents depend on a number.
fn segments(is_tcp: bool, number: usize) -> Vec<Vec<u8>> {
    let segment = |index: usize| {
        let content: Vec<u8> = (0..SIZE).map(|at| (at * 7 + index * 31 + number * 101) as u8).collect();
        let at = number * SIZE * COUNT + index * SIZE;
        let mut header = etherparse::Ipv4Header::new(0, 64, etherparse::IpNumber::TCP, [10, 0, 0, 1], [10, 0, 0, 2])
            .expect("a header");
        header.identification = (number * COUNT + index) as u16;
        let builder = PacketBuilder::ip(etherparse::IpHeaders::Ipv4(header, etherparse::Ipv4Extensions::default()));
        let mut packet = Vec::new();
        match is_tcp {
            true => builder.tcp(1, 2, at as u32, 500).ack(9).write(&mut packet, &content),
            false => builder.udp(1, 2).write(&mut packet, &content),
        }
        .expect("written");
        packet
    };
    (0..COUNT).map(segment).collect()
}

/// Makes the frame that the kernel gives for segments: a header, and the headers of the first with all contents.
fn large_frame(is_tcp: bool, segments: &[Vec<u8>]) -> Vec<u8> {
    let (headers, kind, offset) = if is_tcp { (40, GSO_TCPV4, 16) } else { (28, GSO_UDP_L4, 6) };
    let mut packet = segments[0][..headers].to_vec();
    segments.iter().for_each(|segment| packet.extend_from_slice(&segment[headers..]));
    let length = packet.len() as u16;
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    if !is_tcp {
        packet[24..26].copy_from_slice(&(length - 20).to_be_bytes());
    }
    // The sum of the pseudo-header.
    let words = [0x0a00u32, 1, 0x0a00, 2, packet[9].into(), u32::from(length) - 20];
    let sum: u32 = words.iter().sum();
    let folded = ((sum & 0xffff) + (sum >> 16)) as u16;
    packet[20 + offset..22 + offset].copy_from_slice(&folded.to_be_bytes());
    let mut frame = vec![NEEDS_CHECKSUM, kind];
    for number in [headers, SIZE, 20, offset] {
        frame.extend_from_slice(&(number as u16).to_ne_bytes());
    }
    frame.extend_from_slice(&packet);
    frame
}

/// Reads a frame of a TUN, and returns the packets that the kernel makes of it. None if no frame comes in a time.
fn read(tun: &OwnedFd, within: Duration) -> Option<Vec<Vec<u8>>> {
    wait_for(&[tun.as_fd()], Some(within)).expect("a wait");
    let mut buffer = vec![0; HEADER + 65_535];
    let length = match rustix::net::recv(tun, &mut *buffer, rustix::net::RecvFlags::DONTWAIT) {
        Ok((length, _)) => length,
        Err(Errno::AGAIN) => return None,
        Err(errno) => panic!("{errno}"),
    };
    let (header, packet) = buffer[..length].split_first_chunk().expect("a header");
    let Some(segments) = Segments::of(&Header::parse(header), packet).expect("valid") else {
        return Some(vec![packet.to_vec()]);
    };
    let segment = |number| {
        let mut segment = vec![0; segments.length(number)];
        segments.write(packet, number, &mut segment);
        segment
    };
    Some((0..segments.count()).map(segment).collect())
}

/// Sends a packet's segments from the client, as the TUN of these levels gives them.
fn send(pair: &Pair, levels: Levels, is_tcp: bool, segments: &[Vec<u8>]) {
    let is_large = if is_tcp { levels.tun_tcp } else { levels.tun_udp };
    let frames = match is_large {
        true => vec![large_frame(is_tcp, segments)],
        false => segments.iter().map(|segment| [&[0; HEADER], segment.as_slice()].concat()).collect(),
    };
    for frame in frames {
        rustix::io::write(&pair.client.0, &frame).expect("write");
    }
}

#[test]
fn each_offload_can_be_missing() {
    for host in ["127.0.0.1", "[::1]"] {
        if host == "[::1]" && std::net::UdpSocket::bind("[::1]:0").is_err() {
            continue;
        }
        for (what, levels) in Levels::cases() {
            let pair = pair(host, levels, &[]);
            for is_tcp in [true, false] {
                for number in 0..4 {
                    let sent = segments(is_tcp, number);
                    send(&pair, levels, is_tcp, &sent);
                    let (mut got, mut frames) = (Vec::new(), 0);
                    while got.len() < sent.len() {
                        got.extend(read(&pair.server.0, PATIENCE).expect("a packet"));
                        frames += 1;
                    }
                    assert_eq!(got, sent, "{what}, TCP: {is_tcp}, to {host}");
                    // The first packets wait for the handshake, and go one by one.
                    let joins = levels.coalesce && if is_tcp { levels.tun_tcp } else { levels.tun_udp };
                    let is_whole = joins && levels.send_segments && levels.receive_joined && number > 0;
                    assert!(!is_whole || frames <= 2, "{frames} frames {what}, TCP: {is_tcp}, to {host}");
                    assert!(joins || frames == COUNT, "{frames} frames {what}, TCP: {is_tcp}, to {host}");
                }
            }
            assert_eq!(pair.client.1.dropped().expect("counters"), Dropped::default(), "{what}");
            assert_eq!(pair.server.1.dropped().expect("counters"), Dropped::default(), "{what}");
        }
    }
}

/// The outer packet has the congestion bits of the inner one, and what it meets on its way reaches the inner one
/// (RFC 6040). A relay between the devices stands for a router.
#[test]
fn congestion_bits_pass_in_both_directions() {
    let relay = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
    datagrams::set_received_ecn(&relay, false).expect("the option");
    let server = start(Levels::ALL, &device(2, vec![peer(1, &["10.0.0.1/32"], None)]), &[]);
    let to_server = format!("127.0.0.1:{}", server.1.listen_port()).parse().expect("an address");
    let endpoint = relay.local_addr().expect("an address").to_string();
    let client = start(Levels::ALL, &device(1, vec![peer(2, &["0.0.0.0/0"], Some(&endpoint))]), &[]);
    let to_client = format!("127.0.0.1:{}", client.1.listen_port()).parse().expect("an address");
    let (mut inbox, mut outbox) = (Inbox::new(8, true), Outbox::new(1 << 20, true, true));
    // Passes on all that comes until the server has a number of packets, or until none can come. Returns the bits of
    // data messages to the server, and the packets.
    let mut pass_on = |wanted: usize, marked: Ecn| {
        let (mut seen, mut got) = (Vec::new(), Vec::new());
        let deadline = std::time::Instant::now() + PATIENCE;
        while got.len() < wanted || seen.len() < wanted.max(COUNT) {
            assert!(std::time::Instant::now() < deadline, "{} of {wanted} packets", got.len());
            wait_for(&[relay.as_fd(), server.0.as_fd()], Some(Duration::from_millis(20))).expect("a wait");
            for index in 0..inbox.receive(relay.as_fd()).unwrap_or(0) {
                let message = inbox.message(index).expect("a message").clone();
                let is_from_client = message.from == to_client;
                for range in message.datagrams() {
                    let datagram = inbox.buffer()[range].to_vec();
                    // Data of some length: no keepalive.
                    let is_data = is_from_client && datagram.len() > 32 && datagram[0] == 4;
                    seen.extend(is_data.then_some(message.ecn));
                    outbox.room(datagram.len()).expect("room").copy_from_slice(&datagram);
                    let to = if is_from_client { to_server } else { to_client };
                    outbox.push(to, if is_data { marked } else { Ecn::NOT_CAPABLE }, datagram.len());
                }
            }
            outbox.flush(|_| Some(relay.as_fd()));
            while let Some(packets) = read(&server.0, Duration::ZERO) {
                got.extend(packets);
            }
        }
        (seen, got)
    };
    let with_bits = |number: usize, bits: u8| -> Vec<Vec<u8>> {
        let mark = |mut packet: Vec<u8>| {
            packet[1] = bits;
            packet[10..12].fill(0);
            let sum: u32 = packet[..20].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
            packet[10..12].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
            packet
        };
        segments(true, number).into_iter().map(mark).collect()
    };
    // The first packets wait for the handshake, and have no bits outside.
    rustix::io::write(&client.0, &large_frame(true, &with_bits(0, 2))).expect("write");
    pass_on(COUNT, Ecn::NOT_CAPABLE);
    let cases = [(2, 0, Some(2)), (1, 0, Some(1)), (2, 3, Some(3)), (1, 3, Some(3)), (3, 0, Some(3)), (0, 3, None)];
    for (number, (inner, outer, arrives)) in cases.into_iter().enumerate() {
        rustix::io::write(&client.0, &large_frame(true, &with_bits(number + 1, inner))).expect("write");
        let (seen, got) = pass_on(if arrives.is_some() { COUNT } else { 0 }, Ecn::of(outer));
        assert_eq!(seen, vec![Ecn::of(inner); COUNT], "{inner} inside");
        if let Some(bits) = arrives {
            assert_eq!(got, with_bits(number + 1, bits), "{inner} inside, {outer} outside");
        }
    }
    let deadline = std::time::Instant::now() + PATIENCE;
    while server.1.dropped().expect("counters").congested < COUNT as u64 {
        assert!(std::time::Instant::now() < deadline, "packets of a flow without congestion bits are dropped");
    }
    assert_eq!(read(&server.0, Duration::ZERO), None);
}

/// What is refused falls away or is counted, and the tunnel goes on.
#[test]
fn refused_calls_do_not_end_the_tunnel() {
    const ROUNDS: usize = 12;
    let errors = [Errno::IO, Errno::INVAL, Errno::MSGSIZE, Errno::NOBUFS, Errno::AGAIN];
    let calls = [
        (Call::SendTrain, 3),
        (Call::SendSingle, 30),
        (Call::SendMany, 5),
        (Call::Receive, 5),
        (Call::WriteLarge, 3),
        (Call::WriteSmall, 5),
    ];
    for (call, times) in calls {
        for errno in errors {
            let what = format!("{call:?} fails with {errno}");
            let pair = pair("127.0.0.1", Levels::ALL, &[(call, errno, times)]);
            let mut arrived = 0;
            for number in 0..ROUNDS {
                let mut frames = 0;
                // The last ones arrive in any case.
                let sent = segments(true, number);
                send(&pair, Levels::ALL, true, &sent);
                let lost = || {
                    let (client, server) = (pair.client.1.dropped(), pair.server.1.dropped());
                    client.expect("alive").not_sent + server.expect("alive").not_delivered
                };
                let deadline = std::time::Instant::now() + PATIENCE;
                while (arrived as u64) + lost() < (COUNT * (number + 1)) as u64 {
                    if let Some(packets) = read(&pair.server.0, Duration::from_millis(5)) {
                        (arrived, frames) = (arrived + packets.len(), frames + 1);
                    }
                    assert!(std::time::Instant::now() < deadline, "{what}: {arrived} and {} lost", lost());
                }
                assert!(number + 1 < ROUNDS || lost() < (COUNT * (ROUNDS - 1)) as u64, "{what}: {} lost", lost());
                // A level that fell away loses nothing.
                let falls_away = matches!(
                    (call, errno),
                    (Call::SendTrain, Errno::IO | Errno::INVAL | Errno::MSGSIZE) | (Call::WriteLarge, Errno::INVAL)
                );
                assert!(!falls_away || lost() == 0, "{what}: {} lost", lost());
                let is_left = (call, errno) == (Call::WriteLarge, Errno::INVAL) && number + 1 == ROUNDS;
                assert!(!is_left || frames == COUNT, "the TUN is given large packets again");
            }
            assert!(arrived > 0, "{what}");
        }
    }
}
