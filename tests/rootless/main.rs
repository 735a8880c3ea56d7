//! Tunnels without root: an ordinary user makes them in a user namespace, and everything that needs no privilege of the
//! host holds as in root's tunnels.
//!
//! The suites of other promises run this way as well, with `VPN_EXEC_TEST_ROOTLESS=1`.

mod browsers;
mod desk;
mod desktop;
mod lifetime;
mod local;
mod nested;
mod plan;
mod privileges;
mod refusals;
mod replaced_socket;
mod scope;
mod security;

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Lab, Reach, launcher};

/// The time in which a tunnel carries its first packet, with the handshake, or a process ends.
const PATIENCE: Duration = Duration::from_secs(20);

/// A user who is not root, where the test has others.
const USER: u32 = 1000;

/// An ordinary user with a runtime directory. A test of an ordinary user has no other, and forces the way.
struct User {
    is_other: bool,
    runtime: PathBuf,
    file: PathBuf,
}

impl User {
    fn new(lab: &Lab) -> Result<Self> {
        Self::with_file(&lab.wg_quick_text(Reach::Ipv4))
    }

    fn with_file(text: &str) -> Result<Self> {
        let is_other = lab::world::has_users()?;
        let runtime = PathBuf::from("/run/user/ordinary");
        fs::DirBuilder::new().recursive(true).mode(0o755).create("/run/user")?;
        fs::DirBuilder::new().mode(0o700).create(&runtime)?;
        let file = Path::new(lab::world::FILES).join("rootless.conf");
        fs::write(&file, text)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
        if is_other {
            fs::set_permissions(lab::world::FILES, fs::Permissions::from_mode(0o755))?;
            std::os::unix::fs::chown(&runtime, Some(USER), Some(USER))?;
            std::os::unix::fs::chown(&file, Some(USER), Some(USER))?;
        }
        Ok(Self { is_other, runtime, file })
    }

    /// Returns the user's ID.
    fn id(&self) -> u32 {
        if self.is_other { USER } else { nix::unistd::geteuid().as_raw() }
    }

    /// Returns a command of the user.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("setpriv");
        if self.is_other {
            command.args(["--reuid=1000", "--regid=1000", "--clear-groups", "--inh-caps=-all"]);
        }
        command.arg(program).env("XDG_RUNTIME_DIR", &self.runtime).stdin(Stdio::null());
        command
    }

    /// Returns a command line of vpn-exec with this subcommand, if it is not empty, for the user's file.
    fn vpn_exec(&self, subcommand: &[&str]) -> Command {
        let mut command = self.command(launcher::binary());
        command.args(subcommand);
        if !self.is_other {
            command.arg("--rootless");
        }
        command
    }

    /// Returns a command line that runs a program in the tunnel of a name.
    fn inside(&self, name: &str, options: &[&str], program: &[&str]) -> Command {
        let mut command = self.vpn_exec(&[]);
        command.arg("--config").arg(&self.file).args(["--name", name]).args(options).arg("--").args(program);
        command
    }

    /// Returns a command line that takes a tunnel up.
    fn up(&self, name: &str) -> Command {
        let mut command = self.vpn_exec(&["up"]);
        command.arg(&self.file).args(["--name", name]);
        command
    }

    /// Returns a command line about a running tunnel.
    fn about(&self, words: &[&str]) -> Command {
        let mut command = self.command(launcher::binary());
        command.args(words);
        command
    }

    /// Returns the directory of the user's tunnels.
    fn tunnels(&self) -> PathBuf {
        self.runtime.join("vpn-exec")
    }

    /// Returns the process ID of a tunnel's keeper, which its state names.
    fn keeper(&self, name: &str) -> Result<i32> {
        let state: serde_json::Value = serde_json::from_slice(&fs::read(self.tunnels().join(name).join("state"))?)?;
        let keeper = state["keeper"].as_i64().context("a process ID")?;
        Ok(keeper.try_into()?)
    }
}

impl User {
    /// Kills a tunnel's keeper and waits for its successor.
    fn replace_keeper(&self, name: &str) -> Result<()> {
        let first = self.keeper(name)?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(first), nix::sys::signal::Signal::SIGKILL)?;
        lab::wait_until(lab::patience(PATIENCE), "no successor", || {
            Ok(self.keeper(name).is_ok_and(|keeper| keeper != first))
        })
    }
}

/// Answers requests at an address of the host with the page "the host".
fn serve(address: IpAddr, port: u16) -> Result<()> {
    let listener = TcpListener::bind((address, port))?;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // The whole request: the kernel resets a connection that is closed before everything is read.
            let (mut request, mut piece) = (Vec::new(), [0; 4096]);
            while !request.ends_with(b"\r\n\r\n") {
                match stream.read(&mut piece) {
                    Ok(length) if length > 0 => request.extend_from_slice(&piece[..length]),
                    _ => break,
                }
            }
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\nConnection: close\r\n\r\nthe host");
        }
    });
    Ok(())
}

/// Runs a command, which must succeed, and returns its output.
fn output(mut command: Command) -> Result<String> {
    let output = run(&mut command)?;
    ensure!(output.status.success(), "{command:?}: {}", launcher::text_of(&output));
    Ok(String::from_utf8(output.stdout)?)
}

/// Runs a command, which must fail, and returns its standard error.
fn failure(mut command: Command) -> Result<String> {
    let output = run(&mut command)?;
    ensure!(output.status.code() == Some(125), "{command:?}: {}", launcher::text_of(&output));
    Ok(launcher::errors_of(&output))
}

fn run(command: &mut Command) -> Result<Output> {
    launcher::output_of(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}
