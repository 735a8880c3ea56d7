//! The costs of a standing tunnel: `cargo bench --bench standing [-- ROUNDS] [kernel] [quick]`. With the embedded
//! WireGuard, or the kernel's, if the machine has it (`benches/in-vm`).
//!
//! Three measurements in a pretended Internet, as an ordinary user and without effect on the machine:
//!
//! - The start of a program in a standing tunnel, compared with `ip netns exec` and `nsenter`, which confine nothing.
//!   All candidates take turns within each round, and ratios are computed per round.
//! - The start of the hundredth tunnel, compared with the first, and `list` with two hundred.
//! - The memory and the wake-ups of an idle keeper, compared with `wireguard-go` at the other end of the same tunnel.
//!
//! Nothing is asserted, as absolute times depend on the machine.

mod measure;

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use lab::{Context, Lab, Peer, Reach, Result, bail, ensure, world};
use measure::{Role, Spread, load, milliseconds, now, record};
use vpn_exec::registry;

/// The default number of rounds.
const ROUNDS: usize = 60;

/// The rounds before the measurement, which fill the page cache and the kernel's slabs.
const WARM_UP: usize = 5;

/// The name of the standing tunnel.
const NAME: &str = "standing";

/// The number of tunnels to start one after the other, and the repetitions of that.
const MANY: usize = 100;
const SERIES: usize = 3;

/// The number of tunnels that are listed, and the repetitions of that.
const LISTED: usize = 200;
const LISTINGS: usize = 10;

/// The time for which an idle keeper is observed.
const IDLE: Duration = Duration::from_secs(30);

/// The time after the last handshake until both ends are silent (KEEPALIVE_TIMEOUT is 10 s).
const CALM: Duration = Duration::from_secs(12);

fn main() -> ExitCode {
    let rounds = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(ROUNDS);
    world::run("standing", || measure(rounds))
}

/// Returns the backend to measure.
fn backend() -> &'static str {
    if is_given("kernel") { "kernel" } else { "userspace" }
}

fn is_given(option: &str) -> bool {
    std::env::args().any(|argument| argument == option)
}

fn measure(rounds: usize) -> Result<()> {
    let peer = if Peer::WireguardGo.check().is_ok() { Peer::WireguardGo } else { Peer::Ours };
    let lab = Lab::start(peer)?;
    let file = lab.wg_quick_file(Reach::Ipv4)?;
    let file = file.to_str().context("a path in UTF-8")?;
    vpn_exec(&["up", file, "--name", NAME, "--backend", backend(), "--wait", "20"])?;
    join(rounds)?;
    // Before the hundred tunnels, which kernel threads would still be removing.
    idle(peer)?;
    vpn_exec(&["down", NAME])?;
    if backend() == "userspace" {
        // The backend makes no difference here, and an emulated machine would take too long.
        many(file)?;
    }
    println!("\nload {}", load()?);
    Ok(())
}

fn vpn_exec(arguments: &[&str]) -> Result<()> {
    let output = lab::vpn_exec(arguments).output()?;
    ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Returns the ways to start a program in the tunnel's namespace.
fn ways() -> Vec<(&'static str, Vec<String>)> {
    let namespace = format!("--net=/run/netns/{NAME}");
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let known = [
        ("the program alone", words(&[])),
        ("vpn-exec --tunnel", words(&[&binary(), "--tunnel", NAME, "--"])),
        ("ip netns exec", words(&["ip", "netns", "exec", NAME])),
        ("nsenter --net", words(&["nsenter", &namespace])),
    ];
    known
        .into_iter()
        .filter(|(title, words)| {
            let there = words.first().is_none_or(|program| Command::new(program).arg("-V").output().is_ok());
            if !there {
                println!("There is no {} here, so it is left out.", title.split(' ').next().unwrap_or(title));
            }
            there
        })
        .collect()
}

fn join(rounds: usize) -> Result<()> {
    let ways = ways();
    let mut times: Vec<Vec<f64>> = ways.iter().map(|_| Vec::new()).collect();
    for round in 0..WARM_UP + rounds {
        for ((title, words), times) in ways.iter().zip(&mut times) {
            let mut words = words.iter().map(String::as_str).chain(["true"]);
            let mut command = Command::new(words.next().context("a program")?);
            command.args(words).stdin(Stdio::null());
            let begin = now();
            let status = command.status()?;
            let took = milliseconds(now() - begin);
            ensure!(status.success(), "{title}: {status}");
            if round >= WARM_UP {
                times.push(took);
            }
        }
    }
    let ours = ways.iter().position(|(title, _)| title.starts_with("vpn-exec")).context("always measured")?;
    let ours = times[ours].clone();
    println!("{:<50}   median (min - max) ms    vpn-exec takes", "`true` in a standing tunnel, from exec to exit");
    for ((title, _), times) in ways.iter().zip(times) {
        let ratio = Spread::of(times.iter().zip(&ours).map(|(theirs, ours)| ours / theirs).collect()).median;
        let spread = Spread::of(times);
        let role = if title.starts_with("vpn-exec") { Role::Ours } else { Role::Other };
        record("a program in a standing tunnel, to exit", role, title, &spread, "ms");
        println!(
            "  {title:<48}   {:6.2} ({:.2} - {:.2}) {ratio:8.2} times that",
            spread.median, spread.least, spread.most
        );
    }
    println!("  ({rounds} rounds)");
    Ok(())
}

fn many(file: &str) -> Result<()> {
    let mut times: Vec<Vec<f64>> = (0..MANY).map(|_| Vec::new()).collect();
    let is_quick = is_given("quick");
    let series_count = if is_quick { 1 } else { SERIES };
    for series in 0..series_count {
        let names: Vec<String> = (0..MANY).map(|number| format!("s{series}n{number}")).collect();
        for (name, times) in names.iter().zip(&mut times) {
            let begin = now();
            vpn_exec(&["up", file, "--name", name, "--backend", backend()])?;
            times.push(milliseconds(now() - begin));
        }
        if series == 0 {
            list(file, &names)?;
        }
        for name in &names {
            vpn_exec(&["down", name])?;
        }
        // The kernel removes a hundred namespaces in the background.
        thread::sleep(Duration::from_secs(5));
    }
    // A single start varies too much, so its neighbours count, too.
    let around = |number: usize| {
        let range = number.saturating_sub(2)..(number + 3).min(MANY);
        Spread::of(times[range].iter().flatten().copied().collect())
    };
    println!("\n{:<50}   median (min - max) ms", "`vpn-exec up`, with as many tunnels up before it");
    for number in [0, 9, MANY - 1] {
        let spread = if number == 0 { Spread::of(times[0].clone()) } else { around(number) };
        let role = if number == MANY - 1 { Role::Ours } else { Role::Other };
        record("`vpn-exec up` beside other tunnels", role, &format!("{number} others"), &spread, "ms");
        println!(
            "  {:<48}   {:6.2} ({:.2} - {:.2})",
            format!("{number} others"),
            spread.median,
            spread.least,
            spread.most
        );
    }
    println!("  ({series_count} series; but for the first, with the two before and after it)");
    Ok(())
}

/// Measures `list` with more tunnels than are up.
fn list(file: &str, up: &[String]) -> Result<()> {
    let more: Vec<String> = (up.len()..LISTED).map(|number| format!("l{number}")).collect();
    for name in &more {
        vpn_exec(&["up", file, "--name", name, "--backend", backend()])?;
    }
    let mut times = Vec::new();
    for _ in 0..LISTINGS {
        let begin = now();
        vpn_exec(&["list"])?;
        times.push(milliseconds(now() - begin));
    }
    let spread = Spread::of(times);
    record("`vpn-exec list`", Role::Ours, &format!("{LISTED} tunnels"), &spread, "ms");
    println!("\n{:<50}   median (min - max) ms", "`vpn-exec list`");
    let title = format!("{LISTED} tunnels");
    println!("  {title:<48}   {:6.2} ({:.2} - {:.2})", spread.median, spread.least, spread.most);
    for name in &more {
        vpn_exec(&["down", name])?;
    }
    Ok(())
}

fn idle(peer: Peer) -> Result<()> {
    let keeper = registry::read(&NAME.parse()?)?.context("the tunnel stands")?.keeper.cast_signed();
    let mut processes = vec![("the keeper", keeper)];
    if peer == Peer::WireguardGo {
        processes.push(("wireguard-go, at the other end", process_called("wireguard-go")?));
    }
    thread::sleep(CALM);
    let before = processes.iter().map(|(_, pid)| switches(*pid)).collect::<Result<Vec<_>>>()?;
    let idle = if is_given("quick") { IDLE / 6 } else { IDLE };
    thread::sleep(idle);
    println!("\n{:<50}   memory (PSS)     its own part   woken up", "an idle tunnel with a session");
    for ((title, pid), before) in processes.iter().zip(before) {
        let woken = switches(*pid)? - before;
        let of = |what| rollup(*pid, what);
        let role = if *title == "the keeper" { Role::Ours } else { Role::Other };
        let size = Spread::of(vec![of("Pss:")? as f64 / 1024.0]);
        record("memory of an idle tunnel (PSS)", role, title, &size, "MiB");
        println!(
            "  {title:<48}   {:6} KiB       {:6} KiB   {woken} times in {} s",
            of("Pss:")?,
            of("Private_Dirty:")?,
            idle.as_secs()
        );
    }
    Ok(())
}

fn process_called(name: &str) -> Result<i32> {
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        if fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name) {
            return Ok(path.file_name().and_then(|pid| pid.to_str()).context("a PID")?.parse()?);
        }
    }
    bail!("there is no {name}")
}

/// Returns the number of context switches of a process's threads so far.
fn switches(pid: i32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let counts = status.lines().filter_map(|line| line.split_once("ctxt_switches:"));
        sum += counts.filter_map(|(_, count)| count.trim().parse::<u64>().ok()).sum::<u64>();
    }
    Ok(sum)
}

/// Returns a value of `/proc/PID/smaps_rollup`, in KiB (proc_pid_smaps(5)).
fn rollup(pid: i32, what: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(Path::new(&path)).with_context(|| path.clone())?;
    let line =
        text.lines().find_map(|line| line.strip_prefix(what)).with_context(|| format!("{path} has no {what}"))?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}

/// Returns the path of the vpn-exec to measure.
fn binary() -> String {
    lab::launcher::binary().display().to_string()
}
