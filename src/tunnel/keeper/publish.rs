//! Ports in a keeper's life: those of the host that lead inside, and those by which a program reaches the host's loopback.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use super::super::error::Doing;
use super::super::{TunnelError, filter};
use super::watch::Keeper;
use super::{Beginning, with_all_capabilities};
use crate::config::{Protocol, Publish};
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::listeners;
use crate::plan::Plan;
use crate::relay::{self, BindError, Bound, Entrance, OtherEnd, Relay};

/// How long a keeper that gives way, or was killed, may take to let go of its ports.
const HANDING_OVER: Duration = Duration::from_secs(2);

/// How often it is asked whether it has.
const BREATH: Duration = Duration::from_millis(5);

/// Takes the host's ports that are published, before anything else is done.
pub(super) fn bind(ports: &[Publish], beginning: &Beginning) -> Result<Vec<Bound>, TunnelError> {
    let entrances: Vec<Entrance> = ports.iter().map(Entrance::from).collect();
    let begin = Instant::now();
    loop {
        match relay::bind(&entrances) {
            Err(_) if matches!(beginning, Beginning::TakeOver(_)) && begin.elapsed() < HANDING_OVER => {
                std::thread::sleep(BREATH);
            }
            Ok(bound) => return Ok(bound),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Takes the ports by which the host's loopback is reached from inside. The link is there already.
pub(super) fn bind_host_ports(plan: &Plan) -> Result<Vec<Bound>, TunnelError> {
    let bound = host_entrances(plan).iter().map(bind_unless_reached).collect::<Result<Vec<_>, _>>()?;
    Ok(bound.into_iter().flatten().collect())
}

/// The same, where a keeper was before. One that cannot be had is no reason to end the programs inside.
pub(super) fn take_over_host_ports(plan: &Plan) -> Vec<Bound> {
    let begin = Instant::now();
    let take = |entrance: &Entrance| loop {
        match relay::bind(std::slice::from_ref(entrance)) {
            // It may be the former keeper's still.
            Err(error) if error.is_taken() && begin.elapsed() < HANDING_OVER && !is_reached(entrance, Who::All) => {
                std::thread::sleep(BREATH);
            }
            Ok(bound) => return bound,
            Err(error) if error.is_taken() && is_reached(entrance, Who::Any) => return Vec::new(),
            Err(error) => {
                tracing::error!("{error}");
                return Vec::new();
            }
        }
    };
    host_entrances(plan).iter().flat_map(take).collect()
}

/// Where the host's loopback is reached from inside.
fn host_entrances(plan: &Plan) -> Vec<Entrance> {
    let veth = &plan.veth;
    let ipv4 = (IpAddr::from(veth.host_ipv4), IpAddr::from(veth.inner_ipv4));
    let ipv6 = veth.host_ipv6.zip(veth.inner_ipv6).map(|(host, inner)| (host.into(), inner.into()));
    let of = |port| {
        [Some(ipv4), ipv6].into_iter().flatten().map(move |(host, inner)| {
            let only = OtherEnd { interface: veth.host_interface.clone(), address: inner };
            Entrance::of_host(port, host, only)
        })
    };
    plan.host_ports.iter().flat_map(|port| of(*port)).collect()
}

/// Takes a port, unless somebody has it whom the program reaches there.
///
/// A service that listens on all addresses has the link's, too, so nothing can be put before it; and nothing has to be: the program
/// reaches it as it is. That it listens there, and not on the loopback alone, is for its own configuration to say, which may change
/// without anybody asking us. So it is no failure. What has the port and does not listen is one: nobody would be reached.
fn bind_unless_reached(entrance: &Entrance) -> Result<Option<Bound>, BindError> {
    match relay::bind(std::slice::from_ref(entrance)) {
        Ok(mut bound) => Ok(bound.pop()),
        Err(error) if error.is_taken() && is_reached(entrance, Who::Any) => {
            tracing::info!("port {} of the host is reached without a relay: a service listens there", entrance.port);
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

/// Whether somebody listens on the host where an entrance was to be.
fn is_reached(entrance: &Entrance, who: Who) -> bool {
    let listening = match entrance.protocol {
        Protocol::Tcp => listeners::tcp(entrance.port),
        Protocol::Udp => listeners::udp(entrance.port),
    };
    let is_one = |address: &IpAddr| address.is_unspecified() || who == Who::Any && Some(*address) == entrance.address;
    listening.is_ok_and(|addresses| addresses.iter().any(is_one))
}

impl Keeper {
    /// Lets come what waits at the ports.
    pub(super) fn relay(&mut self, published: Vec<Bound>, host_ports: Vec<Bound>) -> Result<(), TunnelError> {
        if !published.is_empty() {
            let (targets, namespace) = self.tunnel.inner_addresses().doing("publish ports")?;
            let start = || Relay::start(published, targets, Some(namespace), begin_relay);
            self.published = Some(with_all_capabilities(start).and_then(|started| started).doing("publish ports")?);
        }
        if !host_ports.is_empty() {
            let loopback = vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
            let start = || Relay::start(host_ports, loopback, None, begin_relay);
            let started = with_all_capabilities(start).and_then(|started| started);
            self.host_ports = Some(started.doing("let the host's ports be reached")?);
        }
        Ok(())
    }
}

/// Leaves a relay's thread what it may do: move what comes between sockets.
fn begin_relay() -> io::Result<()> {
    filter::relay()?.install()?;
    capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty())
}
