//! The parsers of what the kernel answers, under a fuzzer.

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::NetfilterMessage;
use netlink_packet_route::RouteNetlinkMessage;

use super::{iptables, netlink, nftables};

/// Reads a datagram of netlink as answers of the kernel's about links, addresses and routes, and about its rules for packets.
pub fn netlink(datagram: &[u8]) {
    for message in netlink::channel::Messages(datagram) {
        let _ = netlink::channel::Header::of(message);
        let _ = netlink::channel::refusal(message);
        let _ = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message);
        if let Ok(NetlinkMessage { payload: NetlinkPayload::InnerMessage(message), .. }) =
            NetlinkMessage::<NetfilterMessage>::deserialize(message)
        {
            nftables::look_at(message);
        }
    }
}

/// Reads a table of iptables', the first byte of which says whether it is one of IPv6 and where a chain's policy is.
pub fn iptables(input: &[u8]) {
    let Some((first, entries)) = input.split_first() else { return };
    iptables::look_at(first & 1 == 1, entries, usize::from(first / 2) * 8);
}
