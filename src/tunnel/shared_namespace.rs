//! Applies the plan of a tunnel to a shared network namespace: one that is not the tunnel's own, but a pod's or a
//! container's.
//!
//! [`close`] comes first, and closes the namespace without any WireGuard interface. [`open`] gives the interface its
//! addresses and routes. Both can be repeated: they add what is missing, remove what a former plan has left, and leave
//! the rest alone. Only what an attached tunnel has added is ever removed.

use std::io;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;

use super::create::{OPENING, open_interface};
use super::{LOADING_RULES, host_rules};
use crate::failure::{Doing, Failure};
use crate::fault;
use crate::linux::internet_sockets::{InternetSocket, InternetSockets, SocketProtocol};
use crate::linux::namespace::NetworkNamespace;
use crate::linux::netlink::route::{Route, RouteKind};
use crate::linux::netlink::rule::PolicyRule;
use crate::linux::netlink::{Netlink, NetlinkRequest};
use crate::linux::nftables::{self, Nftables};
use crate::linux::sysctl;
use crate::names::InterfaceName;
use crate::plan::RULES_TABLE;
use crate::plan::shared_namespace::{PRIORITIES, Placement, SharedNamespacePlan, TABLE, TableRoute};
use crate::ruleset::Family;

/// The metric of the last resort: any other route of the table wins.
const LAST_METRIC: u32 = u32::MAX;

/// The longest comment of a table in bytes. Longer ones are cut (nft(8)).
const MAX_COMMENT: usize = 127;

/// The protection of a namespace to which a tunnel is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// The packet rules and the routing are in place.
    Closed,
    /// There are no packet rules of an attached tunnel.
    Open,
    /// Another program has changed the packet rules, or removed a policy rule or the last resort.
    Damaged,
}

/// Closes a namespace: no packet leaves it but through WireGuard's interface, and to local networks. `netlink` and
/// `rules` are sockets in the namespace, and `owner` is a text by which the packet rules are recognized later.
///
/// `end_former` ends connections from before, by [`end_former_connections`]. It is called when the packet rules are
/// loaded, unless the namespace was closed already. If the process is killed meanwhile, the namespace is not closed
/// yet, and the next one ends them.
///
/// # Errors
/// If the kernel refuses, or the packet rules of that name belong to another owner. After a failure to load the rules
/// nothing has changed.
pub fn close(
    netlink: &mut Netlink,
    rules: &mut Nftables,
    plan: &SharedNamespacePlan,
    owner: &str,
    end_former: impl FnOnce(&mut Netlink),
) -> Result<(), Failure> {
    const ROUTING: &str = "route the container's packets";
    let before = protection(netlink, rules, owner)?;
    if !fault::is_broken("rules") {
        load_rules(rules, plan, owner)?;
    }
    fault::point("after the attached rules")?;
    if before != Protection::Closed {
        end_former(netlink);
    }
    if fault::is_broken("routes") {
        return Ok(());
    }
    // First the last resort and the rule that leads to it, so that no packet meets a half of the routing.
    let last = plan.routes.iter().filter_map(|route| match route {
        TableRoute::Unreachable(net) => Some(*net),
        TableRoute::Tunnel(_) => None,
    });
    let mut requests: Vec<NetlinkRequest> =
        last.map(|net| NetlinkRequest::add_unreachable_route(TABLE, net, LAST_METRIC).or_exists()).collect();
    requests.extend(plan.routing_rules.iter().rev().map(NetlinkRequest::add_rule));
    let present = netlink.policy_rules().doing(ROUTING)?;
    let is_stale = |rule: &&PolicyRule| is_own(rule) && !plan.routing_rules.contains(rule);
    requests.extend(present.iter().filter(is_stale).map(NetlinkRequest::delete_rule));
    netlink.execute(requests).doing(ROUTING)
}

/// Ends the connections of programs that ran in a namespace before it was closed ([`end_connections`]), and says so.
/// The packet rules stop all of them but exchanges of datagrams that go on, so a kernel that cannot end connections is
/// no reason to fail.
pub fn end_former_connections(namespace: &NetworkNamespace, plan: &SharedNamespacePlan) {
    match namespace.run(|| end_connections(&mut Netlink::open()?, plan)) {
        Ok(0) => {}
        Ok(count) => tracing::warn!(
            "ended the connections of programs that ran here before ({count}): attach the tunnel before they start"
        ),
        Err(error) => tracing::warn!(
            "cannot end the connections of programs that ran here before: {error}; restart these programs"
        ),
    }
}

/// Ends the connections of programs that were in a namespace before it was closed, except those to the namespace itself
/// and to local networks. Returns their number. The calling thread must be in the namespace, and `netlink` be one of
/// it.
///
/// The packet rules stop what goes out, but cannot tell everything apart: the next datagram from the other end of an
/// older UDP "connection" looks like the first of an inbound one, and the program's answers like replies. So its socket
/// is disconnected. A UDP socket that sends to anybody loses its port, if the kernel has chosen the port.
///
/// # Errors
/// Fails with `NotFound` or `EOPNOTSUPP` on a kernel that cannot list or end sockets.
pub fn end_connections(netlink: &mut Netlink, plan: &SharedNamespacePlan) -> io::Result<usize> {
    let own: Vec<IpAddr> = netlink.addresses()?.into_iter().map(|(_, address)| address.addr()).collect();
    let stays = |address: IpAddr| address.is_loopback() || own.contains(&address) || plan.is_local(&address);
    let chosen_by_kernel = kernel_chosen_ports()?;
    let sockets = InternetSockets::open()?;
    let leads_out = |socket: &InternetSocket| match (socket.protocol, socket.remote) {
        (_, Some(remote)) => !stays(remote.ip()),
        (SocketProtocol::Tcp, None) => false,
        (SocketProtocol::Udp, None) => {
            !socket.local.ip().is_loopback() && chosen_by_kernel.contains(&socket.local.port())
        }
    };
    let ended: Vec<InternetSocket> = sockets.all()?.into_iter().filter(leads_out).collect();
    for socket in &ended {
        tracing::debug!("ending the {:?} connection {} to {:?}", socket.protocol, socket.local, socket.remote);
        sockets.end(socket)?;
    }
    Ok(ended.len())
}

/// Returns the ports that the kernel gives to sockets which do not choose one (`ip_local_port_range` of ip(7)).
fn kernel_chosen_ports() -> io::Result<RangeInclusive<u16>> {
    let text = sysctl::get("net/ipv4/ip_local_port_range")?;
    let mut numbers = text.split_ascii_whitespace().map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(first)), Some(Ok(last))) => Ok(first..=last),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("ip_local_port_range is not a range: {text:?}"))),
    }
}

/// Loads the packet rules of a plan in place of those of a former one, in one transaction.
///
/// # Errors
/// If the kernel refuses, or the packet rules of that name belong to another owner. Then nothing has changed.
pub fn load_rules(rules: &mut Nftables, plan: &SharedNamespacePlan, owner: &str) -> Result<(), Failure> {
    let table = &plan.rules;
    match rules.comment(&table.name) {
        Ok(comment) if comment.as_deref().is_some_and(|comment| recorded_count(comment, owner).is_some()) => {}
        Ok(_) => {
            return Err(Failure::new(format!(
                "cannot {LOADING_RULES}: a table inet {} of another owner exists in this network namespace",
                table.name
            ))
            .advise("attach a tunnel to a container or a pod that has none"));
        }
        Err(error) if nftables::is_missing(&error) => {}
        Err(error) => return Err(error).doing(LOADING_RULES),
    }
    let count: usize = table.chains.iter().map(|chain| chain.rules.len()).sum();
    let loaded = rules.replace(table, &comment(owner, count, plan)).doing(LOADING_RULES);
    loaded.map_err(host_rules::advise_on_kernel)
}

/// Returns the comment of the table with the packet rules: the owner, the number of rules, and the nameservers of the
/// container as far as they fit. In contrast to a file, only a process with CAP_NET_ADMIN can change it.
fn comment(owner: &str, count: usize, plan: &SharedNamespacePlan) -> String {
    let mut comment = format!("{owner} {count}");
    if let Placement::Attached { nameservers, .. } = &plan.placement {
        for word in nameservers.iter().map(|address| format!(" {address}")) {
            if comment.len() + word.len() <= MAX_COMMENT {
                comment.push_str(&word);
            }
        }
    }
    comment
}

/// Returns the nameservers that a container had before its namespace was closed for `owner`. Returns None if the
/// namespace was never closed.
///
/// # Errors
/// Without CAP_NET_ADMIN, or if the kernel cannot be queried.
pub fn recorded_nameservers(rules: &mut Nftables, owner: &str) -> io::Result<Option<Vec<IpAddr>>> {
    let comment = match rules.comment(RULES_TABLE) {
        Ok(comment) => comment.unwrap_or_default(),
        Err(error) if nftables::is_missing(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(record(&comment, owner).map(|words| words.skip(1).filter_map(|word| word.parse().ok()).collect()))
}

/// Gives WireGuard's interface its MTU, if it is to change, and its addresses, brings it up, and adds the tunnel's
/// routes. The caller has created the interface.
///
/// # Errors
/// If the kernel refuses a step. The namespace stays closed then.
pub fn open(netlink: &mut Netlink, plan: &SharedNamespacePlan, mtu: Option<u32>) -> Result<(), Failure> {
    let wireguard = &plan.wireguard;
    let name = wireguard.interface.as_str();
    let index = netlink.link_index(&wireguard.interface).doing(format!("find {name}"))?;
    let addresses: Vec<IpNet> = wireguard.addresses.iter().map(alone).collect();
    let present = netlink.addresses().doing(OPENING)?;
    let present: Vec<IpNet> = present.into_iter().filter(|(of, _)| *of == index).map(|(_, address)| address).collect();

    let mut requests = open_interface(index, &wireguard.interface, mtu, &addresses);
    let stale = present.iter().filter(|address| !addresses.contains(address) && !is_link_local(address));
    requests.extend(stale.map(|address| NetlinkRequest::delete_address(index, name, *address)));
    let routes: Vec<IpNet> = plan.routes.iter().filter_map(through_tunnel).collect();
    requests.extend(routes.iter().map(|net| NetlinkRequest::add_route_in(TABLE, index, name, *net).or_exists()));
    let present = netlink.routes_of(TABLE).doing(OPENING)?;
    let stale = present.iter().filter(|route| route.interface == Some(index) && !routes.contains(&route.destination));
    requests.extend(stale.map(|route| NetlinkRequest::delete_route_in(TABLE, index, name, route.destination)));
    netlink.execute(requests).doing(OPENING)
}

/// Returns the addresses of a container's interfaces: of all interfaces except `lo` and WireGuard's. Link-local IPv6
/// addresses are left out.
///
/// # Errors
/// If the kernel cannot be queried.
pub fn container_addresses(netlink: &mut Netlink, wireguard: &InterfaceName) -> io::Result<Vec<IpAddr>> {
    let others: Vec<u32> = netlink
        .links()?
        .into_iter()
        .filter(|link| link.name != "lo" && link.name != wireguard.as_str())
        .map(|link| link.index)
        .collect();
    let own = netlink.addresses()?.into_iter().filter(|(of, net)| others.contains(of) && !is_link_local(net));
    let mut own: Vec<IpAddr> = own.map(|(_, net)| net.addr()).collect();
    own.sort_unstable();
    own.dedup();
    Ok(own)
}

/// Returns whether a namespace is closed for a tunnel that `owner` has attached.
///
/// # Errors
/// If the kernel cannot be queried.
pub fn protection(netlink: &mut Netlink, rules: &mut Nftables, owner: &str) -> Result<Protection, Failure> {
    const CHECKING: &str = "read the packet rules";
    let count = match rules.comment(RULES_TABLE) {
        Ok(comment) => comment.and_then(|comment| recorded_count(&comment, owner)),
        Err(error) if nftables::is_missing(&error) => None,
        Err(error) => return Err(error).doing(CHECKING),
    };
    let Some(count) = count else { return Ok(Protection::Open) };
    if rules.count_rules(RULES_TABLE).doing(CHECKING)? != count {
        return Ok(Protection::Damaged);
    }
    let present = netlink.policy_rules().doing("read the policy rules")?;
    let routes = netlink.routes_of(TABLE).doing("read the routes")?;
    let is_last = |route: &&Route| route.kind == RouteKind::Unreachable && route.destination.prefix_len() == 0;
    // A kernel without IPv6 has neither.
    let is_covered = routes.iter().filter(is_last).all(|last| {
        let ipv4 = last.destination.addr().is_ipv4();
        let is_all = |rule: &&PolicyRule| rule.priority == *PRIORITIES.end() && rule.table == TABLE;
        present.iter().filter(is_all).any(|rule| (rule.family == Family::Ipv4) == ipv4)
    });
    let has_ipv4 = routes.iter().filter(is_last).any(|route| route.destination.addr().is_ipv4());
    Ok(if has_ipv4 && is_covered { Protection::Closed } else { Protection::Damaged })
}

/// Returns the number of rules that a table's comment records, if the table belongs to `owner`.
fn recorded_count(comment: &str, owner: &str) -> Option<usize> {
    record(comment, owner)?.next()?.parse().ok()
}

/// Returns the words of a table's comment after its owner, if that is `owner`.
fn record<'a>(comment: &'a str, owner: &str) -> Option<impl Iterator<Item = &'a str>> {
    Some(comment.strip_prefix(owner)?.strip_prefix(' ')?.split(' '))
}

/// Returns whether a policy rule is one that an attached tunnel has added.
fn is_own(rule: &PolicyRule) -> bool {
    PRIORITIES.contains(&rule.priority) && [TABLE, Route::MAIN].contains(&rule.table)
}

/// Returns an address without its network. The kernel would add a route to the network to the main table, which has the
/// container's own routes.
fn alone(address: &IpNet) -> IpNet {
    address.addr().into()
}

fn through_tunnel(route: &TableRoute) -> Option<IpNet> {
    match route {
        TableRoute::Tunnel(net) => Some(*net),
        TableRoute::Unreachable(_) => None,
    }
}

/// Returns whether an address is a link-local one, which the kernel itself adds.
fn is_link_local(address: &IpNet) -> bool {
    matches!(address, IpNet::V6(net) if net.addr().is_unicast_link_local())
}
