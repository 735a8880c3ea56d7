//! Ports, as the profile and the command line name them: those that are published, those of the host that are reached from inside, and
//! those that are open to the tunnel.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;

use super::fragment::Fragment;
use super::network::ValueError;
use super::{HostPort, OpenPorts, Protocol, ProxyProtocol, Publish, network};

/// Where on the host somebody listens: at which addresses of each port; `None` are all of them. There may be all ports that there are.
#[derive(Default)]
pub struct ListenAddresses(HashMap<(Protocol, u16), Vec<Option<IpAddr>>>);

impl ListenAddresses {
    /// Notes one more.
    pub fn add(&mut self, protocol: Protocol, port: u16, address: Option<IpAddr>) {
        self.0.entry((protocol, port)).or_default().push(address);
    }

    /// Whether anybody listens at a port.
    pub fn has(&self, protocol: Protocol, port: u16) -> bool {
        self.0.contains_key(&(protocol, port))
    }

    /// Whether one of them is in the way of another socket's at an address.
    pub fn conflict_with(&self, protocol: Protocol, port: u16, address: Option<IpAddr>) -> bool {
        self.0.get(&(protocol, port)).is_some_and(|all| all.iter().any(|other| is_one_place(*other, address)))
    }
}

/// Whether no two sockets can listen on the same port, one at each of these addresses.
fn is_one_place(one: Option<IpAddr>, other: Option<IpAddr>) -> bool {
    let (Some(one), Some(other)) = (one, other) else { return true };
    // 0.0.0.0 are all of IPv4, and :: are all of IPv6.
    let covers = |some: IpAddr| some.is_unspecified() && one.is_ipv4() == other.is_ipv4();
    one == other || covers(one) || covers(other)
}

/// Reads what is to be published: `[address:]port-on-host:port-inside[/tcp|/udp][,proxy-protocol=v2]`. An IPv6 address is in brackets; a port may be a range
/// such as `8000-8009`, if both are and have as many.
///
/// # Errors
/// What is wrong with it.
pub fn parse_publish(text: &str) -> Result<Vec<Publish>, String> {
    network::parse(text, published)
}

/// Reads which ports of the host's loopback are to be reached from inside: `port[/tcp|/udp]`, where the port may be a range such as
/// `8000-8009`.
///
/// # Errors
/// What is wrong with it.
pub fn parse_host_ports(text: &str) -> Result<Vec<HostPort>, String> {
    network::parse(text, host_ports)
}

/// Reads what is to be open to the tunnel: `port[/tcp|/udp]`, where the port may be a range such as `8000-8009`.
///
/// # Errors
/// What is wrong with it.
pub fn parse_open(text: &str) -> Result<OpenPorts, String> {
    network::parse(text, open)
}

pub(super) fn open(text: Fragment<'_>) -> Result<OpenPorts, ValueError> {
    let (ports, protocol) = with_protocol(text)?;
    let ports = range(ports)?;
    Ok(OpenPorts { first: *ports.start(), last: *ports.end(), protocol })
}

pub(super) fn host_ports(text: Fragment<'_>) -> Result<Vec<HostPort>, ValueError> {
    let (ports, protocol) = with_protocol(text)?;
    let protocol = protocol.unwrap_or(Protocol::Tcp);
    Ok(range(ports)?.map(|port| HostPort { port, protocol }).collect())
}

pub(super) fn published(text: Fragment<'_>) -> Result<Vec<Publish>, ValueError> {
    let fault = |at: Fragment<'_>, message: &str| {
        ValueError::new(at, message, "expected `[ADDRESS:]PORT-ON-HOST:PORT-INSIDE[/tcp|/udp]`")
    };
    let whole = text;
    let (text, option) = text.cut(',').map_or((text, None), |(text, option)| (text, Some(option)));
    let proxy_protocol = option.map(proxy_protocol).transpose()?;
    let (ports, protocol) = with_protocol(text)?;
    let protocol = protocol.unwrap_or(Protocol::Tcp);
    if let (Protocol::Udp, Some(option)) = (protocol, option.filter(|_| proxy_protocol.is_some())) {
        let message = "the PROXY protocol is for TCP: over UDP there is no first byte that a header could come before";
        return Err(ValueError::new(option, message, "leave this out, or publish a port of TCP"));
    }
    let Some(last) = ports.text.rfind(':') else {
        let help = network::decimal(ports.text, 65535).map(|port| format!("did you mean `{port}:{port}`?"));
        return Err(fault(whole, "a port on the host and one inside are needed").help(help));
    };
    let inside = ports.part(last + 1..ports.text.len());
    let before = ports.part(0..last);
    let (address, on_host) = match before.text.rfind(':') {
        None => (None, before),
        Some(colon) => (Some(before.part(0..colon)), before.part(colon + 1..last)),
    };
    let address = match address {
        None => None,
        Some(piece) => {
            let bracketed = piece.text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
            let parsed = match bracketed {
                Some(text) => text.parse().map(IpAddr::V6).ok(),
                None => piece.text.parse().map(IpAddr::V4).ok(),
            };
            let brackets = piece.text.parse::<std::net::Ipv6Addr>().is_ok();
            let help = brackets.then(|| format!("write `[{}]`", piece.text));
            let address = parsed.ok_or_else(|| fault(piece, "this is no address of the host").help(help))?;
            check_address(piece, address)?;
            Some(address)
        }
    };
    let (on_host, on_inside) = (range(on_host)?, range(inside)?);
    if on_host.len() != on_inside.len() {
        return Err(fault(whole, "the ranges have not as many ports"));
    }
    let pairs = on_host.zip(on_inside);
    Ok(pairs
        .map(|(host_port, inner_port)| Publish { address, host_port, inner_port, protocol, proxy_protocol })
        .collect())
}

/// Refuses addresses at which nobody listens, or nobody is found.
fn check_address(piece: Fragment<'_>, address: IpAddr) -> Result<(), ValueError> {
    let expected = "expected one that an interface of the host has";
    match address {
        IpAddr::V6(ipv6) if ipv6.is_unicast_link_local() => {
            Err(ValueError::new(piece, "this address is of a single link, and does not say of which", expected))
        }
        IpAddr::V6(ipv6) if ipv6.to_ipv4_mapped().is_some() => {
            let help = ipv6.to_ipv4_mapped().map(|ipv4| format!("did you mean `{ipv4}`?"));
            Err(ValueError::new(piece, "this is an address of IPv4", "expected it as such").help(help))
        }
        _ if address.is_multicast() || address == IpAddr::from(Ipv4Addr::BROADCAST) => {
            Err(ValueError::new(piece, "this is the address of many", expected))
        }
        _ => Ok(()),
    }
}

fn proxy_protocol(option: Fragment<'_>) -> Result<ProxyProtocol, ValueError> {
    let expected = "expected `proxy-protocol=v2`";
    match option.text.split_once('=') {
        Some(("proxy-protocol", "v2")) => Ok(ProxyProtocol::V2),
        Some(("proxy-protocol", _)) => {
            Err(ValueError::new(option, "this version of the PROXY protocol is not spoken here", expected))
        }
        _ => Err(ValueError::new(option, "a published port has no such option", expected)),
    }
}

/// What is before the protocol, and the protocol.
fn with_protocol(text: Fragment<'_>) -> Result<(Fragment<'_>, Option<Protocol>), ValueError> {
    let Some((ports, protocol)) = text.cut('/') else { return Ok((text, None)) };
    match protocol.text.to_ascii_lowercase().as_str() {
        "tcp" => Ok((ports, Some(Protocol::Tcp))),
        "udp" => Ok((ports, Some(Protocol::Udp))),
        _ => Err(ValueError::new(protocol, "this is no protocol", "expected `tcp` or `udp`")),
    }
}

fn port(piece: Fragment<'_>) -> Result<u16, ValueError> {
    network::decimal(piece.text, 65535)
        .and_then(|port| u16::try_from(port).ok())
        .filter(|port| *port > 0)
        .ok_or_else(|| ValueError::new(piece, "this is no port", "expected a number from 1 to 65535"))
}

fn range(piece: Fragment<'_>) -> Result<RangeInclusive<u16>, ValueError> {
    let (first, last) = piece.cut('-').unwrap_or((piece, piece));
    let (from, to) = (port(first)?, port(last)?);
    match from <= to {
        true => Ok(from..=to),
        false => Err(ValueError::new(piece, "the range ends before it begins", "expected the lower port first")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_at_which_nobody_could_listen_is_refused_and_said_to_be_so() {
        for (address, complaint) in [
            ("[fe80::1]", "of a single link"),
            ("[::ffff:127.0.0.1]", "did you mean `127.0.0.1`?"),
            ("224.0.0.1", "the address of many"),
            ("[ff02::1]", "the address of many"),
            ("255.255.255.255", "the address of many"),
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
