//! The desk of an ordinary user: a home, a runtime directory, and a display.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use lab::{launcher, world};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::USER;

/// The time in which a program of the desktop starts.
const PATIENCE: Duration = Duration::from_secs(60);

/// The user's home.
pub(crate) const HOME: &str = "/tmp/home";

/// The user's runtime directory.
pub(crate) const RUNTIME: &str = "/run/user/1000";

/// The provider's file.
pub(crate) const FILE: &str = "/tmp/home/desk.conf";

/// The user's display.
pub(crate) const DISPLAY: &str = ":8";

/// An ordinary user with a home, in any world. Browsers' sandboxes do not work for a user whose ID is 0.
pub(crate) struct Desk {
    /// Where the world has one user only: the process that holds a nested user namespace, in which that user has the
    /// other ID.
    nested: Option<Child>,
}

impl Desk {
    /// Makes the user's directories, in a `/tmp` of the test's own, and the provider's file.
    pub(crate) fn new(text: &str) -> Result<Self> {
        vpn_exec::linux::mounts::mount_tmpfs("/tmp".as_ref())?;
        fs::create_dir("/tmp/.X11-unix")?;
        for folder in ["/tmp", "/tmp/.X11-unix"] {
            fs::set_permissions(folder, fs::Permissions::from_mode(0o1777))?;
        }
        let desk = Self { nested: if world::has_users()? { None } else { Some(nested()?) } };
        for folder in [HOME, RUNTIME, "/tmp/home/.config", "/tmp/home/.config/vpn-exec"] {
            desk.make_folder(folder)?;
        }
        desk.write(FILE, text)?;
        Ok(desk)
    }

    fn own(&self, path: &Path, mode: u32) -> Result<()> {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        if world::has_users()? {
            std::os::unix::fs::chown(path, Some(USER), Some(USER))?;
        }
        Ok(())
    }

    /// Makes a directory of the user, in the home if the path is relative.
    pub(crate) fn make_folder(&self, path: &str) -> Result<()> {
        let path = Path::new(HOME).join(path);
        fs::create_dir_all(&path)?;
        self.own(&path, 0o700)
    }

    /// Writes a file of the user, in the home if the path is relative.
    pub(crate) fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = Path::new(HOME).join(path);
        fs::write(&path, text)?;
        self.own(&path, 0o600)
    }

    /// Returns a command of the user.
    pub(crate) fn command(&self, words: &[&str]) -> Result<Command> {
        let mut command = match &self.nested {
            None => Command::new("setpriv"),
            Some(_) => Command::new("nsenter"),
        };
        match &self.nested {
            None => command.args(["--reuid=1000", "--regid=1000", "--clear-groups", "--inh-caps=-all"]),
            Some(holder) => command.args(["--user", "--preserve-credentials", "--target"]).arg(holder.id().to_string()),
        };
        command.arg("--").args(words).env_clear().stdin(Stdio::null()).current_dir(HOME);
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("LANG", "C.UTF-8");
        command.env("HOME", HOME).env("XDG_RUNTIME_DIR", RUNTIME);
        if Path::new(RUNTIME).join("bus").exists() {
            command.env("DBUS_SESSION_BUS_ADDRESS", format!("unix:path={RUNTIME}/bus"));
        }
        Ok(command)
    }

    /// Returns a command line of vpn-exec.
    pub(crate) fn vpn_exec(&self, words: &[&str]) -> Result<Command> {
        let binary = launcher::binary().to_str().context("UTF-8")?;
        self.command(&[&[binary], words].concat())
    }

    /// Returns a command line that runs a program in the tunnel.
    pub(crate) fn inside(&self, program: &[&str]) -> Result<Command> {
        self.vpn_exec(&[&["--config", FILE, "--"], program].concat())
    }

    /// Starts the display.
    pub(crate) fn start_display(&self) -> Result<Running> {
        let display = Running::start(self.command(&["Xvfb", DISPLAY, "-nolisten", "tcp"])?)?;
        self.wait_for("/tmp/.X11-unix/X8")?;
        Ok(display)
    }

    /// Waits until a file exists.
    pub(crate) fn wait_for(&self, path: &str) -> Result<()> {
        let exists = || Ok(Path::new(path).exists());
        lab::wait_until(lab::patience(PATIENCE), &format!("{path} does not appear"), exists)
    }
}

/// Starts a process that holds a nested user namespace.
fn nested() -> Result<Child> {
    let options = ["--user", "--map-user=1000", "--map-group=1000", "--", "sleep", "1000000"];
    let holder = Command::new("unshare").args(options).stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    // It executes its program after that is done.
    let is_made = || Ok(fs::read(format!("/proc/{}/comm", holder.id()))? == b"sleep\n");
    lab::wait_until(lab::patience(PATIENCE), "there is no nested user namespace", is_made)?;
    Ok(holder)
}

/// A process that runs until the world of its test ends, or until it is stopped.
pub(crate) struct Running(Child);

impl Running {
    /// Starts a command.
    pub(crate) fn start(mut command: Command) -> Result<Self> {
        Ok(Self(command.stdout(Stdio::null()).spawn().with_context(|| format!("{command:?}"))?))
    }

    /// Ends the process.
    pub(crate) fn stop(mut self) -> Result<()> {
        kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM)?;
        self.0.wait()?;
        Ok(())
    }
}
