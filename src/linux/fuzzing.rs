//! Entry points for fuzzing the parsers of kernel answers.

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::NetfilterMessage;
use netlink_packet_route::RouteNetlinkMessage;

use super::netlink::channel::{AnswerHeader, Messages, refusal};
use super::{internet_sockets, iptables, nftables, unix_sockets};

/// Parses a netlink datagram as answers about links, addresses and routes, about packet rules, and about sockets.
pub fn netlink(datagram: &[u8]) {
    unix_sockets::inspect_datagram(datagram);
    internet_sockets::inspect_datagram(datagram);
    for message in Messages(datagram) {
        let _ = AnswerHeader::of(message);
        let _ = refusal(message);
        let _ = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message);
        if let Ok(NetlinkMessage { payload: NetlinkPayload::InnerMessage(message), .. }) =
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
