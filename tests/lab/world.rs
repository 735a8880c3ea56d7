//! A world for one test: new user, mount, PID and network namespaces, in which the test is root, and which end with it.
//!
//! The test's executable is run again, for that one test, inside the world (see `nest`): what [`test()`] is given runs in
//! that second process, and the first only waits for it and passes on what it says.

use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::mount::{MountFlags, MountPropagationFlags};
use vpn_exec::linux::mounts;
use vpn_exec::linux::netlink::Netlink;

use crate::internet::ROUTER;
use crate::{nest, patience};

/// A directory in the world for files of the lab's and of tests: it vanishes with the world, however that ends.
pub const FILES: &str = "/run/lab";

/// Tells a process that it is inside. Programs that the test starts inherit it, and do not care.
const MARKER: &str = "VPN_EXEC_LAB";

/// What the process inside prints when it begins with the test. If the executable has no test of the name, it never does.
const BEGUN: &str = "lab: in a world of its own";

/// What a test's output says when it was skipped.
const SKIPPED: &str = "skipped: ";

/// How long a test may take on an ordinary machine.
pub const TIME_LIMIT: Duration = Duration::from_secs(120);

/// A limit on this machine, in seconds.
fn seconds(limit: Duration) -> u32 {
    patience(limit).as_secs().try_into().unwrap_or(u32::MAX)
}

/// Why a test cannot be run on this machine.
#[derive(Debug)]
pub struct Skip {
    /// What is missing.
    pub reason: String,
    /// The environment variable that, set to 1, makes this a failure.
    pub unless: &'static str,
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Skip {}

/// Runs `body` in a world of its own, on behalf of the `#[test]` function whose closure it is: the function's name is taken
/// from the closure's type. Panics if `body` fails. A [`Skip`] that it returns is printed and is no failure.
pub fn test<F: FnOnce() -> Result<()>>(body: F) {
    test_as(std::any::type_name::<F>(), body);
}

/// [`test()`] with the name of the closure's type: `crate::module::function::{{closure}}`.
pub fn test_as(type_name: &str, body: impl FnOnce() -> Result<()>) {
    test_within(TIME_LIMIT, type_name, body);
}

/// [`test_as`] for a test that may take another time than [`TIME_LIMIT`] on an ordinary machine.
pub fn test_within(limit: Duration, type_name: &str, body: impl FnOnce() -> Result<()>) {
    let path = type_name.split("::{{closure}}").next().unwrap_or(type_name);
    let name = path.split_once("::").map_or(path, |(_, name)| name);
    if is_inside() {
        println!("{BEGUN}");
        match furnish().and_then(|()| body()) {
            Ok(()) => {}
            Err(error) => match error.downcast_ref::<Skip>() {
                Some(skip) if std::env::var_os(skip.unless).is_none_or(|value| value != "1") => {
                    println!("{SKIPPED}{skip}");
                }
                _ => panic!("{error:#}"),
            },
        }
    } else if let Err(error) = run_inside(name, limit) {
        panic!("{error:#}");
    }
}

fn run_inside(name: &str, limit: Duration) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args([name, "--exact", "--include-ignored", "--nocapture", "--test-threads=1"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = enter_for(command, limit)?.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    for line in text.lines().filter(|line| line.starts_with(SKIPPED)) {
        // Not by `eprintln`, which the test harness keeps to itself when a test passes.
        writeln!(io::stderr(), "{line} ({name})")?;
    }
    match output.status.code() {
        Some(0) if text.contains(BEGUN) => Ok(()),
        Some(0) => bail!("there is no test {name:?} in this executable, so nothing was tested"),
        Some(_) => bail!("the test failed in its world: {}", output.status),
        None => bail!("the test was killed, perhaps after {} seconds: {}", seconds(limit), output.status),
    }
}

/// Whether this process is inside a world.
pub fn is_inside() -> bool {
    std::env::var_os(MARKER).is_some()
}

/// Starts a command, usually one's own executable again, in a new world, where [`is_inside`] is true.
pub fn enter(command: Command) -> Result<Child> {
    enter_for(command, TIME_LIMIT)
}

fn enter_for(mut command: Command, limit: Duration) -> Result<Child> {
    command.env(MARKER, "1");
    // The world has no such users, and vpn-exec would become them.
    for name in ["SUDO_USER", "SUDO_UID", "SUDO_GID", "SUDO_COMMAND"] {
        command.env_remove(name);
    }
    nest::spawn(&mut command, seconds(limit)).context(
        "cannot make user, mount, PID and network namespaces: look at /proc/sys/user/max_user_namespaces, \
         /proc/sys/kernel/unprivileged_userns_clone and /proc/sys/kernel/apparmor_restrict_unprivileged_userns",
    )
}

/// Runs a program's work in a world of its own, for which the program is executed once more, with the same arguments. `name` stands before
/// an error.
pub fn run(name: &str, work: impl FnOnce() -> Result<()>) -> ExitCode {
    let again = || {
        crate::require_tun()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(std::env::args_os().skip(1));
        Ok(enter(command)?.wait()?.success())
    };
    let outcome = if is_inside() { furnish().and_then(|()| work()).map(|()| true) } else { again() };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        // It has said why.
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Makes a new world fit to live in: mounts that are its own, its own `/proc`, `/run` and resolver, and `lo` up.
pub fn furnish() -> Result<()> {
    // First cut off from the machine, then shared within, as systemd has it: what escapes from a mount namespace in a test
    // shall be seen.
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("cannot make the mounts private")?;
    rustix::mount::mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)
        .context("cannot make the mounts shared")?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount("proc", "/proc", c"proc", flags | MountFlags::NOEXEC, None)
        .context("cannot mount /proc; in a container, its own must not be masked")?;
    // Asked before /run is hidden: it may be where the links lead.
    let resolv_conf = real_file("/etc/resolv.conf");
    rustix::mount::mount("lab-run", "/run", c"tmpfs", flags, Some(c"mode=0755")).context("cannot mount /run")?;
    // wireguard-go makes it otherwise, and it would look like a change of the host.
    for directory in [FILES, "/run/wireguard"] {
        fs::create_dir(directory)?;
    }
    replace(&resolv_conf, &resolv_conf_text()).context("cannot replace /etc/resolv.conf")?;
    for (path, text) in [("/etc/nsswitch.conf", "hosts: files dns\n"), ("/etc/hosts", "127.0.0.1 localhost\n")] {
        if Path::new(path).exists() {
            replace(&real_file(path), text).with_context(|| format!("cannot replace {path}"))?;
        }
    }
    let mut netlink = Netlink::open()?;
    let lo = netlink.link("lo")?.ok_or_else(|| anyhow!("there is no lo"))?;
    netlink.execute_one(vpn_exec::linux::netlink::NetlinkRequest::set_up(lo.index, "lo"))?;
    Ok(())
}

fn resolv_conf_text() -> String {
    let servers = [IpAddr::V4(ROUTER.ipv4), IpAddr::V6(ROUTER.ipv6)];
    let lines: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    format!("{lines}options timeout:1 attempts:2\n")
}

/// Where a path leads in the end, even if there is nothing.
fn real_file(path: &str) -> PathBuf {
    let path = Path::new(path);
    fs::canonicalize(path).unwrap_or_else(|_| match (fs::read_link(path), path.parent()) {
        (Ok(link), Some(parent)) => parent.join(link),
        _ => path.to_owned(),
    })
}

/// Puts a text in a file's place, in this world only.
fn replace(file: &Path, text: &str) -> Result<()> {
    if let Ok(in_run) = file.strip_prefix("/run") {
        let file = Path::new("/run").join(in_run);
        if let Some(directory) = file.parent() {
            fs::create_dir_all(directory)?;
        }
        return Ok(fs::write(file, text)?);
    }
    let name = file.file_name().ok_or_else(|| anyhow!("{} is no file", file.display()))?;
    let own = Path::new(FILES).join(name);
    fs::write(&own, text)?;
    Ok(mounts::bind(&own, file)?)
}
