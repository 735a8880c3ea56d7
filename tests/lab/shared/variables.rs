//! Every environment variable that tests, benchmarks and their helper programs read. CONTRIBUTING.md has a table of
//! those that a person sets; a test compares the two.

/// The vpn-exec that tests run in place of the one that cargo built with them, for example a static one.
pub const BIN: &str = "VPN_EXEC_BIN";

/// The backend that tests have vpn-exec use unless they are about one: `userspace` (the default) or `kernel`.
pub const BACKEND: &str = "VPN_EXEC_TEST_BACKEND";

/// 1 has tests make tunnels without root, in a user namespace, as an ordinary user does.
pub const ROOTLESS: &str = "VPN_EXEC_TEST_ROOTLESS";

/// The WireGuard implementation of the provider in tests that do not need a certain one: `wireguard-go` or `kernel`
/// instead of ours.
pub const PEER: &str = "VPN_EXEC_TEST_PEER";

/// The factor by which all time limits of tests are multiplied: a whole number, 1 by default, more under emulation.
pub const PATIENCE: &str = "VPN_EXEC_TEST_PATIENCE";

/// The file to which each skipped test is appended, one line each.
pub const SKIPS: &str = "VPN_EXEC_TEST_SKIPS";

/// Set by `benches/run`: the file to which benchmarks add each result, as a line of JSON.
pub const BENCH_RESULTS: &str = "VPN_EXEC_BENCH_RESULTS";

/// The number from which the random kills of `lifecycle::chaos` are derived: replays a run that has failed.
pub const CHAOS_SEED: &str = "CHAOS_SEED";

/// The number of random kills, in place of as many as a short time allows.
pub const CHAOS_ROUNDS: &str = "CHAOS_ROUNDS";

/// glibc's nscd, where it is not installed but unpacked.
pub const NSCD: &str = "VPN_EXEC_NSCD";

/// Debian's unscd, which cannot be installed beside nscd.
pub const UNSCD: &str = "VPN_EXEC_UNSCD";

/// Docker's package, where it is not installed but unpacked: the directory with `usr`.
pub const DOCKER: &str = "VPN_EXEC_DOCKER";

/// The directory in which `tests/containers/setup` has made the newest container engines.
pub const ENGINES: &str = "VPN_EXEC_ENGINES";

/// The vpn-exec of version 0.1.0 that `tests/previous/setup` has built.
pub const PREVIOUS: &str = "VPN_EXEC_PREVIOUS";

/// The newest wireguard-go, beside the one that is installed, which may have no offloads.
pub const WIREGUARD_GO: &str = "VPN_EXEC_WIREGUARD_GO";

/// 1 makes a missing or unusable /dev/net/tun a failure instead of a skip.
pub const REQUIRE_TUN: &str = "VPN_EXEC_REQUIRE_TUN";

/// 1 makes a missing tool (wireguard-tools, wireguard-go, nscd, util-linux and others) a failure instead of a skip.
pub const REQUIRE_PEERS: &str = "VPN_EXEC_REQUIRE_PEERS";

/// 1 makes a missing program of everyday use (tmux, emacs, browsers and others) a failure instead of a skip.
pub const REQUIRE_PROGRAMS: &str = "VPN_EXEC_REQUIRE_PROGRAMS";

/// 1 makes a missing container engine (podman, crun, Docker, containerd and others) a failure instead of a skip.
pub const REQUIRE_ENGINES: &str = "VPN_EXEC_REQUIRE_ENGINES";

/// 1 makes a user without other user IDs, as an ordinary user is, a failure instead of a skip. For root.
pub const REQUIRE_USERS: &str = "VPN_EXEC_REQUIRE_USERS";

/// 1 makes a kernel without WireGuard a failure instead of a skip.
pub const REQUIRE_KERNEL_WIREGUARD: &str = "VPN_EXEC_REQUIRE_KERNEL_WIREGUARD";

/// 1 makes a kernel without the tables of iptables-legacy a failure instead of a skip.
pub const REQUIRE_LEGACY_TABLES: &str = "VPN_EXEC_REQUIRE_LEGACY_TABLES";

/// Set by the lab for a process that is inside a world (see `world`).
pub const IN_WORLD: &str = "VPN_EXEC_LAB";

/// Set by tests for vpn-exec: the point of `fault` at which it fails, stops or is killed.
pub const FAIL: &str = "VPN_EXEC_TEST_FAIL";

/// Set by tests for vpn-exec: the protections of `fault` that it leaves out, separated by commas.
pub const BREAK: &str = "VPN_EXEC_TEST_BREAK";

/// Set by tests for vpn-exec: the age in seconds at which a handshake is stale.
pub const STALE: &str = "VPN_EXEC_TEST_STALE";

/// Set by tests for the agent: the addresses to which it sends all the time while it performs a task.
pub const SEND_TO: &str = "VPN_EXEC_TEST_SEND_TO";

/// Set by tests for the agent: the stage in whose name it tries all leak vectors as soon as it runs.
pub const STAGE: &str = "VPN_EXEC_TEST_STAGE";

/// Set by tests for the agent: the number of a descriptor that another process has left open, a socket of the host's
/// network namespace.
pub const INHERITED_SOCKET: &str = "VPN_EXEC_TEST_INHERITED_SOCKET";

/// Set by a test's configuration for the agent: the hook as which it runs.
pub const HOOK: &str = "VPN_EXEC_TEST_HOOK";

/// Set by `config_differential` for itself: it runs inside its namespaces.
pub const IN_DIFFERENTIAL: &str = "VPN_EXEC_DIFFERENTIAL_INSIDE";

/// Returns whether the environment sets a variable to 1.
pub fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| value == "1")
}
