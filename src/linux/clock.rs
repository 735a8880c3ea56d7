//! The clock for intervals that must count the time a machine was suspended, and a timer on it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// Returns the time since boot, including suspend (`CLOCK_BOOTTIME`, clock_gettime(2)).
///
/// After an hour of suspend, an hour has passed. Changes of the time of day do not affect this clock.
pub fn boot_time() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has CLOCK_BOOTTIME since 2.6.39").into()
}

/// A timer on [`boot_time`] that can be polled like any descriptor (timerfd_create(2)).
///
/// A timer that expires while the machine is suspended is due when the machine wakes.
#[derive(Debug)]
pub struct Timer(OwnedFd);

impl Timer {
    /// Creates a timer that is not set.
    ///
    /// # Errors
    /// Fails as timerfd_create(2) does.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self(timerfd_create(TimerfdClockId::Boottime, flags)?))
    }

    /// Sets the timer to a time since boot, or disarms it. A time in the past is due at once.
    ///
    /// # Errors
    /// Fails as timerfd_settime(2) does.
    pub fn set(&self, at: Option<Duration>) -> io::Result<()> {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        // To the kernel, a time of zero disarms the timer.
        let at = at.map(|at| at.max(Duration::from_nanos(1)));
        let value = at.and_then(|at| Timespec::try_from(at).ok()).unwrap_or(zero);
        timerfd_settime(&self.0, TimerfdTimerFlags::ABSTIME, &Itimerspec { it_interval: zero, it_value: value })?;
        Ok(())
    }

    /// Acknowledges an expiration, so that the timer is no longer readable.
    ///
    /// # Errors
    /// Fails as read(2) does.
    pub fn clear(&self) -> io::Result<()> {
        match rustix::io::read(&self.0, &mut [0_u8; 8]) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Timer {
    /// Readable once the timer is due.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::poll::wait_for;

    #[test]
    fn a_timer_is_due_at_its_time_and_not_before() {
        let timer = Timer::new().expect("a timer");
        let is_due = |within| wait_for(&[timer.as_fd()], Some(within)).expect("a wait") == [true];
        assert!(!is_due(Duration::ZERO), "not set");
        timer.set(Some(Duration::ZERO)).expect("set");
        assert!(is_due(Duration::from_secs(5)), "a time that has passed");
        timer.clear().expect("cleared");
        assert!(!is_due(Duration::ZERO), "cleared");
        timer.set(Some(boot_time() + Duration::from_secs(3600))).expect("set");
        assert!(!is_due(Duration::ZERO), "in an hour");
        timer.set(Some(boot_time() + Duration::from_millis(5))).expect("set");
        assert!(is_due(Duration::from_secs(5)), "in 5 ms");
        timer.set(None).expect("set");
        assert!(!is_due(Duration::ZERO), "disarmed");
    }
}
