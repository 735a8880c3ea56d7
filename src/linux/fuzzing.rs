//! Entry points for fuzzing the parsers of kernel answers.

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::NetfilterMessage;
use netlink_packet_route::RouteNetlinkMessage;

use super::netlink::channel::{AnswerHeader, Messages, refusal};
use super::{internet_sockets, iptables, nftables, unix_sockets};

/// The kinds of answers that are read (`enum nf_tables_msg_types` of linux/netfilter/nf_tables.h).
const NFT_MSG_NEWTABLE: u16 = libc::NFT_MSG_NEWTABLE as u16;
const NFT_MSG_NEWCHAIN: u16 = libc::NFT_MSG_NEWCHAIN as u16;

/// Parses a netlink datagram as answers about links, addresses and routes, about packet rules, and about sockets.
///
/// Of the answers about packet rules, those about tables and chains. `netlink-packet-netfilter` 0.4 takes for granted
/// that an attribute within a rule, a set or an element has a header (`NlaBuffer::new`), and panics where it has none.
/// The kernel sends no such answer, and a fuzzer would find nothing else.
pub fn netlink(datagram: &[u8]) {
    unix_sockets::inspect_datagram(datagram);
    internet_sockets::inspect_datagram(datagram);
    for message in Messages(datagram) {
        let header = AnswerHeader::of(message);
        let _ = refusal(message);
        let _ = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message);
        if [NFT_MSG_NEWTABLE, NFT_MSG_NEWCHAIN].contains(&(header.kind & 0xff))
            && let Ok(NetlinkMessage { payload: NetlinkPayload::InnerMessage(message), .. }) =
                NetlinkMessage::<NetfilterMessage>::deserialize(message)
        {
            nftables::inspect_answer(message);
        }
    }
}

/// Parses an iptables table. The lowest bit of the first byte selects IPv6, the others the offset of a chain's policy.
pub fn iptables(input: &[u8]) {
    let Some((first, entries)) = input.split_first() else { return };
    iptables::inspect_table(first & 1 == 1, entries, usize::from(first / 2) * 8);
}
