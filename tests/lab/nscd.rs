//! Real name service cache daemons on the host. The C library asks them before it reads any file.

use std::fs::{self, File};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::shared::variables;
use crate::skip::Skip;
use crate::world::FILES;

/// The directory of the daemons. Debian's service removes and creates it at each start.
const DIRECTORY: &str = "/run/nscd";
const SOCKET: &str = "/run/nscd/socket";

/// The time in which a daemon starts.
const PATIENCE: Duration = Duration::from_secs(10);

const CONFIGURATION: &str = "debug-level 2\nparanoia no\nenable-cache hosts yes\nenable-cache passwd no\n\
    enable-cache group no\npersistent hosts no\nshared hosts no\n";

/// A daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// glibc's, in Debian's package nscd: see [`variables::NSCD`].
    Nscd,
    /// The one in Debian's package unscd: see [`variables::UNSCD`].
    Unscd,
}

/// A running daemon that logs its clients' questions.
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
    /// [`Skip`] if it is not installed.
    pub fn start(kind: Kind) -> Result<Self> {
        let executable = match kind {
            Kind::Nscd => std::env::var_os(variables::NSCD).or_else(|| Some("/usr/sbin/nscd".into())),
            Kind::Unscd => std::env::var_os(variables::UNSCD),
        };
        let Some(executable) = executable.map(PathBuf::from).filter(|path| path.exists()) else {
            let reason = match kind {
                Kind::Nscd => "nscd is not installed: install the package, or unpack it and set VPN_EXEC_NSCD",
                Kind::Unscd => "unscd is not unpacked: unpack the package and set VPN_EXEC_UNSCD",
            };
            return Err(Skip::error(reason, variables::REQUIRE_PEERS));
        };
        let mut nscd = Self { executable, log: Path::new(FILES).join("nscd.log"), running: None };
        nscd.start_again()?;
        Ok(nscd)
    }

    /// Restarts it in a new directory.
    ///
    /// # Errors
    /// If it does not start.
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
            ensure!(Instant::now() < deadline, "nscd has not started: {}", self.log()?);
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Stops it, and removes its directory, as its service does.
    ///
    /// # Errors
    /// If the directory cannot be removed.
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

    /// Returns its log, which contains the names in all questions.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn log(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(&self.log)?).into_owned())
    }
}

impl Drop for Nscd {
    fn drop(&mut self) {
        // The end of the world ends it in any case.
        let _ = self.stop();
    }
}
