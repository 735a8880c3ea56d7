//! Notices when a network namespace's addresses, routes or switches of forwarding change (rtnetlink(7)), its interfaces, or its rules for
//! packets (nft(8)).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use rustix::io::Errno;
use rustix::net::RecvFlags;

/// What is listened to: RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR and RTMGRP_IPV6_ROUTE of linux/rtnetlink.h, and the
/// groups RTNLGRP_IPV4_NETCONF (24) and RTNLGRP_IPV6_NETCONF (25).
const NETWORK_GROUPS: u32 = 0x10 | 0x40 | 0x100 | 0x400 | 1 << 23 | 1 << 24;

/// RTMGRP_LINK of linux/rtnetlink.h.
const LINK_GROUPS: u32 = 1;

/// The group NFNLGRP_NFTABLES (7) of linux/netfilter/nfnetlink.h.
const RULES_GROUPS: u32 = 1 << 6;

/// Hears of every change of one kind in the namespace in which it was opened.
#[derive(Debug)]
pub struct Monitor(Socket);

impl Monitor {
    /// Begins to listen for changes of addresses, routes and forwarding, in the namespace of the calling thread.
    pub fn of_network() -> io::Result<Self> {
        Self::open(NETLINK_ROUTE, NETWORK_GROUPS)
    }

    /// Begins to listen for interfaces that come, go or change, in the namespace of the calling thread.
    pub fn of_links() -> io::Result<Self> {
        Self::open(NETLINK_ROUTE, LINK_GROUPS)
    }

    /// Begins to listen for changes of rules, in the namespace of the calling thread.
    ///
    /// # Errors
    /// `EPERM` without CAP_NET_ADMIN.
    pub fn of_rules() -> io::Result<Self> {
        Self::open(NETLINK_NETFILTER, RULES_GROUPS)
    }

    fn open(protocol: isize, groups: u32) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind(&SocketAddr::new(0, groups))?;
        socket.set_non_blocking(true)?;
        Ok(Self(socket))
    }

    /// Takes all that has come, and says whether anything had. What it was is not looked at: more may have come than there was room
    /// for.
    pub fn drain(&self) -> io::Result<bool> {
        let mut any = false;
        loop {
            match rustix::net::recv(self, &mut [0_u8; 4096][..], RecvFlags::DONTWAIT) {
                // Messages were lost, which is to say, something has changed.
                Ok(_) | Err(Errno::NOBUFS) => any = true,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(any),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Monitor {
    /// Readable when something has changed.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the socket is open for as long as this value is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}
