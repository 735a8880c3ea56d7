//! Notices when a network namespace's addresses or routes change (rtnetlink(7)).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rustix::io::Errno;
use rustix::net::RecvFlags;

/// What is listened to: RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR and RTMGRP_IPV6_ROUTE of linux/rtnetlink.h.
const GROUPS: u32 = 0x10 | 0x40 | 0x100 | 0x400;

/// Hears of every change of addresses and routes in the namespace in which it was opened.
#[derive(Debug)]
pub struct NetworkMonitor(Socket);

impl NetworkMonitor {
    /// Begins to listen, in the namespace of the calling thread.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, GROUPS))?;
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

impl AsFd for NetworkMonitor {
    /// Readable when something has changed.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the socket is open for as long as this value is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}
