//! Packet rules as plain values. A plan decides them, and `linux` loads them into the kernel's nf_tables. They display
//! in the syntax of nft(8).

use std::fmt::{self, Display, Formatter};
use std::net::SocketAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::names::InterfaceName;

/// A table of rules for IPv4 and IPv6 (family `inet`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Its name, which is unique in its network namespace.
    pub name: String,
    /// Its chains.
    pub chains: Vec<Chain>,
}

/// A base chain: rules that are evaluated in order until one decides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// Which packets it receives. Also the chain's name.
    pub hook: Hook,
    /// What happens to packets about which no rule decides.
    pub policy: Policy,
    /// The rules.
    pub rules: Vec<Rule>,
}

/// Which packets a chain receives, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hook {
    /// All packets that arrive, before the routing decision.
    Prerouting,
    /// Packets to a process of the namespace.
    Input,
    /// Packets that are forwarded.
    Forward,
    /// Packets from a process of the namespace.
    Output,
    /// Packets from a process of the namespace, before [`Self::Output`]. A packet whose mark a rule changes is routed
    /// again. A packet for which there was no route, or an unreachable one, does not get here.
    Reroute,
    /// The first packet of each connection from a process of the namespace, to translate its destination. Runs after
    /// [`Self::Reroute`] and before [`Self::Output`].
    OutputNat,
    /// All packets that leave, to translate their source address.
    Postrouting,
}

/// What happens to packets about which no rule decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// They are accepted.
    Accept,
    /// They are dropped.
    Drop,
}

/// What happens to packets that meet all of some conditions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// The conditions.
    #[serde(rename = "if")]
    pub matches: Vec<Match>,
    /// What happens to the packets.
    #[serde(rename = "then")]
    pub verdict: Verdict,
}

/// A condition on a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Match {
    /// It has arrived by an interface.
    From(Interface),
    /// It has arrived by any other interface.
    NotFrom(Interface),
    /// It leaves by an interface.
    To(Interface),
    /// It leaves by any other interface.
    NotTo(Interface),
    /// It is of an address family.
    Of(Family),
    /// Its source is in a network.
    Source(IpNet),
    /// It is of the network's family, and its source is outside the network.
    NotSource(IpNet),
    /// Its destination is in a network.
    Destination(IpNet),
    /// It is a TCP packet to one of these ports.
    TcpPort(RangeInclusive<u16>),
    /// It opens a TCP connection: it has the flag SYN, and neither ACK, FIN nor RST (RFC 9293 section 3.1).
    OpensTcp,
    /// It is a UDP packet to one of these ports.
    UdpPort(RangeInclusive<u16>),
    /// Its transport protocol is this one.
    Transport(Transport),
    /// Its transport protocol is not this one.
    NotTransport(Transport),
    /// It is an ICMPv6 packet of a type (RFC 4443 section 2.1).
    Icmpv6(u8),
    /// It is an IPv6 packet with a hop limit.
    HopLimit(u8),
    /// It belongs to a connection that was accepted before, or is an ICMP error about one.
    #[serde(rename = "answers")]
    Replies,
    /// Its direction is opposite to that of its connection's first packet. On output, these are the replies to
    /// connections that another host has opened.
    ReplyDirection,
    /// It is the first packet of a connection that the kernel tracks, or follows it before any reply. For TCP, that
    /// may be any packet of an older connection (`nf_conntrack_tcp_loose` of the kernel's nf_conntrack-sysctl.rst).
    NewConnection,
    /// It has a mark (`SO_MARK` of socket(7), or [`Verdict::SetMark`]).
    Mark(u32),
    /// It belongs to a connection that has a mark.
    ConnectionMark(u32),
}

/// An address family.
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
    /// All transport protocols.
    pub const ALL: [Self; 4] = [Self::Icmp, Self::Tcp, Self::Udp, Self::Icmpv6];
}

/// One or more interfaces.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interface {
    /// The interface of this name, which need not exist yet.
    Named(InterfaceName),
    /// All interfaces whose names have this prefix.
    Prefix(String),
    /// The loopback interface.
    Loopback,
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It is accepted.
    Accept,
    /// It is dropped. A local sender gets `EPERM`, but a TCP connection waits for its timeout.
    Drop,
    /// It is dropped, and the TCP connection is refused or reset: its sender gets a TCP packet with the flag RST. Needs
    /// a match of [`Match::Transport`] or [`Match::TcpPort`] for TCP.
    Reset,
    /// It is accepted, and its source becomes the address of the interface that it leaves by.
    Masquerade,
    /// It gets a mark. The rules that follow decide whether it is accepted.
    SetMark(u32),
    /// Its connection gets a mark. The rules that follow decide whether the packet is accepted.
    SetConnectionMark(u32),
    /// It is accepted, and goes to this port of the namespace's loopback address. Needs a match of [`Match::TcpPort`]
    /// or [`Match::UdpPort`], a chain that translates destinations, and a server that is bound to the loopback address:
    /// another one would answer the sender from an address for which there is no connection.
    RedirectTo(u16),
    /// It is accepted, and goes to the transparent socket (`IP_TRANSPARENT` of ip(7)) at this address, without a change
    /// of its destination. Without such a socket, the rules that follow decide. Needs [`Hook::Prerouting`], a match of
    /// [`Match::TcpPort`] or [`Match::UdpPort`], one of [`Match::Of`] or of an address of the same family, and a local
    /// route to the packet's destination.
    RelayBy(SocketAddr),
}

impl Rule {
    /// Returns a rule that accepts packets.
    pub fn accept(matches: impl Into<Vec<Match>>) -> Self {
        Self { matches: matches.into(), verdict: Verdict::Accept }
    }

    /// Returns a rule that drops packets.
    pub fn drop(matches: impl Into<Vec<Match>>) -> Self {
        Self { matches: matches.into(), verdict: Verdict::Drop }
    }

    /// Returns the rules that drop what a rule drops, and reset TCP connections.
    fn resetting(self) -> Vec<Self> {
        let is_other = |it: &Match| matches!(it, Match::UdpPort(_) | Match::Icmpv6(_) | Match::NotTransport(_));
        if self.verdict != Verdict::Drop || self.matches.iter().any(is_other) {
            return vec![self];
        }
        if self.matches.iter().any(|it| matches!(it, Match::TcpPort(_) | Match::OpensTcp)) {
            return vec![Self { verdict: Verdict::Reset, ..self }];
        }
        let mut matches = self.matches.clone();
        matches.push(Match::Transport(Transport::Tcp));
        vec![Self { matches, verdict: Verdict::Reset }, self]
    }

    /// Returns a rule that sets the mark of packets.
    pub fn set_mark(mark: u32, matches: impl Into<Vec<Match>>) -> Self {
        Self { matches: matches.into(), verdict: Verdict::SetMark(mark) }
    }

    /// Returns a rule that sets the mark of the packets' connections.
    pub fn set_connection_mark(mark: u32, matches: impl Into<Vec<Match>>) -> Self {
        Self { matches: matches.into(), verdict: Verdict::SetConnectionMark(mark) }
    }

    /// Returns a rule that redirects packets to a port of the namespace.
    pub fn redirect_to(port: u16, matches: impl Into<Vec<Match>>) -> Self {
        Self { matches: matches.into(), verdict: Verdict::RedirectTo(port) }
    }
}

impl Chain {
    /// Returns a chain that drops all packets that no rule accepts: by its policy, and by a last rule. A program whose
    /// TCP connection is dropped gets an error at once, so that it can try another address (RFC 8305 section 5).
    ///
    /// The last rule is needed when a table is replaced. The kernel activates the rules of all new chains at once, but
    /// their policies one by one after that; until then the policy is "accept" (`nft_chain_commit_drop_policy` in the
    /// kernel's net/netfilter/nf_tables_api.c).
    pub fn closed(hook: Hook, mut rules: Vec<Rule>) -> Self {
        rules.push(Rule::drop([]));
        if hook == Hook::Output {
            rules = rules.into_iter().flat_map(Rule::resetting).collect();
        }
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
        let (kind, hook, priority) = match self.hook {
            Hook::Prerouting => ("filter", "prerouting", "mangle"),
            Hook::Input => ("filter", "input", "filter"),
            Hook::Forward => ("filter", "forward", "filter"),
            Hook::Output => ("filter", "output", "filter"),
            Hook::Reroute => ("route", "output", "mangle"),
            // nft(8) has a word for this priority on prerouting, but not on output.
            Hook::OutputNat => ("nat", "output", "-100"),
            Hook::Postrouting => ("nat", "postrouting", "srcnat"),
        };
        let policy = match self.policy {
            Policy::Accept => "accept",
            Policy::Drop => "drop",
        };
        writeln!(f, "\tchain {} {{", self.hook)?;
        writeln!(f, "\t\ttype {kind} hook {hook} priority {priority}; policy {policy};")?;
        for rule in &self.rules {
            writeln!(f, "\t\t{rule}")?;
        }
        writeln!(f, "\t}}")
    }
}

impl Display for Hook {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prerouting => "prerouting",
            Self::Input => "input",
            Self::Forward => "forward",
            Self::Output => "output",
            Self::Reroute => "reroute",
            Self::OutputNat => "output_nat",
            Self::Postrouting => "postrouting",
        })
    }
}

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for condition in &self.matches {
            write!(f, "{condition} ")?;
        }
        match self.verdict {
            Verdict::Accept => f.write_str("accept"),
            Verdict::Drop => f.write_str("drop"),
            Verdict::Reset => f.write_str("reject with tcp reset"),
            Verdict::Masquerade => f.write_str("masquerade"),
            Verdict::SetMark(mark) => write!(f, "meta mark set {mark:#010x}"),
            Verdict::SetConnectionMark(mark) => write!(f, "ct mark set {mark:#010x}"),
            Verdict::RedirectTo(port) => write!(f, "redirect to :{port}"),
            Verdict::RelayBy(address) => {
                write!(f, "tproxy {} to {address} accept", if address.is_ipv4() { "ip" } else { "ip6" })
            }
        }
    }
}

impl Display for Match {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let family = |net: &IpNet| if net.addr().is_ipv4() { "ip" } else { "ip6" };
        match self {
            Self::From(interface) => write!(f, "iifname {interface}"),
            Self::NotFrom(interface) => write!(f, "iifname != {interface}"),
            Self::To(interface) => write!(f, "oifname {interface}"),
            Self::NotTo(interface) => write!(f, "oifname != {interface}"),
            Self::Source(net) => write!(f, "{} saddr {}", family(net), Net(net)),
            Self::NotSource(net) => write!(f, "{} saddr != {}", family(net), Net(net)),
            Self::Destination(net) => write!(f, "{} daddr {}", family(net), Net(net)),
            Self::TcpPort(ports) => write!(f, "tcp dport {}", Ports(ports)),
            Self::OpensTcp => f.write_str("tcp flags & (fin | syn | rst | ack) == syn"),
            Self::UdpPort(ports) => write!(f, "udp dport {}", Ports(ports)),
            Self::Of(Family::Ipv4) => f.write_str("meta nfproto ipv4"),
            Self::Of(Family::Ipv6) => f.write_str("meta nfproto ipv6"),
            Self::Transport(protocol) => write!(f, "meta l4proto {protocol}"),
            Self::NotTransport(protocol) => write!(f, "meta l4proto != {protocol}"),
            Self::Icmpv6(kind) => write!(f, "icmpv6 type {kind}"),
            Self::HopLimit(hops) => write!(f, "ip6 hoplimit {hops}"),
            Self::Replies => f.write_str("ct state established,related"),
            Self::ReplyDirection => f.write_str("ct direction reply"),
            Self::NewConnection => f.write_str("ct state new"),
            Self::Mark(mark) => write!(f, "meta mark {mark:#010x}"),
            Self::ConnectionMark(mark) => write!(f, "ct mark {mark:#010x}"),
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

/// Displays a network; a single address without its prefix length.
struct Net<'a>(&'a IpNet);

impl Display for Net<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.0.prefix_len() == self.0.max_prefix_len() { self.0.addr().fmt(f) } else { self.0.fmt(f) }
    }
}

/// Displays a range of ports; a single port without a range.
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
