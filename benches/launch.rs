//! The duration of a launch and of its phases: `cargo bench --bench launch [-- ROUNDS] [kernel]`. With the embedded
//! WireGuard, or the kernel's, if the machine has it (`benches/in-vm`).
//!
//! It runs in a world of its own (user, mount, PID and network namespaces, an own `/run` and a layer over `/etc`), as
//! an ordinary user and without effect on the machine. The endpoint is a documentation address behind a link without a
//! router. All candidates take turns within each round, after everything of the former one has ended, so that a busy
//! machine affects all of them alike. Ratios are computed per round. Nothing is asserted, as absolute times depend on
//! the machine.

mod measure;

use std::error::Error;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use measure::{Spread, load, milliseconds, now};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::wait::wait;
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::link::TargetNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::linux::nftables::Nftables;
use vpn_exec::names::InterfaceName;
use vpn_exec::ruleset::{Chain, Hook, Policy, Table};

type Outcome<T> = Result<T, Box<dyn Error>>;

const BY_HAND: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/by-hand.sh");
const CONFIG: &str = "/run/bench/wg.conf";
/// The same file for wg(8).
const SETCONF: &str = "/run/bench/setconf";

/// The default number of rounds.
const ROUNDS: usize = 40;

/// The rounds before the measurement, which fill the page cache and the kernel's slabs.
const WARM_UP: usize = 3;

/// The pause in which the kernel removes a namespace in the background, before the next candidate's turn.
const PAUSE: Duration = Duration::from_millis(40);

/// The modes of this program when it runs itself.
const WORLD: &str = "--in-its-own-world";
const STAMP: &str = "--say-when-it-begins";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.first().map(String::as_str) {
        Some(STAMP) => return say_when_it_begins(),
        Some(WORLD) => measure(arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(ROUNDS)),
        _ => enter_world(&arguments),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("launch: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs as the measured program: prints the time at which it began.
fn say_when_it_begins() -> ExitCode {
    let now = now();
    println!("{}", now.as_nanos());
    ExitCode::SUCCESS
}

/// Runs this program again in namespaces of its own, or reports what is missing for that.
fn enter_world(arguments: &[String]) -> Outcome<ExitCode> {
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        return Err(format!(
            "cannot open /dev/net/tun: {error}: load the driver (`modprobe tun`), give this user access, or run as root"
        )
        .into());
    }
    let namespaces = ["--user", "--map-root-user", "--mount", "--net", "--pid", "--fork", "--mount-proc"];
    let unshare = |rest: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(namespaces).arg("--kill-child").args(rest);
        command
    };
    let possible = unshare(&["true"]).output().map_err(|error| format!("cannot run util-linux's unshare: {error}"))?;
    if !possible.status.success() {
        return Err(format!(
            "cannot make namespaces: {}\n(for an ordinary user: `sysctl kernel.unprivileged_userns_clone`, \
             `kernel.apparmor_restrict_unprivileged_userns`, `user.max_user_namespaces`)",
            String::from_utf8_lossy(&possible.stderr).trim()
        )
        .into());
    }
    let own = std::env::current_exe()?;
    let mut command = unshare(&[]);
    command.arg(own).arg(WORLD).args(arguments.iter().filter(|argument| !argument.starts_with('-')));
    Err(command.exec().into())
}

/// Creates the mounts, the network and the tunnel's file.
fn furnish() -> Outcome<()> {
    let tmpfs = |target: &str| mount(Some("tmpfs"), target, Some("tmpfs"), MsFlags::empty(), None::<&str>);
    tmpfs("/run").map_err(|error| format!("cannot mount an own /run: {error}"))?;
    for directory in ["/run/bench", "/run/etc/upper", "/run/etc/work"] {
        fs::create_dir_all(directory)?;
    }
    // The script writes to /etc/netns, which needs an overlay.
    let layer = Some("lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work");
    mount(Some("layer"), "/etc", Some("overlay"), MsFlags::empty(), layer)
        .map_err(|error| format!("cannot put a layer over /etc: {error}"))?;
    if !Path::new("/etc/resolv.conf").exists() {
        // A link into the host's /run, which is covered.
        let _ = fs::remove_file("/etc/resolv.conf");
        fs::write("/etc/resolv.conf", "nameserver 192.0.2.1\n")?;
    }

    let mut network = Netlink::open()?;
    let (uplink, router): (InterfaceName, InterfaceName) = ("eth0".parse()?, "router".parse()?);
    network.execute_one(NetlinkRequest::add_veth(&uplink, &router, TargetNamespace::Current))?;
    let (index, other) = (network.link_index(&uplink)?, network.link_index(&router)?);
    network.execute(vec![
        NetlinkRequest::set_up(1, "lo"),
        NetlinkRequest::set_up(other, "router"),
        NetlinkRequest::set_up(index, "eth0"),
        NetlinkRequest::add_address(index, "eth0", "192.0.2.2/24".parse()?),
        NetlinkRequest::add_address(index, "eth0", "2001:db8::2/64".parse()?),
        NetlinkRequest::add_route(index, "eth0", "0.0.0.0/0".parse()?, Some("192.0.2.1".parse()?)),
        NetlinkRequest::add_route(index, "eth0", "::/0".parse()?, Some("2001:db8::1".parse()?)),
    ])?;

    let key = || -> io::Result<String> {
        let mut bytes = [0; 32];
        io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
        Ok(BASE64_STANDARD.encode(bytes))
    };
    let (own, peers) = (key()?, key()?);
    for (path, for_wg_quick) in [(CONFIG, "Address = 10.64.0.2/32, fd00:64::2/128\nDNS = 10.64.0.1\n"), (SETCONF, "")] {
        let text = format!(
            "[Interface]\nPrivateKey = {own}\n{for_wg_quick}\n[Peer]\nPublicKey = {peers}\n\
             AllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = 198.51.100.1:51820\n"
        );
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?.write_all(text.as_bytes())?;
    }
    Ok(())
}

/// Returns the backend to measure.
fn backend() -> &'static str {
    if std::env::args().any(|argument| argument == "kernel") { "kernel" } else { "userspace" }
}

/// A candidate to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Candidate {
    Nothing,
    Unshare,
    VpnExec,
    /// As [`Self::VpnExec`], while another network namespace has packet rules.
    VpnExecBesideRules,
    VpnExecSameName,
    ByHand,
    ByHandWithoutNft,
}

use Candidate::{ByHand, ByHandWithoutNft, Nothing, Unshare, VpnExec, VpnExecBesideRules, VpnExecSameName};

const CANDIDATES: [Candidate; 7] =
    [Nothing, Unshare, VpnExec, VpnExecBesideRules, VpnExecSameName, ByHand, ByHandWithoutNft];

impl Candidate {
    fn title(self) -> &'static str {
        match self {
            Nothing => "the program alone",
            Unshare => "unshare -n",
            VpnExec => "vpn-exec",
            VpnExecBesideRules => "vpn-exec, not the machine's first packet rules",
            VpnExecSameName => "vpn-exec, again at once, same name",
            ByHand => "ip -batch, nft -f",
            ByHandWithoutNft => "ip -batch",
        }
    }

    /// Returns the command that runs `program`. `turn` makes names that were not used just before.
    fn command(self, turn: usize, program: &[&str]) -> Command {
        let name = format!("b{}", turn % 8);
        let backend = backend();
        let kernels: &[&str] = if backend == "kernel" { &["--kernel", SETCONF] } else { &[] };
        let words: &[&str] = match self {
            Nothing => &[],
            Unshare => &["unshare", "-n"],
            VpnExec | VpnExecBesideRules => {
                &[&binary(), "--config", CONFIG, "--backend", backend, "--name", &name, "--"]
            }
            VpnExecSameName => &[&binary(), "--config", CONFIG, "--backend", backend, "--name", "same", "--"],
            ByHand => &[&[BY_HAND], kernels, &[&name]].concat(),
            ByHandWithoutNft => &[&[BY_HAND, "--no-nft"], kernels, &[&name]].concat(),
        };
        let mut words = words.iter().chain(program);
        let mut command = Command::new(words.next().expect("a program"));
        command.args(words).stdin(Stdio::null());
        command
    }
}

/// The durations of one launch.
struct Launch {
    /// From before the fork to the end of the process.
    total: f64,
    /// From before the fork to the program's first statement.
    first: f64,
}

fn launch(candidate: Candidate, turn: usize, own: &str) -> Outcome<Launch> {
    let _rules = (candidate == VpnExecBesideRules).then(rules_elsewhere).transpose()?;
    clear_the_way(candidate, turn)?;
    let mut command = candidate.command(turn, &["true"]);
    let begin = now();
    let status = command.status()?;
    let total = milliseconds(now() - begin);
    if !status.success() {
        return Err(format!("{command:?} ended with {status}").into());
    }

    clear_the_way(candidate, turn + 1)?;
    let mut command = candidate.command(turn + 1, &[own, STAMP]);
    let begin = now();
    let output = command.stderr(Stdio::inherit()).output()?;
    let stamp: u64 = String::from_utf8(output.stdout)?
        .trim()
        .parse()
        .map_err(|_| format!("{command:?} did not run its program: {}", output.status))?;
    Ok(Launch { total, first: milliseconds(Duration::from_nanos(stamp) - begin) })
}

/// Creates a network namespace with packet rules at the hooks that a tunnel uses. The first rules of a machine at a
/// hook take longer than all later ones: the kernel changes its own code.
fn rules_elsewhere() -> Outcome<NetworkNamespace> {
    let chain = |hook| Chain { hook, policy: Policy::Accept, rules: Vec::new() };
    let chains = [Hook::Input, Hook::Forward, Hook::Output].map(chain).into();
    let table = Table { name: "elsewhere".to_owned(), chains };
    let (namespace, ()) = NetworkNamespace::create(|| Nftables::open()?.create(&table, "benchmark"))?;
    Ok(namespace)
}

fn clear_the_way(candidate: Candidate, turn: usize) -> Outcome<()> {
    settle()?;
    if candidate == VpnExecSameName {
        // The launch before, whose links the kernel is still removing when this one begins.
        candidate.command(turn, &["true"]).status()?;
    }
    Ok(())
}

/// Waits for the processes that former launches have left, such as keepers. As PID 1 of this world, this process is
/// their parent.
fn settle() -> Outcome<()> {
    loop {
        match wait() {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::ECHILD) => break,
            Err(error) => return Err(error.into()),
        }
    }
    thread::sleep(PAUSE);
    Ok(())
}

fn measure(rounds: usize) -> Outcome<ExitCode> {
    furnish()?;
    let own = std::env::current_exe()?;
    let own = own.to_str().ok_or("this program's path is not UTF-8")?;
    let found = |program: &str| Command::new(program).arg("-V").output().is_ok_and(|output| output.status.success());
    let (ip, nft) = (found("ip"), found("nft"));
    let candidates: Vec<Candidate> = CANDIDATES
        .into_iter()
        .filter(|candidate| match candidate {
            ByHand => ip && nft,
            ByHandWithoutNft => ip,
            _ => true,
        })
        .collect();
    for (there, what) in [(ip, "ip (iproute2)"), (nft, "nft (nftables)")] {
        if !there {
            println!("There is no {what} here, so what needs it is left out.");
        }
    }

    let mut launches: Vec<Vec<Launch>> = candidates.iter().map(|_| Vec::new()).collect();
    let mut phases = Phases::default();
    for round in 0..WARM_UP + rounds {
        for (candidate, launches) in candidates.iter().zip(&mut launches) {
            let launch = launch(*candidate, 2 * round, own)?;
            if round >= WARM_UP {
                launches.push(launch);
            }
        }
        settle()?;
        phases.take(round)?;
        if round < WARM_UP {
            phases = Phases::default();
        }
    }
    report(&candidates, &launches);
    phases.report();
    println!("\n{rounds} rounds; load {}", load()?);
    Ok(ExitCode::SUCCESS)
}

fn report(candidates: &[Candidate], launches: &[Vec<Launch>]) {
    let of = |wanted: Candidate| candidates.iter().position(|candidate| *candidate == wanted).map(|at| &launches[at]);
    let bare = of(Nothing).expect("always measured");
    let ours = of(VpnExec).expect("always measured");
    for (title, time) in [
        ("from exec to exit of `true`", (|launch, _| launch.total) as fn(&Launch, &Launch) -> f64),
        ("from exec to the program's first instruction, its own start-up taken off", |launch, bare| {
            launch.first - bare.first
        }),
    ] {
        println!("\n{title:<74}   median (min - max) ms    vpn-exec takes");
        for (candidate, own) in candidates.iter().zip(launches) {
            let times: Vec<f64> = own.iter().zip(bare).map(|(launch, bare)| time(launch, bare)).collect();
            let ratios: Vec<f64> = times
                .iter()
                .zip(ours.iter().zip(bare))
                .map(|(theirs, (ours, bare))| time(ours, bare) / theirs)
                .collect();
            let spread = Spread::of(times);
            let ratio = Spread::of(ratios).median;
            let ratio =
                if ratio.is_finite() && ratio < 1e3 { format!("{ratio:8.2} times that") } else { String::new() };
            println!(
                "  {:<72}   {:6.2} ({:.2} - {:.2}) {ratio:>28}",
                candidate.title(),
                spread.median,
                spread.least,
                spread.most
            );
        }
    }
}

/// The phases of a launch: the messages of vpn-exec, and their times.
#[derive(Default)]
struct Phases(Vec<(String, Vec<f64>)>);

impl Phases {
    fn take(&mut self, turn: usize) -> Outcome<()> {
        let command = VpnExec.command(turn, &["true"]);
        let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let mut command = lab::vpn_exec(["-vv"]);
        command.args(arguments);
        let begin = now();
        let output = command.output()?;
        let end = now() - begin;
        let text = String::from_utf8(output.stderr)?;
        let mut note = |what: &str, at: f64| match self.0.iter_mut().find(|(known, _)| known == what) {
            Some((_, times)) => times.push(at),
            None => self.0.push((what.to_owned(), vec![at])),
        };
        for line in text.lines() {
            let Some((seconds, what)) = line.strip_prefix("vpn-exec: [").and_then(|line| line.split_once("] ")) else {
                return Err(format!("{command:?} says: {line}").into());
            };
            note(what, seconds.parse::<f64>()? * 1e3 - milliseconds(begin));
        }
        note("vpn-exec has ended", milliseconds(end));
        Ok(())
    }

    fn report(self) {
        println!("\n{:<74}   median (min - max) ms", "where the time goes: how long after exec vpn-exec says so");
        let mut spreads: Vec<_> = self.0.into_iter().map(|(what, times)| (what, Spread::of(times))).collect();
        // The processes run in parallel, so the order of their messages varies.
        spreads.sort_by(|(_, one), (_, other)| one.median.total_cmp(&other.median));
        for (what, spread) in spreads {
            println!("  {what:<72}   {:6.2} ({:.2} - {:.2})", spread.median, spread.least, spread.most);
        }
    }
}

/// Returns the path of the vpn-exec to measure.
fn binary() -> String {
    lab::launcher::binary().display().to_string()
}
