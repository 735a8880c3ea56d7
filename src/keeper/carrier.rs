//! The tunnel as its endpoints see it: the host's network carries the encrypted packets.

use std::io;
use std::net::{IpAddr, SocketAddr};

use crate::endpoints::Carrier;
use crate::linux::netlink::route::Route;
use crate::tunnel::Tunnel;
use crate::wireguard::Device;

impl Carrier for Tunnel {
    fn device(&self) -> Option<&dyn Device> {
        Tunnel::device(self)
    }

    fn route_to(&mut self, address: IpAddr) -> io::Result<Route> {
        self.host().route_to(address)
    }

    fn link_mtu(&mut self, index: Option<u32>) -> io::Result<u32> {
        self.host().mtu_of(index)
    }

    /// Does nothing, because no rules of a tunnel match the host's packets.
    fn admit(&mut self, _addresses: &[SocketAddr]) -> io::Result<()> {
        Ok(())
    }

    fn set_mtu(&mut self, mtu: u32) -> io::Result<()> {
        Tunnel::set_mtu(self, mtu)
    }

    fn has_ipv6(&self) -> bool {
        self.plan().wireguard.ipv6
    }
}
