//! The stages of a tunnel's life, each with a program that tries all vectors, and the twin of each, in which the judge
//! sees the leaks.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::slice::from_mut;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::agent::Agent;
use lab::stamp::Protection;
use lab::{Lab, Launcher, PRIVATE_LAN, PROVIDER, Peer, Reach, TUNNEL_CLIENT, WEB, variables};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::sysctl;
use vpn_exec::{fault, registry};

use crate::judge::{Judge, Verdict};
use crate::vectors::Vector;

/// The tunnel's name.
pub(crate) const NAME: &str = "leaks";

/// All protections that keep a program in its tunnel, except the routes (see [`fault::PROTECTIONS`]).
pub(crate) const ALL_PROTECTIONS: &str = "namespace,names,privileges,descriptors,sockets";

/// Returns the protections to leave out so that nothing else stops what they stop. A rootless tunnel has a second
/// barrier behind them: a link that leads nowhere, and a user namespace without power over the host.
pub(crate) fn with_second_barrier(protections: &str) -> String {
    match lab::tunnel::is_rootless() {
        true => format!("{protections},gateway,user-namespace"),
        false => protections.to_owned(),
    }
}

/// The time after which a condition is taken for hanging.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The time that a packet may take to the host's interfaces.
pub(crate) const SOON: Duration = Duration::from_millis(100);

/// A socket in the host's network namespace, connected to a server, which every process that the test starts inherits.
pub(crate) struct InheritedSocket(OwnedFd);

impl InheritedSocket {
    pub(crate) fn new() -> Result<Self> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(SocketAddr::from((WEB.ipv4, 9)))?;
        // A high number, so that a program without the socket has no other descriptor of that number.
        let inherited = rustix::io::fcntl_dupfd_cloexec(&socket, 99)?;
        rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty())?;
        Ok(Self(inherited))
    }

    /// The value of [`variables::INHERITED_SOCKET`] for the agent.
    pub(crate) fn number(&self) -> String {
        self.0.as_raw_fd().to_string()
    }
}

/// Starts the agent in a tunnel, where it tries all vectors at once. `broken` names the protections to leave out.
pub(crate) fn inside(lab: &Lab, reach: Reach, inherited: &InheritedSocket, stage: &str, broken: &str) -> Result<Agent> {
    inside_by(Launcher::new(lab.wg_quick_file(reach)?).options(["--name", NAME]), inherited, stage, broken)
}

pub(crate) fn inside_by(launcher: Launcher, inherited: &InheritedSocket, stage: &str, broken: &str) -> Result<Agent> {
    let launcher = launcher.env(variables::STAGE, stage).env(variables::BREAK, broken);
    launcher.env(variables::INHERITED_SOCKET, inherited.number()).start_agent()?.begun()
}

/// Starts the agent on the host.
pub(crate) fn outside(inherited: &InheritedSocket) -> Result<Agent> {
    Agent::start(Command::new("env").env(variables::INHERITED_SOCKET, inherited.number()))?.begun()
}

/// Allows unprivileged ICMP sockets in the calling thread's network namespace, as systemd does on hosts.
pub(crate) fn allow_pings() -> std::io::Result<()> {
    sysctl::set("net/ipv4/ping_group_range", "0 0")
}

pub(crate) fn allow_pings_inside() -> Result<()> {
    Ok(lab::tunnel::namespace(NAME)?.run(allow_pings)?)
}

pub(crate) fn send(pid: i32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(pid), signal).with_context(|| format!("cannot send {signal} to {pid}"))
}

pub(crate) fn keeper() -> Result<i32> {
    let state = registry::read(&NAME.parse()?)?.context("the tunnel has no state")?;
    Ok(state.keeper.cast_signed())
}

pub(crate) fn wait_until(what: &str, condition: impl FnMut() -> Result<bool>) -> Result<()> {
    lab::wait_until(lab::patience(PATIENCE), &format!("timed out: {what}"), condition)
}

/// Lets each agent try all vectors once in a stage, and judges the stage. Where leaks are expected, repeats that until
/// all are seen, for at most [`PATIENCE`]: on a busy machine a single attempt may fail by itself.
pub(crate) fn judged(agents: &mut [Agent], judge: &Judge<'_>, stage: &str, expected: Expected) -> Result<Verdict> {
    for act in ["begin-stage", "complete-stage"] {
        for agent in agents.iter_mut() {
            agent.succeed(&format!("{act} {stage}"))?;
        }
    }
    let begin = Instant::now();
    let mut verdict = Verdict::none_yet(stage);
    loop {
        // A packet that waits for the address of a neighbour is sent a little later.
        std::thread::sleep(lab::patience(SOON));
        verdict = verdict.and(judge.verdict(stage)?);
        if verdict.expect_leaks(expected).is_ok() || begin.elapsed() > lab::patience(PATIENCE) {
            return Ok(verdict);
        }
    }
}

/// Which vectors the judge is expected to report.
pub(crate) type Expected = fn(&Vector) -> bool;

pub(crate) const NONE: Expected = |_| false;
pub(crate) const ALL: Expected = |_| true;

/// Returns the vectors that are expected to leak without some protections.
pub(crate) fn expected(broken: &str) -> Expected {
    if broken.is_empty() { NONE } else { ALL }
}

/// Judges a tunnel from its program's first instruction to its end.
fn judge_life(lab: &Lab, judge: &Judge<'_>, broken: &str) -> Result<Vec<Verdict>> {
    let expected = expected(broken);
    lab.join_private_lan()?;
    let inherited = InheritedSocket::new()?;
    let mut verdicts = Vec::new();
    let mut agent = inside(lab, Reach::Ipv4, &inherited, "first-instruction", broken)?;
    allow_pings_inside()?;
    verdicts.push(judged(from_mut(&mut agent), judge, "first-instruction", expected)?);
    verdicts.push(judged(from_mut(&mut agent), judge, "up", expected)?);

    lab.provider.stop()?;
    verdicts.push(judged(from_mut(&mut agent), judge, "provider-dead", expected)?);

    // A stopped launcher starts no successor.
    let (parent, first) = (agent.pid(), keeper()?);
    send(parent, Signal::SIGSTOP)?;
    send(first, Signal::SIGKILL)?;
    verdicts.push(judged(from_mut(&mut agent), judge, "keeper-killed", expected)?);
    send(parent, Signal::SIGCONT)?;
    wait_until("another keeper takes over", || Ok(keeper()? != first))?;
    verdicts.push(judged(from_mut(&mut agent), judge, "keeper-replaced", expected)?);

    let alive = judged(from_mut(&mut agent), judge, "launcher-killed", expected)?;
    let program = agent.succeed("pid")?.parse()?;
    send(parent, Signal::SIGKILL)?;
    if !broken.is_empty() {
        // A program that gains privileges by exec(2) has no parent-death signal, and vpn-exec does not end a program on
        // the host.
        let _ = send(program, Signal::SIGKILL);
    }
    agent.end()?;
    wait_until("the tunnel is taken down", || Ok(!lab::tunnel::exists(NAME)?))?;
    std::thread::sleep(lab::patience(SOON));
    verdicts.push(alive.and(judge.verdict("launcher-killed")?));
    // Checked here, because later the keeper itself asks the host's resolvers for the endpoint's name.
    ensure!(!broken.is_empty() || judge.clients() == 0, "a process has connected to the host's sockets");

    lab.resolver.forget("vpn.example");
    let mut agent = inside(lab, Reach::Name, &inherited, "endpoint-unresolved", broken)?;
    allow_pings_inside()?;
    verdicts.push(judged(from_mut(&mut agent), judge, "endpoint-unresolved", expected)?);
    agent.finish()?;

    let text = lab.wg_quick_text(Reach::Ipv4).replace(&format!(", {}/128", TUNNEL_CLIENT.ipv6), "");
    let launcher = Launcher::new(lab.file(&text)?).options(["--name", NAME]);
    let mut agent = inside_by(launcher, &inherited, "without-ipv6", broken)?;
    allow_pings_inside()?;
    verdicts.push(judged(from_mut(&mut agent), judge, "without-ipv6", expected)?);
    agent.finish()?;

    // The program reaches one local network, no other neighbour, and no resolver there.
    let launcher = Launcher::new(lab.wg_quick_file(Reach::Ipv4)?).options(["--name", NAME]);
    let mut agent = inside_by(launcher.options(lab::local_networks()), &inherited, "local-networks", broken)?;
    allow_pings_inside()?;
    verdicts.push(judged(from_mut(&mut agent), judge, "local-networks", expected)?);
    agent.succeed(&format!("get http://{}/", PRIVATE_LAN.ipv4))?;
    agent.finish()?;
    Ok(verdicts)
}

#[test]
fn a_tunnel_leaks_nothing_in_any_stage() {
    lab::test(Peer::Ours, |lab| {
        let judge = Judge::new(lab, None)?;
        for verdict in judge_life(lab, &judge, "")? {
            verdict.expect_no_leak()?;
        }
        // The tunnel also works: names are resolved through it, and the server is reached.
        let asked = lab.tunnel_resolver.questions();
        for program in ["getent", "python", "curl"] {
            let name = format!("leak-{program}-at-up.example");
            assert!(
                asked.iter().any(|question| question.name == name),
                "{program} did not ask the tunnel's resolver: {asked:?}"
            );
        }
        assert!(lab.web.clients().contains(&PROVIDER.both()[0]), "no request reached the server through the tunnel");
        Ok(())
    });
}

#[test]
fn without_protections_a_tunnel_leaks_by_every_vector_in_every_stage() {
    lab::test(Peer::Ours, |lab| {
        allow_pings()?;
        let judge = Judge::new(lab, None)?;
        for verdict in judge_life(lab, &judge, &with_second_barrier(ALL_PROTECTIONS))? {
            verdict.expect_leaks(|_| true)?;
        }
        Ok(())
    });
}

#[test]
fn the_judge_sees_every_vector_on_the_host() {
    lab::test(Peer::Ours, |lab| {
        allow_pings()?;
        lab.join_private_lan()?;
        let judge = Judge::new(lab, None)?;
        let mut agent = outside(&InheritedSocket::new()?)?;
        judged(from_mut(&mut agent), &judge, "host", ALL)?.expect_leaks(|_| true)?;
        agent.finish()?;
        Ok(())
    });
}

/// Returns a stopped child of a launcher: its keeper, at one of [`fault`]'s points.
fn stopped_keeper(launcher: i32) -> Option<i32> {
    let children = fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).ok()?;
    children.split_ascii_whitespace().filter_map(|child| child.parse().ok()).find(|child: &i32| {
        fs::read_to_string(format!("/proc/{child}/stat"))
            .is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')))
    })
}

/// Returns a path to the network namespace that a keeper holds.
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

/// Judges a tunnel from the creation of its namespace to its end. The keeper stops at every point of set-up and
/// tear-down. Agents in the namespace (`inside`), or on the host, try all vectors at each point and in between.
fn judge_set_up_and_tear_down(lab: &Lab, judge: &Judge<'_>, inside: bool) -> Result<Vec<Verdict>> {
    let expected = if inside { NONE } else { applies_to_intruders };
    lab.join_private_lan()?;
    let inherited = InheritedSocket::new()?;
    let mut intruders = vec![outside(&inherited)?];
    let launcher = Launcher::new(lab.wg_quick_file(Reach::Ipv4)?).options(["--name", NAME]);
    let launcher = launcher.options(lab::local_networks()).program(["true"]);
    let mut child = launcher.env(variables::FAIL, "stop").start()?;
    let launcher = child.id().cast_signed();
    let mut verdicts = Vec::new();
    let points = fault::SET_UP.into_iter().chain(fault::ANNOUNCED).chain(fault::TAKE_DOWN);
    for (number, point) in points.enumerate() {
        let mut keeper = None;
        wait_until(&format!("the keeper stops at {point:?}"), || {
            keeper = stopped_keeper(launcher);
            Ok(keeper.is_some())
        })?;
        let keeper = keeper.context("stopped")?;
        if number == 0 && inside {
            let path = namespace_of(keeper)?;
            NetworkNamespace::from(OwnedFd::from(fs::File::open(&path)?)).run(allow_pings)?;
            intruders[0].succeed(&format!("enter {}", path.display()))?;
        }
        if point == "after the name" && inside {
            intruders.push(enter_from_host(&namespace_of(keeper)?)?);
        }
        verdicts.push(judged(&mut intruders, judge, &point.replace(|c: char| !c.is_alphanumeric(), "-"), expected)?);
        // The keeper runs when this returns (signal(7)), so the next iteration does not find it stopped.
        send(keeper, Signal::SIGCONT)?;
    }
    ensure!(child.wait()?.success(), "vpn-exec failed");
    verdicts.push(judged(&mut intruders, judge, "afterwards", expected)?);
    for intruder in intruders {
        intruder.finish()?;
    }
    Ok(verdicts)
}

/// Starts an agent that enters the namespace by its name, or by a path if it has none.
fn enter_from_host(namespace: &Path) -> Result<Agent> {
    let mut command = match lab::tunnel::is_rootless() {
        true => Command::new("nsenter"),
        false => Command::new("ip"),
    };
    match lab::tunnel::is_rootless() {
        true => command.arg(format!("--net={}", namespace.display())),
        false => command.args(["netns", "exec", NAME]),
    };
    let mut intruder = Agent::start(&mut command)?.begun()?;
    // It is inside already. This makes it give up root's privileges, which are not what this test is about.
    intruder.succeed("enter /proc/self/ns/net")?;
    Ok(intruder)
}

/// Returns whether a vector must fail for an unprivileged process that enters from the host. Such a process sees the
/// host's sockets and keeps its descriptors.
fn applies_to_intruders(vector: &Vector) -> bool {
    use Protection::{Library, Namespace, Privileges, Rules};

    matches!(vector.protection, Namespace | Rules | Library | Privileges)
}

#[test]
fn nothing_leaks_at_any_point_of_set_up_and_tear_down() {
    lab::test(Peer::Ours, |lab| {
        let judge = Judge::of_network(lab)?;
        for verdict in judge_set_up_and_tear_down(lab, &judge, true)? {
            verdict.expect_no_leak_by(applies_to_intruders)?;
        }
        Ok(())
    });
}

#[test]
fn the_judge_sees_a_process_on_the_host_at_every_point_of_set_up_and_tear_down() {
    lab::test(Peer::Ours, |lab| {
        allow_pings()?;
        let judge = Judge::of_network(lab)?;
        for verdict in judge_set_up_and_tear_down(lab, &judge, false)? {
            verdict.expect_leaks(applies_to_intruders)?;
        }
        Ok(())
    });
}

/// If the set-up fails at any point, or if the tunnel does not exist, vpn-exec does not run the program, which would
/// try all vectors at once.
#[test]
fn no_program_runs_without_its_tunnel() {
    lab::test(Peer::Ours, |lab| {
        let judge = Judge::new(lab, None)?;
        lab.join_private_lan()?;
        let inherited = InheritedSocket::new()?;
        let config = lab.wg_quick_file(Reach::Ipv4)?;
        let mut launchers = vec![Launcher::with_tunnel("nowhere")];
        for point in fault::SET_UP {
            for how in ["", "kill:"] {
                let launcher = Launcher::new(&config).options(["--name", NAME]);
                launchers.push(launcher.env(variables::FAIL, format!("{how}{point}")));
            }
        }
        for launcher in launchers {
            let launcher = launcher.env(variables::INHERITED_SOCKET, inherited.number());
            let (status, errors) = launcher.env(variables::STAGE, "before").start_agent()?.end()?;
            ensure!(status.code() == Some(125), "{status}: {errors}");
        }
        std::thread::sleep(lab::patience(SOON));
        judge.verdict("before")?.expect_no_leak()?;
        assert_eq!(judge.clients(), 0);

        // The twin: the same program on the host.
        allow_pings()?;
        let mut command = Command::new("env");
        command.env(variables::INHERITED_SOCKET, inherited.number()).env(variables::STAGE, "before");
        let mut agent = Agent::start(&mut command)?.begun()?;
        judged(from_mut(&mut agent), &judge, "before", ALL)?.expect_leaks(|_| true)?;
        agent.finish()?;
        Ok(())
    });
}
