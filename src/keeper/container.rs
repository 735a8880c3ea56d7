//! The container whose network namespace a tunnel is in: the tunnel ends with it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use crate::linux::process::ProcessHandle;
use crate::registry::Container;

/// A watch for the end of a container.
#[derive(Debug, Default)]
pub(super) struct ContainerWatch {
    process: Option<ProcessHandle>,
    has_ended: bool,
}

impl ContainerWatch {
    /// Begins to watch the first process of a container. A pod without a known process is not watched: its engine
    /// reports its end.
    ///
    /// # Errors
    /// If the process cannot be watched, except that it has ended.
    pub(super) fn open(container: Option<&Container>) -> io::Result<Self> {
        let Some(process) = container.and_then(|container| container.process) else { return Ok(Self::default()) };
        let handle = match ProcessHandle::of(process.pid) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => None,
            other => Some(other?),
        };
        // The handle was opened by a number, which another process may have by now.
        Ok(match handle.filter(|_| process.is_alive()) {
            Some(handle) => Self { process: Some(handle), has_ended: false },
            None => Self { process: None, has_ended: true },
        })
    }

    /// Returns the descriptor that is readable once the container has ended.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.process.as_ref().map(AsFd::as_fd)
    }

    /// Returns whether the container had ended before the watch began.
    pub(super) fn has_ended(&self) -> bool {
        self.has_ended
    }
}
