//! The difference between two plans: what a reload changes while programs are running in the tunnel.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{DnsPlan, FirewallPlan, HookPlan, Plan, VethPlan};
use crate::config::BackendChoice;

/// What changes in a running tunnel when its configuration is reloaded.
///
/// Peers and keys are not part of it, as plans contain no secrets to compare. Neither are ports: only the keeper knows
/// which ones it relays ([`crate::relay::PortDiff`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanDiff {
    /// Addresses to add to the WireGuard interface. They are added before others are removed.
    pub add_addresses: Vec<IpNet>,
    /// Addresses to remove from it. Connections that use them break.
    pub remove_addresses: Vec<IpNet>,
    /// Routes into the tunnel to add.
    pub add_routes: Vec<IpNet>,
    /// Routes into the tunnel to remove.
    pub remove_routes: Vec<IpNet>,
    /// The new MTU, in bytes.
    pub mtu: Option<u32>,
    /// The new UDP port and the new firewall mark of encrypted packets, if either has changed.
    pub socket: Option<(u16, u32)>,
    /// How programs resolve names from now on.
    pub dns: Option<DnsPlan>,
    /// Local networks to add.
    pub add_local: Vec<IpNet>,
    /// Local networks to remove.
    pub remove_local: Vec<IpNet>,
    /// Whether the packet rules or the forwarding interfaces of the host have changed, or the rules and routes of a
    /// container's namespace.
    pub firewall: bool,
}

impl Plan {
    /// Replaces the link to the host by that of a running tunnel, since programs use it. If the tunnel's new routes
    /// cover the link, its two addresses still lead to the host.
    pub fn keep_link(&mut self, running: &Plan) {
        self.veth = running.veth.clone();
        self.dns.hosts.clone_from(&running.dns.hosts);
        self.firewall = FirewallPlan::of(self);
    }
}

/// Returns what turns the plan `current` of a running tunnel into the plan `new`. `backend` is the one that the tunnel
/// uses. The new plan must have the link of the running tunnel ([`Plan::keep_link`]). Unchanged parts are left alone,
/// as connections use them.
///
/// # Errors
///
/// Returns all changes that a running tunnel does not support, each as a phrase.
pub fn diff(current: &Plan, new: &Plan, backend: BackendChoice) -> Result<PlanDiff, Vec<String>> {
    let reasons = unsupported_changes(current, new, backend);
    if !reasons.is_empty() {
        return Err(reasons);
    }
    let (old_wireguard, new_wireguard) = (&current.wireguard, &new.wireguard);
    let socket = (new_wireguard.listen_port, new_wireguard.fwmark);
    Ok(PlanDiff {
        add_addresses: without(&new_wireguard.addresses, &old_wireguard.addresses),
        remove_addresses: without(&old_wireguard.addresses, &new_wireguard.addresses),
        add_routes: without(&new_wireguard.routes, &old_wireguard.routes),
        remove_routes: without(&old_wireguard.routes, &new_wireguard.routes),
        mtu: (old_wireguard.mtu != new_wireguard.mtu).then_some(new_wireguard.mtu),
        socket: (socket != (old_wireguard.listen_port, old_wireguard.fwmark)).then_some(socket),
        dns: (current.dns != new.dns).then(|| new.dns.clone()),
        add_local: without(&new.local.networks, &current.local.networks),
        remove_local: without(&current.local.networks, &new.local.networks),
        firewall: (&current.firewall, &current.local, &current.shared_namespace)
            != (&new.firewall, &new.local, &new.shared_namespace),
    })
}

fn without(all: &[IpNet], except: &[IpNet]) -> Vec<IpNet> {
    all.iter().filter(|net| !except.contains(net)).copied().collect()
}

fn unsupported_changes(current: &Plan, new: &Plan, backend: BackendChoice) -> Vec<String> {
    let mut reasons = Vec::new();
    match (&current.shared_namespace, &new.shared_namespace) {
        (Some(_), None) => reasons.push("the tunnel is in the network namespace of a container".into()),
        (None, Some(_)) => reasons.push("the tunnel is in a network namespace of its own".into()),
        _ => {}
    }
    if new.backend != BackendChoice::Auto && new.backend != backend {
        let name = |choice| match choice {
            BackendChoice::Kernel => "kernel",
            BackendChoice::Userspace => "userspace",
            BackendChoice::Auto => "auto",
        };
        reasons.push(format!("the backend is {}, not {}", name(backend), name(new.backend)));
    }
    match (current.wireguard.ipv6, new.wireguard.ipv6) {
        (true, false) => reasons.push("the tunnel has IPv6, and the new configuration has none".into()),
        (false, true) => reasons.push("the tunnel has no IPv6, and the new configuration has an IPv6 address".into()),
        _ => {}
    }
    if current.wireguard.interface != new.wireguard.interface {
        reasons.push(format!("the WireGuard interface is {}", current.wireguard.interface));
    }
    let ipv6_network = new.local.networks.iter().find(|net| net.addr().is_ipv6());
    let link_ipv6 = current.veth.as_ref().and_then(|veth| veth.host_ipv6);
    if let (Some(net), None) = (ipv6_network, link_ipv6) {
        reasons.push(format!("{net} cannot be a local network: the link to the host has no IPv6"));
    }
    let run = |plan: &Plan| -> Vec<HookPlan> { plan.hooks.iter().filter(|hook| hook.run).cloned().collect() };
    if run(current) != run(new) {
        reasons.push("the hooks have changed, and hooks are only run when a tunnel is made or removed".into());
    }
    let link: Vec<IpAddr> = current.veth.as_ref().map(VethPlan::addresses).unwrap_or_default();
    let own = new.wireguard.addresses.iter().map(IpNet::addr).chain(new.dns.servers.iter().copied());
    let domains = new.dns.forwarder.iter().flat_map(|forwarder| forwarder.resolvers());
    let own = own.chain(domains.map(|resolver| resolver.address));
    reasons.extend(
        own.filter(|address| link.contains(address)).map(|address| format!("{address} is on the link to the host")),
    );
    reasons
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::{Config, wg_quick};
    use crate::plan::{Facts, plan};

    const FILE: &str = "[Interface]\n\
        PrivateKey = yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=\n\
        Address = 10.64.0.2/32, fd64::2/128\nDNS = 10.64.0.1\n\
        [Peer]\nPublicKey = xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=\n\
        AllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = 192.0.2.1:51820\n";

    fn planned(text: &str, hooks: bool) -> Plan {
        let (wireguard, _) = wg_quick::parse("test", text.as_bytes()).expect("a file");
        let config = Config { allow_hooks: hooks, ..Config::new("test".parse().expect("a name"), wireguard) };
        let facts = Facts { last_capability: 40, ..Facts::default() };
        plan(&config, &facts).expect("a plan")
    }

    fn nets(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|net| net.parse().expect("a network")).collect()
    }

    #[test]
    fn equal_plans_have_no_difference() {
        let plan = planned(FILE, false);
        assert_eq!(diff(&plan, &plan, BackendChoice::Userspace), Ok(PlanDiff::default()));
    }

    #[test]
    fn each_change_is_found_alone() {
        let current = planned(FILE, false);
        let changed = |from: &str, to: &str| {
            let mut new = planned(&FILE.replace(from, to), false);
            new.keep_link(&current);
            diff(&current, &new, BackendChoice::Kernel).expect("a supported change")
        };
        let none = PlanDiff::default();
        assert_eq!(
            changed("10.64.0.2/32", "10.64.0.3/32"),
            PlanDiff {
                add_addresses: nets(&["10.64.0.3/32"]),
                remove_addresses: nets(&["10.64.0.2/32"]),
                ..none.clone()
            }
        );
        assert_eq!(
            changed("0.0.0.0/0", "10.0.0.0/8"),
            PlanDiff { add_routes: nets(&["10.0.0.0/8"]), remove_routes: nets(&["0.0.0.0/0"]), ..none.clone() }
        );
        assert_eq!(changed("DNS", "MTU = 1300\nDNS"), PlanDiff { mtu: Some(1300), ..none.clone() });
        assert_eq!(changed("DNS", "ListenPort = 5000\nDNS"), PlanDiff { socket: Some((5000, 0)), ..none.clone() });
        assert_eq!(changed("DNS", "FwMark = 7\nDNS"), PlanDiff { socket: Some((0, 7)), ..none.clone() });
        let dns = changed("DNS = 10.64.0.1", "DNS = 10.64.0.9").dns.expect("another resolver");
        assert!(dns.resolv_conf.contains("nameserver 10.64.0.9\n"));
        assert_eq!(changed("192.0.2.1", "192.0.2.9"), none, "a peer's endpoint is not part of a plan's difference");
    }

    #[test]
    fn all_unsupported_changes_are_reported_at_once() {
        let current = planned(FILE, true);
        let link = current.veth.as_ref().expect("a link").host_ipv4.to_string();
        let without_ipv6 =
            FILE.replace(", fd64::2/128", "").replace("DNS = 10.64.0.1", &format!("PostUp = true\nDNS = {link}"));
        let mut new = planned(&without_ipv6, true);
        new.backend = BackendChoice::Kernel;
        let reasons = diff(&current, &new, BackendChoice::Userspace).expect_err("unsupported changes");
        for word in ["backend is userspace, not kernel", "has IPv6", "hooks", "link to the host"] {
            assert!(reasons.iter().any(|reason| reason.contains(word)), "{word}: {reasons:?}");
        }
        // Hooks that are not run may change.
        let hooked = FILE.replace("DNS", "PostUp = true\nDNS");
        assert_eq!(
            diff(&planned(FILE, false), &planned(&hooked, false), BackendChoice::Kernel),
            Ok(PlanDiff::default())
        );
    }

    proptest! {
        #[test]
        fn a_difference_turns_the_old_routes_into_the_new_ones(
            old in proptest::collection::btree_set(0_u8..20, 1..8),
            new in proptest::collection::btree_set(0_u8..20, 1..8),
        ) {
            let with_routes = |set: &std::collections::BTreeSet<u8>| {
                let list: Vec<String> = set.iter().map(|n| format!("10.{n}.0.0/16")).collect();
                planned(&FILE.replace("0.0.0.0/0", &list.join(", ")), false)
            };
            let (current, new) = (with_routes(&old), with_routes(&new));
            let diff = diff(&current, &new, BackendChoice::Kernel).expect("routes can be changed");
            let mut routes = current.wireguard.routes;
            for removed in &diff.remove_routes {
                prop_assert!(routes.contains(removed));
            }
            routes.retain(|net| !diff.remove_routes.contains(net));
            for added in &diff.add_routes {
                prop_assert!(!routes.contains(added));
            }
            routes.extend(diff.add_routes);
            routes.sort_unstable();
            prop_assert_eq!(routes, new.wireguard.routes);
        }
    }
}
