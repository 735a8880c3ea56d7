//! The layout of a packet of TCP or UDP.

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const UDP_HEADER: usize = 8;
const TCP_HEADER: usize = 20;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// Flags of TCP, in the byte [`Layout::flags`] (RFC 9293 section 3.1).
pub(super) const FIN: u8 = 0x01;
pub(super) const PSH: u8 = 0x08;
pub(super) const ACK: u8 = 0x10;
pub(super) const CWR: u8 = 0x80;

/// Where the headers of a packet are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) is_ipv6: bool,
    pub(super) is_tcp: bool,
    /// The place of the transport header.
    pub(super) transport: usize,
    /// The place of the content: the length of all headers.
    pub(super) content: usize,
}

impl Layout {
    /// Finds the headers of a packet whose transport header is at a place that the kernel has named. IPv4 options and
    /// IPv6 extension headers may be before it. None if the headers are not whole.
    pub(super) fn with_transport(packet: &[u8], transport: usize, is_tcp: bool) -> Option<Self> {
        let is_ipv6 = match packet.first()? >> 4 {
            4 => false,
            6 => true,
            _ => return None,
        };
        let least = if is_ipv6 { IPV6_HEADER } else { IPV4_HEADER };
        let length = match is_tcp {
            true => usize::from(packet.get(transport + 12)? >> 4) * 4,
            false => UDP_HEADER,
        };
        let is_whole = transport >= least
            && length >= if is_tcp { TCP_HEADER } else { UDP_HEADER }
            && transport + length <= packet.len();
        is_whole.then_some(Self { is_ipv6, is_tcp, transport, content: transport + length })
    }

    /// Finds the headers of a received packet. None for other protocols, fragments, IPv4 options and IPv6 extension
    /// headers: such packets are not joined.
    pub(super) fn of_plain(packet: &[u8]) -> Option<Self> {
        let (transport, protocol) = match packet.first()? {
            // No fragment: neither "more fragments" nor an offset (RFC 791 section 3.1).
            0x45 if packet.len() > IPV4_HEADER && packet[6] & 0x3f == 0 && packet[7] == 0 => (IPV4_HEADER, packet[9]),
            0x60..=0x6f if packet.len() > IPV6_HEADER => (IPV6_HEADER, packet[6]),
            _ => return None,
        };
        match protocol {
            TCP => Self::with_transport(packet, transport, true),
            UDP => Self::with_transport(packet, transport, false),
            _ => None,
        }
    }

    /// Returns the number of the protocol.
    pub(super) fn protocol(&self) -> u8 {
        if self.is_tcp { TCP } else { UDP }
    }

    /// Returns the offset of the checksum from the transport header.
    pub(super) fn checksum_offset(&self) -> usize {
        if self.is_tcp { 16 } else { 6 }
    }

    /// Returns the place of the checksum.
    pub(super) fn checksum(&self) -> usize {
        self.transport + self.checksum_offset()
    }

    /// Returns the place of the flags of TCP.
    pub(super) fn flags(&self) -> usize {
        self.transport + 13
    }

    /// Returns TCP's sequence number.
    pub(super) fn sequence(&self, packet: &[u8]) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&packet[self.transport + 4..self.transport + 8]);
        u32::from_be_bytes(bytes)
    }

    /// Writes the lengths in the headers, for a packet of `length` bytes, and the checksum of an IPv4 header.
    pub(super) fn write_length(&self, headers: &mut [u8], length: usize) {
        if self.is_ipv6 {
            put(headers, 4, length - IPV6_HEADER);
        } else {
            put(headers, 2, length);
            super::checksum::write_ipv4(&mut headers[..self.transport]);
        }
        if !self.is_tcp {
            put(headers, self.transport + 4, length - self.transport);
        }
    }
}

/// Writes a number of 16 bits.
pub(super) fn put(bytes: &mut [u8], at: usize, value: usize) {
    bytes[at..at + 2].copy_from_slice(&(value as u16).to_be_bytes());
}
