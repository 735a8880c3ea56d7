//! vpn-exec runs a program whose only way to the Internet is a WireGuard tunnel.
//!
//! The rooms, from top to bottom. A room uses only rooms below it; a test checks that (`tests/layout.rs`).
//!
//! | room | what it is |
//! |---|---|
//! | [`cli`] | the command line's grammar |
//! | [`commands`] | one file per command |
//! | [`program`] | the program's process: enters the tunnel, gets its view of files, drops privileges, runs |
//! | `session` | getting hold of a tunnel: join, claim, take over, create; recovery after a killed keeper |
//! | `request` | file, profile and command line brought together |
//! | [`keeper`] | the daemon that owns a tunnel: event loop, clients, endpoints, ports, service manager |
//! | [`lease`] | the protocol between the keeper and its clients, with status and handover |
//! | [`tunnel`] | the kernel objects of a tunnel: make, take over, change, remove |
//! | [`registry`] | the files below `/run/vpn-exec` |
//! | [`relay`] | published ports |
//! | [`bus`] | the filter of the session bus |
//! | [`wireguard`] | the kernel's and the embedded WireGuard behind one trait |
//! | [`plan`] | the decisions, as a pure function of a configuration and of facts about the host |
//! | [`config`], [`config_file`] | the user's files, parsed and checked |
//! | [`linux`] | thin, safe wrappers of kernel interfaces, without knowledge of VPNs |
//! | [`failure`], [`logging`], [`escape`] | errors, messages, and escaping for terminals |
//! | [`names`], [`keys`], [`ruleset`] | checked names, wiped keys, and packet rules as data |

#![deny(unsafe_code)]

pub mod bus;
pub mod cli;
mod color;
pub mod commands;
pub mod config;
pub mod config_file;
pub mod escape;
pub mod failure;
#[doc(hidden)]
pub mod fault;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod keeper;
pub mod keys;
pub mod lease;
#[expect(
    unsafe_code,
    reason = "some of what the kernel offers has no safe wrapper elsewhere; each block says why it is sound"
)]
pub mod linux;
pub mod logging;
pub mod lookup;
pub mod names;
pub mod plan;

pub mod program;
pub mod registry;
pub mod relay;
mod request;
pub mod ruleset;
mod session;
mod systemctl;
pub mod tunnel;
#[expect(unsafe_code, reason = "the embedded device sets socket options; each block says why it is sound")]
pub mod wireguard;
