//! Policy rules: which routing table the kernel looks a packet's route up in (ip-rule(8), rtnetlink(7)).

use std::fmt::{self, Display, Formatter};
use std::io;

use ipnet::IpNet;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use serde::{Deserialize, Serialize};

use super::route::in_each_family;
use super::{Netlink, NetlinkRequest};
use crate::ruleset::Family;

/// A rule that looks up the route of some packets in a routing table. If the table has no route for a packet, the rule
/// of the next priority decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRule {
    /// The family of the packets.
    pub family: Family,
    /// The place among all rules. Lower numbers come first.
    pub priority: u32,
    /// The packets.
    pub selector: Selector,
    /// The number of the routing table.
    pub table: u32,
}

/// The packets to which a policy rule applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selector {
    /// All packets.
    All,
    /// Packets for which the table has another route than the default one.
    NotByDefault,
    /// Packets with a mark (`SO_MARK` of socket(7)).
    Mark(u32),
    /// Packets from a network.
    From(IpNet),
    /// Packets to a network.
    To(IpNet),
}

impl Display for PolicyRule {
    /// Displays the rule as ip-rule(8) expects it after "ip rule add", with the numbers of tables.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "priority {} ", self.priority)?;
        match self.selector {
            Selector::All | Selector::NotByDefault => {}
            Selector::Mark(mark) => write!(f, "fwmark {mark:#x} ")?,
            Selector::From(net) => write!(f, "from {net} ")?,
            Selector::To(net) => write!(f, "to {net} ")?,
        }
        write!(f, "lookup {}", self.table)?;
        if self.selector == Selector::NotByDefault { f.write_str(" suppress_prefixlength 0") } else { Ok(()) }
    }
}

impl PolicyRule {
    fn message(&self) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = match self.family {
            Family::Ipv4 => AddressFamily::Inet,
            Family::Ipv6 => AddressFamily::Inet6,
        };
        message.header.action = RuleAction::ToTable;
        message.attributes.push(RuleAttribute::Priority(self.priority));
        message.attributes.push(RuleAttribute::Table(self.table));
        match self.selector {
            Selector::All => {}
            Selector::NotByDefault => message.attributes.push(RuleAttribute::SuppressPrefixLen(0)),
            Selector::Mark(mark) => {
                message.attributes.extend([RuleAttribute::FwMark(mark), RuleAttribute::FwMask(u32::MAX)]);
            }
            Selector::From(net) => {
                message.header.src_len = net.prefix_len();
                message.attributes.push(RuleAttribute::Source(net.network()));
            }
            Selector::To(net) => {
                message.header.dst_len = net.prefix_len();
                message.attributes.push(RuleAttribute::Destination(net.network()));
            }
        }
        message
    }

    fn what(&self, verb: &str) -> String {
        let family = match self.family {
            Family::Ipv4 => "IPv4",
            Family::Ipv6 => "IPv6",
        };
        format!("{verb} the {family} policy rule \"{self}\"")
    }
}

/// Returns the rule of a message, or none if the rule has other selectors or actions than a [`PolicyRule`].
fn parse(message: &RuleMessage) -> Option<PolicyRule> {
    let header = &message.header;
    let family = match header.family {
        AddressFamily::Inet => Family::Ipv4,
        AddressFamily::Inet6 => Family::Ipv6,
        _ => return None,
    };
    if header.action != RuleAction::ToTable || header.tos != 0 || header.flags.contains(RuleFlags::Invert) {
        return None;
    }
    let mut rule = PolicyRule { family, priority: 0, selector: Selector::All, table: header.table.into() };
    let mut selectors = 0;
    let mut select = |selector| {
        selectors += 1;
        rule.selector = selector;
    };
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Table(table) => rule.table = *table,
            RuleAttribute::FwMark(mark) => select(Selector::Mark(*mark)),
            RuleAttribute::Source(source) => select(Selector::From(IpNet::new(*source, header.src_len).ok()?)),
            RuleAttribute::Destination(to) => select(Selector::To(IpNet::new(*to, header.dst_len).ok()?)),
            RuleAttribute::SuppressPrefixLen(0) => select(Selector::NotByDefault),
            // The kernel always reports these. All bits set means that the feature is not used.
            RuleAttribute::Protocol(_) | RuleAttribute::FwMask(u32::MAX) => {}
            RuleAttribute::SuppressPrefixLen(u32::MAX) | RuleAttribute::SuppressIfGroup(u32::MAX) => {}
            _ => return None,
        }
    }
    (selectors <= 1).then_some(rule)
}

impl Netlink {
    /// Returns the policy rules of both families in the order of their evaluation, those of IPv4 first. Rules of other
    /// kinds than [`PolicyRule`] are left out.
    ///
    /// # Errors
    /// Fails if the kernel refuses the request.
    pub fn policy_rules(&mut self) -> io::Result<Vec<PolicyRule>> {
        in_each_family(|family| {
            let mut message = RuleMessage::default();
            message.header.family = family;
            let answers = self.dump(RouteNetlinkMessage::GetRule(message))?;
            let rule = |answer| match answer {
                RouteNetlinkMessage::NewRule(message) => parse(&message),
                _ => None,
            };
            Ok(answers.into_iter().filter_map(rule).collect())
        })
    }
}

impl NetlinkRequest {
    /// Adds a policy rule. A rule that exists already counts as success and is not added twice.
    pub fn add_rule(rule: &PolicyRule) -> Self {
        Self::create(rule.what("add"), RouteNetlinkMessage::NewRule(rule.message())).or_exists()
    }

    /// Removes a policy rule, unless it is gone already.
    ///
    /// The kernel removes the first rule that has all properties of the request, and a rule for all packets has no
    /// selector to compare. So the priority of such a rule must be its own.
    pub fn delete_rule(rule: &PolicyRule) -> Self {
        Self::remove(rule.what("remove"), RouteNetlinkMessage::DelRule(rule.message()), &[libc::ENOENT])
    }
}
