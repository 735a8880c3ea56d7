//! The judge: it looks for leaks in the packets on the host's interfaces and in the logs of the host's resolvers.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;

use anyhow::{Result, ensure};
use lab::dns::DnsServer;
use lab::nscd::Nscd;
use lab::stamp::{ABSTRACT_SOCKET, stamps_in};
use lab::stand_in::{Protocol, StandIn};
use lab::{Flow, HOST, Lab, POD_GATEWAY, PROVIDER, Packet, Side, TUNNEL_CLIENT, variables};
use vpn_exec::plan::NAME_PORTS;

use crate::vectors::{self, Vector};

/// The judge, with the servers on the host and in its network that log their clients.
pub(crate) struct Judge<'a> {
    lab: &'a Lab,
    /// Name servers on all addresses of the host and of its neighbour, on all ports of [`NAME_PORTS`].
    servers: [(&'static str, DnsServer); 2],
    stand_ins: Vec<(&'static str, StandIn)>,
    pub(crate) nscd: Option<Nscd>,
}

/// The host's sockets for lookups, and those of processes that execute requests.
const SOCKETS: [(&str, Protocol); 7] = [
    ("/run/nscd/socket", Protocol::None),
    ("/run/systemd/resolve/io.systemd.Resolve", Protocol::Varlink),
    ("/run/dbus/system_bus_socket", Protocol::Dbus),
    ("/run/avahi-daemon/socket", Protocol::Avahi),
    // Processes that execute requests.
    ("/run/leaks/server", Protocol::Any),
    ("/run/docker.sock", Protocol::Any),
    ("/run/user/0/bus", Protocol::Any),
];

impl<'a> Judge<'a> {
    /// Starts all servers. `nscd` takes the place of a pretended one.
    pub(crate) fn new(lab: &'a Lab, nscd: Option<Nscd>) -> Result<Self> {
        let mut judge = Self::of_network(lab)?;
        for (path, protocol) in SOCKETS.into_iter().skip(usize::from(nscd.is_some())) {
            judge.stand_ins.push((path, StandIn::listen(path, protocol)?));
        }
        judge.nscd = nscd;
        Ok(judge)
    }

    /// Starts only the servers that are reached over the host's network.
    pub(crate) fn of_network(lab: &'a Lab) -> Result<Self> {
        for program in PROGRAMS {
            lab::require_program(program, variables::REQUIRE_PEERS)?;
        }
        let stand_ins = vec![("the abstract socket", StandIn::listen_abstract(ABSTRACT_SOCKET, Protocol::Any)?)];
        let server = |site| DnsServer::start_everywhere(site, &NAME_PORTS);
        let servers =
            [("the host's name server", server(&lab.host)?), ("the neighbour's name server", server(&lab.lan)?)];
        Ok(Self { lab, servers, stand_ins, nscd: None })
    }

    /// Returns the leaks that were seen since the last verdict.
    pub(crate) fn verdict(&self, stage: &str) -> Result<Verdict> {
        let mut leaks = Vec::new();
        for packet in self.lab.capture.everything()? {
            let side = self.lab.capture.side(&packet);
            if side == Side::Uplink && came_by_tunnel(&packet) {
                continue;
            }
            let stamps = stamps_of(&packet);
            if stamps.is_empty() && !is_allowed(side, &packet) {
                leaks.push(Leak::without_stamp(format!("{side:?}: {packet:?}")));
            }
            leaks.extend(stamps.into_iter().map(|stamp| Leak::of(stamp, format!("{side:?}: {packet:?}"))));
        }
        let logged = |who: &str, text: &str| {
            stamps_in(text.as_bytes()).into_iter().map(|stamp| Leak::of(stamp, who.into())).collect::<Vec<_>>()
        };
        let servers = self.servers.iter().map(|(who, server)| (*who, server));
        for (who, server) in servers.chain([("the router's name server", &self.lab.resolver)]) {
            let questions = server.questions();
            // Questions through the tunnel come from the provider.
            for question in questions.iter().filter(|question| !PROVIDER.both().contains(&question.from)) {
                leaks.extend(logged(&format!("{who}, asked by {}", question.from), &format!("{}.", question.name)));
            }
        }
        for (who, stand_in) in &self.stand_ins {
            leaks.extend(logged(who, &stand_in.received()));
        }
        if let Some(nscd) = &self.nscd {
            leaks.extend(logged("nscd", &nscd.log()?));
        }
        for client in self.lab.web.clients().into_iter().filter(|client| !PROVIDER.both().contains(client)) {
            leaks.push(Leak::without_stamp(format!("the web server, from {client}")));
        }
        self.lab.capture.forget()?;
        Ok(Verdict { stage: stage.into(), leaks })
    }

    /// Returns the number of clients that the sockets have had.
    pub(crate) fn clients(&self) -> usize {
        self.stand_ins.iter().map(|(_, stand_in)| stand_in.clients()).sum()
    }
}

/// Returns whether an interface may carry a packet without a stamp.
fn is_allowed(side: Side, packet: &Packet) -> bool {
    match side {
        Side::Uplink | Side::Lan => packet.is_expected_on_uplink(),
        // Traffic of the host with itself.
        Side::Loopback => true,
        // Address resolution between the ends of the veth. A pod's cable carries encrypted packets, too.
        Side::Tunnel => packet.is_neighbourhood() || (packet.is_of_pod() && packet.is_expected_on_uplink()),
    }
}

/// The programs that vectors and stages run.
const PROGRAMS: [&str; 5] = ["getent", "python3", "curl", "unshare", "ip"];

/// Returns whether this kernel lets any process try a vector. If not, the vector is not a leak.
fn is_possible(vector: &Vector) -> bool {
    let disabled =
        vector.name == "io-uring" && std::fs::read_to_string(IO_URING).is_ok_and(|value| value.trim() != "0");
    if disabled {
        lab::skipped(format_args!("the vector io-uring: {IO_URING} disables it"));
    }
    !disabled
}

/// The parameter that forbids io_uring to all or to unprivileged processes.
const IO_URING: &str = "/proc/sys/kernel/io_uring_disabled";

/// Returns whether a packet is from the provider to the host, or an answer to one. Packets that leave the tunnel at the
/// provider may be addressed to the host, and reach it as those of any other customer.
fn came_by_tunnel(packet: &Packet) -> bool {
    // The provider masquerades TCP, UDP and ICMP, but not UDP-Lite.
    let provider = |address: SocketAddr| [PROVIDER, TUNNEL_CLIENT].iter().any(|end| end.both().contains(&address.ip()));
    let host = |address: SocketAddr| [HOST, POD_GATEWAY].iter().any(|host| host.both().contains(&address.ip()));
    let is_request = |flow: &Flow| provider(flow.source) && host(flow.destination);
    // In an ICMP error, the provider quotes a packet as it would have forwarded it: to its customer.
    let is_answer = |flow: &Flow| {
        let to_customer = TUNNEL_CLIENT.both().contains(&flow.destination.ip());
        host(flow.source) && NAME_PORTS.contains(&flow.source.port()) && (provider(flow.destination) || to_customer)
    };
    packet.flow.as_ref().is_some_and(|flow| {
        let is_either = |flow: &Flow| is_request(flow) || is_answer(flow);
        is_either(flow) || flow.quoted().is_some_and(|quoted| is_either(&quoted))
    })
}

fn stamps_of(packet: &Packet) -> BTreeSet<(String, String)> {
    packet.flow.iter().flat_map(|flow| stamps_in(&flow.payload)).collect()
}

/// A packet or a request that left the tunnel.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Leak {
    /// The vector and the stage, if the leak has a stamp.
    vector: Option<String>,
    stage: Option<String>,
    /// Where it was seen, and what.
    evidence: String,
}

impl Leak {
    fn of((vector, stage): (String, String), evidence: String) -> Self {
        Self { vector: Some(vector), stage: Some(stage), evidence }
    }

    fn without_stamp(evidence: String) -> Self {
        Self { vector: None, stage: None, evidence }
    }
}

impl fmt::Debug for Leak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |name: &Option<String>| name.clone().unwrap_or_else(|| "?".into());
        write!(f, "{} at {}: {}", name(&self.vector), name(&self.stage), self.evidence)
    }
}

/// The leaks until the end of a stage.
#[must_use]
pub(crate) struct Verdict {
    stage: String,
    leaks: Vec<Leak>,
}

impl Verdict {
    /// Returns the verdict on a stage that has just begun.
    pub(crate) fn none_yet(stage: &str) -> Self {
        Self { stage: stage.into(), leaks: Vec::new() }
    }

    /// Joins this verdict with a later one of the same stage.
    pub(crate) fn and(mut self, mut later: Self) -> Self {
        self.leaks.append(&mut later.leaks);
        self
    }

    /// Requires that nothing has leaked.
    pub(crate) fn expect_no_leak(&self) -> Result<()> {
        let distinct: BTreeSet<&Leak> = self.leaks.iter().collect();
        let first: Vec<_> = distinct.iter().take(20).collect();
        ensure!(distinct.is_empty(), "{} leaks in the stage {:?}, among them {first:#?}", distinct.len(), self.stage);
        Ok(())
    }

    /// Requires that nothing has leaked by the judged vectors, and nothing without a stamp.
    pub(crate) fn expect_no_leak_by(&self, judged: impl Fn(&Vector) -> bool) -> Result<()> {
        let vectors = vectors::all()?;
        let is_judged = |leak: &&Leak| match &leak.vector {
            Some(name) => vectors.iter().any(|vector| vector.name == *name && judged(vector)),
            None => true,
        };
        let leaks = self.leaks.iter().filter(is_judged).cloned().collect();
        Self { stage: self.stage.clone(), leaks }.expect_no_leak()
    }

    /// Returns the vectors that leaked in this stage, by their stamps.
    pub(crate) fn vectors(&self) -> BTreeSet<&str> {
        let of_stage = self.leaks.iter().filter(|leak| leak.stage.as_deref() == Some(&self.stage));
        of_stage.filter_map(|leak| leak.vector.as_deref()).collect()
    }

    /// Requires that each expected vector has leaked in this stage.
    pub(crate) fn expect_leaks(&self, wanted: impl Fn(&Vector) -> bool) -> Result<()> {
        let seen = self.vectors();
        let missing: Vec<&str> = vectors::all()?
            .iter()
            .filter(|vector| wanted(vector) && is_possible(vector))
            .map(|vector| vector.name.as_str())
            .filter(|name| !seen.contains(name))
            .collect();
        ensure!(missing.is_empty(), "in the stage {:?} the judge does not see {missing:?}, only {seen:?}", self.stage);
        Ok(())
    }
}
