//! The values of a `wg-quick` file, parsed as by wg(8) or wg-quick(8), and the errors about invalid ones.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::str::FromStr;

use ipnet::IpNet;

use super::line::is_space;
use crate::config::Endpoint;
use crate::config::fragment::Fragment;
use crate::config::network::{is_domain, network};
use crate::config::redact::quoted;
use crate::config::value::{ValueError, decimal};
use crate::keys::KeyError;
use crate::names::InterfaceName;

/// Parses a private, preshared or public key. The error contains no part of the text.
pub(super) fn key<K: FromStr<Err = KeyError>>(value: Fragment<'_>, name: &str) -> Result<K, ValueError> {
    value.text.parse().map_err(|error| {
        let help = match error {
            KeyError::Length { found: 43 } if !value.text.ends_with('=') => {
                Some("add the `=` at the end, which belongs to the key".to_owned())
            }
            KeyError::Length { .. } if value.text.starts_with(['"', '\'', '“']) => {
                Some("remove the quotation marks".to_owned())
            }
            KeyError::Length { found: 64 } if value.text.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                Some("this looks like hexadecimal: write the key in base64, as `wg genkey` does".to_owned())
            }
            _ => None,
        };
        let message = match error {
            KeyError::Length { .. } => format!("the value of `{name}` has the wrong length for a key"),
            KeyError::Encoding => format!("the value of `{name}` is not a valid key"),
        };
        ValueError::new(value, message, error.to_string()).help(help)
    })
}

/// Parses a UDP port of at least `min`. Refuses service names, whose meaning depends on the host's /etc/services.
pub(super) fn port(value: Fragment<'_>, min: u16) -> Result<u16, ValueError> {
    decimal(value.text, u16::MAX.into())
        .and_then(|port| u16::try_from(port).ok())
        .filter(|port| *port >= min)
        .ok_or_else(|| ValueError::new(value, "invalid port", format!("expected a number from {min} to 65535")))
}

/// Parses `FwMark`: `off`, a decimal number, or a hexadecimal one after `0x`.
pub(super) fn fwmark(value: Fragment<'_>) -> Result<u32, ValueError> {
    let text = value.text;
    if text.eq_ignore_ascii_case("off") {
        return Ok(0);
    }
    let number = match text.strip_prefix("0x") {
        Some(hex) if !hex.is_empty() && hex.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            let digits = hex.trim_start_matches('0');
            if digits.is_empty() { Some(0) } else { u32::from_str_radix(digits, 16).ok() }
        }
        Some(_) => None,
        None => decimal(text, u32::MAX),
    };
    number.ok_or_else(|| {
        let lower = text.to_ascii_lowercase();
        let help = text.starts_with("0X").then(|| format!("write {}", quoted(&lower)));
        let expected = "expected `off`, or a number up to 4294967295 or 0xffffffff";
        ValueError::new(value, "invalid firewall mark", expected).help(help)
    })
}

/// Parses `PersistentKeepalive` in seconds; `off` is 0.
pub(super) fn keepalive(value: Fragment<'_>) -> Result<u16, ValueError> {
    if value.text.eq_ignore_ascii_case("off") {
        return Ok(0);
    }
    decimal(value.text, u16::MAX.into()).and_then(|seconds| u16::try_from(seconds).ok()).ok_or_else(|| {
        let digits = value.text.bytes().take_while(u8::is_ascii_digit).count();
        let unit = digits > 0 && matches!(&value.text[digits..], "s" | "sec" | "seconds");
        let first = quoted(&value.text[..digits]);
        let help = match value.text[digits..].strip_prefix('-') {
            _ if unit => Some(format!("the number is in seconds: {first}")),
            Some(last) if digits > 0 && decimal(last, u32::MAX).is_some() => {
                Some(format!("ranges are a feature of AmneziaWG: write one number, such as {first}"))
            }
            _ => None,
        };
        ValueError::new(value, "invalid interval", "expected `off` or seconds from 0 to 65535").help(help)
    })
}

/// Parses `SaveConfig`.
pub(super) fn boolean(value: Fragment<'_>) -> Result<bool, ValueError> {
    match value.text.to_ascii_lowercase().as_str() {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(ValueError::new(value, "this is neither true nor false", "expected `true` or `false`")),
    }
}

/// An entry of `AllowedIPs`.
pub(super) struct AllowedIp {
    /// Whether the network is removed (`-`) instead of added.
    pub(super) remove: bool,
    /// The network, with its host part.
    pub(super) net: IpNet,
}

/// Parses an entry of `AllowedIPs`: an address with an optional prefix length, after an optional `+` or `-`.
pub(super) fn allowed_ip(entry: Fragment<'_>) -> Result<AllowedIp, ValueError> {
    let sign = usize::from(entry.text.starts_with(['+', '-']));
    let net = network(entry.part(sign..entry.text.len()), "a network", "0.0.0.0/0, ::/0")?;
    Ok(AllowedIp { remove: entry.text.starts_with('-'), net })
}

/// Parses an entry of `Address`: an address with an optional prefix length or netmask, as for `ip address add`. Refuses
/// addresses that an interface cannot have.
pub(super) fn address(entry: Fragment<'_>) -> Result<IpNet, ValueError> {
    let masked = entry.text.split_once('/').and_then(|(address, mask)| {
        let prefix = ipnet::ipv4_mask_to_prefix(mask.parse().ok()?).ok()?;
        IpNet::new(address.parse::<Ipv4Addr>().ok()?.into(), prefix).ok()
    });
    let net = match masked {
        Some(net) => net,
        None => network(entry, "an address", "10.64.0.2/32")?,
    };
    let address = net.addr();
    if address.is_unspecified() || address.is_multicast() || address == IpAddr::V6(Ipv6Addr::LOCALHOST) {
        return Err(ValueError::new(
            entry,
            "an interface cannot have this address",
            "expected an address of the tunnel",
        ));
    }
    Ok(net)
}

/// A word of a `DNS` line.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum DnsWord {
    /// A resolver.
    Server(IpAddr),
    /// A search domain.
    Search(String),
    /// A routing domain of systemd-resolved (`~.`): the names that this resolver is for.
    Routing,
}

/// Parses a word of a `DNS` line: an address, or else a search domain (wg-quick(8)). A word that looks like an address
/// must be valid.
pub(super) fn dns(word: Fragment<'_>) -> Result<DnsWord, ValueError> {
    let text = word.text;
    if let Ok(server) = text.parse() {
        return Ok(DnsWord::Server(server));
    }
    if text.contains(':') || text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        let help = match text.split_once('%') {
            Some((address, _)) if address.parse::<Ipv6Addr>().is_ok() => {
                Some("a resolver inside the tunnel has no zone: remove `%` and the text after it".to_owned())
            }
            _ if text.parse::<SocketAddr>().is_ok() => Some("a resolver is an address without a port".to_owned()),
            _ => None,
        };
        let message = format!("{} is not an IP address", quoted(text));
        return Err(ValueError::new(word, message, "expected a resolver's address, or a search domain").help(help));
    }
    if text.starts_with('~') {
        return Ok(DnsWord::Routing);
    }
    if is_domain(text) {
        return Ok(DnsWord::Search(text.to_owned()));
    }
    let message = format!("{} is neither an IP address nor a search domain", quoted(text));
    let help = text.contains(';').then(|| "separate entries with commas".to_owned());
    Err(ValueError::new(word, message, "expected letters, digits, `-` and `.`").help(help))
}

/// Parses `Endpoint`: a host and a port. Also returns whether it is an IPv6 address without brackets.
pub(super) fn endpoint(value: Fragment<'_>) -> Result<(Endpoint, bool), ValueError> {
    let text = value.text;
    let no_port = |help: Option<String>| {
        Err(ValueError::new(value, "the endpoint has no port", "expected HOST:PORT, such as `vpn.example.com:51820`")
            .help(help))
    };
    if text.contains("://") {
        let message = format!("{} is not an endpoint", quoted(text));
        return Err(ValueError::new(value, message, "expected HOST:PORT, without a scheme"));
    }
    let (host, port, bracketed) = if text.starts_with('[') {
        let Some(close) = text.find(']') else {
            return Err(ValueError::new(value, "the bracket is not closed", "expected `[ADDRESS]:PORT`"));
        };
        match text[close + 1..].strip_prefix(':') {
            Some(port) if !port.is_empty() => (1..close, close + 2..text.len(), true),
            _ => return no_port(Some(format!("write {}", quoted(&format!("{}:51820", &text[..=close]))))),
        }
    } else {
        match text.rfind(':') {
            // An IPv6 address without a port, or an invalid one.
            Some(colon) if text[..colon].contains(':') && text[..colon].parse::<Ipv6Addr>().is_err() => {
                let help = text.parse::<Ipv6Addr>().is_ok().then(|| format!("write `[{text}]:51820`"));
                let zone = text[..colon].split_once('%').is_some_and(|(ip, _)| ip.parse::<Ipv6Addr>().is_ok());
                if zone {
                    (0..colon, colon + 1..text.len(), false)
                } else if help.is_some() {
                    return no_port(help);
                } else {
                    let message = format!("{} is not an endpoint", quoted(text));
                    return Err(ValueError::new(value, message, "expected HOST:PORT, or `[ADDRESS]:PORT` for IPv6"));
                }
            }
            Some(colon) if colon + 1 < text.len() => (0..colon, colon + 1..text.len(), false),
            _ => {
                let host = text.trim_end_matches(':');
                return no_port((!host.is_empty()).then(|| format!("write {}", quoted(&format!("{host}:51820")))));
            }
        }
    };
    // wg(8) accepts port 0, but no packet can be sent to it.
    let port = self::port(value.part(port), 1)?;
    let host = value.part(host);
    let endpoint = endpoint_host(host, port)?;
    let unbracketed = !bracketed && host.text.contains(':');
    Ok((endpoint, unbracketed))
}

fn endpoint_host(host: Fragment<'_>, port: u16) -> Result<Endpoint, ValueError> {
    let text = host.text;
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(Endpoint::Address { address: SocketAddr::new(address, port), zone: None });
    }
    if let Some((address, zone)) = host.cut('%')
        && let Ok(address) = address.text.parse::<Ipv6Addr>()
    {
        return zoned(address, zone, port);
    }
    let last = text.strip_suffix('.').unwrap_or(text).rsplit('.').next().unwrap_or_default();
    let hexadecimal = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let number = last.bytes().all(|byte| byte.is_ascii_digit())
        || last.strip_prefix("0x").or(last.strip_prefix("0X")).is_some_and(hexadecimal);
    if number && is_domain(text) {
        // getaddrinfo(3) reads `10.1` as 10.0.0.1 and `010.0.0.1` as 8.0.0.1, which is hardly ever intended.
        let message = format!("{} is not an IPv4 address", quoted(text));
        return Err(ValueError::new(host, message, "expected four decimal numbers without leading zeros"));
    }
    if is_domain(text) {
        return Ok(Endpoint::Name { host: text.to_owned(), port });
    }
    let message = if text.is_empty() {
        "the endpoint has no host".to_owned()
    } else {
        format!("{} is neither an IP address nor a host name", quoted(text))
    };
    let help = (!text.is_ascii()).then(|| "write an international name in its ASCII form (`xn--…`)".to_owned());
    Err(ValueError::new(host, message, "expected an IPv4 address, `[IPv6 address]` or a host name").help(help))
}

/// Parses the zone of an IPv6 address (RFC 4007 section 11): a number, or an interface name for a link-local address.
fn zoned(address: Ipv6Addr, zone: Fragment<'_>, port: u16) -> Result<Endpoint, ValueError> {
    if let Some(scope) = decimal(zone.text, u32::MAX) {
        return Ok(Endpoint::Address { address: SocketAddrV6::new(address, port, 0, scope).into(), zone: None });
    }
    let link_local = address.is_unicast_link_local() || address.octets()[..2] == [0xff, 0x02];
    if !link_local {
        let message = "only a link-local address has a zone";
        return Err(ValueError::new(zone, message, format!("`{address}` is not link-local: remove the zone")));
    }
    match zone.text.parse::<InterfaceName>() {
        Ok(name) => Ok(Endpoint::Address {
            address: SocketAddr::new(address.into(), port),
            zone: Some(name.as_str().to_owned()),
        }),
        Err(error) => Err(ValueError::new(zone, "invalid interface name", error.to_string())),
    }
}

/// Splits a list of wg-quick(8) into words at commas and blanks, as bash does.
pub(super) fn words(value: Fragment<'_>) -> impl Iterator<Item = Fragment<'_>> {
    value.split(|c| matches!(c, ',' | ' ' | '\t')).filter(|word| !word.text.trim_matches(is_space).is_empty())
}
