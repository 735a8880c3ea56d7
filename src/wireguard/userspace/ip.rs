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

/// Marks a packet whose outer packet met congestion. Returns false if its transport would not understand that: then the
/// packet is to be dropped (RFC 6040 section 4.2).
pub(super) fn mark_congestion(packet: &mut [u8]) -> bool {
    const CONGESTION: u8 = 3;
    match traffic_class(packet).map(|class| class & CONGESTION) {
        None | Some(0) => return false,
        Some(CONGESTION) => return true,
        Some(_) => {}
    }
    if packet[0] >> 4 == 6 {
        packet[1] |= CONGESTION << 4;
        return true;
    }
    // The checksum of the header follows the change of one word (RFC 1624, equation 3).
    let before = u16::from_be_bytes([packet[0], packet[1]]);
    packet[1] |= CONGESTION;
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

    #[test]
    fn congestion_is_marked_where_it_is_understood() {
        for (ecn, marked) in [(0, None), (1, Some(3)), (2, Some(3)), (3, Some(3))] {
            let mut builder = Vec::new();
            let mut header = etherparse::Ipv4Header::new(0, 9, etherparse::IpNumber::TCP, [10, 0, 0, 1], [10, 0, 0, 2])
                .expect("a header");
            header.ecn = ecn.try_into().expect("two bits");
            header.header_checksum = header.calc_header_checksum();
            header.write(&mut builder).expect("written");
            assert!(has_right_checksum(&builder));
            assert_eq!(mark_congestion(&mut builder), marked.is_some(), "{ecn}");
            assert!(has_right_checksum(&builder), "{ecn}");
            assert_eq!(traffic_class(&builder).map(|class| class & 3), Some(marked.unwrap_or(ecn)));
            let mut ipv6 = [0; 40];
            (ipv6[0], ipv6[1]) = (0x6a, ecn << 4 | 5);
            assert_eq!(mark_congestion(&mut ipv6), marked.is_some());
            assert_eq!((ipv6[0], ipv6[1]), (0x6a, marked.unwrap_or(ecn) << 4 | 5), "nothing else is changed");
        }
        assert!(!mark_congestion(&mut []));
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
