//! `vpn-exec attach`: the process that puts a tunnel into the network namespace it runs in, a pod's or a container's.
//!
//! It has CAP_NET_ADMIN and nothing else: no file that it can write except `/etc/resolv.conf`, no other namespace, no
//! kernel parameters. [`run`] is the story:
//!
//! 1. `facts` reads the namespace, the planner decides, and [`crate::tunnel::shared_namespace`] closes the namespace.
//! 2. `names` looks up the names of endpoints, and the rules let packets to these addresses pass.
//! 3. `device` creates WireGuard's interface, or takes over the one that a former process has left.
//! 4. The interface gets its addresses and routes, and `resolv_conf` writes the resolvers.
//! 5. With the kernel's WireGuard the process exits, unless it answers DNS questions (`forwarder`). Otherwise it drops
//!    its capabilities (`privileges`) and stays (`serve`): it moves packets, follows the endpoints, and answers queries
//!    of the status (`status`).
//!
//! Nothing is undone at the end: the namespace stays closed, and another process opens the tunnel again. `check` tells
//! a probe whether the namespace is closed and the tunnel works. `requirements` explains what a container lacks.

mod carrier;
pub mod check;
mod device;
mod facts;
mod forwarder;
mod names;
mod privileges;
pub mod requirements;
mod resolv_conf;
mod serve;
pub mod status;

use std::io;
use std::net::SocketAddr;

use crate::config::Config;
use crate::failure::{Doing, Failure};
use crate::fault;
use crate::linux::namespace::NetworkNamespace;
use crate::linux::netlink::Netlink;
use crate::linux::nftables::Nftables;
use crate::linux::sysctl;
use crate::plan::shared_namespace::{self, Placement, SharedNamespacePlan};
use crate::tunnel::shared_namespace::{close, end_former_connections, load_rules, open, recorded_nameservers};
use crate::wireguard::Backend;
use forwarder::Forwarding;
use names::EndpointResolver;

/// The text by which the packet rules of an attached tunnel are recognized.
const OWNER: &str = "vpn-exec attach";

/// A namespace to which a tunnel is being attached: the one that this process is in.
struct Site {
    namespace: NetworkNamespace,
    netlink: Netlink,
    rules: Nftables,
}

impl Site {
    /// Opens sockets in the namespace of this process.
    fn open() -> Result<Self, Failure> {
        requirements::require_net_admin()?;
        Ok(Self {
            namespace: NetworkNamespace::current().doing("open the network namespace")?,
            netlink: Netlink::open().doing("open a netlink socket")?,
            rules: Nftables::open().doing("open a socket for nftables").map_err(requirements::explain_rules)?,
        })
    }
}

/// Plans a tunnel for the namespace of this process, without changing anything.
///
/// # Errors
/// If the namespace cannot be read, or there is no plan for this configuration in it.
pub fn plan(config: &Config) -> Result<SharedNamespacePlan, Failure> {
    let mut netlink = Netlink::open().doing("open a netlink socket")?;
    // Without CAP_NET_ADMIN, the rules of this namespace cannot be read.
    let recorded = Nftables::open().and_then(|mut rules| recorded_nameservers(&mut rules, OWNER));
    let resolver = EndpointResolver::new(config, recorded.unwrap_or_default());
    plan_with(&mut netlink, config, &resolver, &shared_namespace::known_endpoints(config))
}

/// Plans a tunnel whose endpoints have these addresses, as far as they are known.
fn plan_with(
    netlink: &mut Netlink,
    config: &Config,
    resolver: &EndpointResolver,
    endpoints: &[SocketAddr],
) -> Result<SharedNamespacePlan, Failure> {
    let facts = facts::read(netlink, endpoints).doing("read the network configuration")?;
    let placement = Placement::Attached {
        endpoints: Vec::new(),
        resolvers: resolver.servers().to_vec(),
        nameservers: resolver.engine().to_vec(),
    };
    let mut plan = shared_namespace::plan(config, &facts, placement)?;
    plan.admit(endpoints);
    Ok(plan)
}

/// Attaches a tunnel to the namespace of this process. With `only_close`, closes the namespace without a tunnel.
///
/// With the kernel's WireGuard, returns as soon as the tunnel is set up. With the embedded one, stays until SIGTERM or
/// SIGINT. The namespace stays closed in any case.
///
/// # Errors
/// If the container lacks a capability or a device, or the kernel refuses a step.
pub fn run(config: &Config, only_close: bool) -> Result<(), Failure> {
    // The first process of a container loses signals that it does not block.
    let signals = serve::block_signals()?;
    let mut site = Site::open()?;
    requirements::require_container(&mut site)?;
    refuse_second_process()?;
    let recorded = recorded_nameservers(&mut site.rules, OWNER).doing("read the packet rules")?;
    let resolver = EndpointResolver::new(config, recorded);
    let known = shared_namespace::known_endpoints(config);
    let first = plan_with(&mut site.netlink, config, &resolver, &known)?;
    for note in &first.notes {
        tracing::info!("{note}");
    }
    let Site { namespace, netlink, rules } = &mut site;
    close(netlink, rules, &first, OWNER, |_| end_former_connections(namespace, &first))
        .map_err(requirements::explain_rules)?;
    tracing::info!("closed the network namespace: packets leave by the tunnel and to local networks only");
    fault::point("after closing the namespace")?;
    // The rules let the queries pass, and the route to an endpoint decides the MTU.
    let mut plan = first;
    if names::has_names(config) {
        plan = plan_with(&mut site.netlink, config, &resolver, &resolver.look_up_all(config))?;
        load_rules(&mut site.rules, &plan, OWNER)?;
    }
    if only_close {
        return Ok(());
    }

    let (device, events) = device::obtain(&mut site, &plan, config)?;
    fault::point("after the attached device")?;
    enable_ipv6(&plan).doing("switch IPv6 on for WireGuard's interface")?;
    open(&mut site.netlink, &plan, Some(plan.wireguard.mtu))?;
    fault::point("after the attached routes")?;
    resolv_conf::write(&plan);
    fault::point("after the resolvers")?;
    let backend = device.backend();
    tracing::info!("attached the tunnel {} with the {backend} WireGuard", plan.name);
    let forwarder = Forwarding::start(&plan)?;
    let server = serve::Server::new(site, plan, config, &resolver, (device, events), signals)?;
    match (backend, forwarder) {
        (Backend::Kernel, None) => server.set_endpoints(),
        (_, forwarder) => server.serve(forwarder),
    }
}

/// Fails if another process of this container serves a tunnel. Its packet rules would be replaced otherwise. A process
/// of another container is found by its interface, which is in use.
fn refuse_second_process() -> Result<(), Failure> {
    match status::ask_process() {
        Ok(Some(other)) => Err(Failure::new(format!(
            "process {} has attached the tunnel {} to this network namespace already",
            other.keeper, other.name
        ))
        .advise("end that process first")),
        Ok(None) => Ok(()),
        Err(error) => {
            tracing::debug!(%error, "cannot query a process at the status socket");
            Ok(())
        }
    }
}

/// Switches IPv6 on for WireGuard's interface, if the tunnel has IPv6 and the namespace has it switched off.
fn enable_ipv6(plan: &SharedNamespacePlan) -> io::Result<()> {
    if !plan.wireguard.ipv6 {
        return Ok(());
    }
    sysctl::set_if_present(&format!("net/ipv6/conf/{}/disable_ipv6", plan.wireguard.interface), "0")
}
