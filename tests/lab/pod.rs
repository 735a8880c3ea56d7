//! A pod: a network namespace with an uplink of its own, as container engines and the kubelet make it.
//!
//! ```text
//!         10.42.0.0/24, fd2a::/64             10.43.0.0/24, fd2b::/64
//!   pod ─────────────────────────── host ─────────────────────────── cluster: a resolver and a service
//!   eth0                        pod0 │ cluster0
//!                                    │ masquerades by eth0 and lan0
//!                                 router, lan
//! ```
//!
//! The Internet reaches the pod by its own addresses, which stands for a published port. The engine's resolver listens
//! at the gateway if a test starts it, and the pod's `/etc/resolv.conf` names it.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::linux::sysctl;

use crate::dns::DnsServer;
use crate::http::{Page, WebServer};
use crate::internet::{Cable, Lab, name, site};
use crate::shared::addresses::{
    CLUSTER_GATEWAY, CLUSTER_RESOLVER, CLUSTER_SERVICE, HOST, POD, POD_GATEWAY, PROVIDER, WEB,
};
use crate::{nat, world};

/// The name of [`CLUSTER_SERVICE`], which only the cluster's resolver knows.
pub const SERVICE_NAME: &str = "service.cluster.local";

/// The networks of the pod and its cluster, as the values of `--local`.
pub const CLUSTER_NETWORKS: [&str; 4] = ["10.42.0.0/24", "fd2a::/64", "10.43.0.0/24", "fd2b::/64"];

/// The set-up of a container's process: `/proc/sys` is read-only, and `/etc/resolv.conf` is the pod's. Its arguments
/// are the path of that file and the command line.
const CONTAINER: &str = "mount --bind \"$0\" /etc/resolv.conf && mount --bind /proc/sys /proc/sys && \
                         mount -o remount,bind,ro,nosuid,nodev,noexec /proc/sys && exec \"$@\"";

/// A pod and its cluster, until the world ends. The lab's host becomes a router.
#[derive(Debug)]
pub struct Pod {
    /// The namespace of the pod.
    pub namespace: NetworkNamespace,
    /// The pod's file `/etc/resolv.conf`, which all its containers share.
    pub resolv_conf: PathBuf,
    /// The cluster's resolver at [`CLUSTER_RESOLVER`].
    pub cluster_resolver: DnsServer,
    /// The web server at [`CLUSTER_SERVICE`], port 80.
    pub service: WebServer,
}

impl Pod {
    /// Makes a pod on the host of a lab.
    ///
    /// # Errors
    /// The kernel's, for example without nftables or NAT.
    pub fn start(lab: &Lab) -> Result<Self> {
        let (namespace, cluster) = (site(false)?, site(false)?);
        // The kernel drops the default gateway of a host that becomes a router only if it was learnt.
        lab.host.run(|| {
            sysctl::set("net/ipv4/ip_forward", "1")?;
            sysctl::set("net/ipv6/conf/all/forwarding", "1")?;
            nat::masquerade_by(&["eth0", "lan0"])
        })?;
        for (place, interface, address, gateway) in
            [(&namespace, "pod0", POD, POD_GATEWAY), (&cluster, "cluster0", CLUSTER_SERVICE, CLUSTER_GATEWAY)]
        {
            // The near end is the one that gets a default gateway.
            Cable::lay((place, "eth0", address), (&lab.host, interface, gateway))?.take_up(Some(gateway))?;
        }
        // As Docker and containerd do.
        namespace.run(|| {
            sysctl::set("net/ipv4/ip_unprivileged_port_start", "0")?;
            sysctl::set("net/ipv4/ping_group_range", "0 0")
        })?;
        put_on_interface(&cluster, CLUSTER_RESOLVER)?;
        route_to_pod(&lab.router)?;

        let cluster_resolver = DnsServer::start(&cluster, CLUSTER_RESOLVER)?;
        cluster_resolver.set(SERVICE_NAME, &CLUSTER_SERVICE.both());
        cluster_resolver.set("web.example", &WEB.both());
        let resolv_conf = PathBuf::from(world::FILES).join("pod-resolv.conf");
        fs::write(&resolv_conf, format!("nameserver {}\noptions timeout:1 attempts:2\n", POD_GATEWAY.ipv4))?;
        let service = WebServer::start(&cluster, 80, Page::Text("a service of the cluster\n"))?;
        Ok(Self { namespace, resolv_conf, cluster_resolver, service })
    }

    /// Starts the engine's resolver at [`POD_GATEWAY`].
    ///
    /// # Errors
    /// If another one listens on the host.
    pub fn start_gateway_resolver(lab: &Lab) -> Result<DnsServer> {
        let resolver = DnsServer::start(&lab.host, POD_GATEWAY)?;
        resolver.set("web.example", &WEB.both());
        resolver.set("vpn.example", &PROVIDER.both());
        Ok(resolver)
    }

    /// Returns a path to the network namespace, which is valid while this process lives.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.namespace.as_fd().as_raw_fd()).into()
    }

    /// Returns a command that runs `words` as a process of the application's container: without any capability.
    pub fn application<I: IntoIterator<Item: AsRef<OsStr>>>(&self, words: I) -> Command {
        self.container("-all", words)
    }

    /// Returns a command that runs `words` as a process of the sidecar: with CAP_NET_ADMIN alone.
    pub fn sidecar<I: IntoIterator<Item: AsRef<OsStr>>>(&self, words: I) -> Command {
        self.container("-all,+net_admin", words)
    }

    /// Returns a command that runs `words` in the pod with read-only `/proc/sys`, with `no_new_privs` and with a
    /// bounding set of capabilities (setpriv(1)).
    pub fn container<I: IntoIterator<Item: AsRef<OsStr>>>(&self, bounding_set: &str, words: I) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display()));
        command.args(["unshare", "--mount", "--propagation", "private", "sh", "-c", CONTAINER]).arg(&self.resolv_conf);
        command.args(["setpriv", "--no-new-privs", "--inh-caps=-all"]).arg(format!("--bounding-set={bounding_set}"));
        command.args(words);
        command
    }
}

/// Adds addresses to the interface `eth0` of a namespace.
fn put_on_interface(site: &NetworkNamespace, addresses: crate::Addresses) -> Result<()> {
    site.run(|| {
        let mut netlink = Netlink::open()?;
        let index = netlink.link_index(&name("eth0"))?;
        let add = |net: IpNet| NetlinkRequest::add_address(index, "eth0", net);
        Ok(netlink.execute(addresses.both().map(|address| add(address.into())).into())?)
    })
    .context("cannot add an address of the cluster")?;
    Ok(())
}

/// Gives the router routes to the pod by the host.
fn route_to_pod(router: &NetworkNamespace) -> Result<()> {
    router
        .run(|| {
            let mut netlink = Netlink::open()?;
            let index = netlink.link_index(&name("host"))?;
            let networks = [
                (Ipv4Net::new_assert(POD.ipv4, 24).trunc().into(), HOST.ipv4.into()),
                (Ipv6Net::new_assert(POD.ipv6, 64).trunc().into(), HOST.ipv6.into()),
            ];
            let add = |(net, gateway): (IpNet, _)| NetlinkRequest::add_route(index, "host", net, Some(gateway));
            Ok(netlink.execute(networks.map(add).into())?)
        })
        .context("cannot route to the pod")?;
    Ok(())
}
