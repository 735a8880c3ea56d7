//! The UDP sockets of the encrypted packets: one for IPv4 and one for IPv6, on the same port. They stay in the network
//! namespace in which they were created, so the device itself can be in another one.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use rustix::io::Errno;
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover, set_ipv6_v6only,
};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};

use crate::linux::datagrams;

/// The requested size of the sockets' buffers in bytes, as in wireguard-go. Without CAP_NET_ADMIN, the kernel limits it
/// (`net.core.rmem_max`, `wmem_max`).
const BUFFER_SIZE: usize = 7 << 20;

/// The number of random ports to try until one is free for IPv6 as well as IPv4.
const PORT_ATTEMPTS: usize = 100;

/// The device's UDP sockets.
#[derive(Debug)]
pub struct Sockets {
    ipv4: OwnedFd,
    ipv6: Option<OwnedFd>,
    port: u16,
}

impl Sockets {
    /// Opens the sockets in the calling thread's network namespace. They do not block and are closed on exec.
    ///
    /// A `listen_port` of 0 means any port that is free for both families. A `fwmark` other than 0 marks the packets
    /// (`SO_MARK` of socket(7)), which needs CAP_NET_ADMIN or CAP_NET_RAW. On a host without IPv6, only IPv4 is used.
    ///
    /// # Errors
    /// Fails with `EADDRINUSE` if the port is taken.
    pub fn bind(listen_port: u16, fwmark: u32) -> io::Result<Self> {
        let mut attempts = if listen_port == 0 { PORT_ATTEMPTS } else { 1 };
        loop {
            let ipv4 = open((Ipv4Addr::UNSPECIFIED, listen_port).into(), fwmark)?;
            let port = local_port(&ipv4)?;
            attempts -= 1;
            match open((Ipv6Addr::UNSPECIFIED, port).into(), fwmark) {
                Ok(ipv6) => return Ok(Self { ipv4, ipv6: Some(ipv6), port }),
                Err(Errno::AFNOSUPPORT) => return Ok(Self { ipv4, ipv6: None, port }),
                Err(Errno::ADDRINUSE) if attempts > 0 => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Returns the port of both sockets.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Duplicates the descriptors of the sockets.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        let ipv6 = self.ipv6.as_ref().map(OwnedFd::try_clone).transpose()?;
        Ok(Self { ipv4: self.ipv4.try_clone()?, ipv6, port: self.port })
    }

    /// Sets the mark of packets sent from now on. 0 means none.
    pub(super) fn set_mark(&self, fwmark: u32) -> io::Result<()> {
        for socket in self.descriptors() {
            if getsockopt(&socket, sockopt::Mark)? != fwmark {
                setsockopt(&socket, sockopt::Mark, &fwmark)?;
            }
        }
        Ok(())
    }

    /// Sets whether the kernel joins received datagrams, which it does from the beginning.
    pub(super) fn set_joined_receive(&self, is_on: bool) -> io::Result<()> {
        self.descriptors().try_for_each(|socket| datagrams::set_joined_receive(socket, is_on))
    }

    /// Returns the descriptors, to wait for datagrams.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(self.ipv4.as_fd()).chain(self.ipv6.as_ref().map(OwnedFd::as_fd))
    }

    /// Returns the socket of an endpoint's address family, if the host has the family.
    pub(super) fn of(&self, endpoint: &SocketAddr) -> Option<BorrowedFd<'_>> {
        match endpoint {
            SocketAddr::V4(_) => Some(self.ipv4.as_fd()),
            SocketAddr::V6(_) => self.ipv6.as_ref().map(OwnedFd::as_fd),
        }
    }

    /// Sends one datagram.
    pub(super) fn send(&self, endpoint: SocketAddr, datagram: &[u8]) -> Result<(), Errno> {
        let socket = self.of(&endpoint).ok_or(Errno::AFNOSUPPORT)?;
        rustix::net::sendto(socket, datagram, SendFlags::empty(), &endpoint).map(drop)
    }
}

fn open(address: SocketAddr, fwmark: u32) -> Result<OwnedFd, Errno> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, None)?;
    if family == AddressFamily::INET6 {
        set_ipv6_v6only(&socket, true)?;
    }
    if fwmark != 0 {
        setsockopt(&socket, sockopt::Mark, &fwmark).map_err(to_rustix)?;
    }
    // As the kernel's WireGuard does: the inner packets discover the path MTU, and a datagram that is too large for the
    // path is fragmented instead of refused.
    match address {
        SocketAddr::V4(_) => set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DONT)?,
        SocketAddr::V6(_) => set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::DONT)?,
    }
    // Best effort: the requested size regardless of the limits, or as much as they allow.
    let _ = setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_SIZE)
        .or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &BUFFER_SIZE));
    let _ = setsockopt(&socket, sockopt::SndBufForce, &BUFFER_SIZE)
        .or_else(|_| setsockopt(&socket, sockopt::SndBuf, &BUFFER_SIZE));
    // The data path's thread may not set options (its system calls are filtered), so they are set here.
    let options =
        [datagrams::set_joined_receive(&socket, true), datagrams::set_received_ecn(&socket, address.is_ipv6())];
    for error in options.into_iter().filter_map(Result::err) {
        tracing::debug!(%error, "the kernel does not join datagrams, or does not report their congestion bits");
    }
    rustix::net::bind(&socket, &address)?;
    Ok(socket)
}

fn to_rustix(errno: nix::errno::Errno) -> Errno {
    Errno::from_raw_os_error(errno as i32)
}

fn local_port(socket: &OwnedFd) -> Result<u16, Errno> {
    let address = SocketAddr::try_from(rustix::net::getsockname(socket)?)?;
    Ok(address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_share_a_port_and_a_taken_one_is_an_error() {
        let sockets = Sockets::bind(0, 0).expect("sockets");
        assert_ne!(sockets.port(), 0);
        for socket in sockets.descriptors() {
            let address = SocketAddr::try_from(rustix::net::getsockname(socket).expect("name")).expect("address");
            assert_eq!(address.port(), sockets.port());
            assert_eq!(rustix::io::read(socket, &mut [0; 16]), Err(Errno::WOULDBLOCK));
            assert!(rustix::io::fcntl_getfd(socket).expect("flags").contains(rustix::io::FdFlags::CLOEXEC));
        }
        let error = Sockets::bind(sockets.port(), 0).expect_err("the port is taken");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn a_port_taken_for_ipv6_alone_is_an_error_and_not_half_a_device() {
        let taken = std::net::UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0));
        // Without IPv6 on the host there is nothing to take.
        let Ok(taken) = taken else { return };
        let port = taken.local_addr().expect("address").port();
        let error = Sockets::bind(port, 0).expect_err("the port is taken");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }
}
