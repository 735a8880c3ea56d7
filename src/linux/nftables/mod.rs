//! Packet rules in nf_tables (nft(8); the kernel's include/uapi/linux/netfilter/nf_tables.h).
//!
//! Each change of a table is one transaction, so packets never meet a part of it.

mod encoding;
mod forward_chains;

use std::fmt;
use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST};
use netlink_packet_netfilter::nftables::{NfTablesMessage, RuleAttribute, RuleMessage, TableAttribute, TableMessage};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::linux::netlink::channel::Channel;
use crate::ruleset::Table;

pub use forward_chains::DroppingChain;
#[cfg(any(test, fuzzing))]
pub(super) use forward_chains::inspect_answer;

/// The verdicts of a policy or a rule (`NF_DROP` and `NF_ACCEPT` of linux/netfilter.h).
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;

/// A netlink socket for the packet rules of the network namespace in which it was opened.
pub struct Nftables {
    channel: Channel,
}

impl fmt::Debug for Nftables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nftables").finish_non_exhaustive()
    }
}

/// Returns whether an error means that the kernel lacks nf_tables or one of its modules.
pub fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP | libc::EAFNOSUPPORT | libc::ENOENT))
}

impl Nftables {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Fails as socket(2) and bind(2) do.
    pub fn open() -> io::Result<Self> {
        Ok(Self { channel: Channel::open(NETLINK_NETFILTER)? })
    }

    /// Creates a table with a comment.
    ///
    /// # Errors
    /// Fails with `EEXIST` if the table exists, and with the errors of [`is_missing`].
    pub fn create(&mut self, table: &Table, comment: &str) -> io::Result<()> {
        self.change(encoding::create(table, comment))
    }

    /// Creates a table with a comment, in place of a table of that name if there is one.
    ///
    /// # Errors
    /// Fails with the errors of [`is_missing`].
    pub fn replace(&mut self, table: &Table, comment: &str) -> io::Result<()> {
        // Deleting fails if the table does not exist, so the transaction creates it first.
        let mut messages = vec![
            (NfTablesMessage::NewTable(named(&table.name)), NLM_F_CREATE),
            (NfTablesMessage::DeleteTable(named(&table.name)), 0),
        ];
        messages.extend(encoding::create(table, comment));
        self.change(messages)
    }

    /// Removes a table with its chains and rules.
    ///
    /// # Errors
    /// Fails with `ENOENT` if there is no such table.
    pub fn delete(&mut self, name: &str) -> io::Result<()> {
        self.change(vec![(NfTablesMessage::DeleteTable(named(name)), 0)])
    }

    /// Returns the comment of a table, or none if the table has no comment.
    ///
    /// # Errors
    /// Fails with `ENOENT` if there is no such table.
    pub fn comment(&mut self, name: &str) -> io::Result<Option<String>> {
        let request = inet(NfTablesMessage::GetTable(named(name)));
        let answers = self.channel.ask(request, NLM_F_REQUEST | NLM_F_ACK)?;
        Ok(answers.into_iter().find_map(|answer| match answer.inner {
            NetfilterMessageInner::NfTables(NfTablesMessage::NewTable(table)) => encoding::comment_of(&table),
            _ => None,
        }))
    }

    /// Returns the number of rules in a table.
    ///
    /// # Errors
    /// Fails with `ENOENT` if there is no such table.
    pub fn count_rules(&mut self, table: &str) -> io::Result<usize> {
        let of_table = RuleMessage { attributes: vec![RuleAttribute::Table(table.to_owned())] };
        let answers = self.channel.ask(inet(NfTablesMessage::GetRule(of_table)), NLM_F_REQUEST | NLM_F_DUMP)?;
        // Older kernels return the rules of all tables.
        let is_one = |answer: &NetfilterMessage| match &answer.inner {
            NetfilterMessageInner::NfTables(NfTablesMessage::NewRule(rule)) => table_of(rule) == Some(table),
            _ => false,
        };
        Ok(answers.iter().filter(|answer| is_one(answer)).count())
    }

    /// Applies messages in one transaction.
    fn change(&mut self, messages: Vec<(NfTablesMessage, u16)>) -> io::Result<()> {
        let control = |message| {
            let subsystem = libc::NFNL_SUBSYS_NFTABLES as u16;
            NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, subsystem), message)
        };
        let mut batch = Vec::new();
        self.channel.append(&mut batch, control(ControlMessage::BatchBegin), NLM_F_REQUEST);
        let (first, count) = (self.channel.next_sequence(), messages.len());
        for (place, (message, flags)) in (1..).zip(messages) {
            // The kernel reports all errors, but success only if asked. The socket's buffer has no room for the
            // acknowledgements of a large table, so only the last message asks for one.
            let acknowledge = if place == count { NLM_F_ACK } else { 0 };
            self.channel.append(&mut batch, inet(message), flags | NLM_F_REQUEST | acknowledge);
        }
        self.channel.append(&mut batch, control(ControlMessage::BatchEnd), NLM_F_REQUEST);
        self.channel.send(&batch)?;
        self.channel.collect_first_error(first, count)
    }
}

fn named(table: &str) -> TableMessage {
    TableMessage { attributes: vec![TableAttribute::Name(table.to_owned())] }
}

fn inet(message: NfTablesMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Inet, 0, 0), message)
}

/// Returns the table of a rule.
fn table_of(rule: &RuleMessage) -> Option<&str> {
    rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Table(table) => Some(&**table),
        _ => None,
    })
}
