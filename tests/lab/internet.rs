//! The network of the lab: its namespaces and the cables between them.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, anyhow};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::link::TargetNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::linux::sysctl;
use vpn_exec::names::InterfaceName;

use crate::capture::Capture;
use crate::dns::DnsServer;
use crate::http::{Page, WebServer};
use crate::provider::{PROVIDER_PORT, Peer, Provider};
use crate::shared::addresses::{
    Addresses, HOST, HOST_ON_LAN, HOST_ON_PRIVATE_LAN, LAN, PRIVATE_LAN, PROVIDER, ROUTER, ROUTER_TO_PROVIDER,
    ROUTER_TO_WEB, TUNNEL_CLIENT, TUNNEL_RESOLVER, WEB,
};
use crate::{nat, world};

/// The prefix lengths of a private network.
const PRIVATE_PREFIXES: (u8, u8) = (24, 64);

/// The prefix lengths of every cable.
const PREFIXES: (u8, u8) = (26, 64);

/// The form of the provider's endpoint in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Its IPv4 address.
    Ipv4,
    /// Its IPv6 address.
    Ipv6,
    /// The name `vpn.example`, which the host's resolver knows.
    Name,
}

/// The whole lab, up and running. The network namespace of the thread that started it is the host.
#[derive(Debug)]
pub struct Lab {
    /// The namespace that vpn-exec runs in.
    pub host: NetworkNamespace,
    /// A neighbour in the local network.
    pub lan: NetworkNamespace,
    /// The namespace of [`Self::web`].
    pub web_site: NetworkNamespace,
    /// The WireGuard peer.
    pub provider: Provider,
    /// The web server at [`WEB`], port 80, which answers with the caller's address.
    pub web: WebServer,
    /// The web server of the neighbour at [`LAN`], port 80.
    pub lan_page: WebServer,
    /// The host's resolver, on the router.
    pub resolver: DnsServer,
    /// The provider's resolver, inside the tunnel.
    pub tunnel_resolver: DnsServer,
    /// The packets on the host's interfaces.
    pub capture: Capture,
    /// The namespace between all others.
    pub router: NetworkNamespace,
}

impl Lab {
    /// Builds the lab in the calling process's world.
    ///
    /// # Errors
    /// [`crate::Skip`] without a usable TUN device or without the program that `peer` needs.
    pub fn start(peer: Peer) -> Result<Self> {
        peer.check()?;
        let host = NetworkNamespace::current()?;
        sysctl::set("net/ipv4/ip_forward", "0")?;
        let (router, lan) = (site(true)?, site(false)?);
        let (provider, web_site) = (site(true)?, site(false)?);

        let uplink = Cable::lay((&host, "eth0", HOST), (&router, "host", ROUTER))?;
        let local = Cable::lay((&host, "lan0", HOST_ON_LAN), (&lan, "eth0", LAN))?;
        // Before the interfaces come up, so that it misses no packet.
        let capture = Capture::start(uplink.near, local.near)?;
        uplink.take_up(Some(ROUTER))?;
        local.take_up(None)?;
        Cable::lay((&provider, "eth0", PROVIDER), (&router, "provider", ROUTER_TO_PROVIDER))?
            .take_up(Some(ROUTER_TO_PROVIDER))?;
        Cable::lay((&web_site, "eth0", WEB), (&router, "web", ROUTER_TO_WEB))?.take_up(Some(ROUTER_TO_WEB))?;

        provider.run(nat::masquerade).context("cannot masquerade with nftables")?;
        put_on_lo(&provider, TUNNEL_RESOLVER)?;

        let resolver = DnsServer::start(&router, ROUTER)?;
        let tunnel_resolver = DnsServer::start(&provider, TUNNEL_RESOLVER)?;
        resolver.set("vpn.example", &PROVIDER.both());
        for server in [&resolver, &tunnel_resolver] {
            server.set("web.example", &WEB.both());
        }
        Ok(Self {
            web: WebServer::start(&web_site, 80, Page::ClientAddress)?,
            lan_page: WebServer::start(&lan, 80, Page::Text("a page in the local network\n"))?,
            provider: Provider::start(peer, provider)?,
            host,
            lan,
            web_site,
            resolver,
            tunnel_resolver,
            capture,
            router,
        })
    }

    /// Gives the host and its neighbour additional addresses in private networks, as most local networks have:
    /// 192.168.7.0/24 and fd07::/64.
    ///
    /// # Errors
    /// The kernel's.
    pub fn join_private_lan(&self) -> Result<()> {
        for (site, interface, at) in [(&self.host, "lan0", HOST_ON_PRIVATE_LAN), (&self.lan, "eth0", PRIVATE_LAN)] {
            site.run(|| {
                let mut netlink = Netlink::open()?;
                let index = netlink.link_index(&name(interface))?;
                let (ipv4, ipv6) = networks(at, PRIVATE_PREFIXES);
                let add = |net: IpNet| NetlinkRequest::add_address(index, interface, net);
                netlink.execute(vec![add(ipv4.into()), add(ipv6.into())])?;
                // The kernel adds the route to the own IPv6 address a little later.
                while !netlink.routes()?.iter().any(|route| route.destination == IpNet::from(IpAddr::from(at.ipv6))) {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Returns the text of the file that the provider gives to its customer.
    pub fn wg_quick_text(&self, reach: Reach) -> String {
        let endpoint = match reach {
            Reach::Ipv4 => format!("{}:{PROVIDER_PORT}", PROVIDER.ipv4),
            Reach::Ipv6 => format!("[{}]:{PROVIDER_PORT}", PROVIDER.ipv6),
            Reach::Name => format!("vpn.example:{PROVIDER_PORT}"),
        };
        let keys = self.provider.customer();
        format!(
            "[Interface]\n\
             PrivateKey = {}\n\
             Address = {}/32, {}/128\n\
             DNS = {}, {}\n\
             \n\
             [Peer]\n\
             PublicKey = {}\n\
             PresharedKey = {}\n\
             AllowedIPs = 0.0.0.0/0, ::/0\n\
             Endpoint = {endpoint}\n",
            keys.private,
            TUNNEL_CLIENT.ipv4,
            TUNNEL_CLIENT.ipv6,
            TUNNEL_RESOLVER.ipv4,
            TUNNEL_RESOLVER.ipv6,
            keys.provider_public,
            keys.preshared,
        )
    }

    /// Writes a text into a new file that only its owner can read, like a provider's file.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn file(&self, text: &str) -> Result<PathBuf> {
        static FILES: AtomicU32 = AtomicU32::new(0);
        let path = Path::new(world::FILES).join(format!("wg{}.conf", FILES.fetch_add(1, Ordering::Relaxed)));
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?.write_all(text.as_bytes())?;
        Ok(path)
    }

    /// Writes [`Self::wg_quick_text`] into a new [`Self::file`].
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn wg_quick_file(&self, reach: Reach) -> Result<PathBuf> {
        self.file(&self.wg_quick_text(reach))
    }
}

/// Creates a network namespace with `lo` up.
pub(crate) fn site(forwards: bool) -> Result<NetworkNamespace> {
    let (namespace, ()) = NetworkNamespace::create(|| {
        let forwards = if forwards { "1" } else { "0" };
        sysctl::set("net/ipv4/ip_forward", forwards)?;
        sysctl::set("net/ipv6/conf/all/forwarding", forwards)?;
        let mut netlink = Netlink::open()?;
        let lo = netlink.link_index(&name("lo"))?;
        Ok(netlink.execute_one(NetlinkRequest::set_up(lo, "lo"))?)
    })?;
    Ok(namespace)
}

fn put_on_lo(site: &NetworkNamespace, addresses: Addresses) -> Result<()> {
    site.run(|| {
        let mut netlink = Netlink::open()?;
        let lo = netlink.link_index(&name("lo"))?;
        let requests = [(addresses.ipv4.into(), 32), (addresses.ipv6.into(), 128)]
            .into_iter()
            .filter_map(|(address, length)| ipnet::IpNet::new(address, length).ok())
            .map(|address| NetlinkRequest::add_address(lo, "lo", address));
        Ok(netlink.execute(requests.collect())?)
    })?;
    Ok(())
}

pub(crate) fn name(text: &str) -> InterfaceName {
    text.parse().expect("the lab's interface names are valid")
}

pub(crate) type End<'a> = (&'a NetworkNamespace, &'static str, Addresses);

/// A veth pair between two namespaces.
pub(crate) struct Cable<'a> {
    ends: [End<'a>; 2],
    /// The index of the first end's interface.
    near: u32,
}

impl<'a> Cable<'a> {
    /// Creates the pair, which is down.
    pub(crate) fn lay(near: End<'a>, far: End<'a>) -> Result<Self> {
        let index = near.0.run(|| {
            let mut netlink = Netlink::open()?;
            let place = TargetNamespace::Other(far.0.as_fd());
            netlink.execute_one(NetlinkRequest::add_veth(&name(near.1), &name(far.1), place))?;
            netlink.link_index(&name(near.1))
        })?;
        Ok(Self { ends: [near, far], near: index })
    }

    /// Gives both ends their addresses and takes them up. `gateway` becomes the near end's default gateway.
    pub(crate) fn take_up(self, gateway: Option<Addresses>) -> Result<()> {
        for (end, gateway) in self.ends.into_iter().zip([gateway, None]) {
            let (site, interface, addresses) = end;
            site.run(|| {
                // Makes the link-local address usable at once.
                sysctl::set(&format!("net/ipv6/conf/{interface}/accept_dad"), "0")?;
                let mut netlink = Netlink::open()?;
                let index = netlink.link_index(&name(interface))?;
                let (ipv4, ipv6) = networks(addresses, PREFIXES);
                let mut requests = vec![
                    NetlinkRequest::set_up(index, interface),
                    NetlinkRequest::add_address(index, interface, ipv4.into()),
                    NetlinkRequest::add_address(index, interface, ipv6.into()),
                ];
                if let Some(gateway) = gateway {
                    let (any4, any6) = (Ipv4Net::default(), Ipv6Net::default());
                    requests.push(NetlinkRequest::add_route(index, interface, any4.into(), Some(gateway.ipv4.into())));
                    requests.push(NetlinkRequest::add_route(index, interface, any6.into(), Some(gateway.ipv6.into())));
                }
                Ok(netlink.execute(requests)?)
            })
            .with_context(|| format!("cannot configure {interface}"))?;
        }
        Ok(())
    }
}

fn networks(addresses: Addresses, (length4, length6): (u8, u8)) -> (Ipv4Net, Ipv6Net) {
    (Ipv4Net::new_assert(addresses.ipv4, length4), Ipv6Net::new_assert(addresses.ipv6, length6))
}

/// Returns the number of packets that an interface of the calling thread's network namespace has sent and received.
pub(crate) fn packets_of(interface: u32) -> Result<u64> {
    let mut netlink = Netlink::open()?;
    let link = netlink.links()?.into_iter().find(|link| link.index == interface);
    let name = link.ok_or_else(|| anyhow!("no interface {interface}"))?.name;
    let table = fs::read_to_string("/proc/thread-self/net/dev")?;
    // proc_pid_net(5): eight columns for reception, of which the second counts packets, then eight for transmission.
    let line = table.lines().find_map(|line| line.trim_start().strip_prefix(&format!("{name}:")));
    let numbers: Vec<u64> =
        line.unwrap_or_default().split_ascii_whitespace().filter_map(|number| number.parse().ok()).collect();
    match numbers[..] {
        [_, received, _, _, _, _, _, _, _, sent, ..] => Ok(received + sent),
        _ => Err(anyhow!("no line for {name} in /proc/net/dev")),
    }
}
