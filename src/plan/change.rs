//! What turns a living tunnel into what a changed configuration says, as far as that can be done while programs are inside.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{FirewallPlan, HookPlan, NamesPlan, Plan};
use crate::config::BackendChoice;

/// What is to be done to a living tunnel. The peers and their keys are not in it: a plan has no secrets to compare. Nor are its ports, of
/// which a keeper has to know which ones it has ([`crate::relay::Change`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Addresses that WireGuard's interface gets. They are added before others are removed.
    pub add_addresses: Vec<IpNet>,
    /// Addresses that it loses, and with them the connections that use them.
    pub remove_addresses: Vec<IpNet>,
    /// What is routed into the tunnel besides.
    pub add_routes: Vec<IpNet>,
    /// What is not routed into it any more.
    pub remove_routes: Vec<IpNet>,
    /// Another MTU, in bytes.
    pub mtu: Option<u32>,
    /// Another UDP port or another mark of the encrypted packets: both as they are to be.
    pub socket: Option<(u16, u32)>,
    /// What the programs see of names.
    pub names: Option<NamesPlan>,
    /// Networks that are local besides.
    pub add_local: Vec<IpNet>,
    /// Networks that are not local any more.
    pub remove_local: Vec<IpNet>,
    /// Whether the rules for packets are others, or the host's interfaces that forward.
    pub firewall: bool,
}

impl Plan {
    /// Keeps the link to the host as it is in a living tunnel: it is there, and programs use it. Where the tunnel's routes cover it by now,
    /// its two addresses lead to the host still.
    pub fn keep_link(&mut self, living: &Plan) {
        self.veth = living.veth.clone();
        self.names.hosts.clone_from(&living.names.hosts);
        self.firewall = FirewallPlan::of(self);
    }
}

/// Decides what has to be done so that `current`, which is up on the backend `living`, becomes `wanted`, whose link to the host is
/// the living one ([`Plan::keep_link`]). What stays is not touched: connections live on it.
///
/// # Errors
/// All that cannot be changed while the tunnel is up, each a phrase.
pub fn change(current: &Plan, wanted: &Plan, living: BackendChoice) -> Result<Change, Vec<String>> {
    let reasons = obstacles(current, wanted, living);
    if !reasons.is_empty() {
        return Err(reasons);
    }
    let (is, shall) = (&current.wireguard, &wanted.wireguard);
    let socket = (shall.listen_port, shall.fwmark);
    Ok(Change {
        add_addresses: without(&shall.addresses, &is.addresses),
        remove_addresses: without(&is.addresses, &shall.addresses),
        add_routes: without(&shall.routes, &is.routes),
        remove_routes: without(&is.routes, &shall.routes),
        mtu: (is.mtu != shall.mtu).then_some(shall.mtu),
        socket: (socket != (is.listen_port, is.fwmark)).then_some(socket),
        names: (current.names != wanted.names).then(|| wanted.names.clone()),
        add_local: without(&wanted.local.networks, &current.local.networks),
        remove_local: without(&current.local.networks, &wanted.local.networks),
        firewall: (&current.firewall, &current.local) != (&wanted.firewall, &wanted.local),
    })
}

fn without(all: &[IpNet], except: &[IpNet]) -> Vec<IpNet> {
    all.iter().filter(|net| !except.contains(net)).copied().collect()
}

fn obstacles(current: &Plan, wanted: &Plan, living: BackendChoice) -> Vec<String> {
    let mut reasons = Vec::new();
    if wanted.backend != BackendChoice::Auto && wanted.backend != living {
        let name = |choice| match choice {
            BackendChoice::Kernel => "kernel",
            BackendChoice::Userspace => "userspace",
            BackendChoice::Auto => "auto",
        };
        reasons.push(format!("the backend is {}, not {}", name(living), name(wanted.backend)));
    }
    if current.wireguard.ipv6 != wanted.wireguard.ipv6 {
        let (is, shall) = if current.wireguard.ipv6 { ("has", "none") } else { ("has no", "some") };
        reasons.push(format!("the namespace {is} IPv6, and is to have {shall}"));
    }
    if current.wireguard.interface != wanted.wireguard.interface {
        reasons.push(format!("WireGuard's interface is {}", current.wireguard.interface));
    }
    let of_ipv6 = wanted.local.networks.iter().find(|net| net.addr().is_ipv6());
    if let (Some(net), None) = (of_ipv6, current.veth.host_ipv6) {
        reasons.push(format!("{net} cannot be local, as the link to the host has no IPv6"));
    }
    let run = |plan: &Plan| -> Vec<HookPlan> { plan.hooks.iter().filter(|hook| hook.run).cloned().collect() };
    if run(current) != run(wanted) {
        reasons.push("hooks are run when a tunnel comes and goes, and these are others".into());
    }
    let veth = &current.veth;
    let link = [Some(veth.host_ipv4.into()), Some(veth.inner_ipv4.into()), veth.host_ipv6.map(Into::into)];
    let link: Vec<IpAddr> = link.into_iter().chain([veth.inner_ipv6.map(Into::into)]).flatten().collect();
    let own = wanted.wireguard.addresses.iter().map(IpNet::addr).chain(wanted.names.servers.iter().copied());
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
    fn a_plan_survives_being_written_down() {
        let plan = planned(&format!("{FILE}PersistentKeepalive = 25\n"), true);
        let text = serde_json::to_string(&plan).expect("JSON");
        assert_eq!(serde_json::from_str::<Plan>(&text).expect("the plan"), plan);
    }

    #[test]
    fn what_is_the_same_is_left_alone() {
        let plan = planned(FILE, false);
        assert_eq!(change(&plan, &plan, BackendChoice::Userspace), Ok(Change::default()));
    }

    #[test]
    fn each_part_changes_by_itself() {
        let current = planned(FILE, false);
        let changed = |from: &str, to: &str| {
            let mut wanted = planned(&FILE.replace(from, to), false);
            wanted.keep_link(&current);
            change(&current, &wanted, BackendChoice::Kernel).expect("a change")
        };
        let none = Change::default();
        assert_eq!(
            changed("10.64.0.2/32", "10.64.0.3/32"),
            Change {
                add_addresses: nets(&["10.64.0.3/32"]),
                remove_addresses: nets(&["10.64.0.2/32"]),
                ..none.clone()
            }
        );
        assert_eq!(
            changed("0.0.0.0/0", "10.0.0.0/8"),
            Change { add_routes: nets(&["10.0.0.0/8"]), remove_routes: nets(&["0.0.0.0/0"]), ..none.clone() }
        );
        assert_eq!(changed("DNS", "MTU = 1300\nDNS"), Change { mtu: Some(1300), ..none.clone() });
        assert_eq!(changed("DNS", "ListenPort = 5000\nDNS"), Change { socket: Some((5000, 0)), ..none.clone() });
        assert_eq!(changed("DNS", "FwMark = 7\nDNS"), Change { socket: Some((0, 7)), ..none.clone() });
        let names = changed("DNS = 10.64.0.1", "DNS = 10.64.0.9").names.expect("other names");
        assert!(names.resolv_conf.contains("nameserver 10.64.0.9\n"));
        assert_eq!(changed("192.0.2.1", "192.0.2.9"), none, "a peer's endpoint is no part of the interface");
    }

    #[test]
    fn what_cannot_be_changed_alive_is_said_all_at_once() {
        let current = planned(FILE, true);
        let link = current.veth.host_ipv4.to_string();
        let without_ipv6 =
            FILE.replace(", fd64::2/128", "").replace("DNS = 10.64.0.1", &format!("PostUp = true\nDNS = {link}"));
        let mut wanted = planned(&without_ipv6, true);
        wanted.backend = BackendChoice::Kernel;
        let reasons = change(&current, &wanted, BackendChoice::Userspace).expect_err("too much");
        for word in ["backend is userspace, not kernel", "has IPv6", "hooks", "link to the host"] {
            assert!(reasons.iter().any(|reason| reason.contains(word)), "{word}: {reasons:?}");
        }
        // Hooks that are not run are nobody's concern.
        let hooked = FILE.replace("DNS", "PostUp = true\nDNS");
        assert_eq!(
            change(&planned(FILE, false), &planned(&hooked, false), BackendChoice::Kernel),
            Ok(Change::default())
        );
    }

    proptest! {
        #[test]
        fn applied_to_what_is_a_change_gives_what_shall_be(
            is in proptest::collection::btree_set(0_u8..20, 1..8),
            shall in proptest::collection::btree_set(0_u8..20, 1..8),
        ) {
            let with = |set: &std::collections::BTreeSet<u8>| {
                let list: Vec<String> = set.iter().map(|n| format!("10.{n}.0.0/16")).collect();
                planned(&FILE.replace("0.0.0.0/0", &list.join(", ")), false)
            };
            let (current, wanted) = (with(&is), with(&shall));
            let change = change(&current, &wanted, BackendChoice::Kernel).expect("routes can be changed");
            let mut routes = current.wireguard.routes;
            for gone in &change.remove_routes {
                prop_assert!(routes.contains(gone));
            }
            routes.retain(|net| !change.remove_routes.contains(net));
            for new in &change.add_routes {
                prop_assert!(!routes.contains(new));
            }
            routes.extend(change.add_routes);
            routes.sort_unstable();
            prop_assert_eq!(routes, wanted.wireguard.routes);
        }
    }
}
