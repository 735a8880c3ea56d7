//! Rules for packets, by nf_tables (nft(8); the kernel's include/uapi/linux/netfilter/nf_tables.h): whole tables, each change one
//! transaction, so there is no instant with a part of it.

use std::io;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use netlink_packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, Nla,
};
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, ExpressionAttribute, Expressions, Hook as HookAttribute,
    Immediate, InetHookNumber, ListAttribute, Meta, MetaKey, NfTablesMessage, Operator, Payload, Register,
    RuleAttribute, RuleMessage, TableAttribute, TableMessage, Verdict as Code, VerdictAttribute,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::linux::netlink::channel::Channel;
use crate::ruleset::{Chain, Family, Hook, Interface, Match, Policy, Rule, Table, Transport, Verdict};

/// The priorities among the chains of a hook (`enum nf_ip_hook_priorities`).
const PRIORITY_FILTER: u32 = 0;
const PRIORITY_SOURCE_NAT: u32 = 100;

/// What becomes of a packet (`NF_DROP` and `NF_ACCEPT` of include/uapi/linux/netfilter.h).
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;

/// What a packet is of (`NFPROTO_*`, and the protocol numbers of IP).
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// Where a packet's fields are counted from (`enum nft_payload_bases`).
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;

/// The attributes of a ct expression, the key that stands for a connection's state, and two of its bits (`enum nft_ct_attributes`,
/// `enum nft_ct_keys`, `NF_CT_STATE_BIT`).
const NFTA_CT_DREG: u16 = 1;
const NFTA_CT_KEY: u16 = 2;
const NFT_CT_STATE: u32 = 0;
const ESTABLISHED: u32 = 1 << 1;
const RELATED: u32 = 1 << 2;

/// The name of a target of iptables(8) in a rule (`enum nft_target_attributes`).
const NFTA_TARGET_NAME: u16 = 1;

/// What nft(8) shows as a table's comment, in its user data.
const UDATA_TABLE_COMMENT: u8 = 0;

/// The bytes of an interface's name in a register (`IFNAMSIZ`).
const IFNAMSIZ: usize = 16;

/// A socket for the rules of the network namespace in which it was opened.
pub struct Nftables {
    channel: Channel,
}

impl std::fmt::Debug for Nftables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nftables").finish_non_exhaustive()
    }
}

/// A chain of somebody's that drops or rejects what is forwarded, unless a rule lets it pass: by its policy, or by a rule for all that the
/// others leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DroppingChain {
    /// The family of its table, as nft(8) writes it.
    pub family: &'static str,
    /// Its table.
    pub table: String,
    /// Its name.
    pub name: String,
    /// The interfaces that the rules of its table tell apart. One that ends with `*` stands for all names that begin so.
    pub interfaces: Vec<String>,
}

/// Whether an error means that the kernel has no nf_tables, or lacks a part of it.
pub fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP | libc::EAFNOSUPPORT | libc::ENOENT))
}

impl Nftables {
    /// Opens a socket in the network namespace of the calling thread.
    pub fn open() -> io::Result<Self> {
        Ok(Self { channel: Channel::open(NETLINK_NETFILTER)? })
    }

    /// Makes a table, with a comment.
    ///
    /// # Errors
    /// `EEXIST` if there is one of that name; those of [`is_missing`].
    pub fn create(&mut self, table: &Table, comment: &str) -> io::Result<()> {
        self.change(making(table, comment))
    }

    /// Makes a table anew, whether there is one of that name or not.
    ///
    /// # Errors
    /// Those of [`is_missing`].
    pub fn replace(&mut self, table: &Table, comment: &str) -> io::Result<()> {
        // So that there is one to delete.
        let named = || TableMessage { attributes: vec![TableAttribute::Name(table.name.clone())] };
        let mut messages =
            vec![(NfTablesMessage::NewTable(named()), NLM_F_CREATE), (NfTablesMessage::DeleteTable(named()), 0)];
        messages.extend(making(table, comment));
        self.change(messages)
    }

    /// Removes a table, with all that is in it.
    ///
    /// # Errors
    /// `ENOENT` if there is none of that name.
    pub fn delete(&mut self, name: &str) -> io::Result<()> {
        let named = TableMessage { attributes: vec![TableAttribute::Name(name.to_owned())] };
        self.change(vec![(NfTablesMessage::DeleteTable(named), 0)])
    }

    /// The comment of a table: the inner `None` if it has none.
    ///
    /// # Errors
    /// `ENOENT` if there is none of that name.
    pub fn comment(&mut self, name: &str) -> io::Result<Option<String>> {
        let named = TableMessage { attributes: vec![TableAttribute::Name(name.to_owned())] };
        let request = inet(NfTablesMessage::GetTable(named));
        let answers = self.channel.ask(request, NLM_F_REQUEST | NLM_F_ACK)?;
        Ok(answers.into_iter().find_map(|answer| match answer.inner {
            NetfilterMessageInner::NfTables(NfTablesMessage::NewTable(table)) => {
                table.attributes.into_iter().find_map(|attribute| match attribute {
                    TableAttribute::UserData(data) => comment_of(&data),
                    _ => None,
                })
            }
            _ => None,
        }))
    }

    /// How many rules there are in a table.
    ///
    /// # Errors
    /// `ENOENT` if there is none of that name.
    pub fn count_rules(&mut self, table: &str) -> io::Result<usize> {
        let of_table = RuleMessage { attributes: vec![RuleAttribute::Table(table.to_owned())] };
        let answers = self.channel.ask(inet(NfTablesMessage::GetRule(of_table)), NLM_F_REQUEST | NLM_F_DUMP)?;
        // Older kernels tell of all tables.
        let is_one = |answer: &NetfilterMessage| match &answer.inner {
            NetfilterMessageInner::NfTables(NfTablesMessage::NewRule(rule)) => table_of(rule) == Some(table),
            _ => false,
        };
        Ok(answers.iter().filter(|answer| is_one(answer)).count())
    }

    /// The chains that drop or reject by default what is forwarded.
    ///
    /// # Errors
    /// `EPERM` without CAP_NET_ADMIN; those of [`is_missing`].
    pub fn dropping_forward_chains(&mut self) -> io::Result<Vec<DroppingChain>> {
        let all = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
        let chains = NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() });
        let answers = self.channel.ask(NetfilterMessage::new(all.clone(), chains), NLM_F_REQUEST | NLM_F_DUMP)?;
        let found = answers.into_iter().filter_map(|answer| match answer.inner {
            NetfilterMessageInner::NfTables(NfTablesMessage::NewChain(chain)) => {
                forwarding(name_of_family(answer.header.family)?, chain)
            }
            _ => None,
        });
        let mut found: Vec<ForwardChain> = found.collect();
        if found.is_empty() {
            return Ok(Vec::new());
        }
        let rules = NfTablesMessage::GetRule(RuleMessage { attributes: Vec::new() });
        let answers = self.channel.ask(NetfilterMessage::new(all, rules), NLM_F_REQUEST | NLM_F_DUMP)?;
        for answer in answers {
            let NetfilterMessageInner::NfTables(NfTablesMessage::NewRule(rule)) = answer.inner else { continue };
            let Some(family) = name_of_family(answer.header.family) else { continue };
            let (table, chain) = place_of(&rule);
            let of_table = found.iter_mut().filter(|it| it.chain.family == family && Some(&*it.chain.table) == table);
            for ForwardChain { chain: one, rule_stops, .. } in of_table {
                one.interfaces.extend(interfaces_in(&rule));
                if Some(&*one.name) == chain {
                    *rule_stops |= stops_all(&rule);
                }
            }
        }
        let drops = |found: &ForwardChain| found.policy_drops || found.rule_stops;
        Ok(found.into_iter().filter(drops).map(|found| found.chain).collect())
    }

    /// One transaction.
    fn change(&mut self, messages: Vec<(NfTablesMessage, u16)>) -> io::Result<()> {
        let batch = |message| {
            let subsystem = libc::NFNL_SUBSYS_NFTABLES as u16;
            NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, subsystem), message)
        };
        let mut buffer = Vec::new();
        self.channel.append(&mut buffer, batch(ControlMessage::BatchBegin), NLM_F_REQUEST);
        let (first, count) = (self.channel.next_sequence(), messages.len());
        for (place, (message, flags)) in (1..).zip(messages) {
            // Errors come unasked. Of success the last message's is enough: there is no room for those of many.
            let asked = if place == count { NLM_F_ACK } else { 0 };
            self.channel.append(&mut buffer, inet(message), flags | NLM_F_REQUEST | asked);
        }
        self.channel.append(&mut buffer, batch(ControlMessage::BatchEnd), NLM_F_REQUEST);
        self.channel.send(&buffer)?;
        self.channel.collect_first_error(first, count)
    }
}

fn inet(message: NfTablesMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Inet, 0, 0), message)
}

/// A chain of what is forwarded.
struct ForwardChain {
    chain: DroppingChain,
    policy_drops: bool,
    rule_stops: bool,
}

/// A chain, if it is one of what is forwarded. Its rules have not been looked at.
fn forwarding(family: &'static str, chain: ChainMessage) -> Option<ForwardChain> {
    let (mut table, mut name, mut forwards, mut policy_drops) = (None, None, false, false);
    for attribute in chain.attributes {
        match attribute {
            ChainAttribute::Table(text) => table = Some(text),
            ChainAttribute::Name(text) => name = Some(text),
            ChainAttribute::Policy(policy) => policy_drops = policy == NF_DROP,
            ChainAttribute::Hook(hooks) => {
                forwards = hooks.contains(&HookAttribute::Number(InetHookNumber::Forward.into()));
            }
            _ => {}
        }
    }
    let chain = DroppingChain { family, table: table?, name: name?, interfaces: Vec::new() };
    forwards.then_some(ForwardChain { chain, policy_drops, rule_stops: false })
}

fn name_of_family(family: NetfilterProtoFamily) -> Option<&'static str> {
    match family {
        NetfilterProtoFamily::Inet => Some("inet"),
        NetfilterProtoFamily::IPv4 => Some("ip"),
        NetfilterProtoFamily::IPv6 => Some("ip6"),
        _ => None,
    }
}

/// The table that a rule is in.
fn table_of(rule: &RuleMessage) -> Option<&str> {
    rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Table(table) => Some(&**table),
        _ => None,
    })
}

/// The table and the chain that a rule is in.
fn place_of(rule: &RuleMessage) -> (Option<&str>, Option<&str>) {
    let chain = rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Chain(chain) => Some(&**chain),
        _ => None,
    });
    (table_of(rule), chain)
}

/// Whether a rule drops or rejects whatever comes to it. It may count and log that.
fn stops_all(rule: &RuleMessage) -> bool {
    let mut stops = false;
    for expression in expressions_of(rule) {
        match expression {
            Expressions::Immediate(parts) => stops |= parts.iter().any(is_drop),
            Expressions::Other { expression_type, attributes } => match expression_type.as_str() {
                "counter" | "log" => {}
                "reject" => stops = true,
                // As iptables has it.
                "target" => stops |= attributes.iter().any(is_reject),
                _ => return false,
            },
            _ => return false,
        }
    }
    stops
}

fn is_drop(part: &Immediate) -> bool {
    let Immediate::Data(DataAttribute::Verdict(parts)) = part else { return false };
    parts.iter().any(|part| matches!(part, VerdictAttribute::Code(code) if u32::from(*code) == NF_DROP))
}

fn is_reject(attribute: &DefaultNla) -> bool {
    let mut value = vec![0; attribute.value_len()];
    attribute.emit_value(&mut value);
    attribute.kind() == NFTA_TARGET_NAME && value == b"REJECT\0"
}

/// What a rule asks and does, in turn.
fn expressions_of(rule: &RuleMessage) -> impl Iterator<Item = &Expressions> {
    let lists = rule.attributes.iter().filter_map(|attribute| match attribute {
        RuleAttribute::Expressions(list) => Some(list),
        _ => None,
    });
    lists.flatten().filter_map(|item| match item {
        ListAttribute::Element(parts) => parts.iter().find_map(|part| match part {
            ExpressionAttribute::Data(expression) => Some(expression),
            _ => None,
        }),
        _ => None,
    })
}

/// The interfaces with whose names a rule compares something, as far as it compares with single ones.
fn interfaces_in(rule: &RuleMessage) -> Vec<String> {
    let (mut found, mut is_name) = (Vec::new(), false);
    for expression in expressions_of(rule) {
        match expression {
            Expressions::Meta(parts) => {
                let key = |part: &Meta| matches!(part, Meta::Key(MetaKey::Iifname | MetaKey::Oifname));
                is_name = parts.iter().any(key);
            }
            Expressions::Cmp(parts) if is_name => found.extend(parts.iter().filter_map(|part| match part {
                Cmp::Data(DataAttribute::Value(value)) => interface_of(value),
                _ => None,
            })),
            _ => is_name = false,
        }
    }
    found
}

/// The interface's name that something is compared with: [`name_of`] the other way.
fn interface_of(value: &[u8]) -> Option<String> {
    let end = value.iter().position(|byte| *byte == 0);
    let name = str::from_utf8(&value[..end.unwrap_or(value.len())]).ok()?;
    Some(if end.is_some() { name.to_owned() } else { format!("{name}*") })
}

/// Looks at all that is looked at in an answer, for a fuzzer.
#[cfg(any(test, fuzzing))]
pub(super) fn look_at(answer: NetfilterMessage) {
    match answer.inner {
        NetfilterMessageInner::NfTables(NfTablesMessage::NewTable(table)) => {
            for attribute in table.attributes {
                if let TableAttribute::UserData(data) = attribute {
                    let _ = comment_of(&data);
                }
            }
        }
        NetfilterMessageInner::NfTables(NfTablesMessage::NewChain(chain)) => {
            let _ = name_of_family(answer.header.family).and_then(|family| forwarding(family, chain));
        }
        NetfilterMessageInner::NfTables(NfTablesMessage::NewRule(rule)) => {
            let _ = (place_of(&rule), interfaces_in(&rule), stops_all(&rule));
        }
        _ => {}
    }
}

/// The comment in a table's user data, which is a row of a kind, a length and as many bytes.
fn comment_of(mut data: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = data {
        let value = rest.get(..usize::from(*length))?;
        if *kind == UDATA_TABLE_COMMENT {
            return String::from_utf8(value.strip_suffix(&[0])?.to_vec()).ok();
        }
        data = &rest[value.len()..];
    }
    None
}

fn user_data(comment: &str) -> Vec<u8> {
    // What is longer than can be said is cut off: it is for people, and for us, whose marks are short.
    let text = &comment.as_bytes()[..comment.len().min(127)];
    let length = text.len() as u8 + 1;
    [&[UDATA_TABLE_COMMENT, length], text, &[0]].concat()
}

fn making(table: &Table, comment: &str) -> Vec<(NfTablesMessage, u16)> {
    let attributes = vec![TableAttribute::Name(table.name.clone()), TableAttribute::UserData(user_data(comment))];
    let mut messages = vec![(NfTablesMessage::NewTable(TableMessage { attributes }), NLM_F_CREATE | NLM_F_EXCL)];
    for chain in &table.chains {
        messages.push((NfTablesMessage::NewChain(chain_message(&table.name, chain)), NLM_F_CREATE | NLM_F_EXCL));
        messages.extend(chain.rules.iter().map(|rule| {
            let rule = RuleMessage {
                attributes: vec![
                    RuleAttribute::Table(table.name.clone()),
                    RuleAttribute::Chain(chain.hook.to_string()),
                    RuleAttribute::Expressions(expressions(rule).into_iter().map(Into::into).collect()),
                ],
            };
            (NfTablesMessage::NewRule(rule), NLM_F_CREATE | NLM_F_APPEND)
        }));
    }
    messages
}

fn chain_message(table: &str, chain: &Chain) -> ChainMessage {
    let (number, kind, priority) = match chain.hook {
        Hook::Input => (InetHookNumber::LocalIn, "filter", PRIORITY_FILTER),
        Hook::Forward => (InetHookNumber::Forward, "filter", PRIORITY_FILTER),
        Hook::Output => (InetHookNumber::LocalOut, "filter", PRIORITY_FILTER),
        Hook::Postrouting => (InetHookNumber::PostRouting, "nat", PRIORITY_SOURCE_NAT),
    };
    let policy = match chain.policy {
        Policy::Accept => NF_ACCEPT,
        Policy::Drop => NF_DROP,
    };
    ChainMessage {
        attributes: vec![
            ChainAttribute::Table(table.to_owned()),
            ChainAttribute::Name(chain.hook.to_string()),
            ChainAttribute::Hook(vec![HookAttribute::Number(number.into()), HookAttribute::Priority(priority)]),
            ChainAttribute::Policy(policy),
            ChainAttribute::Type(kind.to_owned()),
        ],
    }
}

fn expressions(rule: &Rule) -> Vec<Expressions> {
    let mut expressions: Vec<Expressions> = rule.matches.iter().flat_map(matching).collect();
    let verdict = |code| {
        let data = DataAttribute::Verdict(vec![VerdictAttribute::Code(Code::Other(code))]);
        Expressions::Immediate(vec![Immediate::DestinationRegister(Register::Verdict), Immediate::Data(data)])
    };
    expressions.push(match rule.verdict {
        Verdict::Accept => verdict(NF_ACCEPT),
        Verdict::Drop => verdict(NF_DROP),
        Verdict::Masquerade => Expressions::Other { expression_type: "masq".to_owned(), attributes: Vec::new() },
    });
    expressions
}

fn matching(matched: &Match) -> Vec<Expressions> {
    match matched {
        Match::From(interface) => vec![meta(MetaKey::Iifname), compare(Operator::Equal, name_of(interface))],
        Match::To(interface) => vec![meta(MetaKey::Oifname), compare(Operator::Equal, name_of(interface))],
        Match::NotTo(interface) => vec![meta(MetaKey::Oifname), compare(Operator::NotEqual, name_of(interface))],
        // Where the addresses are in the headers of IPv4 (RFC 791 section 3.1) and IPv6 (RFC 8200 section 3).
        Match::Source(net) => address(net, 12, 8),
        Match::Destination(net) => address(net, 16, 24),
        Match::TcpPort(ports) => port(TCP, ports),
        Match::UdpPort(ports) => port(UDP, ports),
        Match::Of(Family::Ipv4) => vec![meta(MetaKey::Nfproto), compare(Operator::Equal, [NFPROTO_IPV4])],
        Match::Of(Family::Ipv6) => vec![meta(MetaKey::Nfproto), compare(Operator::Equal, [NFPROTO_IPV6])],
        Match::NotTransport(protocol) => {
            vec![meta(MetaKey::L4Proto), compare(Operator::NotEqual, [number_of(*protocol)])]
        }
        Match::Icmpv6(kind) => vec![
            meta(MetaKey::Nfproto),
            compare(Operator::Equal, [NFPROTO_IPV6]),
            meta(MetaKey::L4Proto),
            compare(Operator::Equal, [ICMPV6]),
            payload(TRANSPORT_HEADER, 0, 1),
            compare(Operator::Equal, [*kind]),
        ],
        Match::Replies => {
            let attributes = vec![
                DefaultNla::new(NFTA_CT_DREG, u32::from(Register::Reg1).to_be_bytes().to_vec()),
                DefaultNla::new(NFTA_CT_KEY, NFT_CT_STATE.to_be_bytes().to_vec()),
            ];
            vec![
                Expressions::Other { expression_type: "ct".to_owned(), attributes },
                mask((ESTABLISHED | RELATED).to_ne_bytes()),
                compare(Operator::NotEqual, [0; 4]),
            ]
        }
    }
}

/// An interface's name as it is compared: all of it with the zeros behind it, or how it begins.
fn name_of(interface: &Interface) -> Vec<u8> {
    let whole = |name: &str| {
        let mut bytes = name.as_bytes().to_vec();
        bytes.resize(IFNAMSIZ, 0);
        bytes
    };
    match interface {
        Interface::Named(name) => whole(name.as_str()),
        Interface::Loopback => whole("lo"),
        Interface::Prefix(begin) => begin.as_bytes().to_vec(),
    }
}

fn address(net: &IpNet, ipv4_offset: u32, ipv6_offset: u32) -> Vec<Expressions> {
    let (family, offset, bytes, bits) = match net {
        IpNet::V4(net) => (NFPROTO_IPV4, ipv4_offset, net.network().octets().to_vec(), net.netmask().octets().to_vec()),
        IpNet::V6(net) => (NFPROTO_IPV6, ipv6_offset, net.network().octets().to_vec(), net.netmask().octets().to_vec()),
    };
    let mut expressions = vec![
        meta(MetaKey::Nfproto),
        compare(Operator::Equal, [family]),
        payload(NETWORK_HEADER, offset, bytes.len() as u32),
    ];
    if net.prefix_len() < net.max_prefix_len() {
        expressions.push(mask(bits));
    }
    expressions.push(compare(Operator::Equal, bytes));
    expressions
}

/// A protocol's number in the header of IP (IANA's registry "Protocol Numbers").
fn number_of(protocol: Transport) -> u8 {
    match protocol {
        Transport::Icmp => ICMP,
        Transport::Tcp => TCP,
        Transport::Udp => UDP,
        Transport::Icmpv6 => ICMPV6,
    }
}

fn port(protocol: u8, ports: &RangeInclusive<u16>) -> Vec<Expressions> {
    let mut expressions =
        vec![meta(MetaKey::L4Proto), compare(Operator::Equal, [protocol]), payload(TRANSPORT_HEADER, 2, 2)];
    let (first, last) = (ports.start().to_be_bytes(), ports.end().to_be_bytes());
    if first == last {
        expressions.push(compare(Operator::Equal, first));
    } else {
        expressions.extend([compare(Operator::GreatherThanEqual, first), compare(Operator::LessThanEqual, last)]);
    }
    expressions
}

/// Loads what is known about a packet.
fn meta(key: MetaKey) -> Expressions {
    Expressions::Meta(vec![Meta::Key(key), Meta::DestinationRegister(Register::Reg1)])
}

/// Loads a field of a packet.
fn payload(base: u32, offset: u32, length: u32) -> Expressions {
    Expressions::Payload(vec![
        Payload::DestinationRegister(Register::Reg1),
        Payload::Base(base),
        Payload::Offset(offset),
        Payload::Len(length),
    ])
}

/// Leaves of what was loaded these bits alone.
fn mask(bits: impl Into<Vec<u8>>) -> Expressions {
    let bits = bits.into();
    Expressions::Bitwise(vec![
        Bitwise::SourceRegister(Register::Reg1),
        Bitwise::DestinationRegister(Register::Reg1),
        Bitwise::Length(bits.len() as u32),
        Bitwise::Xor(DataAttribute::Value(vec![0; bits.len()])),
        Bitwise::Mask(DataAttribute::Value(bits)),
    ])
}

/// Goes on only if this holds of what was loaded.
fn compare(operator: Operator, with: impl Into<Vec<u8>>) -> Expressions {
    Expressions::Cmp(vec![
        Cmp::SourceRegister(Register::Reg1),
        Cmp::Op(operator),
        Cmp::Data(DataAttribute::Value(with.into())),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_read_as_they_are_written() {
        for (interface, text) in [(Interface::Loopback, "lo"), (Interface::Prefix("ve-".into()), "ve-*")] {
            assert_eq!(interface_of(&name_of(&interface)).as_deref(), Some(text));
        }
        assert_eq!(interface_of(&[0xff, 0xfe]), None);
    }

    #[test]
    fn a_comment_is_read_as_it_was_written() {
        assert_eq!(comment_of(&user_data("vpn-exec:1")).as_deref(), Some("vpn-exec:1"));
        assert_eq!(comment_of(&[7, 2, 1, 1, 0, 3, b'h', b'i', 0]).as_deref(), Some("hi"));
        for broken in [&[][..], &[0], &[0, 9, b'x'], &[0, 0], &[1, 0]] {
            assert_eq!(comment_of(broken), None, "{broken:?}");
        }
        assert!(user_data(&"x".repeat(1000)).len() < 256);
    }
}
