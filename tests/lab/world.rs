//! A world for one test: new user, mount, PID and network namespaces, in which the test is root. All of it ends with
//! the test.
//!
//! The test's executable is run once more inside the world, for this one test (see `nest`). The body of the test runs
//! in that second process. The first process waits for it and passes on its output.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::mount::{MountFlags, MountPropagationFlags};
use vpn_exec::linux::mounts;
use vpn_exec::linux::netlink::Netlink;

use crate::shared::addresses::ROUTER;
use crate::shared::variables;
use crate::skip::{self, SKIPPED, Skip};
use crate::{nest, patience, tunnel};

/// The directory for files of the lab and of tests. It is part of the world and vanishes with it.
pub const FILES: &str = "/run/lab";

/// The line that the process inside prints before it runs the test's body. Without it, the executable has no such test.
const BEGUN: &str = "lab: in a world of its own";

/// The time that a test may take on an ordinary machine.
pub const TIME_LIMIT: Duration = Duration::from_secs(120);

/// Returns a limit on this machine, in seconds.
fn seconds(limit: Duration) -> u32 {
    patience(limit).as_secs().try_into().unwrap_or(u32::MAX)
}

/// Runs the body of the calling `#[test]` function in a world of its own. A [`Skip`] that it returns is reported, and
/// is a failure only where its variable says so.
///
/// # Panics
/// If the body fails.
pub fn test(body: impl FnOnce() -> Result<()>) {
    test_within(TIME_LIMIT, body);
}

/// [`test()`] for a test that may take another time than [`TIME_LIMIT`] on an ordinary machine.
///
/// # Panics
/// If the body fails.
pub fn test_within(limit: Duration, body: impl FnOnce() -> Result<()>) {
    if is_inside() {
        println!("{BEGUN}");
        match furnish().and_then(|()| body()) {
            Ok(()) => {}
            Err(error) => match error.downcast_ref::<Skip>() {
                Some(skip) if !variables::is_set(skip.unless) => skip::skipped(skip),
                _ => panic!("{error:#}"),
            },
        }
    } else if let Err(error) = run_inside(&name_of_test(), limit) {
        panic!("{error:#}");
    }
}

/// Returns the name of the calling test: libtest runs each test in a thread that has its name.
///
/// # Panics
/// Outside the thread of a test.
pub(crate) fn name_of_test() -> String {
    let thread = std::thread::current();
    match thread.name() {
        Some(name) if name != "main" => name.to_owned(),
        _ => panic!("call this from the thread of a test: its name is the test's"),
    }
}

fn run_inside(name: &str, limit: Duration) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = enter_for(command, limit)?.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    for reason in text.lines().filter_map(|line| line.strip_prefix(SKIPPED)) {
        skip::report(name, reason);
    }
    match output.status.code() {
        Some(0) if text.contains(BEGUN) => Ok(()),
        Some(0) => bail!("this executable has no test {name:?}, so nothing was tested"),
        Some(_) => bail!("the test failed in its world: {}", output.status),
        None => bail!("the test was killed, perhaps after {} seconds: {}", seconds(limit), output.status),
    }
}

/// Returns whether this process is inside a world.
pub fn is_inside() -> bool {
    std::env::var_os(variables::IN_WORLD).is_some()
}

/// Starts a command, usually the calling executable once more, in a new world, where [`is_inside`] is true.
///
/// # Errors
/// If this machine does not allow the namespaces.
pub fn enter(command: Command) -> Result<Child> {
    enter_for(command, TIME_LIMIT)
}

fn enter_for(mut command: Command, limit: Duration) -> Result<Child> {
    command.env(variables::IN_WORLD, "1");
    if tunnel::is_rootless() {
        command.env("XDG_RUNTIME_DIR", tunnel::RUNTIME_DIRECTORY);
    }
    // The world has no such users, and vpn-exec would run the program as one of them.
    for name in ["SUDO_USER", "SUDO_UID", "SUDO_GID", "SUDO_COMMAND"] {
        command.env_remove(name);
    }
    nest::spawn(&mut command, seconds(limit)).context(
        "cannot make user, mount, PID and network namespaces: look at /proc/sys/user/max_user_namespaces, \
         /proc/sys/kernel/unprivileged_userns_clone and /proc/sys/kernel/apparmor_restrict_unprivileged_userns",
    )
}

/// Runs the work of a program, such as a benchmark, in a world of its own: executes the program once more with the same
/// arguments. `name` precedes an error message.
pub fn run(name: &str, work: impl FnOnce() -> Result<()>) -> ExitCode {
    run_within(name, TIME_LIMIT, work)
}

/// [`run()`] for work that may take another time than [`TIME_LIMIT`] on an ordinary machine.
pub fn run_within(name: &str, limit: Duration, work: impl FnOnce() -> Result<()>) -> ExitCode {
    let again = || {
        crate::require_tun()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(std::env::args_os().skip(1));
        Ok(enter_for(command, limit)?.wait()?.success())
    };
    let outcome = if is_inside() { furnish().and_then(|()| work()).map(|()| true) } else { again() };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        // The process inside has reported the error.
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns whether the calling world has ordinary users (up to `nobody`, 65534) besides root. Only a world that root
/// made has them.
///
/// # Errors
/// If `/proc` cannot be read.
pub fn has_users() -> Result<bool> {
    const NOBODY: u32 = 65534;
    let map = fs::read_to_string("/proc/self/uid_map")?;
    Ok(map.lines().any(|line| {
        let numbers: Vec<u32> = line.split_ascii_whitespace().filter_map(|number| number.parse().ok()).collect();
        // user_namespaces(7): the first ID inside, the first outside, and the number of IDs.
        matches!(numbers[..], [first, _, count] if first <= NOBODY && NOBODY - first < count)
    }))
}

/// Requires a world with ordinary users.
///
/// # Errors
/// [`Skip`] if it has none.
pub fn require_users() -> Result<()> {
    if has_users()? { Ok(()) } else { Err(Skip::error("this user has no other user IDs", variables::REQUIRE_USERS)) }
}

/// Furnishes a new world: mounts that no other namespace sees, its own `/proc` and `/run`, the lab's resolver, and `lo`
/// up.
///
/// # Errors
/// If one of these cannot be made.
pub fn furnish() -> Result<()> {
    // First private, so that no mount reaches the machine; then shared inside, as systemd has it, so that a test sees a
    // mount that escapes from a mount namespace.
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("cannot make the mounts private")?;
    rustix::mount::mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)
        .context("cannot make the mounts shared")?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount("proc", "/proc", c"proc", flags | MountFlags::NOEXEC, None)
        .context("cannot mount /proc; in a container, its own must not be masked")?;
    // Resolved before /run is covered: links may lead there.
    let resolv_conf = real_file("/etc/resolv.conf");
    rustix::mount::mount("lab-run", "/run", c"tmpfs", flags, Some(c"mode=0755")).context("cannot mount /run")?;
    // wireguard-go would create /run/wireguard, which would look like a change of the host.
    for directory in [FILES, "/run/wireguard"] {
        fs::create_dir(directory)?;
    }
    if tunnel::is_rootless() {
        // Other users have theirs beside it.
        fs::create_dir("/run/user")?;
        fs::DirBuilder::new().mode(0o700).create(tunnel::RUNTIME_DIRECTORY)?;
        tunnel::enter_scope();
    }
    replace(&resolv_conf, &resolv_conf_text()).context("cannot replace /etc/resolv.conf")?;
    for (path, text) in [("/etc/nsswitch.conf", "hosts: files dns\n"), ("/etc/hosts", "127.0.0.1 localhost\n")] {
        if Path::new(path).exists() {
            replace(&real_file(path), text).with_context(|| format!("cannot replace {path}"))?;
        }
    }
    let mut netlink = Netlink::open()?;
    let lo = netlink.link("lo")?.ok_or_else(|| anyhow!("this network namespace has no lo"))?;
    netlink.execute_one(vpn_exec::linux::netlink::NetlinkRequest::set_up(lo.index, "lo"))?;
    Ok(())
}

fn resolv_conf_text() -> String {
    let servers = [IpAddr::V4(ROUTER.ipv4), IpAddr::V6(ROUTER.ipv6)];
    let lines: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    format!("{lines}options timeout:1 attempts:2\n")
}

/// Resolves the links of a path, even if its target does not exist.
fn real_file(path: &str) -> PathBuf {
    let path = Path::new(path);
    fs::canonicalize(path).unwrap_or_else(|_| match (fs::read_link(path), path.parent()) {
        (Ok(link), Some(parent)) => parent.join(link),
        _ => path.to_owned(),
    })
}

/// Replaces the content of a file, in this world only.
fn replace(file: &Path, text: &str) -> Result<()> {
    if let Ok(in_run) = file.strip_prefix("/run") {
        let file = Path::new("/run").join(in_run);
        if let Some(directory) = file.parent() {
            fs::create_dir_all(directory)?;
        }
        return Ok(fs::write(file, text)?);
    }
    let name = file.file_name().ok_or_else(|| anyhow!("{} is not a file", file.display()))?;
    let own = Path::new(FILES).join(name);
    fs::write(&own, text)?;
    Ok(mounts::bind(&own, file)?)
}
