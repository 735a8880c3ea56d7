//! The clock of the device: the time since boot, including suspend. After an hour of
//! suspend, session keys must have expired, so the monotonic clock, which stops meanwhile, is not suitable.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Returns the time since boot (`CLOCK_BOOTTIME`, clock_gettime(2)).
pub(super) fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has CLOCK_BOOTTIME since 2.6.39").into()
}

/// A fake clock for this library's unit tests.
///
/// `boringtun` reads the clock itself, and its own mock is a feature of the crate that would also freeze the program of
/// the integration tests. So this test executable replaces the C function that both call by one that returns a time of
/// each thread's own.
#[cfg(test)]
pub(super) mod travel {
    use std::cell::Cell;
    use std::time::Duration;

    use nix::libc;

    /// The time that each reading of a stopped clock takes, so that no two handshakes have the same timestamp. They
    /// would be replays.
    const INSTANT: Duration = Duration::from_micros(1);

    thread_local! {
        static AHEAD: Cell<Duration> = const { Cell::new(Duration::ZERO) };
        static STANDS_STILL: Cell<Option<[Duration; 2]>> = const { Cell::new(None) };
    }

    /// Moves the calling thread's time since boot forward, and with it the time of day, the timestamp of handshakes.
    pub(in super::super) fn advance(by: Duration) {
        AHEAD.set(AHEAD.get() + by);
    }

    /// Stops the calling thread's clock. Only [`advance`] moves it, however long the thread takes.
    pub(in super::super) fn stand_still() {
        if STANDS_STILL.get().is_none() {
            STANDS_STILL.set(Some([libc::CLOCK_BOOTTIME, libc::CLOCK_REALTIME].map(real_time)));
        }
    }

    fn real_time(clock: libc::clockid_t) -> Duration {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the kernel writes to a local variable of the right type.
        unsafe { libc::syscall(libc::SYS_clock_gettime, clock, &mut time) };
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }

    /// # Safety
    ///
    /// As clock_gettime(2): `time` is valid for writes or null.
    // SAFETY: the function replaces that of the C library, with the same signature and contract.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
        // SAFETY: the kernel checks the pointer, and reports a bad one as EFAULT.
        let result = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) };
        if result == 0 && matches!(clock, libc::CLOCK_BOOTTIME | libc::CLOCK_REALTIME) {
            // SAFETY: the kernel has just written to it, so it is valid, aligned and initialized.
            let time = unsafe { &mut *time };
            let real = Duration::new(time.tv_sec as u64, time.tv_nsec as u32);
            let base = STANDS_STILL.get().map_or(real, |[boot, day]| {
                advance(INSTANT);
                if clock == libc::CLOCK_BOOTTIME { boot } else { day }
            });
            let faked = base + AHEAD.get();
            (time.tv_sec, time.tv_nsec) =
                (faked.as_secs() as libc::time_t, libc::c_long::from(faked.subsec_nanos() as i32));
        }
        result as libc::c_int
    }

    #[test]
    fn advancing_moves_the_clock() {
        let before = super::now();
        advance(Duration::from_millis(1_999));
        assert!(super::now() - before >= Duration::from_millis(1_999));
        assert!(super::now() - before < Duration::from_secs(60));
    }

    #[test]
    fn a_stopped_clock_moves_only_by_advancing() {
        stand_still();
        let before = super::now();
        std::thread::sleep(Duration::from_millis(20));
        assert!(super::now() - before < Duration::from_millis(1));
        advance(Duration::from_secs(5));
        let passed = super::now() - before;
        assert!(passed >= Duration::from_secs(5) && passed < Duration::from_millis(5_001), "{passed:?}");
    }
}
