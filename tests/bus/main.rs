//! The filter of the session bus, between a real bus with real programs, and clients that put each byte on the wire
//! themselves. Whatever is refused is done once without the filter, too, where it works.

mod desktop;
mod programs;
mod raw;
mod wire;

use anyhow::Result;
use desktop::Desktop;
use lab::world;
use vpn_exec::bus::Policy;

/// Runs a test in a world of its own, in which there is a desktop's session bus and the filter with the default policy.
fn test<F: FnOnce(&mut Desktop) -> Result<()>>(body: F) {
    test_with(Policy::default_desktop(), body);
}

/// The same with another policy.
fn test_with<F: FnOnce(&mut Desktop) -> Result<()>>(policy: Policy, body: F) {
    world::test(|| {
        let mut desktop = Desktop::start(policy)?;
        body(&mut desktop)?;
        // Neither an error nor a panic.
        desktop.stop_filter()
    });
}
