//! The proof that nothing leaks: a matrix of [`vectors`], by which a program may try to send or to look up a name, and of [`stages`] of
//! a tunnel's life. A cell's program goes on trying for as long as the stage lasts. Each attempt carries the names of its vector and of
//! its stage, so that what leaks says what it is.
//!
//! The [`judge`] sees all packets on all of the host's interfaces and the logs of all its resolvers, and does not ask the program.
//! That it can find somebody guilty is seen in each cell's twin: the same program in the same stage, with vpn-exec's protections taken
//! away, or without vpn-exec.

mod attempts;
mod first;
mod judge;
mod protections;
mod resolvers;
mod stages;
mod standing;
mod vectors;

const VPN_EXEC: &str = env!("CARGO_BIN_EXE_vpn-exec");

#[test]
#[ignore = "the program that the other tests run"]
fn agent() {
    vectors::serve();
}
