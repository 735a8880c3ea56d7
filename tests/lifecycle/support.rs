//! What all tests here share: how vpn-exec is run, what it runs, and how both are watched.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::{Skip, Snapshot};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill, raise};
use nix::unistd::Pid;
use vpn_exec::linux::netlink::Netlink;
use vpn_exec::linux::netlink::link::Link;
use vpn_exec::linux::tun;
use vpn_exec::registry::{self, TunnelState};

/// Tells hanging from working: nothing here takes a tenth of it on an idle machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// How long what was abandoned may take to be gone. It is gone in milliseconds; but the kernel removes the namespaces of
/// all the machine one after another.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// Says what this executable is to do when vpn-exec runs it: see [`program`].
pub(crate) const TASK: &str = "VPN_EXEC_TEST_TASK";

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
    if let Err(error) = fs::File::options().read(true).write(true).open(tun::DEVICE) {
        let reason = format!("{} cannot be opened: {error}", tun::DEVICE);
        return Err(Skip { reason, unless: "VPN_EXEC_REQUIRE_TUN" }.into());
    }
    write_config(CONFIG_TEXT)
}

/// Writes another provider's file in place of the usual one.
pub(crate) fn write_config(text: &str) -> Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(CONFIG)?;
    Ok(file.write_all(text.as_bytes())?)
}

/// `vpn-exec` with the options that every tunnel here has.
pub(crate) fn bare(name: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vpn-exec"));
    command.args(["--config", CONFIG, "--backend", lab::backend(), "--name", name]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// `vpn-exec` that has this executable do a task (see [`program`]) in a tunnel.
pub(crate) fn vpn_exec(name: &str, task: &str) -> Command {
    let mut command = bare(name);
    run_this(&mut command, task);
    command
}

/// Ends a command line of vpn-exec with this executable and a task for it.
pub(crate) fn run_this(command: &mut Command, task: &str) {
    command.arg("--").arg(this()).args(ARGUMENTS).env(TASK, task);
}

/// The variable with the addresses to which a task sends all the time, if it is to.
pub(crate) const SENDS: &str = "VPN_EXEC_TEST_SENDS";

/// How the test harness is told to run [`program`] and to keep out of the way.
pub(crate) const ARGUMENTS: [&str; 4] = ["program", "--exact", "--nocapture", "--test-threads=1"];

/// This executable.
pub(crate) fn this() -> PathBuf {
    std::env::current_exe().expect("the executable of a running process is known")
}

/// Does the task that the environment names:
/// `exit N`, `die N` (by signal N), `report` (see [`Seen`]), `wait` (says so, then sleeps), `nap` (sleeps a moment),
/// `daemon` (leaves a grandchild behind that sleeps, in a session of its own, then sleeps itself), `hook FILE` (adds what it
/// sees to a file), and, on the way to vpn-exec itself, `files N` (limits the open files) and `no-run` (goes where there is no
/// /run), which then execute what is in `VPN_EXEC_TEST_THEN`.
pub(crate) fn program() {
    let Ok(task) = std::env::var(TASK) else { return };
    let (task, argument) = task.split_once(' ').unwrap_or((&task, ""));
    let number = || argument.parse::<i32>().expect("the task has a number");
    if let Ok(targets) = std::env::var(SENDS) {
        std::thread::spawn(move || send_on(&targets));
    }
    match task {
        "exit" => std::process::exit(number()),
        "die" => {
            let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
            raise(Signal::try_from(number()).expect("a signal")).expect("it can be raised");
        }
        "report" => println!("\nsaid: {}", Seen::now().text()),
        "wait" => {
            println!("\nsaid: {}", Seen::now().text());
            std::thread::sleep(Duration::from_secs(1000));
        }
        "nap" => std::thread::sleep(Duration::from_millis(20)),
        "daemon" => {
            let mut child = this_with("detach").spawn().expect("a child");
            child.wait().expect("it ends");
            println!("\nsaid: {}", Seen::now().text());
            std::thread::sleep(Duration::from_secs(1000));
        }
        "detach" => {
            nix::unistd::setsid().expect("a child leads no group");
            let grandchild = this_with("daemonized").spawn();
            // It is left behind on purpose, to a parent of whom it does not know.
            std::mem::forget(grandchild.expect("a grandchild"));
        }
        "daemonized" => std::thread::sleep(Duration::from_secs(1000)),
        "hook" => {
            let line = Seen::now().text() + "\n";
            let mut file = fs::File::options().append(true).create(true).open(argument).expect("the hook's file");
            file.write_all(line.as_bytes()).expect("it can be written");
        }
        "files" => {
            let limit = u64::try_from(number()).expect("a limit");
            setrlimit(Resource::RLIMIT_NOFILE, limit, limit).expect("a lower limit is always possible");
            go_on();
        }
        "no-run" => {
            crate::obstacles::leave_run().expect("a root without /run");
            go_on();
        }
        other => panic!("what is {other:?}?"),
    }
    std::process::exit(0);
}

/// Sends a datagram to each of some addresses every millisecond, until the process ends. That it fails is what is hoped for.
fn send_on(targets: &str) {
    let targets: Vec<SocketAddr> =
        targets.split(' ').map(|target| target.parse().expect("an address and a port")).collect();
    loop {
        for target in &targets {
            let local = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let _ = UdpSocket::bind(local).and_then(|socket| socket.send_to(b"chaos", target));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn this_with(task: &str) -> Command {
    let mut command = Command::new(this());
    command.args(ARGUMENTS).env(TASK, task).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Executes, in place of this process, the command in the environment.
fn go_on() {
    let text = std::env::var("VPN_EXEC_TEST_THEN").expect("the command to go on with");
    let command: Vec<String> = serde_json::from_str(&text).expect("a list of texts");
    let error = Command::new(&command[0]).args(&command[1..]).exec();
    panic!("cannot go on with {}: {error}", command[0]);
}

/// This executable, which does a task first and goes on as `then`.
pub(crate) fn by_way_of(task: &str, then: &Command) -> Result<Command> {
    let words = std::iter::once(then.get_program()).chain(then.get_args());
    let words: Vec<&str> = words.map(|word| word.to_str().context("not UTF-8")).collect::<Result<_>>()?;
    let mut command = this_with(task);
    command.env("VPN_EXEC_TEST_THEN", serde_json::to_string(&words)?);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

/// What a program sees of its surroundings.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Seen {
    pub(crate) pid: i32,
    /// Which hook it is, if any: the variable `WHICH`.
    pub(crate) which: String,
    /// The number of its network namespace.
    pub(crate) namespace: u64,
    /// The interfaces in it, and whether they are up.
    pub(crate) interfaces: Vec<(String, bool)>,
    /// The lines of capabilities in its /proc/self/status: name and number.
    pub(crate) capabilities: Vec<(String, u64)>,
    /// Where its descriptors lead, but for those that the question itself takes.
    pub(crate) descriptors: Vec<(i32, String)>,
}

impl Seen {
    fn now() -> Self {
        let mut interfaces = Netlink::open().and_then(|mut netlink| netlink.links()).expect("a list of interfaces");
        interfaces.sort_by(|one, other| one.name.cmp(&other.name));
        let status = fs::read_to_string("/proc/self/status").expect("a status");
        let capabilities = status.lines().filter(|line| line.starts_with("Cap")).filter_map(|line| {
            let (name, number) = line.split_once(':')?;
            Some((name.to_owned(), u64::from_str_radix(number.trim(), 16).ok()?))
        });
        let descriptors = fs::read_dir("/proc/self/fd").expect("a list of descriptors").filter_map(|entry| {
            let path = entry.ok()?.path();
            let target = fs::read_link(&path).ok()?.display().to_string();
            // The list itself is one, too.
            let number = path.file_name()?.to_str()?.parse().ok()?;
            (!target.ends_with("/fd")).then_some((number, target))
        });
        Self {
            pid: std::process::id().cast_signed(),
            which: std::env::var("WHICH").unwrap_or_default(),
            namespace: fs::metadata("/proc/self/ns/net").expect("a namespace").ino(),
            interfaces: interfaces.into_iter().map(|link| (link.name, link.up)).collect(),
            capabilities: capabilities.collect(),
            descriptors: descriptors.collect(),
        }
    }

    fn text(&self) -> String {
        serde_json::to_string(self).expect("it has only texts and numbers")
    }
}

/// A running vpn-exec, whose program has begun.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) program: Seen,
    pub(crate) state: TunnelState,
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
    let Some(program) = said(&mut child)? else {
        bail!("vpn-exec has ended too early: {:?}", output_of(child)?);
    };
    let state = registry::read(&name.parse()?)?.context("a running tunnel has a state")?;
    Ok(Running { child, program, state })
}

/// What the program of a vpn-exec says; nothing if it ends before.
fn said(child: &mut Child) -> Result<Option<Seen>> {
    let stdout = child.stdout.take().context("a piped output")?;
    for line in BufReader::new(stdout).lines() {
        if let Some(said) = line?.strip_prefix("said: ") {
            return Ok(Some(serde_json::from_str(said)?));
        }
    }
    Ok(None)
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

/// The processes in which this executable does a task, vpn-exec's own excepted.
pub(crate) fn doing(task: &str) -> Result<Vec<i32>> {
    let (this, wanted) = (this(), format!("{TASK}={task}"));
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let Some(pid) = path.file_name().and_then(|name| name.to_str()?.parse().ok()) else { continue };
        let runs_this = fs::read_link(path.join("exe")).is_ok_and(|exe| exe == this);
        let environment = fs::read(path.join("environ")).unwrap_or_default();
        if runs_this && environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes()) {
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
