//! The engines.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Result, ensure};
use lab::agent::Agent;
use lab::launcher::{agent_binary, run, stdout, text_of};
use lab::{require_program, require_users, variables};

use crate::images;

/// The directory of an engine's whole state, in the world.
const STATE: &str = "/run/engine";

/// The OCI runtime below podman.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Runtime {
    Runc,
    Crun,
}

impl Runtime {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Runtime::Runc => "runc",
            Runtime::Crun => "crun",
        }
    }
}

/// An engine with the images of [`images`].
#[derive(Debug)]
pub(crate) struct Engine {
    words: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
}

impl Engine {
    /// Returns podman as root, with netavark's bridge.
    ///
    /// # Errors
    /// [`lab::Skip`] where it cannot run.
    pub(crate) fn podman(runtime: Runtime) -> Result<Self> {
        require_users()?;
        for program in ["podman", runtime.name()] {
            require_program(program, variables::REQUIRE_ENGINES)?;
        }
        let state = Path::new(STATE);
        fs::create_dir_all(state)?;
        let cgroups = match runtime {
            Runtime::Runc => "",
            // crun cannot use a hierarchy of control groups that mixes both versions, as some machines have.
            Runtime::Crun => {
                let mount = "mount -t cgroup2 cgroup2 /sys/fs/cgroup";
                let mut command = Command::new("unshare");
                command.args(["--cgroup", "sh", "-c", mount]);
                stdout(command)?;
                "[containers]\ncgroups = \"disabled\"\n"
            }
        };
        let file = state.join("containers.conf");
        let text = format!(
            "{cgroups}[network]\nnetwork_backend = \"netavark\"\nnetwork_config_dir = \"{STATE}/networks\"\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\nruntime = \"{}\"\n\
             tmp_dir = \"{STATE}/tmp\"\nstatic_dir = \"{STATE}/static\"\nvolume_path = \"{STATE}/volumes\"\n\
             image_copy_tmp_dir = \"{STATE}\"\n",
            runtime.name(),
        );
        fs::write(&file, text)?;
        let words =
            ["podman", "--root", "/run/engine/root", "--runroot", "/run/engine/run", "--storage-driver", "overlay"];
        let engine = Self {
            words: words.map(OsString::from).into(),
            environment: vec![("CONTAINERS_CONF", file.into()), ("TMPDIR", STATE.into())],
        };
        engine.load()?;
        Ok(engine)
    }

    fn load(&self) -> Result<()> {
        self.succeed(["load", "-q", "-i"].map(OsString::from).into_iter().chain([images::app()?.into()]))?;
        Ok(())
    }

    /// Returns a command of the engine, such as `ps`.
    pub(crate) fn command<I: IntoIterator<Item: AsRef<OsStr>>>(&self, words: I) -> Command {
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]).args(words).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(std::process::Stdio::null());
        command
    }

    /// Runs a command of the engine, whether it succeeds or not.
    pub(crate) fn run<I: IntoIterator<Item: AsRef<OsStr>>>(&self, words: I) -> Result<Output> {
        run(self.command(words))
    }

    /// Runs a command of the engine, which must succeed, and returns its standard output.
    pub(crate) fn succeed<I: IntoIterator<Item: AsRef<OsStr>>>(&self, words: I) -> Result<String> {
        stdout(self.command(words))
    }

    /// Runs a command of the engine, which must fail, and returns its whole output.
    pub(crate) fn fail<I: IntoIterator<Item: AsRef<OsStr>>>(&self, words: I) -> Result<String> {
        let output = self.run(words)?;
        ensure!(!output.status.success(), "it must fail: {}", text_of(&output));
        Ok(text_of(&output))
    }

    /// Returns a command that runs the application's container with options for `run`. The words of its program are to
    /// be appended.
    pub(crate) fn application(&self, options: &[&str]) -> Command {
        let agent = agent_binary().display();
        let mut command = self.command(["run", "--rm", "-i", "--pull=never", "-v", "/usr:/usr:ro"]);
        command.arg("-v").arg(format!("{agent}:{agent}:ro"));
        for name in [variables::PATIENCE, variables::STAGE] {
            command.args(["-e", name]);
        }
        command.args(options).arg(images::APP);
        command
    }

    /// Starts the agent as the application.
    pub(crate) fn agent(&self, options: &[&str]) -> Result<Agent> {
        Agent::start(&mut self.application(options))?.begun()
    }
}
