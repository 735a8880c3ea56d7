//! vpn-exec runs a program whose only way to the Internet is a WireGuard tunnel.
//!
//! The modules, from top to bottom. A module uses only modules below it; `tests/layout.rs` checks that.
//!
//! | module | subject |
//! |---|---|
//! | [`commands`] | one file per command |
//! | [`program`] | the program's process: enters the tunnel, gets its view of files, drops privileges, runs |
//! | `session` | getting hold of a tunnel: join, claim, adopt, create; recovery after a killed keeper |
//! | `request` | file, profile and command line brought together |
//! | [`logging`], [`cli`] | messages; the grammar of the command line |
//! | [`attach`] | the process that attaches a tunnel to a container's namespace |
//! | [`keeper`] | the daemon that owns a tunnel: event loop, clients, ports, service manager |
//! | [`endpoints`] | the address of each peer: look-ups, the search for an address that answers, the MTU |
//! | [`lease`] | the protocol between the keeper and its clients, with status and handover |
//! | [`tunnel`] | the kernel objects of a tunnel: create, adopt, change, remove |
//! | `lookup` | where profiles are, and the names of tunnels and profiles |
//! | [`registry`] | the files below `/run/vpn-exec` |
//! | [`wireguard`] | the kernel's and the embedded WireGuard behind one trait |
//! | [`bus`] | the filter of the session bus |
//! | [`dns_forwarder`] | split DNS: which resolver answers which names |
//! | `systemctl` | the properties of units, as systemd reports them |
//! | [`plan`] | the decisions, as a pure function of a configuration and of facts about the host |
//! | [`relay`] | published ports |
//! | [`container`] | the formats of container engines: hooks, devices, network plugins |
//! | `desktop_entry` | the entries of programs in menus |
//! | [`config_file`], [`config`] | the user's files, read, parsed and checked |
//! | [`fault`] | the switches by which tests make a step fail or take a protection away |
//! | [`failure`] | the one error type |
//! | [`linux`] | thin, safe wrappers of kernel interfaces, without knowledge of VPNs |
//! | `color`, [`escape`] | colour and escaping for terminals |
//! | [`ruleset`], [`names`], [`keys`] | packet rules as data, checked names, wiped keys |

#![deny(unsafe_code)]

pub mod attach;
pub mod bus;
pub mod cli;
mod color;
pub mod commands;
pub mod config;
pub mod config_file;
pub mod container;
mod desktop_entry;
pub mod dns_forwarder;
pub mod endpoints;
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
