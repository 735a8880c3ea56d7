//! The clock by which long times are measured.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// The time since boot, sleep included (`CLOCK_BOOTTIME`, clock_gettime(2)): after a laptop's sleep of an hour, an hour has passed. No
/// change of the time of day moves it.
pub fn boot_time() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has CLOCK_BOOTTIME since 2.6.39").into()
}
