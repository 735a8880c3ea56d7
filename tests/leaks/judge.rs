//! The judge: what went over the host's interfaces, and what the resolvers of the host were asked.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;

use anyhow::{Result, ensure};
use lab::dns::DnsServer;
use lab::nscd::Nscd;
use lab::stand_in::{StandIn, Tongue};
use lab::{Flow, HOST, Lab, PROVIDER, Packet, Side, Skip, TUNNEL_CLIENT};
use vpn_exec::plan::NAME_PORTS;

use crate::vectors::{ABSTRACT, VECTORS, Vector, stamps_in};

/// All who could be told something that is none of their business, but for the network itself.
pub(crate) struct Witnesses<'a> {
    lab: &'a Lab,
    /// Servers for names on all addresses, at all ports of such.
    servers: [(&'static str, DnsServer); 2],
    stand_ins: Vec<(&'static str, StandIn)>,
    pub(crate) nscd: Option<Nscd>,
}

/// The sockets on the host by which names are looked up, and one who would pass on what he is told.
const SOCKETS: [(&str, Tongue); 7] = [
    ("/run/nscd/socket", Tongue::None),
    ("/run/systemd/resolve/io.systemd.Resolve", Tongue::Varlink),
    ("/run/dbus/system_bus_socket", Tongue::Dbus),
    ("/run/avahi-daemon/socket", Tongue::Avahi),
    // Processes that do what they are told.
    ("/run/leaks/server", Tongue::Any),
    ("/run/docker.sock", Tongue::Any),
    ("/run/user/0/bus", Tongue::Any),
];

impl<'a> Witnesses<'a> {
    /// Has everybody take their places. In nscd's is the given one, or somebody who takes down what he is asked.
    pub(crate) fn gather(lab: &'a Lab, nscd: Option<Nscd>) -> Result<Self> {
        let mut all = Self::gather_in_network(lab)?;
        for (path, tongue) in SOCKETS.into_iter().skip(usize::from(nscd.is_some())) {
            all.stand_ins.push((path, StandIn::listen(path, tongue)?));
        }
        all.nscd = nscd;
        Ok(all)
    }

    /// Those alone who are reached by the host's network.
    pub(crate) fn gather_in_network(lab: &'a Lab) -> Result<Self> {
        require_programs()?;
        let stand_ins = vec![("the abstract socket", StandIn::listen_abstract(ABSTRACT, Tongue::Any)?)];
        let server = |site| DnsServer::start_everywhere(site, &NAME_PORTS);
        let servers =
            [("the host's name server", server(&lab.host)?), ("the neighbour's name server", server(&lab.lan)?)];
        Ok(Self { lab, servers, stand_ins, nscd: None })
    }

    /// Judges a stage: all that came until now is of it, or of one before it.
    pub(crate) fn verdict(&self, stage: &str) -> Result<Verdict> {
        let mut leaks = Vec::new();
        for packet in self.lab.capture.everything()? {
            let side = self.lab.capture.side(&packet);
            if side == Side::Uplink && came_by_tunnel(&packet) {
                continue;
            }
            let stamps = stamps_of(&packet);
            if stamps.is_empty() && !is_allowed(side, &packet) {
                leaks.push(Leak { vector: None, stage: None, witness: format!("{side:?}: {packet:?}") });
            }
            leaks.extend(stamps.into_iter().map(|stamp| Leak::of(stamp, format!("{side:?}: {packet:?}"))));
        }
        let heard = |who: &str, text: &str| {
            stamps_in(text.as_bytes()).into_iter().map(|stamp| Leak::of(stamp, who.into())).collect::<Vec<_>>()
        };
        let servers = self.servers.iter().map(|(who, server)| (*who, server));
        for (who, server) in servers.chain([("the router's name server", &self.lab.resolver)]) {
            let questions = server.questions();
            // What comes by the tunnel comes from the provider.
            for question in questions.iter().filter(|question| !PROVIDER.both().contains(&question.from)) {
                leaks.extend(heard(&format!("{who}, asked by {}", question.from), &format!("{}.", question.name)));
            }
        }
        for (who, stand_in) in &self.stand_ins {
            leaks.extend(heard(who, &stand_in.heard()));
        }
        if let Some(nscd) = &self.nscd {
            leaks.extend(heard("nscd", &nscd.log()?));
        }
        for caller in self.lab.web.callers().into_iter().filter(|caller| !PROVIDER.both().contains(caller)) {
            leaks.push(Leak { vector: None, stage: None, witness: format!("the web server, called by {caller}") });
        }
        self.lab.capture.forget()?;
        Ok(Verdict { stage: stage.into(), leaks })
    }

    /// How many callers the sockets had.
    pub(crate) fn callers(&self) -> usize {
        self.stand_ins.iter().map(|(_, stand_in)| stand_in.callers()).sum()
    }
}

/// What an interface may carry besides what is stamped.
fn is_allowed(side: Side, packet: &Packet) -> bool {
    match side {
        Side::Uplink | Side::Lan => packet.is_expected_on_uplink(),
        // The host speaks to itself as it likes.
        Side::Loopback => true,
        // The veth's two ends find each other, and that is all.
        Side::Tunnel => packet.is_neighbourhood(),
    }
}

/// What the vectors run, and the stages.
const PROGRAMS: [&str; 5] = ["getent", "python3", "curl", "unshare", "ip"];

/// Looks for them without running any: on the host, that could already be seen.
fn require_programs() -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    for program in PROGRAMS {
        if !std::env::split_paths(&path).any(|directory| directory.join(program).exists()) {
            let reason = format!("there is no program {program}");
            return Err(Skip { reason, unless: "VPN_EXEC_REQUIRE_PEERS" }.into());
        }
    }
    Ok(())
}

/// Whether this kernel lets anybody try a vector. One that it does not let is no way out.
fn is_possible(vector: &Vector) -> bool {
    let disabled =
        vector.name == "io-uring" && std::fs::read_to_string(IO_URING).is_ok_and(|value| value.trim() != "0");
    if disabled {
        println!("skipped: io_uring, which {IO_URING} disables");
    }
    !disabled
}

/// The switch by which nobody may use io_uring, or some privileged users alone.
const IO_URING: &str = "/proc/sys/kernel/io_uring_disabled";

/// Whether the host was called by the provider, or answers it: what left the tunnel there may be meant for the host itself, and come
/// to it as from any other customer of the provider's.
fn came_by_tunnel(packet: &Packet) -> bool {
    let provider = |address: SocketAddr| PROVIDER.both().contains(&address.ip());
    let host = |address: SocketAddr| HOST.both().contains(&address.ip());
    let calls = |flow: &Flow| provider(flow.source) && host(flow.destination);
    // What the provider cannot deliver any more it quotes as it would have passed it on: to its customer.
    let answers = |flow: &Flow| {
        let to_customer = TUNNEL_CLIENT.both().contains(&flow.destination.ip());
        host(flow.source) && NAME_PORTS.contains(&flow.source.port()) && (provider(flow.destination) || to_customer)
    };
    packet.flow.as_ref().is_some_and(|flow| {
        let is_either = |flow: &Flow| calls(flow) || answers(flow);
        is_either(flow) || flow.quoted().is_some_and(|quoted| is_either(&quoted))
    })
}

fn stamps_of(packet: &Packet) -> BTreeSet<(String, String)> {
    packet.flow.iter().flat_map(|flow| stamps_in(&flow.payload)).collect()
}

/// Something that somebody was told.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Leak {
    /// By which vector, and in which stage, if it says so.
    vector: Option<String>,
    stage: Option<String>,
    /// Who was told, and what.
    witness: String,
}

impl Leak {
    fn of((vector, stage): (String, String), witness: String) -> Self {
        Self { vector: Some(vector), stage: Some(stage), witness }
    }
}

impl fmt::Debug for Leak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |name: &Option<String>| name.clone().unwrap_or_else(|| "?".into());
        write!(f, "{} at {}: {}", name(&self.vector), name(&self.stage), self.witness)
    }
}

/// What has leaked until the end of a stage.
#[must_use]
pub(crate) struct Verdict {
    stage: String,
    leaks: Vec<Leak>,
}

impl Verdict {
    /// Of a stage that has just begun.
    pub(crate) fn none_yet(stage: &str) -> Self {
        Self { stage: stage.into(), leaks: Vec::new() }
    }

    /// This one and a later one of the same stage.
    pub(crate) fn and(mut self, mut later: Self) -> Self {
        self.leaks.append(&mut later.leaks);
        self
    }

    /// Demands that nothing has.
    pub(crate) fn is_silence(&self) -> Result<()> {
        let distinct: BTreeSet<&Leak> = self.leaks.iter().collect();
        let first: Vec<_> = distinct.iter().take(20).collect();
        ensure!(distinct.is_empty(), "{} leaks in the stage {:?}, among them {first:#?}", distinct.len(), self.stage);
        Ok(())
    }

    /// Demands that nothing has by the vectors that are judged, and nothing that says nothing of itself.
    pub(crate) fn is_silence_of(&self, judged: impl Fn(&Vector) -> bool) -> Result<()> {
        let is_judged = |leak: &&Leak| match &leak.vector {
            Some(name) => VECTORS.iter().any(|vector| vector.name == name && judged(vector)),
            None => true,
        };
        let leaks = self.leaks.iter().filter(is_judged).cloned().collect();
        Self { stage: self.stage.clone(), leaks }.is_silence()
    }

    /// The vectors that leaked in this stage, by what their attempts say.
    pub(crate) fn vectors(&self) -> BTreeSet<&str> {
        let of_stage = self.leaks.iter().filter(|leak| leak.stage.as_deref() == Some(&self.stage));
        of_stage.filter_map(|leak| leak.vector.as_deref()).collect()
    }

    /// Demands that each of these vectors is reported to have leaked in this stage.
    pub(crate) fn reports(&self, wanted: impl Fn(&Vector) -> bool) -> Result<()> {
        let reported = self.vectors();
        let missing: Vec<&str> = VECTORS
            .iter()
            .filter(|vector| wanted(vector) && is_possible(vector))
            .map(|vector| vector.name)
            .filter(|name| !reported.contains(name))
            .collect();
        ensure!(
            missing.is_empty(),
            "in the stage {:?} the judge does not see {missing:?}, only {reported:?}",
            self.stage
        );
        Ok(())
    }
}
