//! The fields of IP packets that WireGuard needs: addresses, and the length without padding.

use std::net::IpAddr;

/// The length of an IPv4 header without options (RFC 791 section 3.1).
const IPV4_HEADER: usize = 20;

/// The length of an IPv6 header (RFC 8200 section 3).
const IPV6_HEADER: usize = 40;

/// Returns the destination of a packet. None for what is not an IP packet.
pub(super) fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 if packet.len() >= IPV4_HEADER => array::<4>(packet, 16).map(IpAddr::from),
        6 if packet.len() >= IPV6_HEADER => array::<16>(packet, 24).map(IpAddr::from),
        _ => None,
    }
}

/// Returns the source of a received packet, and its length without padding. None for what is not a whole IP packet.
pub(super) fn source_and_length(packet: &[u8]) -> Option<(IpAddr, usize)> {
    let (source, length, header) = match packet.first()? >> 4 {
        4 => (array::<4>(packet, 12)?.into(), usize::from(u16::from_be_bytes(array(packet, 2)?)), IPV4_HEADER),
        6 => {
            let payload = usize::from(u16::from_be_bytes(array(packet, 4)?));
            (array::<16>(packet, 8)?.into(), IPV6_HEADER + payload, IPV6_HEADER)
        }
        _ => return None,
    };
    (header..=packet.len()).contains(&length).then_some((source, length))
}

/// Returns the byte with DSCP and the congestion bits.
pub(super) fn traffic_class(packet: &[u8]) -> Option<u8> {
    match packet {
        [first, second, ..] if first >> 4 == 4 => Some(*second),
        [first, second, ..] if first >> 4 == 6 => Some(first << 4 | second >> 4),
        _ => None,
    }
}

/// Combines the congestion bits of a received packet with those of its outer packet. Returns false if the outer packet
/// met congestion and the transport would not understand that: then the packet is to be dropped (RFC 6040 section 4.2,
/// figure 4).
pub(super) fn combine_congestion(packet: &mut [u8], outer: u8) -> bool {
    const NOT_CAPABLE: u8 = 0;
    const CAPABLE_1: u8 = 1;
    const CAPABLE_0: u8 = 2;
    const CONGESTION: u8 = 3;
    let combined = match (traffic_class(packet).map_or(NOT_CAPABLE, |class| class & CONGESTION), outer) {
        (NOT_CAPABLE, CONGESTION) => return false,
        (CAPABLE_0 | CAPABLE_1, CONGESTION) => CONGESTION,
        (CAPABLE_0, CAPABLE_1) => CAPABLE_1,
        _ => return true,
    };
    if packet[0] >> 4 == 6 {
        packet[1] = packet[1] & !(CONGESTION << 4) | combined << 4;
        return true;
    }
    // The checksum of the header follows the change of one word (RFC 1624, equation 3).
    let before = u16::from_be_bytes([packet[0], packet[1]]);
    packet[1] = packet[1] & !CONGESTION | combined;
    let after = u16::from_be_bytes([packet[0], packet[1]]);
    let checksum = u16::from_be_bytes([packet[10], packet[11]]);
    let sum = u32::from(!checksum) + u32::from(!before) + u32::from(after);
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    packet[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    true
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lengths_are_those_of_the_headers() {
        let mut ipv4 = [0; 48];
        ipv4[0] = 0x45;
        for (said, expected) in [(19, None), (20, Some(20)), (48, Some(48)), (49, None)] {
            ipv4[3] = said;
            assert_eq!(source_and_length(&ipv4).map(|(_, length)| length), expected, "{said}");
        }
        let mut ipv6 = [0; 48];
        ipv6[0] = 0x60;
        for (said, expected) in [(0, Some(40)), (8, Some(48)), (9, None)] {
            ipv6[5] = said;
            assert_eq!(source_and_length(&ipv6).map(|(_, length)| length), expected, "{said}");
        }
    }

    /// The sum of a header with a right checksum is all ones (RFC 1071).
    fn has_right_checksum(header: &[u8]) -> bool {
        let sum = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u32>();
        (sum & 0xffff) + (sum >> 16) == 0xffff
    }

    /// All of figure 4 of RFC 6040. The bits in order: not capable, capable (1), capable (0), congestion.
    #[test]
    fn congestion_bits_are_combined_as_in_the_rfc() {
        const COMBINED: [[Option<u8>; 4]; 4] = [
            [Some(0), Some(0), Some(0), None],
            [Some(1), Some(1), Some(1), Some(3)],
            [Some(2), Some(1), Some(2), Some(3)],
            [Some(3), Some(3), Some(3), Some(3)],
        ];
        let pairs = (0..4u8).flat_map(|inner| (0..4u8).map(move |outer| (inner, outer)));
        for (inner, outer) in pairs {
            let expected = COMBINED[usize::from(inner)][usize::from(outer)];
            let mut ipv4 = Vec::new();
            let mut header = etherparse::Ipv4Header::new(0, 9, etherparse::IpNumber::TCP, [10, 0, 0, 1], [10, 0, 0, 2])
                .expect("a header");
            header.dscp = 46.try_into().expect("six bits");
            header.ecn = inner.try_into().expect("two bits");
            header.header_checksum = header.calc_header_checksum();
            header.write(&mut ipv4).expect("written");
            assert_eq!(combine_congestion(&mut ipv4, outer), expected.is_some(), "{inner} in {outer}");
            assert!(has_right_checksum(&ipv4), "{inner} in {outer}");
            assert_eq!(traffic_class(&ipv4), Some(46 << 2 | expected.unwrap_or(inner)), "{inner} in {outer}");
            let mut ipv6 = [0; 40];
            (ipv6[0], ipv6[1]) = (0x6a, inner << 4 | 5);
            assert_eq!(combine_congestion(&mut ipv6, outer), expected.is_some());
            assert_eq!((ipv6[0], ipv6[1]), (0x6a, expected.unwrap_or(inner) << 4 | 5), "nothing else is changed");
        }
        assert!(!combine_congestion(&mut [], 3));
    }

    proptest! {
        #[test]
        fn nothing_panics_and_no_length_exceeds_the_packet(packet in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = destination(&packet);
            if let Some((_, length)) = source_and_length(&packet) {
                prop_assert!((IPV4_HEADER..=packet.len()).contains(&length));
            }
        }
    }
}
