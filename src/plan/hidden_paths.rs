//! The paths of the host that are hidden from programs: sockets by which a program could have the host resolve names,
//! outside the tunnel.

use std::path::PathBuf;

/// The sockets of resolvers, below `/run`. A trailing `*` matches any rest of a name.
const RESOLVERS: [&str; 13] = [
    // The C library's cache, and its replacements (nscd(8), unscd, nsncd).
    "nscd*",
    // systemd-resolved: its varlink sockets and hooks (systemd-resolved.service(8)).
    "systemd/resolve*",
    // Names of machines (nss-mymachines(8)).
    "systemd/machine",
    // Multicast DNS: Avahi (nss-mdns), mDNSResponder.
    "avahi-daemon",
    "mDNSResponder*",
    "mdnsd*",
    // sssd(8) may resolve names. Its pipes are in /var, see below.
    "sssd*",
    "resolvconf",
    // The control sockets of these resolvers can make them resolve names.
    "unbound*",
    "dnsmasq*",
    "knot-resolver",
    "pdns-recursor",
    // A private socket for root that offers the same as the system bus.
    "NetworkManager",
];

/// The system bus, on which systemd-resolved, Avahi and NetworkManager resolve names.
const SYSTEM_BUS: &str = "dbus/system_bus_socket";

/// Returns the paths that are hidden from a program. `system_bus` says whether it may see the system bus.
///
/// The system bus is hidden by default. Nearly every desktop has a service on it that resolves names for any caller,
/// without privileges. Desktop programs need the session bus in `/run/user`, which stays visible; a browser or torrent
/// client runs well without the system bus.
pub fn hidden_paths(system_bus: bool) -> Vec<PathBuf> {
    let bus = (!system_bus).then_some(SYSTEM_BUS);
    let in_run = RESOLVERS.into_iter().chain(bus).map(|name| PathBuf::from("/run").join(name));
    in_run.chain([PathBuf::from("/var/lib/sss/pipes")]).collect()
}
