//! The WireGuard interface: its addresses, routes and peers, and whether a tunnel can work with them.

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::Findings;
use super::error::PlanError;
use crate::config::{Config, WgQuick};
use crate::keys::PublicKey;
use crate::names::InterfaceName;

/// The WireGuard interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireguardPlan {
    /// Its name in the namespace: `wg0`.
    pub interface: InterfaceName,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// A phrase that explains [`Self::mtu`].
    pub mtu_reason: String,
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// The routes into it, sorted, IPv4 first. One may equal the network of an address; for IPv4 the kernel then has
    /// created that route already.
    pub routes: Vec<IpNet>,
    /// Whether interfaces of the namespace other than lo have IPv6.
    pub ipv6: bool,
    /// The UDP port on the host; 0: any free port.
    pub listen_port: u16,
    /// The firewall mark of the encrypted packets; 0: none.
    pub fwmark: u32,
    /// Its public key, by which peers identify it. It is not a secret.
    #[serde(default)]
    pub public_key: Option<PublicKey>,
    /// The peers.
    pub peers: Vec<PeerPlan>,
}

/// A peer, without its secrets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerPlan {
    /// Its public key.
    pub public_key: PublicKey,
    /// Whether it has a preshared key.
    pub preshared_key: bool,
    /// Its endpoint, as written in the file.
    pub endpoint: Option<String>,
    /// The networks that are routed to it.
    pub allowed_ips: Vec<IpNet>,
    /// The seconds between keepalives; `None`: off.
    pub persistent_keepalive: Option<u16>,
}

/// The interface's addresses, and the routes into the tunnel.
pub(super) struct Routing {
    pub(super) addresses: Vec<IpNet>,
    pub(super) routes: Vec<IpNet>,
    pub(super) ipv6: bool,
}

/// Checks keys, peers and endpoints. `place` is where WireGuard's UDP socket is: "the host".
pub(super) fn check(config: &Config, place: &str, findings: &mut Findings) {
    let WgQuick { interface, peers } = &config.wireguard;
    match &interface.private_key {
        None => findings.refuse(PlanError::NoPrivateKey),
        Some(key) if key.is_zero() => findings.refuse(PlanError::ZeroPrivateKey),
        Some(key) => {
            let own = key.public_key();
            match peers.as_slice() {
                [only] if only.public_key == own => findings.refuse(PlanError::OnlyPeerIsSelf),
                peers if peers.iter().any(|peer| peer.public_key == own) => {
                    findings.note(format!("The peer {own} has the key of this tunnel itself; WireGuard ignores it."));
                }
                _ => {}
            }
        }
    }
    let listens = interface.listen_port.is_some_and(|port| port != 0);
    let without_endpoint = peers.iter().filter(|peer| peer.endpoint.is_none());
    if peers.is_empty() {
        findings.refuse(PlanError::NoPeer);
    } else if without_endpoint.clone().count() == peers.len() {
        if listens {
            findings
                .note("No peer has an endpoint: the tunnel cannot be used until a peer has connected to it.".into());
        } else {
            findings.refuse(PlanError::NoEndpoint);
        }
    } else {
        for peer in without_endpoint {
            let key = peer.public_key;
            findings.note(format!(
                "The peer {key} has no endpoint: it cannot be reached until it has connected to this tunnel."
            ));
        }
    }
    if listens && let Some(port) = interface.listen_port {
        findings.note(format!("WireGuard listens on UDP port {port} on all addresses of {place}."));
    }
}

/// Adds a note if the encrypted packets carry a mark, which may concern rules of the host.
pub(super) fn note_mark(config: &Config, findings: &mut Findings) {
    let interface = &config.wireguard.interface;
    if let Some(mark) = interface.fwmark.filter(|mark| *mark != 0) {
        findings.note(format!(
            "The encrypted packets carry the firewall mark {mark:#x}, which rules of the host may match."
        ));
    }
}

/// Why a tunnel can have no IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WithoutIpv6 {
    /// The kernel has none.
    Kernel,
    /// It is switched off in the namespace, where it cannot be switched on.
    SwitchedOff,
}

impl WithoutIpv6 {
    fn error(self) -> PlanError {
        match self {
            Self::Kernel => PlanError::KernelWithoutIpv6,
            Self::SwitchedOff => PlanError::Ipv6SwitchedOff,
        }
    }

    /// Returns a main clause.
    fn reason(self) -> &'static str {
        match self {
            Self::Kernel => "This kernel has no IPv6",
            Self::SwitchedOff => {
                "IPv6 is switched off here (net.ipv6.conf.default.disable_ipv6), and /proc/sys cannot be written"
            }
        }
    }
}

/// Decides the addresses and the routes. There are none of IPv6 if there is a reason for that.
pub(super) fn routing(file: &WgQuick, without_ipv6: Option<WithoutIpv6>, findings: &mut Findings) -> Routing {
    let mut addresses = addresses(&file.interface.addresses, findings);
    if let Some(without) = without_ipv6 {
        let (of_ipv6, of_ipv4): (Vec<IpNet>, Vec<IpNet>) = addresses.iter().partition(|net| net.addr().is_ipv6());
        let list: Vec<String> = of_ipv6.iter().map(IpNet::to_string).collect();
        if !of_ipv6.is_empty() && of_ipv4.is_empty() {
            findings.refuse(without.error());
        } else if !of_ipv6.is_empty() {
            findings.note(format!(
                "{}, so the tunnel has no IPv6, and its address {} is not used.",
                without.reason(),
                list.join(", ")
            ));
        }
        addresses = of_ipv4;
    }
    let mut routes: Vec<IpNet> = file.peers.iter().flat_map(|peer| &peer.allowed_ips).map(IpNet::trunc).collect();
    routes.sort_unstable();
    routes.dedup();
    note_peers(file, findings);

    let ipv4 = addresses.iter().any(|net| net.addr().is_ipv4());
    let ipv6 = addresses.iter().any(|net| net.addr().is_ipv6());
    let (kept, dropped): (Vec<IpNet>, Vec<IpNet>) =
        routes.into_iter().partition(|net| if net.addr().is_ipv4() { ipv4 } else { ipv6 });
    if kept.is_empty() && dropped.is_empty() {
        // A missing peer is reported already.
        if !file.peers.is_empty() {
            findings.refuse(PlanError::NothingRouted);
        }
    } else if !addresses.is_empty() {
        // There is an address, so at most one family is dropped.
        let (present, absent) = if ipv4 { ("IPv4", "IPv6") } else { ("IPv6", "IPv4") };
        if kept.is_empty() {
            findings.refuse(PlanError::FamiliesApart { addresses: present, allowed: absent });
        } else if !dropped.is_empty() {
            let nets: Vec<String> = dropped.iter().map(IpNet::to_string).collect();
            findings.note(format!("The tunnel has no {absent} address, so {} is not routed.", nets.join(", ")));
        }
    }
    if !kept.is_empty() {
        note_partial_routes(&kept, [("IPv4", ipv4), ("IPv6", ipv6)], findings);
    }
    Routing { addresses, routes: kept, ipv6 }
}

/// Adds a note if the tunnel only leads to a part of a family's addresses: a VPN that is expected to lead to the
/// Internet may only lead to a company.
fn note_partial_routes(routes: &[IpNet], families: [(&str, bool); 2], findings: &mut Findings) {
    let whole = IpNet::aggregate(&routes.to_vec());
    for (family, is_present) in families {
        let own: Vec<&IpNet> = whole.iter().filter(|net| net.addr().is_ipv4() == (family == "IPv4")).collect();
        if is_present && own.is_empty() {
            findings
                .note(format!("AllowedIPs contain no {family} network, so the tunnel leads to no {family} address."));
        } else if own.iter().any(|net| net.prefix_len() > 0) {
            findings.note(format!(
                "AllowedIPs only contain a part of {family}: the tunnel leads to no other {family} address."
            ));
        }
    }
}

/// Returns the addresses as given, without duplicates. The kernel accepts an IPv6 address once, whatever its prefix.
fn addresses(given: &[IpNet], findings: &mut Findings) -> Vec<IpNet> {
    let mut kept: Vec<IpNet> = Vec::with_capacity(given.len());
    for net in given {
        let address = net.addr();
        let unusable = match address {
            _ if address.is_unspecified() => Some("the unspecified address"),
            _ if address.is_multicast() => Some("a multicast address"),
            _ if address.is_loopback() => Some("a loopback address"),
            _ => None,
        };
        if let Some(what) = unusable {
            findings.refuse(PlanError::UnusableAddress { address: *net, what });
        } else if !kept.iter().any(|other| other == net || (address.is_ipv6() && other.addr() == address)) {
            kept.push(*net);
        }
    }
    if given.is_empty() {
        findings.refuse(PlanError::NoAddress);
    }
    kept
}

/// Adds notes about AllowedIPs that have no effect.
fn note_peers(file: &WgQuick, findings: &mut Findings) {
    let mut last: BTreeMap<IpNet, PublicKey> = BTreeMap::new();
    for peer in &file.peers {
        let key = peer.public_key;
        if peer.allowed_ips.is_empty() {
            findings.note(format!("The peer {key} has no AllowedIPs: no packets are sent to it or accepted from it."));
        }
        for net in &peer.allowed_ips {
            if let Some(former) = last.insert(net.trunc(), key).filter(|former| *former != key) {
                findings
                    .note(format!("Two peers have AllowedIPs {net}; WireGuard uses the later, {key}, not {former}."));
            }
        }
    }
}

/// Returns the peers without their secrets.
pub(super) fn peers(file: &WgQuick) -> Vec<PeerPlan> {
    let plan = |peer: &crate::config::Peer| PeerPlan {
        public_key: peer.public_key,
        preshared_key: peer.preshared_key.as_ref().is_some_and(|key| !key.is_zero()),
        endpoint: peer.endpoint.as_ref().map(ToString::to_string),
        allowed_ips: peer.allowed_ips.clone(),
        persistent_keepalive: peer.persistent_keepalive,
    };
    file.peers.iter().map(plan).collect()
}
