//! A standing tunnel, which a program joins, and what becomes of it meanwhile: it changes hands, and its rules are made anew.

use std::path::Path;
use std::process::Command;
use std::slice::from_mut;

use anyhow::{Result, ensure};
use lab::{Lab, PRIVATE_LAN, Peer, Reach};
use nix::sys::signal::Signal;

use crate::VPN_EXEC;
use crate::judge::{Verdict, Witnesses};
use crate::stages::{
    ALL_BROKEN, LeftOpen, NAME, SOON, allow_pings, allow_pings_inside, expected, inside_by, judged, keeper, send,
};

/// Has vpn-exec do something about the tunnel.
fn order(what: &str, file: &Path, options: &[&str]) -> Result<()> {
    let mut command = Command::new(VPN_EXEC);
    command.arg(what).arg(file).args(["--name", NAME, "--backend", "userspace"]).args(options);
    succeeds(&mut command)
}

fn succeeds(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn standing(lab: &Lab, witnesses: &Witnesses<'_>, broken: &str) -> Result<Vec<Verdict>> {
    let expected = expected(broken);
    lab.join_private_lan()?;
    let file = lab.wg_quick_file(Reach::Ipv4)?;
    order("up", &file, &["--wait", "20"])?;
    let mut joining = Command::new(VPN_EXEC);
    joining.args(["--tunnel", NAME, "--"]);
    let mut agent = inside_by(joining, &LeftOpen::new()?, "joined", broken)?;
    allow_pings_inside()?;
    let mut verdicts = vec![judged(from_mut(&mut agent), witnesses, "joined", expected)?];

    order("up", &file, &["--replace"])?;
    verdicts.push(judged(from_mut(&mut agent), witnesses, "replaced", expected)?);
    send(keeper()?, Signal::SIGKILL)?;
    order("up", &file, &[])?;
    verdicts.push(judged(from_mut(&mut agent), witnesses, "adopted", expected)?);

    order("reload", &file, lab::local_networks())?;
    verdicts.push(judged(from_mut(&mut agent), witnesses, "opened", expected)?);
    agent.succeed(&format!("get http://{}/", PRIVATE_LAN.ipv4))?;
    // This was meant to be seen, down to the last packet of the connection.
    std::thread::sleep(lab::patience(SOON));
    lab.capture.forget()?;
    order("reload", &file, &[])?;
    verdicts.push(judged(from_mut(&mut agent), witnesses, "closed", expected)?);

    let alive = judged(from_mut(&mut agent), witnesses, "down", expected)?;
    succeeds(Command::new(VPN_EXEC).args(["down", NAME, "--force"]))?;
    agent.end()?;
    std::thread::sleep(lab::patience(SOON));
    verdicts.push(alive.and(witnesses.verdict("down")?));
    Ok(verdicts)
}

#[test]
fn a_standing_tunnel_leaks_nothing() {
    lab::test(Peer::Ours, |lab| {
        let witnesses = Witnesses::gather(lab, None)?;
        for verdict in standing(lab, &witnesses, "")? {
            verdict.is_silence()?;
        }
        assert_eq!(witnesses.callers(), 0, "somebody has come to the host's sockets");
        Ok(())
    });
}

#[test]
fn whoever_joins_without_protections_leaks_by_every_vector_in_every_stage() {
    lab::test(Peer::Ours, |lab| {
        allow_pings()?;
        let witnesses = Witnesses::gather(lab, None)?;
        for verdict in standing(lab, &witnesses, ALL_BROKEN)? {
            verdict.reports(|_| true)?;
        }
        Ok(())
    });
}
