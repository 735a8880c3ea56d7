//! The Internet checksum (RFC 1071). Sums are in the machine's byte order, which the one's complement sum allows.

use super::layout::Layout;

/// Adds bytes to a sum. Bytes of an odd number are followed by a zero.
pub(super) fn add(data: &[u8], sum: u64) -> u64 {
    // Independent sums of 32 bits each, which the compiler adds in parallel. 64 KiB cannot overflow them.
    let mut lanes = [0u64; 8];
    let (chunks, rest) = data.as_chunks::<32>();
    for chunk in chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk.as_chunks::<4>().0) {
            *lane += u64::from(u32::from_ne_bytes(*word));
        }
    }
    let (pairs, last) = rest.as_chunks::<2>();
    let pairs: u64 = pairs.iter().map(|pair| u64::from(u16::from_ne_bytes(*pair))).sum();
    let last = last.first().map_or(0, |byte| u64::from(u16::from_ne_bytes([*byte, 0])));
    sum + lanes.iter().sum::<u64>() + pairs + last
}

/// Folds a sum to 16 bits.
pub(super) fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Returns the sum of the pseudo-header (RFC 9293 section 3.1, RFC 8200 section 8.1), for a transport header and its
/// content of `length` bytes.
pub(super) fn pseudo_header(packet: &[u8], layout: &Layout, length: usize) -> u64 {
    let addresses = if layout.is_ipv6 { &packet[8..40] } else { &packet[12..20] };
    let protocol = u64::from(u16::from_ne_bytes([0, layout.protocol()]));
    add(addresses, protocol + u64::from(u16::from_ne_bytes((length as u16).to_be_bytes())))
}

/// Returns the sum of the pseudo-header without the length, from a large packet in whose checksum the kernel has left
/// that with the length. The destination of the pseudo-header is not the one of the IP header if there is a routing
/// header (RFC 8200 section 8.1).
pub(super) fn pseudo_header_of_large(packet: &[u8], layout: &Layout) -> u64 {
    let at = layout.checksum();
    let length = ((packet.len() - layout.transport) as u16).to_be_bytes();
    u64::from(u16::from_ne_bytes([packet[at], packet[at + 1]])) + u64::from(!u16::from_ne_bytes(length))
}

/// Writes the checksum of a transport header and its content, which end the packet. `pseudo_header` is the sum of the
/// pseudo-header without the length.
pub(super) fn write_transport(packet: &mut [u8], layout: &Layout, pseudo_header: u64) {
    let (start, at) = (layout.transport, layout.checksum());
    packet[at..at + 2].fill(0);
    let length = u16::from_ne_bytes(((packet.len() - start) as u16).to_be_bytes());
    let sum = add(&packet[start..], pseudo_header + u64::from(length));
    let checksum = complement(sum, layout.is_tcp);
    packet[at..at + 2].copy_from_slice(&checksum.to_ne_bytes());
}

/// Returns the checksum for a sum. In UDP, 0 says that there is none (RFC 768).
pub(super) fn complement(sum: u64, may_be_zero: bool) -> u16 {
    match !fold(sum) {
        0 if !may_be_zero => 0xffff,
        checksum => checksum,
    }
}

/// Returns whether the checksum of a transport header and its content is right.
pub(super) fn is_transport_valid(packet: &[u8], layout: &Layout) -> bool {
    let length = packet.len() - layout.transport;
    fold(add(&packet[layout.transport..], pseudo_header(packet, layout, length))) == 0xffff
}

/// Returns whether the checksum of an IPv4 header is right. IPv6 has none.
pub(super) fn is_ipv4_valid(packet: &[u8], layout: &Layout) -> bool {
    layout.is_ipv6 || fold(add(&packet[..layout.transport], 0)) == 0xffff
}

/// Writes the checksum of an IPv4 header.
pub(super) fn write_ipv4(header: &mut [u8]) {
    header[10..12].fill(0);
    let checksum = !fold(add(header, 0));
    header[10..12].copy_from_slice(&checksum.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As RFC 1071 section 4.1 has it.
    fn reference(data: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in data.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    proptest! {
        #[test]
        fn the_sum_is_that_of_the_rfc(data in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(fold(add(&data, 0)).to_ne_bytes(), reference(&data).to_be_bytes());
        }
    }

    #[test]
    fn the_longest_packet_does_not_overflow() {
        assert_eq!(fold(add(&[0xff; 65_535], 0)).to_ne_bytes(), reference(&[0xff; 65_535]).to_be_bytes());
    }
}
