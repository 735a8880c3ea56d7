//! Captured packets, parsed by etherparse as far as leak tests need: addresses, ports and the beginning of the payload.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use etherparse::{IpNumber, Ipv6ExtensionSlice, LaxNetSlice, LaxSlicedPacket, TcpSlice, UdpSlice};

use crate::dns;
use crate::provider::PROVIDER_PORT;
use crate::shared::addresses::{CLUSTER_RESOLVER, HOST, POD, POD_GATEWAY, PROVIDER, ROUTER};

/// The number of bytes of a packet to keep: all headers and the beginning of the payload.
pub(crate) const KEPT: usize = 256;

const ICMP: u8 = IpNumber::ICMP.0;
const TCP: u8 = IpNumber::TCP.0;
const UDP: u8 = IpNumber::UDP.0;
const ICMPV6: u8 = IpNumber::IPV6_ICMP.0;

/// A captured packet.
#[derive(Clone, PartialEq, Eq)]
pub struct Packet {
    /// The index of the interface.
    pub interface: u32,
    /// Whether the host sent it.
    pub outgoing: bool,
    /// The EtherType: 0x0800 is IPv4.
    pub ethertype: u16,
    /// The addresses and the payload, if it is an IP packet.
    pub flow: Option<Flow>,
}

/// The addresses, the ports and the beginning of the payload of an IP packet.
#[derive(Clone, PartialEq, Eq)]
pub struct Flow {
    /// The protocol number: 6 is TCP, 17 UDP.
    pub protocol: u8,
    /// The sender, with port 0 if the protocol has no ports.
    pub source: SocketAddr,
    /// The receiver, with port 0 if the protocol has no ports.
    pub destination: SocketAddr,
    /// The beginning of the payload of TCP or UDP, or of the IP packet for other protocols. Empty in a later fragment.
    pub payload: Vec<u8>,
}

impl Packet {
    /// Returns whether a host whose programs are all in the tunnel may send or receive this packet on its uplink:
    /// encrypted packets from and to the provider, questions for the provider's name, ICMP errors about either, ARP,
    /// neighbour discovery (RFC 4861) and multicast listener reports (RFC 3810).
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

    /// Returns whether this is ARP, neighbour discovery (RFC 4861) or a multicast listener report (RFC 3810).
    pub fn is_neighbourhood(&self) -> bool {
        i32::from(self.ethertype) == libc::ETH_P_ARP || self.flow.as_ref().is_some_and(Flow::is_neighbourhood)
    }

    /// Returns whether a pod sent or receives this packet.
    pub fn is_of_pod(&self) -> bool {
        self.flow
            .as_ref()
            .is_some_and(|flow| [flow.source, flow.destination].into_iter().any(|end| POD.both().contains(&end.ip())))
    }

    /// Returns whether this is an encrypted packet between the host and the provider.
    pub fn is_encrypted(&self) -> bool {
        self.flow.as_ref().is_some_and(Flow::is_encrypted)
    }
}

impl Flow {
    /// Parses an IP packet, which may be cut off. Returns `None` if it has no valid IP header.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        let sliced = LaxSlicedPacket::from_ip(packet).ok()?;
        let net = sliced.net.as_ref()?;
        let (source, destination, offset): (IpAddr, IpAddr, _) = match net {
            LaxNetSlice::Ipv4(ip) => {
                let header = ip.header();
                (header.source_addr().into(), header.destination_addr().into(), header.fragments_offset())
            }
            LaxNetSlice::Ipv6(ip) => {
                let offset = ip.extensions().clone().into_iter().find_map(|extension| match extension {
                    Ipv6ExtensionSlice::Fragment(fragment) => Some(fragment.fragment_offset()),
                    _ => None,
                });
                let header = ip.header();
                (header.source_addr().into(), header.destination_addr().into(), offset.unwrap_or_default())
            }
            LaxNetSlice::Arp(_) => return None,
        };
        let ip_payload = net.ip_payload_ref()?;
        // A later fragment has no transport header.
        let rest = if offset.value() == 0 { ip_payload.payload } else { &[] };
        let transport = match ip_payload.ip_number {
            IpNumber::UDP => UdpSlice::from_slice_lax(rest)
                .map(|udp| (udp.source_port(), udp.destination_port(), udp.payload()))
                .ok(),
            IpNumber::TCP => {
                TcpSlice::from_slice(rest).map(|tcp| (tcp.source_port(), tcp.destination_port(), tcp.payload())).ok()
            }
            _ => None,
        };
        let (from, to, payload) = transport.unwrap_or((0, 0, rest));
        Some(Self {
            protocol: ip_payload.ip_number.0,
            source: (source, from).into(),
            destination: (destination, to).into(),
            payload: payload.to_vec(),
        })
    }

    /// Returns whether this is a WireGuard message between the provider and the host, or a pod whose address has not
    /// been masqueraded yet. There are four, which begin with their number and three zero bytes
    /// (<https://www.wireguard.com/protocol/>).
    fn is_encrypted(&self) -> bool {
        let between = |here: SocketAddr, there: SocketAddr| {
            let is_here = HOST.both().contains(&here.ip()) || POD.both().contains(&here.ip());
            is_here && PROVIDER.both().contains(&there.ip()) && there.port() == PROVIDER_PORT
        };
        self.protocol == UDP
            && (between(self.source, self.destination) || between(self.destination, self.source))
            && matches!(self.payload[..], [1..=4, 0, 0, 0, ..])
    }

    /// Returns whether this is a question for the provider's name, of the host to its resolver or of a pod to its own,
    /// or the answer.
    fn asks_for_provider(&self) -> bool {
        let resolvers = [ROUTER.both(), POD_GATEWAY.both(), CLUSTER_RESOLVER.both()].concat();
        let resolver = |address: SocketAddr| resolvers.contains(&address.ip()) && address.port() == 53;
        self.protocol == UDP
            && (resolver(self.source) || resolver(self.destination))
            && dns::name_in(&self.payload).is_some_and(|name| name == "vpn.example")
    }

    /// Returns whether every IPv6 host sends this to its neighbours: neighbour discovery, multicast listener reports.
    fn is_neighbourhood(&self) -> bool {
        self.protocol == ICMPV6 && matches!(self.payload.first(), Some(130..=137 | 143))
    }

    /// Returns the packet in an ICMP error: ICMP types 3, 11 and 12 (RFC 792), ICMPv6 types below 128 (RFC 4443).
    pub fn quoted(&self) -> Option<Flow> {
        match (self.protocol, self.payload.first()?) {
            (ICMP, 3 | 11 | 12) | (ICMPV6, 1..=127) => Flow::parse(self.payload.get(8..)?),
            _ => None,
        }
    }
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
    fn only_wireguard_messages_to_the_provider_are_expected() {
        let (host, provider, web) = ([192, 0, 2, 2], [198, 51, 100, 2], [203, 0, 113, 2]);
        let message = [4, 0, 0, 0, 9, 9, 9, 9];
        assert!(expected(&udp(host, provider, (1234, 51820), &message)));
        assert!(expected(&udp(provider, host, (51820, 1234), &message)));
        assert!(!expected(&udp(host, provider, (1234, 53), &message)));
        assert!(!expected(&udp(host, web, (1234, 51820), &message)));
        assert!(!expected(&udp(host, provider, (1234, 51820), b"GET / HTTP/1.1")));
    }

    #[test]
    fn an_icmp_error_is_expected_if_its_packet_is() {
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
    fn ports_are_found_behind_ipv6_extension_headers() {
        let mut packet = vec![0x60, 0, 0, 0, 0, 17, IpNumber::IPV6_HEADER_HOP_BY_HOP.0, 64];
        packet.extend([0; 32]);
        packet.extend([UDP, 0, 0, 0, 0, 0, 0, 0]);
        packet.extend([0x12, 0x34, 0, 53, 0, 0, 0, 0, b'x']);
        let flow = Flow::parse(&packet).expect("a packet");
        assert_eq!((flow.protocol, flow.source.port(), flow.destination.port()), (UDP, 0x1234, 53));
        assert_eq!(flow.payload, b"x");
    }
}
