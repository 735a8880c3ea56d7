//! vpn-exec runs a program whose only way to the Internet is a WireGuard tunnel.
//!
//! The rooms, and which may call which (an arrow reads "may use"):
//!
//! ```text
//! commands ─► program, tunnel ─► wireguard, linux        plan ─► config        all ─► names, keys
//! ```
//!
//! - [`config`]: what the user asked for, parsed and checked.
//! - [`config_file`]: reads such text, from wherever it is, for the commands.
//! - [`plan`]: what will be done: a pure function of a config and of facts about the host.
//! - [`linux`]: thin, safe wrappers over the kernel. Knows nothing of VPNs.
//! - [`wireguard`]: one trait, two implementations.
//! - [`names`], [`keys`]: checked names and wiped keys.

#![deny(unsafe_op_in_unsafe_fn)]

pub mod cli;
pub mod commands;
pub mod config;
pub mod config_file;
pub mod keys;
pub mod linux;
pub mod logging;
pub mod names;
pub mod plan;
pub mod program;
pub mod tunnel;
pub mod wireguard;
