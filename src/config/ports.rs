//! Ports in the profile and on the command line: published ports, host ports, and ports open to the tunnel.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::fragment::Fragment;
use super::value::{ValueError, decimal, parse_argument};

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A published port: a port of the host that is forwarded to a port inside the tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Publish {
    /// The address of the host to listen on; `None` means all.
    pub address: Option<IpAddr>,
    /// The port on the host.
    pub host_port: u16,
    /// The port inside.
    pub inner_port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// How the program learns the address of its client. For TCP only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
}

/// A protocol that tells a program the address of its client, before the client's own data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProxyProtocol {
    /// The binary header of HAProxy's PROXY protocol, version 2.
    V2,
}

impl fmt::Display for Publish {
    /// Writes the port as in a profile, always with its protocol.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            None => {}
        }
        write!(f, "{}:{}/{}", self.host_port, self.inner_port, self.protocol)?;
        match self.proxy_protocol {
            Some(ProxyProtocol::V2) => f.write_str(",proxy-protocol=v2"),
            None => Ok(()),
        }
    }
}

/// A port of the host's loopback interface that the program reaches at `host.internal`, the host's address on the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HostPort {
    /// The port, the same on both sides.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
}

impl fmt::Display for HostPort {
    /// Writes the port as in a profile, always with its protocol.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.port, self.protocol)
    }
}

/// A range of ports that accept inbound connections from the tunnel, such as ports that a provider forwards.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct OpenPorts {
    /// The first port.
    pub first: u16,
    /// The last port, which may be the first.
    pub last: u16,
    /// TCP or UDP; `None` means both.
    pub protocol: Option<Protocol>,
}

impl fmt::Display for OpenPorts {
    /// Writes the ports as in a profile.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, last, protocol } = self;
        write!(f, "{first}")?;
        if last != first {
            write!(f, "-{last}")?;
        }
        match protocol {
            Some(protocol) => write!(f, "/{protocol}"),
            None => Ok(()),
        }
    }
}

/// Parses published ports: `[ADDRESS:]PORT-ON-HOST:PORT-INSIDE[/tcp|/udp][,proxy-protocol=v2]`.
///
/// An IPv6 address is in brackets. Both ports may be ranges of the same length, such as `8000-8009`.
///
/// # Errors
///
/// Returns a message if the text is invalid.
pub fn parse_publish(text: &str) -> Result<Vec<Publish>, String> {
    parse_argument(text, published)
}

/// Parses host ports: `PORT[/tcp|/udp]`, where the port may be a range such as `8000-8009`.
///
/// # Errors
///
/// Returns a message if the text is invalid.
pub fn parse_host_ports(text: &str) -> Result<Vec<HostPort>, String> {
    parse_argument(text, host_ports)
}

/// Parses ports open to the tunnel: `PORT[/tcp|/udp]`, where the port may be a range such as `8000-8009`.
///
/// # Errors
///
/// Returns a message if the text is invalid.
pub fn parse_open(text: &str) -> Result<OpenPorts, String> {
    parse_argument(text, open)
}

pub(super) fn open(text: Fragment<'_>) -> Result<OpenPorts, ValueError> {
    let (ports, protocol) = cut_protocol(text)?;
    let ports = port_range(ports)?;
    Ok(OpenPorts { first: *ports.start(), last: *ports.end(), protocol })
}

pub(super) fn host_ports(text: Fragment<'_>) -> Result<Vec<HostPort>, ValueError> {
    let (ports, protocol) = cut_protocol(text)?;
    let protocol = protocol.unwrap_or(Protocol::Tcp);
    Ok(port_range(ports)?.map(|port| HostPort { port, protocol }).collect())
}

pub(super) fn published(text: Fragment<'_>) -> Result<Vec<Publish>, ValueError> {
    let (ports, option) = text.cut(',').map_or((text, None), |(ports, option)| (ports, Some(option)));
    let proxy_protocol = option.map(proxy_protocol).transpose()?;
    let (ports, protocol) = cut_protocol(ports)?;
    let protocol = protocol.unwrap_or(Protocol::Tcp);
    if let (Protocol::Udp, Some(option)) = (protocol, option) {
        let message = "the PROXY protocol needs TCP: UDP has no beginning of a connection for its header";
        return Err(ValueError::new(option, message, "remove this, or publish a TCP port"));
    }
    let Some(last) = ports.text.rfind(':') else {
        let help = decimal(ports.text, 65535).map(|port| format!("did you mean `{port}:{port}`?"));
        return Err(invalid_publish(text, "a port on the host and one inside are needed").help(help));
    };
    let inside = ports.part(last + 1..ports.text.len());
    let before = ports.part(0..last);
    let (address, on_host) = match before.text.rfind(':') {
        None => (None, before),
        Some(colon) => (Some(host_address(before.part(0..colon))?), before.part(colon + 1..last)),
    };
    let (on_host, on_inside) = (port_range(on_host)?, port_range(inside)?);
    if on_host.len() != on_inside.len() {
        return Err(invalid_publish(text, "the two ranges have different lengths"));
    }
    let pairs = on_host.zip(on_inside);
    Ok(pairs
        .map(|(host_port, inner_port)| Publish { address, host_port, inner_port, protocol, proxy_protocol })
        .collect())
}

fn invalid_publish(at: Fragment<'_>, message: &str) -> ValueError {
    ValueError::new(at, message, "expected `[ADDRESS:]PORT-ON-HOST:PORT-INSIDE[/tcp|/udp]`")
}

/// Parses an address of the host. Refuses those on which a socket cannot listen, or be reached.
fn host_address(text: Fragment<'_>) -> Result<IpAddr, ValueError> {
    let bracketed = text.text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let parsed = match bracketed {
        Some(inner) => inner.parse().map(IpAddr::V6).ok(),
        None => text.text.parse().map(IpAddr::V4).ok(),
    };
    let Some(address) = parsed else {
        let help = text.text.parse::<Ipv6Addr>().is_ok().then(|| format!("write `[{}]`", text.text));
        return Err(invalid_publish(text, "invalid address of the host").help(help));
    };
    let expected = "expected the address of an interface of the host";
    match address {
        IpAddr::V6(ipv6) if ipv6.is_unicast_link_local() => {
            Err(ValueError::new(text, "a link-local address without an interface is ambiguous", expected))
        }
        IpAddr::V6(ipv6) if ipv6.to_ipv4_mapped().is_some() => {
            let help = ipv6.to_ipv4_mapped().map(|ipv4| format!("did you mean `{ipv4}`?"));
            Err(ValueError::new(text, "an IPv4 address in IPv6 form", "expected the IPv4 form").help(help))
        }
        _ if address.is_multicast() || address == IpAddr::from(Ipv4Addr::BROADCAST) => {
            Err(ValueError::new(text, "cannot listen on a multicast or broadcast address", expected))
        }
        _ => Ok(address),
    }
}

fn proxy_protocol(option: Fragment<'_>) -> Result<ProxyProtocol, ValueError> {
    let expected = "expected `proxy-protocol=v2`";
    match option.text.split_once('=') {
        Some(("proxy-protocol", "v2")) => Ok(ProxyProtocol::V2),
        Some(("proxy-protocol", _)) => {
            Err(ValueError::new(option, "unsupported version of the PROXY protocol", expected))
        }
        _ => Err(ValueError::new(option, "unknown option of a published port", expected)),
    }
}

/// Splits a text into the part before the protocol, and the protocol.
fn cut_protocol(text: Fragment<'_>) -> Result<(Fragment<'_>, Option<Protocol>), ValueError> {
    let Some((ports, protocol)) = text.cut('/') else { return Ok((text, None)) };
    match protocol.text.to_ascii_lowercase().as_str() {
        "tcp" => Ok((ports, Some(Protocol::Tcp))),
        "udp" => Ok((ports, Some(Protocol::Udp))),
        _ => Err(ValueError::new(protocol, "unknown protocol", "expected `tcp` or `udp`")),
    }
}

fn port(text: Fragment<'_>) -> Result<u16, ValueError> {
    decimal(text.text, 65535)
        .and_then(|port| u16::try_from(port).ok())
        .filter(|port| *port > 0)
        .ok_or_else(|| ValueError::new(text, "invalid port", "expected a number from 1 to 65535"))
}

fn port_range(text: Fragment<'_>) -> Result<RangeInclusive<u16>, ValueError> {
    let (first, last) = text.cut('-').unwrap_or((text, text));
    let (from, to) = (port(first)?, port(last)?);
    match from <= to {
        true => Ok(from..=to),
        false => Err(ValueError::new(text, "the range ends before it begins", "expected the lower port first")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_that_cannot_be_listened_on_is_refused() {
        for (address, complaint) in [
            ("[fe80::1]", "link-local address"),
            ("[::ffff:127.0.0.1]", "did you mean `127.0.0.1`?"),
            ("224.0.0.1", "multicast or broadcast"),
            ("[ff02::1]", "multicast or broadcast"),
            ("255.255.255.255", "multicast or broadcast"),
            ("::1", "write `[::1]`"),
        ] {
            let refused = parse_publish(&format!("{address}:8080:80")).expect_err("a refusal");
            assert!(refused.contains(complaint), "{address}: {refused}");
        }
        for address in ["[::]", "0.0.0.0", "[::1]", "192.0.2.1", "169.254.1.1"] {
            assert!(parse_publish(&format!("{address}:8080:80")).is_ok(), "{address}");
        }
    }
}
