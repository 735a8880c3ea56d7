//! Split DNS: which resolvers answer the names of which domains. A forwarder in the namespace sends each question to
//! one side, and never to the other: to resolvers in local networks, past the tunnel, or to the tunnel's.
//!
//! Only the forwarder may ask a resolver in a local network. A program that asked one directly could ask it about any
//! name, which would be a DNS leak. The packets of the forwarder's sockets for local resolvers carry [`RESOLVER_MARK`],
//! which needs CAP_NET_ADMIN or, since Linux 5.17, CAP_NET_RAW (`SO_MARK` of socket(7)). The packet rules demand it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::error::PlanError;
use super::{Findings, local_networks};
use crate::config::{Config, Domain};

/// The mark of the forwarder's packets to resolvers in local networks (`SO_MARK` of socket(7)).
pub const RESOLVER_MARK: u32 = 0x7666;

/// The port of resolvers, and of the forwarder (RFC 1035 section 4.2).
pub const DNS_PORT: u16 = 53;

/// The addresses that the forwarder answers at: the loopback of the namespace.
pub const FORWARDER_ADDRESSES: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// The port of a forwarder that may not bind to [`DNS_PORT`].
const UNPRIVILEGED_PORT: u16 = 30353;

/// Options of resolv.conf(5) that make the C library append search domains to names with this many dots and fewer.
const NDOTS: &str = "ndots:";

/// The forwarder of questions, if there are domains with resolvers of their own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwarderPlan {
    /// The domains with resolvers of their own.
    pub domains: Vec<DomainPlan>,
    /// The resolvers of all other names.
    pub others: Vec<ResolverPlan>,
    /// The port of the loopback at which it listens. If it is not [`DNS_PORT`], a packet rule redirects questions.
    pub port: u16,
}

/// A domain with resolvers of its own. They answer questions about it and about all names below it, except those in a
/// longer domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainPlan {
    /// The domain.
    pub domain: Domain,
    /// Its resolvers, in the order in which they are asked. All are on the same side.
    pub resolvers: Vec<ResolverPlan>,
}

/// A resolver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolverPlan {
    /// Its address.
    pub address: IpAddr,
    /// Where it is.
    pub side: Side,
}

/// Where a resolver is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// In a local network.
    Local,
    /// Reached through the tunnel.
    Tunnel,
}

impl fmt::Display for DomainPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers: Vec<String> = self.resolvers.iter().map(|resolver| resolver.address.to_string()).collect();
        let side = match self.resolvers.first().map(|resolver| resolver.side) {
            Some(Side::Local) => "in a local network",
            Some(Side::Tunnel) | None => "in the tunnel",
        };
        write!(f, "{} ({side}) for {} and names below it", servers.join(", "), self.domain)
    }
}

impl ForwarderPlan {
    /// Returns the addresses at which the forwarder listens.
    pub fn listen_addresses(&self) -> [SocketAddr; 2] {
        FORWARDER_ADDRESSES.map(|address| SocketAddr::new(address, self.port))
    }

    /// Lets the forwarder listen at a port that needs no privilege.
    pub(super) fn use_unprivileged_port(&mut self) {
        self.port = UNPRIVILEGED_PORT;
    }

    /// Returns all resolvers.
    pub fn resolvers(&self) -> impl Iterator<Item = ResolverPlan> {
        self.domains.iter().flat_map(|domain| &domain.resolvers).chain(&self.others).copied()
    }

    /// Returns the addresses of the resolvers in local networks, without duplicates.
    pub fn local_resolvers(&self) -> Vec<IpAddr> {
        let mut local = Vec::new();
        for resolver in self.resolvers().filter(|resolver| resolver.side == Side::Local) {
            if !local.contains(&resolver.address) {
                local.push(resolver.address);
            }
        }
        local
    }
}

/// Decides who answers which names. `servers` are the resolvers of all other names, `tunnel` the networks that are
/// routed into the tunnel, and `local` those that are reached past it.
pub(super) fn decide(
    config: &Config,
    servers: &[IpAddr],
    tunnel: &[IpNet],
    local: &[IpNet],
    findings: &mut Findings,
) -> Option<ForwarderPlan> {
    if config.dns.domains.is_empty() {
        return None;
    }
    let is_local = |address: &IpAddr| local_networks::is_local(local, tunnel, address);
    let resolver = |address: &IpAddr| ResolverPlan {
        address: *address,
        side: if is_local(address) { Side::Local } else { Side::Tunnel },
    };
    // Most tunnels route the whole Internet, so that a route of the tunnel does not make every address one of its own.
    let is_tunnels = |address: &IpAddr| {
        servers.contains(address)
            || tunnel.iter().any(|net| net.contains(address) && net.prefix_len() >= local_networks::min_prefix_len(net))
    };
    let mut domains = Vec::with_capacity(config.dns.domains.len());
    for entry in &config.dns.domains {
        let domain = &entry.domain;
        let strangers: Vec<&IpAddr> = entry.servers.iter().filter(|at| !is_local(at) && !is_tunnels(at)).collect();
        for address in &strangers {
            findings.refuse(PlanError::ForeignResolver { address: **address, domain: domain.clone() });
        }
        let resolvers: Vec<ResolverPlan> = entry.servers.iter().map(resolver).collect();
        let sides_differ = resolvers.iter().any(|resolver| resolver.side != resolvers[0].side);
        if strangers.is_empty() && sides_differ {
            findings.refuse(PlanError::ResolversOnBothSides { domain: domain.clone() });
        }
        domains.push(DomainPlan { domain: domain.clone(), resolvers });
    }
    let plan = ForwarderPlan { domains, others: servers.iter().map(resolver).collect(), port: DNS_PORT };
    note_search_domains(config, &plan, findings);
    Some(plan)
}

/// Adds a note about search domains: the C library appends them to other names too, and asks about the result.
fn note_search_domains(config: &Config, plan: &ForwarderPlan, findings: &mut Findings) {
    let search = config.dns.search.as_ref().unwrap_or(&config.wireguard.interface.dns_search);
    let is_local = |domain: &&DomainPlan| domain.resolvers.iter().any(|resolver| resolver.side == Side::Local);
    let local = |name: &&String| plan.domains.iter().filter(is_local).any(|domain| domain.domain.contains(name));
    let Some(example) = search.iter().find(local) else { return };
    let dots = config.dns.options.iter().filter_map(|option| option.strip_prefix(NDOTS)?.parse::<u32>().ok());
    let when = match dots.max().unwrap_or(1) {
        0 | 1 => "when a look-up fails".to_owned(),
        dots => format!("and does so first for names with fewer than {dots} dots"),
    };
    findings.note(format!(
        "The C library appends the search domain {example} to all names, {when}. The local resolver of that domain sees \
         the result, such as www.example.net.{example}."
    ));
}
