//! Numbers, networks and domains, as both the `wg-quick` file and the profile have them, and what is wrong with texts that
//! are none.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use ipnet::IpNet;

use super::fragment::{Fragment, LineView};
use super::redact::quoted;

/// What is wrong with a value, and in which columns of its line.
pub(super) struct ValueError {
    /// The columns, from 0.
    pub(super) columns: Range<usize>,
    /// What is wrong.
    pub(super) message: String,
    /// What was expected.
    pub(super) label: String,
    /// What would be right.
    pub(super) help: Option<String>,
}

impl ValueError {
    /// At a part of a line.
    pub(super) fn new(at: Fragment<'_>, message: impl Into<String>, label: impl Into<String>) -> Self {
        Self { columns: at.columns(), message: message.into(), label: label.into(), help: None }
    }

    /// With what would be right.
    pub(super) fn help(mut self, help: impl Into<Option<String>>) -> Self {
        self.help = help.into();
        self
    }
}

/// Reads an argument of the command line.
pub(super) fn parse<T>(text: &str, read: impl Fn(Fragment<'_>) -> Result<T, ValueError>) -> Result<T, String> {
    read(LineView::new(text, |_, _| true).piece()).map_err(|problem| match problem.help {
        Some(help) => format!("{}: {help}", problem.message),
        None => format!("{}: {}", problem.message, problem.label),
    })
}

/// Reads a network that is to be local.
///
/// # Errors
/// What is wrong with it.
pub fn parse_local(text: &str) -> Result<IpNet, String> {
    parse(text, local)
}

/// A network that is to be local.
pub(super) fn local(text: Fragment<'_>) -> Result<IpNet, ValueError> {
    let net = network(text, "a network", "192.168.0.0/16")?;
    if net.prefix_len() == 0 {
        let message = "the local networks cannot be the whole Internet";
        return Err(ValueError::new(text, message, "this would lead all traffic past the tunnel"));
    }
    if net.trunc() == net {
        return Ok(net);
    }
    let host = IpNet::from(net.addr());
    Err(ValueError::new(text, "the network has a non-zero host part", "expected zeros after the prefix")
        .help(format!("did you mean `{}`, or `{host}`?", net.trunc())))
}

/// A decimal number of at most `max`; leading zeros are allowed, as by strtoul(3), and a sign is not.
pub(super) fn decimal(text: &str, max: u32) -> Option<u32> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits = text.trim_start_matches('0');
    if digits.is_empty() { Some(0) } else { digits.parse().ok().filter(|number| *number <= max) }
}

/// An IP address with an optional prefix length. `what` and `example` are for the message.
pub(super) fn network(entry: Fragment<'_>, what: &str, example: &str) -> Result<IpNet, ValueError> {
    let (ip, prefix) = match entry.cut('/') {
        Some((ip, prefix)) => (ip, Some(prefix)),
        None => (entry, None),
    };
    let Ok(address) = ip.text.parse::<IpAddr>() else {
        let (label, help) = no_network(entry.text, what, example);
        let message = match entry.text {
            "" => "this entry is empty".to_owned(),
            text => format!("{} is not {what}", quoted(text)),
        };
        return Err(ValueError::new(entry, message, label).help(help));
    };
    let max = if address.is_ipv4() { 32 } else { 128 };
    let Some(prefix) = prefix else {
        return Ok(IpNet::new_assert(address, max));
    };
    decimal(prefix.text, max.into()).and_then(|length| IpNet::new(address, u8::try_from(length).ok()?).ok()).ok_or_else(
        || {
            let mask = prefix.text.parse().ok().and_then(|mask| ipnet::ip_mask_to_prefix(mask).ok());
            let help = match mask {
                Some(length) => Some(format!("did you mean `{address}/{length}`?")),
                None if prefix.text.contains([';', '/', ':']) => Some("separate entries with commas".to_owned()),
                None => None,
            };
            let family = if max == 32 { "IPv4" } else { "IPv6" };
            let at = if prefix.text.is_empty() { entry } else { prefix };
            ValueError::new(at, "this is no prefix length", format!("expected a number from 0 to {max} for {family}"))
                .help(help)
        },
    )
}

/// What is wrong with a text that does not begin with an IP address, and what would be right.
fn no_network(text: &str, what: &str, example: &str) -> (String, Option<String>) {
    let expected = format!("expected {what}, such as `{}`", example.split(',').next().unwrap_or(example));
    if text.is_empty() {
        return (expected, Some("there is a comma too many".to_owned()));
    }
    if matches!(text.to_ascii_lowercase().as_str(), "any" | "all" | "default" | "*") {
        return (expected, Some(format!("did you mean `{example}`?")));
    }
    if text.contains(';') || text.matches('/').count() > 1 {
        return (expected, Some("separate entries with commas".to_owned()));
    }
    if let Some(padded) = padded(text) {
        return ("an IPv4 address has four numbers".to_owned(), Some(format!("did you mean `{padded}`?")));
    }
    if let Some(plain) = without_leading_zeros(text) {
        let label = "a number of an IPv4 address has no leading zeros".to_owned();
        return (label, Some(format!("did you mean `{plain}`?")));
    }
    let ip = text.split('/').next().unwrap_or_default();
    if let Some((address, zone)) = ip.split_once('%')
        && address.parse::<Ipv6Addr>().is_ok()
        && !zone.is_empty()
    {
        return (expected, Some("an address here has no zone: leave out `%` and what follows it".to_owned()));
    }
    (expected, None)
}

/// `10.0/8` → `10.0.0.0/8`: one to three of an IPv4 network's numbers, the missing ones being zero.
fn padded(text: &str) -> Option<IpNet> {
    let (numbers, prefix) = text.split_once('/')?;
    let numbers: Vec<u8> = numbers.trim_end_matches('.').split('.').map(|n| n.parse().ok()).collect::<Option<_>>()?;
    let mut octets = [0; 4];
    octets.get_mut(..numbers.len()).filter(|_| numbers.len() < 4)?.copy_from_slice(&numbers);
    IpNet::new(Ipv4Addr::from(octets).into(), prefix.parse().ok()?).ok()
}

/// `010.0.0.1` → `10.0.0.1`.
fn without_leading_zeros(text: &str) -> Option<String> {
    let (ip, rest) = text.split_at(text.find('/').unwrap_or(text.len()));
    let numbers: Vec<u8> = ip.split('.').map(|n| n.parse().ok()).collect::<Option<_>>()?;
    let octets: [u8; 4] = numbers.try_into().ok()?;
    let plain = Ipv4Addr::from(octets).to_string();
    (plain != ip && rest.bytes().all(|byte| byte == b'/' || byte.is_ascii_digit())).then(|| plain + rest)
}

/// Whether a text can be a domain's name: RFC 1035, section 2.3.4, says how long; underscores are in common use.
pub(super) fn is_domain(text: &str) -> bool {
    let name = text.strip_suffix('.').unwrap_or(text);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    name.len() <= 253 && name.split('.').all(is_label)
}
