//! Each protection by itself: without it, but with all others, the judge sees the leaks that it stops.

use anyhow::Result;
use lab::stamp::Protection;
use lab::{Lab, Peer, Reach};
use std::slice::from_mut;
use vpn_exec::fault;

use crate::judge::{Judge, Verdict};
use crate::stages::{Expected, InheritedSocket, NONE, allow_pings, inside, judged, with_second_barrier};

/// Judges a program without some protections, which are separated by commas.
fn judge_without(lab: &Lab, protection: &str, expected: Expected) -> Result<Verdict> {
    assert!(protection.split(',').all(|name| fault::PROTECTIONS.contains(&name)));
    allow_pings()?;
    lab.join_private_lan()?;
    let judge = Judge::new(lab, None)?;
    let mut agent = inside(lab, Reach::Ipv4, &InheritedSocket::new()?, "up", protection)?;
    let verdict = judged(from_mut(&mut agent), &judge, "up", expected)?;
    agent.finish()?;
    Ok(verdict)
}

fn expect_leaks_without(lab: &Lab, protection: &str, expected: Expected) -> Result<()> {
    judge_without(lab, protection, expected)?.expect_leaks(expected)
}

#[test]
fn without_its_network_namespace_a_program_reaches_the_hosts_network() {
    lab::test(Peer::Ours, |lab| {
        expect_leaks_without(lab, "namespace,sockets", |vector| {
            [Protection::Namespace, Protection::Rules].contains(&vector.protection)
        })
    });
}

#[test]
fn without_its_view_of_files_a_program_reaches_the_hosts_resolvers() {
    lab::test(Peer::Ours, |lab| {
        expect_leaks_without(lab, "names,sockets", |vector| vector.protection == Protection::Files)
    });
}

#[test]
fn without_the_socket_guard_a_program_reaches_unix_sockets_of_processes_outside() {
    lab::test(Peer::Ours, |lab| {
        expect_leaks_without(lab, "sockets", |vector| vector.protection == Protection::Sockets)
    });
}

/// The socket guard alone keeps the host's resolvers closed.
#[test]
fn the_socket_guard_stops_lookups_without_the_view_of_files() {
    lab::test(Peer::Ours, |lab| {
        judge_without(lab, "names", NONE)?
            .expect_no_leak_by(|vector| matches!(vector.protection, Protection::Files | Protection::Sockets))
    });
}

#[test]
fn with_privileges_a_program_leaves_its_namespace() {
    let leaves: Expected = |vector| ["join-host", "packet"].contains(&vector.name.as_str());
    lab::test(Peer::Ours, move |lab| expect_leaks_without(lab, &with_second_barrier("privileges"), leaves));
}

#[test]
fn without_the_closing_of_descriptors_a_program_sends_by_an_inherited_socket() {
    lab::test(Peer::Ours, |lab| {
        expect_leaks_without(lab, "descriptors", |vector| vector.protection == Protection::Descriptors)
    });
}

#[test]
fn without_routes_and_rules_a_program_sends_to_the_host() {
    let routed: Expected =
        |vector| ["udp4-internet", "udp6-internet", "dns-udp4-resolver", "getent"].contains(&vector.name.as_str());
    lab::test(Peer::Ours, move |lab| expect_leaks_without(lab, &with_second_barrier("routes,rules"), routed));
}

#[test]
fn the_rules_stop_leaks_without_the_routes() {
    lab::test(Peer::Ours, |lab| judge_without(lab, "routes", NONE)?.expect_no_leak());
}

#[test]
fn without_the_rules_multicast_and_names_reach_the_host() {
    let ruled: Expected = |vector| vector.protection == Protection::Rules && vector.name != "broadcast-neighbours";
    lab::test(Peer::Ours, move |lab| expect_leaks_without(lab, &with_second_barrier("rules"), ruled));
}
