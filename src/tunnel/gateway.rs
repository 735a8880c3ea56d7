//! The gateway of a rootless tunnel: a network namespace at the other end of the link, in place of the host's, where an
//! ordinary user can create nothing.
//!
//! So the namespace of the programs, its link, its routes and its packet rules are the same whoever makes the tunnel.
//! The gateway has no way out. Traffic from the programs to the host or to local networks ends at sockets there, and
//! the keeper, which is in the host's namespace, relays it ([`crate::relay`]). To receive packets to local networks,
//! the gateway has all of their addresses (routes of the type `local`). Its rules pass them to the relay's sockets.

use std::io;

use ipnet::IpNet;

use super::{LOADING_RULES, Tunnel, parameters};
use crate::failure::{Doing, Failure};
use crate::fault;
use crate::linux::namespace::NetworkNamespace;
use crate::linux::netlink::{Netlink, NetlinkRequest};
use crate::linux::nftables::{self, Nftables};
use crate::linux::sysctl;
use crate::names::InterfaceName;
use crate::plan::Plan;
use crate::registry::Mark;

/// A namespace in place of the host's, which ends with the keeper.
pub(super) struct Gateway {
    pub(super) namespace: NetworkNamespace,
    pub(super) netlink: Netlink,
    rules: Nftables,
    /// The networks whose addresses it has.
    networks: Vec<IpNet>,
}

/// The operation that a failure to take the addresses of local networks names.
const RELAYING: &str = "relay to the local networks";

/// Adds advice to a failure to load the gateway's rules, if the kernel lacks a part of nf_tables.
fn advise_on_kernel(failure: Failure) -> Failure {
    match failure.errno.map(io::Error::from_raw_os_error).is_some_and(|error| nftables::is_missing(&error)) {
        true => failure.advise(
            "this kernel lacks a part of nf_tables: load the module nft_tproxy as root, or leave out local networks",
        ),
        false => failure,
    }
}

impl Gateway {
    fn create() -> Result<Self, Failure> {
        let (namespace, (mut netlink, rules)) = NetworkNamespace::create(|| {
            // Nobody else is here. A program may reach any port of the host that it is given.
            sysctl::set_if_present("net/ipv4/ip_unprivileged_port_start", "0")?;
            Ok((Netlink::open()?, Nftables::open()?))
        })
        .doing("create the gateway's namespace")?;
        netlink.execute_one(NetlinkRequest::set_up(1, "lo")).doing("create the gateway's namespace")?;
        Ok(Self { namespace, netlink, rules, networks: Vec::new() })
    }

    /// Loads the rules of a plan, and takes the addresses of its local networks. Closes first, and opens last.
    pub(super) fn set_local_networks(&mut self, plan: &Plan, mark: &Mark) -> Result<(), Failure> {
        let without = |all: &[IpNet], except: &[IpNet]| -> Vec<IpNet> {
            all.iter().filter(|net| !except.contains(net)).copied().collect()
        };
        let networks = &plan.local.networks;
        let closing = without(&self.networks, networks).into_iter().map(NetlinkRequest::delete_local_route).collect();
        self.netlink.execute(closing).doing(RELAYING)?;
        self.networks.retain(|net| networks.contains(net));
        if let Some(table) = &plan.firewall.host {
            self.rules.replace(table, mark.text()).doing(LOADING_RULES).map_err(advise_on_kernel)?;
        }
        let opening = without(networks, &self.networks).into_iter().map(NetlinkRequest::add_local_route);
        // After a failure, some of them may be there.
        self.netlink.execute(opening.map(NetlinkRequest::or_exists).collect()).doing(RELAYING)?;
        self.networks.clone_from(networks);
        Ok(())
    }
}

impl Tunnel {
    /// Creates the gateway, if the tunnel is rootless.
    pub(super) fn create_gateway(&mut self) -> Result<(), Failure> {
        if self.plan.rootless && !fault::is_broken("gateway") {
            let mut gateway = Gateway::create()?;
            gateway.set_local_networks(&self.plan, &self.mark)?;
            self.gateway = Some(gateway);
        }
        Ok(())
    }

    /// Returns the netlink socket in the namespace where the link's other end is: the host's, or the gateway's.
    pub(super) fn outside(&mut self) -> &mut Netlink {
        self.gateway.as_mut().map_or(&mut self.host, |gateway| &mut gateway.netlink)
    }

    /// Sets the kernel parameters of the link's other end.
    pub(super) fn prepare_outer_interface(&self, name: &InterfaceName, ipv6: bool) -> Result<(), Failure> {
        let prepare = || parameters::prepare_host_interface(name, ipv6);
        let prepared = match &self.gateway {
            Some(gateway) => gateway.namespace.run(prepare),
            None => prepare(),
        };
        prepared.doing(format!("set the parameters of {name}"))
    }

    /// Returns whether the link's other end is in a gateway, and not in the host's namespace.
    pub fn has_gateway(&self) -> bool {
        self.gateway.is_some()
    }

    /// Runs a function in the namespace where the link's other end is. Entering a gateway needs CAP_SYS_ADMIN.
    ///
    /// # Errors
    /// Fails as entering the namespace and the function do.
    pub fn run_outside<T: Send>(&self, work: impl FnOnce(&Plan) -> Result<T, Failure> + Send) -> Result<T, Failure> {
        let plan = &self.plan;
        match &self.gateway {
            Some(gateway) => gateway.namespace.run(|| Ok(work(plan))).doing("enter the gateway's namespace")?,
            None => work(plan),
        }
    }

    /// Creates the link of a tunnel that is taken over, whose gateway has ended with its keeper.
    pub(super) fn renew_link(&mut self) -> Result<(), Failure> {
        const RENEWING: &str = "connect the namespace to the host";
        let Some(veth) = self.plan.veth.clone() else { return Ok(()) };
        self.create_gateway()?;
        let netlink = &mut self.inner()?.netlink;
        if let Some(link) = netlink.link(veth.inner_interface.as_str()).doing(RENEWING)? {
            // The kernel may have removed it meanwhile, which is not an error.
            netlink.execute_one(NetlinkRequest::delete_link(link.index, &link.name)).doing(RENEWING)?;
        }
        self.create_link()
    }
}
