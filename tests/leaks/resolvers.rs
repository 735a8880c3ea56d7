//! Real name service cache daemons, which the C library asks before anybody else: stopped, their directory removed and made again, and
//! started again while the program runs, they still hear nothing of it.

use anyhow::Result;
use lab::nscd::{Kind, Nscd};
use lab::{Lab, Peer, Reach};
use std::slice::from_mut;

use crate::judge::Witnesses;
use crate::stages::{Expected, LeftOpen, NONE, allow_pings, inside, judged, outside};
use crate::vectors::By;

/// A program while nscd runs, is gone, and runs again.
fn while_nscd_comes_and_goes(lab: &Lab, kind: Kind) -> Result<()> {
    let left_open = LeftOpen::new()?;
    let mut witnesses = Witnesses::gather(lab, Some(Nscd::start(kind)?))?;
    let restart = |witnesses: &mut Witnesses<'_>, runs: bool| match &mut witnesses.nscd {
        Some(nscd) if runs => nscd.start_again(),
        Some(nscd) => nscd.stop(),
        None => Ok(()),
    };
    let mut agent = inside(lab, Reach::Ipv4, &left_open, "nscd", "")?;
    judged(from_mut(&mut agent), &witnesses, "nscd", NONE)?.is_silence()?;
    restart(&mut witnesses, false)?;
    judged(from_mut(&mut agent), &witnesses, "nscd-gone", NONE)?.is_silence()?;
    restart(&mut witnesses, true)?;
    judged(from_mut(&mut agent), &witnesses, "nscd-again", NONE)?.is_silence()?;
    let asked = lab.tunnel_resolver.questions();
    for name in
        ["leak-getent-at-nscd-again.example", "leak-python-at-nscd-again.example", "leak-curl-at-nscd-again.example"]
    {
        assert!(asked.iter().any(|question| question.name == name), "{name} was asked for nowhere");
    }
    agent.finish()?;

    // On the host, the same daemon is told of every look-up.
    allow_pings()?;
    let mut agent = outside(&left_open)?;
    let told: Expected = |vector| vector.by == By::Library || vector.name == "nscd";
    let verdict = judged(from_mut(&mut agent), &witnesses, "host", told)?;
    agent.finish()?;
    verdict.reports(told)?;
    let log = witnesses.nscd.as_ref().map(Nscd::log).transpose()?.unwrap_or_default();
    for vector in ["getent", "python", "curl", "nscd"] {
        assert!(log.contains(&format!("leak-{vector}-at-host")), "{vector} did not ask nscd: {log}");
    }
    Ok(())
}

#[test]
fn nscd_hears_nothing_even_after_it_was_restarted() {
    lab::test(Peer::Ours, |lab| while_nscd_comes_and_goes(lab, Kind::Nscd));
}

#[test]
fn unscd_hears_nothing_even_after_it_was_restarted() {
    lab::test(Peer::Ours, |lab| while_nscd_comes_and_goes(lab, Kind::Unscd));
}
