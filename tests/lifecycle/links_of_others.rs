//! The links of other tunnels. A keeper is told of changes of the host's network, but not of these: otherwise the start
//! of one tunnel would wake the keepers of all. A launcher knows them from the other tunnels' plans.

use std::collections::HashSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use nix::sys::signal::Signal;
use vpn_exec::linux::netlink::link::TargetNamespace;
use vpn_exec::linux::netlink::monitor::Monitor;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::plan::{self, VethPlan};
use vpn_exec::registry;

use crate::support::{CONFIG, prepare, send, wait_for, works};

/// The multicast groups of a keeper's monitor of the network, as /proc/net/netlink shows them.
const MONITORED: &str = "01800550";

/// Starts a tunnel that stays.
fn up(name: &str) -> Result<String> {
    works(&["up", CONFIG, "--name", name])
}

fn keeper_of(name: &str) -> Result<i32> {
    Ok(registry::read(&name.parse()?)?.context("a state")?.keeper.cast_signed())
}

/// Returns the link of a running tunnel.
fn link_of(name: &str) -> Result<VethPlan> {
    registry::read_plan(&name.parse()?)?.context("a plan")?.veth.context("a link")
}

/// Takes a tunnel down, and waits until the kernel has removed its link.
fn down(name: &str) -> Result<()> {
    let link = link_of(name)?.host_interface;
    works(&["down", name])?;
    wait_for("the link's end", || Ok(Netlink::open()?.link(link.as_str())?.is_none()))
}

/// Creates an interface of the host that is no tunnel's.
fn add_interface(name: &str, index: u32) -> Result<()> {
    let mut host = Netlink::open()?;
    let (near, far) = (name.parse()?, format!("{name}-far").parse()?);
    host.execute_one(NetlinkRequest::add_veth_with_index((&near, index), &far, TargetNamespace::Current))?;
    let index = host.link_index(&near)?;
    Ok(host.execute_one(NetlinkRequest::set_up(index, name))?)
}

/// Returns the number of bytes that wait in a process's monitor of the network.
fn waiting_messages(pid: i32) -> Result<usize> {
    let sockets: HashSet<String> = fs::read_dir(format!("/proc/{pid}/fd"))?
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok()?.to_str().map(str::to_owned))
        .collect();
    let table = fs::read_to_string(format!("/proc/{pid}/net/netlink"))?;
    // The columns: sk, Eth, Pid, Groups, Rmem, Wmem, Dump, Locks, Drops, Inode.
    let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut own = rows.filter(|row| {
        row.get(3) == Some(&MONITORED) && sockets.contains(&format!("socket:[{}]", row.last().unwrap_or(&"")))
    });
    let row = own.next().context("a keeper monitors the host's network")?;
    ensure!(own.next().is_none(), "a keeper has one such monitor: {table}");
    Ok(row[4].parse()?)
}

#[test]
fn the_start_and_the_end_of_a_tunnel_do_not_wake_other_keepers() {
    lab::world::test(|| {
        prepare()?;
        up("first")?;
        let keeper = keeper_of("first")?;
        // A stopped keeper leaves what it is told in its socket.
        send(keeper, Signal::SIGSTOP)?;
        let unfiltered = Monitor::of_network()?;
        let before = waiting_messages(keeper)?;
        up("second")?;
        let is_rootless = registry::read_plan(&"second".parse()?)?.context("a plan")?.rootless;
        match is_rootless {
            true => works(&["down", "second"]).map(drop)?,
            false => down("second")?,
        }
        assert_eq!(unfiltered.drain()?, !is_rootless, "the host's network has changed, or has not");
        assert_eq!(waiting_messages(keeper)?, before, "the keeper was told of it");

        add_interface("eth7", 0)?;
        assert!(waiting_messages(keeper)? > before, "the keeper was not told of a new interface");
        send(keeper, Signal::SIGCONT)?;
        wait_for("the keeper", || Ok(waiting_messages(keeper)? == 0))?;
        works(&["down", "first"]).map(drop)
    });
}

#[test]
fn an_interface_with_a_tunnels_index_keeps_it_and_is_heard_of() {
    lab::world::test(|| {
        lab::tunnel::needs_root("a rootless tunnel has no link to the host")?;
        prepare()?;
        up("tune")?;
        let link = link_of("tune")?;
        let mut host = Netlink::open()?;
        let index = link.host_index();
        assert_eq!(host.link_index(&link.host_interface)?, index);
        down("tune")?;

        add_interface("eth7", index)?;
        up("tune")?;
        assert_eq!(link_of("tune")?, link, "the tunnel differs in the index alone");
        let chosen = host.link_index(&link.host_interface)?;
        assert!(chosen != index && host.link_index(&"eth7".parse()?)? == index, "{chosen}");
        let monitor = Monitor::of_network()?;
        monitor.ignore(Some(plan::links_of_others(None)))?;
        let network: IpNet = "203.0.113.1/24".parse()?;
        host.execute_one(NetlinkRequest::add_address(index, "eth7", network))?;
        assert!(monitor.drain()?, "a new address");
        host.execute_one(NetlinkRequest::add_route(index, "eth7", "198.51.100.0/24".parse()?, None))?;
        assert!(monitor.drain()?, "a new route");
        fs::write("/proc/sys/net/ipv4/conf/eth7/forwarding", "1")?;
        assert!(monitor.drain()?, "forwarding");
        host.execute_one(NetlinkRequest::delete_link(index, "eth7"))?;
        assert!(monitor.drain()?, "a removed interface");
        down("tune")
    });
}

#[test]
fn a_keeper_with_local_networks_is_told_of_other_tunnels_links() {
    lab::world::test(|| {
        lab::tunnel::needs_root("a rootless tunnel has no link to the host")?;
        prepare()?;
        up("first")?;
        let keeper = keeper_of("first")?;
        let is_told = |name: &str| -> Result<bool> {
            wait_for("the keeper to have read all messages", || Ok(waiting_messages(keeper)? == 0))?;
            send(keeper, Signal::SIGSTOP)?;
            up(name)?;
            let is_told = waiting_messages(keeper)? > 0;
            send(keeper, Signal::SIGCONT)?;
            Ok(is_told)
        };
        assert!(!is_told("second")?);
        works(&["reload", CONFIG, "--name", "first", "--local", "192.168.7.0/24"])?;
        assert!(is_told("third")?, "its networks may contain the link");
        works(&["reload", CONFIG, "--name", "first"])?;
        assert!(!is_told("fourth")?);
        for name in ["first", "second", "third", "fourth"] {
            works(&["down", name])?;
        }
        Ok(())
    });
}

/// A tunnel that is being created has a plan, and no interface yet.
#[test]
fn a_link_that_another_tunnel_has_planned_is_not_used() {
    lab::world::test(|| {
        lab::tunnel::needs_root("a user's tunnels have their plans elsewhere")?;
        prepare()?;
        up("tune")?;
        let link = link_of("tune")?;
        let mut plan: serde_json::Value = serde_json::from_slice(&fs::read("/run/vpn-exec/tune/plan")?)?;
        down("tune")?;

        plan["name"] = "other".into();
        fs::create_dir_all("/run/vpn-exec/other")?;
        fs::write("/run/vpn-exec/other/plan", plan.to_string())?;
        up("tune")?;
        let chosen = link_of("tune")?;
        assert_ne!(chosen.host_interface, link.host_interface);
        assert_ne!(chosen.host_ipv4, link.host_ipv4);
        assert_ne!(chosen.host_ipv6, link.host_ipv6);
        down("tune")
    });
}
