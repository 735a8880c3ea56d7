//! Masquerading, as a provider does it: one nftables table for IPv4 and IPv6 with one chain and one rule, sent over
//! nfnetlink (the kernel's include/uapi/linux/netfilter/nf_tables.h).

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, Cmp, DataAttribute, Expressions, Hook, InetHookNumber, Meta, MetaKey,
    NfTablesMessage, Operator, Register, RuleAttribute, RuleMessage, TableAttribute, TableMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::netlink;

/// The priority of source NAT among the hooks (`NF_IP_PRI_NAT_SRC`).
const SOURCE_NAT: u32 = 100;

/// Masquerades the packets that the calling thread's network namespace forwards.
///
/// # Errors
/// The kernel's, if it lacks nftables or NAT.
pub fn masquerade() -> io::Result<()> {
    masquerade_where(&[Vec::new()])
}

/// Masquerades the packets that the calling thread's network namespace sends by some interfaces, as a host of
/// containers does.
///
/// # Errors
/// As [`masquerade`].
pub fn masquerade_by(interfaces: &[&str]) -> io::Result<()> {
    let sent_by = |interface: &&str| {
        // The kernel compares with the zero byte at the end, as its interface names have one.
        let name = [interface.as_bytes(), &[0]].concat();
        vec![
            Expressions::Meta(vec![Meta::Key(MetaKey::Oifname), Meta::DestinationRegister(Register::Reg1)]),
            Expressions::Cmp(vec![
                Cmp::SourceRegister(Register::Reg1),
                Cmp::Op(Operator::Equal),
                Cmp::Data(DataAttribute::Value(name)),
            ]),
        ]
    };
    masquerade_where(&interfaces.iter().map(sent_by).collect::<Vec<_>>())
}

/// Adds a rule for each list of matches.
fn masquerade_where(matches: &[Vec<Expressions>]) -> io::Result<()> {
    let table = || "lab".to_owned();
    let chain = || "postrouting".to_owned();
    let new_table = TableMessage { attributes: vec![TableAttribute::Name(table())] };
    let new_chain = ChainMessage {
        attributes: vec![
            ChainAttribute::Table(table()),
            ChainAttribute::Name(chain()),
            ChainAttribute::Hook(vec![Hook::Number(InetHookNumber::PostRouting.into()), Hook::Priority(SOURCE_NAT)]),
            ChainAttribute::Type("nat".to_owned()),
        ],
    };
    let masquerade = Expressions::Other { expression_type: "masq".to_owned(), attributes: Vec::new() };
    let new_rule = |matches: &Vec<Expressions>| {
        let expressions = matches.iter().chain([&masquerade]).cloned().map(Into::into).collect();
        let attributes =
            vec![RuleAttribute::Table(table()), RuleAttribute::Chain(chain()), RuleAttribute::Expressions(expressions)];
        (NfTablesMessage::NewRule(RuleMessage { attributes }), NLM_F_CREATE | NLM_F_APPEND | NLM_F_ACK)
    };
    let mut messages = vec![
        (NfTablesMessage::NewTable(new_table), NLM_F_CREATE | NLM_F_ACK),
        (NfTablesMessage::NewChain(new_chain), NLM_F_CREATE | NLM_F_ACK),
    ];
    messages.extend(matches.iter().map(new_rule));
    change(messages)
}

/// Adds an empty table in the calling thread's network namespace.
///
/// # Errors
/// The kernel's, if it lacks nftables.
pub fn add_table(name: &str) -> io::Result<()> {
    let table = TableMessage { attributes: vec![TableAttribute::Name(name.to_owned())] };
    change(vec![(NfTablesMessage::NewTable(table), NLM_F_CREATE | NLM_F_ACK)])
}

/// Sends one transaction for IPv4 and IPv6.
fn change(messages: Vec<(NfTablesMessage, u16)>) -> io::Result<()> {
    let inet = |message| NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Inet, 0, 0), message);
    let batch = |message| {
        let subsystem = libc::NFNL_SUBSYS_NFTABLES as u16;
        NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, subsystem), message)
    };
    let begin = (batch(ControlMessage::BatchBegin), 0);
    let end = (batch(ControlMessage::BatchEnd), 0);
    let messages = messages.into_iter().map(|(message, flags)| (inet(message), flags));
    netlink::transact(NETLINK_NETFILTER, [begin].into_iter().chain(messages).chain([end]).collect())
}
