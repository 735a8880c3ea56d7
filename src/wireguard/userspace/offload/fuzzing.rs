//! Entry points for fuzzing packets of several segments: those of a TUN, and received ones that are joined.

use std::io::IoSlice;

use super::checksum;
use super::coalesce::{Coalescer, PieceWriter};
use super::header::{HEADER, Header};
use super::layout::Layout;
use super::segment::Segments;
use crate::wireguard::userspace::ip::source_and_length;

/// The most segments of a packet that are looked at.
const MANY: usize = 70;

/// What a TUN was given.
#[derive(Default)]
struct Written(Vec<Vec<u8>>);

impl PieceWriter for Written {
    fn write(&mut self, pieces: &[IoSlice<'_>]) {
        self.0.push(pieces.iter().flat_map(|piece| piece.iter().copied()).collect());
    }
}

/// Joins packets, and returns the packets that the kernel makes of what a TUN was given.
fn join_and_segment(packets: &[Vec<u8>], (tcp, udp): (bool, bool)) -> Vec<Vec<u8>> {
    let (mut coalescer, mut written) = (Coalescer::new(tcp, udp), Written::default());
    let buffer = packets.concat();
    let mut at = 0;
    for packet in packets {
        coalescer.push(&buffer, at..at + packet.len(), &mut written);
        at += packet.len();
    }
    coalescer.flush(&buffer, &mut written);
    written.0.iter().flat_map(|frame| take_apart(frame)).collect()
}

fn take_apart(frame: &[u8]) -> Vec<Vec<u8>> {
    let (header, packet) = frame.split_first_chunk::<HEADER>().expect("a header");
    match Segments::of(&Header::parse(header), packet).expect("the TUN is given what it takes") {
        None => vec![packet.to_vec()],
        Some(segments) => (0..segments.count()).map(|number| segment(&segments, packet, number)).collect(),
    }
}

fn segment(segments: &Segments, packet: &[u8], number: usize) -> Vec<u8> {
    let mut out = vec![0xee; segments.length(number)];
    assert!(out.len() <= segments.longest());
    segments.write(packet, number, &mut out);
    out
}

/// Cuts a frame of a TUN into segments. The first byte says whether the frame is repaired first, so that it is one that
/// a kernel may give.
pub(crate) fn tun_frame(input: &[u8]) {
    let Some(([flags], rest)) = input.split_first_chunk() else { return };
    let Some((header, packet)) = rest.split_first_chunk::<HEADER>() else { return };
    let (mut header, mut packet) = (*header, packet.to_vec());
    let is_repaired = flags & 1 != 0 && repair_frame(*flags, &mut header, &mut packet);
    let header = Header::parse(&header);
    header.finish_checksum(&mut packet.clone());
    let Some(Some(segments)) = Segments::of(&header, &packet) else { return };
    let count = segments.count();
    let some = (0..count).take(MANY).map(|number| segment(&segments, &packet, number)).collect::<Vec<_>>();
    segment(&segments, &packet, count - 1);
    if !is_repaired {
        return;
    }
    let layout = Layout::of_plain(&packet).expect("it was repaired");
    for packet in &some {
        assert!(checksum::is_ipv4_valid(packet, &layout) && checksum::is_transport_valid(packet, &layout));
    }
    let contents: Vec<u8> = some.iter().flat_map(|packet| packet[layout.content..].iter().copied()).collect();
    assert!(packet[layout.content..].starts_with(&contents), "the contents are those of the packet");
    assert_eq!(join_and_segment(&some, (true, true)), some, "segments that are joined are the same again");
}

/// Makes a header and a packet consistent, if the packet has the headers.
fn repair_frame(flags: u8, header: &mut [u8; HEADER], packet: &mut [u8]) -> bool {
    let (is_tcp, is_ipv6) = (flags & 2 != 0, flags & 4 != 0);
    if !repair_headers(is_tcp, is_ipv6, packet) {
        return false;
    }
    let layout = Layout::of_plain(packet).expect("it was repaired");
    let length = packet.len();
    if length == layout.content {
        return false;
    }
    layout.write_length(&mut packet[..layout.content], length);
    let sum = checksum::fold(checksum::pseudo_header(packet, &layout, length - layout.transport));
    packet[layout.checksum()..][..2].copy_from_slice(&sum.to_ne_bytes());
    let size = usize::from(u16::from_ne_bytes([header[4], header[5]]) % 1_500 + 1);
    *header = Header::of_segments(&layout, size).to_bytes();
    true
}

/// Writes the fields that say what a packet is. Returns false if there is no room for them.
fn repair_headers(is_tcp: bool, is_ipv6: bool, packet: &mut [u8]) -> bool {
    let transport = if is_ipv6 { 40 } else { 20 };
    if packet.len() < transport + 20 || packet.len() > 65_535 {
        return false;
    }
    let protocol = if is_tcp { 6 } else { 17 };
    match is_ipv6 {
        true => (packet[0], packet[6]) = (0x60 | packet[0] & 0xf, protocol),
        false => {
            (packet[0], packet[6], packet[7], packet[9]) = (0x45, packet[6] & 0x40, 0, protocol);
        }
    }
    if is_tcp {
        let words = (packet[transport + 12] >> 4).max(5);
        let fits = transport + usize::from(words) * 4 <= packet.len();
        packet[transport + 12] = if fits { words } else { 5 } << 4;
    }
    true
}

/// Joins packets. Each is made from the one before it or from the input's bytes, and repaired, so that many are joined.
pub(crate) fn received(mut input: &[u8]) {
    let mut packets: Vec<Vec<u8>> = Vec::new();
    let Some(([takes], rest)) = input.split_first_chunk() else { return };
    input = rest;
    while let [act, length, rest @ ..] = input {
        let (body, rest) = rest.split_at(usize::from(*length).min(rest.len()));
        input = rest;
        let mut packet = match packets.last() {
            Some(last) if act & 1 != 0 => next_of(last, body),
            _ => body.to_vec(),
        };
        if act & 2 != 0 {
            // Some byte differs.
            if let ([at, change, ..], length @ 1..) = (body, packet.len()) {
                packet[usize::from(*at) % length] ^= change;
            }
        }
        if act & 4 == 0 && repair_headers(act & 8 == 0, act & 16 != 0, &mut packet) {
            let layout = Layout::of_plain(&packet).expect("it was repaired");
            let length = packet.len();
            layout.write_length(&mut packet[..layout.content], length);
            let sum = checksum::pseudo_header(&packet, &layout, 0);
            checksum::write_transport(&mut packet, &layout, sum);
        }
        // The device passes packets on as long as their headers say.
        let Some((_, length)) = source_and_length(&packet) else { continue };
        packet.truncate(length);
        packets.push(packet);
        if packets.len() == 2 * MANY {
            break;
        }
    }
    let again = join_and_segment(&packets, (takes & 1 != 0, takes & 2 != 0));
    assert_eq!(again.len(), packets.len());
    for (before, after) in packets.iter().zip(&again) {
        assert_eq!(comparable(after), comparable(before));
    }
}

/// Makes the packet that follows one in its flow, with another content.
fn next_of(last: &[u8], body: &[u8]) -> Vec<u8> {
    let Some(layout) = Layout::of_plain(last) else { return last.to_vec() };
    let mut packet = last[..layout.content].to_vec();
    if layout.is_tcp {
        let next = layout.sequence(last).wrapping_add((last.len() - layout.content) as u32);
        packet[layout.transport + 4..layout.transport + 8].copy_from_slice(&next.to_be_bytes());
    }
    if !layout.is_ipv6 {
        let id = u16::from_be_bytes([packet[4], packet[5]]).wrapping_add(1);
        packet[4..6].copy_from_slice(&id.to_be_bytes());
    }
    let length = (last.len() - layout.content).min(body.first().map_or(usize::MAX, |least| usize::from(*least) * 8));
    packet.extend_from_slice(&last[layout.content..layout.content + length]);
    packet
}

/// Returns a packet without what joining may change: the ID of an IPv4 packet that is never fragmented (RFC 6864), and
/// which of two zeros a checksum is (RFC 1071).
fn comparable(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let Some(layout) = Layout::of_plain(&packet) else { return packet };
    let has_valid = checksum::is_ipv4_valid(&packet, &layout) && checksum::is_transport_valid(&packet, &layout);
    if has_valid && !layout.is_ipv6 && packet[6] & 0x40 != 0 {
        packet[4..6].fill(0);
        checksum::write_ipv4(&mut packet[..20]);
    }
    let mut zero = |at: usize| {
        if packet[at..at + 2] == [0xff, 0xff] {
            packet[at..at + 2].fill(0);
        }
    };
    zero(layout.checksum());
    if !layout.is_ipv6 {
        zero(10);
    }
    packet
}
