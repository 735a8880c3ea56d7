//! The device's clock: the time since boot including suspend, which `boringtun` uses, too. The session keys of a laptop
//! that slept for an hour must have expired, so the monotonic clock, which stops during suspend, cannot be used.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Returns the time since boot (`CLOCK_BOOTTIME`, clock_gettime(2)).
pub(super) fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has CLOCK_BOOTTIME since 2.6.39").into()
}

/// Time travel for unit tests. `boringtun` reads the clock itself, and its mock clock is a feature of the crate that
/// would also affect the program that the integration tests run. So the C function that both call is replaced, in this
/// test executable only, by one that returns the time that the calling thread has set.
#[cfg(test)]
pub(super) mod travel {
    use std::cell::Cell;
    use std::time::Duration;

    use nix::libc;

    /// How much time passes at each call while the clock is frozen. Two handshakes with the same timestamp would count
    /// as replays.
    const INSTANT: Duration = Duration::from_micros(1);

    thread_local! {
        static AHEAD: Cell<Duration> = const { Cell::new(Duration::ZERO) };
        static FROZEN_AT: Cell<Option<[Duration; 2]>> = const { Cell::new(None) };
    }

    /// Advances the calling thread's time since boot, and its time of day, which is the timestamp of handshakes.
    pub(in super::super) fn advance(by: Duration) {
        AHEAD.set(AHEAD.get() + by);
    }

    /// Freezes the calling thread's time, so that only [`advance`] moves it.
    pub(in super::super) fn freeze() {
        if FROZEN_AT.get().is_none() {
            FROZEN_AT.set(Some([libc::CLOCK_BOOTTIME, libc::CLOCK_REALTIME].map(real_time)));
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
    // SAFETY: the name is that of the C library's function on purpose, and the signature and the contract are the same.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
        // SAFETY: the kernel checks the pointer, and reports a bad one as EFAULT.
        let result = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) };
        if result == 0 && matches!(clock, libc::CLOCK_BOOTTIME | libc::CLOCK_REALTIME) {
            // SAFETY: the kernel has just written there, so it is valid, aligned and initialized.
            let time = unsafe { &mut *time };
            let real = Duration::new(time.tv_sec as u64, time.tv_nsec as u32);
            let base = FROZEN_AT.get().map_or(real, |[boot, day]| {
                advance(INSTANT);
                if clock == libc::CLOCK_BOOTTIME { boot } else { day }
            });
            let reported = base + AHEAD.get();
            (time.tv_sec, time.tv_nsec) =
                (reported.as_secs() as libc::time_t, libc::c_long::from(reported.subsec_nanos() as i32));
        }
        result as libc::c_int
    }

    #[test]
    fn time_can_be_advanced() {
        let before = super::now();
        advance(Duration::from_millis(1_999));
        assert!(super::now() - before >= Duration::from_millis(1_999));
        assert!(super::now() - before < Duration::from_secs(60));
    }

    #[test]
    fn frozen_time_only_advances_on_request() {
        freeze();
        let before = super::now();
        std::thread::sleep(Duration::from_millis(20));
        assert!(super::now() - before < Duration::from_millis(1));
        advance(Duration::from_secs(5));
        let passed = super::now() - before;
        assert!(passed >= Duration::from_secs(5) && passed < Duration::from_millis(5_001), "{passed:?}");
    }
}
