//! A socket filter that keeps a monitor from hearing of other tunnels' links.

use libc::sock_filter;

use crate::linux::bpf::{self, Instruction};

/// The messages that the filter knows (linux/rtnetlink.h).
const ADDRESS_MESSAGES: [u16; 2] = [libc::RTM_NEWADDR, libc::RTM_DELADDR];
const ROUTE_MESSAGES: [u16; 2] = [libc::RTM_NEWROUTE, libc::RTM_DELROUTE];
const RTM_NEWNETCONF: u16 = 80;
const RTM_DELNETCONF: u16 = 81;

/// The offsets of fields in a message: the type of `struct nlmsghdr` (linux/netlink.h), the fields of the families'
/// own headers (`struct ifaddrmsg`, `struct rtmsg`), and the first attributes after these (`struct netconfmsg` has
/// one byte).
const MESSAGE_TYPE: u32 = 4;
const ADDRESS_FAMILY_AND_LENGTH: u32 = 16;
const ADDRESS_INTERFACE: u32 = 20;
const ROUTE_PROTOCOL: u32 = 21;
const ROUTE_ATTRIBUTES: u32 = 28;
const NETCONF_ATTRIBUTES: u32 = 20;

/// The length of an attribute's header (`struct nlattr`).
const ATTRIBUTE_HEADER: u32 = 4;

/// The attributes of the forwarding switches' messages (linux/netconf.h).
const NETCONFA_IFINDEX: u32 = 1;
const NETCONFA_PROXY_NEIGH: u32 = 5;

/// The place at which a filter finds an attribute: the offset of the attribute whose kind is in the index register, at
/// or after the loaded offset; 0 if there is none.
const FIND_ATTRIBUTE: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_NLATTR) as u32;

/// The interfaces that a monitor is not to hear of, by their indexes.
///
/// A message is dropped only if it is one of those that the kernel sends when such an interface appears or vanishes as
/// one end of a point-to-point link with two addresses: an address with a prefix of 31 bits (IPv4) or 127 bits (IPv6),
/// the routes that the kernel makes for these, and all forwarding switches at once. So if another interface has such an
/// index, its other addresses, its configured routes and changes of its switches are still reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IgnoredLinks {
    /// The bits of an index that decide.
    pub mask: u32,
    /// The value of these bits.
    pub value: u32,
    /// An index that is reported nevertheless.
    pub except: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Label {
    Address,
    AddressInterface,
    Route,
    Switches,
    EndOfSwitches,
    Index,
    Pass,
}

impl IgnoredLinks {
    /// Returns the socket filter that drops the messages about these interfaces.
    pub(super) fn program(self) -> Vec<sock_filter> {
        use Instruction::{
            IfEqual, Jump, Load, LoadByte, LoadHalf, LoadIndexed, LoadNumber, Mask, MoveToIndex, Return, SetIndex,
            Unless,
        };

        let find = |attribute: u32, from: u32| {
            [LoadNumber(from), SetIndex(attribute), Load(FIND_ATTRIBUTE), IfEqual(0, Label::Pass)]
        };
        let mut program = vec![LoadHalf(MESSAGE_TYPE)];
        program.extend(ADDRESS_MESSAGES.map(|kind| IfEqual(half(kind), Label::Address)));
        program.extend(ROUTE_MESSAGES.map(|kind| IfEqual(half(kind), Label::Route)));
        program.extend([
            IfEqual(half(RTM_NEWNETCONF), Label::Switches),
            IfEqual(half(RTM_DELNETCONF), Label::EndOfSwitches),
            Jump(Label::Pass),
            Instruction::Label(Label::Address),
            LoadHalf(ADDRESS_FAMILY_AND_LENGTH),
            IfEqual(family_and_length(libc::AF_INET, 31), Label::AddressInterface),
            Unless(family_and_length(libc::AF_INET6, 127), Label::Pass),
            Instruction::Label(Label::AddressInterface),
            Load(ADDRESS_INTERFACE),
            Jump(Label::Index),
            Instruction::Label(Label::Route),
            LoadByte(ROUTE_PROTOCOL),
            Unless(libc::RTPROT_KERNEL.into(), Label::Pass),
        ]);
        program.extend(find(libc::RTA_OIF.into(), ROUTE_ATTRIBUTES));
        program.extend([
            MoveToIndex,
            LoadIndexed(ATTRIBUTE_HEADER),
            Jump(Label::Index),
            // A change of one switch has that alone.
            Instruction::Label(Label::Switches),
        ]);
        program.extend(find(NETCONFA_PROXY_NEIGH, NETCONF_ATTRIBUTES));
        program.push(Instruction::Label(Label::EndOfSwitches));
        program.extend(find(NETCONFA_IFINDEX, NETCONF_ATTRIBUTES));
        program.extend([MoveToIndex, LoadIndexed(ATTRIBUTE_HEADER), Instruction::Label(Label::Index)]);
        program.extend(self.except.map(|index| IfEqual(word(index), Label::Pass)));
        program.extend([
            Mask(word(self.mask)),
            Unless(word(self.value), Label::Pass),
            Return(0),
            Instruction::Label(Label::Pass),
            Return(u32::MAX),
        ]);
        bpf::assemble(&program)
    }
}

/// Returns a field of a message as a filter loads it: highest byte first.
fn half(value: u16) -> u32 {
    u16::from_be_bytes(value.to_ne_bytes()).into()
}

/// As [`half`].
fn word(value: u32) -> u32 {
    u32::from_be_bytes(value.to_ne_bytes())
}

/// Returns two adjacent bytes of a message about an address, as a filter loads them.
const fn family_and_length(family: libc::c_int, length: u32) -> u32 {
    (family as u32) << 8 | length
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    const IGNORED: IgnoredLinks = IgnoredLinks { mask: 0xff00_0000, value: 0x5600_0000, except: Some(OWN) };
    const OTHER: u32 = 0x56ec_d11c;
    const OWN: u32 = 0x56ec_d11e;
    const ETH0: u32 = 2;

    /// Returns a message: the header of `struct nlmsghdr`, the family's own header, and 32-bit attributes.
    fn message(kind: u16, own_header: &[u8], attributes: &[(u32, u32)]) -> Vec<u8> {
        let mut bytes = vec![0; 16];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes.extend(own_header);
        for (kind, value) in attributes {
            bytes.extend(8_u16.to_ne_bytes());
            bytes.extend((*kind as u16).to_ne_bytes());
            bytes.extend(value.to_ne_bytes());
        }
        let length = bytes.len() as u32;
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes
    }

    fn address(kind: u16, family: libc::c_int, length: u8, index: u32) -> Vec<u8> {
        let [a, b, c, d] = index.to_ne_bytes();
        message(kind, &[family as u8, length, 0, 0, a, b, c, d], &[(u32::from(libc::IFA_ADDRESS), 1)])
    }

    fn route(kind: u16, protocol: u8, index: Option<u32>) -> Vec<u8> {
        let header = [libc::AF_INET as u8, 31, 0, 0, 254, protocol, 0, 1, 0, 0, 0, 0];
        let interface = index.map(|index| (u32::from(libc::RTA_OIF), index));
        let attributes: Vec<_> = [(u32::from(libc::RTA_DST), OTHER)].into_iter().chain(interface).collect();
        message(kind, &header, &attributes)
    }

    fn switches(kind: u16, index: u32, which: &[u32]) -> Vec<u8> {
        let all = [(NETCONFA_IFINDEX, index)].into_iter().chain(which.iter().map(|switch| (*switch, 0)));
        message(kind, &[libc::AF_INET6 as u8, 0, 0, 0], &all.collect::<Vec<_>>())
    }

    /// Returns whether a message passes the filter, as the kernel runs it.
    fn passes(filter: IgnoredLinks, message: &[u8]) -> bool {
        let (sender, receiver) = UnixDatagram::pair().expect("sockets");
        bpf::attach(receiver.as_fd(), &filter.program()).expect("a filter");
        receiver.set_nonblocking(true).expect("a socket");
        sender.send(message).expect("a filter drops silently");
        let mut buffer = [0; 256];
        receiver.recv(&mut buffer).is_ok_and(|length| &buffer[..length] == message)
    }

    #[test]
    fn messages_about_the_links_of_others_are_dropped() {
        let boot = libc::RTPROT_BOOT;
        for (what, is_dropped, message) in [
            ("a new IPv4 address", true, address(libc::RTM_NEWADDR, libc::AF_INET, 31, OTHER)),
            ("a removed IPv4 address", true, address(libc::RTM_DELADDR, libc::AF_INET, 31, OTHER)),
            ("a new IPv6 address", true, address(libc::RTM_NEWADDR, libc::AF_INET6, 127, OTHER)),
            ("the kernel's route", true, route(libc::RTM_NEWROUTE, libc::RTPROT_KERNEL, Some(OTHER))),
            ("the kernel's removed route", true, route(libc::RTM_DELROUTE, libc::RTPROT_KERNEL, Some(OTHER))),
            ("all switches of a new interface", true, switches(RTM_NEWNETCONF, OTHER, &[2, 4, 5, 6])),
            ("all switches of a removed interface", true, switches(RTM_DELNETCONF, OTHER, &[])),
            // If such an index is that of another interface.
            ("another address", false, address(libc::RTM_NEWADDR, libc::AF_INET, 24, OTHER)),
            ("another IPv6 address", false, address(libc::RTM_NEWADDR, libc::AF_INET6, 64, OTHER)),
            ("an IPv6 address of 31 bits", false, address(libc::RTM_NEWADDR, libc::AF_INET6, 31, OTHER)),
            ("a configured route", false, route(libc::RTM_NEWROUTE, boot, Some(OTHER))),
            ("a removed configured route", false, route(libc::RTM_DELROUTE, boot, Some(OTHER))),
            ("a changed switch", false, switches(RTM_NEWNETCONF, OTHER, &[2])),
            // Other interfaces.
            ("an address of eth0", false, address(libc::RTM_NEWADDR, libc::AF_INET, 31, ETH0)),
            ("a route of eth0", false, route(libc::RTM_NEWROUTE, libc::RTPROT_KERNEL, Some(ETH0))),
            ("a route of several interfaces", false, route(libc::RTM_NEWROUTE, libc::RTPROT_KERNEL, None)),
            ("the switches of eth0", false, switches(RTM_NEWNETCONF, ETH0, &[2, 4, 5, 6])),
            ("the switches of a removed eth0", false, switches(RTM_DELNETCONF, ETH0, &[])),
            ("the switch of all interfaces", false, switches(RTM_NEWNETCONF, u32::MAX, &[2])),
            // The keeper's own link.
            ("an own address", false, address(libc::RTM_NEWADDR, libc::AF_INET, 31, OWN)),
            ("an own route", false, route(libc::RTM_DELROUTE, libc::RTPROT_KERNEL, Some(OWN))),
            ("the own switches", false, switches(RTM_NEWNETCONF, OWN, &[2, 4, 5, 6])),
            // What the filter does not know.
            ("a message about a link", false, address(libc::RTM_NEWLINK, libc::AF_INET, 31, OTHER)),
        ] {
            assert_eq!(passes(IGNORED, &message), !is_dropped, "{what}");
        }
        let own = address(libc::RTM_NEWADDR, libc::AF_INET, 31, OWN);
        assert!(!passes(IgnoredLinks { except: None, ..IGNORED }, &own), "a keeper without a link of its own");
    }
}
