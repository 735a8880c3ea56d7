//! The environment of a user of the host, and the judge of requests that leave the tunnel.

use std::fs;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Launcher, variables, world};

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

/// The time after which a process is taken for hanging.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The time to wait for a request that must not come.
const CALM: Duration = Duration::from_millis(300);

/// The environment of a user on the host: a home directory, a runtime directory and a /tmp of this test's own.
pub(crate) struct Desk {
    config: PathBuf,
    /// The port on the host's loopback interface that records requests from outside.
    pub(crate) port: u16,
    visits: Arc<Mutex<Vec<String>>>,
}

/// Runs a test in a world of its own, with a desk.
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

    /// Returns a shell command that sends a word to the port on the host's loopback interface.
    pub(crate) fn request(&self, word: &str) -> String {
        format!("bash -c 'echo {word} >/dev/tcp/127.0.0.1/{}'", self.port)
    }

    /// Returns whether a request with a word has arrived.
    pub(crate) fn arrived(&self, word: &str) -> bool {
        let visits = self.visits.lock().unwrap_or_else(PoisonError::into_inner);
        visits.iter().any(|visit| visit.contains(word))
    }

    /// Returns a command of the user on the host.
    pub(crate) fn on_host(&self, program: &[&str]) -> Command {
        let mut command = Command::new(program[0]);
        command.args(&program[1..]);
        self.furnish(&mut command);
        command
    }

    /// Returns a command of the user in a tunnel.
    pub(crate) fn inside(&self, options: &[&str], program: &[&str]) -> Command {
        let mut command = Launcher::new(&self.config).options(options).program(program).command();
        self.furnish(&mut command);
        command
    }

    /// Returns the same command without the protection, for the twin.
    pub(crate) fn unguarded(&self, program: &[&str]) -> Command {
        let mut command = self.inside(&["--name", "twin"], program);
        command.env(variables::BREAK, "sockets");
        command
    }

    /// Starts a session bus with a service that the bus can start. The service sends the word "activated".
    ///
    /// # Errors
    /// [`lab::Skip`] without dbus-daemon.
    pub(crate) fn start_session_bus(&self) -> Result<()> {
        require("dbus-daemon")?;
        fs::create_dir("/tmp/services")?;
        let service = format!("[D-BUS Service]\nName=net.example.Fetcher\nExec=/bin/{}\n", self.request("activated"));
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
        command.env("PATH", path).env("HOME", HOME);
        if Path::new(RUNTIME).exists() {
            command.env("XDG_RUNTIME_DIR", RUNTIME);
        }
        command.env("LANG", "C.UTF-8").env("TERM", "xterm").env("SHELL", "/bin/sh").current_dir(HOME);
        if Path::new(BUS).exists() {
            command.env("DBUS_SESSION_BUS_ADDRESS", format!("unix:path={BUS}"));
        }
    }

    /// Runs a client that asks a process outside for a request, which must arrive only without the protection. `client`
    /// is a shell script that contains `REQUEST`. Returns the output of the refused client.
    pub(crate) fn expect_refusal(&self, client: &str) -> Result<String> {
        let script = |word: &str| client.replace("REQUEST", &self.request(word));
        run(self.unguarded(&["sh", "-c", &script("allowed")]))?;
        lab::wait_until(PATIENCE, "the twin's request did not arrive", || Ok(self.arrived("allowed")))?;
        let output = run(self.inside(&[], &["sh", "-c", &script("leak")]))?;
        std::thread::sleep(CALM);
        ensure!(!self.arrived("leak"), "the request was executed outside: {}", text_of(&output));
        let said = text_of(&output);
        ensure!(said.contains("outside the tunnel"), "no message about it: {said}");
        Ok(said)
    }
}

pub(crate) const HOME: &str = "/tmp/home";
pub(crate) const RUNTIME: &str = "/run/user/0";
const BUS: &str = "/run/user/0/bus";

/// Starts a server, which ends with the test's world.
pub(crate) fn serve(mut command: Command) -> Result<Child> {
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().with_context(|| format!("{command:?}"))
}

/// Requires a program from Debian's packages.
///
/// # Errors
/// [`lab::Skip`] if it is not installed.
pub(crate) fn require(program: &str) -> Result<()> {
    lab::require_program(program, variables::REQUIRE_PROGRAMS)
}

/// Returns whether tests run with tunnels that have one user only, root. tests/rootless/desktop.rs has those with
/// another one.
pub(crate) fn has_one_user() -> bool {
    let is_rootless = lab::tunnel::is_rootless();
    if is_rootless {
        println!("a rootless tunnel has no other user");
    }
    is_rootless
}

/// Waits until a file exists.
pub(crate) fn wait_for_file(path: &str) -> Result<()> {
    lab::wait_until(PATIENCE, &format!("{path} does not appear"), || Ok(Path::new(path).exists()))
}

/// Returns the inode of a file.
pub(crate) fn inode(path: &str) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;

    Ok(fs::symlink_metadata(path).with_context(|| path.to_owned())?.ino())
}

pub(crate) use lab::launcher::{run, text_of};
pub(crate) use lab::require_users;
