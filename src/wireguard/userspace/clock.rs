//! The one clock of the device: time since boot, sleep included, which is also what `boringtun` measures with. A laptop
//! that slept for an hour must find its session keys expired, so the usual monotonic clock, which stops, would not do.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// The time since boot (`CLOCK_BOOTTIME`, clock_gettime(2)).
pub(super) fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has CLOCK_BOOTTIME since 2.6.39").into()
}

/// Time travel for this library's unit tests: `boringtun` reads the clock itself, and its own mock of it is a feature of
/// the crate that would also freeze the program that the integration tests run. So the C function that both call is
/// replaced, in this test executable only, by one that adds what the calling thread asked for.
#[cfg(test)]
pub(super) mod travel {
    use std::cell::Cell;
    use std::time::Duration;

    use nix::libc;

    thread_local! {
        static AHEAD: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    }

    /// Moves the calling thread's time since boot forward, and the time of day with it, which handshakes are stamped with.
    pub(in super::super) fn advance(by: Duration) {
        AHEAD.set(AHEAD.get() + by);
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
            let ahead = AHEAD.get();
            // SAFETY: the kernel has just written there, so it is valid, aligned and initialized.
            let time = unsafe { &mut *time };
            let nanoseconds = time.tv_nsec + libc::c_long::from(ahead.subsec_nanos() as i32);
            time.tv_sec += ahead.as_secs() as libc::time_t + nanoseconds / 1_000_000_000;
            time.tv_nsec = nanoseconds % 1_000_000_000;
        }
        result as libc::c_int
    }

    #[test]
    fn both_clocks_travel() {
        let before = super::now();
        advance(Duration::from_millis(1_999));
        assert!(super::now() - before >= Duration::from_millis(1_999));
        assert!(super::now() - before < Duration::from_secs(60));
    }
}
