//! A session bus with the services of a desktop, and the filter before it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use lab::world::FILES;
use lab::{Skip, patience, wait_until};
use vpn_exec::bus::{self, BusPolicy, BusRefusal, address};

/// The time after which a process is taken for hanging.
const PATIENCE: Duration = Duration::from_secs(30);

/// The real bus.
pub(crate) const BUS: &str = "unix:path=/run/lab/bus";
/// The address of the program's bus inside, the filter's.
pub(crate) const FILTER: &str = "unix:path=/run/lab/filter";

const PYTHON: &str = "/usr/bin/python3";
const NEEDED: [&str; 6] = [
    "/usr/bin/dbus-daemon",
    "/usr/bin/gdbus",
    "/usr/bin/notify-send",
    "/usr/bin/dbus-send",
    PYTHON,
    "/usr/lib/python3/dist-packages/gi",
];

/// A desktop's session bus, which allows everything and starts two services.
const CONFIGURATION: &str = r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path=/run/lab/bus</listen><servicedir>/run/lab/services</servicedir>
<policy context="default"><allow send_destination="*" eavesdrop="true"/>
<allow eavesdrop="true"/><allow own="*"/></policy>
<limit name="max_incoming_bytes">1000000000</limit><limit name="max_outgoing_bytes">1000000000</limit>
<limit name="max_message_size">1000000000</limit><limit name="max_replies_per_connection">50000</limit></busconfig>"#;

pub(crate) struct Desktop {
    daemon: Child,
    service: Child,
    filter: Option<Filter>,
}

struct Filter {
    refusals: Arc<Mutex<Vec<(BusRefusal, u64)>>>,
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

pub(crate) fn file(name: &str) -> PathBuf {
    Path::new(FILES).join(name)
}

impl Desktop {
    /// Starts the bus, the services and a filter with this policy.
    pub(crate) fn start(policy: BusPolicy) -> Result<Self> {
        if let Some(missing) = NEEDED.iter().find(|path| !Path::new(path).exists()) {
            return Err(Skip::error(format!("there is no {missing}"), lab::variables::REQUIRE_PEERS));
        }
        for (name, text) in [
            ("service.py", include_str!("service.py")),
            ("app.py", include_str!("app.py")),
            ("bus.conf", CONFIGURATION),
            ("log", ""),
            // Services that the bus starts.
            ("start", "#!/bin/sh\necho \"$1\" >>/run/lab/started\nexit 1\n"),
            ("started", ""),
        ] {
            fs::write(file(name), text)?;
        }
        make_executable(&file("start"))?;
        fs::create_dir_all(file("services"))?;
        for name in ["net.example.Fetcher", "org.freedesktop.secrets"] {
            let text = format!("[D-BUS Service]\nName={name}\nExec=/run/lab/start {name}\n");
            fs::write(file("services").join(format!("{name}.service")), text)?;
        }
        let daemon = Command::new("dbus-daemon")
            .args(["--config-file=/run/lab/bus.conf", "--nofork"])
            .stderr(Stdio::null())
            .spawn()?;
        wait_until(patience(PATIENCE), "the bus does not listen", || Ok(file("bus").exists()))?;
        let mut service = client(BUS, &[PYTHON, "/run/lab/service.py", "/run/lab/log"])
            .stdout(Stdio::piped())
            .spawn()
            .context("the services")?;
        let mut line = String::new();
        BufReader::new(service.stdout.take().context("a pipe")?).read_line(&mut line)?;
        ensure!(line == "ready\n", "the services do not start");
        let filter = Some(Filter::start(policy)?);
        Ok(Self { daemon, service, filter })
    }

    /// Returns the calls that reached the services, and empties the list.
    pub(crate) fn calls(&self) -> Result<String> {
        let text = fs::read_to_string(file("log"))?;
        File::create(file("log"))?;
        Ok(text)
    }

    /// Returns the refusals so far, without repetitions.
    pub(crate) fn refusals(&self) -> Vec<BusRefusal> {
        let all = self.filter.as_ref().map(|filter| filter.refusals.lock().expect("not poisoned").clone());
        all.into_iter().flatten().filter(|(_, times)| *times == 1).map(|(refusal, _)| refusal).collect()
    }

    /// Returns the number of refusals.
    pub(crate) fn refused(&self) -> usize {
        self.filter.as_ref().map_or(0, |filter| filter.refusals.lock().expect("not poisoned").len())
    }

    /// Ends the filter, which must not have failed.
    pub(crate) fn stop_filter(&mut self) -> Result<()> {
        let Some(mut filter) = self.filter.take() else { return Ok(()) };
        drop(filter.stop.take());
        let thread = filter.thread.take().context("a thread")?;
        thread.join().map_err(|_| anyhow!("the filter panicked"))?.context("the filter failed")
    }
}

impl Drop for Desktop {
    fn drop(&mut self) {
        let _ = self.stop_filter();
        for child in [&mut self.service, &mut self.daemon] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Filter {
    fn start(policy: BusPolicy) -> Result<Self> {
        let listener = UnixListener::bind(file("filter"))?;
        let addresses = address::parse(BUS)?;
        let (stop, stopped) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let refusals = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&refusals);
        let thread = std::thread::spawn(move || {
            let report =
                |refusal: &BusRefusal, times| seen.lock().expect("not poisoned").push((refusal.clone(), times));
            bus::serve(listener.as_fd(), || address::connect(&addresses), &policy, report, stop.as_fd())
        });
        Ok(Self { refusals, stop: Some(stopped), thread: Some(thread) })
    }
}

fn make_executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;

    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

/// Returns a command that uses a session bus. timeout(1) kills it if it hangs.
pub(crate) fn client(address: &str, command: &[&str]) -> Command {
    let mut client = Command::new("timeout");
    client.arg(patience(PATIENCE).as_secs().to_string()).args(command).stdin(Stdio::null());
    client.env("DBUS_SESSION_BUS_ADDRESS", address).env("XDG_RUNTIME_DIR", FILES).env("HOME", FILES);
    client.env("GSETTINGS_BACKEND", "memory").env("GIO_USE_VFS", "local").env("LC_ALL", "C");
    client
}

pub(crate) fn run(address: &str, command: &[&str]) -> Result<Output> {
    client(address, command).output().with_context(|| format!("{command:?}"))
}

/// Returns the output of a program that must succeed.
pub(crate) fn ask(address: &str, command: &[&str]) -> Result<String> {
    let output = run(address, command)?;
    ensure!(output.status.success(), "{command:?} at {address}: {}", said(&output));
    Ok(String::from_utf8(output.stdout)?)
}

/// Returns the output of a program that must fail.
pub(crate) fn fail(address: &str, command: &[&str]) -> Result<String> {
    let output = run(address, command)?;
    ensure!(!output.status.success(), "{command:?} at {address} ends well: {}", said(&output));
    ensure!(output.status.code() != Some(124), "{command:?} at {address} hangs");
    Ok(said(&output))
}

pub(crate) fn said(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    format!("{}: {}{}", output.status, text(&output.stdout), text(&output.stderr))
}

/// Returns a method call by gdbus(1).
pub(crate) fn call<'a>(name: &'a str, path: &'a str, method: &'a str, arguments: &[&'a str]) -> Vec<&'a str> {
    let mut command = vec!["gdbus", "call", "--session", "--dest", name, "--object-path", path, "--method", method];
    command.extend(arguments);
    command
}

/// Returns a method call of the bus itself.
pub(crate) fn call_of_bus<'a>(method: &'a str, arguments: &[&'a str]) -> Vec<&'a str> {
    call("org.freedesktop.DBus", "/org/freedesktop/DBus", method, arguments)
}

/// Returns a method call by dbus-send(1), which sends nothing else before.
pub(crate) fn send(name: &str, path: &str, method: &str) -> Vec<String> {
    let to = format!("--dest={name}");
    ["dbus-send", "--session", "--print-reply", &to, path, method].map(ToOwned::to_owned).into()
}
