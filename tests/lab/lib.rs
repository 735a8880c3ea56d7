//! The lab: a pretend Internet in namespaces, in which vpn-exec's tests and its demonstration run the real program with
//! real packets, as root or as an ordinary user, and touch nothing of the machine.
//!
//! ```text
//!                  192.0.2.0/26            198.51.100.0/26
//!   lan ───────── host ───────────── router ───────────── provider ··· inside the tunnel: 10.64.0.0/24, fd64::/64
//!    192.0.2.64/26                     │
//!                                     web   203.0.113.0/26
//! ```
//!
//! - [`world`]: the user, mount, PID and network namespaces in which one test lives, and with which all of it dies.
//! - [`Lab`]: the network above. `host` is the world's own network namespace, so a command that a test starts is on the host.
//! - [`Provider`]: the WireGuard peer that masquerades, our own implementation or wireguard-go.
//! - [`Capture`]: what really left and reached the host. Leaks are judged by it, never by what a program says.
//! - [`Snapshot`]: the state of the host, to be compared.
//! - [`dns`], [`http`]: the servers, which log, and clients for them.
//! - [`nscd`], [`stand_in`]: the host's own resolvers, real and pretended, which log who asks.
//! - [`nat`]: masquerading, for the provider, and for tests that want a firewall on the host.
//! - [`agent`]: a program to run inside, which does what a test tells it; [`trespass`]: what a hostile one does.
//!
//! A test reads so; it is skipped, loudly, where there is no usable `/dev/net/tun`:
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
//! It is a package of its own, so that it is compiled once and not for each test, and so that a test which does not use
//! all of it is no reason for a warning.

pub mod agent;
mod capture;
pub mod dns;
pub mod http;
mod internet;
pub mod nat;
mod nest;
mod netlink;
pub mod nscd;
mod packet;
mod provider;
mod snapshot;
pub mod stand_in;
mod syscalls;
pub mod trespass;
pub mod world;

use std::sync::OnceLock;
use std::time::Duration;

pub use anyhow::{Context, Error, Result, bail, ensure};

pub use capture::{Capture, Side};
pub use internet::{
    Addresses, HOST, HOST_ON_LAN, HOST_ON_PRIVATE_LAN, LAN, Lab, PRIVATE_LAN, PROVIDER, ROUTER, Reach, TUNNEL_CLIENT,
    TUNNEL_RESOLVER, WEB,
};
pub use packet::{Flow, Packet};
pub use provider::{PROVIDER_PORT, Peer, Provider, passing_tun};
pub use snapshot::Snapshot;
pub use syscalls::{request_unknown_key, send_by_io_uring};
pub use trespass::send_storm;
pub use world::Skip;

/// The backend that tests have vpn-exec use, unless they are about one: what the environment variable `VPN_EXEC_TEST_BACKEND` says, else
/// the embedded one, which every machine has.
pub fn backend() -> &'static str {
    static BACKEND: OnceLock<String> = OnceLock::new();
    BACKEND.get_or_init(|| std::env::var("VPN_EXEC_TEST_BACKEND").unwrap_or_else(|_| "userspace".into()))
}

/// The program under test: see [`vpn_exec()`].
#[macro_export]
macro_rules! program {
    () => {
        $crate::vpn_exec(env!("CARGO_BIN_EXE_vpn-exec"))
    };
}

/// The program under test: the one that the environment variable `VPN_EXEC_BIN` names, such as a static one, else the one that cargo has
/// built for the tests.
pub fn vpn_exec(built: &'static str) -> &'static str {
    static PROGRAM: OnceLock<Option<String>> = OnceLock::new();
    let other = PROGRAM.get_or_init(|| std::env::var("VPN_EXEC_BIN").ok().filter(|path| !path.is_empty()));
    other.as_deref().unwrap_or(built)
}

/// How long something may take, and how long is waited for what should not come: on an ordinary machine as long as said, and so many times
/// as long as the environment variable `VPN_EXEC_TEST_PATIENCE` says where all is slower, under emulation.
pub fn patience(usual: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    usual
        * *FACTOR.get_or_init(|| {
            let text = std::env::var("VPN_EXEC_TEST_PATIENCE").unwrap_or_else(|_| "1".into());
            text.parse().ok().filter(|factor| *factor > 0).expect("VPN_EXEC_TEST_PATIENCE is a whole number from 1 on")
        })
}

/// Waits until something is so.
///
/// # Errors
/// `otherwise`, if it is not so within `patience`, which is not scaled here; and whatever cannot be found out.
pub fn wait_until(patience: Duration, otherwise: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let begin = std::time::Instant::now();
    while !is_so()? {
        ensure!(begin.elapsed() < patience, "{otherwise}");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Whether this kernel can have single interfaces forward IPv6, as Linux can since 6.17. Before, a host that is no router has no local
/// IPv6 networks.
pub fn forwards_ipv6_by_interface() -> bool {
    std::path::Path::new("/proc/sys/net/ipv6/conf/default/force_forwarding").exists()
}

/// The options of a tunnel that leads to the network of [`Lab::join_private_lan`], as far as this kernel can have it.
pub fn local_networks() -> &'static [&'static str] {
    const OPTIONS: [&str; 4] = ["--local", "192.168.7.0/24", "--local", "fd07::/64"];
    if forwards_ipv6_by_interface() { &OPTIONS } else { &OPTIONS[..2] }
}

/// Whether this machine has a TUN device that may be used: what every tunnel of the embedded WireGuard needs.
///
/// # Errors
/// [`Skip`] if it has not.
pub fn require_tun() -> Result<()> {
    Peer::Ours.check()
}

/// Runs a test in a world of its own, with the whole lab up: [`world::test()`] and [`Lab::start`].
pub fn test<F: FnOnce(&Lab) -> Result<()>>(peer: Peer, body: F) {
    test_within(world::TIME_LIMIT, peer, body);
}

/// [`test()`] for a test that may take another time than [`world::TIME_LIMIT`] on an ordinary machine.
pub fn test_within<F: FnOnce(&Lab) -> Result<()>>(limit: Duration, peer: Peer, body: F) {
    world::test_within(limit, std::any::type_name::<F>(), || body(&Lab::start(peer)?));
}
