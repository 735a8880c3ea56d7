//! The kernel parameters that keep a tunnel's interfaces to what they are for: in its namespace, and on the veth's host end.

use std::io;

use crate::linux::sysctl;
use crate::names::InterfaceName;
use crate::plan::{self, Parameter};

/// Sets IPv4's parameters of a new namespace, for all interfaces to come: nobody is told of a better way, as nothing is forwarded. The
/// kernel's WireGuard sets this by itself, so that a program sees the same with both.
pub(super) fn prepare_ipv4() -> io::Result<()> {
    sysctl::set("net/ipv4/conf/all/send_redirects", "0")?;
    sysctl::set("net/ipv4/conf/default/send_redirects", "0")?;
    // What a program may expect. Where these cannot be set (a container's /proc/sys is read-only), it does without, and no protection is lost.
    for Parameter { name, value } in plan::parameters() {
        let path = name.replace('.', "/");
        if let Err(error) =
            sysctl::set_if_present(&path, &value).or_else(|_| sysctl::set_if_present(&path, &mapped(&value)?))
        {
            tracing::debug!(%error, "{name} cannot be set");
        }
    }
    Ok(())
}

/// A range of groups that begins at 0, as far as the calling process's user namespace has them: the kernel takes no others.
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

/// Sets IPv6's parameters of a new namespace, for all interfaces to come: none at all where the tunnel has none, `lo` excepted;
/// never what a router advertises; and no link-local addresses, by which the host could be reached beyond the plan.
pub(super) fn prepare_ipv6(wanted: bool) -> io::Result<()> {
    let conf = "net/ipv6/conf/default";
    if sysctl::get_if_present(&format!("{conf}/disable_ipv6"))?.is_none() {
        // A kernel without IPv6.
        return Ok(());
    }
    sysctl::set(&format!("{conf}/disable_ipv6"), if wanted { "0" } else { "1" })?;
    sysctl::set(&format!("{conf}/accept_ra"), "0")?;
    sysctl::set(&format!("{conf}/addr_gen_mode"), "1")?;
    sysctl::set("net/ipv6/conf/lo/disable_ipv6", "0")
}

/// Sets the parameters of the veth's host end: nothing that comes in by it is forwarded, whatever the host forwards otherwise;
/// it answers for its own address only, and never for others'; it takes no router's word, and no sender's.
///
/// A write to `net.ipv4.ip_forward` while the tunnel is up sets `forwarding` on every interface, this one among them. So what
/// keeps the host from being found as a router must hold without it, and against what `conf.all` says for all interfaces:
/// `medium_id` -1 forbids proxy ARP whatever `proxy_arp` is (the kernel's `arp_fwd_proxy()`), and source routes are refused
/// where any of the two says so.
///
/// Where it has no IPv6, it takes none at all: forwarding of IPv6 can be turned off for the whole host only.
pub(super) fn prepare_host_interface(name: &InterfaceName, ipv6: bool) -> io::Result<()> {
    for (parameter, value) in [
        ("ipv4/conf", ("forwarding", "0")),
        ("ipv4/conf", ("arp_ignore", "1")),
        ("ipv4/conf", ("proxy_arp", "0")),
        ("ipv4/conf", ("medium_id", "-1")),
        ("ipv4/conf", ("accept_source_route", "0")),
        ("ipv4/conf", ("accept_redirects", "0")),
        ("ipv4/conf", ("send_redirects", "0")),
        ("ipv6/conf", ("accept_ra", "0")),
        ("ipv6/conf", ("addr_gen_mode", "1")),
        ("ipv6/conf", ("disable_ipv6", if ipv6 { "0" } else { "1" })),
    ]
    .map(|(family, (parameter, value))| (format!("net/{family}/{name}/{parameter}"), value))
    {
        // A kernel without IPv6, or an older one without this parameter, has nothing to set.
        sysctl::set_if_present(&parameter, value)?;
    }
    Ok(())
}
