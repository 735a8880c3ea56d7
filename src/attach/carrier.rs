//! The attached tunnel as its endpoints see it: the container's own network carries the encrypted packets, by their
//! mark.

use std::io;
use std::net::{IpAddr, SocketAddr};

use super::{OWNER, Site};
use crate::endpoints::Carrier;
use crate::linux::netlink::NetlinkRequest;
use crate::linux::netlink::route::Route;
use crate::plan::shared_namespace::{MARK, Placement, SharedNamespacePlan};
use crate::tunnel::shared_namespace::load_rules;
use crate::wireguard::Device;

/// A tunnel that is attached to the namespace of this process.
pub(super) struct Attached {
    pub(super) site: Site,
    pub(super) plan: SharedNamespacePlan,
    pub(super) device: Box<dyn Device>,
    /// Whether the packet rules follow the addresses of endpoints, because an endpoint is a name.
    pub(super) follows_names: bool,
}

impl Carrier for Attached {
    fn device(&self) -> Option<&dyn Device> {
        Some(self.device.as_ref())
    }

    fn route_to(&mut self, address: IpAddr) -> io::Result<Route> {
        self.site.netlink.route_of_marked(address, MARK)
    }

    fn link_mtu(&mut self, index: Option<u32>) -> io::Result<u32> {
        self.site.netlink.mtu_of(index)
    }

    fn admit(&mut self, addresses: &[SocketAddr]) -> io::Result<()> {
        let Placement::Attached { endpoints, .. } = &self.plan.placement else { return Ok(()) };
        // The addresses in the file were admitted at the start, and the right to change the rules was dropped.
        if !self.follows_names && addresses.iter().all(|address| endpoints.contains(address)) {
            return Ok(());
        }
        let mut changed = self.plan.clone();
        if changed.admit(addresses) {
            load_rules(&mut self.site.rules, &changed, OWNER)?;
            self.plan = changed;
        }
        Ok(())
    }

    fn set_mtu(&mut self, mtu: u32) -> io::Result<()> {
        let name = &self.plan.wireguard.interface;
        let index = self.site.netlink.link_index(name)?;
        Ok(self.site.netlink.execute_one(NetlinkRequest::set_mtu(index, name.as_str(), mtu))?)
    }

    fn has_ipv6(&self) -> bool {
        self.plan.wireguard.ipv6
    }
}
