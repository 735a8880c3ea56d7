//! Real name service cache daemons on the host: the C library asks them before it looks at any file.

use std::fs::{self, File};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::world::{FILES, Skip};

/// Their directory, which is their own: Debian's removes and makes it at each start.
const DIRECTORY: &str = "/run/nscd";
const SOCKET: &str = "/run/nscd/socket";

/// How long a daemon may take to begin.
const PATIENCE: Duration = Duration::from_secs(10);

const CONFIGURATION: &str = "debug-level 2\nparanoia no\nenable-cache hosts yes\nenable-cache passwd no\n\
    enable-cache group no\npersistent hosts no\nshared hosts no\n";

/// Which daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// glibc's own, Debian's package nscd: where `VPN_EXEC_NSCD` says, or installed.
    Nscd,
    /// Debian's package unscd, which cannot be installed beside the other: where `VPN_EXEC_UNSCD` says.
    Unscd,
}

/// A daemon that writes down who asks for what. It can be stopped, and started again.
#[derive(Debug)]
pub struct Nscd {
    executable: PathBuf,
    log: PathBuf,
    running: Option<Child>,
}

impl Nscd {
    /// Starts one.
    ///
    /// # Errors
    /// [`Skip`] where there is none.
    pub fn start(kind: Kind) -> Result<Self> {
        let executable = match kind {
            Kind::Nscd => std::env::var_os("VPN_EXEC_NSCD").or_else(|| Some("/usr/sbin/nscd".into())),
            Kind::Unscd => std::env::var_os("VPN_EXEC_UNSCD"),
        };
        let Some(executable) = executable.map(PathBuf::from).filter(|path| path.exists()) else {
            let reason = match kind {
                Kind::Nscd => "there is no nscd: install that package, or unpack it and say where in VPN_EXEC_NSCD",
                Kind::Unscd => "there is no unscd: unpack that package, and say where in VPN_EXEC_UNSCD",
            };
            return Err(Skip { reason: reason.into(), unless: "VPN_EXEC_REQUIRE_PEERS" }.into());
        };
        let mut nscd = Self { executable, log: Path::new(FILES).join("nscd.log"), running: None };
        nscd.start_again()?;
        Ok(nscd)
    }

    /// Starts it, in a directory that is made anew.
    pub fn start_again(&mut self) -> Result<()> {
        self.stop()?;
        fs::create_dir_all(DIRECTORY)?;
        let configuration = Path::new(FILES).join("nscd.conf");
        fs::write(&configuration, CONFIGURATION)?;
        let log = File::options().append(true).create(true).open(&self.log)?;
        let mut command = Command::new(&self.executable);
        command.arg("-d").arg("-f").arg(&configuration);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.running = Some(command.spawn().with_context(|| format!("cannot start {}", self.executable.display()))?);
        let deadline = Instant::now() + crate::patience(PATIENCE);
        while UnixStream::connect(SOCKET).is_err() {
            ensure!(Instant::now() < deadline, "nscd does not listen: {}", self.log()?);
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Stops it, and removes its directory, as its service does.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(mut child) = self.running.take() {
            child.kill()?;
            child.wait()?;
        }
        match fs::remove_dir_all(DIRECTORY) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// All that it has written down: each question with the name that it is about.
    pub fn log(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(&self.log)?).into_owned())
    }
}

impl Drop for Nscd {
    fn drop(&mut self) {
        // The world ends soon after, and takes it along.
        let _ = self.stop();
    }
}
