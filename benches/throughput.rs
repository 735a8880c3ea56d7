//! The throughput of the kernel's WireGuard in a tunnel of vpn-exec: `cargo bench --bench throughput [-- ROUNDS]`.
//!
//! A program in the tunnel sends to a server behind the provider. The comparison is a namespace with the same addresses
//! and a WireGuard interface made with ip(8) and wg(8), and nothing else. Both take turns, each with a new tunnel, and
//! the ratio is computed per round. It needs a kernel with WireGuard, which `benches/in-vm` has. It runs in a pretended
//! Internet, and asserts nothing.

mod measure;
mod sending;

use std::process::{Command, ExitCode, Stdio};

use lab::{Context, Lab, PROVIDER, PROVIDER_PORT, Peer, Reach, Result, TUNNEL_CLIENT, bail, ensure, world};
use measure::{Role, Spread, load, record};
use sending::TURN;
use vpn_exec::linux::namespace::{NameLookup, look_up, path_of};

const NAME: &str = "throughput";

/// The default number of rounds.
const ROUNDS: usize = 10;

fn main() -> ExitCode {
    let rounds = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(ROUNDS);
    world::run("throughput", || measure(rounds))
}

fn measure(rounds: usize) -> Result<()> {
    let lab = Lab::start(Peer::Kernel)?;
    sending::start_server(&lab)?;
    let text = lab.wg_quick_text(Reach::Ipv4);
    let file = lab.file(&text)?;
    let file = file.to_str().context("a path in UTF-8")?;
    // The part of the file that wg(8) accepts.
    let only_wg = |line: &&str| !["Address", "DNS"].iter().any(|key| line.starts_with(key));
    let for_wg = lab.file(&text.lines().filter(only_wg).map(|line| format!("{line}\n")).collect::<String>())?;
    let for_wg = for_wg.to_str().context("a path in UTF-8")?;

    let (mut ours, mut by_hand) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let turns: [&dyn Fn() -> Result<f64>; 2] = [&|| in_vpn_exec(file), &|| in_one_made_by_hand(for_wg)];
        // The order alternates.
        let (first, second) = (turns[round % 2]()?, turns[1 - round % 2]()?);
        let (mine, theirs) = if round % 2 == 0 { (first, second) } else { (second, first) };
        ours.push(mine);
        by_hand.push(theirs);
    }
    let ratio = Spread::of(ours.iter().zip(&by_hand).map(|(ours, theirs)| ours / theirs).collect());
    println!("{:<44} median (min - max) Mbit/s", "one TCP connection through the kernel's WireGuard");
    for (title, rates) in [("vpn-exec", ours), ("by hand, the same addresses", by_hand)] {
        let spread = Spread::of(rates);
        let role = if title == "vpn-exec" { Role::Ours } else { Role::Other };
        record("one TCP connection, the kernel's WireGuard", role, title, &spread, "Mbit/s");
        println!("  {title:<48} {:7.1} ({:.1} - {:.1})", spread.median, spread.least, spread.most);
    }
    println!("  vpn-exec has {:.3} times the other's ({:.3} - {:.3})", ratio.median, ratio.least, ratio.most);
    println!(
        "({rounds} rounds of {} s each; to {}, port {PROVIDER_PORT}; load {})",
        TURN.as_secs(),
        PROVIDER.ipv4,
        load()?
    );
    Ok(())
}

fn run(command: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(command).args(arguments).stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{command} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn in_vpn_exec(file: &str) -> Result<f64> {
    run(&binary(), &["up", file, "--name", NAME, "--backend", "kernel", "--wait", "60"])?;
    let rate = rate_from(NAME)?;
    run(&binary(), &["down", NAME])?;
    Ok(rate)
}

fn in_one_made_by_hand(file: &str) -> Result<f64> {
    let [ipv4, ipv6] = TUNNEL_CLIENT.both().map(|address| address.to_string());
    let ip = |words: &str| run("ip", &words.split(' ').collect::<Vec<_>>());
    ip("netns add by-hand")?;
    ip("link add by-hand type wireguard")?;
    run("wg", &["setconf", "by-hand", file])?;
    ip("link set by-hand netns by-hand name wg0 mtu 1420")?;
    ip("-n by-hand link set lo up")?;
    ip(&format!("-n by-hand address add {ipv4}/32 dev wg0"))?;
    ip(&format!("-n by-hand address add {ipv6}/128 dev wg0 nodad"))?;
    ip("-n by-hand link set wg0 up")?;
    ip("-n by-hand route add default dev wg0")?;
    ip("-n by-hand -6 route add default dev wg0")?;
    let rate = rate_from("by-hand")?;
    ip("netns delete by-hand")?;
    Ok(rate)
}

/// Returns the rate at which a program in a named namespace sends, in Mbit/s.
fn rate_from(name: &str) -> Result<f64> {
    let NameLookup::Namespace(inside) = look_up(&path_of(name))? else { bail!("{name} is no namespace's name") };
    sending::rate_from(&inside)
}

/// Returns the path of the vpn-exec to measure.
fn binary() -> String {
    lab::launcher::binary().display().to_string()
}
