//! The embedded WireGuard against wireguard-go: `cargo bench --bench embedded [-- ROUNDS] [CASE]`.
//!
//! Each candidate has both ends of a tunnel between two namespaces that a veth pair connects, on the same machine. What
//! is measured are the rate that iperf3 receives, the processor time of the tunnel's own processes for each gigabit (or
//! packet), and the time of a request while a connection is busy. The candidates take turns within each round, and
//! ratios are computed per round. It needs iperf3, ethtool, `wg` and wireguard-go; the environment variable
//! `WIREGUARD_GO` names another one than that of `PATH`, as the newest is much faster than many distributions'. It runs
//! in a world of its own, and asserts nothing.
//!
//! A veth pair takes super-packets as they are, which no real network does: the cases "no UDP segmentation" and "no
//! offloads" have it cut and join packets as a driver would.

mod measure;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use lab::{Context, Result, bail, ensure, world};
use measure::{Role, Spread, load, milliseconds, now, record};
use vpn_exec::linux::namespace::{NameLookup, NetworkNamespace, look_up, path_of};

/// The default number of rounds.
const ROUNDS: usize = 5;

/// The time for which data is sent, in seconds, after one that does not count.
const TURN: u64 = 3;

/// The time in which something starts.
const START: Duration = Duration::from_secs(20);

/// The longest time of one case.
const CASE: Duration = Duration::from_secs(600);

/// The ports of iperf3 and of the server that answers requests.
const IPERF: u16 = 5201;
const ECHO: u16 = 5202;

/// What the veth pair does not do itself.
#[derive(Clone, Copy)]
enum Outer {
    AllOffloads,
    NoUdpSegmentation,
    NoOffloads,
}

#[derive(Clone, Copy)]
enum Traffic {
    /// A number of connections.
    Tcp(u8),
    /// Datagrams with this many bytes.
    Udp(u16),
    /// Requests during one connection.
    Requests,
}

struct Case {
    name: &'static str,
    outer: Outer,
    is_ipv6: bool,
    traffic: Traffic,
}

const fn case(name: &'static str, outer: Outer, is_ipv6: bool, traffic: Traffic) -> Case {
    Case { name, outer, is_ipv6, traffic }
}

const CASES: [Case; 10] = [
    case("one connection", Outer::AllOffloads, false, Traffic::Tcp(1)),
    case("four connections", Outer::AllOffloads, false, Traffic::Tcp(4)),
    case("one connection, IPv6", Outer::AllOffloads, true, Traffic::Tcp(1)),
    case("one connection, no UDP segmentation", Outer::NoUdpSegmentation, false, Traffic::Tcp(1)),
    case("four connections, no UDP segmentation", Outer::NoUdpSegmentation, false, Traffic::Tcp(4)),
    case("one connection, no offloads", Outer::NoOffloads, false, Traffic::Tcp(1)),
    case("datagrams of 64 bytes", Outer::AllOffloads, false, Traffic::Udp(64)),
    case("datagrams of 1,360 bytes", Outer::AllOffloads, false, Traffic::Udp(1_360)),
    case("datagrams of 1,360 bytes, no UDP segmentation", Outer::NoUdpSegmentation, false, Traffic::Udp(1_360)),
    case("requests beside one connection", Outer::AllOffloads, false, Traffic::Requests),
];

/// One end of the link.
struct End {
    /// The name of the namespace that stands for a host.
    host: &'static str,
    link: &'static str,
    number: u8,
}

const ENDS: [End; 2] =
    [End { host: "left", link: "veth-left", number: 1 }, End { host: "right", link: "veth-right", number: 2 }];

/// What one turn showed.
struct Turn {
    /// Mbit/s, or milliseconds of the median request.
    value: f64,
    /// Processor time: seconds for each gigabit.
    cost: f64,
    /// The memory (PSS) of the process that carries the traffic, after it, in MiB.
    memory: f64,
}

fn main() -> ExitCode {
    // The harness's own argument is `--bench`.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let rounds = arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(ROUNDS);
    let wanted = arguments.iter().find(|argument| argument.parse::<usize>().is_err());
    world::run_within("embedded", CASE * CASES.len() as u32, || {
        println!(
            "{:<48} {:>26} {:>26} {:>7} {:>7} {:>11}",
            "", "vpn-exec (least-most)", "wireguard-go", "ratio", "cost", "MiB"
        );
        for case in CASES.iter().filter(|case| wanted.is_none_or(|wanted| case.name.contains(wanted.as_str()))) {
            measure(case, rounds)?;
        }
        println!("({rounds} rounds of {TURN} s; the cost is processor time per gigabit, as a ratio; load {})", load()?);
        Ok(())
    })
}

fn measure(case: &Case, rounds: usize) -> Result<()> {
    connect(case.outer)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        // The order alternates.
        for is_ours in [round % 2 == 0, round % 2 != 0] {
            if is_ours { ours.push(with_vpn_exec(case)?) } else { theirs.push(with_wireguard_go(case)?) }
        }
    }
    disconnect()?;
    let spread = |turns: &[Turn]| {
        let spread = Spread::of(turns.iter().map(|turn| turn.value).collect());
        format!("{:.1} ({:.1}-{:.1})", spread.median, spread.least, spread.most)
    };
    let ratio = |of: fn(&Turn) -> f64| {
        Spread::of(ours.iter().zip(&theirs).map(|(ours, theirs)| of(ours) / of(theirs)).collect()).median
    };
    let unit = if matches!(case.traffic, Traffic::Requests) { "ms" } else { "Mbit/s" };
    for (role, title, turns) in [(Role::Ours, "vpn-exec", &ours), (Role::Other, "wireguard-go", &theirs)] {
        let of = |value: fn(&Turn) -> f64| Spread::of(turns.iter().map(value).collect());
        record(case.name, role, title, &of(|turn| turn.value), unit);
        record(&format!("{}: processor time", case.name), role, title, &of(|turn| turn.cost), "s per Gbit");
    }
    let memory = |turns: &[Turn]| Spread::of(turns.iter().map(|turn| turn.memory).collect()).median;
    println!(
        "{:<48} {:>26} {:>26} {:>7.2} {:>7.2} {:>5.1} {:>5.1} {unit}",
        case.name,
        spread(&ours),
        spread(&theirs),
        ratio(|turn| turn.value),
        ratio(|turn| turn.cost),
        memory(&ours),
        memory(&theirs)
    );
    Ok(())
}

fn run(words: &str) -> Result<()> {
    let mut parts = words.split(' ');
    let output = Command::new(parts.next().context("a command")?).args(parts).stdin(Stdio::null()).output();
    let output = output.with_context(|| words.to_owned())?;
    ensure!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A command in a namespace, with the benchmark's own mounts.
fn inside(namespace: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", path_of(namespace).display())).arg(program);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Makes two hosts with a link.
fn connect(outer: Outer) -> Result<()> {
    let [left, right] = &ENDS;
    for end in &ENDS {
        run(&format!("ip netns add {}", end.host))?;
        run(&format!("ip -n {} link set lo up", end.host))?;
    }
    run(&format!(
        "ip link add {} netns {} type veth peer name {} netns {}",
        left.link, left.host, right.link, right.host
    ))?;
    for (end, other) in [(left, right), (right, left)] {
        run(&format!("ip -n {} address add 192.0.2.{}/24 dev {}", end.host, end.number, end.link))?;
        run(&format!("ip -n {} link set {} up", end.host, end.link))?;
        run(&format!("ip -n {} route add default via 192.0.2.{}", end.host, other.number))?;
        let off = match outer {
            Outer::AllOffloads => continue,
            Outer::NoUdpSegmentation => "tx-udp-segmentation off",
            Outer::NoOffloads => "tx-udp-segmentation off tso off gso off gro off",
        };
        run(&format!("nsenter --net={} ethtool -K {} {off}", path_of(end.host).display(), end.link))?;
    }
    Ok(())
}

fn disconnect() -> Result<()> {
    ENDS.iter().try_for_each(|end| run(&format!("ip netns delete {}", end.host)))
}

/// Returns a private and a public key, in base64, made of a number.
fn keys(number: u8) -> (String, String) {
    let secret = x25519_dalek::StaticSecret::from([number; 32]);
    let public = x25519_dalek::PublicKey::from(&secret);
    (BASE64_STANDARD.encode(secret.as_bytes()), BASE64_STANDARD.encode(public.as_bytes()))
}

/// Writes an end's configuration. wg(8) takes no addresses.
fn configuration(end: &End, other: &End, with_addresses: bool) -> Result<String> {
    let addresses = match with_addresses {
        true => format!("Address = 10.99.0.{0}/32, fd99::{0}/128\nMTU = 1420\n", end.number),
        false => String::new(),
    };
    let text = format!(
        "[Interface]\nPrivateKey = {}\nListenPort = 51820\n{addresses}[Peer]\nPublicKey = {}\n\
         AllowedIPs = 10.99.0.{other}/32, fd99::{other}/128\nEndpoint = 192.0.2.{other}:51820\n",
        keys(end.number).0,
        keys(other.number).1,
        other = other.number
    );
    let path = format!("{}/{}.conf", world::FILES, end.host);
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(path)
}

fn with_vpn_exec(case: &Case) -> Result<Turn> {
    let [left, right] = &ENDS;
    let name = |end: &End| format!("tunnel-{}", end.host);
    for (end, other) in [(left, right), (right, left)] {
        let mut up = inside(end.host, lab::launcher::binary());
        up.args(["up", &configuration(end, other, true)?, "--name", &name(end), "--backend", "userspace"]);
        up.args(["--open", &format!("{IPERF}"), "--open", &format!("{IPERF}/udp"), "--open", &format!("{ECHO}/udp")]);
        let output = up.stderr(Stdio::piped()).output()?;
        ensure!(output.status.success(), "up: {}", String::from_utf8_lossy(&output.stderr));
    }
    let turn = transfer(case, &name(left), &name(right), "vpn-exec");
    for end in &ENDS {
        let output = Command::new(lab::launcher::binary()).args(["down", &name(end)]).output()?;
        ensure!(output.status.success(), "down: {}", String::from_utf8_lossy(&output.stderr));
    }
    turn
}

fn with_wireguard_go(case: &Case) -> Result<Turn> {
    let [left, right] = &ENDS;
    let program = std::env::var_os("WIREGUARD_GO").unwrap_or_else(|| "wireguard-go".into());
    let mut processes = Vec::new();
    for (end, other) in [(left, right), (right, left)] {
        let device = format!("wg-{}", end.host);
        let mut start = inside(end.host, &program);
        processes.push(Running(start.args(["-f", &device]).env("LOG_LEVEL", "silent").spawn()?));
        let socket = format!("/run/wireguard/{device}.sock");
        lab::wait_until(START, "wireguard-go does not start", || Ok(Path::new(&socket).exists()))?;
        let file = configuration(end, other, false)?;
        // The other candidate's socket may be closing.
        let configure = format!("nsenter --net={} wg setconf {device} {file}", path_of(end.host).display());
        lab::wait_until(START, "wireguard-go takes no configuration", || Ok(run(&configure).is_ok()))?;
        run(&format!("ip -n {} address add 10.99.0.{}/24 dev {device}", end.host, end.number))?;
        run(&format!("ip -n {} address add fd99::{}/64 dev {device} nodad", end.host, end.number))?;
        run(&format!("ip -n {} link set {device} mtu 1420 up", end.host))?;
    }
    let turn = transfer(case, left.host, right.host, "wireguard-go");
    drop(processes);
    for end in &ENDS {
        let _ = fs::remove_file(format!("/run/wireguard/wg-{}.sock", end.host));
    }
    turn
}

/// A process that ends with this value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends through a tunnel, from one namespace to another.
fn transfer(case: &Case, from: &str, to: &str, process: &str) -> Result<Turn> {
    let server = if case.is_ipv6 { "fd99::2" } else { "10.99.0.2" };
    let mut iperf = inside(to, "iperf3");
    let _server = Running(iperf.args(["-s", "-p", &IPERF.to_string()]).spawn().context("iperf3")?);
    let (near, far) = (namespace(from)?, namespace(to)?);
    let is_up = || Ok(near.run(|| std::net::TcpStream::connect((server, IPERF))).is_ok());
    lab::wait_until(START, "the tunnel or iperf3 does not start", is_up)?;
    // The server may still be busy with that connection, and would refuse another.
    std::thread::sleep(Duration::from_millis(500));

    let seconds = TURN.to_string();
    let mut client = inside(from, "iperf3");
    client.args(["-J", "-O", "1", "-t", &seconds, "-p", &IPERF.to_string(), "-c", server]);
    match case.traffic {
        Traffic::Tcp(streams) => client.args(["-P", &streams.to_string()]),
        Traffic::Udp(length) => client.args(["-u", "-b", "0", "-l", &length.to_string()]),
        Traffic::Requests => &mut client,
    };
    let client = client.stdout(Stdio::piped()).spawn()?;
    std::thread::sleep(Duration::from_secs(1));
    let (before, begin) = (processor_time(process)?, now());
    let requests = match case.traffic {
        Traffic::Requests => Some(median_request(&near, &far)?),
        _ => None,
    };
    let end = begin + Duration::from_secs(TURN) - Duration::from_millis(200);
    std::thread::sleep(end.saturating_sub(now()));
    let (used, elapsed) = (processor_time(process)? - before, now() - begin);
    let output = client.wait_with_output()?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).context("the report of iperf3")?;
    let sum = &report["end"]["sum_received"];
    let rate = sum["bits_per_second"].as_f64().with_context(|| format!("no rate in {report}"))? / 1e6;
    let cost = used / elapsed.as_secs_f64() / (rate / 1e3);
    Ok(Turn { value: requests.unwrap_or(rate), cost, memory: memory(process)? })
}

fn namespace(name: &str) -> Result<NetworkNamespace> {
    match look_up(&path_of(name))? {
        NameLookup::Namespace(namespace) => Ok(namespace),
        _ => bail!("{name} is no namespace's name"),
    }
}

/// Returns a file of each process of a name. A process may end meanwhile.
fn of_processes(name: &str, file: &str) -> Result<Vec<String>> {
    let read = |path: &Path, file: &str| fs::read_to_string(path.join(file)).ok();
    let processes = fs::read_dir("/proc")?.flatten().map(|entry| entry.path());
    let named = processes.filter(|path| read(path, "comm").is_some_and(|comm| comm.starts_with(name)));
    Ok(named.filter_map(|path| read(&path, file)).collect())
}

/// Returns the processor time of all processes of a name so far, in seconds (proc_pid_stat(5)).
fn processor_time(name: &str) -> Result<f64> {
    let ticks = of_processes(name, "stat")?.into_iter().map(|text| {
        let fields: Vec<&str> = text.rsplit_once(") ").map_or(vec![], |(_, rest)| rest.split(' ').collect());
        fields.iter().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum::<u64>()
    });
    // The kernel reports in hundredths of a second (USER_HZ).
    Ok(ticks.sum::<u64>() as f64 / 100.0)
}

/// Returns the largest memory of a process of a name, in MiB.
fn memory(name: &str) -> Result<f64> {
    let kib = of_processes(name, "smaps_rollup")?.into_iter().filter_map(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
        line.split_ascii_whitespace().next()?.parse::<u64>().ok()
    });
    Ok(kib.max().unwrap_or(0) as f64 / 1024.0)
}

/// Sends one request after the other for a second, and returns the median time until the answer, in milliseconds.
fn median_request(near: &NetworkNamespace, far: &NetworkNamespace) -> Result<f64> {
    let server = far.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, ECHO)))?;
    server.set_read_timeout(Some(Duration::from_secs(2)))?;
    let answers = std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((length, from)) = server.recv_from(&mut buffer) {
            let _ = server.send_to(&buffer[..length], from);
        }
    });
    let client = near.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
    client.set_read_timeout(Some(Duration::from_millis(200)))?;
    let (to, mut times) = (SocketAddr::from((Ipv4Addr::new(10, 99, 0, 2), ECHO)), Vec::new());
    let begin = now();
    for number in 0_u64.. {
        if now() - begin > Duration::from_secs(1) {
            break;
        }
        let sent = now();
        client.send_to(&number.to_ne_bytes(), to)?;
        let mut buffer = [0; 64];
        // An answer to an earlier request was late.
        while let Ok(length) = client.recv(&mut buffer) {
            if buffer[..length] == number.to_ne_bytes() {
                break;
            }
        }
        times.push(milliseconds(now() - sent));
    }
    drop(client);
    answers.join().ok().context("the server of the requests")?;
    Ok(Spread::of(times).median)
}
