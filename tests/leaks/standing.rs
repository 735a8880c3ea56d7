//! A standing tunnel that a program joins: the keeper is replaced, a keeper is killed and the tunnel adopted, and the
//! configuration is reloaded.

use std::path::Path;
use std::process::Command;
use std::slice::from_mut;

use anyhow::{Result, ensure};
use lab::launcher::text_of;
use lab::{Lab, Launcher, PRIVATE_LAN, Peer, Reach, vpn_exec};
use nix::sys::signal::Signal;

use crate::judge::{Judge, Verdict};
use crate::stages::{
    ALL_PROTECTIONS, InheritedSocket, NAME, PATIENCE, SOON, allow_pings, allow_pings_inside, expected, inside_by,
    judged, keeper, send,
};

/// Runs `vpn-exec up` or `reload` for the tunnel.
fn manage(subcommand: &str, file: &Path, options: &[&str]) -> Result<()> {
    let mut command = vpn_exec([subcommand]);
    command.arg(file).args(["--name", NAME, "--backend", "userspace"]).args(options);
    must_succeed(command)
}

fn must_succeed(mut command: Command) -> Result<()> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}: {}", text_of(&output));
    Ok(())
}

fn judge_standing(lab: &Lab, judge: &Judge<'_>, broken: &str) -> Result<Vec<Verdict>> {
    let expected = expected(broken);
    lab.join_private_lan()?;
    let file = lab.wg_quick_file(Reach::Ipv4)?;
    manage("up", &file, &["--wait", "20"])?;
    let mut agent = inside_by(Launcher::with_tunnel(NAME), &InheritedSocket::new()?, "joined", broken)?;
    allow_pings_inside()?;
    let mut verdicts = vec![judged(from_mut(&mut agent), judge, "joined", expected)?];

    manage("up", &file, &["--replace"])?;
    verdicts.push(judged(from_mut(&mut agent), judge, "replaced", expected)?);
    send(keeper()?, Signal::SIGKILL)?;
    manage("up", &file, &[])?;
    verdicts.push(judged(from_mut(&mut agent), judge, "adopted", expected)?);

    manage("reload", &file, lab::local_networks())?;
    verdicts.push(judged(from_mut(&mut agent), judge, "opened", expected)?);
    // All vectors are tried meanwhile, so that a single attempt may fail by itself.
    agent.succeed_within(lab::patience(PATIENCE), &format!("get http://{}/", PRIVATE_LAN.ipv4))?;
    // The capture sees these packets rightly, including the last one of the connection.
    std::thread::sleep(lab::patience(SOON));
    lab.capture.forget()?;
    manage("reload", &file, &[])?;
    verdicts.push(judged(from_mut(&mut agent), judge, "closed", expected)?);

    let alive = judged(from_mut(&mut agent), judge, "down", expected)?;
    must_succeed(vpn_exec(["down", NAME, "--force"]))?;
    agent.end()?;
    std::thread::sleep(lab::patience(SOON));
    verdicts.push(alive.and(judge.verdict("down")?));
    Ok(verdicts)
}

#[test]
fn a_standing_tunnel_leaks_nothing_in_any_stage() {
    lab::test(Peer::Ours, |lab| {
        let judge = Judge::new(lab, None)?;
        for verdict in judge_standing(lab, &judge, "")? {
            verdict.expect_no_leak()?;
        }
        assert_eq!(judge.clients(), 0, "a process has connected to the host's sockets");
        Ok(())
    });
}

#[test]
fn without_protections_a_standing_tunnel_leaks_by_every_vector_in_every_stage() {
    lab::test(Peer::Ours, |lab| {
        allow_pings()?;
        let judge = Judge::new(lab, None)?;
        // The program's launcher starts the killed keeper's successor, whose link the other stages need as it is: the
        // gateway stays.
        let broken = match lab::tunnel::is_rootless() {
            true => format!("{ALL_PROTECTIONS},user-namespace"),
            false => ALL_PROTECTIONS.to_owned(),
        };
        for verdict in judge_standing(lab, &judge, &broken)? {
            verdict.expect_leaks(|_| true)?;
        }
        Ok(())
    });
}
