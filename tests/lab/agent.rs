//! The lab's man inside: a program that does what a test tells it, line by line, and says what came of it. What it says is
//! evidence of what works; of leaks, only the [`Capture`](crate::Capture) is.
//!
//! It is the test's own executable, run again, so nothing has to be installed for it. A test file that uses it has
//!
//! ```no_run
//! #[test]
//! #[ignore = "the program that other tests run"]
//! fn agent() {
//!     lab::agent::serve();
//! }
//! ```
//!
//! The acts that are nobody's ordinary business are in `trespass`.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs, UdpSocket};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::Netlink;

use crate::{dns, http, patience, trespass};

/// What begins the agent's answers, to tell them from what the test harness prints.
const ANSWER: &str = "agent: ";

/// The first answer, which nobody has asked for.
const BEGUN: &str = "begun";

/// What a test puts before an act that must succeed.
const PATIENTLY: &str = "patiently";

/// Whether the act that is performed must succeed.
static IS_PATIENT: AtomicBool = AtomicBool::new(false);

/// How long an act waits for a packet. What may never come is waited for as long as usual; what must come as long as a machine may take
/// that does other things meanwhile.
pub(crate) fn reply_time(usual: Duration) -> Duration {
    patience(if IS_PATIENT.load(Ordering::Relaxed) { MUST_COME.max(usual) } else { usual })
}

/// How long a packet is waited for that must come.
const MUST_COME: Duration = Duration::from_secs(20);

/// How long one is waited for that may never come.
const MAY_COME: Duration = Duration::from_millis(700);

/// How long a test waits for an answer of the agent: so long that only one that hangs is given up.
const ANSWERED: Duration = Duration::from_secs(60);

/// The arguments that make an executable with tests run its agent.
pub const ARGUMENTS: [&str; 5] = ["agent", "--exact", "--ignored", "--nocapture", "--test-threads=1"];

/// The agent's life: reads acts from standard input until that ends.
pub fn serve() {
    serve_with(perform);
}

/// [`serve`] for a test with acts of its own, of which each is given as its words.
pub fn serve_with(mut perform: impl FnMut(&[&str]) -> io::Result<String>) {
    // Not by `println`, which the test harness may keep to itself.
    let mut out = io::stdout();
    let mut say = |text: &str| writeln!(out, "\n{ANSWER}{text}").and_then(|()| out.flush());
    if say(BEGUN).is_err() {
        return;
    }
    for line in io::stdin().lines() {
        let Ok(line) = line else { return };
        let mut words: Vec<&str> = line.split(' ').collect();
        let is_patient = words.first() == Some(&PATIENTLY);
        IS_PATIENT.store(is_patient, Ordering::Relaxed);
        words.drain(..usize::from(is_patient));
        let answer = match perform(&words) {
            Ok(text) => format!("ok {}", text.escape_default()),
            Err(error) => format!("error {}", name_of(&error)),
        };
        if say(&answer).is_err() {
            return;
        }
    }
}

/// An error by the kernel's name where it has one.
fn name_of(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => format!("{:?}", nix::Error::from_raw(number)),
        None => format!("{:?}: {error}", error.kind()),
    }
}

/// Does what every agent can.
pub fn perform(words: &[&str]) -> io::Result<String> {
    match words {
        ["get", url] => Ok(http::get(url, reply_time(MAY_COME))?.trim_end().to_owned()),
        ["digest", url] => Ok(digest(&http::get(url, reply_time(10 * MAY_COME))?)),
        ["lookup", server, name] => {
            Ok(format!("{:?}", dns::lookup(parsed(server)?, name, dns::A, reply_time(MAY_COME))?))
        }
        ["resolve", name] => resolve(name),
        ["echo", to, size] => echo(parsed(to)?, parsed(size)?),
        ["links"] => links(),
        ["addresses"] => addresses(),
        ["routes"] => routes(),
        ["serve", port, text] => serve_page(parsed(port)?, text),
        _ => trespass::perform(words),
    }
}

/// A word of an act, read.
pub(crate) fn parsed<T: std::str::FromStr>(word: &str) -> io::Result<T> {
    word.parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("{word:?} cannot be read")))
}

/// The length and a checksum (FNV-1a, 64 bits) of a text.
pub fn digest(text: &str) -> String {
    let sum = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{} bytes, {sum:016x}", text.len())
}

/// Looks a name up as every program does it.
fn resolve(name: &str) -> io::Result<String> {
    let mut found: Vec<IpAddr> = (name, 0).to_socket_addrs()?.map(|address| address.ip()).collect();
    found.sort_unstable();
    found.dedup();
    Ok(found.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" "))
}

/// Sends a datagram with so many bytes of payload, which nobody may cut, and waits for it to come back.
fn echo(to: SocketAddr, size: usize) -> io::Result<String> {
    use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};

    let socket = UdpSocket::bind((unspecified(to), 0))?;
    match to {
        SocketAddr::V4(_) => sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DO)?,
        SocketAddr::V6(_) => sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::DO)?,
    }
    socket.set_read_timeout(Some(reply_time(MAY_COME)))?;
    socket.connect(to)?;
    let sent: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
    socket.send(&sent)?;
    let mut buffer = [0; 65536];
    let length = socket.recv(&mut buffer)?;
    Ok(if buffer[..length] == sent { "the same".into() } else { format!("{length} other bytes") })
}

/// The address that stands for any of the same family.
pub(crate) fn unspecified(like: SocketAddr) -> IpAddr {
    if like.is_ipv4() { [0, 0, 0, 0].into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

fn links() -> io::Result<String> {
    let links = Netlink::open()?.links()?;
    Ok(links.iter().map(|link| format!("{} {}", link.name, link.mtu)).collect::<Vec<_>>().join(", "))
}

fn addresses() -> io::Result<String> {
    let mut netlink = Netlink::open()?;
    let links = netlink.links()?;
    let name = |index| links.iter().find(|link| link.index == index).map_or("?", |link| &link.name);
    let addresses = netlink.addresses()?;
    Ok(addresses.iter().map(|(index, net)| format!("{} {net}", name(*index))).collect::<Vec<_>>().join(", "))
}

/// The routes of the main table: where to, and by which interface.
fn routes() -> io::Result<String> {
    let mut netlink = Netlink::open()?;
    let links = netlink.links()?;
    let name = |index| links.iter().find(|link| Some(link.index) == index).map_or("?", |link| &link.name);
    let routes = netlink.routes()?.into_iter().filter(|route| route.table == u32::from(libc::RT_TABLE_MAIN));
    Ok(routes.map(|route| format!("{} {}", name(route.interface), route.destination)).collect::<Vec<_>>().join(", "))
}

/// Serves a page at a port of all addresses, on a thread.
fn serve_page(port: u16, text: &str) -> io::Result<String> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    let text = text.to_owned();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut lines = BufReader::new(&stream).lines();
            while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
            let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len());
        }
    });
    Ok("serving".into())
}

/// Answers datagrams by sending them back, on a thread, and keeps a record of them.
#[derive(Debug)]
pub struct Echo {
    seen: Arc<Mutex<Vec<String>>>,
}

impl Echo {
    /// Listens at a port of all addresses that a namespace has.
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

    /// How the datagrams that came so far begin, in order.
    pub fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A running agent, or what runs it: vpn-exec. Killed when it is dropped.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    input: Option<ChildStdin>,
    answers: mpsc::Receiver<String>,
    complaints: Option<std::thread::JoinHandle<String>>,
}

impl Agent {
    /// Runs the agent of the calling executable with `launcher`, which gets its command line as its last arguments; without
    /// a launcher (`None`) it runs where the test does.
    pub fn start(launcher: Option<Command>) -> Result<Self> {
        Self::start_from(launcher, &std::env::current_exe()?)
    }

    /// [`Self::start`] with another copy of the executable.
    pub fn start_from(launcher: Option<Command>, executable: &Path) -> Result<Self> {
        let mut command = match launcher {
            Some(mut launcher) => {
                launcher.arg(executable);
                launcher
            }
            None => Command::new(executable),
        };
        command.args(ARGUMENTS).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
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
        let complaints = std::thread::spawn(move || io::read_to_string(errors).unwrap_or_default());
        Ok(Self { input: child.stdin.take(), child, answers, complaints: Some(complaints) })
    }

    /// The number of the process that was started.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Whether the program has begun by now, or begins within `patience`. Asked once.
    pub fn begins_within(&self, patience: Duration) -> bool {
        self.answers.recv_timeout(patience).is_ok_and(|answer| answer == BEGUN)
    }

    /// Waits for the program to begin.
    pub fn begun(self) -> Result<Self> {
        if self.begins_within(patience(ANSWERED)) {
            return Ok(self);
        }
        bail!("the program did not begin: {:?}", self.finish()?)
    }

    /// Has the agent do something: what came of it, or the name of the error.
    pub fn act(&mut self, act: &str) -> Result<Result<String, String>> {
        writeln!(self.input.as_mut().context("the agent was told to end")?, "{act}")?;
        let answer =
            self.answers.recv_timeout(patience(ANSWERED)).map_err(|error| anyhow!("no answer to {act:?}: {error}"))?;
        Ok(match answer.split_once(' ') {
            Some(("ok", text)) => Ok(text.to_owned()),
            Some((_, error)) => Err(error.to_owned()),
            None if answer == "ok" => Ok(String::new()),
            None => bail!("the agent says {answer:?}"),
        })
    }

    /// [`Self::act`] of something that must succeed, and may take its time.
    pub fn succeed(&mut self, act: &str) -> Result<String> {
        self.act(&format!("{PATIENTLY} {act}"))?.map_err(|error| anyhow!("{act:?} fails: {error}"))
    }

    /// [`Self::act`] of something that must fail: the name of the error.
    pub fn fail(&mut self, act: &str) -> Result<String> {
        match self.act(act)? {
            Err(error) => Ok(error),
            Ok(text) => bail!("{act:?} must fail, and brought {text:?}"),
        }
    }

    /// Has the agent try something until it succeeds, for so long on an ordinary machine.
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

    /// Waits for the end without asking for it.
    pub fn end(mut self) -> Result<(ExitStatus, String)> {
        let deadline = Instant::now() + patience(ANSWERED);
        let status = loop {
            match self.child.try_wait()? {
                Some(status) => break status,
                None if Instant::now() > deadline => bail!("the process {} does not end", self.pid()),
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        let complaints = self.complaints.take().map(std::thread::JoinHandle::join);
        Ok((status, complaints.and_then(std::result::Result::ok).unwrap_or_default()))
    }

    /// Lets the agent end, and waits for that: the exit status, and what was written to standard error.
    pub fn finish(mut self) -> Result<(ExitStatus, String)> {
        drop(self.input.take());
        self.end()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A command line of vpn-exec that runs what is appended to it.
pub fn launcher(vpn_exec: &str, config: &Path, options: &[&str]) -> Command {
    let mut command = Command::new(vpn_exec);
    command.arg("--config").arg(config).args(["--backend", crate::backend()]).args(options).arg(OsString::from("--"));
    command
}
