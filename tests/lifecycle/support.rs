//! What all tests here share: how vpn-exec is run, what it runs, and how both are watched.

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
use vpn_exec::linux::netlink::Netlink;
use vpn_exec::linux::netlink::link::Link;
use vpn_exec::registry::{self, State};

/// Tells hanging from working: nothing here takes a tenth of it on an idle machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// How long what was abandoned may take to be gone. It is gone in milliseconds; but the kernel removes the namespaces of
/// all the machine one after another.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// The provider's file. Nobody is at its endpoint.
pub(crate) const CONFIG: &str = "/run/lab/provider.conf";

/// Its text; the keys are arbitrary.
pub(crate) const CONFIG_TEXT: &str = "[Interface]\n\
    PrivateKey = yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=\n\
    Address = 10.64.0.2/32, fd64::2/128\n\
    DNS = 10.64.0.1\n\
    [Peer]\n\
    PublicKey = xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=\n\
    AllowedIPs = 0.0.0.0/0, ::/0\n\
    Endpoint = 192.0.2.1:51820\n";

/// Makes the world ready for vpn-exec: its configuration is there.
pub(crate) fn prepare() -> Result<()> {
    lab::require_tun()?;
    write_config(CONFIG_TEXT)
}

/// Writes another provider's file in place of the usual one.
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

/// A running vpn-exec, whose program has begun.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) program: Surroundings,
    pub(crate) state: State,
}

impl Running {
    /// The veth's end on the host, which carries the tunnel's mark.
    pub(crate) fn host_link(&self) -> Result<Link> {
        let mark = self.state.mark.text();
        let links = Netlink::open()?.links()?;
        links.into_iter().find(|link| link.alias.as_deref() == Some(mark)).context("a link with the mark")
    }
}

/// Starts vpn-exec and waits until its program runs.
pub(crate) fn start(name: &str, task: &str) -> Result<Running> {
    started(vpn_exec(name, task), name)
}

/// [`start`] with a command of one's own, whose program says what it sees.
pub(crate) fn started(mut command: Command, name: &str) -> Result<Running> {
    let mut child = command.spawn()?;
    let Some(program) = agent::report_of(&mut child)? else {
        bail!("vpn-exec has ended too early: {:?}", output_of(child)?);
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

    /// Ends the program by a signal, and waits for vpn-exec.
    pub(crate) fn end(self) -> Result<Output> {
        send(self.program.pid, Signal::SIGTERM)?;
        output_of(self.child)
    }
}

/// Sends a signal to one process.
pub(crate) fn send(pid: i32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(pid), signal).with_context(|| format!("cannot send {signal} to {pid}"))
}

/// Runs a command to its end, which must come in time.
pub(crate) fn run(mut command: Command) -> Result<Output> {
    output_of(command.spawn()?)
}

/// Waits for the end of a vpn-exec, which must come in time.
pub(crate) fn output_of(mut child: Child) -> Result<Output> {
    let deadline = Instant::now() + lab::patience(PATIENCE);
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            bail!("it hangs: {:?}", child.wait_with_output()?);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(child.wait_with_output()?)
}

/// Whether it ended by a signal, and then by which, or with which status.
pub(crate) fn ended(status: ExitStatus) -> Result<i32, Signal> {
    match (status.code(), status.signal()) {
        (Some(code), _) => Ok(code),
        (None, signal) => Err(Signal::try_from(signal.unwrap_or_default()).expect("a signal")),
    }
}

pub(crate) fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Demands that vpn-exec itself has failed, with one clear message, which is returned: one line of what and why, and at most
/// one of what to do.
pub(crate) fn assert_refused(output: &Output) -> String {
    let text = errors(output);
    assert_eq!(ended(output.status), Ok(125), "{text}");
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("vpn-exec: warning: ")).collect();
    assert!((1..=2).contains(&lines.len()) && lines.iter().all(|line| line.starts_with("vpn-exec: ")), "{text}");
    text
}

/// Demands that the host is as it was, once the kernel has taken the links away.
pub(crate) fn assert_unchanged(before: &Snapshot, when: impl std::fmt::Display) -> Result<()> {
    let changes = before.changes_within(SOON)?;
    ensure!(changes.is_empty(), "{when}, this is different: {changes:#?}");
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

/// Waits until nobody does any of the tasks.
pub(crate) fn assert_none_soon(tasks: &[&str], when: impl std::fmt::Display) -> Result<()> {
    let deadline = Instant::now() + lab::patience(SOON);
    loop {
        let alive = tasks.iter().map(|task| doing(task)).collect::<Result<Vec<_>>>()?.concat();
        if alive.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{when}, these live on: {alive:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether there is a path, even as a symbolic link to nowhere.
pub(crate) fn is_there(path: impl AsRef<Path>) -> bool {
    fs::symlink_metadata(path).is_ok()
}
