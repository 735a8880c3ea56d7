//! The kernel parameters (sysctl) of a tunnel's namespace and of the veth's end on the host.

use std::io;

use crate::linux::sysctl;
use crate::names::InterfaceName;
use crate::plan::{self, Parameter};

/// Sets the IPv4 parameters of a new namespace, before it has interfaces.
pub(super) fn prepare_ipv4() -> io::Result<()> {
    // Nothing is forwarded, so there is no better route to tell of. The kernel's WireGuard sets this as well, so a
    // program sees the same with both backends.
    sysctl::set("net/ipv4/conf/all/send_redirects", "0")?;
    sysctl::set("net/ipv4/conf/default/send_redirects", "0")?;
    // Parameters that programs expect. In a container they may be read-only. No protection depends on them.
    for Parameter { name, value } in plan::parameters() {
        let path = name.replace('.', "/");
        if let Err(error) =
            sysctl::set_if_present(&path, &value).or_else(|_| sysctl::set_if_present(&path, &mapped(&value)?))
        {
            tracing::debug!(%error, "cannot set {name}");
        }
    }
    Ok(())
}

/// Limits a range of group IDs that begins at 0 to those of the calling process's user namespace. The kernel accepts no
/// others.
fn mapped(range: &str) -> io::Result<String> {
    let map = std::fs::read_to_string("/proc/self/gid_map")?;
    let mut ends: Vec<(u64, u64)> = map
        .lines()
        .filter_map(|line| {
            let mut numbers = line.split_ascii_whitespace().map(str::parse::<u64>);
            let (first, _, count) = (numbers.next()?.ok()?, numbers.next()?, numbers.next()?.ok()?);
            Some((first, first + count))
        })
        .collect();
    ends.sort_unstable();
    let end = ends.into_iter().fold(0, |end, (first, after)| if first == end { after } else { end });
    match range.strip_prefix("0\t") {
        Some(_) if end > 0 => Ok(format!("0\t{}", end - 1)),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Sets the IPv6 parameters of a new namespace, before it has interfaces. `enabled` is whether the tunnel has IPv6;
/// `lo` always has it. Router advertisements are ignored, and there are no link-local addresses, which could reach the
/// host in ways that the plan does not cover.
pub(super) fn prepare_ipv6(enabled: bool) -> io::Result<()> {
    let conf = "net/ipv6/conf/default";
    if sysctl::get_if_present(&format!("{conf}/disable_ipv6"))?.is_none() {
        // The kernel has no IPv6.
        return Ok(());
    }
    sysctl::set(&format!("{conf}/disable_ipv6"), if enabled { "0" } else { "1" })?;
    sysctl::set(&format!("{conf}/accept_ra"), "0")?;
    sysctl::set(&format!("{conf}/addr_gen_mode"), "1")?;
    sysctl::set("net/ipv6/conf/lo/disable_ipv6", "0")
}

/// Sets the parameters of the veth's end on the host. The host does not forward packets that arrive there, answers ARP
/// for its own address only, and accepts neither redirects nor source routes.
///
/// A write to `net.ipv4.ip_forward` while the tunnel is up sets `forwarding` on every interface, including this one. So
/// the other parameters must suffice without it, whatever `conf.all` says for all interfaces: `medium_id` -1 forbids
/// proxy ARP even if `proxy_arp` is on (the kernel's `arp_fwd_proxy()`), and a source route is refused if either of the
/// two says so.
///
/// IPv6 forwarding can be switched off for the whole host only. So the interface has no IPv6 at all unless `ipv6` asks
/// for it.
pub(super) fn prepare_host_interface(name: &InterfaceName, ipv6: bool) -> io::Result<()> {
    for (family, parameter, value) in [
        ("ipv4", "forwarding", "0"),
        ("ipv4", "arp_ignore", "1"),
        ("ipv4", "proxy_arp", "0"),
        ("ipv4", "medium_id", "-1"),
        ("ipv4", "accept_source_route", "0"),
        ("ipv4", "accept_redirects", "0"),
        ("ipv4", "send_redirects", "0"),
        ("ipv6", "accept_ra", "0"),
        ("ipv6", "addr_gen_mode", "1"),
        ("ipv6", "disable_ipv6", if ipv6 { "0" } else { "1" }),
    ] {
        // A kernel without IPv6, or an older one without the parameter, has nothing to set.
        sysctl::set_if_present(&format!("net/{family}/conf/{name}/{parameter}"), value)?;
    }
    Ok(())
}
