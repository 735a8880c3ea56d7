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
