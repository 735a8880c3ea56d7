//! Joins received segments to large packets, as the kernel's GRO does. TCP segments are joined if nothing of them is
//! lost by that: the sender's segments would come out again. UDP datagrams of one size likewise.

use std::io::IoSlice;
use std::ops::Range;

use super::checksum;
use super::header::{HEADER, Header};
use super::layout::{ACK, Layout, PSH};

/// The longest headers that are joined: IPv6, and TCP with all options.
const MAX_HEADERS: usize = 100;

/// The most segments of a large packet. The kernel takes a packet of at most 1,024 pieces (UIO_MAXIOV), and UDP of at
/// most 64 segments before Linux 6.9 (UDP_MAX_SEGMENTS).
const MAX_SEGMENTS: usize = 64;

/// The longest IP packet.
const MAX_PACKET: usize = 65_535;

/// The output: writes a packet from its pieces, the TUN's header first.
pub(in crate::wireguard::userspace) trait PieceWriter {
    fn write(&mut self, pieces: &[IoSlice<'_>]);
}

/// A large packet that is being joined.
struct Joined {
    layout: Layout,
    headers: [u8; MAX_HEADERS],
    /// The contents of the segments in the buffer. The first one tells the size of all.
    contents: Vec<Range<usize>>,
    /// The length of all contents.
    length: usize,
    /// The sequence number that the next segment of TCP has.
    next: u32,
    /// Whether another segment may follow.
    is_open: bool,
}

/// Joins the packets of one buffer.
pub(in crate::wireguard::userspace) struct Coalescer {
    /// Whether the TUN takes large packets of TCP, and of UDP.
    tcp: bool,
    udp: bool,
    joined: Option<Joined>,
    /// The list of a packet that was written, to be used again.
    spare: Vec<Range<usize>>,
}

impl Coalescer {
    pub(in crate::wireguard::userspace) fn new(tcp: bool, udp: bool) -> Self {
        Self { tcp, udp, joined: None, spare: Vec::with_capacity(MAX_SEGMENTS) }
    }

    /// Says which large packets the TUN takes from now on.
    pub(in crate::wireguard::userspace) fn limit(&mut self, tcp: bool, udp: bool) {
        (self.tcp, self.udp) = (tcp, udp);
    }

    /// Takes a packet, which is a part of the buffer. The buffer must stay as it is until [`Self::flush`].
    pub(in crate::wireguard::userspace) fn push<W: PieceWriter>(
        &mut self,
        buffer: &[u8],
        packet: Range<usize>,
        writer: &mut W,
    ) {
        let bytes = &buffer[packet.clone()];
        let Some(layout) = self.joinable(bytes) else {
            self.flush(buffer, writer);
            return writer.write(&[IoSlice::new(&Header::default().to_bytes()), IoSlice::new(bytes)]);
        };
        let content = packet.start + layout.content..packet.end;
        if let Some(joined) = &mut self.joined
            && joined.takes(&layout, bytes)
        {
            return joined.add(bytes, content);
        }
        self.flush(buffer, writer);
        let mut headers = [0; MAX_HEADERS];
        headers[..layout.content].copy_from_slice(&bytes[..layout.content]);
        let mut contents = std::mem::take(&mut self.spare);
        contents.clear();
        let (length, is_open) = (content.len(), !layout.is_tcp || bytes[layout.flags()] & PSH == 0);
        contents.push(content);
        let next = if layout.is_tcp { layout.sequence(bytes).wrapping_add(length as u32) } else { 0 };
        self.joined = Some(Joined { layout, headers, contents, length, next, is_open });
    }

    /// Returns the layout of a packet that may be joined: with content, right checksums, and no flags of TCP but ACK
    /// and PSH.
    fn joinable(&self, packet: &[u8]) -> Option<Layout> {
        let layout = Layout::of_plain(packet)?;
        let is_plain = match layout.is_tcp {
            true => self.tcp && packet[layout.flags()] & !PSH == ACK,
            false => {
                let said = [packet[layout.transport + 4], packet[layout.transport + 5]];
                let checksum = [packet[layout.checksum()], packet[layout.checksum() + 1]];
                let is_whole = usize::from(u16::from_be_bytes(said)) == packet.len() - layout.transport;
                self.udp && is_whole && checksum != [0, 0]
            }
        };
        let has_content = layout.content < packet.len() && layout.content <= MAX_HEADERS;
        // The kernel drops a packet whose checksums are wrong. The joined one would have right ones.
        let is_valid = || checksum::is_ipv4_valid(packet, &layout) && checksum::is_transport_valid(packet, &layout);
        (is_plain && has_content && is_valid()).then_some(layout)
    }

    /// Writes the packet that is being joined.
    pub(in crate::wireguard::userspace) fn flush<W: PieceWriter>(&mut self, buffer: &[u8], writer: &mut W) {
        let Some(mut joined) = self.joined.take() else { return };
        let header = joined.finish();
        // The headers, and the header of the TUN.
        let mut pieces = [IoSlice::new(&[]); MAX_SEGMENTS + 2];
        let headers: [u8; HEADER] = header.to_bytes();
        pieces[0] = IoSlice::new(&headers);
        pieces[1] = IoSlice::new(&joined.headers[..joined.layout.content]);
        for (piece, content) in pieces[2..].iter_mut().zip(&joined.contents) {
            *piece = IoSlice::new(&buffer[content.clone()]);
        }
        writer.write(&pieces[..joined.contents.len() + 2]);
        self.spare = joined.contents;
    }
}

impl Joined {
    fn size(&self) -> usize {
        self.contents[0].len()
    }

    /// Returns whether a packet continues this one.
    fn takes(&self, layout: &Layout, packet: &[u8]) -> bool {
        let content = packet.len() - layout.content;
        self.is_open
            && self.layout == *layout
            && self.contents.len() < MAX_SEGMENTS
            && content <= self.size()
            && layout.content + self.length + content <= MAX_PACKET
            && (!layout.is_tcp || layout.sequence(packet) == self.next)
            && self.has_same_headers(packet)
    }

    /// Compares the headers but for what differs between segments: lengths, checksums, the ID of IPv4, the sequence
    /// number and PSH. So no DSCP, ECN, TTL, flow label, window, acknowledgment or option is lost.
    fn has_same_headers(&self, packet: &[u8]) -> bool {
        let (headers, transport) = (&self.headers, self.layout.transport);
        let same = |range: Range<usize>| headers[range.clone()] == packet[range];
        let has_same_ip = match self.layout.is_ipv6 {
            // The ID of IPv4 counts up, as segmenting makes it, or does not matter.
            false => same(0..2) && self.has_next_id(packet) && same(6..10) && same(12..transport),
            true => same(0..4) && same(6..transport),
        };
        let has_same_transport = match self.layout.is_tcp {
            true => {
                let flags = self.layout.flags();
                same(transport..transport + 4)
                    && same(transport + 8..flags)
                    && (headers[flags] ^ packet[flags]) & !PSH == 0
                    && same(flags + 1..transport + 16)
                    && same(transport + 18..self.layout.content)
            }
            false => same(transport..transport + 4),
        };
        has_same_ip && has_same_transport
    }

    /// Returns whether the ID of a packet of IPv4 is the one that segmenting would give it. A packet that must not be
    /// fragmented needs none (RFC 6864 section 4.1).
    fn has_next_id(&self, packet: &[u8]) -> bool {
        const DONT_FRAGMENT: u8 = 0x40;
        let id = |bytes: &[u8]| u16::from_be_bytes([bytes[4], bytes[5]]);
        packet[6] & DONT_FRAGMENT != 0 || id(packet) == id(&self.headers).wrapping_add(self.contents.len() as u16)
    }

    fn add(&mut self, packet: &[u8], content: Range<usize>) {
        let is_full = content.len() == self.size();
        self.length += content.len();
        self.next = self.next.wrapping_add(content.len() as u32);
        self.contents.push(content);
        let mut is_pushed = false;
        if self.layout.is_tcp {
            let flags = self.layout.flags();
            is_pushed = packet[flags] & PSH != 0;
            self.headers[flags] |= packet[flags] & PSH;
        }
        self.is_open = is_full && !is_pushed;
    }

    /// Writes the headers of the large packet, and returns what the TUN is told about it.
    fn finish(&mut self) -> Header {
        if self.contents.len() == 1 {
            return Header::valid();
        }
        let (layout, length) = (self.layout, self.layout.content + self.length);
        layout.write_length(&mut self.headers[..layout.content], length);
        // The kernel adds the rest (`CHECKSUM_PARTIAL`, linux/skbuff.h).
        let sum = checksum::fold(checksum::pseudo_header(&self.headers, &layout, length - layout.transport));
        let at = layout.checksum();
        self.headers[at..at + 2].copy_from_slice(&sum.to_ne_bytes());
        Header::of_segments(&layout, self.size())
    }
}
