//! The network namespaces of sockets. A socket stays in the one in which its process created it, wherever the process
//! goes and whichever process gets its descriptor.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The socket option for the number of a socket's network namespace (`SO_NETNS_COOKIE` of asm-generic/socket.h). All
/// supported architectures use the generic number.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Returns whether two sockets are in the same network namespace, or None before Linux 5.14, which does not tell.
///
/// The end of a unix connection that accept(2) returns is in the namespace of the socket that connected, not in that of
/// the listener (`unix_stream_connect()` in the kernel's net/unix/af_unix.c).
///
/// # Errors
/// Fails as getsockopt(2) does.
pub fn share_namespace(one: impl AsFd, other: impl AsFd) -> io::Result<Option<bool>> {
    match (cookie_of(one), cookie_of(other)) {
        (Ok(one), Ok(other)) => Ok(Some(one == other)),
        (Err(error), _) | (_, Err(error)) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(None),
        (Err(error), _) | (_, Err(error)) => Err(error),
    }
}

/// Returns the number of a socket's network namespace, which the kernel gives to no other one.
fn cookie_of(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of_val(&cookie) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which is the size of the number.
    let got = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if got == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}
