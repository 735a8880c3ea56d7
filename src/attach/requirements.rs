//! Explains what a container lacks, each time with the line of the manifest or the option that adds it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::Site;
use crate::failure::{self, Doing, Failure};
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::nftables;
use crate::linux::sysctl;
use crate::linux::tun;
use crate::tunnel::DeviceFailure;
use crate::tunnel::shared_namespace::{Protection, protection};

/// How to add the capability in a manifest and on a command line.
const NET_ADMIN: &str = "add `capabilities: {add: [NET_ADMIN]}` to the container's securityContext, or \
                         `--cap-add NET_ADMIN` to the engine's options";

/// How to add the TUN device.
const TUN: &str = "mount the host's /dev/net/tun (a hostPath volume of type CharDevice), or add \
                   `--device /dev/net/tun` to the engine's options";

/// Fails unless this process has CAP_NET_ADMIN.
pub(super) fn require_net_admin() -> Result<(), Failure> {
    let effective = capabilities::effective().doing("read the capabilities")?;
    if effective.contains(CapabilitySet::NET_ADMIN) {
        return Ok(());
    }
    let is_root = nix::unistd::geteuid().is_root();
    let advice = match is_root {
        true => NET_ADMIN.to_owned(),
        false => format!("{NET_ADMIN}; and run the container as user 0, since another user gets no capabilities"),
    };
    Err(Failure::new("attaching a tunnel needs the capability NET_ADMIN").advise(advice))
}

/// A kernel parameter that only the machine's first network namespace has (`net_core_table` in the kernel's
/// net/core/sysctl_net_core.c).
const OF_FIRST_NAMESPACE: &str = "net/core/dev_weight";

/// Fails in the network namespace of a machine. Closing that would cut the machine off. A machine may be a container
/// itself (a node of kind or k3d): then some of its interfaces lead to its containers.
pub(super) fn require_container(site: &mut Site) -> Result<(), Failure> {
    let is_first = sysctl::get_if_present(OF_FIRST_NAMESPACE).doing("read /proc/sys")?.is_some();
    if !is_first && !has_containers(site)? {
        return Ok(());
    }
    Err(Failure::new("this is the network namespace of the machine itself, which would lose its network").advise(
        "run it in a container or a pod without `hostNetwork` or `--network host`; on a machine, use \
         `vpn-exec NAME|FILE -- PROGRAM`",
    ))
}

/// Returns whether interfaces of an open namespace lead to several containers. One that is closed already may have got
/// containers of its own since: a sidecar may start again there.
///
/// The machine's end of a container's link is a port of a bridge, or has a route to the container's address alone. That
/// of a container has a route to its network: a container in several networks, as Docker's overlays, has several.
fn has_containers(site: &mut Site) -> Result<bool, Failure> {
    if protection(&mut site.netlink, &mut site.rules, super::OWNER)? != Protection::Open {
        return Ok(false);
    }
    let links = site.netlink.links().doing("list the network interfaces")?;
    let routes = site.netlink.routes().doing("list the routes")?;
    let is_network = |net: &IpNet| {
        let is_link_local = matches!(net.addr(), IpAddr::V6(address) if address.is_unicast_link_local());
        net.prefix_len() < net.max_prefix_len() && !net.addr().is_multicast() && !is_link_local
    };
    let leads_to_network =
        |index: u32| routes.iter().any(|route| route.interface == Some(index) && is_network(&route.destination));
    let to_containers = links.iter().filter(|link| !leads_to_network(link.index));
    let ends: BTreeSet<i32> = to_containers.filter_map(|link| link.leads_to).collect();
    Ok(ends.len() > 1)
}

/// Replaces general advice, which is for a machine, by what helps in a container. The process has CAP_NET_ADMIN: a
/// refused step means that another user namespace owns the network namespace, or that a file belongs to another user.
pub fn explain_in_container(mut failure: Failure) -> Failure {
    match failure.advice.as_deref() {
        Some(failure::MISSING_PRIVILEGE) => failure.advise(
            "check that the container owns its network namespace (no `--network host`, no namespace of another user), \
             and that its user 0 may read the files that it mounts",
        ),
        Some(failure::READ_ONLY) => {
            failure.advice = None;
            failure
        }
        _ => failure,
    }
}

/// Adds advice to a failure to load packet rules.
pub(super) fn explain_rules(failure: Failure) -> Failure {
    match failure.errno {
        Some(libc::EPERM | libc::EACCES) => failure.advise(NET_ADMIN),
        Some(errno) if nftables::is_missing(&std::io::Error::from_raw_os_error(errno)) => failure.advise(
            "load the kernel modules nf_tables, nft_ct, nft_reject_inet and nf_conntrack on the host: a container \
             cannot load modules",
        ),
        _ => failure,
    }
}

/// Adds advice to a failure to create WireGuard's interface.
pub(super) fn explain_device(failure: DeviceFailure) -> Failure {
    match failure {
        DeviceFailure::Tun(error) => {
            explain_tun(Failure::of(format!("create a TUN interface with {}", tun::DEVICE), &error))
        }
        DeviceFailure::Other(failure) if failure.errno == Some(libc::EPERM) => failure.advise(NET_ADMIN),
        DeviceFailure::Other(failure) => failure,
    }
}

/// Adds advice to a failure to open the TUN device.
pub(super) fn explain_tun(failure: Failure) -> Failure {
    match failure.errno {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO | libc::EACCES | libc::EPERM | libc::ENOTTY) => {
            failure.advise(TUN)
        }
        _ => failure,
    }
}
