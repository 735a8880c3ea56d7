//! The header that tells the program its client's address: HAProxy's PROXY protocol, version 2, section 2.2 of its
//! specification (<https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>).

use std::net::{IpAddr, SocketAddr};

/// The first bytes of every header, which no other protocol begins with.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Version 2, and the command PROXY: the connection is relayed on behalf of another host.
const VERSION_AND_COMMAND: u8 = 0x21;

/// TCP over IPv4, and over IPv6.
const TCP_IPV4: u8 = 0x11;
const TCP_IPV6: u8 = 0x21;

/// Returns the header of a connection from a client to an address of the host. An IPv4 connection to an IPv6 socket is
/// described as IPv4.
pub(crate) fn header(client: SocketAddr, host: SocketAddr) -> Vec<u8> {
    let (family, addresses) = match (client.ip().to_canonical(), host.ip().to_canonical()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (TCP_IPV4, [from.octets(), to.octets()].concat()),
        (from, to) => (TCP_IPV6, [ipv6(from), ipv6(to)].concat()),
    };
    let ports = [client.port().to_be_bytes(), host.port().to_be_bytes()].concat();
    let length = u16::try_from(addresses.len() + ports.len()).unwrap_or_default();
    [&SIGNATURE[..], &[VERSION_AND_COMMAND, family], &length.to_be_bytes(), &addresses, &ports].concat()
}

fn ipv6(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(client: &str, host: &str) -> Vec<u8> {
        header(client.parse().expect("a client"), host.parse().expect("a host"))
    }

    #[test]
    fn a_header_follows_the_specification() {
        let ipv4 = b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a\x21\x11\x00\x0c\
            \xc0\x00\x02\x42\xc0\x00\x02\x41\xd4\x31\x1f\x90";
        assert_eq!(encoded("192.0.2.66:54321", "192.0.2.65:8080"), ipv4);
        assert_eq!(encoded("[::ffff:192.0.2.66]:54321", "[::ffff:192.0.2.65]:8080"), ipv4, "an IPv4-mapped address");
        let ipv6 = encoded("[2001:db8::2]:54321", "[2001:db8::1]:8080");
        assert_eq!(ipv6[..12], SIGNATURE);
        assert_eq!(ipv6[12..16], [0x21, 0x21, 0, 36]);
        assert_eq!(ipv6[16..32], [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        assert_eq!(ipv6[32..48], [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(ipv6[48..], [0xd4, 0x31, 0x1f, 0x90]);
    }
}
