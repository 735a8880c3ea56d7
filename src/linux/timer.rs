//! A timer that can be waited for like any descriptor (timerfd_create(2)).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// A timer on the time since boot: one that came due while the machine slept is due when it wakes.
#[derive(Debug)]
pub struct Timer(OwnedFd);

impl Timer {
    /// Makes a timer that is not set.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self(timerfd_create(TimerfdClockId::Boottime, flags)?))
    }

    /// Sets it to a time since boot ([`super::clock::boot_time`]), or to none. One that has passed is due at once.
    pub fn set(&self, at: Option<Duration>) -> io::Result<()> {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        // All zeros would mean none.
        let at = at.map(|at| at.max(Duration::from_nanos(1)));
        let value = at.and_then(|at| Timespec::try_from(at).ok()).unwrap_or(zero);
        timerfd_settime(&self.0, TimerfdTimerFlags::ABSTIME, &Itimerspec { it_interval: zero, it_value: value })?;
        Ok(())
    }

    /// Takes note that it was due: it is readable no more.
    pub fn clear(&self) -> io::Result<()> {
        match rustix::io::read(&self.0, &mut [0_u8; 8]) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Timer {
    /// Readable once it is due.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::clock::boot_time;
    use crate::linux::poll::wait_for;

    #[test]
    fn it_is_due_when_it_should_be_and_not_before() {
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
