//! Translates tables of [`crate::ruleset`] into nf_tables messages.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use netlink_packet_core::{DefaultNla, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, Expressions, Hook as HookAttribute, Immediate,
    InetHookNumber, Meta, MetaKey, NfTablesMessage, Operator, Payload, Register, RuleAttribute, RuleMessage,
    TableAttribute, TableMessage, Verdict as Code, VerdictAttribute,
};

use super::{NF_ACCEPT, NF_DROP};
use crate::ruleset::{Chain, Family, Hook, Interface, Match, Policy, Rule, Table, Transport, Verdict};

/// The priorities of a hook's chains (`enum nf_ip_hook_priorities`).
const PRIORITY_MANGLE: i32 = -150;
const PRIORITY_DESTINATION_NAT: i32 = -100;
const PRIORITY_FILTER: i32 = 0;
const PRIORITY_SOURCE_NAT: i32 = 100;

/// The families of packets (`NFPROTO_*` of linux/netfilter.h).
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;

/// IP protocol numbers (IANA's registry "Protocol Numbers").
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// The flags of a TCP header (RFC 9293 section 3.1).
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// The headers in which a payload expression counts offsets (`enum nft_payload_bases`).
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;

/// The attributes and keys of a ct expression, bits of the connection state, and a direction
/// (`enum nft_ct_attributes`, `enum nft_ct_keys`, `NF_CT_STATE_BIT`, `enum ip_conntrack_dir`).
const NFTA_CT_DREG: u16 = 1;
const NFTA_CT_KEY: u16 = 2;
const NFTA_CT_SREG: u16 = 4;
const NFT_CT_STATE: u32 = 0;
const NFT_CT_DIRECTION: u32 = 1;
const NFT_CT_MARK: u32 = 3;
const ESTABLISHED: u32 = 1 << 1;
const RELATED: u32 = 1 << 2;
const NEW: u32 = 1 << 3;
const IP_CT_DIR_REPLY: u8 = 1;

/// The attribute and the value of a reject expression that name its answer (`enum nft_reject_attributes`,
/// `enum nft_reject_types`).
const NFTA_REJECT_TYPE: u16 = 1;
const NFT_REJECT_TCP_RST: u32 = 1;

/// The attribute of a redir expression that names the register of the port (`enum nft_redir_attributes`).
const NFTA_REDIR_REG_PROTO_MIN: u16 = 1;

/// The attributes of a tproxy expression (`enum nft_tproxy_attributes`).
const NFTA_TPROXY_FAMILY: u16 = 1;
const NFTA_TPROXY_REG_ADDR: u16 = 2;
const NFTA_TPROXY_REG_PORT: u16 = 3;

/// The type of a comment in a table's user data (`NFTNL_UDATA_TABLE_COMMENT` of libnftnl).
const UDATA_TABLE_COMMENT: u8 = 0;

/// The size of an interface name in a register, in bytes (`IFNAMSIZ` of linux/if.h).
const IFNAMSIZ: usize = 16;

/// Returns the messages that create a table with a comment, and the flags of each.
pub(super) fn create(table: &Table, comment: &str) -> Vec<(NfTablesMessage, u16)> {
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

/// Returns the comment of a table.
pub(super) fn comment_of(table: &TableMessage) -> Option<String> {
    table.attributes.iter().find_map(|attribute| match attribute {
        TableAttribute::UserData(data) => parse_user_data(data),
        _ => None,
    })
}

/// Returns the comment in user data, a sequence of entries that consist of a type, a length and a value.
fn parse_user_data(mut data: &[u8]) -> Option<String> {
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
    // nft(8) limits comments to 128 bytes. The marks that vpn-exec itself reads are shorter.
    let text = &comment.as_bytes()[..comment.len().min(127)];
    let length = text.len() as u8 + 1;
    [&[UDATA_TABLE_COMMENT, length], text, &[0]].concat()
}

fn chain_message(table: &str, chain: &Chain) -> ChainMessage {
    let (number, kind, priority) = match chain.hook {
        Hook::Prerouting => (InetHookNumber::PreRouting, "filter", PRIORITY_MANGLE),
        Hook::Input => (InetHookNumber::LocalIn, "filter", PRIORITY_FILTER),
        Hook::Forward => (InetHookNumber::Forward, "filter", PRIORITY_FILTER),
        Hook::Output => (InetHookNumber::LocalOut, "filter", PRIORITY_FILTER),
        Hook::Reroute => (InetHookNumber::LocalOut, "route", PRIORITY_MANGLE),
        Hook::OutputNat => (InetHookNumber::LocalOut, "nat", PRIORITY_DESTINATION_NAT),
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
            ChainAttribute::Hook(vec![
                HookAttribute::Number(number.into()),
                HookAttribute::Priority(priority.cast_unsigned()),
            ]),
            ChainAttribute::Policy(policy),
            ChainAttribute::Type(kind.to_owned()),
        ],
    }
}

fn expressions(rule: &Rule) -> Vec<Expressions> {
    rule.matches.iter().flat_map(match_expressions).chain(verdict_expressions(rule.verdict)).collect()
}

fn verdict_expressions(verdict: Verdict) -> Vec<Expressions> {
    let code = |code| {
        let data = DataAttribute::Verdict(vec![VerdictAttribute::Code(Code::Other(code))]);
        Expressions::Immediate(vec![Immediate::DestinationRegister(Register::Verdict), Immediate::Data(data)])
    };
    match verdict {
        Verdict::Accept => vec![code(NF_ACCEPT)],
        Verdict::Drop => vec![code(NF_DROP)],
        Verdict::Reset => vec![other("reject", [(NFTA_REJECT_TYPE, NFT_REJECT_TCP_RST)])],
        Verdict::Masquerade => vec![other("masq", [])],
        Verdict::SetMark(mark) => {
            let set = Expressions::Meta(vec![Meta::Key(MetaKey::Mark), Meta::SourceRegister(Register::Reg1)]);
            vec![load(mark.to_ne_bytes()), set]
        }
        Verdict::SetConnectionMark(mark) => {
            vec![
                load(mark.to_ne_bytes()),
                other("ct", [(NFTA_CT_KEY, NFT_CT_MARK), (NFTA_CT_SREG, Register::Reg1.into())]),
            ]
        }
        Verdict::RedirectTo(port) => {
            vec![load(port.to_be_bytes()), other("redir", [(NFTA_REDIR_REG_PROTO_MIN, Register::Reg1.into())])]
        }
        Verdict::RelayBy(to) => {
            let (family, address) = match to.ip() {
                IpAddr::V4(ip) => (NFPROTO_IPV4, ip.octets().to_vec()),
                IpAddr::V6(ip) => (NFPROTO_IPV6, ip.octets().to_vec()),
            };
            let relay = [
                (NFTA_TPROXY_FAMILY, family.into()),
                (NFTA_TPROXY_REG_ADDR, Register::Reg1.into()),
                (NFTA_TPROXY_REG_PORT, Register::Reg2.into()),
            ];
            let port = load_into(Register::Reg2, to.port().to_be_bytes());
            vec![load(address), port, other("tproxy", relay), code(NF_ACCEPT)]
        }
    }
}

fn match_expressions(matched: &Match) -> Vec<Expressions> {
    match matched {
        Match::From(interface) => vec![meta(MetaKey::Iifname), compare(Operator::Equal, interface_value(interface))],
        Match::NotFrom(interface) => {
            vec![meta(MetaKey::Iifname), compare(Operator::NotEqual, interface_value(interface))]
        }
        Match::To(interface) => vec![meta(MetaKey::Oifname), compare(Operator::Equal, interface_value(interface))],
        Match::NotTo(interface) => {
            vec![meta(MetaKey::Oifname), compare(Operator::NotEqual, interface_value(interface))]
        }
        // The offsets of addresses in the headers of IPv4 (RFC 791 section 3.1) and IPv6 (RFC 8200 section 3).
        Match::Source(net) => address(net, 12, 8, Operator::Equal),
        Match::NotSource(net) => address(net, 12, 8, Operator::NotEqual),
        Match::Destination(net) => address(net, 16, 24, Operator::Equal),
        Match::TcpPort(ports) => port(TCP, ports),
        // The flags are at offset 13 of the TCP header (RFC 9293 section 3.1).
        Match::OpensTcp => vec![
            meta(MetaKey::L4Proto),
            compare(Operator::Equal, [TCP]),
            payload(TRANSPORT_HEADER, 13, 1),
            mask([FIN | SYN | RST | ACK]),
            compare(Operator::Equal, [SYN]),
        ],
        Match::UdpPort(ports) => port(UDP, ports),
        Match::Of(Family::Ipv4) => vec![meta(MetaKey::Nfproto), compare(Operator::Equal, [NFPROTO_IPV4])],
        Match::Of(Family::Ipv6) => vec![meta(MetaKey::Nfproto), compare(Operator::Equal, [NFPROTO_IPV6])],
        Match::Transport(protocol) => {
            vec![meta(MetaKey::L4Proto), compare(Operator::Equal, [protocol_number(*protocol)])]
        }
        Match::NotTransport(protocol) => {
            vec![meta(MetaKey::L4Proto), compare(Operator::NotEqual, [protocol_number(*protocol)])]
        }
        Match::Icmpv6(kind) => vec![
            meta(MetaKey::Nfproto),
            compare(Operator::Equal, [NFPROTO_IPV6]),
            meta(MetaKey::L4Proto),
            compare(Operator::Equal, [ICMPV6]),
            payload(TRANSPORT_HEADER, 0, 1),
            compare(Operator::Equal, [*kind]),
        ],
        // The hop limit is at offset 7 of the header (RFC 8200 section 3).
        Match::HopLimit(hops) => vec![
            meta(MetaKey::Nfproto),
            compare(Operator::Equal, [NFPROTO_IPV6]),
            payload(NETWORK_HEADER, 7, 1),
            compare(Operator::Equal, [*hops]),
        ],
        Match::Replies => state(ESTABLISHED | RELATED),
        Match::NewConnection => state(NEW),
        Match::ReplyDirection => vec![connection(NFT_CT_DIRECTION), compare(Operator::Equal, [IP_CT_DIR_REPLY])],
        Match::Mark(mark) => vec![meta(MetaKey::Mark), compare(Operator::Equal, mark.to_ne_bytes())],
        Match::ConnectionMark(mark) => vec![connection(NFT_CT_MARK), compare(Operator::Equal, mark.to_ne_bytes())],
    }
}

/// Matches connections in one of several states.
fn state(bits: u32) -> Vec<Expressions> {
    vec![connection(NFT_CT_STATE), mask(bits.to_ne_bytes()), compare(Operator::NotEqual, [0; 4])]
}

/// Returns the value that an interface's name is compared with: the whole name with zeros after it, or a prefix.
pub(super) fn interface_value(interface: &Interface) -> Vec<u8> {
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

fn address(net: &IpNet, ipv4_offset: u32, ipv6_offset: u32, operator: Operator) -> Vec<Expressions> {
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
    expressions.push(compare(operator, bytes));
    expressions
}

fn protocol_number(protocol: Transport) -> u8 {
    match protocol {
        Transport::Icmp => ICMP,
        Transport::Tcp => TCP,
        Transport::Udp => UDP,
        Transport::Icmpv6 => ICMPV6,
    }
}

/// Matches the destination port, at offset 2 of the TCP and the UDP header.
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

/// Loads metadata of a packet into the register.
fn meta(key: MetaKey) -> Expressions {
    Expressions::Meta(vec![Meta::Key(key), Meta::DestinationRegister(Register::Reg1)])
}

/// Loads a property of a packet's connection into the register.
fn connection(key: u32) -> Expressions {
    other("ct", [(NFTA_CT_DREG, Register::Reg1.into()), (NFTA_CT_KEY, key)])
}

/// Loads a constant into the register.
fn load(value: impl Into<Vec<u8>>) -> Expressions {
    load_into(Register::Reg1, value)
}

fn load_into(register: Register, value: impl Into<Vec<u8>>) -> Expressions {
    let data = DataAttribute::Value(value.into());
    Expressions::Immediate(vec![Immediate::DestinationRegister(register), Immediate::Data(data)])
}

/// Returns an expression of a type that the library does not know, with its attributes and their numbers.
fn other(kind: &str, attributes: impl IntoIterator<Item = (u16, u32)>) -> Expressions {
    let attribute = |(kind, value): (u16, u32)| DefaultNla::new(kind, value.to_be_bytes().to_vec());
    let attributes = attributes.into_iter().map(attribute).collect();
    Expressions::Other { expression_type: kind.to_owned(), attributes }
}

/// Loads a field of a packet into the register.
fn payload(base: u32, offset: u32, length: u32) -> Expressions {
    Expressions::Payload(vec![
        Payload::DestinationRegister(Register::Reg1),
        Payload::Base(base),
        Payload::Offset(offset),
        Payload::Len(length),
    ])
}

/// Clears all bits of the register but these.
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

/// Ends the rule without a verdict unless the comparison with the register holds.
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
    fn a_comment_is_read_as_it_was_written() {
        assert_eq!(parse_user_data(&user_data("vpn-exec:1")).as_deref(), Some("vpn-exec:1"));
        assert_eq!(parse_user_data(&[7, 2, 1, 1, 0, 3, b'h', b'i', 0]).as_deref(), Some("hi"));
        for broken in [&[][..], &[0], &[0, 9, b'x'], &[0, 0], &[1, 0]] {
            assert_eq!(parse_user_data(broken), None, "{broken:?}");
        }
        assert!(user_data(&"x".repeat(1000)).len() < 256);
    }
}
