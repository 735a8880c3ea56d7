//! Addresses of network interfaces (rtnetlink(7)).

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};

use super::route::family_of;
use super::{Netlink, NetlinkRequest};

impl Netlink {
    /// Returns all addresses, each with the index of its interface.
    ///
    /// # Errors
    /// Fails if the kernel refuses the request.
    pub fn addresses(&mut self) -> io::Result<Vec<(u32, IpNet)>> {
        let answers = self.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
        let address = |answer| match answer {
            RouteNetlinkMessage::NewAddress(message) => parse(&message),
            _ => None,
        };
        Ok(answers.into_iter().filter_map(address).collect())
    }
}

fn parse(message: &AddressMessage) -> Option<(u32, IpNet)> {
    let mut found: Option<IpAddr> = None;
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point link, IFA_ADDRESS is the address of the other end, so IFA_LOCAL takes precedence.
            AddressAttribute::Local(address) => found = Some(*address),
            AddressAttribute::Address(address) if found.is_none() => found = Some(*address),
            _ => {}
        }
    }
    Some((message.header.index, IpNet::new(found?, message.header.prefix_len).ok()?))
}

/// Builds the message that names an address.
///
/// rtnetlink's `AddressMessageBuilder` would add a broadcast address, and has no setter for `IFA_F_NODAD`.
fn message(index: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = address.prefix_len();
    message.header.family = family_of(address.addr());
    if address.addr().is_ipv6() {
        // No other host on these links can have the address, and duplicate address detection takes a second
        // (RFC 4862 section 5.4).
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    } else {
        message.attributes.push(AddressAttribute::Local(address.addr()));
    }
    message.attributes.push(AddressAttribute::Address(address.addr()));
    message
}

impl NetlinkRequest {
    /// Adds an address to an interface. An IPv6 address is usable at once, without duplicate address detection.
    pub fn add_address(index: u32, name: &str, address: IpNet) -> Self {
        let what = format!("add the address {address} to {name}");
        Self::create(what, RouteNetlinkMessage::NewAddress(message(index, address)))
    }

    /// Removes an address from an interface, unless it is gone already.
    pub fn delete_address(index: u32, name: &str, address: IpNet) -> Self {
        let what = format!("remove the address {address} from {name}");
        Self::remove(what, RouteNetlinkMessage::DelAddress(message(index, address)), &[libc::EADDRNOTAVAIL])
    }
}
