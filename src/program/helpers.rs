//! The processes that help a program and are not its own, such as the one that keeps its view up to date. The launcher must know them: it
//! waits for all others that are its children when the program has ended, and helpers wait for the launcher. So a helper says its number
//! itself, before it does anything else; who has started it may be killed at any moment.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::linux::local_socket;
use crate::linux::poll::wait_for;

/// What the launcher knows of its helpers. They end when this is dropped.
#[derive(Debug)]
pub(super) struct Helpers {
    /// Where they say their numbers. None once none of them is left.
    socket: Option<OwnedFd>,
}

impl Helpers {
    /// The launcher's end, and that of the helpers.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (socket, theirs) = local_socket::pair()?;
        Ok((Self { socket: Some(socket) }, theirs))
    }

    /// Readable when a helper has said its number. None when there are no helpers.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Adds the helpers that have said their numbers since.
    pub(super) fn learn(&mut self, known: &mut BTreeSet<i32>) -> io::Result<()> {
        while let Some(socket) = &self.socket {
            if wait_for(&[socket.as_fd()], Some(Duration::ZERO))? != [true] {
                break;
            }
            let mut number = [0; size_of::<i32>()];
            match local_socket::receive(socket, &mut number)? {
                Some(_) => drop(known.insert(i32::from_ne_bytes(number))),
                None => self.socket = None,
            }
        }
        Ok(())
    }
}

/// Says the calling process's number to the launcher: a helper's first act.
pub(super) fn announce(launcher: &OwnedFd) -> io::Result<()> {
    local_socket::send(launcher, &std::process::id().to_ne_bytes(), None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_a_number_that_nobody_will_say() {
        let (mut helpers, alive) = Helpers::pair().expect("a socket");
        let mut known = BTreeSet::from([7]);
        helpers.learn(&mut known).expect("a socket");
        assert_eq!(known, [7].into(), "one that was killed before it could say anything has said nothing");
        announce(&alive).expect("room");
        helpers.learn(&mut known).expect("a socket");
        assert_eq!(known, [7, std::process::id().cast_signed()].into());
        assert!(helpers.descriptor().is_some());
        drop(alive);
        helpers.learn(&mut known).expect("a socket");
        assert!(helpers.descriptor().is_none(), "what is closed is not waited for");
    }
}
