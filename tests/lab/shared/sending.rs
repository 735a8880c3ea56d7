//! Ways to send that tests use as well as the agent.

use std::ffi::OsString;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};

/// The payload of a storm, by which a test recognizes it.
const STORM: &[u8] = b"storm";

/// The interfaces that a program may find: inside a tunnel, on the host, or in a container (slirp4netns makes `tap0`).
pub const INTERFACES: [&str; 5] = ["host0", "wg0", "eth0", "lan0", "tap0"];

/// Returns the unspecified address of the same family.
pub fn unspecified(like: SocketAddr) -> IpAddr {
    if like.is_ipv4() { [0, 0, 0, 0].into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

/// Returns a socket bound to an interface. An ordinary user may create one since Linux 5.7.
///
/// # Errors
/// The system call's.
pub fn bound(interface: &str, like: SocketAddr, kind: SockType) -> io::Result<OwnedFd> {
    let family = if like.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = if kind == SockType::Stream { SockFlag::SOCK_NONBLOCK } else { SockFlag::empty() };
    let socket = socket(family, kind, flags | SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::BindToDevice, &OsString::from(interface))?;
    Ok(socket)
}

/// Sends to all targets while `goes_on`, by the routes and by every interface of the calling thread's network
/// namespace. Returns the number of datagrams that it tried to send.
pub fn send_storm(targets: &[SocketAddr], goes_on: impl Fn() -> bool) -> u64 {
    let mut tried = 0;
    while goes_on() {
        let begin = Instant::now();
        for target in targets {
            if let Ok(socket) = UdpSocket::bind((unspecified(*target), 0)) {
                // A failure is what the test hopes for.
                let _ = socket.send_to(STORM, target);
            }
            for interface in INTERFACES {
                if let Ok(socket) = bound(interface, *target, SockType::Datagram) {
                    let _ = UdpSocket::from(socket).send_to(STORM, target);
                }
            }
            tried += 1 + INTERFACES.len() as u64;
        }
        // On a small machine, the processes under test need a turn, too.
        std::thread::sleep(begin.elapsed().max(Duration::from_micros(200)));
    }
    tried
}
