//! The older tables of rules, which iptables-legacy(8) makes and nf_tables does not show (the kernel's
//! include/uapi/linux/netfilter_ipv4/ip_tables.h and netfilter_ipv6/ip6_tables.h). They are looked at, and never changed.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// `IPT_SO_GET_INFO` and `IPT_SO_GET_ENTRIES`, which are the same for IPv6.
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;

/// The bytes of a table's and of an interface's name.
const TABLE_NAME: usize = 32;
const INTERFACE_NAME: usize = 16;

/// Where `struct ipt_getinfo` has the policy of a chain: the offsets in bytes of the rules that decide last, by the numbers of the hooks;
/// and the size of all rules.
const UNDERFLOW: usize = TABLE_NAME + 4 + 5 * 4;
const NF_INET_FORWARD: usize = 2;
const SIZE: usize = UNDERFLOW + 5 * 4 + 4;
const INFO: usize = SIZE + 4;

/// Where `struct ipt_get_entries` has the rules.
const ENTRIES: usize = 40;

/// Where a target has its verdict (`struct xt_standard_target`), and the one that drops.
const VERDICT: usize = 32;
const DROP: i32 = -1;

/// Where the parts of a rule are that are looked at: of `struct ipt_entry` and of `struct ip6t_entry`.
struct Layout {
    level: libc::c_int,
    family: AddressFamily,
    /// The names of the interfaces that a packet comes in and leaves by, then their masks.
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

/// What a table does with what is forwarded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForwardChain {
    /// Whether its chain drops what no rule of it lets pass.
    pub drops: bool,
    /// The interfaces that its rules tell apart. One that ends with `*` stands for all names that begin so.
    pub interfaces: Vec<String>,
}

/// Looks at the table `filter` of the calling thread's network namespace, of IPv4 or IPv6.
///
/// # Errors
/// `EPERM` without CAP_NET_ADMIN; `ENOENT` or `ENOPROTOOPT` if there is no such table.
pub fn forward_chain(ipv6: bool) -> io::Result<ForwardChain> {
    let layout = if ipv6 { &IPV6 } else { &IPV4 };
    let socket = rustix::net::socket_with(layout.family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(io::Error::from)?;
    let mut info = vec![0; INFO];
    info[..6].copy_from_slice(b"filter");
    get(&socket, layout.level, GET_INFO, &mut info)?;
    let (policy, size) = (number(&info, UNDERFLOW + 4 * NF_INET_FORWARD)?, number(&info, SIZE)?);
    let mut entries = vec![0; ENTRIES + size];
    entries[..6].copy_from_slice(b"filter");
    entries[TABLE_NAME..TABLE_NAME + 4].copy_from_slice(&(size as u32).to_ne_bytes());
    get(&socket, layout.level, GET_ENTRIES, &mut entries)?;
    read(layout, &entries[ENTRIES..], policy)
}

/// Reads a table, for a fuzzer.
#[cfg(any(test, fuzzing))]
pub(super) fn look_at(ipv6: bool, entries: &[u8], policy: usize) {
    let _ = read(if ipv6 { &IPV6 } else { &IPV4 }, entries, policy);
}

fn read(layout: &Layout, entries: &[u8], policy: usize) -> io::Result<ForwardChain> {
    let mut found = ForwardChain::default();
    let mut at = 0;
    while at < entries.len() {
        let entry = &entries[at..];
        for which in 0..2 {
            let name = layout.interfaces + which * INTERFACE_NAME;
            let mask = name + 2 * INTERFACE_NAME;
            let part = |begin: usize| entry.get(begin..begin + INTERFACE_NAME).ok_or_else(malformed);
            found.interfaces.extend(interface_of(part(name)?, part(mask)?));
        }
        if at == policy {
            let target = short(entry, layout.target_offset)?;
            found.drops = number(entry, target + VERDICT)? as u32 as i32 == DROP;
        }
        match short(entry, layout.next_offset)? {
            0 => return Err(malformed()),
            length => at += length,
        }
    }
    Ok(found)
}

/// The name of an interface that a rule is about, of which the mask says which bytes count: the terminating zero only where the name is
/// whole.
fn interface_of(name: &[u8], mask: &[u8]) -> Option<String> {
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    let text = str::from_utf8(&name[..end]).ok().filter(|text| !text.is_empty())?;
    let is_whole = mask.get(end).is_none_or(|counts| *counts != 0);
    Some(if is_whole { text.to_owned() } else { format!("{text}*") })
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel's table is not as expected")
}

fn number(bytes: &[u8], at: usize) -> io::Result<usize> {
    let four = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).ok_or_else(malformed)?;
    usize::try_from(u32::from_ne_bytes(four)).map_err(|_| malformed())
}

fn short(bytes: &[u8], at: usize) -> io::Result<usize> {
    let two = bytes.get(at..at + 2).and_then(|bytes| bytes.try_into().ok()).ok_or_else(malformed)?;
    Ok(u16::from_ne_bytes(two).into())
}

fn get(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, buffer: &mut [u8]) -> io::Result<()> {
    let mut length = libc::socklen_t::try_from(buffer.len()).map_err(|_| malformed())?;
    // SAFETY: the kernel writes at most `length` bytes, which the buffer has, and reads the name and the size at its beginning.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, buffer.as_mut_ptr().cast(), &raw mut length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
