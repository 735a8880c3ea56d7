//! The vectors, and the program that tries them all the time.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lab::agent;
use libc::{AF_INET, AF_INET6};
use vpn_exec::linux::capabilities::{self, CapabilitySet};
use vpn_exec::linux::namespace::NetworkNamespace;

use crate::attempts::*;

/// What stands between a program and those whom it may not reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// Its network namespace.
    Network,
    /// Its network namespace, and the rules in it.
    Rules,
    /// Its network namespace; it is the C library that sends.
    Library,
    /// Its view of files.
    Files,
    /// The guard before the sockets of processes outside.
    Sockets,
    /// That it has no privileges.
    Privileges,
    /// That it has no descriptors but its own.
    Descriptors,
}

/// A way by which a program tries to send, or to look up a name.
pub(crate) struct Vector {
    pub(crate) name: &'static str,
    pub(crate) by: By,
    attempt: fn(&Stamp) -> io::Result<()>,
}

const fn vector(name: &'static str, by: By, attempt: fn(&Stamp) -> io::Result<()>) -> Vector {
    Vector { name, by, attempt }
}

/// All of them.
pub(crate) const VECTORS: &[Vector] = &[
    vector("udp4-internet", By::Network, |stamp| udp(stamp, WEB4)),
    vector("udp6-internet", By::Network, |stamp| udp(stamp, WEB6)),
    vector("tcp4-internet", By::Network, |stamp| tcp(stamp, WEB4)),
    vector("tcp6-internet", By::Network, |stamp| tcp(stamp, WEB6)),
    vector("udp4-neighbour", By::Network, |stamp| udp(stamp, LAN4)),
    vector("udp6-neighbour", By::Network, |stamp| udp(stamp, LAN6)),
    vector("tcp4-neighbour", By::Network, |stamp| tcp(stamp, LAN4)),
    vector("tcp6-neighbour", By::Network, |stamp| tcp(stamp, LAN6)),
    vector("udp4-router", By::Network, |stamp| udp(stamp, ROUTER4)),
    vector("udp6-router", By::Network, |stamp| udp(stamp, ROUTER6)),
    vector("udp4-host", By::Network, |stamp| udp(stamp, HOST4)),
    vector("udp6-host", By::Network, |stamp| udp(stamp, HOST6)),
    // Look-ups by hand: of the host's resolver, which its /etc/resolv.conf names; of the host, where a resolver listens on all
    // addresses; of systemd-resolved's stub.
    vector("dns-udp4-resolver", By::Network, |stamp| dns_udp(stamp, ROUTER4)),
    vector("dns-udp6-resolver", By::Network, |stamp| dns_udp(stamp, ROUTER6)),
    vector("dns-tcp4-resolver", By::Network, |stamp| dns_tcp(stamp, ROUTER4)),
    vector("dns-tcp6-resolver", By::Network, |stamp| dns_tcp(stamp, ROUTER6)),
    vector("dns-udp-host", By::Network, |stamp| dns_udp(stamp, HOST4)),
    vector("dns-tcp-host", By::Network, |stamp| dns_tcp(stamp, HOST4)),
    vector("dns-udp-stub", By::Network, |stamp| dns_udp(stamp, STUB)),
    vector("dns-tcp-stub", By::Network, |stamp| dns_tcp(stamp, STUB)),
    // Of the host at its end of the link, and of a neighbour in a network that may be allowed, at all ports where names are asked for.
    vector("dns-udp4-gateway", By::Rules, |stamp| dns_udp(stamp, gateway(AF_INET)?)),
    vector("dns-udp6-gateway", By::Rules, |stamp| dns_udp(stamp, gateway(AF_INET6)?)),
    vector("dns-tcp4-gateway", By::Rules, |stamp| dns_tcp(stamp, gateway(AF_INET)?)),
    vector("dns-tcp6-gateway", By::Rules, |stamp| dns_tcp(stamp, gateway(AF_INET6)?)),
    vector("dot-gateway", By::Rules, |stamp| dns_tcp_at(stamp, gateway(AF_INET)?, 853)),
    vector("mdns-gateway", By::Rules, |stamp| dns_udp_at(stamp, gateway(AF_INET)?, 5353)),
    vector("llmnr-gateway", By::Rules, |stamp| dns_udp_at(stamp, gateway(AF_INET)?, 5355)),
    // By a transport protocol whose ports the rules for TCP and UDP do not see.
    vector("dns-udplite4-gateway", By::Rules, |stamp| dns_udplite(stamp, gateway(AF_INET)?)),
    vector("dns-udplite6-gateway", By::Rules, |stamp| dns_udplite(stamp, gateway(AF_INET6)?)),
    vector("dns-udplite4-neighbour", By::Network, |stamp| dns_udplite(stamp, PRIVATE4)),
    vector("dns-udp4-neighbour", By::Network, |stamp| dns_udp(stamp, PRIVATE4)),
    vector("dns-udp6-neighbour", By::Network, |stamp| dns_udp(stamp, PRIVATE6)),
    vector("dns-tcp4-neighbour", By::Network, |stamp| dns_tcp(stamp, PRIVATE4)),
    vector("dns-tcp6-neighbour", By::Network, |stamp| dns_tcp(stamp, PRIVATE6)),
    vector("dot-neighbour", By::Network, |stamp| dns_tcp_at(stamp, PRIVATE4, 853)),
    vector("mdns-neighbour", By::Network, |stamp| dns_udp_at(stamp, PRIVATE4, 5353)),
    vector("llmnr-neighbour", By::Network, |stamp| dns_udp_at(stamp, PRIVATE6, 5355)),
    // Look-ups by the C library.
    vector("getent", By::Library, getent),
    vector("python", By::Library, python),
    vector("curl", By::Library, curl),
    // Look-ups by the host's daemons.
    vector("nscd", By::Files, nscd),
    vector("nscd-of-others", By::Files, nscd_of_others),
    vector("varlink", By::Files, varlink),
    vector("dbus", By::Files, dbus),
    vector("avahi", By::Files, avahi),
    // Processes outside that do what they are told: by a socket of their own, and by the session bus.
    vector("server", By::Sockets, server),
    vector("server-by-link", By::Sockets, server_by_link),
    vector("engine", By::Sockets, engine),
    vector("session-bus", By::Sockets, session_bus),
    // Calls to everybody.
    vector("mdns4", By::Rules, |stamp| question_to_all(stamp, "224.0.0.251:5353")),
    vector("mdns6", By::Rules, |stamp| question_to_all(stamp, "[ff02::fb]:5353")),
    vector("llmnr4", By::Rules, |stamp| question_to_all(stamp, "224.0.0.252:5355")),
    vector("llmnr6", By::Rules, |stamp| question_to_all(stamp, "[ff02::1:3]:5355")),
    vector("broadcast", By::Rules, |stamp| call_to_all(stamp, "255.255.255.255:9")),
    vector("broadcast-neighbours", By::Rules, |stamp| call_to_all(stamp, "192.0.2.127:9")),
    vector("ssdp", By::Rules, |stamp| call_to_all(stamp, "239.255.255.250:1900")),
    vector("all-routers", By::Rules, |stamp| call_to_all(stamp, "[ff02::2]:9")),
    // Past the routes.
    vector("bound4", By::Network, |stamp| by_each_device(stamp, WEB4)),
    vector("bound6", By::Network, |stamp| by_each_device(stamp, WEB6)),
    vector("bound-neighbour", By::Network, |stamp| by_each_device(stamp, LAN4)),
    vector("packet-information4", By::Network, |stamp| packet_information(stamp, WEB4)),
    vector("packet-information6", By::Network, |stamp| packet_information(stamp, WEB6)),
    vector("unicast-interface", By::Network, |stamp| unicast_interface(stamp, WEB4)),
    vector("unrouted", By::Network, |stamp| unrouted(stamp, ROUTER4)),
    // Other kinds of sockets.
    vector("ping4", By::Network, ping4),
    vector("ping6", By::Network, ping6),
    vector("raw4", By::Privileges, raw4),
    vector("raw6", By::Privileges, raw6),
    vector("router-solicitation", By::Privileges, router_solicitation),
    vector("packet", By::Privileges, packet),
    vector("io-uring", By::Network, io_uring),
    vector("abstract", By::Network, abstract_socket),
    // Into other namespaces.
    vector("inherited", By::Descriptors, inherited),
    vector("join-host", By::Privileges, join_host),
    vector("user-namespace", By::Network, user_namespace),
];

/// The name of a listener on the host, in its network namespace.
pub(crate) const ABSTRACT: &str = "leaks-relay";

/// The variable with the stage in which the program tries everything as soon as it runs, without being told.
pub(crate) const AT_ONCE: &str = "VPN_EXEC_LEAKS_AT_ONCE";

/// The variable with the number of a descriptor that somebody before the program has left open: a socket of the host's.
pub(crate) const LEFT_OPEN: &str = "VPN_EXEC_LEAKS_LEFT_OPEN";

/// How long a vector rests after an attempt.
const REST: Duration = Duration::from_millis(40);

/// How long every vector may take for one attempt.
const LAP: Duration = Duration::from_secs(40);

/// What an attempt carries: its vector and its stage, in a form that can be part of a name, and is found in any bytes.
pub(crate) struct Stamp {
    /// One label of a name.
    pub(crate) label: String,
}

impl Stamp {
    pub(crate) fn new(vector: &str, stage: &str) -> Self {
        Self { label: format!("leak-{vector}-at-{stage}") }
    }

    /// A name to look up, which nobody knows.
    pub(crate) fn name(&self) -> String {
        format!("{}.example", self.label)
    }

    /// What is sent.
    pub(crate) fn text(&self) -> Vec<u8> {
        format!("{}.", self.label).into_bytes()
    }
}

/// The vectors and the stages of which there are stamps in some bytes.
pub(crate) fn stamps_in(bytes: &[u8]) -> BTreeSet<(String, String)> {
    let begins = bytes.windows(5).enumerate().filter(|(_, window)| window == b"leak-").map(|(at, _)| at + 5);
    begins
        .filter_map(|at| {
            let rest = &bytes[at..];
            let length =
                rest.iter().position(|byte| !byte.is_ascii_alphanumeric() && *byte != b'-').unwrap_or(rest.len());
            let (vector, stage) = std::str::from_utf8(&rest[..length]).ok()?.split_once("-at-")?;
            Some((vector.to_owned(), stage.to_owned()))
        })
        .collect()
}

/// The agent, which besides what others can tries vectors.
pub(crate) fn serve() {
    let rage = Rage::default();
    if let Ok(stage) = std::env::var(AT_ONCE) {
        rage.begin(&stage);
    }
    agent::serve_with(|words| match words {
        ["begin", stage] => {
            rage.begin(stage);
            Ok("begun".into())
        }
        ["lap", stage] => rage.lap(stage),
        ["pid"] => Ok(std::process::id().to_string()),
        ["enter", namespace] => enter(namespace),
        ["stamped", vector, label] => try_once(vector, label),
        _ => agent::perform(words),
    });
}

/// Becomes a program without privileges in a namespace that it has found.
fn enter(namespace: &str) -> io::Result<String> {
    NetworkNamespace::from(OwnedFd::from(File::open(namespace)?)).enter()?;
    capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty())?;
    Ok("inside".into())
}

/// Tries a vector on behalf of another one, whose stamp it is.
fn try_once(vector: &str, label: &str) -> io::Result<String> {
    let found = VECTORS.iter().find(|known| known.name == vector).ok_or(io::ErrorKind::InvalidInput)?;
    (found.attempt)(&Stamp { label: label.to_owned() }).map(|()| "done".into())
}

/// All vectors, each tried all the time on a thread of its own.
#[derive(Clone, Default)]
struct Rage(Arc<Mutex<Shared>>);

#[derive(Default)]
struct Shared {
    runs: bool,
    stage: String,
    /// How often each vector was tried in this stage, and what came of it last.
    tried: Vec<(usize, String)>,
}

impl Rage {
    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a stage.
    fn begin(&self, stage: &str) {
        let mut shared = self.lock();
        if shared.stage == stage {
            return;
        }
        shared.stage = stage.to_owned();
        shared.tried = vec![Default::default(); VECTORS.len()];
        if !std::mem::replace(&mut shared.runs, true) {
            for number in 0..VECTORS.len() {
                let own = self.clone();
                std::thread::spawn(move || own.try_on(number));
            }
        }
    }

    fn try_on(&self, number: usize) {
        let vector = &VECTORS[number];
        loop {
            let stage = self.lock().stage.clone();
            let begun = Instant::now();
            let outcome = (vector.attempt)(&Stamp::new(vector.name, &stage));
            let mut shared = self.lock();
            if shared.stage == stage {
                let (count, last) = &mut shared.tried[number];
                *count += 1;
                *last = outcome.map_or_else(|error| error.to_string(), |()| "sent".into());
            }
            drop(shared);
            // What takes much is not to keep the others from their turns.
            std::thread::sleep(lab::patience(REST) + begun.elapsed());
        }
    }

    /// Begins a stage, and returns once everything was tried in it: what came of it. It goes on then.
    fn lap(&self, stage: &str) -> io::Result<String> {
        self.begin(stage);
        let deadline = Instant::now() + lab::patience(LAP);
        loop {
            let shared = self.lock();
            let missing: Vec<&str> = VECTORS
                .iter()
                .zip(&shared.tried)
                .filter(|(_, tried)| tried.0 == 0)
                .map(|(vector, _)| vector.name)
                .collect();
            if missing.is_empty() {
                let all = VECTORS.iter().zip(&shared.tried);
                let all = all.map(|(vector, (count, last))| format!("{} {count} {last}", vector.name));
                return Ok(all.collect::<Vec<_>>().join("\n"));
            }
            if Instant::now() > deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("never tried: {missing:?}")));
            }
            drop(shared);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
