//! Whatever happens, the host is as it was, nothing of a tunnel is left, and nothing of others is touched.
//!
//! Every test lives in a world of its own (the lab's), whose network is a bare `lo`: most of what is promised here does not
//! depend on anybody answering. The programs that run in the tunnels are this executable again, see [`support`].

mod chaos;
mod ends;
mod faults;
mod hooks;
mod look_alikes;
mod names;
mod obstacles;
mod protocol;
mod service;
mod sharing;
mod standing;
mod support;

/// What runs in a tunnel: see [`support::program`]. As a test of its own it has nothing to do.
#[test]
fn program() {
    support::program();
}
