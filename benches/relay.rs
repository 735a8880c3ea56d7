//! The cost of a published port: `cargo bench --bench relay [-- ROUNDS] [CONGESTION-CONTROL]`.
//!
//! A client on the host sends to a program in a tunnel's namespace in three ways: directly, to the program's address on
//! the veth; through a published port; and through systemd-socket-proxyd, if it is installed. In each round, each way
//! sends for a second, then one byte goes back and forth many times. Ratios are computed per round. The congestion
//! control is that of the machine, or the one that is named, such as reno (tcp(7)); the cost of the direct way depends
//! on it. The benchmark runs in a simulated Internet, and asserts nothing.

mod measure;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use lab::{Context, Lab, Peer, Reach, Result, bail, ensure, world};
use measure::{Role, Spread, load, milliseconds, now, record};
use vpn_exec::linux::namespace::{NameLookup, NetworkNamespace, look_up, path_of};
use vpn_exec::linux::sysctl;
use vpn_exec::registry;

const PROXY: &str = "/lib/systemd/systemd-socket-proxyd";
const NAME: &str = "relay";

/// The default number of rounds.
const ROUNDS: usize = 10;

/// How long each way sends in a round.
const TURN: Duration = Duration::from_secs(1);

/// How often one byte goes back and forth in a round.
const PINGS: usize = 2000;

fn main() -> ExitCode {
    let rounds = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(ROUNDS);
    let is_option = |argument: &String| argument.starts_with('-') || argument.parse::<usize>().is_ok();
    let control = std::env::args().skip(1).find(|argument| !is_option(argument));
    world::run("relay", || measure(rounds, control.as_deref()))
}

/// The kernel parameter for the congestion control of a namespace's sockets.
const CONTROL: &str = "net/ipv4/tcp_congestion_control";

fn measure(rounds: usize, control: Option<&str>) -> Result<()> {
    let lab = Lab::start(Peer::Ours)?;
    let set_control = || control.map_or(Ok(()), |control| sysctl::set(CONTROL, control));
    set_control()?;
    let control_there = sysctl::get(CONTROL)?;
    let file = lab.wg_quick_file(Reach::Ipv4)?;
    let up = ["up", file.to_str().context("UTF-8")?, "--name", NAME, "--backend", "userspace"];
    let ports = ["--publish", "8001:81", "--publish", "8002:82"];
    let output = lab::vpn_exec(up).args(ports).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let NameLookup::Namespace(inside) = look_up(&path_of(NAME))? else { bail!("the name leads to no namespace") };
    inside.run(set_control)?;
    serve(&inside, 81, swallow)?;
    serve(&inside, 82, answer)?;
    let living: serde_json::Value =
        serde_json::from_slice(&lab::vpn_exec(["status", NAME, "--json"]).output()?.stdout)?;
    let address: Ipv4Addr = living["link"]["inner_ipv4"].as_str().context("an inner address")?.parse()?;
    let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let keeper = registry::read(&NAME.parse()?)?.context("a state")?.keeper.cast_signed();
    let mut ways = vec![
        ("directly, by the veth", [SocketAddr::from((address, 81)), SocketAddr::from((address, 82))], None),
        ("a published port", [local(8001), local(8002)], Some(keeper)),
    ];
    let mut proxies = Vec::new();
    if Path::new(PROXY).exists() {
        proxies = vec![proxy(9001, (address, 81))?, proxy(9002, (address, 82))?];
        ways.push(("systemd-socket-proxyd", [local(9001), local(9002)], Some(proxies[0].id().cast_signed())));
    } else {
        println!("{PROXY} is not installed, and is left out.");
    }

    let mut results: Vec<[Vec<f64>; 3]> = ways.iter().map(|_| Default::default()).collect();
    for _ in 0..rounds {
        for ((_, [bulk, pings], carrier), [rates, trips, costs]) in ways.iter().zip(&mut results) {
            let before = carrier.map(processor_time).transpose()?;
            let sent = send(*bulk)?;
            rates.push(sent);
            if let (Some(pid), Some(before)) = (carrier, before) {
                costs.push((processor_time(*pid)? - before) / sent);
            }
            trips.push(ping(*pings)?);
        }
    }
    let direct = results[0].clone();
    println!(
        "{:<24} median (min - max), ratio to the direct way; round trip, ratio to the direct way; CPU time per GB",
        ""
    );
    for ((title, ..), [rates, trips, costs]) in ways.iter().zip(results) {
        let ratio = Spread::of(rates.iter().zip(&direct[0]).map(|(own, direct)| own / direct).collect()).median;
        let longer = Spread::of(trips.iter().zip(&direct[1]).map(|(own, direct)| own / direct).collect()).median;
        let (rate, trip, cost) = (Spread::of(rates), Spread::of(trips), Spread::of(costs));
        let role = if *title == "a published port" { Role::Ours } else { Role::Other };
        record(&format!("bulk through a published port, {control_there}"), role, title, &rate, "GB/s");
        record(&format!("a byte's round trip through a published port, {control_there}"), role, title, &trip, "ms");
        if cost.median.is_finite() {
            record(&format!("processor time of a published port, {control_there}"), role, title, &cost, "s per GB");
        }
        let cost = if cost.median.is_finite() { format!("{:.2} s", cost.median) } else { "-".to_owned() };
        println!(
            "{title:<24} {:5.2} ({:.2} - {:.2}) GB/s {ratio:6.2} {:9.3} ms {longer:6.2} {cost:>12}",
            rate.median, rate.least, rate.most, trip.median
        );
    }
    println!("({rounds} rounds, medians; congestion control {control_there}; load {})", load()?);
    for proxy in &mut proxies {
        proxy.kill()?;
        proxy.wait()?;
    }
    Ok(())
}

fn serve(inside: &NetworkNamespace, port: u16, with: fn(TcpStream)) -> Result<()> {
    let listener = inside.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))?;
    std::thread::spawn(move || {
        for connection in listener.incoming().map_while(std::io::Result::ok) {
            std::thread::spawn(move || with(connection));
        }
    });
    Ok(())
}

/// Reads all bytes.
fn swallow(mut connection: TcpStream) {
    let mut buffer = vec![0; 1 << 18];
    while connection.read(&mut buffer).is_ok_and(|length| length > 0) {}
}

/// Sends each byte back.
fn answer(mut connection: TcpStream) {
    let _ = connection.set_nodelay(true);
    let mut byte = [0];
    while connection.read_exact(&mut byte).and_then(|()| connection.write_all(&byte)).is_ok() {}
}

/// Starts a proxy that listens on a port of the host, as systemd would.
fn proxy(port: u16, to: (Ipv4Addr, u16)) -> Result<Child> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    let script = format!("LISTEN_PID=$$ LISTEN_FDS=1 exec {PROXY} {}:{} 3<&0 </dev/null", to.0, to.1);
    let inherited = std::os::fd::OwnedFd::from(listener);
    Ok(Command::new("sh").args(["-c", &script]).stdin(inherited).stdout(Stdio::null()).spawn()?)
}

/// Sends for a while. Returns the rate in GB (10^9 bytes) per second.
fn send(to: SocketAddr) -> Result<f64> {
    let mut stream = TcpStream::connect(to)?;
    let buffer = vec![0; 1 << 17];
    let (begin, mut sent) = (Instant::now(), 0_usize);
    while begin.elapsed() < TURN {
        sent += stream.write(&buffer)?;
    }
    Ok(sent as f64 / begin.elapsed().as_secs_f64() / 1e9)
}

/// Returns how long a byte takes back and forth, in milliseconds.
fn ping(to: SocketAddr) -> Result<f64> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    let begin = now();
    let mut byte = [0];
    for _ in 0..PINGS {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
    }
    Ok(milliseconds(now() - begin) / PINGS as f64)
}

/// Returns the CPU time of a process in seconds (proc_pid_stat(5)).
fn processor_time(pid: i32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = text.rsplit_once(") ").context("a stat")?.1.split(' ').collect();
    let ticks = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    // USER_HZ is 100 on all architectures that matter.
    Ok(ticks / 100.0)
}
