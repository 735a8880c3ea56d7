//! Local networks on a host where other programs change things: firewalls, flushed rules, changed forwarding, killed
//! processes.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::{Lab, PRIVATE_LAN, Peer, Skip, variables, vpn_exec};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::Netlink;
use vpn_exec::linux::sysctl as parameters;

use super::{
    WORKS, assert_untouched, file, finish, inside, keeper_of, local_networks, nft, reachable, sysctl, untouched, url,
    works,
};

fn wait_until(what: &str, done: impl FnMut() -> Result<bool>) -> Result<()> {
    lab::wait_until(lab::patience(WORKS), &format!("never: {what}"), done)
}

fn neighbours_page() -> String {
    format!("get {}", url(PRIVATE_LAN.ipv4, 80))
}

/// As Docker's and ufw's.
#[test]
fn a_firewall_that_drops_forwarded_packets_is_reported() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("rules and forwarding of the host")?;
        lab.join_private_lan()?;
        let host = NetworkNamespace::current()?;
        nft(
            &host,
            &["add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }"],
        )?;
        let mut agent = inside(lab, &[local_networks(), &["--name", "dropped"]].concat())?;
        agent.fail(&neighbours_page())?;
        let said = finish(agent)?;
        ensure!(said.contains("chain FORWARD of table ip filter"), "{said}");
        let advice: Vec<&str> = said.split('`').skip(1).step_by(2).filter(|text| text.starts_with("nft ")).collect();
        ensure!(advice.len() == 2, "{said}");
        for command in advice {
            nft(&host, &[command.strip_prefix("nft ").context("a command")?.trim_matches('\'')])?;
        }
        let mut agent = inside(lab, &[local_networks(), &["--name", "dropped"]].concat())?;
        agent.succeed(&neighbours_page())?;
        let said = finish(agent)?;
        ensure!(!said.contains("FORWARD"), "what was done about it is seen: {said}");
        Ok(())
    });
}

/// As firewalld's: the policy accepts, but the last rule rejects.
#[test]
fn a_firewall_whose_last_rule_rejects_is_reported() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("rules and forwarding of the host")?;
        lab.join_private_lan()?;
        let host = NetworkNamespace::current()?;
        let chain =
            "add table inet wall; add chain inet wall forward { type filter hook forward priority 10; policy accept; };
                     add rule inet wall forward ct state established accept;";
        for (last, stops) in [
            ("reject with icmpx type admin-prohibited", true),
            ("counter log prefix \"no: \" drop", true),
            ("ct state invalid drop", false),
            ("drop; add rule inet wall forward counter", true),
            ("iifname \"eth9\" reject", false),
        ] {
            nft(&host, &[&format!("{chain} add rule inet wall forward {last}")])?;
            let agent = inside(lab, &[local_networks(), &["--name", "walled"]].concat())?;
            let said = finish(agent)?;
            ensure!(said.contains("chain forward of table inet wall") == stops, "{last}: {said}");
            if stops {
                let mut agent = inside(lab, &[local_networks(), &["--name", "walled"]].concat())?;
                agent.fail(&neighbours_page())?;
                let said = finish(agent)?;
                for command in said.split('`').filter_map(|text| text.strip_prefix("nft ")) {
                    nft(&host, &[command.trim_matches('\'')])?;
                }
                let mut agent = inside(lab, &[local_networks(), &["--name", "walled"]].concat())?;
                agent.succeed(&neighbours_page())?;
                let said = finish(agent)?;
                ensure!(!said.contains("wall"), "what was done about it is seen: {said}");
            }
            nft(&host, &["delete table inet wall"])?;
        }
        Ok(())
    });
}

/// nft(8) does not show the tables of iptables-legacy.
#[test]
fn an_older_firewall_is_reported() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("rules and forwarding of the host")?;
        lab.join_private_lan()?;
        for (tool, at) in ["iptables-legacy", "ip6tables-legacy"].into_iter().zip(reachable(PRIVATE_LAN)) {
            let run = |arguments: &[&str]| -> Result<()> {
                match Command::new(tool).args(arguments).output() {
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                        let reason = format!("there is no {tool} (Debian's package iptables)");
                        Err(Skip::error(reason, lab::variables::REQUIRE_PEERS))
                    }
                    Ok(output) if !output.status.success() => {
                        let reason = format!("{tool}: {}", String::from_utf8_lossy(&output.stderr));
                        // Newer kernels may lack it.
                        Err(Skip::error(reason, lab::variables::REQUIRE_LEGACY_TABLES))
                    }
                    Ok(_) => Ok(()),
                    Err(error) => Err(error.into()),
                }
            };
            run(&["-P", "FORWARD", "DROP"])?;
            let get = format!("get {}", url(at, 80));
            let mut agent = inside(lab, &[local_networks(), &["--name", "older"]].concat())?;
            agent.fail(&get)?;
            let said = finish(agent)?;
            let advice: Vec<&str> = said.split('`').filter(|text| text.starts_with(tool)).collect();
            ensure!(advice.len() == 2, "{said}");
            for command in advice {
                run(&command.split(' ').skip(1).collect::<Vec<_>>())?;
            }
            let mut agent = inside(lab, &[local_networks(), &["--name", "older"]].concat())?;
            agent.succeed(&get)?;
            let said = finish(agent)?;
            ensure!(!said.contains(tool), "what was done about it is seen: {said}");
        }
        Ok(())
    });
}

#[test]
fn flushed_rules_are_restored() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("rules and forwarding of the host")?;
        lab.join_private_lan()?;
        let host = NetworkNamespace::current()?;
        let mut agent = inside(lab, &[local_networks(), &["--name", "flushed"]].concat())?;
        agent.succeed(&neighbours_page())?;
        let rules = || nft(&host, &["list table inet vpn-exec-flushed"]).unwrap_or_default();
        let before = rules();
        for flush in [
            "flush ruleset",
            "delete table inet vpn-exec-flushed",
            "flush table inet vpn-exec-flushed",
            "flush chain inet vpn-exec-flushed forward",
        ] {
            nft(&host, &[flush])?;
            wait_until(&format!("the rules are there again after `{flush}`"), || Ok(rules() == before))?;
            agent.succeed(&neighbours_page())?;
        }
        finish(agent)?;
        Ok(())
    });
}

/// Before the keeper monitors changes.
#[test]
fn rules_that_are_flushed_during_the_start_are_restored() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("rules and forwarding of the host")?;
        lab.join_private_lan()?;
        let host = NetworkNamespace::current()?;
        let up = [&["up", file(lab)?, "--name", "early", "--backend", lab::backend()], local_networks()].concat();
        let mut child = vpn_exec(up).env(variables::FAIL, "stop:at the end").spawn()?;
        let is_stopped = |pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
        };
        wait_until("the keeper stops", || Ok(keeper_of("early").is_ok_and(is_stopped)))?;
        nft(&host, &["flush ruleset"])?;
        kill(Pid::from_raw(keeper_of("early")?), Signal::SIGCONT)?;
        ensure!(child.wait()?.success());
        wait_until("the rules are there again", || Ok(nft(&host, &["list ruleset"])?.contains("vpn-exec-early")))?;
        works(&["down", "early"])?;
        Ok(())
    });
}

/// Another program makes the host a router while a tunnel is up, and reverts that later.
#[test]
fn a_host_that_becomes_a_router_stays_one() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("rules and forwarding of the host")?;
        lab.join_private_lan()?;
        let host = NetworkNamespace::current()?;
        let closed = || {
            Ok(nft(&host, &["list table inet vpn-exec-router"])?.contains("iifname \"lan0\" meta nfproto ipv4 drop"))
        };
        let mut agent = inside(lab, &[local_networks(), &["--name", "router"]].concat())?;
        ensure!(closed()?);
        parameters::set("net/ipv4/ip_forward", "1")?;
        parameters::set("net/ipv6/conf/all/forwarding", "1")?;
        wait_until("the host forwards for all again", || Ok(!closed()?))?;
        agent.succeed(&neighbours_page())?;
        parameters::set("net/ipv4/ip_forward", "0")?;
        parameters::set("net/ipv6/conf/all/forwarding", "0")?;
        wait_until("the host forwards for the tunnel alone again", closed)?;
        agent.succeed(&neighbours_page())?;
        parameters::set("net/ipv4/ip_forward", "1")?;
        finish(agent)?;
        ensure!(sysctl("net/ipv4/ip_forward")? == "1" && sysctl("net/ipv4/conf/lan0/forwarding")? == "1");
        Ok(())
    });
}

/// Two tunnels need forwarding on the same interface, and one ends.
#[test]
fn forwarding_stays_on_while_another_tunnel_needs_it() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("rules and forwarding of the host")?;
        lab.join_private_lan()?;
        let before = untouched(lab)?;
        let one = inside(lab, &[local_networks(), &["--name", "one"]].concat())?;
        let mut two = inside(lab, &[local_networks(), &["--name", "two"]].concat())?;
        finish(one)?;
        ensure!(sysctl("net/ipv4/conf/lan0/forwarding")? == "1");
        two.succeed(&neighbours_page())?;
        finish(two)?;
        assert_untouched(&before)
    });
}

/// As udev does after a change of its rules. The index stays.
#[test]
fn a_renamed_interface_forwards_only_for_the_tunnel_and_only_while_it_is_up() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("rules and forwarding of the host")?;
        lab.join_private_lan()?;
        let host = NetworkNamespace::current()?;
        let rename = |from: &str, to: &str| -> Result<()> {
            let output = Command::new("ip").args(["link", "set", from, "name", to]).output()?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        };
        let mut agent = inside(lab, &[local_networks(), &["--name", "renamed"]].concat())?;
        rename("lan0", "lan9")?;
        wait_until("nothing else is forwarded from it", || {
            Ok(nft(&host, &["list table inet vpn-exec-renamed"])?.contains("iifname \"lan9\" meta nfproto ipv4 drop"))
        })?;
        ensure!(sysctl("net/ipv4/conf/lan9/forwarding")? == "1");
        agent.succeed(&neighbours_page())?;
        finish(agent)?;
        // The snapshots differ, as the labels of addresses have changed with the name.
        for parameter in ["net/ipv4/conf/lan9/forwarding", "net/ipv6/conf/lan9/force_forwarding"] {
            ensure!(sysctl(parameter).unwrap_or_default() != "1", "{parameter} was not put back");
        }
        Ok(())
    });
}

/// Two network namespaces share a `/run`, as after `ip netns exec`, and have interfaces with the same indexes.
#[test]
fn interfaces_of_another_namespace_are_not_touched() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("rules and forwarding of the host")?;
        lab.join_private_lan()?;
        let (other, ()) = NetworkNamespace::create(|| Ok(()))?;
        let ip = |arguments: &str| -> Result<()> {
            let output = other.run(|| Command::new("ip").args(arguments.split(' ')).output())?;
            ensure!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        };
        let number = Netlink::open()?.link_index(&"lan0".parse()?)?;
        ip(&format!("link add lan0 index {number} type veth peer name near index {}", number + 100))?;
        ip("link set lan0 up")?;
        ip("link set near up")?;
        ip("address add 10.98.0.1/24 dev near")?;
        let mut agent = inside(lab, &[local_networks(), &["--name", "here"]].concat())?;
        let there = ["--name", "there", "--backend", "userspace", "--local", "10.98.0.0/24"];
        let up = [&["up", file(lab)?], &there[..]].concat();
        let output = other.run(|| vpn_exec(&up).output())?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let is_on = |interface: &str| other.run(|| parameters::get(&format!("net/ipv4/conf/{interface}/forwarding")));
        ensure!(is_on("near")? == "1" && is_on("lan0")? == "0", "an interface that no tunnel there needs");
        let output = other.run(|| vpn_exec(["down", "there"]).output())?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        ensure!(is_on("near")? == "0" && sysctl("net/ipv4/conf/lan0/forwarding")? == "1");
        agent.succeed(&neighbours_page())?;
        finish(agent)?;
        Ok(())
    });
}

fn killed(lab: &Lab, name: &str) -> Result<()> {
    let up = [&["up", file(lab)?, "--name", name, "--backend", lab::backend()], local_networks()].concat();
    works(&up)?;
    kill(Pid::from_raw(keeper_of(name)?), Signal::SIGKILL)?;
    Ok(())
}

#[test]
fn a_successor_takes_over_forwarding_and_reverts_it_at_the_end() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let before = untouched(lab)?;
        let host = NetworkNamespace::current()?;
        let mut agent = inside(lab, &[local_networks(), &["--name", "lives"]].concat())?;
        agent.succeed(&neighbours_page())?;
        let keeper = keeper_of("lives")?;
        kill(Pid::from_raw(keeper), Signal::SIGKILL)?;
        // No keeper monitors changes now.
        nft(&host, &["flush ruleset"])?;
        wait_until("there is a successor", || Ok(keeper_of("lives")? != keeper))?;
        agent.succeed_within(WORKS, &neighbours_page())?;
        finish(agent)?;
        assert_untouched(&before)?;

        killed(lab, "dead")?;
        works(&["down", "dead"])?;
        assert_untouched(&before)
    });
}

/// A table with a tunnel's name but without its mark.
#[test]
fn a_foreign_table_of_the_same_name_is_not_touched() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("rules and forwarding of the host")?;
        lab.join_private_lan()?;
        let host = NetworkNamespace::current()?;
        nft(&host, &["add table inet vpn-exec-taken { comment \"vpn-exec:taken:0\"; }"])?;
        let before = untouched(lab)?;
        let file = file(lab)?;
        let up = [&["up", file, "--name", "taken", "--backend", lab::backend()], local_networks()].concat();
        let refused = super::vpn_exec(&up)?;
        let said = String::from_utf8(refused.stderr)?;
        ensure!(!refused.status.success() && said.contains("nft delete table inet vpn-exec-taken"), "{said}");
        assert_untouched(&before)
    });
}
