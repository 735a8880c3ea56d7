//! Rules for packets as plain values: what a plan decides and the kernel's nf_tables is told. Their text is what nft(8) reads.

use std::fmt::{self, Display, Formatter};
use std::ops::RangeInclusive;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::names::InterfaceName;

/// A table for IPv4 and IPv6 (family `inet`) with all that is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Its name, by which nobody else makes one in the same network namespace.
    pub name: String,
    /// Its chains.
    pub chains: Vec<Chain>,
}

/// A base chain: rules that are asked in turn, until one decides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// Which packets come to it. It is the chain's name, too.
    pub hook: Hook,
    /// What becomes of a packet about which no rule decides.
    pub policy: Policy,
    /// The rules.
    pub rules: Vec<Rule>,
}

/// Which packets come to a chain, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hook {
    /// Those for a process here.
    Input,
    /// Those that pass through.
    Forward,
    /// Those of a process here.
    Output,
    /// All that leave, for their source address to be translated.
    Postrouting,
}

/// What becomes of a packet about which no rule decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// It goes on.
    Accept,
    /// It does not.
    Drop,
}

/// What becomes of a packet of which all of something holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// What has to hold.
    #[serde(rename = "if")]
    pub matches: Vec<Match>,
    /// What becomes of the packet then.
    #[serde(rename = "then")]
    pub verdict: Verdict,
}

/// Something that holds of a packet or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Match {
    /// It has come in by an interface.
    From(Interface),
    /// It leaves by an interface.
    To(Interface),
    /// It leaves by any other interface.
    NotTo(Interface),
    /// It is of a family.
    Of(Family),
    /// Its source is in a network.
    Source(IpNet),
    /// Its destination is in a network.
    Destination(IpNet),
    /// It is of TCP, and its destination port is one of these.
    TcpPort(RangeInclusive<u16>),
    /// It is of UDP, and its destination port is one of these.
    UdpPort(RangeInclusive<u16>),
    /// Its transport protocol is a different one.
    NotTransport(Transport),
    /// It is of ICMPv6, and of a type (RFC 4443 section 2.1).
    Icmpv6(u8),
    /// It answers, or is an error about, what was let through before.
    Answers,
}

/// Which protocol a packet is of, below all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

/// A protocol above IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// ICMP for IPv4 (RFC 792).
    Icmp,
    /// TCP (RFC 9293).
    Tcp,
    /// UDP (RFC 768).
    Udp,
    /// ICMPv6 (RFC 4443).
    Icmpv6,
}

impl Transport {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Icmp, Self::Tcp, Self::Udp, Self::Icmpv6];
}

/// Interfaces.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interface {
    /// The one of a name, whenever there is one.
    Named(InterfaceName),
    /// All whose names begin so.
    Prefix(String),
    /// The loopback interface.
    Loopback,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It goes on.
    Accept,
    /// It does not. Whoever sends it from here is told `EPERM`.
    Drop,
    /// It goes on with the address that it leaves by as its source.
    Masquerade,
}

impl Rule {
    /// A rule that lets a packet go on.
    pub fn accept(matches: impl Into<Vec<Match>>) -> Self {
        Self { matches: matches.into(), verdict: Verdict::Accept }
    }

    /// A rule that stops a packet.
    pub fn drop(matches: impl Into<Vec<Match>>) -> Self {
        Self { matches: matches.into(), verdict: Verdict::Drop }
    }
}

impl Chain {
    /// A chain that drops what none of the rules lets pass: by its policy, and by a last rule. When a table is replaced, the kernel has the
    /// rules of a new chain in force at one instant, and its policy a moment later; until then it goes by "accept" (`nft_chain_commit_drop_policy`
    /// in the kernel's net/netfilter/nf_tables_api.c).
    pub fn closed(hook: Hook, mut rules: Vec<Rule>) -> Self {
        rules.push(Rule::drop([]));
        Self { hook, policy: Policy::Drop, rules }
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "table inet {} {{", self.name)?;
        for chain in &self.chains {
            write!(f, "{chain}")?;
        }
        writeln!(f, "}}")
    }
}

impl Display for Chain {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (kind, priority) = match self.hook {
            Hook::Postrouting => ("nat", "srcnat"),
            Hook::Input | Hook::Forward | Hook::Output => ("filter", "filter"),
        };
        let policy = match self.policy {
            Policy::Accept => "accept",
            Policy::Drop => "drop",
        };
        writeln!(f, "\tchain {} {{", self.hook)?;
        writeln!(f, "\t\ttype {kind} hook {} priority {priority}; policy {policy};", self.hook)?;
        for rule in &self.rules {
            writeln!(f, "\t\t{rule}")?;
        }
        writeln!(f, "\t}}")
    }
}

impl Display for Hook {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Input => "input",
            Self::Forward => "forward",
            Self::Output => "output",
            Self::Postrouting => "postrouting",
        })
    }
}

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for matched in &self.matches {
            write!(f, "{matched} ")?;
        }
        f.write_str(match self.verdict {
            Verdict::Accept => "accept",
            Verdict::Drop => "drop",
            Verdict::Masquerade => "masquerade",
        })
    }
}

impl Display for Match {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let family = |net: &IpNet| if net.addr().is_ipv4() { "ip" } else { "ip6" };
        match self {
            Self::From(interface) => write!(f, "iifname {interface}"),
            Self::To(interface) => write!(f, "oifname {interface}"),
            Self::NotTo(interface) => write!(f, "oifname != {interface}"),
            Self::Source(net) => write!(f, "{} saddr {}", family(net), Net(net)),
            Self::Destination(net) => write!(f, "{} daddr {}", family(net), Net(net)),
            Self::TcpPort(ports) => write!(f, "tcp dport {}", Ports(ports)),
            Self::UdpPort(ports) => write!(f, "udp dport {}", Ports(ports)),
            Self::Of(Family::Ipv4) => f.write_str("meta nfproto ipv4"),
            Self::Of(Family::Ipv6) => f.write_str("meta nfproto ipv6"),
            Self::NotTransport(protocol) => write!(f, "meta l4proto != {protocol}"),
            Self::Icmpv6(kind) => write!(f, "icmpv6 type {kind}"),
            Self::Answers => f.write_str("ct state established,related"),
        }
    }
}

impl Display for Transport {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Icmp => "icmp",
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmpv6 => "ipv6-icmp",
        })
    }
}

/// A network, or a single address without the length of its prefix.
struct Net<'a>(&'a IpNet);

impl Display for Net<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.0.prefix_len() == self.0.max_prefix_len() { self.0.addr().fmt(f) } else { self.0.fmt(f) }
    }
}

struct Ports<'a>(&'a RangeInclusive<u16>);

impl Display for Ports<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (first, last) = (self.0.start(), self.0.end());
        if first == last { first.fmt(f) } else { write!(f, "{first}-{last}") }
    }
}

impl Display for Interface {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(name) => write!(f, "\"{name}\""),
            Self::Prefix(begin) => write!(f, "\"{begin}*\""),
            Self::Loopback => f.write_str("\"lo\""),
        }
    }
}
