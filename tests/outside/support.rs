//! The desk at which a user of the host sits, and the judge of who got out.

use std::fs;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::{Launcher, Skip, variables, world};

const FILE: &str = "\
[Interface]
PrivateKey = iGxYvNQ5eVwPrTzY3Qe5MHfNxGbKxFfQyM7zq2nX8Vc=
Address = 10.64.3.2/32, fc00:bbbb::3:2/128
DNS = 10.64.0.1

[Peer]
PublicKey = hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=
AllowedIPs = 0.0.0.0/0, ::/0
Endpoint = 127.0.0.1:9
";

/// How long anything may take that does not hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How long is waited for what should not come.
const CALM: Duration = Duration::from_millis(300);

/// A user's place on the host: a home directory, a runtime directory and a /tmp of this test's own.
pub(crate) struct Desk {
    config: PathBuf,
    /// The port of the host's loopback that counts who got out.
    pub(crate) port: u16,
    visits: Arc<Mutex<Vec<String>>>,
}

/// Runs a test at a desk, in a world of its own.
pub(crate) fn test_at_desk<F: FnOnce(&Desk) -> Result<()>>(body: F) {
    world::test(|| {
        lab::require_tun()?;
        body(&Desk::new()?)
    });
}

impl Desk {
    fn new() -> Result<Self> {
        vpn_exec::linux::mounts::mount_tmpfs("/tmp".as_ref())?;
        fs::set_permissions("/tmp", fs::Permissions::from_mode(0o1777))?;
        for directory in [HOME, RUNTIME] {
            fs::create_dir_all(directory)?;
            fs::set_permissions(directory, fs::Permissions::from_mode(0o700))?;
        }
        let config = Path::new(world::FILES).join("nowhere.conf");
        fs::write(&config, FILE)?;
        fs::set_permissions(&config, fs::Permissions::from_mode(0o600))?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let visits = Arc::new(Mutex::new(Vec::new()));
        let written = Arc::clone(&visits);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut text = [0; 256];
                let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
                let length = stream.read(&mut text).unwrap_or(0);
                let text = String::from_utf8_lossy(&text[..length]).into_owned();
                written.lock().unwrap_or_else(PoisonError::into_inner).push(text);
            }
        });
        Ok(Self { config, port, visits })
    }

    /// A shell command that tells the host's loopback a word.
    pub(crate) fn errand(&self, word: &str) -> String {
        format!("bash -c 'echo {word} >/dev/tcp/127.0.0.1/{}'", self.port)
    }

    /// Whether somebody came to the host's loopback with a word.
    pub(crate) fn heard(&self, word: &str) -> bool {
        let visits = self.visits.lock().unwrap_or_else(PoisonError::into_inner);
        visits.iter().any(|visit| visit.contains(word))
    }

    /// A command of the user's, on the host.
    pub(crate) fn on_host(&self, program: &[&str]) -> Command {
        let mut command = Command::new(program[0]);
        command.args(&program[1..]);
        self.furnish(&mut command);
        command
    }

    /// A command of the user's, in a tunnel.
    pub(crate) fn inside(&self, options: &[&str], program: &[&str]) -> Command {
        let mut command = Launcher::new(&self.config).options(options).program(program).command();
        self.furnish(&mut command);
        command
    }

    /// The same without the protection: the guilty twin.
    pub(crate) fn unguarded(&self, program: &[&str]) -> Command {
        let mut command = self.inside(&["--name", "twin"], program);
        command.env(variables::BREAK, "sockets");
        command
    }

    /// Starts a session bus of the user's, at which a service can be started by its name: it says "activated" to the host's loopback.
    ///
    /// # Errors
    /// [`Skip`] without dbus-daemon.
    pub(crate) fn start_session_bus(&self) -> Result<()> {
        require("dbus-daemon")?;
        fs::create_dir("/tmp/services")?;
        let service = format!("[D-BUS Service]\nName=net.example.Fetcher\nExec=/bin/{}\n", self.errand("activated"));
        fs::write("/tmp/services/net.example.Fetcher.service", service)?;
        let config = "<!DOCTYPE busconfig PUBLIC \"-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN\" \
             \"http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd\">\n\
             <busconfig><type>session</type><listen>unix:path=/run/user/0/bus</listen><servicedir>/tmp/services</servicedir>\
             <policy context=\"default\"><allow send_destination=\"*\" eavesdrop=\"true\"/><allow eavesdrop=\"true\"/>\
             <allow own=\"*\"/></policy></busconfig>\n";
        fs::write("/tmp/bus.conf", config)?;
        serve(self.on_host(&["dbus-daemon", "--config-file=/tmp/bus.conf", "--nofork"]))?;
        wait_for_file(BUS)
    }

    fn furnish(&self, command: &mut Command) {
        command.env_clear().stdin(Stdio::null());
        let path = std::env::var_os("PATH").unwrap_or_default();
        command.env("PATH", path).env("HOME", HOME).env("XDG_RUNTIME_DIR", RUNTIME);
        command.env("LANG", "C.UTF-8").env("TERM", "xterm").env("SHELL", "/bin/sh").current_dir(HOME);
        if Path::new(BUS).exists() {
            command.env("DBUS_SESSION_BUS_ADDRESS", format!("unix:path={BUS}"));
        }
    }

    /// Has a client hand over an errand, which arrives without the protection and does not arrive with it. `client` is a shell script with
    /// `ERRAND` in it. Returns what the refused one said.
    pub(crate) fn expect_refusal(&self, client: &str) -> Result<String> {
        let script = |word: &str| client.replace("ERRAND", &self.errand(word));
        run(self.unguarded(&["sh", "-c", &script("guilty")]))?;
        lab::wait_until(PATIENCE, "the twin's errand did not arrive", || Ok(self.heard("guilty")))?;
        let output = run(self.inside(&[], &["sh", "-c", &script("leak")]))?;
        std::thread::sleep(CALM);
        ensure!(!self.heard("leak"), "the errand was done outside: {}", said(&output));
        let said = said(&output);
        ensure!(said.contains("outside the tunnel"), "nothing was said of it: {said}");
        Ok(said)
    }
}

pub(crate) const HOME: &str = "/tmp/home";
pub(crate) const RUNTIME: &str = "/run/user/0";
const BUS: &str = "/run/user/0/bus";

/// Runs a command, and ends it if it hangs.
pub(crate) fn run(mut command: Command) -> Result<Output> {
    let child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().with_context(|| format!("{command:?}"))?;
    let pid = child.id();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    match receiver.recv_timeout(PATIENCE) {
        Ok(output) => Ok(output?),
        Err(_) => {
            let _ = vpn_exec::linux::process::kill(pid.cast_signed(), nix::sys::signal::Signal::SIGKILL);
            bail!("{command:?} hangs")
        }
    }
}

/// Starts a server, which is killed at the end of the test with its world.
pub(crate) fn serve(mut command: Command) -> Result<Child> {
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().with_context(|| format!("{command:?}"))
}

pub(crate) fn said(output: &Output) -> String {
    format!("{}: {}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Requires a program that Debian has as a package.
///
/// # Errors
/// [`Skip`] if it is not there.
pub(crate) fn require(program: &str) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|folder| folder.join(program).exists()) {
        return Ok(());
    }
    Err(Skip::error(format!("{program} is not installed"), lab::variables::REQUIRE_PROGRAMS))
}

/// Waits until there is a file.
pub(crate) fn wait_for_file(path: &str) -> Result<()> {
    lab::wait_until(PATIENCE, &format!("{path} does not appear"), || Ok(Path::new(path).exists()))
}

/// Which file is at a path.
pub(crate) fn inode(path: &str) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;

    Ok(fs::symlink_metadata(path).with_context(|| path.to_owned())?.ino())
}

/// Requires other users than root in this world, which root alone can make.
///
/// # Errors
/// [`Skip`] if there are none.
pub(crate) fn require_users() -> Result<()> {
    let map = fs::read_to_string("/proc/self/uid_map")?;
    if map.split_whitespace().nth(2) == Some("1") && map.lines().count() == 1 {
        let reason = "an ordinary user's world has no other users";
        return Err(Skip::error(reason, lab::variables::REQUIRE_USERS));
    }
    Ok(())
}
