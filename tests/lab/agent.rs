//! The lab's program inside a tunnel, `lab-agent`: it performs the acts that a test sends line by line, and answers
//! with the results. Its answers prove what works; only the [`Capture`](crate::Capture) proves that nothing leaks.
//!
//! Its source is in `tests/agent`. [`Agent`] is the test's end of the conversation. A task, in contrast, is given to
//! the agent as arguments (see [`task`]), and its result is a line on standard output.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv6Addr, UdpSocket};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use vpn_exec::linux::namespace::NetworkNamespace;

use crate::launcher::agent_binary;
use crate::patience;
use crate::shared::protocol::{ANSWER, BEGUN, PATIENTLY, REPORT};

/// The time in which the agent answers unless it hangs.
const ANSWERED: Duration = Duration::from_secs(60);

/// Returns the command line by which the agent performs a task, such as `exit 3`.
pub fn task(words: &str) -> Vec<OsString> {
    let mut line = vec![agent_binary().into(), "task".into()];
    line.extend(words.split(' ').map(OsString::from));
    line
}

/// Returns a command that performs a task on the host, without any input or output.
pub fn task_on_host(words: &str) -> Command {
    let line = task(words);
    let mut command = Command::new(&line[0]);
    command.args(&line[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Reads a task's report from the standard output of a process. Returns `None` if the process ends without one.
///
/// # Errors
/// If the report is not of that type.
pub fn report_of<T: serde::de::DeserializeOwned>(child: &mut Child) -> Result<Option<T>> {
    let stdout = child.stdout.take().context("standard output is a pipe")?;
    for line in BufReader::new(stdout).lines() {
        if let Some(report) = line?.strip_prefix(REPORT) {
            return Ok(Some(serde_json::from_str(report)?));
        }
    }
    Ok(None)
}

/// Sends datagrams back to their senders, on a thread, and keeps a record of them.
#[derive(Debug)]
pub struct Echo {
    seen: Arc<Mutex<Vec<String>>>,
}

impl Echo {
    /// Starts on a port of all addresses of a namespace.
    ///
    /// # Errors
    /// If the port is taken.
    pub fn start(site: &NetworkNamespace, port: u16) -> Result<Self> {
        let socket = site.run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)))?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        std::thread::spawn(move || {
            let mut buffer = [0; 65536];
            loop {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
                let text = String::from_utf8_lossy(&buffer[..length.min(64)]).into_owned();
                log.lock().unwrap_or_else(PoisonError::into_inner).push(text);
                let _ = socket.send_to(&buffer[..length], from);
            }
        });
        Ok(Self { seen })
    }

    /// Returns the first 64 bytes of each datagram so far, in order.
    pub fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A running agent, or the vpn-exec that runs it. Dropping it kills the process.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    input: Option<ChildStdin>,
    answers: mpsc::Receiver<String>,
    errors: Option<std::thread::JoinHandle<String>>,
}

impl Agent {
    /// Starts the agent on the host.
    ///
    /// # Errors
    /// If it cannot be executed.
    pub fn on_host() -> Result<Self> {
        Self::start(&mut Command::new("env"))
    }

    /// Starts a command that executes its last arguments, to which the agent's command line is appended.
    ///
    /// # Errors
    /// If it cannot be executed.
    pub fn start(command: &mut Command) -> Result<Self> {
        Self::start_at(command, agent_binary())
    }

    /// [`Self::start`] with a copy of the agent.
    ///
    /// # Errors
    /// If it cannot be executed.
    pub fn start_at(command: &mut Command, agent: &Path) -> Result<Self> {
        command.arg(agent).arg("act").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let (sender, answers) = mpsc::channel();
        let output = child.stdout.take().context("standard output is a pipe")?;
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(io::Result::ok) {
                if let Some(answer) = line.strip_prefix(ANSWER)
                    && sender.send(answer.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        let errors = child.stderr.take().context("standard error is a pipe")?;
        let errors = std::thread::spawn(move || io::read_to_string(errors).unwrap_or_default());
        Ok(Self { input: child.stdin.take(), child, answers, errors: Some(errors) })
    }

    /// Returns the ID of the process that was started: the launcher's, or the agent's own on the host.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Waits for the agent to begin, and returns whether it has. To be called once.
    pub fn begins_within(&self, patience: Duration) -> bool {
        self.answers.recv_timeout(patience).is_ok_and(|answer| answer == BEGUN)
    }

    /// Waits for the agent to begin.
    ///
    /// # Errors
    /// If it does not.
    pub fn begun(self) -> Result<Self> {
        if self.begins_within(patience(ANSWERED)) {
            return Ok(self);
        }
        bail!("the agent did not begin: {:?}", self.finish()?)
    }

    /// Performs an act, and returns its result or the name of its error.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn act(&mut self, act: &str) -> Result<Result<String, String>> {
        writeln!(self.input.as_mut().context("the agent has been told to end")?, "{act}")?;
        let answer =
            self.answers.recv_timeout(patience(ANSWERED)).map_err(|error| anyhow!("no answer to {act:?}: {error}"))?;
        Ok(match answer.split_once(' ') {
            Some(("ok", text)) => Ok(text.to_owned()),
            Some((_, error)) => Err(error.to_owned()),
            None if answer == "ok" => Ok(String::new()),
            None => bail!("invalid answer of the agent: {answer:?}"),
        })
    }

    /// Performs an act that must succeed, however long it takes.
    ///
    /// # Errors
    /// If it fails.
    pub fn succeed(&mut self, act: &str) -> Result<String> {
        self.act(&format!("{PATIENTLY} {act}"))?.map_err(|error| anyhow!("{act:?} fails: {error}"))
    }

    /// Performs an act that must fail, and returns the name of its error.
    ///
    /// # Errors
    /// If it succeeds.
    pub fn fail(&mut self, act: &str) -> Result<String> {
        match self.act(act)? {
            Err(error) => Ok(error),
            Ok(text) => bail!("{act:?} must fail, but succeeds: {text:?}"),
        }
    }

    /// Repeats an act until it succeeds.
    ///
    /// # Errors
    /// If it does not succeed within `usual`, on an ordinary machine.
    pub fn succeed_within(&mut self, usual: Duration, act: &str) -> Result<String> {
        let deadline = Instant::now() + patience(usual);
        loop {
            match self.act(act)? {
                Ok(text) => return Ok(text),
                Err(error) if Instant::now() > deadline => bail!("{act:?} fails for {usual:?}: {error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Waits for the end of the process, and returns its exit status and its standard error.
    ///
    /// # Errors
    /// If it hangs.
    pub fn end(mut self) -> Result<(ExitStatus, String)> {
        let deadline = Instant::now() + patience(ANSWERED);
        let status = loop {
            match self.child.try_wait()? {
                Some(status) => break status,
                None if Instant::now() > deadline => bail!("the process {} does not end", self.pid()),
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        let errors = self.errors.take().map(std::thread::JoinHandle::join);
        Ok((status, errors.and_then(std::result::Result::ok).unwrap_or_default()))
    }

    /// Tells the agent to end, and waits for it as [`Self::end`] does.
    ///
    /// # Errors
    /// If it hangs.
    pub fn finish(mut self) -> Result<(ExitStatus, String)> {
        drop(self.input.take());
        self.end()
    }

    /// Tells the agent to end. It, and vpn-exec, must succeed; returns what they wrote to standard error.
    ///
    /// # Errors
    /// If one of them fails or hangs.
    pub fn finish_well(self) -> Result<String> {
        let (status, errors) = self.finish()?;
        if !status.success() {
            bail!("the agent or its launcher failed, {status}: {errors}");
        }
        Ok(errors)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Where the test went well, the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
