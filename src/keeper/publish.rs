//! Ports in a keeper's life: those of the host that lead inside, and those by which a program reaches the host's loopback.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};

use super::system_calls;
use super::watch::Keeper;
use super::{Beginning, with_all_capabilities};
use crate::config::{Protocol, Publish};
use crate::failure::Doing;
use crate::failure::Failure;
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::listening_sockets;
use crate::plan::Plan;
use crate::relay::{self, AllowedClient, BindError, Budget, Limits, ListenSocket, PortDiff, Relay, RelayedPort};

/// How long a keeper that gives way, or was killed, may take to let go of its ports.
const HANDING_OVER: Duration = Duration::from_secs(2);

/// What is being done when a relay is started.
const PUBLISH: &str = "publish ports";
const REACH_HOST: &str = "let the host's ports be reached";

/// How often it is asked whether it has.
const BREATH: Duration = Duration::from_millis(5);

/// Sees to it that there can be as many sockets as a plan has ports, where that is more than usual. Hooks that are run while there are so
/// many may have as many files open themselves.
pub(super) fn make_room(plan: &Plan) -> Result<Option<Budget>, Failure> {
    let ports = plan.publish.len() + 2 * plan.host_ports.len();
    let soft = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let is_many = ports as u64 > soft / 2;
    is_many.then(Budget::of_process).transpose().doing("have as many files open as there are ports")
}

/// Takes the host's ports that are published, before anything else is done.
pub(super) fn bind(ports: &[Publish], beginning: &Beginning) -> Result<Vec<ListenSocket>, Failure> {
    let relayed_ports: Vec<RelayedPort> = ports.iter().map(RelayedPort::from).collect();
    let begin = Instant::now();
    loop {
        match relay::bind(&relayed_ports) {
            Err(_) if matches!(beginning, Beginning::TakeOver(_)) && begin.elapsed() < HANDING_OVER => {
                std::thread::sleep(BREATH);
            }
            Ok(bound) => return Ok(bound),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Takes the ports by which the host's loopback is reached from inside. The link is there already.
pub(super) fn bind_host_ports(plan: &Plan) -> Result<Vec<ListenSocket>, Failure> {
    let bound = relayed_host_ports(plan).iter().map(bind_unless_reached).collect::<Result<Vec<_>, _>>()?;
    Ok(bound.into_iter().flatten().collect())
}

/// The same, where a keeper was before. One that cannot be had is no reason to end the programs inside.
pub(super) fn take_over_host_ports(plan: &Plan) -> Vec<ListenSocket> {
    let begin = Instant::now();
    let take = |relayed: &RelayedPort| loop {
        match relay::bind(std::slice::from_ref(relayed)) {
            // It may be the former keeper's still.
            Err(error) if error.is_in_use() && begin.elapsed() < HANDING_OVER && !is_reached(relayed, Who::All) => {
                std::thread::sleep(BREATH);
            }
            Ok(bound) => return bound,
            Err(error) if error.is_in_use() && is_reached(relayed, Who::Any) => return Vec::new(),
            Err(error) => {
                tracing::error!("{error}");
                return Vec::new();
            }
        }
    };
    relayed_host_ports(plan).iter().flat_map(take).collect()
}

/// Where the host's loopback is reached from inside.
fn relayed_host_ports(plan: &Plan) -> Vec<RelayedPort> {
    let veth = &plan.veth;
    let ipv4 = (IpAddr::from(veth.host_ipv4), IpAddr::from(veth.inner_ipv4));
    let ipv6 = veth.host_ipv6.zip(veth.inner_ipv6).map(|(host, inner)| (host.into(), inner.into()));
    let of = |port| {
        [Some(ipv4), ipv6].into_iter().flatten().map(move |(host, inner)| {
            let client = AllowedClient { interface: veth.host_interface.clone(), address: inner };
            RelayedPort::of_host(port, host, client)
        })
    };
    plan.host_ports.iter().flat_map(|port| of(*port)).collect()
}

/// Takes a port, unless somebody has it whom the program reaches there.
///
/// A service that listens on all addresses has the link's, too, so nothing can be put before it; and nothing has to be: the program
/// reaches it as it is. That it listens there, and not on the loopback alone, is for its own configuration to say, which may change
/// without anybody asking us. So it is no failure. What has the port and does not listen is one: nobody would be reached.
fn bind_unless_reached(relayed: &RelayedPort) -> Result<Option<ListenSocket>, BindError> {
    match relay::bind(std::slice::from_ref(relayed)) {
        Ok(mut bound) => Ok(bound.pop()),
        Err(error) if error.is_in_use() && is_reached(relayed, Who::Any) => {
            tracing::info!("port {} of the host is reached without a relay: a service listens there", relayed.port);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Who may be listening.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    /// One that listens on all addresses.
    All,
    /// One that listens on all addresses, or on the one that was wanted.
    Any,
}

/// Whether somebody listens on the host where a port was to be relayed.
fn is_reached(relayed: &RelayedPort, who: Who) -> bool {
    let listening = match relayed.protocol {
        Protocol::Tcp => listening_sockets::tcp(relayed.port),
        Protocol::Udp => listening_sockets::udp(relayed.port),
    };
    let is_one = |address: &IpAddr| address.is_unspecified() || who == Who::Any && Some(*address) == relayed.address;
    listening.is_ok_and(|addresses| addresses.iter().any(is_one))
}

impl Keeper {
    /// Lets come what waits at the ports.
    pub(super) fn relay(&mut self, published: Vec<ListenSocket>, host_ports: Vec<ListenSocket>) -> Result<(), Failure> {
        if !published.is_empty() {
            self.published = Some(self.start_inside(published).doing(PUBLISH)?);
        }
        if !host_ports.is_empty() {
            self.host_ports = Some(self.start_on_host(host_ports).doing(REACH_HOST)?);
        }
        Ok(())
    }

    /// Starts to move what comes to ports of the host to the program.
    fn start_inside(&mut self, ports: Vec<ListenSocket>) -> io::Result<Relay> {
        let (targets, namespace) = self.tunnel.inner_addresses()?;
        let limits = self.relay_limits()?;
        with_all_capabilities(|| Relay::start(ports, targets, Some(namespace), limits, begin_relay))?
    }

    /// Starts to move what comes from inside to the host's loopback.
    fn start_on_host(&mut self, ports: Vec<ListenSocket>) -> io::Result<Relay> {
        let loopback = vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let limits = self.relay_limits()?;
        with_all_capabilities(|| Relay::start(ports, loopback, None, limits, begin_relay))?
    }

    /// What both relays share.
    fn relay_limits(&mut self) -> io::Result<Limits> {
        let descriptors = match &self.descriptors {
            Some(descriptors) => descriptors.clone(),
            None => self.descriptors.insert(Budget::of_process()?).clone(),
        };
        Ok(Limits::new(descriptors))
    }

    /// Ends the relays, and with them all that they carry.
    pub(super) fn end_relays(&mut self) {
        (self.published, self.host_ports, self.descriptors) = (None, None, None);
    }

    /// Takes the ports that a changed plan has besides.
    ///
    /// # Errors
    /// If one of them cannot be had. Then all is as it was.
    pub(super) fn prepare_ports(&mut self, wanted: &Plan) -> Result<Prepared, Failure> {
        if self.descriptors.is_none() {
            self.descriptors = make_room(wanted)?;
        }
        let relayed_ports: Vec<RelayedPort> = wanted.publish.iter().map(RelayedPort::from).collect();
        let take = |relayed: &RelayedPort| relay::bind(std::slice::from_ref(relayed)).map(|mut bound| bound.pop());
        let published = Step::prepare(&self.published, &relayed_ports, take)?;
        let host_ports = match Step::prepare(&self.host_ports, &relayed_host_ports(wanted), bind_unless_reached) {
            Ok(step) => step,
            Err(error) => {
                published.abandon(&self.published);
                return Err(error);
            }
        };
        let prepared = Prepared { published, host_ports };
        // A thread is the last that could be missing.
        if let Err(error) = self.start_relays(&prepared) {
            self.abandon_ports(prepared);
            return Err(error);
        }
        Ok(prepared)
    }

    fn start_relays(&mut self, prepared: &Prepared) -> Result<(), Failure> {
        if self.published.is_none() && !prepared.published.bound.is_empty() {
            self.published = Some(self.start_inside(Vec::new()).doing(PUBLISH)?);
        }
        if self.host_ports.is_none() && !prepared.host_ports.bound.is_empty() {
            self.host_ports = Some(self.start_on_host(Vec::new()).doing(REACH_HOST)?);
        }
        Ok(())
    }

    /// Changes to the ports that were taken, once the tunnel is changed.
    pub(super) fn commit_ports(&mut self, prepared: Prepared) {
        prepared.published.commit(&mut self.published);
        prepared.host_ports.commit(&mut self.host_ports);
        // The tunnel may have other addresses now, at which the program listens.
        if let Some(relay) = &self.published
            && let Err(error) = self.tunnel.inner_addresses().and_then(|(targets, _)| relay.set_targets(targets))
        {
            tracing::error!("the program is not reached at new addresses of its tunnel: {error}");
        }
    }

    /// Lets go of the ports that were taken.
    pub(super) fn abandon_ports(&mut self, prepared: Prepared) {
        prepared.published.abandon(&self.published);
        prepared.host_ports.abandon(&self.host_ports);
        end_if_idle(&mut self.published);
        end_if_idle(&mut self.host_ports);
    }
}

/// A change of ports that is ready to be made.
pub(super) struct Prepared {
    published: Step,
    host_ports: Step,
}

/// The same, for one relay.
struct Step {
    change: PortDiff,
    /// What is new and taken.
    bound: Vec<ListenSocket>,
}

impl Step {
    fn prepare(
        relay: &Option<Relay>,
        wanted: &[RelayedPort],
        take: impl Fn(&RelayedPort) -> Result<Option<ListenSocket>, BindError>,
    ) -> Result<Self, Failure> {
        let change = PortDiff::between(relay.as_ref().map_or(&[], Relay::ports), wanted);
        let take_all = |relayed_ports: &[RelayedPort]| -> Result<Vec<ListenSocket>, BindError> {
            let taken = relayed_ports.iter().map(&take).collect::<Result<Vec<_>, _>>()?;
            Ok(taken.into_iter().flatten().collect())
        };
        let mut step = Self { bound: take_all(&change.open)?, change };
        if let Some(relay) = relay.as_ref().filter(|_| !step.change.open_after_close.is_empty()) {
            // A port that is to be listened on at other addresses of the host is let go of for an instant.
            relay.release(&step.change.conflicting()).doing(PUBLISH)?;
            match take_all(&step.change.open_after_close) {
                Ok(bound) => step.bound.extend(bound),
                Err(error) => {
                    step.abandon(&Some(relay));
                    return Err(error.into());
                }
            }
        }
        Ok(step)
    }

    fn commit(self, relay: &mut Option<Relay>) {
        if let Some(living) = relay
            && let Err(error) = living.apply(self.change, self.bound)
        {
            tracing::error!("the ports are not reached any more: {error}");
        }
        end_if_idle(relay);
    }

    fn abandon(self, relay: &Option<impl std::borrow::Borrow<Relay>>) {
        let Some(relay) = relay else { return };
        drop(self.bound);
        let former = self.change.conflicting();
        let back = match relay::bind(&former) {
            Ok(bound) => relay.borrow().restore(bound),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = back {
            tracing::error!("a port that was let go of for a change could not be taken back: {error}");
        }
    }
}

/// A relay without relayed_ports has nothing to do.
fn end_if_idle(relay: &mut Option<Relay>) {
    if relay.as_ref().is_some_and(|relay| relay.ports().is_empty()) {
        *relay = None;
    }
}

/// Leaves a relay's thread what it may do: move what comes between sockets.
fn begin_relay() -> io::Result<()> {
    system_calls::relay()?.install()?;
    capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty())
}

impl From<BindError> for Failure {
    fn from(error: BindError) -> Self {
        let what = error.what();
        if let Some(port) = error.privileged() {
            let missing = io::Error::other("the right to use a port below 1024 is not there, or was given up");
            let advice = format!("take the tunnel down and up again as root, or choose another port than {port}");
            return Self::of(what, &missing).advise(advice);
        }
        let advice = error.advice().map(String::from);
        let failure = Self::of(what, &error.into());
        Self { advice, ..failure }
    }
}
