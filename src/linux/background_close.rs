//! Closing what a stranger may have had a hand in.
//!
//! The last reference to a socket is let go in the context of the process that closes it, and with it all descriptors
//! that wait in it unread (unix(7), SCM_RIGHTS). Such a descriptor can be one whose end takes as long as a stranger
//! likes: a TCP socket with unsent data and SO_LINGER, for one. So this is done by a thread that has nothing else to
//! do, and at its own end: a thread that ends lingers for no socket (`PF_EXITING` in `inet_release` of the kernel's
//! net/ipv4/af_inet.c).

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc;
use std::thread;

use super::process;

/// The stack of a thread that does nothing but close, in bytes.
const STACK: usize = 64 << 10;

/// Closes a descriptor without waiting for whatever that takes.
pub fn close_in_background(descriptor: OwnedFd) {
    let number = descriptor.as_raw_fd();
    let (tell, is_alone) = mpsc::channel();
    let (give, take) = mpsc::channel::<Option<OwnedFd>>();
    let closer = move || {
        // The thread's table of descriptors is its own from here on, and has this one alone.
        let own_table = process::unshare_descriptors(number).is_ok();
        if tell.send(own_table).is_ok() {
            // On a kernel that has no such tables, the thread has to close the descriptor, and may wait.
            drop(take.recv());
        }
    };
    match thread::Builder::new().name("closer".into()).stack_size(STACK).spawn(closer) {
        Ok(_) => match is_alone.recv() {
            // The thread's copy is the last one now, and is closed by its end.
            Ok(true) => drop((descriptor, give)),
            _ => drop(give.send(Some(descriptor))),
        },
        Err(error) => {
            // The end of this process closes it.
            tracing::debug!(%error, "cannot start a thread that closes a descriptor");
            std::mem::forget(descriptor);
        }
    }
}
