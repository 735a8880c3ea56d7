//! Packets as they were captured, taken apart as far as a leak test needs: who, to whom, and how the payload begins.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::dns;
use crate::internet::{HOST, PROVIDER, ROUTER};
use crate::provider::PROVIDER_PORT;

/// How much of a packet is kept, in bytes: any headers and the beginning of the payload.
pub(crate) const KEPT: usize = 256;

const ICMP: u8 = libc::IPPROTO_ICMP as u8;
const TCP: u8 = libc::IPPROTO_TCP as u8;
const UDP: u8 = libc::IPPROTO_UDP as u8;
const ICMPV6: u8 = libc::IPPROTO_ICMPV6 as u8;

/// The headers of IPv6 that may stand before the transport's (RFC 8200 section 4.1) and say their length alike.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION: u8 = 60;
const FRAGMENT: u8 = 44;

/// A captured packet.
#[derive(Clone, PartialEq, Eq)]
pub struct Packet {
    /// The number of the interface.
    pub interface: u32,
    /// Whether the host sent it.
    pub outgoing: bool,
    /// What it is, by the numbers of Ethernet: 0x0800 is IPv4.
    pub ethertype: u16,
    /// Who spoke with whom, if it is an IP packet.
    pub flow: Option<Flow>,
}

/// The addresses, the ports and the beginning of the payload of an IP packet.
#[derive(Clone, PartialEq, Eq)]
pub struct Flow {
    /// The number of the protocol: 6 is TCP, 17 UDP.
    pub protocol: u8,
    /// The sender; the port is 0 where there is none.
    pub source: SocketAddr,
    /// The receiver; the port is 0 where there is none.
    pub destination: SocketAddr,
    /// The beginning of what TCP, UDP or ICMP carries; ICMP's own header counts as carried. Empty in a later fragment.
    pub payload: Vec<u8>,
}

impl Packet {
    /// Whether a host whose programs are all in the tunnel may have sent or received this on its uplink: encrypted packets
    /// from and to the provider, the host's own questions for the provider's name, errors about either, and the
    /// neighbourhood's own traffic: ARP, neighbour discovery (RFC 4861) and multicast listeners (RFC 3810).
    pub fn is_expected_on_uplink(&self) -> bool {
        match (self.ethertype, &self.flow) {
            (ethertype, _) if i32::from(ethertype) == libc::ETH_P_ARP => true,
            (_, Some(flow)) => {
                flow.is_encrypted() || flow.asks_for_provider() || flow.is_neighbourhood() || {
                    flow.quoted().is_some_and(|quoted| quoted.is_encrypted() || quoted.asks_for_provider())
                }
            }
            _ => false,
        }
    }

    /// Whether neighbours find each other by it: ARP, neighbour discovery (RFC 4861) and multicast listeners (RFC 3810).
    pub fn is_neighbourhood(&self) -> bool {
        i32::from(self.ethertype) == libc::ETH_P_ARP || self.flow.as_ref().is_some_and(Flow::is_neighbourhood)
    }

    /// Whether this is an encrypted packet between the host and the provider.
    pub fn is_encrypted(&self) -> bool {
        self.flow.as_ref().is_some_and(Flow::is_encrypted)
    }
}

impl Flow {
    /// Takes an IP packet apart. `None` if it is none.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => {
                let header = usize::from(packet[0] & 0xf) * 4;
                let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
                let destination: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
                let is_first = u16_at(packet, 6)? & 0x1fff == 0;
                let rest = packet.get(header..).filter(|_| is_first).unwrap_or_default();
                let (source, destination) = (Ipv4Addr::from(source), Ipv4Addr::from(destination));
                Some(Self::of(*packet.get(9)?, source.into(), destination.into(), rest))
            }
            6 => {
                let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
                let destination: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
                let (mut protocol, mut rest) = (*packet.get(6)?, packet.get(40..)?);
                while let HOP_BY_HOP | ROUTING | DESTINATION | FRAGMENT = protocol {
                    let length = match protocol {
                        FRAGMENT if u16_at(rest, 2)? >> 3 != 0 => rest.len(),
                        FRAGMENT => 8,
                        _ => usize::from(*rest.get(1)?) * 8 + 8,
                    };
                    protocol = *rest.first()?;
                    rest = rest.get(length..).unwrap_or_default();
                }
                let (source, destination) = (Ipv6Addr::from(source), Ipv6Addr::from(destination));
                Some(Self::of(protocol, source.into(), destination.into(), rest))
            }
            _ => None,
        }
    }

    fn of(protocol: u8, source: IpAddr, destination: IpAddr, rest: &[u8]) -> Self {
        let (header, has_ports) = match protocol {
            TCP => (rest.get(12).map_or(rest.len(), |offset| usize::from(offset >> 4) * 4), true),
            UDP => (8, true),
            _ => (0, false),
        };
        let port = |at| u16_at(rest, at).filter(|_| has_ports).unwrap_or(0);
        Self {
            protocol,
            source: (source, port(0)).into(),
            destination: (destination, port(2)).into(),
            payload: rest.get(header..).unwrap_or_default().to_vec(),
        }
    }

    /// Whether this is WireGuard's own protocol between host and provider: one of its four messages, which begin with their
    /// number and three zeros.
    fn is_encrypted(&self) -> bool {
        let between = |here: SocketAddr, there: SocketAddr| {
            HOST.both().contains(&here.ip()) && PROVIDER.both().contains(&there.ip()) && there.port() == PROVIDER_PORT
        };
        self.protocol == UDP
            && (between(self.source, self.destination) || between(self.destination, self.source))
            && matches!(self.payload[..], [1..=4, 0, 0, 0, ..])
    }

    /// Whether this is a question of the host to its resolver for the provider's name, or the answer.
    fn asks_for_provider(&self) -> bool {
        let resolver = |address: SocketAddr| ROUTER.both().contains(&address.ip()) && address.port() == 53;
        self.protocol == UDP
            && (resolver(self.source) || resolver(self.destination))
            && dns::question_of(&self.payload).is_some_and(|(name, _)| name == "vpn.example")
    }

    /// Whether this is what every IPv6 host says to its neighbours: router and neighbour discovery, multicast listeners.
    fn is_neighbourhood(&self) -> bool {
        self.protocol == ICMPV6 && matches!(self.payload.first(), Some(130..=137 | 143))
    }

    /// The packet that an ICMP error is about: ICMP's types 3, 11 and 12 (RFC 792), ICMPv6's below 128 (RFC 4443).
    pub fn quoted(&self) -> Option<Flow> {
        match (self.protocol, self.payload.first()?) {
            (ICMP, 3 | 11 | 12) | (ICMPV6, 1..=127) => Flow::parse(self.payload.get(8..)?),
            _ => None,
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2).and_then(|bytes| bytes.try_into().ok()).map(u16::from_be_bytes)
}

impl fmt::Debug for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = if self.outgoing { "out" } else { "in" };
        match &self.flow {
            Some(flow) => write!(f, "{direction} {flow:?}"),
            None => write!(f, "{direction} ethertype {:#06x}", self.ethertype),
        }
    }
}

impl fmt::Debug for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            TCP => "TCP",
            UDP => "UDP",
            ICMP => "ICMP",
            ICMPV6 => "ICMPv6",
            _ => "protocol",
        };
        write!(f, "{protocol} ({}) {} -> {}", self.protocol, self.source, self.destination)?;
        match self.payload.len() {
            0 => Ok(()),
            _ => write!(f, " \"{}\"", self.payload[..self.payload.len().min(48)].escape_ascii()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn udp(source: [u8; 4], destination: [u8; 4], ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, UDP, 0, 0];
        packet.extend([source, destination].concat());
        packet.extend([ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat());
        packet.extend([0; 4]);
        packet.extend(payload);
        packet
    }

    fn expected(ip: &[u8]) -> bool {
        let flow = Flow::parse(ip);
        assert!(flow.is_some());
        Packet { interface: 1, outgoing: true, ethertype: 0x0800, flow }.is_expected_on_uplink()
    }

    #[test]
    fn only_wireguards_messages_to_the_provider_are_encrypted() {
        let (host, provider, web) = ([192, 0, 2, 2], [198, 51, 100, 2], [203, 0, 113, 2]);
        let message = [4, 0, 0, 0, 9, 9, 9, 9];
        assert!(expected(&udp(host, provider, (1234, 51820), &message)));
        assert!(expected(&udp(provider, host, (51820, 1234), &message)));
        assert!(!expected(&udp(host, provider, (1234, 53), &message)));
        assert!(!expected(&udp(host, web, (1234, 51820), &message)));
        assert!(!expected(&udp(host, provider, (1234, 51820), b"GET / HTTP/1.1")));
    }

    #[test]
    fn an_error_is_as_good_as_what_it_is_about() {
        let error = |about: &[u8]| {
            let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, ICMP, 0, 0, 198, 51, 100, 2, 192, 0, 2, 2];
            packet.extend([3, 3, 0, 0, 0, 0, 0, 0]);
            packet.extend(about);
            packet
        };
        let (host, provider) = ([192, 0, 2, 2], [198, 51, 100, 2]);
        assert!(expected(&error(&udp(host, provider, (1234, 51820), &[1, 0, 0, 0]))));
        assert!(!expected(&error(&udp(host, provider, (1234, 53), &[1, 0, 0, 0]))));
    }

    #[test]
    fn extension_headers_hide_no_port() {
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, HOP_BY_HOP, 64];
        packet.extend([0; 32]);
        packet.extend([UDP, 0, 0, 0, 0, 0, 0, 0]);
        packet.extend([0x12, 0x34, 0, 53, 0, 0, 0, 0, b'x']);
        let flow = Flow::parse(&packet).expect("a packet");
        assert_eq!((flow.protocol, flow.source.port(), flow.destination.port()), (UDP, 0x1234, 53));
        assert_eq!(flow.payload, b"x");
    }
}
