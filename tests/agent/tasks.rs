//! Tasks: the arguments name one, and the agent ends after it. Those with a result print it as one line of JSON.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, raise};
use nix::unistd::{Gid, Uid};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use vpn_exec::linux::capabilities::{self, CapabilitySet};

use crate::acts::parsed;
use crate::inspection;
use crate::shared::protocol::REPORT;
use crate::shared::sending::unspecified;
use crate::shared::surroundings::Surroundings;
use crate::shared::variables;
use crate::syscalls::request_unknown_key;

/// A time in which every test has ended.
const FOREVER: Duration = Duration::from_secs(1000);

/// Performs a task.
pub(crate) fn perform(words: &[&str]) -> io::Result<()> {
    if let Ok(targets) = std::env::var(variables::SEND_TO) {
        let targets = targets.split(' ').map(parsed).collect::<io::Result<_>>()?;
        std::thread::spawn(move || send_forever(targets));
    }
    match words {
        ["exit", status] => std::process::exit(parsed(status)?),
        ["die-by", signal] => die_by(parsed(signal)?),
        ["report"] => report(&Surroundings::now()?),
        ["wait"] => {
            report(&Surroundings::now()?)?;
            std::thread::sleep(FOREVER);
            Ok(())
        }
        ["nap"] => {
            std::thread::sleep(Duration::from_millis(20));
            Ok(())
        }
        // Leaves a grandchild behind, in a session of its own, and waits.
        ["daemon"] => {
            start(&["leave-daemon"])?.wait()?;
            perform(&["wait"])
        }
        ["leave-daemon"] => {
            nix::unistd::setsid()?;
            // The parent of an orphan is the world's init process, so the test need not wait for it.
            std::mem::forget(start(&["daemonized"])?);
            Ok(())
        }
        ["daemonized"] => {
            std::thread::sleep(FOREVER);
            Ok(())
        }
        ["hook", path] => {
            let line = json(&Surroundings::now()?)? + "\n";
            File::options().append(true).create(true).open(path)?.write_all(line.as_bytes())
        }
        ["secure-bits"] => {
            let bits = rustix::thread::capabilities_secure_bits()?.bits();
            report(&format!("{bits:#x}"))
        }
        ["request-key"] => report(&[None, Some(c"information")].map(|text| request_unknown_key(text).to_string())),
        ["inspect", tunnel] => {
            report(&inspection::inspect(tunnel)?)?;
            std::thread::sleep(FOREVER);
            Ok(())
        }
        ["open", pids @ ..] => {
            let pids = pids.iter().map(|pid| parsed(pid)).collect::<io::Result<Vec<i32>>>()?;
            capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty())?;
            report(&pids.into_iter().flat_map(inspection::open_all_of).collect::<Vec<String>>())
        }
        ["with-open-files", limit, command @ ..] => {
            let limit = parsed(limit)?;
            setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?;
            execute(command)
        }
        ["without-run", command @ ..] => {
            leave_run()?;
            execute(command)
        }
        ["as-user", user, command @ ..] => {
            become_user(parsed(user)?)?;
            execute(command)
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "unknown task")),
    }
}

fn json(value: &impl serde::Serialize) -> io::Result<String> {
    serde_json::to_string(value).map_err(io::Error::other)
}

fn report(value: &impl serde::Serialize) -> io::Result<()> {
    println!("{REPORT}{}", json(value)?);
    io::stdout().flush()
}

/// Starts another agent for a task.
fn start(words: &[&str]) -> io::Result<std::process::Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("task").args(words);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
}

/// Executes a command in place of this process.
fn execute(command: &[&str]) -> io::Result<()> {
    let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    Err(Command::new(program).args(arguments).exec())
}

fn die_by(signal: i32) -> io::Result<()> {
    // No core file. A failure leaves one behind, which is no reason to live on.
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    Ok(raise(Signal::try_from(signal)?)?)
}

/// Sends a datagram to each target every millisecond. A failure is what the tests hope for.
fn send_forever(targets: Vec<SocketAddr>) {
    loop {
        for target in &targets {
            let _ = UdpSocket::bind((unspecified(*target), 0)).and_then(|socket| socket.send_to(b"chaos", target));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Moves the calling process into a mount namespace without `/run`.
fn leave_run() -> io::Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let root = Path::new("/run/lab/root");
    fs::create_dir_all(root)?;
    rustix::mount::mount("lab-root", root, c"tmpfs", MountFlags::empty(), None)?;
    for entry in fs::read_dir("/")? {
        let entry = entry?;
        if entry.file_name() == "run" {
            continue;
        }
        let copy = root.join(entry.file_name());
        if entry.file_type()?.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(entry.path())?, copy)?;
        } else if entry.file_type()?.is_dir() {
            fs::create_dir(&copy)?;
            rustix::mount::mount_bind_recursive(entry.path(), &copy)?;
        }
    }
    std::env::set_current_dir(root)?;
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    std::env::set_current_dir("/")
}

/// Becomes another user who keeps all capabilities.
fn become_user(user: u32) -> io::Result<()> {
    let (all, last) = (capabilities::permitted()?, capabilities::last()?);
    capabilities::keep_across_user_change()?;
    nix::unistd::setresgid(Gid::from_raw(user), Gid::from_raw(user), Gid::from_raw(user))?;
    nix::unistd::setresuid(Uid::from_raw(user), Uid::from_raw(user), Uid::from_raw(user))?;
    capabilities::set(all, all)?;
    capabilities::make_ambient(all, last)
}
