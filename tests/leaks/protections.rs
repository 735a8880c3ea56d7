//! Each protection by itself: without it, and with all others, the judge finds what it is there for.

use anyhow::Result;
use lab::{Lab, Peer, Reach};
use std::slice::from_mut;
use vpn_exec::fault;

use crate::judge::{Verdict, Witnesses};
use crate::stages::{Expected, LeftOpen, NONE, allow_pings, inside, judged};
use crate::vectors::By;

/// A program without one protection, or several.
fn judge_without(lab: &Lab, protection: &str, expected: Expected) -> Result<Verdict> {
    assert!(protection.split(',').all(|name| fault::PROTECTIONS.contains(&name)));
    allow_pings()?;
    lab.join_private_lan()?;
    let witnesses = Witnesses::gather(lab, None)?;
    let mut agent = inside(lab, Reach::Ipv4, &LeftOpen::new()?, "up", protection)?;
    let verdict = judged(from_mut(&mut agent), &witnesses, "up", expected)?;
    agent.finish()?;
    Ok(verdict)
}

fn without(lab: &Lab, protection: &str, expected: Expected) -> Result<()> {
    judge_without(lab, protection, expected)?.reports(expected)
}

#[test]
fn without_its_namespace() {
    lab::test(Peer::Ours, |lab| {
        without(lab, "namespace,sockets", |vector| [By::Network, By::Rules].contains(&vector.by))
    });
}

#[test]
fn without_its_view_of_names() {
    lab::test(Peer::Ours, |lab| without(lab, "names,sockets", |vector| vector.by == By::Files));
}

#[test]
fn without_the_gate_before_sockets() {
    lab::test(Peer::Ours, |lab| without(lab, "sockets", |vector| vector.by == By::Sockets));
}

/// Where the view of names is lost, the socket guard keeps the host's resolvers closed as well.
#[test]
fn the_gate_holds_without_the_view_of_names() {
    lab::test(Peer::Ours, |lab| {
        judge_without(lab, "names", NONE)?.is_silence_of(|vector| matches!(vector.by, By::Files | By::Sockets))
    });
}

/// With privileges, the tunnel's namespace is left.
#[test]
fn without_the_loss_of_privileges() {
    let leaves: Expected = |vector| ["join-host", "packet"].contains(&vector.name);
    lab::test(Peer::Ours, move |lab| without(lab, "privileges", leaves));
}

#[test]
fn without_the_closing_of_descriptors() {
    lab::test(Peer::Ours, |lab| without(lab, "descriptors", |vector| vector.by == By::Descriptors));
}

/// Where the host is the way out, it sees what it is to pass on, but for the rules.
#[test]
fn without_the_routes_into_the_tunnel() {
    let routed: Expected =
        |vector| ["udp4-internet", "udp6-internet", "dns-udp4-resolver", "getent"].contains(&vector.name);
    lab::test(Peer::Ours, move |lab| without(lab, "routes,rules", routed));
}

#[test]
fn the_rules_hold_without_the_routes() {
    lab::test(Peer::Ours, |lab| judge_without(lab, "routes", NONE)?.is_silence());
}

/// The host hears what is called to everybody, and answers at its end of the link.
#[test]
fn without_the_rules() {
    let ruled: Expected = |vector| vector.by == By::Rules && vector.name != "broadcast-neighbours";
    lab::test(Peer::Ours, move |lab| without(lab, "rules", ruled));
}
