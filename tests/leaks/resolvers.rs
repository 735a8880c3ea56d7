//! Real name service cache daemons, which the C library asks first. A program in a tunnel does not reach them, even
//! after they were stopped and started again in a new directory.

use anyhow::Result;
use lab::nscd::{Kind, Nscd};
use lab::stamp::Protection;
use lab::{Lab, Peer, Reach};
use std::slice::from_mut;

use crate::judge::Judge;
use crate::stages::{Expected, InheritedSocket, NONE, allow_pings, inside, judged, outside};

/// Judges a program while nscd runs, after it was stopped, and after it was started again.
fn judge_restart_of(lab: &Lab, kind: Kind) -> Result<()> {
    let inherited = InheritedSocket::new()?;
    let mut judge = Judge::new(lab, Some(Nscd::start(kind)?))?;
    let restart = |judge: &mut Judge<'_>, runs: bool| match &mut judge.nscd {
        Some(nscd) if runs => nscd.start_again(),
        Some(nscd) => nscd.stop(),
        None => Ok(()),
    };
    let mut agent = inside(lab, Reach::Ipv4, &inherited, "nscd", "")?;
    judged(from_mut(&mut agent), &judge, "nscd", NONE)?.expect_no_leak()?;
    restart(&mut judge, false)?;
    judged(from_mut(&mut agent), &judge, "nscd-gone", NONE)?.expect_no_leak()?;
    restart(&mut judge, true)?;
    judged(from_mut(&mut agent), &judge, "nscd-again", NONE)?.expect_no_leak()?;
    let asked = lab.tunnel_resolver.questions();
    for name in
        ["leak-getent-at-nscd-again.example", "leak-python-at-nscd-again.example", "leak-curl-at-nscd-again.example"]
    {
        assert!(asked.iter().any(|question| question.name == name), "the tunnel's resolver was not asked for {name}");
    }
    agent.finish()?;

    // The twin: on the host, the same daemon receives every lookup.
    allow_pings()?;
    let mut agent = outside(&inherited)?;
    let told: Expected = |vector| vector.protection == Protection::Library || vector.name == "nscd";
    let verdict = judged(from_mut(&mut agent), &judge, "host", told)?;
    agent.finish()?;
    verdict.expect_leaks(told)?;
    let log = judge.nscd.as_ref().map(Nscd::log).transpose()?.unwrap_or_default();
    for vector in ["getent", "python", "curl", "nscd"] {
        assert!(log.contains(&format!("leak-{vector}-at-host")), "{vector} did not ask nscd: {log}");
    }
    Ok(())
}

#[test]
fn no_lookup_reaches_nscd_even_after_a_restart() {
    lab::test(Peer::Ours, |lab| judge_restart_of(lab, Kind::Nscd));
}

#[test]
fn no_lookup_reaches_unscd_even_after_a_restart() {
    lab::test(Peer::Ours, |lab| judge_restart_of(lab, Kind::Unscd));
}
