//! The session bus filter, between a real bus with real programs and clients that write each byte themselves. Each
//! refused act is also done without the filter, where it must succeed.

mod desktop;
mod programs;
mod raw;
mod wire;

use anyhow::Result;
use desktop::Desktop;
use lab::world;
use vpn_exec::bus::BusPolicy;

/// Runs a test in a world of its own, with a desktop's session bus and the filter with the default policy.
fn test<F: FnOnce(&mut Desktop) -> Result<()>>(body: F) {
    test_with(BusPolicy::default_desktop(), body);
}

/// The same with another policy.
fn test_with<F: FnOnce(&mut Desktop) -> Result<()>>(policy: BusPolicy, body: F) {
    world::test(|| {
        let mut desktop = Desktop::start(policy)?;
        body(&mut desktop)?;
        // The filter must end without an error or a panic.
        desktop.stop_filter()
    });
}
