//! Split DNS: domains whose names have resolvers of their own, as `--dns-for` and the table `[dns.for]` of a profile
//! write them.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::fragment::Fragment;
use super::network::is_domain;
use super::redact::quoted;
use super::value::{ValueError, parse_argument};

/// A domain name below the root, in lower case and without a trailing dot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Domain(String);

/// A domain, and the resolvers that answer questions about its names.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DomainResolvers {
    /// The domain.
    pub domain: Domain,
    /// The addresses of its resolvers, at least one.
    pub servers: Vec<IpAddr>,
}

impl Domain {
    /// Returns the domain as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the labels, the most specific first.
    pub fn labels(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.split('.')
    }

    /// Returns whether a domain is this one or below it.
    pub fn contains(&self, name: &str) -> bool {
        let name = name.strip_suffix('.').unwrap_or(name);
        let Some(at) = name.len().checked_sub(self.0.len()) else { return false };
        let (before, end) = name.as_bytes().split_at(at);
        end.eq_ignore_ascii_case(self.0.as_bytes()) && (before.is_empty() || before.ends_with(b"."))
    }
}

impl TryFrom<String> for Domain {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if is_domain(&text) {
            Ok(Self(text.strip_suffix('.').unwrap_or(&text).to_ascii_lowercase()))
        } else {
            Err(format!("{text:?} is not a valid domain"))
        }
    }
}

impl From<Domain> for String {
    fn from(domain: Domain) -> String {
        domain.0
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for DomainResolvers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers: Vec<String> = self.servers.iter().map(IpAddr::to_string).collect();
        write!(f, "{}={}", self.domain, servers.join(","))
    }
}

/// Parses the argument of `--dns-for`: `DOMAIN=ADDRESS[,ADDRESS…]`.
///
/// # Errors
///
/// Returns a message if the domain or an address is invalid.
pub fn parse_dns_for(text: &str) -> Result<DomainResolvers, String> {
    parse_argument(text, dns_for)
}

fn dns_for(text: Fragment<'_>) -> Result<DomainResolvers, ValueError> {
    let Some((name, addresses)) = text.cut('=') else {
        let message = format!("{} has no `=`", quoted(text.text));
        return Err(ValueError::new(text, message, "expected `DOMAIN=ADDRESS`, such as `cluster.local=10.43.0.10`"));
    };
    let domain = domain(name)?;
    let servers = addresses.split(|c| c == ',').map(server).collect::<Result<Vec<_>, _>>()?;
    Ok(DomainResolvers { domain, servers })
}

/// Parses a domain whose names have resolvers of their own.
pub(super) fn domain(text: Fragment<'_>) -> Result<Domain, ValueError> {
    if matches!(text.text, "" | "." | "*") {
        let message = format!("{} is not a domain", quoted(text.text));
        return Err(ValueError::new(text, message, "expected a domain, such as `cluster.local`")
            .help("the resolvers of all other names are those of `--dns`".to_owned()));
    }
    Domain::try_from(text.text.to_owned()).map_err(|_| {
        let wildcard = text.text.strip_prefix("*.").or(text.text.strip_prefix('.')).filter(|rest| is_domain(rest));
        let help = wildcard.map(|rest| format!("did you mean `{rest}`? It includes all names below it"));
        let message = format!("{} is not a valid domain", quoted(text.text));
        ValueError::new(text, message, "expected letters, digits, `-` and `.`").help(help)
    })
}

/// Parses the address of a resolver.
pub(super) fn server(text: Fragment<'_>) -> Result<IpAddr, ValueError> {
    let address: Option<IpAddr> = text.text.parse().ok();
    let ipv4 = address.and_then(|address| match address {
        IpAddr::V6(address) => address.to_ipv4_mapped(),
        IpAddr::V4(_) => None,
    });
    match (address, ipv4) {
        (Some(address), None) => Ok(address),
        (Some(_), Some(ipv4)) => Err(ValueError::new(text, "an IPv4 address in IPv6 form", "expected the IPv4 form")
            .help(format!("did you mean `{ipv4}`?"))),
        (None, _) => {
            let message = format!("{} is not an IP address", quoted(text.text));
            let port = text.text.parse::<std::net::SocketAddr>().is_ok();
            Err(ValueError::new(text, message, "expected the address of a resolver")
                .help(port.then(|| "a resolver is an address without a port".to_owned())))
        }
    }
}

/// Adds entries to a list, which has each domain once. A later entry of `more` with the same domain adds addresses; one
/// in `list` is replaced.
pub fn replace_domains(list: &mut Vec<DomainResolvers>, more: &[DomainResolvers]) {
    list.retain(|old| more.iter().all(|new| new.domain != old.domain));
    for new in more {
        let index = list.iter().position(|known| known.domain == new.domain).unwrap_or_else(|| {
            list.push(DomainResolvers { domain: new.domain.clone(), servers: Vec::new() });
            list.len() - 1
        });
        for server in &new.servers {
            if !list[index].servers.contains(server) {
                list[index].servers.push(*server);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> String {
        parse_dns_for(text).unwrap_or_else(|error| panic!("{text}: {error}")).to_string()
    }

    #[test]
    fn domains_and_addresses_are_parsed() {
        assert_eq!(parsed("Cluster.Local.=10.43.0.10"), "cluster.local=10.43.0.10");
        assert_eq!(parsed("43.10.in-addr.arpa=10.43.0.10,fd00::a"), "43.10.in-addr.arpa=10.43.0.10,fd00::a");
        assert_eq!(parsed("lan=192.168.1.1"), "lan=192.168.1.1");
        assert_eq!(parsed("_tcp.lan=192.168.1.1"), "_tcp.lan=192.168.1.1");
    }

    #[test]
    fn mistakes_are_explained() {
        for (text, complaint) in [
            ("cluster.local", "has no `=`"),
            ("=10.0.0.1", "is not a domain: the resolvers of all other names are those of `--dns`"),
            (".=10.0.0.1", "is not a domain"),
            ("*=10.0.0.1", "is not a domain"),
            ("*.corp=10.0.0.1", "did you mean `corp`?"),
            (".corp=10.0.0.1", "did you mean `corp`?"),
            ("a..b=10.0.0.1", "is not a valid domain"),
            ("büro.lan=10.0.0.1", "is not a valid domain"),
            ("corp=", "is not an IP address"),
            ("corp=10.0.0.1,", "is not an IP address"),
            ("corp=10.0.0.1:53", "a resolver is an address without a port"),
            ("corp=[fd00::1]:53", "a resolver is an address without a port"),
            ("corp=ns.corp", "is not an IP address"),
            ("corp=::ffff:10.0.0.1", "did you mean `10.0.0.1`?"),
        ] {
            let refused = parse_dns_for(text).expect_err(text);
            assert!(refused.contains(complaint), "{text}: {refused}");
        }
        let long = vec!["a".repeat(63); 4].join(".");
        assert!(parse_dns_for(&format!("{long}=10.0.0.1")).is_err(), "more than 253 characters");
    }

    #[test]
    fn a_domain_contains_itself_and_whole_labels_below_it() {
        let domain = Domain::try_from("corp.example".to_owned()).expect("a domain");
        for name in ["corp.example", "CORP.example.", "a.corp.Example", "a.b.corp.example."] {
            assert!(domain.contains(name), "{name}");
        }
        for name in ["xcorp.example", "example", "corp.example.net", "corp", "", "."] {
            assert!(!domain.contains(name), "{name}");
        }
    }

    #[test]
    fn later_entries_replace_domains_and_repeated_ones_add_addresses() {
        let entry = |text| parse_dns_for(text).expect(text);
        let mut list = vec![entry("a.example=10.0.0.1"), entry("b.example=10.0.0.2")];
        let more = [entry("B.example=10.0.0.3"), entry("b.example=10.0.0.3,10.0.0.4"), entry("c.example=10.0.0.5")];
        replace_domains(&mut list, &more);
        let shown: Vec<String> = list.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["a.example=10.0.0.1", "b.example=10.0.0.3,10.0.0.4", "c.example=10.0.0.5"]);
    }
}
