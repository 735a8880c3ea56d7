//! Segmenting and joining, against packets that `etherparse` makes.

use std::io::IoSlice;

use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::checksum;
use super::coalesce::{Coalescer, PieceWriter};
use super::header::{HEADER, Header};
use super::layout::Layout;
use super::segment::Segments;

/// The fields of a flow's packets.
#[derive(Clone, Debug)]
struct Flow {
    is_ipv6: bool,
    is_tcp: bool,
    ttl: u8,
    dont_fragment: bool,
    id: u16,
    sequence: u32,
    window: u16,
    fin: bool,
    push: bool,
    cwr: bool,
    options: bool,
}

fn flow() -> impl Strategy<Value = Flow> {
    (any::<[bool; 8]>(), any::<u8>(), any::<u16>(), any::<u32>(), any::<u16>()).prop_map(
        |([is_ipv6, is_tcp, dont_fragment, fin, push, cwr, options, _], ttl, id, sequence, window)| Flow {
            is_ipv6,
            is_tcp,
            ttl,
            dont_fragment,
            id,
            sequence,
            window,
            fin,
            push,
            cwr,
            options,
        },
    )
}

impl Flow {
    /// Makes the packet with a content, whose place in the flow's content is known. Nothing of this is ours.
    fn packet(&self, number: usize, at: usize, is_last: bool, content: &[u8]) -> Vec<u8> {
        let builder = match self.is_ipv6 {
            true => PacketBuilder::ipv6([1; 16], [2; 16], self.ttl),
            false => {
                let mut header = etherparse::Ipv4Header::new(
                    0,
                    self.ttl,
                    if self.is_tcp { etherparse::IpNumber::TCP } else { etherparse::IpNumber::UDP },
                    [10, 0, 0, 1],
                    [10, 0, 0, 2],
                )
                .expect("a header");
                header.identification = self.id.wrapping_add(number as u16);
                header.dont_fragment = self.dont_fragment;
                PacketBuilder::ip(etherparse::IpHeaders::Ipv4(header, etherparse::Ipv4Extensions::default()))
            }
        };
        let mut packet = Vec::new();
        if !self.is_tcp {
            builder.udp(1111, 2222).write(&mut packet, content).expect("written");
            return packet;
        }
        let mut tcp = builder.tcp(1111, 2222, self.sequence.wrapping_add(at as u32), self.window).ack(77);
        if self.fin && is_last {
            tcp = tcp.fin();
        }
        if self.push && is_last {
            tcp = tcp.psh();
        }
        if self.cwr && number == 0 {
            tcp = tcp.cwr();
        }
        if self.options {
            let options = [
                etherparse::TcpOptionElement::Noop,
                etherparse::TcpOptionElement::Noop,
                etherparse::TcpOptionElement::Timestamp(1, 2),
            ];
            tcp = tcp.options(&options).expect("room");
        }
        tcp.write(&mut packet, content).expect("written");
        packet
    }

    /// Makes the packets of a content in segments.
    fn segments(&self, content: &[u8], size: usize) -> Vec<Vec<u8>> {
        let count = content.len().div_ceil(size);
        let piece = |(number, piece): (usize, &[u8])| self.packet(number, number * size, number + 1 == count, piece);
        content.chunks(size).enumerate().map(piece).collect()
    }

    /// Makes the large packet, and what the kernel says about it.
    fn large(&self, content: &[u8], size: usize) -> (Header, Vec<u8>) {
        let mut packet = self.packet(0, 0, true, content);
        let layout = Layout::of_plain(&packet).expect("a layout");
        if self.is_tcp && self.cwr {
            packet[layout.flags()] |= super::layout::CWR;
        }
        let length = packet.len() - layout.transport;
        let sum = checksum::fold(checksum::pseudo_header(&packet, &layout, length));
        let at = layout.checksum();
        packet[at..at + 2].copy_from_slice(&sum.to_ne_bytes());
        (Header::of_segments(&layout, size), packet)
    }
}

/// Segments a large packet of the TUN.
fn segment(header: &Header, packet: &[u8]) -> Vec<Vec<u8>> {
    let segments = Segments::of(header, packet).expect("valid").expect("several");
    (0..segments.count())
        .map(|number| {
            let mut out = vec![0xee; segments.length(number)];
            assert!(out.len() <= segments.longest());
            segments.write(packet, number, &mut out);
            out
        })
        .collect()
}

/// What a TUN was given.
#[derive(Default)]
struct Written(Vec<Vec<u8>>);

impl PieceWriter for Written {
    fn write(&mut self, pieces: &[IoSlice<'_>]) {
        self.0.push(pieces.iter().flat_map(|piece| piece.iter().copied()).collect());
    }
}

/// Joins packets, and returns what the TUN gets: headers and packets.
fn join(packets: &[Vec<u8>], tcp: bool, udp: bool) -> Vec<(Header, Vec<u8>)> {
    let (mut coalescer, mut written) = (Coalescer::new(tcp, udp), Written::default());
    let buffer: Vec<u8> = packets.concat();
    let mut at = 0;
    for packet in packets {
        coalescer.push(&buffer, at..at + packet.len(), &mut written);
        at += packet.len();
    }
    coalescer.flush(&buffer, &mut written);
    let split = |written: Vec<u8>| {
        let (header, packet) = written.split_first_chunk::<HEADER>().expect("a header");
        (Header::parse(header), packet.to_vec())
    };
    written.0.into_iter().map(split).collect()
}

/// What a TUN of the kernel makes of what it was given.
fn taken_apart(given: &[(Header, Vec<u8>)]) -> Vec<Vec<u8>> {
    let apart = |(header, packet): &(Header, Vec<u8>)| match Segments::of(header, packet).expect("valid") {
        Some(_) => segment(header, packet),
        None => vec![packet.clone()],
    };
    given.iter().flat_map(apart).collect()
}

proptest! {
    /// Segments are those that another implementation makes of the same content.
    #[test]
    fn segments_are_whole_packets(
        flow in flow(),
        content in prop::collection::vec(any::<u8>(), 1..9_000),
        size in 1usize..3_000,
    ) {
        let size = size.max(content.len().div_ceil(60));
        let (header, packet) = flow.large(&content, size);
        let segments = segment(&header, &packet);
        prop_assert_eq!(&segments, &flow.segments(&content, size));
        for segment in &segments {
            SlicedPacket::from_ip(segment).expect("a packet");
        }
    }

    /// A TUN that takes the joined packets apart again has what was received, in its order.
    #[test]
    fn joined_packets_lose_nothing(
        flows in prop::collection::vec((flow(), prop::collection::vec(any::<u8>(), 1..6_000), 1usize..1_500), 1..6),
        mixed in any::<bool>(),
        tcp in any::<bool>(),
        udp in any::<bool>(),
        damaged in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let of_flow = |(flow, content, size): &(Flow, Vec<u8>, usize)| {
            // CWR and FIN are on packets that are not joined.
            flow.segments(content, (*size).max(content.len().div_ceil(60)))
        };
        let mut packets: Vec<Vec<u8>> = flows.iter().flat_map(of_flow).collect();
        if mixed {
            let half = packets.len() / 2;
            packets.rotate_left(half);
        }
        if let Some(damaged) = damaged {
            let index = damaged.index(packets.len());
            if let Some(byte) = packets[index].last_mut() {
                *byte ^= 1;
            }
        }
        let given = join(&packets, tcp, udp);
        prop_assert_eq!(taken_apart(&given), packets);
    }

    #[test]
    fn no_packet_of_a_tun_panics(
        header in any::<[u8; HEADER]>(),
        packet in prop::collection::vec(any::<u8>(), 0..300),
        version in prop::sample::select(vec![0x45u8, 0x46, 0x60, 0x10]),
    ) {
        let (header, mut packet) = (Header::parse(&header), packet);
        if let Some(first) = packet.first_mut() {
            *first = version;
        }
        if let Some(Some(segments)) = Segments::of(&header, &packet) {
            for number in [0, segments.count() - 1] {
                let mut out = vec![0; segments.length(number)];
                segments.write(&packet, number, &mut out);
            }
        }
        header.finish_checksum(&mut packet.clone());
        join(&[packet.clone(), packet], true, true);
    }
}

fn plain(is_ipv6: bool, is_tcp: bool) -> Flow {
    Flow {
        is_ipv6,
        is_tcp,
        ttl: 64,
        dont_fragment: true,
        id: 1,
        sequence: u32::MAX - 2_000,
        window: 500,
        fin: false,
        push: true,
        cwr: false,
        options: true,
    }
}

#[test]
fn a_bulk_transfer_becomes_few_packets() {
    for (is_ipv6, is_tcp) in [(false, true), (true, true), (false, false), (true, false)] {
        let packets = plain(is_ipv6, is_tcp).segments(&[7; 40_000], 1_000);
        let given = join(&packets, true, true);
        assert_eq!(given.len(), 1, "IPv6: {is_ipv6}, TCP: {is_tcp}");
        assert_eq!(taken_apart(&given), packets);
        assert_eq!(join(&packets, false, false).len(), packets.len(), "the TUN takes none");
    }
}

/// The kernel takes no longer packet, and no more pieces.
#[test]
fn the_longest_packets_are_within_the_kernels_limits() {
    for (size, count, expected) in [(1_400, 64, 2), (100, 64, 1), (100, 65, 2), (1_000, 65, 2)] {
        for (is_ipv6, is_tcp) in [(false, true), (true, false)] {
            let packets = plain(is_ipv6, is_tcp).segments(&vec![7; size * count], size);
            let given = join(&packets, true, true);
            assert_eq!(given.len(), expected, "{count} of {size} bytes");
            assert!(given.iter().all(|(_, packet)| packet.len() <= 65_535));
            assert_eq!(taken_apart(&given), packets);
        }
    }
}

/// A checksum of UDP that comes out as zero is written as its other form, since zero says that there is none.
#[test]
fn a_segment_of_udp_always_has_a_checksum() {
    let mut flow = plain(false, false);
    flow.push = false;
    // The content of the second segment makes its sum zero.
    let second = (0..=u16::MAX).map(|word| word.to_be_bytes()).find(|word| {
        let packet = flow.packet(1, 2, true, word);
        packet[26..28] == [0xff, 0xff]
    });
    let content = [[1, 2], second.expect("a content")].concat();
    let (header, packet) = flow.large(&content, 2);
    assert_eq!(segment(&header, &packet), flow.segments(&content, 2));
}

/// A segment with PSH ends a packet, and so does one whose ID is not the next where it matters.
#[test]
fn nothing_follows_a_pushed_segment_or_another_id() {
    let mut flow = plain(false, true);
    flow.push = false;
    let mut packets = flow.segments(&[7; 3_000], 1_000);
    packets[1] = Flow { push: true, ..flow.clone() }.packet(1, 1_000, true, &[7; 1_000]);
    let given = join(&packets, true, true);
    assert_eq!(given.len(), 2);
    assert_eq!(taken_apart(&given), packets);

    flow.dont_fragment = false;
    let mut packets = flow.segments(&[7; 3_000], 1_000);
    assert_eq!(join(&packets, true, true).len(), 1);
    packets[1] = flow.packet(9, 1_000, false, &[7; 1_000]);
    let given = join(&packets, true, true);
    assert_eq!(given.len(), 3);
    assert_eq!(taken_apart(&given), packets);
}

/// What must reach the program as it was sent is not joined.
#[test]
fn what_differs_in_a_header_is_not_joined() {
    let packets = |change: &dyn Fn(&mut [u8])| {
        let mut packets = plain(false, true).segments(&[7; 2_000], 1_000);
        change(&mut packets[1]);
        let layout = Layout::of_plain(&packets[1]).expect("a layout");
        checksum::write_ipv4(&mut packets[1][..20]);
        let pseudo_header = checksum::pseudo_header(&packets[1], &layout, 0);
        checksum::write_transport(&mut packets[1], &layout, pseudo_header);
        packets
    };
    assert_eq!(join(&packets(&|_| {}), true, true).len(), 1);
    type Change = &'static dyn Fn(&mut [u8]);
    let changes: [(&str, Change); 10] = [
        ("checksum of IPv4", &|_| {}),
        ("ECN", &|packet| packet[1] |= 3),
        ("DSCP", &|packet| packet[1] |= 0x20),
        ("TTL", &|packet| packet[8] -= 1),
        ("source", &|packet| packet[15] ^= 1),
        ("port", &|packet| packet[21] ^= 1),
        ("sequence number", &|packet| packet[27] ^= 1),
        ("acknowledgment", &|packet| packet[31] ^= 1),
        ("window", &|packet| packet[35] ^= 1),
        ("options", &|packet| packet[51] ^= 1),
    ];
    for (what, change) in changes {
        let mut packets = packets(change);
        if what == "checksum of IPv4" {
            packets[1][10] ^= 1;
        }
        assert_eq!(join(&packets, true, true).len(), 2, "{what}");
    }
    for flag in [1, 2, 4, 0x20, 0x40, 0x80] {
        assert_eq!(join(&packets(&|packet| packet[33] |= flag), true, true).len(), 2, "the flag {flag:#x}");
    }
}

#[test]
fn a_checksum_that_was_left_to_the_device_is_written() {
    for is_tcp in [true, false] {
        let flow = plain(false, is_tcp);
        let whole = flow.packet(0, 0, true, b"content");
        let (header, mut packet) = flow.large(b"content", 7);
        assert!(header.finish_checksum(&mut packet));
        assert_eq!(packet, whole);
        let sliced = SlicedPacket::from_ip(&packet).expect("a packet");
        assert!(matches!(sliced.transport, Some(TransportSlice::Tcp(_))) == is_tcp);
    }
}
