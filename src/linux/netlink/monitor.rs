//! Notifications of changes in a network namespace: its addresses, routes, forwarding switches, interfaces
//! (rtnetlink(7)) and packet rules (nft(8)).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::link_filter::IgnoredLinks;
use crate::linux::bpf;

/// The multicast groups for addresses, routes and forwarding switches: `RTMGRP_IPV4_IFADDR`, `RTMGRP_IPV4_ROUTE`,
/// `RTMGRP_IPV6_IFADDR` and `RTMGRP_IPV6_ROUTE` of linux/rtnetlink.h, and its groups `RTNLGRP_IPV4_NETCONF` (24) and
/// `RTNLGRP_IPV6_NETCONF` (25).
const NETWORK_GROUPS: u32 = 0x10 | 0x40 | 0x100 | 0x400 | 1 << 23 | 1 << 24;

/// The multicast groups for addresses: `RTMGRP_IPV4_IFADDR` and `RTMGRP_IPV6_IFADDR` of linux/rtnetlink.h.
const ADDRESS_GROUPS: u32 = 0x10 | 0x100;

/// The multicast group for interfaces, `RTMGRP_LINK` of linux/rtnetlink.h.
const LINK_GROUPS: u32 = 1;

/// The multicast group `NFNLGRP_NFTABLES` (7) of linux/netfilter/nfnetlink.h.
const RULES_GROUPS: u32 = 1 << 6;

/// A socket that receives a notification of every change of one kind in the namespace in which it was opened.
#[derive(Debug)]
pub struct Monitor(Socket);

impl Monitor {
    /// Monitors addresses, routes and forwarding switches in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Fails as socket(2) and bind(2) do.
    pub fn of_network() -> io::Result<Self> {
        Self::open(NETLINK_ROUTE, NETWORK_GROUPS)
    }

    /// Monitors addresses in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Fails as socket(2) and bind(2) do.
    pub fn of_addresses() -> io::Result<Self> {
        Self::open(NETLINK_ROUTE, ADDRESS_GROUPS)
    }

    /// Monitors interfaces in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Fails as socket(2) and bind(2) do.
    pub fn of_links() -> io::Result<Self> {
        Self::open(NETLINK_ROUTE, LINK_GROUPS)
    }

    /// Monitors packet rules in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Fails with `EPERM` without CAP_NET_ADMIN.
    pub fn of_rules() -> io::Result<Self> {
        Self::open(NETLINK_NETFILTER, RULES_GROUPS)
    }

    fn open(protocol: isize, groups: u32) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind(&SocketAddr::new(0, groups))?;
        socket.set_non_blocking(true)?;
        Ok(Self(socket))
    }

    /// Stops or starts to report the kernel's messages about certain links, of a monitor of the network.
    ///
    /// # Errors
    /// Fails as setsockopt(2) does.
    pub fn ignore(&self, links: Option<IgnoredLinks>) -> io::Result<()> {
        match links {
            Some(links) => bpf::attach(self.as_fd(), &links.program()),
            None => bpf::detach(self.as_fd()),
        }
    }

    /// Discards all pending notifications, and returns whether there were any.
    ///
    /// The contents do not count: the kernel drops notifications when the socket's buffer is full.
    ///
    /// # Errors
    /// Fails as recv(2) does.
    pub fn drain(&self) -> io::Result<bool> {
        let mut any = false;
        loop {
            match rustix::net::recv(self, &mut [0_u8; 4096][..], RecvFlags::DONTWAIT) {
                // ENOBUFS means that notifications were dropped.
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
        self.0.as_fd()
    }
}
