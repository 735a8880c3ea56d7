//! The kernel parameters (sysctl) of a tunnel's namespace and of the veth's end on the host.

use std::io;

use crate::linux::netlink::NetlinkRequest;
use crate::linux::netlink::link::Ipv4Parameter;
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

/// Limits a range of group IDs that begins at 0 to those of the calling process's user namespace: the kernel accepts no
/// others. If 0 is none of these, returns the range that the process's own group is in.
fn mapped(range: &str) -> io::Result<String> {
    let map = std::fs::read_to_string("/proc/self/gid_map")?;
    let own = nix::unistd::getegid().as_raw().into();
    range.strip_prefix("0\t").and_then(|_| mapped_range(&map, own)).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn mapped_range(map: &str, own: u64) -> Option<String> {
    let extent = |line: &str| {
        let mut numbers = line.split_ascii_whitespace().map(str::parse::<u64>);
        let (first, _, count) = (numbers.next()?.ok()?, numbers.next()?, numbers.next()?.ok()?);
        Some((first, first + count))
    };
    let mut extents: Vec<(u64, u64)> = map.lines().filter_map(extent).collect();
    extents.sort_unstable();
    let start = extents.iter().map(|(first, _)| *first).find(|first| *first == 0);
    let own_start = || extents.iter().find(|(first, end)| (*first..*end).contains(&own)).map(|(first, _)| *first);
    let start = start.or_else(own_start)?;
    let end = extents.iter().fold(start, |end, (first, after)| if *first == end { *after } else { end });
    Some(format!("{start}\t{}", end - 1))
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

/// Returns the requests that set the parameters of the veth's end on the host. The host does not forward packets that
/// arrive there, answers ARP for its own address only, and accepts neither redirects nor source routes.
///
/// A write to `net.ipv4.ip_forward` while the tunnel is up sets `forwarding` on every interface, including this one. So
/// the other parameters must suffice without it, whatever `conf.all` says for all interfaces: `medium_id` -1 forbids
/// proxy ARP even if `proxy_arp` is on (the kernel's `arp_fwd_proxy()`), and a source route is refused if either of the
/// two says so.
pub(super) fn limit_host_interface(index: u32, name: &InterfaceName) -> Vec<NetlinkRequest> {
    let ipv4 = [
        (Ipv4Parameter::Forwarding, 0),
        (Ipv4Parameter::ArpIgnore, 1),
        (Ipv4Parameter::ProxyArp, 0),
        (Ipv4Parameter::MediumId, -1),
        (Ipv4Parameter::AcceptSourceRoute, 0),
        (Ipv4Parameter::AcceptRedirects, 0),
        (Ipv4Parameter::SendRedirects, 0),
    ];
    vec![
        NetlinkRequest::set_ipv4_parameters(index, name.as_str(), &ipv4),
        NetlinkRequest::forbid_link_local_addresses(index, name.as_str()),
    ]
}

/// Sets the parameters of the veth's end on the host that netlink does not offer.
///
/// IPv6 forwarding can be switched off for the whole host only. So the interface has no IPv6 at all unless `ipv6` asks
/// for it.
pub(super) fn prepare_host_interface(name: &InterfaceName, ipv6: bool) -> io::Result<()> {
    // A kernel without IPv6 has nothing to set.
    let conf = format!("net/ipv6/conf/{name}");
    sysctl::set_if_present(&format!("{conf}/accept_ra"), "0")?;
    sysctl::set_if_present(&format!("{conf}/disable_ipv6"), if ipv6 { "0" } else { "1" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::namespace::NetworkNamespace;
    use crate::linux::netlink::Netlink;
    use crate::linux::netlink::link::TargetNamespace;

    #[test]
    fn the_hosts_end_is_limited_whatever_the_host_has_as_default() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        const LIMITS: [(&str, &str, &str); 9] = [
            ("ipv4", "forwarding", "0"),
            ("ipv4", "arp_ignore", "1"),
            ("ipv4", "proxy_arp", "0"),
            ("ipv4", "medium_id", "-1"),
            ("ipv4", "accept_source_route", "0"),
            ("ipv4", "accept_redirects", "0"),
            ("ipv4", "send_redirects", "0"),
            ("ipv6", "accept_ra", "0"),
            ("ipv6", "addr_gen_mode", "1"),
        ];
        for ipv6 in [false, true] {
            let read =
                |interface: &str, family, parameter| sysctl::get(&format!("net/{family}/conf/{interface}/{parameter}"));
            NetworkNamespace::create(|| {
                for (family, parameter, value) in LIMITS {
                    let opposite = if value == "0" { "1" } else { "0" };
                    sysctl::set(&format!("net/{family}/conf/default/{parameter}"), opposite)?;
                }
                sysctl::set("net/ipv6/conf/default/disable_ipv6", if ipv6 { "1" } else { "0" })?;
                let (name, peer): (InterfaceName, InterfaceName) =
                    ("outer".parse().expect("a name"), "inner".parse().expect("a name"));
                let mut netlink = Netlink::open()?;
                netlink.execute_one(NetlinkRequest::add_veth(&name, &peer, TargetNamespace::Current))?;
                let index = netlink.link_index(&name)?;
                netlink.execute(limit_host_interface(index, &name))?;
                prepare_host_interface(&name, ipv6)?;
                for (family, parameter, value) in LIMITS {
                    assert_eq!(read("outer", family, parameter)?, value, "{family} {parameter}");
                    assert_ne!(read("inner", family, parameter)?, value, "{family} {parameter} of another interface");
                }
                assert_eq!(read("outer", "ipv6", "disable_ipv6")?, if ipv6 { "0" } else { "1" });
                Ok(())
            })
            .expect("a namespace");
        }
    }

    #[test]
    fn groups_are_limited_to_those_of_the_user_namespace() {
        for (map, own, range) in [
            ("0 0 4294967295\n", 0, Some("0\t4294967294")),
            ("0 1000 1\n1 100000 65536\n", 0, Some("0\t65536")),
            ("1 100000 10\n0 1000 1\n20 200000 10\n", 25, Some("0\t10")),
            // That of an ordinary user's tunnel.
            ("1000 1000 1\n", 1000, Some("1000\t1000")),
            ("1000 1000 1\n", 65534, None),
            ("", 0, None),
        ] {
            assert_eq!(mapped_range(map, own).as_deref(), range, "{map}");
        }
    }
}
