//! Finds the chains of other programs, such as Docker's or firewalld's, that drop or reject forwarded packets.

use std::io;

use netlink_packet_core::{DefaultNla, NLM_F_DUMP, NLM_F_REQUEST, Nla};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, Cmp, DataAttribute, ExpressionAttribute, Expressions, Hook, Immediate,
    InetHookNumber, ListAttribute, Meta, MetaKey, NfTablesMessage, RuleAttribute, RuleMessage, VerdictAttribute,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};

use super::{NF_DROP, Nftables, table_of};

/// The name of an iptables(8) target in a rule (`enum nft_target_attributes`).
const NFTA_TARGET_NAME: u16 = 1;

/// A chain that drops or rejects forwarded packets unless a rule accepts them: by its policy, or by a rule that matches
/// all packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DroppingChain {
    /// The family of its table, as nft(8) writes it.
    pub family: &'static str,
    /// The name of its table.
    pub table: String,
    /// The name of the chain.
    pub name: String,
    /// The interfaces that the rules of its table name. A name that ends with `*` is a prefix.
    pub interfaces: Vec<String>,
}

/// A chain for forwarded packets, and the reasons why it drops them.
struct ForwardChain {
    chain: DroppingChain,
    policy_drops: bool,
    rule_stops: bool,
}

impl Nftables {
    /// Returns the chains that drop or reject forwarded packets by default.
    ///
    /// # Errors
    /// Fails with `EPERM` without CAP_NET_ADMIN, and with the errors of [`super::is_missing`].
    pub fn dropping_forward_chains(&mut self) -> io::Result<Vec<DroppingChain>> {
        let all = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
        let chains = NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() });
        let answers = self.channel.ask(NetfilterMessage::new(all.clone(), chains), NLM_F_REQUEST | NLM_F_DUMP)?;
        let found = answers.into_iter().filter_map(|answer| match answer.inner {
            NetfilterMessageInner::NfTables(NfTablesMessage::NewChain(chain)) => {
                forward_chain(family_name(answer.header.family)?, chain)
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
            let Some(family) = family_name(answer.header.family) else { continue };
            let (table, chain) = (table_of(&rule), chain_of(&rule));
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
}

/// Returns a chain if its hook is `forward`. Its rules are still to be added.
fn forward_chain(family: &'static str, chain: ChainMessage) -> Option<ForwardChain> {
    let (mut table, mut name, mut forwards, mut policy_drops) = (None, None, false, false);
    for attribute in chain.attributes {
        match attribute {
            ChainAttribute::Table(text) => table = Some(text),
            ChainAttribute::Name(text) => name = Some(text),
            ChainAttribute::Policy(policy) => policy_drops = policy == NF_DROP,
            ChainAttribute::Hook(hooks) => {
                forwards = hooks.contains(&Hook::Number(InetHookNumber::Forward.into()));
            }
            _ => {}
        }
    }
    let chain = DroppingChain { family, table: table?, name: name?, interfaces: Vec::new() };
    forwards.then_some(ForwardChain { chain, policy_drops, rule_stops: false })
}

fn family_name(family: NetfilterProtoFamily) -> Option<&'static str> {
    match family {
        NetfilterProtoFamily::Inet => Some("inet"),
        NetfilterProtoFamily::IPv4 => Some("ip"),
        NetfilterProtoFamily::IPv6 => Some("ip6"),
        _ => None,
    }
}

/// Returns the chain of a rule.
fn chain_of(rule: &RuleMessage) -> Option<&str> {
    rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Chain(chain) => Some(&**chain),
        _ => None,
    })
}

/// Returns whether a rule drops or rejects all packets. It may count and log them as well.
fn stops_all(rule: &RuleMessage) -> bool {
    let mut stops = false;
    for expression in expressions_of(rule) {
        match expression {
            Expressions::Immediate(parts) => stops |= parts.iter().any(is_drop),
            Expressions::Other { expression_type, attributes } => match expression_type.as_str() {
                "counter" | "log" => {}
                "reject" => stops = true,
                // A rule of iptables-nft.
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

/// Returns the interfaces that a rule names in comparisons. Names in sets are not included.
fn interfaces_in(rule: &RuleMessage) -> Vec<String> {
    let (mut found, mut is_name) = (Vec::new(), false);
    for expression in expressions_of(rule) {
        match expression {
            Expressions::Meta(parts) => {
                let key = |part: &Meta| matches!(part, Meta::Key(MetaKey::Iifname | MetaKey::Oifname));
                is_name = parts.iter().any(key);
            }
            Expressions::Cmp(parts) if is_name => found.extend(parts.iter().filter_map(|part| match part {
                Cmp::Data(DataAttribute::Value(value)) => interface_name(value),
                _ => None,
            })),
            _ => is_name = false,
        }
    }
    found
}

/// Returns the interface name in a comparison: the reverse of [`super::encoding::interface_value`].
fn interface_name(value: &[u8]) -> Option<String> {
    let end = value.iter().position(|byte| *byte == 0);
    let name = str::from_utf8(&value[..end.unwrap_or(value.len())]).ok()?;
    Some(if end.is_some() { name.to_owned() } else { format!("{name}*") })
}

/// Inspects all that this module and [`super::encoding`] read of a table or chain, for a fuzzer.
#[cfg(any(test, fuzzing))]
pub(in crate::linux) fn inspect_answer(answer: NetfilterMessage) {
    match answer.inner {
        NetfilterMessageInner::NfTables(NfTablesMessage::NewTable(table)) => {
            let _ = super::encoding::comment_of(&table);
        }
        NetfilterMessageInner::NfTables(NfTablesMessage::NewChain(chain)) => {
            let _ = family_name(answer.header.family).and_then(|family| forward_chain(family, chain));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::super::encoding::interface_value;
    use super::*;
    use crate::ruleset::Interface;

    #[test]
    fn interface_names_are_read_as_they_are_written() {
        for (interface, text) in [(Interface::Loopback, "lo"), (Interface::Prefix("ve-".into()), "ve-*")] {
            assert_eq!(interface_name(&interface_value(&interface)).as_deref(), Some(text));
        }
        assert_eq!(interface_name(&[0xff, 0xfe]), None);
    }
}
