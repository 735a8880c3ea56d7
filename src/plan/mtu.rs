//! The MTU of the WireGuard interface: that of the command line, the profile or the file, else computed as by
//! wg-quick(8).

use super::Findings;
use super::error::PlanError;
use super::facts::Facts;
use crate::config;

/// The most that WireGuard adds to a packet, in bytes: an IPv6 header (40), a UDP header (8), and its own header and
/// authentication tag (16 each).
pub(super) const OVERHEAD: u32 = 80;

/// The smallest MTU with which the kernel keeps IPv6 on an interface (RFC 8200 section 5).
pub(super) const MIN_IPV6_MTU: u32 = 1280;

/// The smallest useful MTU for IPv4: the packet size that every host must accept (RFC 791 section 3.1). With a smaller
/// MTU, DNS over UDP begins to fail.
pub(super) const MIN_IPV4_MTU: u32 = 576;

/// The largest packet of IPv4, and the largest MTU of a TUN interface.
pub(super) const MAX_MTU: u32 = 65535;

/// The path MTU to assume if no route to an endpoint is known: that of Ethernet.
const ETHERNET: u32 = 1500;

/// Returns the MTU of a WireGuard interface, in bytes, whose encrypted packets take a path with an MTU of `path` bytes.
/// A keeper uses this for an endpoint that was not known when the tunnel was planned.
pub fn wireguard_mtu(path: u32, ipv6: bool) -> u32 {
    path.saturating_sub(OVERHEAD).clamp(least(ipv6), MAX_MTU)
}

fn least(ipv6: bool) -> u32 {
    if ipv6 { MIN_IPV6_MTU } else { MIN_IPV4_MTU }
}

/// An MTU in bytes, and a phrase that explains it.
pub(super) struct Mtu {
    pub(super) bytes: u32,
    pub(super) reason: String,
}

/// Decides the MTU. As in newer versions of wg-quick, the smallest path MTU to any endpoint counts, else that of the
/// default route. (Older versions take the largest, which is too large for all other endpoints.)
pub(super) fn decide(explicit: Option<config::Mtu>, ipv6: bool, facts: &Facts, findings: &mut Findings) -> Mtu {
    if let Some(config::Mtu { bytes, source }) = explicit {
        if !(MIN_IPV4_MTU..=MAX_MTU).contains(&bytes) {
            findings.refuse(PlanError::MtuOutOfRange { mtu: bytes });
        } else if ipv6 && bytes < MIN_IPV6_MTU {
            findings.refuse(PlanError::MtuTooSmallForIpv6 { mtu: bytes });
        }
        return Mtu { bytes, reason: format!("set by {source}") };
    }
    let (path, origin) = path_mtu(facts);
    let least = least(ipv6);
    if path.saturating_sub(OVERHEAD) < least {
        findings.note(format!(
            "The path to the endpoint has an MTU of {path} bytes, which is too small for a tunnel with an MTU of \
             {least}: the host splits large encrypted packets into fragments."
        ));
        return Mtu { bytes: least, reason: format!("the minimum for IPv{}", if ipv6 { 6 } else { 4 }) };
    }
    Mtu { bytes: wireguard_mtu(path, ipv6), reason: format!("{path}, {origin}, minus {OVERHEAD} for WireGuard") }
}

/// Returns the smallest path MTU to an endpoint in bytes, and a phrase that says which path that is.
fn path_mtu(facts: &Facts) -> (u32, String) {
    let endpoints = facts.endpoint_routes.iter().filter_map(|route| {
        let (mtu, interface) = route_mtu(facts, route.mtu, route.interface)?;
        Some((mtu, format!("the MTU of {interface} to {}", route.address)))
    });
    if let Some(narrowest) = endpoints.min_by_key(|(mtu, _)| *mtu) {
        return narrowest;
    }
    // wg-quick takes the first default route of IPv4. Here both families count, as the endpoint's name may resolve to
    // either. Some kernels show "unreachable" as a default route by lo, which says nothing about the path.
    let defaults = facts.routes.iter().filter(|route| route.destination.prefix_len() == 0).filter_map(|route| {
        let (mtu, interface) = route_mtu(facts, route.mtu, route.interface)?;
        (interface.as_str() != "lo").then(|| (mtu, format!("the MTU of the default route by {interface}")))
    });
    defaults
        .min_by_key(|(mtu, _)| *mtu)
        .unwrap_or_else(|| (ETHERNET, "the MTU of Ethernet, as no route to an endpoint is known".into()))
}

/// Returns a route's own MTU, else that of its interface, and the interface's name. An MTU of 0 means that it is not
/// set.
fn route_mtu(facts: &Facts, own: Option<u32>, interface: Option<u32>) -> Option<(u32, String)> {
    let interface = interface.and_then(|index| facts.interface(index));
    let mtu = own.filter(|mtu| *mtu > 0).or_else(|| interface.map(|interface| interface.mtu).filter(|mtu| *mtu > 0))?;
    Some((mtu, interface.map_or_else(|| "the route".into(), |interface| interface.name.clone())))
}
