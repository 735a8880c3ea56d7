//! The addresses of sockets, as the kernel takes them.

use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// A name of either family, as the kernel takes it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) union Name {
    ipv4: libc::sockaddr_in,
    ipv6: libc::sockaddr_in6,
}

impl Name {
    pub(super) fn zeroed() -> Self {
        // SAFETY: all zeros is valid for both, which are plain data.
        unsafe { MaybeUninit::zeroed().assume_init() }
    }

    /// Returns the name of an endpoint, and its length.
    pub(super) fn of(endpoint: &SocketAddr) -> (Self, libc::socklen_t) {
        let mut name = Self::zeroed();
        match endpoint {
            SocketAddr::V4(endpoint) => {
                name.ipv4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: endpoint.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(endpoint.ip().octets()) },
                    sin_zero: [0; 8],
                };
                (name, size_of::<libc::sockaddr_in>() as libc::socklen_t)
            }
            SocketAddr::V6(endpoint) => {
                name.ipv6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: endpoint.port().to_be(),
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr { s6_addr: endpoint.ip().octets() },
                    sin6_scope_id: endpoint.scope_id(),
                };
                (name, size_of::<libc::sockaddr_in6>() as libc::socklen_t)
            }
        }
    }

    /// Returns the endpoint, if the family is known.
    pub(super) fn endpoint(&self) -> Option<SocketAddr> {
        // SAFETY: the family is at the same place in both, and all bytes are initialized.
        let family = libc::c_int::from(unsafe { self.ipv4.sin_family });
        match family {
            libc::AF_INET => {
                // SAFETY: the family says so, and all bytes are initialized.
                let name = unsafe { self.ipv4 };
                let address = Ipv4Addr::from(name.sin_addr.s_addr.to_ne_bytes());
                Some(SocketAddr::from((address, u16::from_be(name.sin_port))))
            }
            libc::AF_INET6 => {
                // SAFETY: the family says so, and all bytes are initialized.
                let name = unsafe { self.ipv6 };
                let (address, port) = (Ipv6Addr::from(name.sin6_addr.s6_addr), u16::from_be(name.sin6_port));
                Some(SocketAddrV6::new(address, port, 0, name.sin6_scope_id).into())
            }
            _ => None,
        }
    }
}
