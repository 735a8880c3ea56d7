//! The container whose network namespace a tunnel is in: the tunnel ends with it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::linux::clock::boot_time;
use crate::linux::process::ProcessHandle;
use crate::registry::Container;

/// The interval at which the keeper looks whether a pod still exists. Usually the pod's engine reports its end.
const POD_INTERVAL: Duration = Duration::from_secs(10);

/// A watch for the end of a container.
#[derive(Debug)]
pub(super) enum ContainerWatch {
    /// The tunnel is no container's.
    Off,
    /// The container's first process.
    Process(ProcessHandle),
    /// A pod, and when to look for it again, as time since boot.
    Pod(Container, Duration),
    /// The container had ended before the watch began.
    Ended,
}

impl ContainerWatch {
    /// Begins to watch a container, if there is one.
    ///
    /// # Errors
    /// If its first process cannot be watched, except that it has ended.
    pub(super) fn open(container: Option<&Container>) -> io::Result<Self> {
        let Some(container) = container else { return Ok(Self::Off) };
        let Some(process) = container.process else {
            return Ok(Self::Pod(container.clone(), boot_time() + POD_INTERVAL));
        };
        let handle = match ProcessHandle::of(process.pid) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(Self::Ended),
            other => other?,
        };
        // The handle was opened by a number, which another process may have by now.
        Ok(if process.is_alive() { Self::Process(handle) } else { Self::Ended })
    }

    /// Returns the descriptor that is readable once the container has ended.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Process(handle) => Some(handle.as_fd()),
            Self::Off | Self::Pod(..) | Self::Ended => None,
        }
    }

    /// Returns when to look for the container again, as time since boot.
    pub(super) fn due(&self) -> Option<Duration> {
        match self {
            Self::Pod(_, due) => Some(*due),
            Self::Off | Self::Process(_) | Self::Ended => None,
        }
    }

    /// Returns whether the container has ended, as far as that is known at a time since boot without the descriptor.
    pub(super) fn has_ended(&mut self, now: Duration) -> bool {
        match self {
            Self::Ended => true,
            Self::Pod(pod, due) if *due <= now => {
                *due = now + POD_INTERVAL;
                !pod.is_alive()
            }
            Self::Off | Self::Process(_) | Self::Pod(..) => false,
        }
    }
}
