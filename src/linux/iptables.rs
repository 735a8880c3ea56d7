//! The tables of iptables-legacy(8), which nf_tables does not show. They are only read.
//!
//! The layout is that of the kernel's include/uapi/linux/netfilter_ipv4/ip_tables.h and netfilter_ipv6/ip6_tables.h.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// `IPT_SO_GET_INFO` and `IPT_SO_GET_ENTRIES`, which have the same numbers for IPv6.
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;

/// The sizes of the names of tables and interfaces in bytes.
const TABLE_NAME: usize = 32;
const INTERFACE_NAME: usize = 16;

/// Offsets in `struct ipt_getinfo`: the offsets of the chains' policies by hook number, and the size of all rules.
const UNDERFLOW: usize = TABLE_NAME + 4 + 5 * 4;
const NF_INET_FORWARD: usize = 2;
const SIZE: usize = UNDERFLOW + 5 * 4 + 4;
const INFO: usize = SIZE + 4;

/// The offset of the rules in `struct ipt_get_entries`.
const ENTRIES: usize = 40;

/// The offset of a target's verdict (`struct xt_standard_target`), and the verdict that drops.
const VERDICT: usize = 32;
const DROP: i32 = -1;

/// Offsets in `struct ipt_entry` or `struct ip6t_entry`.
struct Layout {
    level: libc::c_int,
    family: AddressFamily,
    /// The names of the incoming and the outgoing interface, followed by their masks.
    interfaces: usize,
    target_offset: usize,
    next_offset: usize,
}

const IPV4: Layout =
    Layout { level: libc::IPPROTO_IP, family: AddressFamily::INET, interfaces: 16, target_offset: 88, next_offset: 90 };
const IPV6: Layout = Layout {
    level: libc::IPPROTO_IPV6,
    family: AddressFamily::INET6,
    interfaces: 64,
    target_offset: 140,
    next_offset: 142,
};

/// A table's chain for forwarded packets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LegacyForwardChain {
    /// Whether its policy drops packets.
    pub drops: bool,
    /// The interfaces that the table's rules name. A name that ends with `*` is a prefix.
    pub interfaces: Vec<String>,
}

/// Reads the chain FORWARD of the table `filter` in the calling thread's network namespace.
///
/// # Errors
/// Fails with `EPERM` without CAP_NET_ADMIN, and with `ENOENT` or `ENOPROTOOPT` if there is no such table.
pub fn forward_chain(ipv6: bool) -> io::Result<LegacyForwardChain> {
    let layout = if ipv6 { &IPV6 } else { &IPV4 };
    let socket = rustix::net::socket_with(layout.family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(io::Error::from)?;
    let mut info = vec![0; INFO];
    info[..6].copy_from_slice(b"filter");
    get(&socket, layout.level, GET_INFO, &mut info)?;
    let (policy, size) = (read_u32(&info, UNDERFLOW + 4 * NF_INET_FORWARD)?, read_u32(&info, SIZE)?);
    let mut entries = vec![0; ENTRIES + size];
    entries[..6].copy_from_slice(b"filter");
    entries[TABLE_NAME..TABLE_NAME + 4].copy_from_slice(&(size as u32).to_ne_bytes());
    get(&socket, layout.level, GET_ENTRIES, &mut entries)?;
    parse(layout, &entries[ENTRIES..], policy)
}

/// Parses a table, for a fuzzer.
#[cfg(any(test, fuzzing))]
pub(super) fn inspect_table(ipv6: bool, entries: &[u8], policy: usize) {
    let _ = parse(if ipv6 { &IPV6 } else { &IPV4 }, entries, policy);
}

fn parse(layout: &Layout, entries: &[u8], policy: usize) -> io::Result<LegacyForwardChain> {
    let mut found = LegacyForwardChain::default();
    let mut at = 0;
    while at < entries.len() {
        let entry = &entries[at..];
        for which in 0..2 {
            let name = layout.interfaces + which * INTERFACE_NAME;
            let mask = name + 2 * INTERFACE_NAME;
            let part = |begin: usize| entry.get(begin..begin + INTERFACE_NAME).ok_or_else(malformed);
            found.interfaces.extend(interface_name(part(name)?, part(mask)?));
        }
        if at == policy {
            let target = read_u16(entry, layout.target_offset)?;
            found.drops = read_u32(entry, target + VERDICT)? as u32 as i32 == DROP;
        }
        match read_u16(entry, layout.next_offset)? {
            0 => return Err(malformed()),
            length => at += length,
        }
    }
    Ok(found)
}

/// Returns the interface that a rule names. The mask tells which bytes count. If the terminating NUL counts, the name
/// is complete, and otherwise it is a prefix.
fn interface_name(name: &[u8], mask: &[u8]) -> Option<String> {
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    let text = str::from_utf8(&name[..end]).ok().filter(|text| !text.is_empty())?;
    let is_complete = mask.get(end).is_none_or(|counts| *counts != 0);
    Some(if is_complete { text.to_owned() } else { format!("{text}*") })
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel's table has an unknown format")
}

fn read_u32(bytes: &[u8], at: usize) -> io::Result<usize> {
    let four = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).ok_or_else(malformed)?;
    usize::try_from(u32::from_ne_bytes(four)).map_err(|_| malformed())
}

fn read_u16(bytes: &[u8], at: usize) -> io::Result<usize> {
    let two = bytes.get(at..at + 2).and_then(|bytes| bytes.try_into().ok()).ok_or_else(malformed)?;
    Ok(u16::from_ne_bytes(two).into())
}

fn get(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, buffer: &mut [u8]) -> io::Result<()> {
    let mut length = libc::socklen_t::try_from(buffer.len()).map_err(|_| malformed())?;
    // SAFETY: the kernel reads the table's name and size at the beginning of the buffer, and writes at most `length`
    // bytes, which is its size.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, buffer.as_mut_ptr().cast(), &raw mut length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
