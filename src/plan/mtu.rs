//! The MTU of WireGuard's interface: what the command line, the profile or the file says, or what wg-quick(8) would compute.

use super::Findings;
use super::error::PlanError;
use super::facts::Facts;
use crate::config;

/// What WireGuard adds to a packet at most, in bytes: an IPv6 header (40), a UDP header (8), and its own header and
/// authentication tag (16 each).
pub(super) const OVERHEAD: u32 = 80;

/// The smallest MTU with which the kernel keeps IPv6 on an interface (RFC 8200 section 5).
pub(super) const MIN_IPV6_MTU: u32 = 1280;

/// The smallest MTU that is of use for IPv4: the packet that every host must accept (RFC 791 section 3.1). Below it, name
/// look-ups over UDP begin to fail.
pub(super) const MIN_IPV4_MTU: u32 = 576;

/// The largest packet of IPv4, and the largest MTU of a TUN interface.
pub(super) const MAX_MTU: u32 = 65535;

/// What is assumed where nothing is known of the way to the endpoints: Ethernet's.
const ETHERNET: u32 = 1500;

/// The MTU of a WireGuard interface, in bytes, whose encrypted packets take a way with an MTU of `path`: what a computed plan
/// has, for an endpoint that was not known when it was made.
pub fn wireguard_mtu(path: u32, ipv6: bool) -> u32 {
    path.saturating_sub(OVERHEAD).clamp(least(ipv6), MAX_MTU)
}

fn least(ipv6: bool) -> u32 {
    if ipv6 { MIN_IPV6_MTU } else { MIN_IPV4_MTU }
}

/// An MTU in bytes, and where it comes from, as a phrase.
pub(super) struct Mtu {
    pub(super) bytes: u32,
    pub(super) reason: String,
}

/// Decides the MTU. As in newer versions of wg-quick the narrowest way to any endpoint counts (older ones take the widest, which is too
/// much for all others), else the default route.
pub(super) fn decide(explicit: Option<config::Mtu>, ipv6: bool, facts: &Facts, findings: &mut Findings) -> Mtu {
    if let Some(config::Mtu { bytes, source }) = explicit {
        if !(MIN_IPV4_MTU..=MAX_MTU).contains(&bytes) {
            findings.refuse(PlanError::MtuOutOfRange { mtu: bytes });
        } else if ipv6 && bytes < MIN_IPV6_MTU {
            findings.refuse(PlanError::MtuTooSmallForIpv6 { mtu: bytes });
        }
        return Mtu { bytes, reason: format!("as {source} says") };
    }
    let (path, whence) = path_mtu(facts);
    let least = least(ipv6);
    if path.saturating_sub(OVERHEAD) < least {
        findings.note(format!(
            "The way to the endpoint has an MTU of {path}, too small for what the tunnel needs: the tunnel's MTU is {least} \
             all the same, so the host cuts large encrypted packets into fragments."
        ));
        return Mtu { bytes: least, reason: format!("the least that IPv{} needs", if ipv6 { 6 } else { 4 }) };
    }
    Mtu { bytes: wireguard_mtu(path, ipv6), reason: format!("{path}, {whence}, less {OVERHEAD} for WireGuard") }
}

/// The MTU of the narrowest way to an endpoint, and which way that is.
fn path_mtu(facts: &Facts) -> (u32, String) {
    let endpoints = facts.endpoint_routes.iter().filter_map(|route| {
        let (mtu, by) = route_mtu(facts, route.mtu, route.interface)?;
        Some((mtu, format!("the MTU of {by} to {}", route.address)))
    });
    if let Some(narrowest) = endpoints.min_by_key(|(mtu, _)| *mtu) {
        return narrowest;
    }
    // wg-quick takes IPv4's first default route. The endpoint's name may resolve to either family, so both count here. A
    // default route by lo is how some kernels say "unreachable", and says nothing of the way.
    let defaults = facts.routes.iter().filter(|route| route.destination.prefix_len() == 0).filter_map(|route| {
        let (mtu, by) = route_mtu(facts, route.mtu, route.interface)?;
        (by.as_str() != "lo").then(|| (mtu, format!("the MTU of the default route by {by}")))
    });
    defaults
        .min_by_key(|(mtu, _)| *mtu)
        .unwrap_or_else(|| (ETHERNET, "Ethernet's MTU, as no route to an endpoint is known".into()))
}

/// The route's own MTU, else its interface's; and the name of the interface. Zero says nothing.
fn route_mtu(facts: &Facts, own: Option<u32>, interface: Option<u32>) -> Option<(u32, String)> {
    let interface = interface.and_then(|index| facts.interface(index));
    let mtu = own.filter(|mtu| *mtu > 0).or_else(|| interface.map(|interface| interface.mtu).filter(|mtu| *mtu > 0))?;
    Some((mtu, interface.map_or_else(|| "the route".into(), |interface| interface.name.clone())))
}
