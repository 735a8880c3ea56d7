//! What a standing tunnel costs: `cargo bench --bench standing [-- ROUNDS] [kernel]`. It is the embedded WireGuard's, or the kernel's, where
//! there is one (`benches/in-vm`).
//!
//! Three questions, each answered in a pretend Internet of this process alone (an ordinary user can run it, nothing of the machine
//! is touched):
//!
//! - How long does it take to start a program in a tunnel that stands, against `ip netns exec` and `nsenter`, which confine
//!   nothing? All candidates take turns within each round, and ratios are taken round by round.
//! - Does the hundredth tunnel take longer to start than the first?
//! - What does a keeper need while nothing happens: memory, and how often it wakes up, against the `wireguard-go` at the other end
//!   of the same tunnel.
//!
//! Nothing is asserted: what is slow on one machine is fast on another.

mod measure;

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use lab::{Context, Lab, Peer, Reach, Result, bail, ensure, world};
use measure::{Spread, load, milliseconds, now};
use vpn_exec::registry;

/// How many rounds, unless the command line says otherwise.
const ROUNDS: usize = 60;

/// Rounds that are not counted: files come into the page cache, slabs grow.
const WARM_UP: usize = 5;

/// The tunnel that stands.
const NAME: &str = "standing";

/// How many tunnels are started one after the other, and how often all of them.
const MANY: usize = 100;
const SERIES: usize = 3;

/// How long a keeper is watched doing nothing.
const IDLE: Duration = Duration::from_secs(30);

/// After the last handshake, data and answer, until both ends have nothing more to say (KEEPALIVE_TIMEOUT is 10 s).
const CALM: Duration = Duration::from_secs(12);

fn main() -> ExitCode {
    let rounds = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(ROUNDS);
    world::run("standing", || measure(rounds))
}

/// Whose WireGuard it is.
fn backend() -> &'static str {
    if std::env::args().any(|argument| argument == "kernel") { "kernel" } else { "userspace" }
}

fn measure(rounds: usize) -> Result<()> {
    let peer = if Peer::WireguardGo.check().is_ok() { Peer::WireguardGo } else { Peer::Ours };
    let lab = Lab::start(peer)?;
    let file = lab.wg_quick_file(Reach::Ipv4)?;
    let file = file.to_str().context("a path in UTF-8")?;
    vpn_exec(&["up", file, "--name", NAME, "--backend", backend(), "--wait", "20"])?;
    join(rounds)?;
    // Before there are a hundred, which the kernel's own threads would still be cleaning up after.
    idle(peer)?;
    vpn_exec(&["down", NAME])?;
    if backend() == "userspace" {
        // What differs is the same for both, and three hundred would take an emulated machine too long.
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

/// Ways to start a program in the tunnel's namespace.
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
    for series in 0..SERIES {
        let names: Vec<String> = (0..MANY).map(|number| format!("s{series}n{number}")).collect();
        for (name, times) in names.iter().zip(&mut times) {
            let begin = now();
            vpn_exec(&["up", file, "--name", name, "--backend", backend()])?;
            times.push(milliseconds(now() - begin));
        }
        for name in &names {
            vpn_exec(&["down", name])?;
        }
        // The kernel removes a hundred namespaces in the background.
        thread::sleep(Duration::from_secs(5));
    }
    // A single start is too little to tell a difference by, so its neighbours count, too.
    let around = |number: usize| {
        let range = number.saturating_sub(2)..(number + 3).min(MANY);
        Spread::of(times[range].iter().flatten().copied().collect())
    };
    println!("\n{:<50}   median (min - max) ms", "`vpn-exec up`, with as many tunnels up before it");
    for number in [0, 9, MANY - 1] {
        let spread = if number == 0 { Spread::of(times[0].clone()) } else { around(number) };
        println!(
            "  {:<48}   {:6.2} ({:.2} - {:.2})",
            format!("{number} others"),
            spread.median,
            spread.least,
            spread.most
        );
    }
    println!("  ({SERIES} series; but for the first, with the two before and after it)");
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
    thread::sleep(IDLE);
    println!("\n{:<50}   memory (PSS)     its own part   woken up", "an idle tunnel with a session");
    for ((title, pid), before) in processes.iter().zip(before) {
        let woken = switches(*pid)? - before;
        let of = |what| rollup(*pid, what);
        println!(
            "  {title:<48}   {:6} KiB       {:6} KiB   {woken} times in {} s",
            of("Pss:")?,
            of("Private_Dirty:")?,
            IDLE.as_secs()
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

/// How often the threads of a process went to sleep, or had to wait for others, so far.
fn switches(pid: i32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let counts = status.lines().filter_map(|line| line.split_once("ctxt_switches:"));
        sum += counts.filter_map(|(_, count)| count.trim().parse::<u64>().ok()).sum::<u64>();
    }
    Ok(sum)
}

/// A line of `/proc/PID/smaps_rollup`, in KiB (proc_pid_smaps(5)).
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
