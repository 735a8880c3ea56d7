//! Closing descriptors that an untrusted process may have tampered with, without waiting.
//!
//! Closing the last reference to a socket also closes all descriptors that wait in it unread (SCM_RIGHTS of unix(7)),
//! in the context of the closing process. Such a descriptor can take as long to close as its sender likes, for example
//! a TCP socket with unsent data and SO_LINGER. So a thread of its own closes them when it ends: a thread that ends
//! does not linger (`PF_EXITING` in `inet_release` of the kernel's net/ipv4/af_inet.c).

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc;
use std::thread;

use super::process;

/// The stack of the closing thread in bytes.
const STACK_SIZE: usize = 64 << 10;

/// Closes a descriptor without waiting, however long that takes.
pub fn close_in_background(descriptor: OwnedFd) {
    let number = descriptor.as_raw_fd();
    let (unshared, is_unshared) = mpsc::channel();
    let (give, take) = mpsc::channel::<Option<OwnedFd>>();
    let closer = move || {
        // From here on the thread has a descriptor table of its own, with this descriptor alone.
        let own_table = process::unshare_descriptors(number).is_ok();
        if unshared.send(own_table).is_ok() {
            // Before Linux 5.9 the tables cannot be separated. There the thread itself closes the descriptor and waits.
            drop(take.recv());
        }
    };
    match thread::Builder::new().name("closer".into()).stack_size(STACK_SIZE).spawn(closer) {
        Ok(_) => match is_unshared.recv() {
            // The thread's copy is the last one now. The end of the thread closes it.
            Ok(true) => drop((descriptor, give)),
            _ => drop(give.send(Some(descriptor))),
        },
        Err(error) => {
            // The end of this process closes the descriptor.
            tracing::debug!(%error, "cannot start a thread that closes a descriptor");
            std::mem::forget(descriptor);
        }
    }
}
