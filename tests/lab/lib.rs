//! The lab: a pretend Internet in namespaces, in which vpn-exec's tests and its demonstration run the real program with
//! real packets, as root or as an ordinary user, without touching the machine.
//!
//! ```text
//!                  192.0.2.0/26            198.51.100.0/26
//!   lan ───────── host ───────────── router ───────────── provider ··· inside the tunnel: 10.64.0.0/24, fd64::/64
//!    192.0.2.64/26                     │
//!                                     web   203.0.113.0/26
//! ```
//!
//! - [`world`]: the user, mount, PID and network namespaces in which one test runs, and which end with it.
//! - [`Lab`]: the network above. The world's own network namespace is `host`, so a command that a test starts is on the
//!   host.
//! - [`Provider`]: the WireGuard peer that masquerades: our own implementation, wireguard-go or the kernel's.
//! - [`Pod`]: a network namespace with an uplink of its own, as container engines make it, for `vpn-exec attach`.
//! - [`Launcher`]: the vpn-exec under test; [`agent`]: a program to run inside, which does what a test tells it.
//! - [`Capture`]: the packets that left or reached the host. Leaks are judged by it, never by what a program says.
//! - [`tunnel`]: a running tunnel, made by root or without.
//! - [`Snapshot`]: the state of the host, for comparisons.
//! - [`dns`], [`http`]: servers that log their clients, and clients for them.
//! - [`browsing`]: a page that reports the addresses which a browser shows, and a STUN server.
//! - [`nscd`], [`stand_in`]: resolvers of the host, real and pretended ones, which log their clients.
//! - [`nat`]: masquerading, for the provider, and for tests that want a firewall on the host.
//! - [`variables`]: every environment variable that tests read. [`Skip`]: tests that this machine cannot run.
//!
//! A test:
//!
//! ```no_run
//! #[test]
//! fn a_server_sees_the_host() {
//!     lab::test(lab::Peer::Ours, |_lab| {
//!         let seen = lab::http::get("http://203.0.113.2/", std::time::Duration::from_secs(1))?;
//!         assert_eq!(seen, "192.0.2.2\n");
//!         Ok(())
//!     });
//! }
//! ```
//!
//! The lab is a package of its own so that it is compiled once and not for each test, and so that code which one test
//! does not use causes no warning.

pub mod agent;
pub mod browsing;
mod capture;
pub mod dns;
pub mod http;
mod internet;
pub mod launcher;
pub mod nat;
mod nest;
mod netlink;
pub mod nscd;
mod packet;
pub mod pod;
mod provider;
pub mod shared;
mod skip;
mod snapshot;
pub mod stand_in;
pub mod tunnel;
pub mod world;

use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

pub use anyhow::{Context, Error, Result, bail, ensure};

pub use capture::{Capture, Side};
pub use internet::{Lab, Reach};
pub use launcher::{Launcher, vpn_exec};
pub use packet::{Flow, Packet};
pub use pod::Pod;
pub use provider::{PROVIDER_PORT, Peer, Provider, passing_tun};
pub use shared::addresses::{
    Addresses, CLUSTER_RESOLVER, CLUSTER_SERVICE, HOST, HOST_ON_LAN, HOST_ON_PRIVATE_LAN, LAN, POD, POD_GATEWAY,
    PRIVATE_LAN, PROVIDER, ROUTER, TUNNEL_CLIENT, TUNNEL_RESOLVER, WEB,
};
pub use shared::patience::patience;
pub use shared::sending::send_storm;
pub use shared::{key_search, stamp, surroundings, variables};
pub use skip::{Skip, skipped};
pub use snapshot::Snapshot;
pub use world::require_users;

/// Returns the backend that tests have vpn-exec use unless they are about one: see [`variables::BACKEND`].
pub fn backend() -> &'static str {
    static BACKEND: OnceLock<String> = OnceLock::new();
    BACKEND.get_or_init(|| std::env::var(variables::BACKEND).unwrap_or_else(|_| "userspace".into()))
}

/// Waits until a condition holds.
///
/// # Errors
/// `otherwise`, if the condition does not hold within `patience`, which is not adapted to the machine here; and any
/// error of the condition.
pub fn wait_until(patience: Duration, otherwise: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let begin = std::time::Instant::now();
    while !condition()? {
        ensure!(begin.elapsed() < patience, "{otherwise}");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Returns whether this kernel can forward IPv6 on single interfaces, as Linux can since 6.17. Before, a host that is
/// not a router has no local IPv6 networks.
pub fn forwards_ipv6_by_interface() -> bool {
    Path::new("/proc/sys/net/ipv6/conf/default/force_forwarding").exists()
}

/// Returns the options for a tunnel with the networks of [`Lab::join_private_lan`], as far as this kernel supports
/// them.
pub fn local_networks() -> &'static [&'static str] {
    const OPTIONS: [&str; 4] = ["--local", "192.168.7.0/24", "--local", "fd07::/64"];
    if forwards_ipv6_by_interface() { &OPTIONS } else { &OPTIONS[..2] }
}

/// Requires a usable TUN device, which every tunnel of the embedded WireGuard needs.
///
/// # Errors
/// [`Skip`] without one.
pub fn require_tun() -> Result<()> {
    Peer::Ours.check()
}

/// Requires a program in `PATH`, without running it: tests may judge by what runs on the host.
///
/// # Errors
/// [`Skip`] without it, unless the variable `unless` is 1.
pub fn require_program(program: &str, unless: &'static str) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|folder| folder.join(program).exists()) {
        return Ok(());
    }
    Err(Skip::error(format_args!("{program} is not installed"), unless))
}

/// Runs a test in a world of its own, with the whole lab up: [`world::test()`] and [`Lab::start`].
///
/// # Panics
/// If the body fails.
pub fn test(peer: Peer, body: impl FnOnce(&Lab) -> Result<()>) {
    test_within(world::TIME_LIMIT, peer, body);
}

/// [`test()`] for a test that may take another time than [`world::TIME_LIMIT`] on an ordinary machine.
///
/// # Panics
/// If the body fails.
pub fn test_within(limit: Duration, peer: Peer, body: impl FnOnce(&Lab) -> Result<()>) {
    world::test_within(limit, || body(&Lab::start(peer)?));
}
