//! Helpers of the tests in this directory: they run vpn-exec with the agent, and watch both.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::surroundings::Surroundings;
use lab::{Launcher, Snapshot, agent};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vpn_exec::lease::status::{Condition, Status};
use vpn_exec::linux::netlink::Netlink;
use vpn_exec::linux::netlink::link::Link;
use vpn_exec::registry::{self, TunnelState};

/// The time after which a process is taken for hanging. Nothing takes a tenth of it on an idle machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The time in which abandoned objects vanish. That takes milliseconds, but the kernel removes the namespaces of the
/// whole machine one after another.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// The provider's file. No peer answers at its endpoint.
pub(crate) const CONFIG: &str = "/run/lab/provider.conf";

/// Its text, with arbitrary keys.
pub(crate) const CONFIG_TEXT: &str = "[Interface]\n\
    PrivateKey = yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=\n\
    Address = 10.64.0.2/32, fd64::2/128\n\
    DNS = 10.64.0.1\n\
    [Peer]\n\
    PublicKey = xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=\n\
    AllowedIPs = 0.0.0.0/0, ::/0\n\
    Endpoint = 192.0.2.1:51820\n";

/// Writes the configuration.
///
/// # Errors
/// [`lab::Skip`] without a TUN device.
pub(crate) fn prepare() -> Result<()> {
    lab::require_tun()?;
    write_config(CONFIG_TEXT)
}

/// Replaces the provider's file.
pub(crate) fn write_config(text: &str) -> Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(CONFIG)?;
    Ok(file.write_all(text.as_bytes())?)
}

/// Begins a command line with the options of every tunnel here.
pub(crate) fn launcher(name: &str) -> Launcher {
    Launcher::new(CONFIG).options(["--name", name])
}

/// Returns a command that performs a task of the agent in a tunnel, with its output in pipes.
pub(crate) fn vpn_exec(name: &str, task: &str) -> Command {
    with_task(launcher(name), task)
}

/// Ends a command line with a task of the agent, and puts its output into pipes.
pub(crate) fn with_task(launcher: Launcher, task: &str) -> Command {
    with_pipes(launcher.program(agent::task(task)))
}

/// Puts the output of a command line into pipes.
pub(crate) fn with_pipes(launcher: Launcher) -> Command {
    let mut command = launcher.command();
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Returns a command by which the agent first performs a task, and then executes another command.
pub(crate) fn by_way_of(task: &str, then: &Command) -> Command {
    let mut command = agent::task_on_host(task);
    command.arg(then.get_program()).args(then.get_args());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A running vpn-exec whose program has begun.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) program: Surroundings,
    pub(crate) state: TunnelState,
}

impl Running {
    /// Returns the veth's end on the host, which has the tunnel's mark.
    pub(crate) fn host_link(&self) -> Result<Link> {
        let mark = self.state.mark.text();
        let links = Netlink::open()?.links()?;
        links.into_iter().find(|link| link.alias.as_deref() == Some(mark)).context("a link with the mark")
    }
}

/// Starts vpn-exec with a task that reports, and waits for the report.
pub(crate) fn start(name: &str, task: &str) -> Result<Running> {
    started(vpn_exec(name, task), name)
}

/// [`start`] with another command, whose task reports.
pub(crate) fn started(mut command: Command, name: &str) -> Result<Running> {
    let mut child = command.spawn()?;
    let Some(program) = agent::report_of(&mut child)? else {
        bail!("vpn-exec ended too early: {:?}", output_of(child)?);
    };
    let state = registry::read(&name.parse()?)?.context("a running tunnel has a state")?;
    Ok(Running { child, program, state })
}

impl Running {
    pub(crate) fn launcher(&self) -> i32 {
        self.child.id().cast_signed()
    }

    pub(crate) fn keeper(&self) -> i32 {
        self.state.keeper.cast_signed()
    }

    /// Ends the program by SIGTERM, and waits for vpn-exec.
    pub(crate) fn end(self) -> Result<Output> {
        send(self.program.pid, Signal::SIGTERM)?;
        output_of(self.child)
    }
}

/// Sends a signal to one process.
pub(crate) fn send(pid: i32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(pid), signal).with_context(|| format!("cannot send {signal} to {pid}"))
}

/// Runs a command until it ends. Fails if it hangs.
pub(crate) fn run(mut command: Command) -> Result<Output> {
    output_of(command.spawn()?)
}

/// Waits for the end of a process. Fails if it hangs.
pub(crate) fn output_of(mut child: Child) -> Result<Output> {
    let deadline = Instant::now() + lab::patience(PATIENCE);
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            bail!("the process hangs: {:?}", child.wait_with_output()?);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(child.wait_with_output()?)
}

/// Returns the exit status, or as an error the signal that killed the process.
pub(crate) fn ended(status: ExitStatus) -> Result<i32, Signal> {
    match (status.code(), status.signal()) {
        (Some(code), _) => Ok(code),
        (None, signal) => Err(Signal::try_from(signal.unwrap_or_default()).expect("a signal")),
    }
}

pub(crate) fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Requires that vpn-exec itself has failed with one clear message: a line with the error, and at most one with advice.
/// Returns the message.
pub(crate) fn assert_refused(output: &Output) -> String {
    let text = errors(output);
    assert_eq!(ended(output.status), Ok(125), "{text}");
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("vpn-exec: warning: ")).collect();
    assert!((1..=2).contains(&lines.len()) && lines.iter().all(|line| line.starts_with("vpn-exec: ")), "{text}");
    text
}

/// Requires that the host is unchanged, once the kernel has removed the links.
pub(crate) fn assert_unchanged(before: &Snapshot, when: impl std::fmt::Display) -> Result<()> {
    let changes = before.changes_within(SOON)?;
    ensure!(changes.is_empty(), "{when}, the host has changed: {changes:#?}");
    Ok(())
}

/// Returns the agents that perform a task.
pub(crate) fn doing(task: &str) -> Result<Vec<i32>> {
    let line: Vec<u8> = agent::task(task).iter().flat_map(|word| [word.as_encoded_bytes(), b"\0"].concat()).collect();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let Some(pid) = path.file_name().and_then(|name| name.to_str()?.parse().ok()) else { continue };
        // A process that ends meanwhile has no command line.
        if fs::read(path.join("cmdline")).unwrap_or_default() == line {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Waits until no agent performs any of the tasks.
pub(crate) fn assert_none_soon(tasks: &[&str], when: impl std::fmt::Display) -> Result<()> {
    let deadline = Instant::now() + lab::patience(SOON);
    loop {
        let alive = tasks.iter().map(|task| doing(task)).collect::<Result<Vec<_>>>()?.concat();
        if alive.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{when}, these processes live on: {alive:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Returns whether a path exists, even as a dangling link.
pub(crate) fn is_there(path: impl AsRef<Path>) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Returns a command line of vpn-exec with its output in pipes.
pub(crate) fn command(arguments: &[&str]) -> Command {
    let mut command = lab::vpn_exec(arguments);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    command
}

/// Runs a command that must succeed, and returns its standard output.
pub(crate) fn works(arguments: &[&str]) -> Result<String> {
    let output = run(command(arguments))?;
    ensure!(ended(output.status) == Ok(0), "{arguments:?}: {}", errors(&output));
    Ok(String::from_utf8(output.stdout)?)
}

/// Returns the command line that starts the standing tunnel.
pub(crate) fn up() -> [&'static str; 6] {
    ["up", CONFIG, "--backend", lab::backend(), "--name", "stays"]
}

/// Returns the command line that reads its file again.
pub(crate) fn reload() -> [&'static str; 6] {
    ["reload", CONFIG, "--backend", lab::backend(), "--name", "stays"]
}

/// Returns its status.
pub(crate) fn status() -> Result<Status> {
    Ok(serde_json::from_str(&works(&["status", "stays", "--json"])?)?)
}

/// Joins the standing tunnel by its name alone.
pub(crate) fn joined(task: &str) -> Command {
    with_task(Launcher::with_tunnel("stays"), task)
}

/// Returns the process ID of its keeper.
pub(crate) fn keeper() -> Result<i32> {
    Ok(registry::read(&"stays".parse()?)?.context("a tunnel that stays has a state")?.keeper.cast_signed())
}

/// Waits until something is so, at most [`PATIENCE`].
pub(crate) fn wait_for(what: &str, is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    lab::wait_until(lab::patience(PATIENCE), what, is_so)
}

/// Stops a launcher, which would take over at once, and kills the keeper of `stays`. Waits until the tunnel has failed.
pub(crate) fn kill_keeper_of_stopped(running: &Running) -> Result<()> {
    send(running.launcher(), Signal::SIGSTOP)?;
    send(keeper()?, Signal::SIGKILL)?;
    wait_for("a killed keeper is not told", || Ok(status()?.state == Condition::Failed))
}
