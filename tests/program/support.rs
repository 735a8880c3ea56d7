//! Helpers of the tests in this directory.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Launcher, skipped, world};

pub(crate) use lab::launcher::{stdout, text_of, wait_for_end};

pub(crate) const FILE: &str = "\
[Interface]
PrivateKey = iGxYvNQ5eVwPrTzY3Qe5MHfNxGbKxFfQyM7zq2nX8Vc=
Address = 10.64.3.2/32, fc00:bbbb::3:2/128
DNS = 10.64.0.1, vpn.example

[Peer]
PublicKey = hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=
AllowedIPs = 0.0.0.0/0, ::/0
Endpoint = 127.0.0.1:9
";

/// The time after which a condition is taken for hanging.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a test in a world of its own, with the configuration of a tunnel without a peer that answers.
pub(crate) fn test_with_file<F: FnOnce(PathBuf) -> Result<()>>(body: F) {
    world::test(|| {
        lab::require_tun()?;
        body(config_file()?)
    });
}

/// Runs a test like [`test_with_file`], in a tunnel that is up already, where programs share a view of files.
pub(crate) fn with_shared_view<F: FnOnce(PathBuf) -> Result<()>>(body: F) {
    test_with_file(|config| {
        up(&config)?;
        body(config)?;
        down()
    });
}

/// Starts the tunnel of [`config_file`] for several programs.
pub(crate) fn up(config: &Path) -> Result<()> {
    let config = config.to_str().context("a path in UTF-8")?;
    let output = lab::launcher::run(lab::vpn_exec(["up", config, "--backend", lab::backend()]))?;
    ensure!(output.status.success(), "{}", text_of(&output));
    Ok(())
}

pub(crate) fn down() -> Result<()> {
    let output = lab::launcher::run(lab::vpn_exec(["down", "nowhere", "--force"]))?;
    ensure!(output.status.success(), "{}", text_of(&output));
    Ok(())
}

pub(crate) fn config_file() -> Result<PathBuf> {
    use std::os::unix::fs::OpenOptionsExt;

    let path = Path::new(world::FILES).join("nowhere.conf");
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?.write_all(FILE.as_bytes())?;
    Ok(path)
}

/// Returns a field of `/proc/PID/status`.
pub(crate) fn field<'a>(status: &'a str, name: &str) -> Result<&'a str> {
    let line = status.lines().find(|line| line.starts_with(&format!("{name}:"))).context(name.to_owned())?;
    Ok(line.split_once(':').map(|(_, value)| value.trim()).unwrap_or_default())
}

pub(crate) fn bits(status: &str, name: &str) -> Result<u64> {
    Ok(u64::from_str_radix(field(status, name)?, 16)?)
}

pub(crate) fn wait_until(what: &str, condition: impl FnMut() -> Result<bool>) -> Result<()> {
    lab::wait_until(PATIENCE, &format!("timed out: {what}"), condition)
}

pub(crate) fn kill(pid: u32, signal: &str) -> Result<()> {
    let status = Command::new("sh").args(["-c", &format!("kill -{signal} {pid}")]).status()?;
    ensure!(status.success());
    Ok(())
}

/// Mounts a writable overlay over the world's /etc, so that tests can replace files there. Returns false without
/// overlayfs.
pub(crate) fn loosen_etc() -> Result<bool> {
    let layer = Path::new("/run/lab/layer");
    std::fs::create_dir(layer)?;
    vpn_exec::linux::mounts::mount_tmpfs(layer)?;
    let (upper, work) = (layer.join("upper"), layer.join("work"));
    std::fs::create_dir(&upper)?;
    std::fs::create_dir(&work)?;
    let options = format!("lowerdir=/etc,upperdir={},workdir={}", upper.display(), work.display());
    let options = std::ffi::CString::new(options)?;
    let flags = rustix::mount::MountFlags::NOSUID | rustix::mount::MountFlags::NODEV;
    match rustix::mount::mount("layer", "/etc", c"overlay", flags, Some(&*options)) {
        Ok(()) => Ok(true),
        Err(error) => {
            skipped(format_args!("no overlayfs: {error}"));
            Ok(false)
        }
    }
}

/// A shell in a tunnel, which executes scripts of the test.
pub(crate) struct Shell {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Shell {
    pub(crate) fn start(config: &Path, options: &[&str]) -> Result<Self> {
        let mut command = Launcher::new(config).options(options).program(["sh"]).command();
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let orders = child.stdin.take().context("a pipe")?;
        let answers = BufReader::new(child.stdout.take().context("a pipe")?);
        let mut shell = Self { child, orders, answers };
        ensure!(shell.say("echo begun")? == "begun\n");
        Ok(shell)
    }

    /// Executes a script, and returns its output, including errors.
    pub(crate) fn say(&mut self, script: &str) -> Result<String> {
        writeln!(self.orders, "{{ {script}\n}} 2>&1; echo; echo ::end")?;
        let mut text = String::new();
        loop {
            ensure!(self.answers.read_line(&mut text)? > 0, "the shell has ended: {text}");
            if let Some(text) = text.strip_suffix("\n::end\n") {
                return Ok(text.to_owned());
            }
        }
    }

    pub(crate) fn end(mut self) -> Result<()> {
        drop(self.orders);
        ensure!(wait_for_end(&mut self.child)?.success());
        Ok(())
    }

    /// Returns the launcher's process ID.
    pub(crate) fn launcher(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Waits for the end of a killed launcher.
    pub(crate) fn abandon(mut self) -> Result<()> {
        wait_for_end(&mut self.child).map(drop)
    }
}
