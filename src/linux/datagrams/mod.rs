//! Many datagrams in one system call: `sendmmsg(2)` and `recvmmsg(2)`, with segmentation offload (`UDP_SEGMENT`,
//! `UDP_GRO`: udp(7)), where one message carries up to 64 datagrams of the same size.
//!
//! - `outbox`: datagrams to send. `inbox`: room for those that are received.
//! - `name`: the addresses of sockets, as the kernel takes them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::io::Errno;

mod inbox;
mod name;
mod outbox;

#[cfg(test)]
pub(crate) mod forced;
#[cfg(test)]
mod tests;

pub use self::inbox::{Inbox, ReceivedMessage};
pub use self::outbox::{Outbox, Unsent};

/// Room for two control messages with a number each.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL]);

/// The room that a control message with a number of type int takes: its header and the number, aligned.
const CONTROL_MESSAGE: usize = 24;

const CONTROL: usize = 2 * CONTROL_MESSAGE;

/// The congestion bits of a datagram's IP header (RFC 3168 section 5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ecn(u8);

impl Ecn {
    /// The transport does not know congestion bits.
    pub const NOT_CAPABLE: Self = Self(0);

    /// Takes the bits of a header's byte, which has DSCP as well.
    pub fn of(traffic_class: u8) -> Self {
        Self(traffic_class & 3)
    }

    /// Returns the two bits.
    pub fn bits(self) -> u8 {
        self.0
    }
}

/// Sets whether the kernel joins datagrams of a flow that arrive together.
///
/// # Errors
/// Fails with `ENOPROTOOPT` before Linux 5.0.
pub fn set_joined_receive(socket: impl AsFd, is_on: bool) -> io::Result<()> {
    switch(socket.as_fd(), libc::SOL_UDP, libc::UDP_GRO, is_on)
}

/// Has the kernel report the congestion bits of received datagrams (`IP_RECVTOS` of ip(7), `IPV6_RECVTCLASS` of
/// RFC 3542 section 6.5).
///
/// # Errors
/// Fails as setsockopt(2) does.
pub fn set_received_ecn(socket: impl AsFd, is_ipv6: bool) -> io::Result<()> {
    let (level, option) = match is_ipv6 {
        true => (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
        false => (libc::IPPROTO_IP, libc::IP_RECVTOS),
    };
    switch(socket.as_fd(), level, option, true)
}

fn switch(socket: BorrowedFd<'_>, level: libc::c_int, option: libc::c_int, is_on: bool) -> io::Result<()> {
    let on = libc::c_int::from(is_on);
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option is a number, which lives until the call returns.
    let set = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), length) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}
