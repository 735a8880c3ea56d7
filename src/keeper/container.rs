//! The container whose network namespace a tunnel is in: the tunnel ends with it, and follows its addresses.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::linux::clock::boot_time;
use crate::linux::netlink::monitor::Monitor;
use crate::linux::process::ProcessHandle;
use crate::registry::Container;
use crate::tunnel::Tunnel;

/// The interval at which the keeper looks whether a pod still exists. Usually the pod's engine reports its end.
const POD_INTERVAL: Duration = Duration::from_secs(10);

/// The delay until the keeper tries again to follow a container's addresses.
const FOLLOW_DELAY: Duration = Duration::from_secs(1);

/// A watch for the addresses of a container's interfaces.
#[derive(Debug)]
pub(super) struct ContainerAddresses {
    monitor: Option<Monitor>,
    /// When to adapt the tunnel again after a failure, as time since boot.
    retry_at: Option<Duration>,
}

impl ContainerAddresses {
    /// Begins to watch, if the tunnel is a container's, and adapts the tunnel to the present addresses.
    ///
    /// # Errors
    /// If the monitor cannot be opened in the container's namespace.
    pub(super) fn follow(tunnel: &mut Tunnel) -> io::Result<Self> {
        let mut addresses = Self { monitor: tunnel.monitor_container()?, retry_at: None };
        addresses.adapt(tunnel);
        Ok(addresses)
    }

    /// Returns the descriptor that is readable after a change.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.monitor.as_ref().map(AsFd::as_fd)
    }

    /// Adapts the tunnel to the present addresses, after a change.
    ///
    /// # Errors
    /// If the monitor fails.
    pub(super) fn handle_change(&mut self, tunnel: &mut Tunnel) -> io::Result<()> {
        if let Some(monitor) = &self.monitor {
            // Drained first: a change that follows is noticed.
            monitor.drain()?;
            self.adapt(tunnel);
        }
        Ok(())
    }

    /// Returns when to adapt the tunnel again, as time since boot.
    pub(super) fn due(&self) -> Option<Duration> {
        self.retry_at
    }

    /// Adapts the tunnel again if that is due, at a time since boot.
    pub(super) fn retry(&mut self, tunnel: &mut Tunnel, now: Duration) {
        if self.retry_at.is_some_and(|at| at <= now) {
            self.adapt(tunnel);
        }
    }

    /// Adapts the tunnel to the present addresses. Until that succeeds, the rules are those of the former ones.
    fn adapt(&mut self, tunnel: &mut Tunnel) {
        self.retry_at = match tunnel.follow_container() {
            Ok(()) => None,
            Err(failure) => {
                tracing::warn!("cannot follow the container's addresses, and tries again: {failure}");
                Some(boot_time() + FOLLOW_DELAY)
            }
        };
    }
}

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
