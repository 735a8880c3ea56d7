//! The stages of a tunnel's life, each with a program that tries all vectors; and the twin of each, which is found guilty.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::slice::from_mut;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::agent::{Agent, launcher};
use lab::{Lab, PRIVATE_LAN, PROVIDER, Peer, Reach, TUNNEL_CLIENT, WEB};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vpn_exec::linux::namespace::{NameLookup, NetworkNamespace, look_up, path_of};
use vpn_exec::linux::sysctl;
use vpn_exec::{fault, registry};

use crate::VPN_EXEC;
use crate::judge::{Verdict, Witnesses};
use crate::vectors::{AT_ONCE, By, LEFT_OPEN, Vector};

/// The tunnel's name.
pub(crate) const NAME: &str = "leaks";

/// The variables by which the test-only switches are chosen: see [`fault`].
pub(crate) const BREAK: &str = "VPN_EXEC_TEST_BREAK";
const FAIL: &str = "VPN_EXEC_TEST_FAIL";

/// All that keeps a program in its tunnel, the routes apart.
pub(crate) const ALL_BROKEN: &str = "namespace,names,privileges,descriptors,sockets";

/// Tells hanging from working.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a packet may take to the host's interfaces.
pub(crate) const SOON: Duration = Duration::from_millis(100);

/// A socket of the host's, connected to a server, that whatever the test starts inherits.
pub(crate) struct LeftOpen(OwnedFd);

impl LeftOpen {
    pub(crate) fn new() -> Result<Self> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(SocketAddr::from((WEB.ipv4, 9)))?;
        // So high that a program which does not have it has nothing else there.
        let left_open = rustix::io::fcntl_dupfd_cloexec(&socket, 99)?;
        rustix::io::fcntl_setfd(&left_open, rustix::io::FdFlags::empty())?;
        Ok(Self(left_open))
    }

    /// Says to a program which it is.
    pub(crate) fn tell(&self, command: &mut Command) {
        command.env(LEFT_OPEN, self.0.as_raw_fd().to_string());
    }
}

/// Starts the program in a tunnel, where it tries everything as soon as it runs; without some of the protections.
pub(crate) fn inside(lab: &Lab, reach: Reach, left_open: &LeftOpen, stage: &str, broken: &str) -> Result<Agent> {
    inside_by(launcher(VPN_EXEC, &lab.wg_quick_file(reach)?, &["--name", NAME]), left_open, stage, broken)
}

pub(crate) fn inside_by(mut command: Command, left_open: &LeftOpen, stage: &str, broken: &str) -> Result<Agent> {
    command.env(AT_ONCE, stage).env(BREAK, broken);
    left_open.tell(&mut command);
    Agent::start(Some(command))?.begun()
}

/// Starts the program on the host.
pub(crate) fn outside(left_open: &LeftOpen) -> Result<Agent> {
    let mut command = Command::new("env");
    left_open.tell(&mut command);
    Agent::start(Some(command))?.begun()
}

/// Lets everybody in the calling thread's network namespace send pings, as systemd has it on hosts.
pub(crate) fn allow_pings() -> std::io::Result<()> {
    sysctl::set("net/ipv4/ping_group_range", "0 0")
}

pub(crate) fn allow_pings_inside() -> Result<()> {
    let NameLookup::Namespace(namespace) = look_up(&path_of(NAME))? else { bail!("the tunnel has no namespace") };
    Ok(namespace.run(allow_pings)?)
}

pub(crate) fn send(pid: i32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(pid), signal).with_context(|| format!("cannot send {signal} to {pid}"))
}

pub(crate) fn keeper() -> Result<i32> {
    let state = registry::read(&NAME.parse()?)?.context("the tunnel has written its state")?;
    Ok(state.keeper.cast_signed())
}

pub(crate) fn wait_until(what: &str, condition: impl FnMut() -> Result<bool>) -> Result<()> {
    lab::wait_until(lab::patience(PATIENCE), &format!("in vain: {what}"), condition)
}

/// Has everything tried once in a stage by each of these programs, and judges it. Where vectors are expected to be reported, it goes on
/// until they are, or for long enough: on a busy machine, an attempt may come to nothing by itself.
pub(crate) fn judged(
    agents: &mut [Agent],
    witnesses: &Witnesses<'_>,
    stage: &str,
    expected: Expected,
) -> Result<Verdict> {
    for act in ["begin", "lap"] {
        for agent in agents.iter_mut() {
            agent.succeed(&format!("{act} {stage}"))?;
        }
    }
    let begin = Instant::now();
    let mut verdict = Verdict::none_yet(stage);
    loop {
        // What waits for a neighbour's address may be sent a little later.
        std::thread::sleep(lab::patience(SOON));
        verdict = verdict.and(witnesses.verdict(stage)?);
        if verdict.reports(expected).is_ok() || begin.elapsed() > lab::patience(PATIENCE) {
            return Ok(verdict);
        }
    }
}

/// Which vectors the judge is expected to report.
pub(crate) type Expected = fn(&Vector) -> bool;

pub(crate) const NONE: Expected = |_| false;
pub(crate) const ALL: Expected = |_| true;

/// What is to be expected of a program without some of its protections.
pub(crate) fn expected(broken: &str) -> Expected {
    if broken.is_empty() { NONE } else { ALL }
}

/// A tunnel from its program's first instruction to its end.
fn life(lab: &Lab, witnesses: &Witnesses<'_>, broken: &str) -> Result<Vec<Verdict>> {
    let expected = expected(broken);
    lab.join_private_lan()?;
    let left_open = LeftOpen::new()?;
    let mut verdicts = Vec::new();
    let mut agent = inside(lab, Reach::Ipv4, &left_open, "first-instruction", broken)?;
    allow_pings_inside()?;
    verdicts.push(judged(from_mut(&mut agent), witnesses, "first-instruction", expected)?);
    verdicts.push(judged(from_mut(&mut agent), witnesses, "up", expected)?);

    lab.provider.stop()?;
    verdicts.push(judged(from_mut(&mut agent), witnesses, "provider-dead", expected)?);

    // Nobody takes over while the launcher is stopped.
    let (parent, first) = (agent.pid(), keeper()?);
    send(parent, Signal::SIGSTOP)?;
    send(first, Signal::SIGKILL)?;
    verdicts.push(judged(from_mut(&mut agent), witnesses, "keeper-killed", expected)?);
    send(parent, Signal::SIGCONT)?;
    wait_until("somebody takes over", || Ok(keeper()? != first))?;
    verdicts.push(judged(from_mut(&mut agent), witnesses, "keeper-replaced", expected)?);

    let alive = judged(from_mut(&mut agent), witnesses, "launcher-killed", expected)?;
    let program = agent.succeed("pid")?.parse()?;
    send(parent, Signal::SIGKILL)?;
    if !broken.is_empty() {
        // The death signal of whoever gains privileges by exec(2) is cleared, and whoever is on the host is nobody's to end.
        let _ = send(program, Signal::SIGKILL);
    }
    agent.end()?;
    wait_until("the tunnel is taken down", || Ok(!path_of(NAME).exists()))?;
    std::thread::sleep(lab::patience(SOON));
    verdicts.push(alive.and(witnesses.verdict("launcher-killed")?));
    // Later on the keeper itself asks for a name, on the host.
    ensure!(!broken.is_empty() || witnesses.callers() == 0, "somebody has come to the host's sockets");

    lab.resolver.forget("vpn.example");
    let mut agent = inside(lab, Reach::Name, &left_open, "endpoint-unresolved", broken)?;
    allow_pings_inside()?;
    verdicts.push(judged(from_mut(&mut agent), witnesses, "endpoint-unresolved", expected)?);
    agent.finish()?;

    let text = lab.wg_quick_text(Reach::Ipv4).replace(&format!(", {}/128", TUNNEL_CLIENT.ipv6), "");
    let command = launcher(VPN_EXEC, &lab.file(&text)?, &["--name", NAME]);
    let mut agent = inside_by(command, &left_open, "without-ipv6", broken)?;
    allow_pings_inside()?;
    verdicts.push(judged(from_mut(&mut agent), witnesses, "without-ipv6", expected)?);
    agent.finish()?;

    // A neighbour is reached, and others are not, and nobody is asked for names.
    let options = [&["--name", NAME], lab::local_networks()].concat();
    let command = launcher(VPN_EXEC, &lab.wg_quick_file(Reach::Ipv4)?, &options);
    let mut agent = inside_by(command, &left_open, "local-networks", broken)?;
    allow_pings_inside()?;
    verdicts.push(judged(from_mut(&mut agent), witnesses, "local-networks", expected)?);
    agent.succeed(&format!("get http://{}/", PRIVATE_LAN.ipv4))?;
    agent.finish()?;
    Ok(verdicts)
}

#[test]
fn a_living_tunnel_leaks_nothing() {
    lab::test(Peer::Ours, |lab| {
        let witnesses = Witnesses::gather(lab, None)?;
        for verdict in life(lab, &witnesses, "")? {
            verdict.is_silence()?;
        }
        // Silence is not all: what the program may have, it has.
        let asked = lab.tunnel_resolver.questions();
        for program in ["getent", "python", "curl"] {
            let name = format!("leak-{program}-at-up.example");
            assert!(asked.iter().any(|question| question.name == name), "{program} asked for no name: {asked:?}");
        }
        assert!(lab.web.callers().contains(&PROVIDER.both()[0]), "the server was called through the tunnel");
        Ok(())
    });
}

#[test]
fn a_living_tunnel_without_protections_leaks_by_every_vector_in_every_stage() {
    lab::test(Peer::Ours, |lab| {
        allow_pings()?;
        let witnesses = Witnesses::gather(lab, None)?;
        for verdict in life(lab, &witnesses, ALL_BROKEN)? {
            verdict.reports(|_| true)?;
        }
        Ok(())
    });
}

#[test]
fn on_the_host_every_vector_is_seen() {
    lab::test(Peer::Ours, |lab| {
        allow_pings()?;
        lab.join_private_lan()?;
        let witnesses = Witnesses::gather(lab, None)?;
        let mut agent = outside(&LeftOpen::new()?)?;
        judged(from_mut(&mut agent), &witnesses, "host", ALL)?.reports(|_| true)?;
        agent.finish()?;
        Ok(())
    });
}

/// The first process among a launcher's children that is stopped: its keeper, at one of [`fault`]'s points.
fn stopped_keeper(launcher: i32) -> Option<i32> {
    let children = fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).ok()?;
    children.split_ascii_whitespace().filter_map(|child| child.parse().ok()).find(|child: &i32| {
        fs::read_to_string(format!("/proc/{child}/stat"))
            .is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')))
    })
}

/// The namespace that a keeper holds, as a path.
fn namespace_of(keeper: i32) -> Result<PathBuf> {
    let own = NetworkNamespace::current()?.id()?;
    for entry in fs::read_dir(format!("/proc/{keeper}/fd"))? {
        let path = entry?.path();
        let is_network = fs::read_link(&path).is_ok_and(|target| target.to_string_lossy().starts_with("net:["));
        if is_network && NetworkNamespace::from(OwnedFd::from(fs::File::open(&path)?)).id()? != own {
            return Ok(path);
        }
    }
    bail!("the keeper {keeper} holds no namespace of its own")
}

/// A tunnel from the first instant of its namespace to the last. The keeper is stopped at every point of set-up and tear-down; whoever
/// is in the namespace tries everything meanwhile, and goes on in between.
fn set_up_and_tear_down(lab: &Lab, witnesses: &Witnesses<'_>, enters: bool) -> Result<Vec<Verdict>> {
    let expected = if enters { NONE } else { concerns_visitors };
    lab.join_private_lan()?;
    let left_open = LeftOpen::new()?;
    let mut visitors = vec![outside(&left_open)?];
    let options = [&["--name", NAME], lab::local_networks()].concat();
    let mut command = launcher(VPN_EXEC, &lab.wg_quick_file(Reach::Ipv4)?, &options);
    let mut child = command.arg("true").env(FAIL, "stop").spawn()?;
    let launcher = child.id().cast_signed();
    let mut verdicts = Vec::new();
    for (number, point) in fault::SET_UP.into_iter().chain(fault::TAKE_DOWN).enumerate() {
        let mut keeper = None;
        wait_until(&format!("the keeper comes to the point {point:?}"), || {
            keeper = stopped_keeper(launcher);
            Ok(keeper.is_some())
        })?;
        let keeper = keeper.context("stopped")?;
        if number == 0 && enters {
            let path = namespace_of(keeper)?;
            NetworkNamespace::from(OwnedFd::from(fs::File::open(&path)?)).run(allow_pings)?;
            visitors[0].succeed(&format!("enter {}", path.display()))?;
        }
        if point == "after the name" && enters {
            visitors.push(by_name()?);
        }
        verdicts.push(judged(&mut visitors, witnesses, &point.replace(|c: char| !c.is_alphanumeric(), "-"), expected)?);
        // It runs when this returns (signal(7)), so it is not taken for stopped at the next point.
        send(keeper, Signal::SIGCONT)?;
    }
    ensure!(child.wait()?.success(), "vpn-exec has failed");
    verdicts.push(judged(&mut visitors, witnesses, "afterwards", expected)?);
    for visitor in visitors {
        visitor.finish()?;
    }
    Ok(verdicts)
}

/// Somebody who comes in by the namespace's name, as soon as it has one.
fn by_name() -> Result<Agent> {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", NAME]);
    let mut visitor = Agent::start(Some(command))?.begun()?;
    // He was root, and is in already: what he brings along is no matter here.
    visitor.succeed("enter /proc/self/ns/net")?;
    Ok(visitor)
}

/// What a visitor lacks is what keeps a program from the host's sockets and descriptors: he came from the host. He brings no privileges.
fn concerns_visitors(vector: &Vector) -> bool {
    matches!(vector.by, By::Network | By::Rules | By::Library | By::Privileges)
}

#[test]
fn nothing_leaks_at_any_point_of_set_up_and_tear_down() {
    lab::test(Peer::Ours, |lab| {
        let witnesses = Witnesses::gather_in_network(lab)?;
        for verdict in set_up_and_tear_down(lab, &witnesses, true)? {
            verdict.is_silence_of(concerns_visitors)?;
        }
        Ok(())
    });
}

#[test]
fn whoever_stays_on_the_host_is_seen_at_every_point_of_set_up_and_tear_down() {
    lab::test(Peer::Ours, |lab| {
        allow_pings()?;
        let witnesses = Witnesses::gather_in_network(lab)?;
        for verdict in set_up_and_tear_down(lab, &witnesses, false)? {
            verdict.reports(concerns_visitors)?;
        }
        Ok(())
    });
}

/// Before there is a tunnel there is no program: it is not run when the set-up fails, at whatever point, nor in a tunnel that is not
/// there. It would try everything at once.
#[test]
fn nothing_runs_before_the_tunnel_is_there() {
    lab::test(Peer::Ours, |lab| {
        let witnesses = Witnesses::gather(lab, None)?;
        lab.join_private_lan()?;
        let left_open = LeftOpen::new()?;
        let config = lab.wg_quick_file(Reach::Ipv4)?;
        let mut commands = vec![Command::new(VPN_EXEC)];
        commands[0].args(["--tunnel", "nowhere", "--"]);
        for point in fault::SET_UP {
            for how in ["", "kill:"] {
                let mut command = launcher(VPN_EXEC, &config, &["--name", NAME]);
                command.env(FAIL, format!("{how}{point}"));
                commands.push(command);
            }
        }
        for mut command in commands {
            left_open.tell(&mut command);
            command.env(AT_ONCE, "before");
            let agent = Agent::start(Some(command))?;
            let (status, complaints) = agent.end()?;
            ensure!(status.code() == Some(125), "{status}: {complaints}");
        }
        std::thread::sleep(lab::patience(SOON));
        witnesses.verdict("before")?.is_silence()?;
        assert_eq!(witnesses.callers(), 0);

        // The same program, with a tunnel of which it does not know.
        allow_pings()?;
        let mut command = Command::new("env");
        left_open.tell(&mut command);
        command.env(AT_ONCE, "before");
        let mut agent = Agent::start(Some(command))?.begun()?;
        judged(from_mut(&mut agent), &witnesses, "before", ALL)?.reports(|_| true)?;
        agent.finish()?;
        Ok(())
    });
}
