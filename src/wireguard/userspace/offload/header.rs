//! The header before each packet of a TUN with `IFF_VNET_HDR` (`struct virtio_net_hdr`, linux/virtio_net.h).

use super::checksum::{add, complement};
use super::layout::Layout;

/// The length of the header.
pub(in crate::wireguard::userspace) const HEADER: usize = 10;

// Flags.
const NEEDS_CHECKSUM: u8 = 1;
const CHECKSUM_VALID: u8 = 2;

// Kinds of large packets.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// With one of the former: TCP has CWR set.
const GSO_ECN: u8 = 0x80;

/// What the TUN says about a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::wireguard::userspace) struct Header {
    flags: u8,
    gso_type: u8,
    headers: u16,
    gso_size: u16,
    checksum_start: u16,
    checksum_offset: u16,
}

impl Header {
    pub(in crate::wireguard::userspace) fn parse(bytes: &[u8; HEADER]) -> Self {
        let number = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            headers: number(2),
            gso_size: number(4),
            checksum_start: number(6),
            checksum_offset: number(8),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        (bytes[0], bytes[1]) = (self.flags, self.gso_type);
        let numbers = [self.headers, self.gso_size, self.checksum_start, self.checksum_offset];
        for (pair, number) in bytes[2..].as_chunks_mut::<2>().0.iter_mut().zip(numbers) {
            *pair = number.to_ne_bytes();
        }
        bytes
    }

    /// Returns the header of a packet that is one segment, whose checksum was found to be right.
    pub(super) fn valid() -> Self {
        Self { flags: CHECKSUM_VALID, ..Self::default() }
    }

    /// Returns the header of a packet of several segments, whose contents have `size` bytes, but for the last.
    pub(super) fn of_segments(layout: &Layout, size: usize) -> Self {
        Self {
            flags: NEEDS_CHECKSUM,
            gso_type: match (layout.is_tcp, layout.is_ipv6) {
                (true, false) => GSO_TCPV4,
                (true, true) => GSO_TCPV6,
                (false, _) => GSO_UDP_L4,
            },
            headers: layout.content as u16,
            gso_size: size as u16,
            checksum_start: layout.transport as u16,
            checksum_offset: layout.checksum_offset() as u16,
        }
    }

    /// Returns whether the packet is of several segments.
    pub(super) fn is_large(&self) -> bool {
        self.gso_type != GSO_NONE
    }

    /// Returns the layout of a packet of several segments, and the size of their contents. None if it is not what it
    /// says.
    pub(super) fn segments(&self, packet: &[u8]) -> Option<(Layout, usize)> {
        let is_ipv6 = packet.first()? >> 4 == 6;
        let is_tcp = match (self.gso_type & !GSO_ECN, is_ipv6) {
            (GSO_TCPV4, false) | (GSO_TCPV6, true) => true,
            (GSO_UDP_L4, _) => false,
            _ => return None,
        };
        let layout = Layout::with_transport(packet, usize::from(self.checksum_start), is_tcp)?;
        let size = usize::from(self.gso_size);
        (self.flags & NEEDS_CHECKSUM != 0 && size > 0 && packet.len() > layout.content).then_some((layout, size))
    }

    /// Writes the checksum that the kernel left to the device. Returns false if its place is not in the packet.
    pub(in crate::wireguard::userspace) fn finish_checksum(&self, packet: &mut [u8]) -> bool {
        if self.flags & NEEDS_CHECKSUM == 0 {
            return true;
        }
        let start = usize::from(self.checksum_start);
        let at = start + usize::from(self.checksum_offset);
        if at + 2 > packet.len() {
            return false;
        }
        // The field has the sum of the pseudo-header.
        let checksum = complement(add(&packet[start..], 0), false);
        packet[at..at + 2].copy_from_slice(&checksum.to_ne_bytes());
        true
    }
}
