//! The sidecar of a pod (`vpn-exec attach`): `cargo bench --bench sidecar [-- ROUNDS]`.
//!
//! Measures, each time with a new sidecar: the time from its exec until `attach --check` succeeds, and until the
//! application has a page; its memory (PSS); and the rate at which the application sends to a server behind the
//! provider. The comparison sends from the same pod through wireguard-go, which other images run, with a default route
//! and no packet rules. The provider is wireguard-go. It runs in a pretended Internet, and asserts nothing.

mod measure;
mod sending;

use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use lab::{Context, Lab, POD_GATEWAY, PROVIDER, Peer, Pod, Reach, Result, TUNNEL_CLIENT, WEB, ensure, world};
use measure::{Role, Spread, load, milliseconds, now, record};
use sending::TURN;

/// The default number of rounds. More than four exceed the time of a world.
const ROUNDS: usize = 3;

/// The time in which a tunnel comes up.
const UP: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let rounds = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(ROUNDS);
    world::run("sidecar", || measure(rounds))
}

fn measure(rounds: usize) -> Result<()> {
    let lab = Lab::start(Peer::WireguardGo)?;
    sending::start_server(&lab)?;
    let text = lab.wg_quick_text(Reach::Ipv4);
    let file = lab.file(&text)?;
    let only_wg = |line: &&str| !["Address", "DNS"].iter().any(|key| line.starts_with(key));
    let for_wg = lab.file(&text.lines().filter(only_wg).map(|line| format!("{line}\n")).collect::<String>())?;
    let pod = Pod::start(&lab)?;

    let (mut checked, mut used, mut memory, mut ours, mut theirs) = (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..rounds {
        theirs.push(through_wireguard_go(&pod, &for_wg)?);
        let begin = now();
        let mut sidecar = pod.sidecar([lab::launcher::binary()]);
        let mut sidecar = sidecar.arg("attach").arg(&file).args(["--backend", "userspace"]).spawn()?;
        let check = || pod.sidecar([lab::launcher::binary()]).args(["attach", "--check"]).output();
        lab::wait_until(UP, "the sidecar does not come up", || Ok(check()?.status.success()))?;
        checked.push(milliseconds(now() - begin));
        let page = format!("http://{}/", WEB.ipv4);
        ensure!(pod.namespace.run(|| lab::http::get(&page, UP))? == format!("{}\n", PROVIDER.ipv4), "not the tunnel");
        used.push(milliseconds(now() - begin));
        ours.push(sending::rate_from(&pod.namespace)?);
        memory.push(pss(sidecar.id())?);
        end(&mut sidecar)?;
        open_again(&pod)?;
    }
    println!("{:<44} median (min - max)", "a sidecar with the userspace WireGuard");
    for (title, unit, values) in [
        ("from exec to a successful attach --check", "ms", checked),
        ("from exec to the application's first page", "ms", used),
        ("memory of the sidecar after the transfer, PSS", "MiB", memory),
        ("one TCP connection", "Mbit/s", ours),
        ("one TCP connection through wireguard-go", "Mbit/s", theirs),
    ] {
        let spread = Spread::of(values);
        let (what, role) = match title.strip_suffix(" through wireguard-go") {
            Some(what) => (what, Role::Other),
            None => (title, Role::Ours),
        };
        record(
            &format!("a sidecar: {what}"),
            role,
            if role == Role::Ours { "vpn-exec" } else { "wireguard-go" },
            &spread,
            unit,
        );
        println!("  {title:<48} {:7.1} ({:.1} - {:.1}) {unit}", spread.median, spread.least, spread.most);
    }
    println!("({rounds} rounds of {} s each; load {})", TURN.as_secs(), load()?);
    Ok(())
}

fn end(process: &mut Child) -> Result<()> {
    process.kill()?;
    process.wait()?;
    Ok(())
}

/// Runs a shell's script in the pod, as root with all capabilities.
fn in_pod(pod: &Pod, script: &str) -> Result<()> {
    let mut command = pod.container("+all", ["sh", "-ec", script]);
    let output = command.stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Removes the rules and the routing of `attach`, which stay by design.
fn open_again(pod: &Pod) -> Result<()> {
    in_pod(
        pod,
        "nft flush ruleset; for family in -4 -6; do \
         ip $family rule | sed -n 's/^\\(303[0-9]*\\):.*/\\1/p' | while read -r priority; do \
         ip $family rule del priority $priority; done; ip $family route flush table 30309 || true; done",
    )
}

fn through_wireguard_go(pod: &Pod, file: &Path) -> Result<f64> {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", pod.path().display())).args(["wireguard-go", "-f", "wg9"]);
    let mut process = command.env("LOG_LEVEL", "error").stdin(Stdio::null()).spawn().context("wireguard-go")?;
    lab::wait_until(UP, "wireguard-go does not start", || Ok(Path::new("/run/wireguard/wg9.sock").exists()))?;
    in_pod(
        pod,
        &format!(
            "wg setconf wg9 {}; ip address add {}/32 dev wg9; ip link set wg9 mtu 1420 up; \
             ip route add {} via {}; ip route add 0.0.0.0/1 dev wg9; ip route add 128.0.0.0/1 dev wg9",
            file.display(),
            TUNNEL_CLIENT.ipv4,
            PROVIDER.ipv4,
            POD_GATEWAY.ipv4
        ),
    )?;
    let rate = sending::rate_from(&pod.namespace)?;
    end(&mut process)?;
    let _ = std::fs::remove_file("/run/wireguard/wg9.sock");
    in_pod(pod, &format!("ip route del {}", PROVIDER.ipv4))?;
    Ok(rate)
}

/// Returns the proportional set size of a process in MiB (proc_pid_smaps(5)).
fn pss(pid: u32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no line Pss")?;
    let kib: f64 = line.split_ascii_whitespace().next().context("no number")?.parse()?;
    Ok(kib / 1024.0)
}
