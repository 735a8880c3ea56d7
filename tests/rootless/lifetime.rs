//! The life of an ordinary user's tunnel: joined, standing, taken over, and reclaimed.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Stdio};

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::{Lab, PROVIDER, Peer, WEB, launcher};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{PATIENCE, User, failure, output, run};

/// Waits until a condition holds.
fn eventually(what: &str, condition: impl FnMut() -> Result<bool>) -> Result<()> {
    lab::wait_until(lab::patience(PATIENCE), &format!("timed out: {what}"), condition)
}

fn send(pid: i32, signal: Signal) -> Result<()> {
    Ok(kill(Pid::from_raw(pid), signal)?)
}

/// Starts a program that stays until its input ends, and writes its namespaces to a file first.
fn start_sleeper(user: &User, name: &str) -> Result<(Child, String)> {
    let script = "readlink /proc/self/ns/net; exec cat";
    let mut command = user.inside(name, &[], &["sh", "-c", script]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    let output = child.stdout.take().context("a pipe")?;
    std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line)?;
    ensure!(line.starts_with("net:["), "{line:?}");
    Ok((child, line))
}

#[test]
fn exit_statuses_and_signals_are_the_programs() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let status = run(&mut user.inside("mine", &[], &["sh", "-c", "exit 7"]))?.status;
        ensure!(status.code() == Some(7), "{status}");
        let status = run(&mut user.inside("mine", &[], &["sh", "-c", "kill -TERM $$"]))?.status;
        ensure!(status.signal() == Some(libc::SIGTERM), "{status}");
        ensure!(!user.tunnels().exists(), "something is left");
        Ok(())
    });
}

#[test]
fn a_second_program_joins_and_a_standing_tunnel_stays() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        output(user.up("mine"))?;
        ensure!(user.tunnels().join("mine").exists(), "the tunnel has no files");
        let (first, namespace) = start_sleeper(&user, "mine")?;
        let joined = output(user.inside("mine", &[], &["readlink", "/proc/self/ns/net"]))?;
        ensure!(joined == namespace, "{joined} is not {namespace}");
        let status = output(user.about(&["status", "mine"]))?;
        ensure!(status.contains("without a name") && status.contains("cat"), "{status}");
        let list = output(user.about(&["list"]))?;
        ensure!(list.contains("mine"), "{list}");
        let refusal = failure(user.about(&["down", "mine"]))?;
        ensure!(refusal.contains("programs are inside"), "{refusal}");
        output(user.about(&["down", "--force", "mine"]))?;
        let status = first.wait_with_output()?.status;
        ensure!(!status.success(), "a program whose tunnel was taken down has succeeded");
        ensure!(!user.tunnels().exists(), "something is left");
        Ok(())
    });
}

/// Root's tunnels and the user's are in one list.
#[test]
fn a_list_has_the_machines_tunnels_and_ones_own() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let file = lab.wg_quick_file(lab::Reach::Ipv4)?;
        output(launcher::vpn_exec([
            "up",
            file.to_str().context("UTF-8")?,
            "--name",
            "roots",
            "--backend",
            "userspace",
        ]))?;
        output(user.up("mine"))?;
        if user.id() != 0 {
            let list = output(user.about(&["list"]))?;
            ensure!(list.contains("mine") && list.contains("roots"), "{list}");
        }
        output(user.about(&["down", "mine"]))?;
        output(launcher::vpn_exec(["down", "roots"]))?;
        Ok(())
    });
}

#[test]
fn a_killed_keeper_gets_a_successor_and_the_program_goes_on() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let (mut child, namespace) = start_sleeper(&user, "mine")?;
        // Each launcher has the namespace of the next successor from the one before.
        for _ in 0..3 {
            let first = user.keeper("mine")?;
            send(first, Signal::SIGKILL)?;
            eventually("a successor", || Ok(user.keeper("mine").is_ok_and(|keeper| keeper != first)))?;
        }
        let mut agent = Agent::start(&mut user.inside("mine", &["--wait", "20"], &[]))?.begun()?;
        let seen = agent.succeed_within(PATIENCE, &format!("get http://{}/", WEB.ipv4))?;
        ensure!(seen == PROVIDER.ipv4.to_string(), "the server saw {seen}");
        agent.finish_well()?;
        let joined = output(user.inside("mine", &[], &["readlink", "/proc/self/ns/net"]))?;
        ensure!(joined == namespace, "{joined} is not {namespace}");
        drop(child.stdin.take());
        ensure!(child.wait()?.success(), "the program has not ended well");
        ensure!(!user.tunnels().exists(), "something is left");
        Ok(())
    });
}

/// With launcher and keeper killed at once, nobody cleans up. A process that outlives them is cut off, and the next
/// start ends it.
#[test]
fn the_next_start_ends_the_programs_that_a_killed_tunnel_has_left() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let note = user.runtime.join("orphan");
        let script = format!("(setsid sh -c 'echo $$ >{}; exec sleep 1000' &) ; exec cat", note.display());
        let mut command = user.inside("mine", &[], &["sh", "-c", &script]);
        let mut launcher = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut orphan = 0;
        eventually("the orphan", || {
            orphan = fs::read_to_string(&note).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
            Ok(orphan > 0)
        })?;
        let keeper = user.keeper("mine")?;
        for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
            for pid in [launcher.id().cast_signed(), keeper] {
                send(pid, signal)?;
            }
        }
        launcher.wait()?;
        ensure!(send(orphan, Signal::SIGCONT).is_ok(), "the orphan has ended by itself");
        output(user.inside("mine", &[], &["true"]))?;
        eventually("the end of the orphan", || {
            let state = fs::read_to_string(format!("/proc/{orphan}/stat")).unwrap_or_default();
            Ok(state.is_empty() || state.contains(") Z "))
        })?;
        ensure!(!user.tunnels().exists(), "something is left");
        Ok(())
    });
}

/// A tunnel that stands without a program has no namespace any more when its keeper is killed.
#[test]
fn an_empty_standing_tunnel_begins_anew_after_its_keeper_was_killed() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        output(user.up("mine"))?;
        let first = user.keeper("mine")?;
        send(first, Signal::SIGKILL)?;
        output(user.up("mine"))?;
        ensure!(user.keeper("mine")? != first, "the keeper was killed");
        output(user.inside("mine", &[], &["true"]))?;
        output(user.about(&["down", "mine"]))?;
        Ok(())
    });
}

/// The namespace, and the programs in it, go on with another keeper.
#[test]
fn a_keeper_is_replaced() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        output(user.up("mine"))?;
        let before = output(user.inside("mine", &[], &["readlink", "/proc/self/ns/net"]))?;
        let first = user.keeper("mine")?;
        let mut command = user.up("mine");
        command.arg("--replace");
        output(command)?;
        ensure!(user.keeper("mine")? != first, "the keeper is the same");
        ensure!(output(user.inside("mine", &[], &["readlink", "/proc/self/ns/net"]))? == before, "another namespace");
        output(user.about(&["down", "mine"]))?;
        Ok(())
    });
}
