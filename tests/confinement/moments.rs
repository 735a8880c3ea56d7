//! Every moment of a tunnel's life: processes wait for a gap during set-up and tear-down, and vpn-exec's processes are
//! killed.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use lab::agent::Agent;
use lab::{LAN, Lab, Launcher, PROVIDER, Peer, ROUTER, Reach, Snapshot, WEB, send_storm};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{assert_no_leak, finish, inside, outside};

/// The time in which the kernel removes an ended tunnel's objects.
const CLEAN: Duration = Duration::from_secs(10);

fn targets() -> Vec<SocketAddr> {
    let all = [WEB, ROUTER, LAN, PROVIDER].into_iter().flat_map(lab::Addresses::both);
    all.map(|to| SocketAddr::new(to, 9)).collect()
}

fn storm() -> String {
    let targets: Vec<String> = targets().iter().map(SocketAddr::to_string).collect();
    format!("storm {}", targets.join(" "))
}

/// Starts a program that sends all the time in a tunnel with a silent provider, so that every packet seen is a leak.
fn begin_storm(lab: &Lab) -> Result<(Agent, Before)> {
    lab.provider.stop()?;
    let file = lab.wg_quick_file(Reach::Ipv4)?;
    let before = Before { state: Snapshot::take()?, file: file.clone() };
    let mut agent = Launcher::new(&file).options(["--name", "storm"]).start_agent()?.begun()?;
    agent.succeed(&storm())?;
    std::thread::sleep(lab::patience(Duration::from_millis(100)));
    Ok((agent, before))
}

/// The state before a storm.
struct Before {
    state: Snapshot,
    file: PathBuf,
}

impl Before {
    /// Requires that the host is unchanged within [`CLEAN`], and that nothing has leaked.
    fn is_again(&self, lab: &Lab) -> Result<()> {
        assert_eq!(self.state.changes_within(CLEAN)?, [""; 0]);
        assert_no_leak(lab)
    }
}

#[test]
fn the_capture_sees_a_storm_on_the_host() {
    lab::test(Peer::Ours, |lab| {
        let mut agent = outside()?;
        agent.succeed(&storm())?;
        std::thread::sleep(lab::patience(Duration::from_millis(100)));
        finish(agent)?;
        assert_no_leak(lab).expect_err("it is seen");
        let on_lan = lab.capture.lan()?;
        assert!(on_lan.iter().any(|packet| !packet.is_expected_on_uplink()), "{on_lan:?}");
        Ok(())
    });
}

/// A process enters the namespace as soon as it has a name, and stays longer than the tunnel.
#[test]
fn a_process_that_waits_in_the_namespace_finds_no_gap() {
    lab::test(Peer::Ours, |lab| {
        lab.provider.stop()?;
        let text = lab.wg_quick_text(Reach::Ipv4);
        for round in 0..5 {
            let (goes_on, began) = (AtomicBool::new(true), AtomicBool::new(false));
            let running = || goes_on.load(Ordering::Relaxed);
            let (tried, ran) = std::thread::scope(|scope| {
                let waiting = scope.spawn(|| {
                    while running() {
                        if let Ok(namespace) = lab::tunnel::namespace("early") {
                            began.store(true, Ordering::Relaxed);
                            return namespace.run(|| Ok(send_storm(&targets(), running)));
                        }
                    }
                    Ok(0)
                });
                let ran = inside(lab, &text, &["--name", "early"]).and_then(|agent| {
                    // On a busy machine, the other thread may get its first turn only now.
                    let begin = std::time::Instant::now();
                    while !began.load(Ordering::Relaxed) && begin.elapsed() < lab::patience(Duration::from_secs(10)) {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    std::thread::sleep(lab::patience(Duration::from_millis(50)));
                    finish(agent)
                });
                std::thread::sleep(lab::patience(Duration::from_millis(100)));
                goes_on.store(false, Ordering::Relaxed);
                (waiting.join(), ran)
            });
            ran?;
            let tried = tried.expect("the thread that waits does not panic")?;
            assert!(began.load(Ordering::Relaxed) && tried > 0, "the process was late in round {round}");
            assert_no_leak(lab)?;
        }
        Ok(())
    });
}

#[test]
fn a_storm_ends_with_the_program() {
    lab::test(Peer::Ours, |lab| {
        let (agent, before) = begin_storm(lab)?;
        finish(agent)?;
        before.is_again(lab)
    });
}

fn ends_by(lab: &Lab, signal: Signal) -> Result<()> {
    let (agent, before) = begin_storm(lab)?;
    kill(Pid::from_raw(agent.pid()), signal)?;
    let (status, complaints) = agent.end()?;
    let by = std::os::unix::process::ExitStatusExt::signal(&status);
    assert_eq!(by, Some(signal as i32), "{status}: {complaints}");
    before.is_again(lab)
}

#[test]
fn a_storm_ends_with_sigterm() {
    lab::test(Peer::Ours, |lab| ends_by(lab, Signal::SIGTERM));
}

#[test]
fn a_storm_ends_with_a_killed_launcher() {
    lab::test(Peer::Ours, |lab| ends_by(lab, Signal::SIGKILL));
}

#[test]
fn a_storm_stays_inside_when_the_keeper_is_killed() {
    lab::test(Peer::Ours, |lab| {
        let (agent, before) = begin_storm(lab)?;
        let keeper = || -> Result<i32> {
            let state = vpn_exec::registry::read(&"storm".parse()?)?.context("the tunnel has written its state")?;
            Ok(state.keeper.cast_signed())
        };
        let first = keeper()?;
        assert_ne!(first, agent.pid());
        kill(Pid::from_raw(first), Signal::SIGKILL)?;
        let until = std::time::Instant::now() + lab::patience(Duration::from_secs(10));
        while keeper()? == first {
            anyhow::ensure!(std::time::Instant::now() < until, "no keeper takes over");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_no_leak(lab)?;
        finish(agent)?;
        before.is_again(lab)
    });
}

/// With launcher and keeper killed at once, no process cleans up. The next start reclaims the tunnel.
#[test]
fn a_tunnel_without_launcher_and_keeper_stays_closed() {
    lab::test(Peer::Ours, |lab| {
        let (agent, before) = begin_storm(lab)?;
        let state = vpn_exec::registry::read(&"storm".parse()?)?.context("the tunnel has written its state")?;
        // Stopped first, so that the last one cannot clean up.
        for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
            for pid in [agent.pid(), state.keeper.cast_signed()] {
                kill(Pid::from_raw(pid), signal)?;
            }
        }
        agent.end()?;
        assert!(lab::tunnel::exists("storm")?, "a process has cleaned up");
        // A rootless tunnel's namespace ends with its last process.
        if !lab::tunnel::is_rootless() {
            let left = lab::tunnel::namespace("storm")?;
            let begin = std::time::Instant::now();
            left.run(|| Ok(send_storm(&targets(), || begin.elapsed() < lab::patience(Duration::from_millis(100)))))?;
        }
        assert_no_leak(lab)?;

        finish(Launcher::new(&before.file).options(["--name", "storm"]).start_agent()?.begun()?)?;
        before.is_again(lab)
    });
}
