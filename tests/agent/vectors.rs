//! The vectors: ways by which a program may try to send past the tunnel or to look up a name. The agent tries all of
//! them at once and again and again while a stage of the tunnel's life lasts.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libc::{AF_INET, AF_INET6};
use vpn_exec::linux::capabilities::{self, CapabilitySet};
use vpn_exec::linux::namespace::NetworkNamespace;

use crate::attempts::*;
use crate::shared::patience::patience;
use crate::shared::stamp::{Protection, Stamp};
use crate::shared::variables;

/// A vector.
struct Vector {
    name: &'static str,
    /// The protection that stops it.
    protection: Protection,
    attempt: fn(&Stamp) -> io::Result<()>,
}

const fn vector(name: &'static str, protection: Protection, attempt: fn(&Stamp) -> io::Result<()>) -> Vector {
    Vector { name, protection, attempt }
}

/// All vectors.
const VECTORS: &[Vector] = &[
    vector("udp4-internet", Protection::Namespace, |stamp| udp(stamp, WEB4)),
    vector("udp6-internet", Protection::Namespace, |stamp| udp(stamp, WEB6)),
    vector("tcp4-internet", Protection::Namespace, |stamp| tcp(stamp, WEB4)),
    vector("tcp6-internet", Protection::Namespace, |stamp| tcp(stamp, WEB6)),
    vector("udp4-neighbour", Protection::Namespace, |stamp| udp(stamp, LAN4)),
    vector("udp6-neighbour", Protection::Namespace, |stamp| udp(stamp, LAN6)),
    vector("tcp4-neighbour", Protection::Namespace, |stamp| tcp(stamp, LAN4)),
    vector("tcp6-neighbour", Protection::Namespace, |stamp| tcp(stamp, LAN6)),
    vector("udp4-router", Protection::Namespace, |stamp| udp(stamp, ROUTER4)),
    vector("udp6-router", Protection::Namespace, |stamp| udp(stamp, ROUTER6)),
    vector("udp4-host", Protection::Namespace, |stamp| udp(stamp, HOST4)),
    vector("udp6-host", Protection::Namespace, |stamp| udp(stamp, HOST6)),
    // DNS by hand: to the resolver in the host's /etc/resolv.conf, to the host, where a resolver listens on all
    // addresses, and to the stub of systemd-resolved.
    vector("dns-udp4-resolver", Protection::Namespace, |stamp| dns_udp(stamp, ROUTER4)),
    vector("dns-udp6-resolver", Protection::Namespace, |stamp| dns_udp(stamp, ROUTER6)),
    vector("dns-tcp4-resolver", Protection::Namespace, |stamp| dns_tcp(stamp, ROUTER4)),
    vector("dns-tcp6-resolver", Protection::Namespace, |stamp| dns_tcp(stamp, ROUTER6)),
    vector("dns-udp-host", Protection::Namespace, |stamp| dns_udp(stamp, HOST4)),
    vector("dns-tcp-host", Protection::Namespace, |stamp| dns_tcp(stamp, HOST4)),
    vector("dns-udp-stub", Protection::Namespace, |stamp| dns_udp(stamp, STUB)),
    vector("dns-tcp-stub", Protection::Namespace, |stamp| dns_tcp(stamp, STUB)),
    // DNS, DNS over TLS, mDNS and LLMNR to the host at its end of the veth and to a neighbour in a local network.
    vector("dns-udp4-gateway", Protection::Rules, |stamp| dns_udp(stamp, gateway(AF_INET)?)),
    vector("dns-udp6-gateway", Protection::Rules, |stamp| dns_udp(stamp, gateway(AF_INET6)?)),
    vector("dns-tcp4-gateway", Protection::Rules, |stamp| dns_tcp(stamp, gateway(AF_INET)?)),
    vector("dns-tcp6-gateway", Protection::Rules, |stamp| dns_tcp(stamp, gateway(AF_INET6)?)),
    vector("dot-gateway", Protection::Rules, |stamp| dns_tcp_at(stamp, gateway(AF_INET)?, 853)),
    vector("mdns-gateway", Protection::Rules, |stamp| dns_udp_at(stamp, gateway(AF_INET)?, 5353)),
    vector("llmnr-gateway", Protection::Rules, |stamp| dns_udp_at(stamp, gateway(AF_INET)?, 5355)),
    // DNS over UDP-Lite, whose ports the rules for TCP and UDP do not match.
    vector("dns-udplite4-gateway", Protection::Rules, |stamp| dns_udplite(stamp, gateway(AF_INET)?)),
    vector("dns-udplite6-gateway", Protection::Rules, |stamp| dns_udplite(stamp, gateway(AF_INET6)?)),
    vector("dns-udplite4-neighbour", Protection::Namespace, |stamp| dns_udplite(stamp, PRIVATE4)),
    vector("dns-udp4-neighbour", Protection::Namespace, |stamp| dns_udp(stamp, PRIVATE4)),
    vector("dns-udp6-neighbour", Protection::Namespace, |stamp| dns_udp(stamp, PRIVATE6)),
    vector("dns-tcp4-neighbour", Protection::Namespace, |stamp| dns_tcp(stamp, PRIVATE4)),
    vector("dns-tcp6-neighbour", Protection::Namespace, |stamp| dns_tcp(stamp, PRIVATE6)),
    vector("dot-neighbour", Protection::Namespace, |stamp| dns_tcp_at(stamp, PRIVATE4, 853)),
    vector("mdns-neighbour", Protection::Namespace, |stamp| dns_udp_at(stamp, PRIVATE4, 5353)),
    vector("llmnr-neighbour", Protection::Namespace, |stamp| dns_udp_at(stamp, PRIVATE6, 5355)),
    // The resolver of a pod's cluster.
    vector("dns-udp4-cluster", Protection::Namespace, |stamp| dns_udp(stamp, CLUSTER4)),
    vector("dns-udp6-cluster", Protection::Namespace, |stamp| dns_udp(stamp, CLUSTER6)),
    // Lookups by the C library.
    vector("getent", Protection::Library, getent),
    vector("python", Protection::Library, python),
    vector("curl", Protection::Library, curl),
    // Lookups by daemons of the host.
    vector("nscd", Protection::Files, nscd),
    vector("nscd-by-proc", Protection::Files, nscd_by_proc),
    vector("varlink", Protection::Files, varlink),
    vector("dbus", Protection::Files, dbus),
    vector("avahi", Protection::Files, avahi),
    // Requests to processes outside that execute them: at their own sockets, and over the session bus.
    vector("server", Protection::Sockets, server),
    vector("server-by-link", Protection::Sockets, server_by_link),
    vector("engine", Protection::Sockets, engine),
    vector("session-bus", Protection::Sockets, session_bus),
    // Multicast and broadcast.
    vector("mdns4", Protection::Rules, |stamp| multicast_question(stamp, "224.0.0.251:5353")),
    vector("mdns6", Protection::Rules, |stamp| multicast_question(stamp, "[ff02::fb]:5353")),
    vector("llmnr4", Protection::Rules, |stamp| multicast_question(stamp, "224.0.0.252:5355")),
    vector("llmnr6", Protection::Rules, |stamp| multicast_question(stamp, "[ff02::1:3]:5355")),
    vector("broadcast", Protection::Rules, |stamp| multicast(stamp, "255.255.255.255:9")),
    vector("broadcast-neighbours", Protection::Rules, |stamp| multicast(stamp, "192.0.2.127:9")),
    vector("ssdp", Protection::Rules, |stamp| multicast(stamp, "239.255.255.250:1900")),
    vector("all-routers", Protection::Rules, |stamp| multicast(stamp, "[ff02::2]:9")),
    // Sockets that bypass the routes.
    vector("bound4", Protection::Namespace, |stamp| by_each_interface(stamp, WEB4)),
    vector("bound6", Protection::Namespace, |stamp| by_each_interface(stamp, WEB6)),
    vector("bound-neighbour", Protection::Namespace, |stamp| by_each_interface(stamp, LAN4)),
    vector("packet-information4", Protection::Namespace, |stamp| packet_information(stamp, WEB4)),
    vector("packet-information6", Protection::Namespace, |stamp| packet_information(stamp, WEB6)),
    vector("unicast-interface", Protection::Namespace, |stamp| unicast_interface(stamp, WEB4)),
    vector("unrouted", Protection::Namespace, unrouted),
    vector("from-each-address4", Protection::Namespace, |stamp| from_each_address(stamp, WEB4)),
    vector("from-each-address6", Protection::Namespace, |stamp| from_each_address(stamp, WEB6)),
    vector("reply-to-pretended-host", Protection::Namespace, reply_to_pretended_host),
    // Other kinds of sockets.
    vector("ping4", Protection::Namespace, ping4),
    vector("ping6", Protection::Namespace, ping6),
    vector("raw4", Protection::Privileges, raw4),
    vector("raw6", Protection::Privileges, raw6),
    vector("router-solicitation", Protection::Privileges, router_solicitation),
    vector("packet", Protection::Privileges, packet),
    vector("io-uring", Protection::Namespace, io_uring),
    vector("abstract", Protection::Namespace, abstract_socket),
    // Ways into other namespaces.
    vector("inherited", Protection::Descriptors, inherited),
    vector("join-host", Protection::Privileges, join_host),
    vector("user-namespace", Protection::Namespace, user_namespace),
];

/// The pause of a vector after an attempt.
const PAUSE: Duration = Duration::from_millis(40);

/// The time in which each vector is tried once.
const ROUND: Duration = Duration::from_secs(40);

/// Prints a line for each vector: its name and the protection that stops it.
pub(crate) fn list() {
    for vector in VECTORS {
        println!("{} {:?}", vector.name, vector.protection);
    }
}

/// All vectors, each tried on a thread of its own from the first stage on.
#[derive(Clone, Default)]
pub(crate) struct Vectors(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    runs: bool,
    stage: String,
    /// For each vector, the number of attempts in this stage and the result of the last one.
    tried: Vec<(usize, String)>,
}

impl Vectors {
    /// Begins the stage that the environment names, if any.
    pub(crate) fn start() -> io::Result<Self> {
        let vectors = Self::default();
        if let Ok(stage) = std::env::var(variables::STAGE) {
            vectors.begin(&stage);
        }
        Ok(vectors)
    }

    /// Performs an act that is about vectors.
    pub(crate) fn perform(&self, words: &[&str]) -> io::Result<String> {
        match words {
            ["begin-stage", stage] => {
                self.begin(stage);
                Ok("begun".into())
            }
            ["complete-stage", stage] => self.complete(stage),
            ["enter", namespace] => enter(namespace),
            ["try-vector", name, label] => {
                let vector = VECTORS.iter().find(|vector| vector.name == *name).ok_or(io::ErrorKind::InvalidInput)?;
                (vector.attempt)(&Stamp { label: (*label).to_owned() }).map(|()| "done".into())
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a stage: from now on, attempts carry its name.
    fn begin(&self, stage: &str) {
        let mut state = self.lock();
        if state.stage == stage {
            return;
        }
        state.stage = stage.to_owned();
        state.tried = vec![Default::default(); VECTORS.len()];
        if !std::mem::replace(&mut state.runs, true) {
            for number in 0..VECTORS.len() {
                let own = self.clone();
                std::thread::spawn(move || own.try_forever(number));
            }
        }
    }

    fn try_forever(&self, number: usize) {
        let vector = &VECTORS[number];
        loop {
            let stage = self.lock().stage.clone();
            let begun = Instant::now();
            let result = (vector.attempt)(&Stamp::new(vector.name, &stage));
            let mut state = self.lock();
            if state.stage == stage {
                let (count, last) = &mut state.tried[number];
                *count += 1;
                *last = result.map_or_else(|error| error.to_string(), |()| "sent".into());
            }
            drop(state);
            // The pause grows with the attempt, so that costly vectors leave time for the others.
            std::thread::sleep(patience(PAUSE) + begun.elapsed());
        }
    }

    /// Begins a stage, and waits until each vector was tried in it. Returns the results; the attempts go on.
    fn complete(&self, stage: &str) -> io::Result<String> {
        self.begin(stage);
        let deadline = Instant::now() + patience(ROUND);
        loop {
            let state = self.lock();
            let with_results = || VECTORS.iter().zip(&state.tried);
            let missing = with_results().filter(|(_, tried)| tried.0 == 0).map(|(vector, _)| vector.name);
            let missing: Vec<&str> = missing.collect();
            if missing.is_empty() {
                let all = with_results().map(|(vector, (count, last))| format!("{} {count} {last}", vector.name));
                return Ok(all.collect::<Vec<_>>().join("\n"));
            }
            if Instant::now() > deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("never tried: {missing:?}")));
            }
            drop(state);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Enters a network namespace by a path, and gives up all privileges.
fn enter(namespace: &str) -> io::Result<String> {
    NetworkNamespace::from(OwnedFd::from(File::open(namespace)?)).enter()?;
    capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty())?;
    Ok("inside".into())
}
