//! vpn-exec runs a program whose only way to the Internet is a WireGuard tunnel.
//!
//! The rooms, and which may call which (an arrow reads "may use"):
//!
//! ```text
//! commands ─► program ─► tunnel ─► wireguard, relay ─► linux    program ─► bus ─► linux    tunnel ─► plan ─► config
//!                                                               all ─► names, keys, ruleset, printed
//! ```
//!
//! - [`cli`], [`logging`]: the command line, and what is said.
//! - [`commands`]: a file for each command, with [`config_file`], which reads what [`config`] parses.
//! - [`config`]: what the user asked for, parsed and checked.
//! - [`plan`]: what will be done: a pure function of a config and of facts about the host.
//! - [`tunnel`]: applies a plan and undoes it; the keeper that owns it, and the leases of those who want it.
//! - [`program`]: enters the tunnel, gets its own view of the host's files, drops privileges, runs, and hands back an exit status.
//! - [`wireguard`]: one trait, two implementations.
//! - [`relay`]: published ports.
//! - [`bus`]: the session bus as the program sees it.
//! - [`linux`]: thin, safe wrappers over the kernel. Knows nothing of VPNs.
//! - [`escape`]: escapes what a terminal would interpret.
//! - [`names`], [`keys`], [`ruleset`]: checked names, wiped keys, and rules for packets.

#![deny(unsafe_code)]

pub mod bus;
pub mod cli;
pub mod commands;
pub mod config;
pub mod config_file;
pub mod escape;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod keys;
#[expect(
    unsafe_code,
    reason = "some of what the kernel offers has no safe wrapper elsewhere; each block says why it is sound"
)]
pub mod linux;
pub mod logging;
pub mod names;
pub mod plan;
pub mod program;
pub mod relay;
pub mod ruleset;
pub mod tunnel;
#[expect(unsafe_code, reason = "the embedded device sets socket options; each block says why it is sound")]
pub mod wireguard;
