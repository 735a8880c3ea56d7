//! Changes a running tunnel to another plan. Addresses and routes that stay are not touched, because connections use
//! them.

use std::io;

use super::{Tunnel, container, local_route};
use crate::failure::{Doing, Failure};
use crate::linux::netlink::NetlinkRequest;
use crate::plan::{self, Plan, PlanDiff};

impl Tunnel {
    /// Changes the namespace, the packet rules and the resolver to another plan.
    ///
    /// # Errors
    /// If the kernel refuses. Then everything is as it was, as far as possible.
    pub fn apply(&mut self, change: &PlanDiff, changed: Plan) -> Result<(), Failure> {
        self.try_apply(change, changed).doing("change the tunnel")
    }

    fn try_apply(&mut self, change: &PlanDiff, changed: Plan) -> io::Result<()> {
        // First the plan: there may be no room to write it, and a successor changes the interface to what is written.
        self.directory.write_plan(&changed)?;
        let applied = match &change.dns {
            Some(dns) => self.directory.write_resolv_conf(&dns.resolv_conf),
            None => Ok(()),
        };
        let applied = applied.and_then(|()| self.change_network(change, &changed));
        if let Err(error) = applied {
            // The error to report is the first one.
            if let Ok(undo) = plan::diff(&changed, &self.plan, self.running_backend()) {
                let running = self.plan.clone();
                let _ = self.change_network(&undo, &running);
            }
            let _ = self.directory.write_resolv_conf(&self.plan.dns.resolv_conf);
            let _ = self.directory.write_plan(&self.plan);
            return Err(error);
        }
        self.plan = changed;
        Ok(())
    }

    /// Changes the interfaces inside, and the packet rules. Closes first, and opens last.
    fn change_network(&mut self, change: &PlanDiff, changed: &Plan) -> io::Result<()> {
        let mark = self.mark.text();
        let Some(inner) = &mut self.inner else { return Ok(()) };
        let Some(veth) = &changed.veth else { return container::change(inner, change, changed) };
        let link = &veth.inner_interface;
        let (name, interface) = (changed.wireguard.interface.as_str(), &changed.wireguard.interface);
        let (index, link_index) = (inner.netlink.link_index(interface)?, inner.netlink.link_index(link)?);
        let closing = change
            .remove_local
            .iter()
            .map(|net| NetlinkRequest::delete_route(link_index, link.as_str(), *net))
            .collect();
        inner.netlink.execute(closing)?;
        if change.firewall {
            inner.rules.replace(&changed.firewall.inside, mark)?;
            match &mut self.gateway {
                Some(gateway) => gateway.set_local_networks(changed, &self.mark),
                None => self.host_rules.open(changed, &self.mark),
            }
            .map_err(io::Error::other)?;
        }
        let mut requests: Vec<NetlinkRequest> = Vec::new();
        requests.extend(change.mtu.map(|mtu| NetlinkRequest::set_mtu(index, name, mtu)));
        requests.extend(change.remove_routes.iter().map(|route| NetlinkRequest::delete_route(index, name, *route)));
        // A keeper that was killed while it applied the change may have added some already.
        requests
            .extend(change.add_addresses.iter().map(|net| NetlinkRequest::add_address(index, name, *net).or_exists()));
        requests
            .extend(change.add_routes.iter().map(|net| NetlinkRequest::add_route(index, name, *net, None).or_exists()));
        requests.extend(
            change.remove_addresses.iter().map(|address| NetlinkRequest::delete_address(index, name, *address)),
        );
        requests.extend(change.add_local.iter().map(|net| local_route(link_index, veth, *net).or_exists()));
        Ok(inner.netlink.execute(requests)?)
    }
}
