//! The vpn-exec under test, and how tests run it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::agent::Agent;
use crate::shared::variables;
use crate::skip::Skip;
use crate::{patience, tunnel};

/// The time in which a program that does not hang ends on an ordinary machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Returns the vpn-exec under test: the one in the variable [`variables::BIN`], else the one that cargo has built with
/// the calling test, benchmark or example.
///
/// # Panics
/// If there is no such file.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match std::env::var_os(variables::BIN).filter(|path| !path.is_empty()) {
        Some(path) => path.into(),
        None => built("vpn-exec"),
    })
}

/// Returns the executable of the agent, which cargo builds with each test of vpn-exec.
///
/// # Panics
/// If there is no such file.
pub fn agent_binary() -> &'static Path {
    static AGENT: OnceLock<PathBuf> = OnceLock::new();
    AGENT.get_or_init(|| built("lab-agent"))
}

/// Returns a binary of the same build. Cargo puts binaries into the parent of the directory with tests, benchmarks
/// (`deps`) and examples (`examples`), and brings them up to date before it runs a test or a benchmark.
fn built(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a process knows its executable");
    let path = own.ancestors().nth(2).expect("a build has a directory").join(name);
    assert!(path.exists(), "{} does not exist: run `cargo build --bin {name}` first", path.display());
    path
}

/// Returns the vpn-exec of version 0.1.0 that `tests/previous/setup` has built.
///
/// # Errors
/// [`Skip`] if [`variables::PREVIOUS`] does not name it.
pub fn previous_binary() -> Result<PathBuf> {
    let named = std::env::var_os(variables::PREVIOUS).filter(|path| !path.is_empty());
    let missing = || Skip::error("VPN_EXEC_PREVIOUS is not set: see tests/previous/setup", variables::PREVIOUS);
    named.map(PathBuf::from).ok_or_else(missing)
}

/// Returns a command line of vpn-exec, such as `down NAME`.
pub fn vpn_exec<I: IntoIterator<Item: AsRef<OsStr>>>(arguments: I) -> Command {
    vpn_exec_at(binary(), arguments)
}

/// Returns a command line of another vpn-exec than the one under test.
pub fn vpn_exec_at<I: IntoIterator<Item: AsRef<OsStr>>>(binary: &Path, arguments: I) -> Command {
    let arguments: Vec<I::Item> = arguments.into_iter().collect();
    let mut command = Command::new(binary);
    command.args(tunnel::with_option(arguments.iter().map(AsRef::as_ref))).stdin(Stdio::null());
    command
}

/// A command line of vpn-exec that runs a program in a tunnel.
///
/// ```no_run
/// # fn example() -> lab::Result<()> {
/// let text = lab::Launcher::new("/run/lab/wg0.conf").option("--pty").program(["id", "-u"]).stdout()?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Launcher(Command);

impl Launcher {
    /// Begins a command line with a configuration file (`-` is standard input) and the backend that tests use.
    pub fn new(config: impl AsRef<OsStr>) -> Self {
        Self::with_backend(config, crate::backend())
    }

    /// Begins a command line with a configuration file and a backend.
    pub fn with_backend(config: impl AsRef<OsStr>, backend: &str) -> Self {
        Self(vpn_exec([OsStr::new("--config"), config.as_ref(), OsStr::new("--backend"), OsStr::new(backend)]))
    }

    /// Begins a command line that joins a tunnel, or makes the one of a profile.
    pub fn with_tunnel(name: &str) -> Self {
        Self(vpn_exec(["--tunnel", name]))
    }

    /// Adds an option.
    pub fn option(self, option: impl AsRef<OsStr>) -> Self {
        self.options([option])
    }

    /// Adds options. They must come before the program.
    pub fn options<I: IntoIterator<Item: AsRef<OsStr>>>(mut self, options: I) -> Self {
        self.0.args(options);
        self
    }

    /// Adds the program and its arguments.
    pub fn program<I: IntoIterator<Item: AsRef<OsStr>>>(mut self, words: I) -> Self {
        self.0.arg("--").args(words);
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.env(name, value);
        self
    }

    /// Removes an environment variable.
    pub fn env_remove(mut self, name: &str) -> Self {
        self.0.env_remove(name);
        self
    }

    /// Sets the working directory.
    pub fn current_dir(mut self, path: impl AsRef<Path>) -> Self {
        self.0.current_dir(path);
        self
    }

    /// Runs the agent as the program.
    ///
    /// # Errors
    /// If vpn-exec cannot be executed. Whether the agent begins is not waited for.
    pub fn start_agent(self) -> Result<Agent> {
        self.start_agent_at(agent_binary())
    }

    /// Runs a copy of the agent as the program.
    ///
    /// # Errors
    /// As [`Self::start_agent`].
    pub fn start_agent_at(self, agent: &Path) -> Result<Agent> {
        let mut command = self.command();
        Agent::start_at(command.arg("--"), agent)
    }

    /// Returns the command line, with an empty standard input.
    pub fn command(self) -> Command {
        self.0
    }

    /// Returns the words of the command line, for example for a terminal's session.
    pub fn words(&self) -> Vec<String> {
        let words = std::iter::once(self.0.get_program()).chain(self.0.get_args());
        words.map(|word| word.to_string_lossy().into_owned()).collect()
    }

    /// Returns the command line as text for a shell.
    pub fn line(&self) -> String {
        let quoted = |word: String| format!("'{}'", word.replace('\'', r"'\''"));
        self.words().into_iter().map(quoted).collect::<Vec<_>>().join(" ")
    }

    /// Starts vpn-exec. Its standard output is a pipe, and its standard error is the test's.
    ///
    /// # Errors
    /// If it cannot be executed.
    pub fn start(mut self) -> Result<Child> {
        self.0.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start {:?}", self.0))
    }

    /// Runs vpn-exec until it ends.
    ///
    /// # Errors
    /// If it cannot be executed or hangs.
    pub fn run(self) -> Result<Output> {
        run(self.0)
    }

    /// Runs vpn-exec, which must succeed, and returns its standard output.
    ///
    /// # Errors
    /// As [`Self::run`], and if it fails.
    pub fn stdout(self) -> Result<String> {
        stdout(self.0)
    }
}

impl From<Launcher> for Command {
    fn from(launcher: Launcher) -> Self {
        launcher.command()
    }
}

/// Runs a command until it ends, and collects its output.
///
/// # Errors
/// If it cannot be executed or hangs.
pub fn run(mut command: Command) -> Result<Output> {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    output_of(child.with_context(|| format!("cannot start {command:?}"))?).with_context(|| format!("{command:?}"))
}

/// Runs a command, which must succeed, and returns its standard output.
///
/// # Errors
/// If it cannot be executed, hangs or fails.
pub fn stdout(command: Command) -> Result<String> {
    let line = format!("{command:?}");
    let output = run(command)?;
    ensure!(output.status.success(), "{line} failed: {}", text_of(&output));
    Ok(String::from_utf8(output.stdout)?)
}

/// Waits until a process ends, and collects its output. Kills the process if it hangs.
///
/// # Errors
/// If it hangs.
pub fn output_of(child: Child) -> Result<Output> {
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    match receiver.recv_timeout(patience(PATIENCE)) {
        Ok(output) => Ok(output?),
        Err(_) => {
            // The process may end this very moment.
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            bail!("the process {pid} hangs");
        }
    }
}

/// Waits until a process ends. Kills the process if it hangs.
///
/// # Errors
/// If it hangs.
pub fn wait_for_end(child: &mut Child) -> Result<ExitStatus> {
    let deadline = Instant::now() + patience(PATIENCE);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() > deadline {
            child.kill()?;
            bail!("the process {} hangs", child.id());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Returns the exit status and all output of a command, for messages.
pub fn text_of(output: &Output) -> String {
    format!("{}: {}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Returns the standard error of a command.
pub fn errors_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
