//! IP networks and domain names, as the `wg-quick` file, the profile and the command line write them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::fragment::Fragment;
use super::redact::quoted;
use super::value::{ValueError, decimal, parse_argument};

/// Parses the argument of `--local`: a network that is reached through the host.
///
/// # Errors
///
/// Returns a message if the text is not a valid network, or the whole Internet.
pub fn parse_local(text: &str) -> Result<IpNet, String> {
    parse_argument(text, local)
}

/// Parses a network that is reached through the host.
pub(super) fn local(text: Fragment<'_>) -> Result<IpNet, ValueError> {
    let net = network(text, "a network", "192.168.0.0/16")?;
    if net.prefix_len() == 0 {
        let message = "the whole Internet cannot be a local network";
        return Err(ValueError::new(text, message, "this would send all traffic past the tunnel"));
    }
    if net.trunc() == net {
        return Ok(net);
    }
    let host = IpNet::from(net.addr());
    Err(ValueError::new(text, "the network has a non-zero host part", "expected zeros after the prefix")
        .help(format!("did you mean `{}`, or `{host}`?", net.trunc())))
}

/// Parses an IP address with an optional prefix length. Messages use `noun` and `example`.
pub(super) fn network(entry: Fragment<'_>, noun: &str, example: &str) -> Result<IpNet, ValueError> {
    let (ip, prefix) = match entry.cut('/') {
        Some((ip, prefix)) => (ip, Some(prefix)),
        None => (entry, None),
    };
    let Ok(address) = ip.text.parse::<IpAddr>() else {
        let (label, help) = explain_invalid_network(entry.text, noun, example);
        let message = match entry.text {
            "" => "this entry is empty".to_owned(),
            text => format!("{} is not {noun}", quoted(text)),
        };
        return Err(ValueError::new(entry, message, label).help(help));
    };
    let max = if address.is_ipv4() { 32 } else { 128 };
    let Some(prefix) = prefix else {
        return Ok(IpNet::new_assert(address, max));
    };
    let length = decimal(prefix.text, max.into());
    length.and_then(|length| IpNet::new(address, u8::try_from(length).ok()?).ok()).ok_or_else(|| {
        let mask = prefix.text.parse().ok().and_then(|mask| ipnet::ip_mask_to_prefix(mask).ok());
        let help = match mask {
            Some(length) => Some(format!("did you mean `{address}/{length}`?")),
            None if prefix.text.contains([';', '/', ':']) => Some("separate entries with commas".to_owned()),
            None => None,
        };
        let family = if max == 32 { "IPv4" } else { "IPv6" };
        let at = if prefix.text.is_empty() { entry } else { prefix };
        ValueError::new(at, "invalid prefix length", format!("expected a number from 0 to {max} for {family}"))
            .help(help)
    })
}

/// Returns the label and the help for a text that does not begin with an IP address.
fn explain_invalid_network(text: &str, noun: &str, example: &str) -> (String, Option<String>) {
    let expected = format!("expected {noun}, such as `{}`", example.split(',').next().unwrap_or(example));
    if text.is_empty() {
        return (expected, Some("remove the superfluous comma".to_owned()));
    }
    if matches!(text.to_ascii_lowercase().as_str(), "any" | "all" | "default" | "*") {
        return (expected, Some(format!("did you mean `{example}`?")));
    }
    if text.contains(';') || text.matches('/').count() > 1 {
        return (expected, Some("separate entries with commas".to_owned()));
    }
    if let Some(padded) = pad_octets(text) {
        return ("an IPv4 address has four numbers".to_owned(), Some(format!("did you mean `{padded}`?")));
    }
    if let Some(plain) = strip_leading_zeros(text) {
        let label = "the numbers of an IPv4 address have no leading zeros".to_owned();
        return (label, Some(format!("did you mean `{plain}`?")));
    }
    let ip = text.split('/').next().unwrap_or_default();
    if let Some((address, zone)) = ip.split_once('%')
        && address.parse::<Ipv6Addr>().is_ok()
        && !zone.is_empty()
    {
        return (expected, Some("an address here has no zone: remove `%` and the text after it".to_owned()));
    }
    (expected, None)
}

/// Completes one to three numbers of an IPv4 network with zeros: `10.0/8` → `10.0.0.0/8`.
fn pad_octets(text: &str) -> Option<IpNet> {
    let (numbers, prefix) = text.split_once('/')?;
    let numbers: Vec<u8> = numbers.trim_end_matches('.').split('.').map(|n| n.parse().ok()).collect::<Option<_>>()?;
    let mut octets = [0; 4];
    octets.get_mut(..numbers.len()).filter(|_| numbers.len() < 4)?.copy_from_slice(&numbers);
    IpNet::new(Ipv4Addr::from(octets).into(), prefix.parse().ok()?).ok()
}

/// Removes leading zeros from the numbers of an IPv4 address: `010.0.0.1` → `10.0.0.1`.
fn strip_leading_zeros(text: &str) -> Option<String> {
    let (ip, rest) = text.split_at(text.find('/').unwrap_or(text.len()));
    let numbers: Vec<u8> = ip.split('.').map(|n| n.parse().ok()).collect::<Option<_>>()?;
    let octets: [u8; 4] = numbers.try_into().ok()?;
    let plain = Ipv4Addr::from(octets).to_string();
    (plain != ip && rest.bytes().all(|byte| byte == b'/' || byte.is_ascii_digit())).then(|| plain + rest)
}

/// Returns whether a text is a valid domain name. The lengths are those of RFC 1035 section 2.3.4. Underscores are
/// allowed, because they are in common use.
pub(super) fn is_domain(text: &str) -> bool {
    let name = text.strip_suffix('.').unwrap_or(text);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    name.len() <= 253 && name.split('.').all(is_label)
}
