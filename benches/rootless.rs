//! What a tunnel without root costs, against one of root's: `cargo bench --bench rootless [-- ROUNDS] [PART]...`.
//!
//! The parts, all of them by default:
//!
//! - `launch`: from exec of `vpn-exec FILE -- true` to its exit. `unshare -Urn true` is the least that a namespace of
//!   an ordinary user takes, and other programs that make one take part if they are installed. Also under the name of
//!   a tunnel that has just ended.
//! - `join`: from exec of `vpn-exec --tunnel NAME -- true` to its exit, in a standing tunnel.
//! - `memory`: PSS of all of vpn-exec's processes for one program in a tunnel of its own, and the kernel's memory.
//! - `throughput`: one TCP connection from a program in the tunnel to a server behind the provider.
//!
//! Both ways use the embedded WireGuard. They take turns within each round, in alternating order, and ratios are
//! computed per round. It runs in a pretended Internet, as an ordinary user and without effect on the machine. Nothing
//! is asserted, as absolute times depend on the machine.

mod measure;
mod sending;

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use lab::{Context, Lab, Peer, Reach, Result, ensure, world};
use measure::{Role, Spread, load, milliseconds, now, record};
use sending::TURN;
use vpn_exec::linux::namespace::NetworkNamespace;

/// The default number of rounds. The world ends after two minutes.
const ROUNDS: usize = 40;

/// The rounds before the measurement, which fill the page cache and the kernel's slabs.
const WARM_UP: usize = 3;

/// The pause in which the kernel removes a namespace in the background, before the next candidate's turn.
const PAUSE: Duration = Duration::from_millis(40);

/// The time in which processes start and end.
const PATIENCE: Duration = Duration::from_secs(20);

/// The mode of this program as the program in the tunnel: it sends, and prints the rate.
const SEND: &str = "--send";

/// The number of tunnels by which the kernel's memory for one is known.
const MANY: usize = 20;

/// The time until the kernel has removed many namespaces.
const CALM: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    if std::env::args().nth(1).is_some_and(|argument| argument == SEND) {
        return send();
    }
    world::run("rootless", measure)
}

/// Runs as the program in the tunnel.
fn send() -> ExitCode {
    match NetworkNamespace::current().map_err(Into::into).and_then(|own| sending::rate_from(&own)) {
        Ok(rate) => {
            println!("{rate}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("rootless: cannot send: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let rounds = arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(ROUNDS);
    let parts: Vec<&str> =
        arguments.iter().map(String::as_str).filter(|word| word.starts_with(char::is_alphabetic)).collect();
    let is_wanted = |part: &str| parts.is_empty() || parts.contains(&part);

    let peer = if Peer::WireguardGo.check().is_ok() { Peer::WireguardGo } else { Peer::Ours };
    let lab = Lab::start(peer)?;
    let file = lab.wg_quick_file(Reach::Ipv4)?;
    let bench = Bench { file: file.to_str().context("a path in UTF-8")?.to_owned(), rounds };
    DirBuilder::new().recursive(true).mode(0o700).create(lab::tunnel::RUNTIME_DIRECTORY)?;

    if is_wanted("launch") {
        bench.launch(false)?;
        bench.launch(true)?;
    }
    if is_wanted("join") {
        bench.join()?;
    }
    if is_wanted("memory") {
        bench.memory()?;
    }
    if is_wanted("throughput") {
        sending::start_server(&lab)?;
        bench.throughput()?;
    }
    println!("\nload {}", load()?);
    Ok(())
}

/// The two ways to make a tunnel.
const WAYS: [(&str, &[&str]); 2] = [("root's tunnel", &[]), ("without root", &["--rootless"])];

/// Other programs that run a program in a network namespace, by the words before that program.
const PEERS: [(&str, &[&str]); 2] = [
    ("bwrap --unshare-net: no network", &["bwrap", "--unshare-net", "--dev-bind", "/", "/"]),
    ("pasta --config-net: the host's network", &["pasta", "--config-net", "--"]),
];

/// A candidate: its title and the words before the program.
type Candidate = (&'static str, Vec<String>);

struct Bench {
    file: String,
    rounds: usize,
}

impl Bench {
    /// Returns the words that run a program in a tunnel of its own.
    fn tunnel(&self, way: &[&str], name: &str) -> Vec<String> {
        let binary = lab::launcher::binary().display().to_string();
        let fixed = [&binary, "--config", &self.file, "--backend", "userspace", "--name", name];
        fixed.iter().chain(way).chain(&["--"]).map(|word| (*word).to_owned()).collect()
    }

    fn launch(&self, again: bool) -> Result<()> {
        let title = if again { "again at once, under the same name" } else { "a launch: `true`, from exec to exit" };
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let peers = PEERS.iter().filter(|(_, peer)| time(&words(peer)).is_ok()).collect::<Vec<_>>();
        let candidates = |round: usize| {
            let name = if again { "same".to_owned() } else { format!("b{}", round % 8) };
            let mut candidates: Vec<Candidate> = vec![];
            candidates.extend(WAYS.iter().map(|(title, way)| (*title, self.tunnel(way, &name))));
            if !again {
                candidates.push(("unshare -Urn", vec!["unshare".to_owned(), "-Urn".to_owned()]));
                candidates.push(("unshare -n", vec!["unshare".to_owned(), "-n".to_owned()]));
                candidates.push(("the program alone", vec![]));
                candidates.extend(peers.iter().map(|(title, peer)| (*title, words(peer))));
            }
            candidates
        };
        let times = self.rounds_of(&candidates, |words| {
            settle()?;
            if again {
                time(words)?;
            }
            time(words)
        })?;
        report(title, "ms", &times);
        Ok(())
    }

    fn join(&self) -> Result<()> {
        let names = ["system", "user"];
        for (name, (_, way)) in names.iter().zip(WAYS) {
            let words = ["up", &self.file, "--name", name, "--backend", "userspace"];
            run(Command::new(lab::launcher::binary()).args(words).args(way))?;
        }
        let binary = lab::launcher::binary().display().to_string();
        let candidates = |_| {
            let join = |(name, (title, way)): (&str, (&'static str, &[&str]))| {
                let words = [&[&*binary, "--tunnel", name], way, &["--"]].concat();
                (title, words.into_iter().map(str::to_owned).collect())
            };
            names.into_iter().zip(WAYS).map(join).collect()
        };
        let times = self.rounds_of(&candidates, time)?;
        report("a join: `true` in a standing tunnel, from exec to exit", "ms", &times);
        for name in names {
            run(Command::new(lab::launcher::binary()).args(["down", name]))?;
        }
        Ok(())
    }

    /// Measures the memory of one tunnel with one program, in few rounds as it varies little.
    fn memory(&self) -> Result<()> {
        let rounds = self.rounds.div_ceil(10);
        let mut sums: Vec<(&str, Vec<f64>)> = WAYS.iter().map(|(title, _)| (*title, vec![])).collect();
        let mut parts = WAYS.map(|_| vec![]);
        for _ in 0..rounds {
            for (((_, way), (_, sums)), parts) in WAYS.iter().zip(&mut sums).zip(&mut parts) {
                settle()?;
                let mut words = self.tunnel(way, "memory").into_iter();
                let mut command = Command::new(words.next().context("a program")?);
                command.args(words).args(["sh", "-c", "echo; read _ || true"]);
                let mut launcher = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
                let mut begun = [0];
                std::io::Read::read_exact(launcher.stdout.as_mut().context("its output")?, &mut begun)?;
                *parts =
                    of_vpn_exec()?.into_iter().map(|process| Ok((pss(&process)?, process))).collect::<Result<_>>()?;
                sums.push(parts.iter().map(|(pss, _)| pss).sum());
                drop(launcher.stdin.take());
                ensure!(launcher.wait()?.success(), "the program failed");
            }
        }
        report("memory (PSS) of one tunnel's processes, with one program", "MiB", &sums);
        for ((title, _), parts) in WAYS.iter().zip(&parts) {
            let parts: Vec<String> = parts.iter().map(|(pss, _)| format!("{pss:.1}")).collect();
            println!("  {title}: {} processes, {} MiB", parts.len(), parts.join(" + "));
        }

        let mut kernel: Vec<(&str, Vec<f64>)> = WAYS.iter().map(|(title, _)| (*title, vec![])).collect();
        for _ in 0..3 {
            for ((_, way), (_, kernel)) in WAYS.iter().zip(&mut kernel) {
                settle()?;
                thread::sleep(CALM);
                let names: Vec<String> = (0..MANY).map(|number| format!("k{number}")).collect();
                let before = of_the_kernel()?;
                for name in &names {
                    let words = ["up", &self.file, "--name", name, "--backend", "userspace"];
                    run(Command::new(lab::launcher::binary()).args(words).args(*way))?;
                }
                kernel.push((of_the_kernel()? - before) / MANY as f64);
                for name in &names {
                    run(Command::new(lab::launcher::binary()).args(["down", name]))?;
                }
            }
        }
        report("memory of the kernel for one standing tunnel (slabs, stacks, per processor)", "MiB", &kernel);
        Ok(())
    }

    fn throughput(&self) -> Result<()> {
        let rounds = self.rounds.div_ceil(8);
        let own = std::env::current_exe()?;
        let own = own.to_str().context("a path in UTF-8")?;
        let mut rates: Vec<(&str, Vec<f64>)> = WAYS.iter().map(|(title, _)| (*title, vec![])).collect();
        for round in 0..rounds {
            for at in in_turn(WAYS.len(), round) {
                settle()?;
                let mut words = self.tunnel(WAYS[at].1, "throughput").into_iter();
                let mut command = Command::new(words.next().context("a program")?);
                let output = command.args(words).args([own, SEND]).stdin(Stdio::null()).output()?;
                let rate = String::from_utf8(output.stdout)?.trim().parse();
                rates[at].1.push(rate.with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?);
            }
        }
        report(&format!("one TCP connection through the tunnel, {} s each", TURN.as_secs()), "Mbit/s", &rates);
        Ok(())
    }

    /// Lets candidates take turns, and returns what `turn` measured of each.
    fn rounds_of(
        &self,
        candidates: &dyn Fn(usize) -> Vec<Candidate>,
        turn: impl Fn(&[String]) -> Result<f64>,
    ) -> Result<Vec<(&'static str, Vec<f64>)>> {
        let mut values: Vec<_> = candidates(0).into_iter().map(|(title, _)| (title, vec![])).collect();
        for round in 0..WARM_UP + self.rounds {
            let candidates = candidates(round);
            for at in in_turn(candidates.len(), round) {
                let value = turn(&candidates[at].1).context(candidates[at].0)?;
                if round >= WARM_UP {
                    values[at].1.push(value);
                }
            }
        }
        Ok(values)
    }
}

/// Returns the order of a round, which alternates.
fn in_turn(count: usize, round: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

/// Returns how long `true` takes after some words, in milliseconds.
fn time(words: &[String]) -> Result<f64> {
    let mut words = words.iter().map(String::as_str).chain(["true"]);
    let mut command = Command::new(words.next().context("a program")?);
    command.args(words).stdin(Stdio::null());
    let begin = now();
    let status = command.status()?;
    let took = milliseconds(now() - begin);
    ensure!(status.success(), "{command:?}: {status}");
    Ok(took)
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Waits for the processes that former launches have left, such as keepers, and for the kernel.
fn settle() -> Result<()> {
    lab::wait_until(PATIENCE, "a keeper does not end", || Ok(of_vpn_exec()?.is_empty()))?;
    thread::sleep(PAUSE);
    Ok(())
}

/// Returns the directories in `/proc` of vpn-exec's processes.
fn of_vpn_exec() -> Result<Vec<PathBuf>> {
    let binary = lab::launcher::binary().canonicalize()?;
    let paths = fs::read_dir("/proc")?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(|path| fs::read_link(path.join("exe")).is_ok_and(|exe| exe == binary)).collect())
}

/// Returns the proportional set size of a process in MiB (proc_pid_smaps(5)).
fn pss(process: &std::path::Path) -> Result<f64> {
    Ok(kib(&fs::read_to_string(process.join("smaps_rollup"))?, "Pss:")? / 1024.0)
}

/// Returns the memory of the kernel that tunnels use, in MiB (proc_meminfo(5)).
fn of_the_kernel() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let sum: f64 = ["Slab:", "KernelStack:", "PageTables:", "Percpu:"]
        .into_iter()
        .map(|what| kib(&text, what))
        .sum::<Result<f64>>()?;
    Ok(sum / 1024.0)
}

fn kib(text: &str, what: &str) -> Result<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(what)).with_context(|| format!("no line {what}"))?;
    Ok(line.split_ascii_whitespace().next().context("no number")?.parse()?)
}

/// Prints the values of candidates, and their ratios to the first of them.
fn report(title: &str, unit: &str, candidates: &[(&str, Vec<f64>)]) {
    let what = title;
    println!("\n{title:<64}   median (min - max) {unit}");
    let Some((first, reference)) = candidates.first() else { return };
    for (title, values) in candidates {
        let spread = Spread::of(values.clone());
        let (median, least, most) = (spread.median, spread.least, spread.most);
        let role = if *title == WAYS[1].0 { Role::Ours } else { Role::Other };
        record(what, role, title, &spread, unit);
        let ratio = Spread::of(values.iter().zip(reference).map(|(value, reference)| value / reference).collect());
        let ratio = match title == first {
            true => String::new(),
            false => format!(
                "{:.2} times {first}; of the least {:.2}",
                ratio.median,
                least / Spread::of(reference.clone()).least
            ),
        };
        println!("  {title:<62}   {median:7.2} ({least:.2} - {most:.2}) {ratio}");
    }
    println!("  ({} rounds)", reference.len());
}
