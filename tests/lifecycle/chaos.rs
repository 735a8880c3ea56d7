//! Kills at random moments: the program never outlives its launcher or its tunnel, and the next start finds a clean
//! host.

use std::io::Write;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use lab::{LAN, Peer, Reach, Snapshot, WEB, variables};
use nix::sys::signal::Signal;
use vpn_exec::registry;

use crate::look_alikes::{make_names, plant_neighbours};
use crate::support::{
    SOON, assert_none_soon, assert_unchanged, doing, ended, errors, output_of, prepare, run, send, start, vpn_exec,
    write_config,
};

/// The number of rounds without [`variables::CHAOS_ROUNDS`], if there is time.
const ROUNDS: u32 = 500;

/// The time for the rounds without [`variables::CHAOS_ROUNDS`]. A busy machine does fewer.
const ENOUGH: Duration = Duration::from_secs(75);

/// The average time that a round may take: several times that on a busy machine with two cores.
const ROUND: Duration = Duration::from_secs(1);

/// Returns the number of rounds in [`variables::CHAOS_ROUNDS`].
fn chosen_rounds() -> Option<u32> {
    let text = std::env::var(variables::CHAOS_ROUNDS).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("CHAOS_ROUNDS={text}: {error}")))
}

/// Returns the time limit of the test for a number of rounds.
fn time_limit(wanted: Option<u32>) -> Duration {
    lab::world::TIME_LIMIT.max(ROUND * wanted.unwrap_or(0))
}

#[test]
fn the_time_limit_grows_with_the_number_of_rounds() {
    assert_eq!(time_limit(None), lab::world::TIME_LIMIT);
    for rounds in [1, 2_000, 10_000] {
        // The same number of rounds, but without a limit of their time.
        let needed = ENOUGH * rounds / ROUNDS;
        assert!(time_limit(Some(rounds)) > needed, "{rounds} rounds may need {needed:?}");
    }
}

#[test]
fn a_killed_launcher_leaves_nothing() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        let running = start("chaos", "daemon")?;
        send(running.launcher(), Signal::SIGKILL)?;
        assert_eq!(ended(output_of(running.child)?.status), Err(Signal::SIGKILL));
        assert_none_soon(&["daemon", "daemonized"], "after the launcher was killed")?;
        assert_unchanged(&before, "after the launcher was killed")
    });
}

#[test]
fn a_killed_keeper_is_replaced_and_the_program_goes_on() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        let running = start("chaos", "wait")?;
        let mut keepers = vec![running.keeper()];
        // Successors are replaced, too.
        for _ in 0..3 {
            send(keepers[keepers.len() - 1], Signal::SIGKILL)?;
            let until = Instant::now() + lab::patience(SOON);
            let successor = loop {
                let state = registry::read(&"chaos".parse()?)?.context("a tunnel in use has a state")?;
                let keeper = state.keeper.cast_signed();
                if !keepers.contains(&keeper) && registry::socket_of(&"chaos".parse()?).exists() {
                    break keeper;
                }
                ensure!(Instant::now() < until, "no keeper takes over from {keepers:?}");
                std::thread::sleep(Duration::from_millis(1));
            };
            keepers.push(successor);
            assert_eq!(doing("wait")?, [running.program.pid], "the program goes on");
            let namespace = std::fs::metadata(format!("/proc/{}/ns/net", running.program.pid))?;
            assert_eq!(std::os::unix::fs::MetadataExt::ino(&namespace), running.program.namespace);
        }
        let output = running.end()?;
        assert_eq!(ended(output.status), Err(Signal::SIGTERM), "{}", errors(&output));
        assert_unchanged(&before, "after four keepers")
    });
}

#[test]
fn when_launcher_and_keeper_are_killed_the_next_start_reclaims_the_tunnel() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        let running = start("chaos", "daemon")?;
        // A stopped launcher cannot clean up in between.
        send(running.launcher(), Signal::SIGSTOP)?;
        send(running.keeper(), Signal::SIGKILL)?;
        send(running.launcher(), Signal::SIGKILL)?;
        output_of(running.child)?;
        assert_none_soon(&["daemon"], "after both were killed")?;
        let output = run(vpn_exec("chaos", "exit 0"))?;
        assert_eq!(ended(output.status), Ok(0), "{}", errors(&output));
        assert_none_soon(&["daemonized"], "after the next start")?;
        assert_unchanged(&before, "after the next start")
    });
}

#[test]
fn kills_at_random_moments_leave_nothing_and_leak_nothing() {
    let wanted = chosen_rounds();
    lab::test_within(time_limit(wanted), Peer::Ours, |lab| {
        prepare()?;
        write_config(&lab.wg_quick_text(Reach::Ipv4))?;
        let seed = match std::env::var(variables::CHAOS_SEED) {
            Ok(seed) => seed.parse()?,
            Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64,
        };
        // Past the test harness, which hides the output of a test that passes.
        writeln!(std::io::stderr(), "CHAOS_SEED={seed} replays this")?;
        let mut random = Random(seed);
        make_names()?;
        plant_neighbours("")?;
        let before = Snapshot::take()?;
        let begin = Instant::now();
        for round in 0..wanted.unwrap_or(ROUNDS) {
            if wanted.is_none() && begin.elapsed() > ENOUGH {
                writeln!(std::io::stderr(), "{round} rounds of {ROUNDS} took {ENOUGH:?}, which is enough")?;
                break;
            }
            let when = kill_at_random(round, &mut random)?;
            let output = run(vpn_exec("tune", "exit 0"))?;
            assert_eq!(ended(output.status), Ok(0), "{when}: {}", errors(&output));
            assert_none_soon(&["daemonized"], &when)?;
            assert_unchanged(&before, &when)?;
            let leaks = lab.capture.leaks()?;
            ensure!(leaks.is_empty(), "{when}: {leaks:?}");
            lab.capture.forget()?;
        }
        Ok(())
    });
}

/// Starts a tunnel with a program that sends all the time, and kills the launcher, or launcher and keeper, at a random
/// moment. Returns a description.
fn kill_at_random(round: u32, random: &mut Random) -> Result<String> {
    let task = ["nap", "daemon"][random.below(2) as usize];
    // In a debug build, a tunnel is up after about 20 ms, and the nap is over after 50 ms.
    let delay = Duration::from_micros(random.below(80_000).into());
    let victims = 1 + random.below(3);
    let when = format!("round {round}: {task}, {delay:?}, victims {victims}");

    let mut child = vpn_exec("tune", task).env(variables::SEND_TO, targets()).spawn()?;
    let launcher = child.id().cast_signed();
    std::thread::sleep(delay);
    let keeper = first_child(launcher);
    if victims == 3 {
        let _ = send(launcher, Signal::SIGSTOP);
    }
    // The launcher is not reaped yet, so its process ID is still its own. The keeper's may be free, but is not reused
    // so soon in a world without other processes.
    if let (2 | 3, Some(keeper)) = (victims, keeper) {
        let _ = send(keeper, Signal::SIGKILL);
    }
    if victims == 2 && keeper.is_some() {
        // The program continues with another keeper until its launcher is killed at another moment.
        std::thread::sleep(Duration::from_micros(random.below(40_000).into()));
    }
    // A launcher that has ended is a zombie still.
    let _ = send(launcher, Signal::SIGKILL);
    // The end of its output is not waited for: a daemon may hold it open.
    drop((child.stdout.take(), child.stderr.take()));
    output_of(child)?;
    assert_none_soon(&["nap", "daemon"], &when)?;
    Ok(when)
}

/// Returns addresses that a program may reach through the tunnel only.
fn targets() -> String {
    let all = [WEB, LAN].into_iter().flat_map(lab::Addresses::both);
    all.map(|to| SocketAddr::new(to, 9).to_string()).collect::<Vec<_>>().join(" ")
}

/// Returns the first child of a process. A launcher's is its keeper.
fn first_child(pid: i32) -> Option<i32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_ascii_whitespace().next()?.parse().ok()
}

/// A random number generator, SplitMix64 (Steele, Lea and Flood 2014): small and reproducible.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % u64::from(limit)) as u32
    }
}
