//! The addresses of the lab. All of them are reserved for documentation (RFC 5737, RFC 3849), except those inside the
//! tunnel and in the private network, which are private as they are at real providers (RFC 1918, RFC 4193).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The IPv4 and the IPv6 address of one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// IPv4.
    pub ipv4: Ipv4Addr,
    /// IPv6.
    pub ipv6: Ipv6Addr,
}

impl Addresses {
    const fn new(ipv4: [u8; 4], network: u16, host: u16) -> Self {
        let [a, b, c, d] = ipv4;
        Self { ipv4: Ipv4Addr::new(a, b, c, d), ipv6: Ipv6Addr::new(0x2001, 0xdb8, network, 0, 0, 0, 0, host) }
    }

    /// Returns both, IPv4 first.
    pub fn both(self) -> [IpAddr; 2] {
        [self.ipv4.into(), self.ipv6.into()]
    }
}

/// The host, on its uplink `eth0`.
pub const HOST: Addresses = Addresses::new([192, 0, 2, 2], 1, 2);
/// The router on the host's cable: the host's default gateway and its resolver.
pub const ROUTER: Addresses = Addresses::new([192, 0, 2, 1], 1, 1);
/// A neighbour in the host's local network, at the host's interface `lan0`.
pub const LAN: Addresses = Addresses::new([192, 0, 2, 66], 2, 2);
/// The VPN provider: its WireGuard listens there, and servers see its customers under these addresses.
pub const PROVIDER: Addresses = Addresses::new([198, 51, 100, 2], 3, 2);
/// The web server, which answers with the address of its caller.
pub const WEB: Addresses = Addresses::new([203, 0, 113, 2], 4, 2);

/// The host's own address in the local network.
pub const HOST_ON_LAN: Addresses = Addresses::new([192, 0, 2, 65], 2, 1);
/// The neighbour in a private network on the same cable (see `Lab::join_private_lan`).
pub const PRIVATE_LAN: Addresses = private(2);
/// The host in that private network.
pub const HOST_ON_PRIVATE_LAN: Addresses = private(1);
/// The router on the cable to the provider.
pub const ROUTER_TO_PROVIDER: Addresses = Addresses::new([198, 51, 100, 1], 3, 1);
/// The router on the cable to the web server.
pub const ROUTER_TO_WEB: Addresses = Addresses::new([203, 0, 113, 1], 4, 1);

/// The provider's resolver, inside the tunnel.
pub const TUNNEL_RESOLVER: Addresses = inner(1);
/// The customer's address inside the tunnel.
pub const TUNNEL_CLIENT: Addresses = inner(2);

/// A pod, on its interface `eth0` (see `Pod`).
pub const POD: Addresses = pod(42, 2);
/// The host on the pod's cable: the pod's default gateway, and the resolver that container engines offer.
pub const POD_GATEWAY: Addresses = pod(42, 1);
/// The resolver of the pod's cluster, behind the gateway.
pub const CLUSTER_RESOLVER: Addresses = pod(43, 10);
/// A service of the pod's cluster, behind the gateway.
pub const CLUSTER_SERVICE: Addresses = pod(43, 20);
/// The gateway on the cable to the cluster.
pub const CLUSTER_GATEWAY: Addresses = pod(43, 1);

const fn pod(network: u8, host: u8) -> Addresses {
    let network6 = 0xfd00 + network as u16;
    Addresses {
        ipv4: Ipv4Addr::new(10, network, 0, host),
        ipv6: Ipv6Addr::new(network6, 0, 0, 0, 0, 0, 0, host as u16),
    }
}

const fn inner(host: u8) -> Addresses {
    Addresses { ipv4: Ipv4Addr::new(10, 64, 0, host), ipv6: Ipv6Addr::new(0xfd64, 0, 0, 0, 0, 0, 0, host as u16) }
}

const fn private(host: u8) -> Addresses {
    Addresses { ipv4: Ipv4Addr::new(192, 168, 7, host), ipv6: Ipv6Addr::new(0xfd07, 0, 0, 0, 0, 0, 0, host as u16) }
}
