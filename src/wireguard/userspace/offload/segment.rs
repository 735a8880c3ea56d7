//! Cuts a large packet into segments, as the kernel does for a device without offloads (TSO; USO: `UDP_SEGMENT` of
//! udp(7)).

use std::ops::Range;

use super::checksum;
use super::header::Header;
use super::layout::{CWR, FIN, Layout, PSH};

/// The segments of a packet.
#[derive(Clone, Copy, Debug)]
pub(in crate::wireguard::userspace) struct Segments {
    layout: Layout,
    /// The length of a segment's content. The last one may be shorter.
    size: usize,
    content: usize,
    /// The sum of the pseudo-header without the length.
    pseudo_header: u64,
}

impl Segments {
    /// Returns the segments of a packet of the TUN. The outer None means that the packet is not what the header says;
    /// the inner one, that it is a single segment.
    pub(in crate::wireguard::userspace) fn of(header: &Header, packet: &[u8]) -> Option<Option<Self>> {
        if !header.is_large() {
            return Some(None);
        }
        let (layout, size) = header.segments(packet)?;
        let pseudo_header = checksum::pseudo_header_of_large(packet, &layout);
        Some(Some(Self { layout, size, content: packet.len() - layout.content, pseudo_header }))
    }

    /// Returns whether they are of TCP. Otherwise they are of UDP.
    pub(in crate::wireguard::userspace) fn is_tcp(&self) -> bool {
        self.layout.is_tcp
    }

    /// Returns the number of segments, which is not zero.
    pub(in crate::wireguard::userspace) fn count(&self) -> usize {
        self.content.div_ceil(self.size)
    }

    /// Returns the length of the longest segment.
    pub(in crate::wireguard::userspace) fn longest(&self) -> usize {
        self.layout.content + self.size.min(self.content)
    }

    fn range(&self, number: usize) -> Range<usize> {
        let start = number * self.size;
        start..(start + self.size).min(self.content)
    }

    /// Returns the length of a segment.
    pub(in crate::wireguard::userspace) fn length(&self, number: usize) -> usize {
        self.layout.content + self.range(number).len()
    }

    /// Writes a segment of the packet to `out`, which has its [`Self::length`].
    pub(in crate::wireguard::userspace) fn write(&self, packet: &[u8], number: usize, out: &mut [u8]) {
        let (layout, range) = (&self.layout, self.range(number));
        let length = out.len();
        let (headers, content) = out.split_at_mut(layout.content);
        headers.copy_from_slice(&packet[..layout.content]);
        content.copy_from_slice(&packet[layout.content..][range.clone()]);
        if !layout.is_ipv6 {
            // Each has an ID of its own (RFC 6864 wants none for packets that are not fragmented, the kernel does so).
            let id = u16::from_be_bytes([headers[4], headers[5]]).wrapping_add(number as u16);
            headers[4..6].copy_from_slice(&id.to_be_bytes());
        }
        if layout.is_tcp {
            let sequence = layout.sequence(headers).wrapping_add(range.start as u32);
            headers[layout.transport + 4..layout.transport + 8].copy_from_slice(&sequence.to_be_bytes());
            let flags = &mut headers[layout.flags()];
            if number + 1 < self.count() {
                *flags &= !(FIN | PSH);
            }
            if number > 0 {
                // Congestion is answered once (RFC 3168 section 6.1.2).
                *flags &= !CWR;
            }
        }
        layout.write_length(headers, length);
        checksum::write_transport(out, layout, self.pseudo_header);
    }
}
