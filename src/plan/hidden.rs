//! What the program does not see of the host's files: the sockets by which it could have the host look names up, past the tunnel.

use std::path::PathBuf;

/// Where resolvers are asked, and what they leave about for those who would ask them. A `*` at the end stands for any rest of a name.
const RESOLVERS: [&str; 13] = [
    // The C library's cache, and those that take its place (nscd(8), unscd, nsncd).
    "nscd*",
    // systemd-resolved: its varlink sockets, and hooks (systemd-resolved.service(8)).
    "systemd/resolve*",
    // Names of machines (nss-mymachines(8)).
    "systemd/machine",
    // Multicast DNS: Avahi (nss-mdns), mDNSResponder.
    "avahi-daemon",
    "mDNSResponder*",
    "mdnsd*",
    // sssd(8) may resolve names. Its pipes are elsewhere, see below.
    "sssd*",
    "resolvconf",
    // What these resolvers are controlled by, which can make them look names up.
    "unbound*",
    "dnsmasq*",
    "knot-resolver",
    "pdns-recursor",
    // A private way to the same as by the system bus, for root.
    "NetworkManager",
];

/// The system bus: systemd-resolved, Avahi and NetworkManager can be asked there.
const SYSTEM_BUS: &str = "dbus/system_bus_socket";

/// The paths that a program does not see.
///
/// The system bus is among them unless it is asked for: nearly every desktop has somebody on it who resolves names for whoever asks,
/// without any privilege. What desktop programs cannot do without is their user's own bus, in `/run/user`, and that stays: a browser or
/// a torrent client runs well without the other.
pub fn hidden_paths(system_bus: bool) -> Vec<PathBuf> {
    let bus = (!system_bus).then_some(SYSTEM_BUS);
    let in_run = RESOLVERS.into_iter().chain(bus).map(|name| PathBuf::from("/run").join(name));
    in_run.chain([PathBuf::from("/var/lib/sss/pipes")]).collect()
}
