//! The engines.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::launcher::{agent_binary, run, stdout, text_of};
use lab::world::FILES;
use lab::{require_program, require_users, variables};

use crate::containerd::Containerd;
use crate::images;

/// The directory of an engine's whole state, in the world.
pub(crate) const STATE: &str = "/run/engine";

/// The time in which a daemon starts on an ordinary machine.
pub(crate) const STARTED: Duration = Duration::from_secs(30);

/// Redirects the output of a daemon to a file.
pub(crate) fn logging_to<'a>(command: &'a mut Command, name: &str) -> Result<&'a mut Command> {
    let log = fs::File::create(Path::new(STATE).join(name))?;
    Ok(command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log))
}

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

/// Mounts a hierarchy of control groups for crun, which cannot use one that mixes both versions, as some machines have.
fn mount_unified_cgroups() -> Result<()> {
    let mut command = Command::new("unshare");
    command.args(["--cgroup", "sh", "-c", "mount -t cgroup2 cgroup2 /sys/fs/cgroup"]);
    stdout(command).map(drop)
}

/// An engine with the images of [`images`].
#[derive(Debug)]
pub(crate) struct Engine {
    words: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Podman,
    RootlessPodman,
    Docker,
}

/// The user of a rootless engine, and the subordinate user IDs (subuid(5)) among those of the world.
const USER: u32 = 1000;
const SUBORDINATE: &str = "engine:10000:50000\n";

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
            Runtime::Crun => {
                mount_unified_cgroups()?;
                "[containers]\ncgroups = \"disabled\"\n"
            }
        };
        let file = state.join("containers.conf");
        let text = format!(
            "{cgroups}[network]\nnetwork_backend = \"netavark\"\nnetwork_config_dir = \"{STATE}/networks\"\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\nruntime = \"{}\"\n\
             tmp_dir = \"{STATE}/tmp\"\nstatic_dir = \"{STATE}/static\"\nvolume_path = \"{STATE}/volumes\"\n\
             image_copy_tmp_dir = \"{STATE}\"\n\
             infra_image = \"{}\"\n",
            runtime.name(),
            images::APP,
        );
        fs::write(&file, text)?;
        let words =
            ["podman", "--root", "/run/engine/root", "--runroot", "/run/engine/run", "--storage-driver", "overlay"];
        let engine = Self {
            words: words.map(OsString::from).into(),
            environment: vec![("CONTAINERS_CONF", file.into()), ("TMPDIR", STATE.into())],
            kind: Kind::Podman,
        };
        engine.load()?;
        Ok(engine)
    }

    /// Returns podman as an ordinary user, with slirp4netns.
    ///
    /// # Errors
    /// [`lab::Skip`] where it cannot run.
    pub(crate) fn rootless_podman() -> Result<Self> {
        require_users()?;
        for program in ["podman", "crun", "slirp4netns", "newuidmap"] {
            require_program(program, variables::REQUIRE_ENGINES)?;
        }
        mount_unified_cgroups()?;
        let home = Path::new(STATE);
        fs::create_dir_all(home)?;
        let passwd = format!("root:x:0:0::/root:/bin/sh\nengine:x:{USER}:{USER}::{STATE}:/bin/sh\n");
        let group = format!("root:x:0:\nengine:x:{USER}:\n");
        let files = [("passwd", &passwd[..]), ("group", &group), ("subuid", SUBORDINATE), ("subgid", SUBORDINATE)];
        for (name, text) in files {
            let own = Path::new(FILES).join(name);
            fs::write(&own, text)?;
            vpn_exec::linux::mounts::bind(&own, &Path::new("/etc").join(name))?;
        }
        let conf = home.join("containers.conf");
        let text = format!(
            "[containers]\ncgroups = \"disabled\"\n[engine]\ncgroup_manager = \"cgroupfs\"\n\
             events_logger = \"none\"\nruntime = \"crun\"\ninfra_image = \"{}\"\n",
            images::APP
        );
        fs::write(&conf, text)?;
        let runtime = home.join("runtime");
        fs::create_dir(&runtime)?;
        for path in [home, &runtime] {
            std::os::unix::fs::chown(path, Some(USER), Some(USER))?;
        }
        let (user, path) = (USER.to_string(), std::env::var("PATH")?);
        let words = ["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups", "--inh-caps=-all", "env", "-i"];
        let variables = [
            format!("PATH={path}"),
            format!("HOME={STATE}"),
            format!("XDG_RUNTIME_DIR={}", runtime.display()),
            format!("CONTAINERS_CONF={}", conf.display()),
            "podman".into(),
        ];
        let words = words.into_iter().map(OsString::from).chain(variables.map(OsString::from)).collect();
        let engine = Self { words, environment: Vec::new(), kind: Kind::RootlessPodman };
        engine.load()?;
        Ok(engine)
    }

    /// Adds options that precede every command.
    pub(crate) fn with_options(mut self, options: &[&str]) -> Self {
        self.words.extend(options.iter().map(OsString::from));
        self
    }

    /// Returns whether containers can share a pod.
    pub(crate) fn has_pods(&self) -> bool {
        self.kind != Kind::Docker
    }

    /// Makes a file the engine's user's, if that is not root.
    pub(crate) fn give_to_user(&self, file: &Path) -> Result<()> {
        if self.kind == Kind::RootlessPodman {
            std::os::unix::fs::chown(file, Some(USER), Some(USER))?;
        }
        Ok(())
    }

    /// Returns Docker with a containerd of its own.
    ///
    /// # Errors
    /// [`lab::Skip`] where it cannot run.
    pub(crate) fn docker() -> Result<Self> {
        Self::docker_in(std::env::var_os(variables::DOCKER).map(PathBuf::from))
    }

    /// [`Engine::docker`] as it is installed, not that of [`variables::DOCKER`].
    pub(crate) fn installed_docker() -> Result<Self> {
        Self::docker_in(None)
    }

    fn docker_in(unpacked: Option<PathBuf>) -> Result<Self> {
        require_users()?;
        let path = |name: &str| unpacked.as_ref().map_or_else(|| name.into(), |root| root.join("usr").join(name));
        let (client, daemon) = match &unpacked {
            Some(_) => (path("bin/docker"), path("sbin/dockerd")),
            None => ("docker".into(), "dockerd".into()),
        };
        for program in [Path::new("containerd"), &client, &daemon] {
            require_program(&program.to_string_lossy(), variables::REQUIRE_ENGINES)?;
        }
        fs::create_dir_all(STATE)?;
        let containerd = Containerd::start(Path::new(STATE), "")?;
        let mut command = Command::new(&daemon);
        let socket = format!("unix://{STATE}/docker.sock");
        fs::write(format!("{STATE}/docker.json"), "{}")?;
        command.args(["--data-root", "/run/engine/docker", "--exec-root", "/run/engine/exec", "-H", &socket]);
        command.args(["--pidfile", "/run/engine/docker.pid", "--config-file", "/run/engine/docker.json"]);
        command.arg("--containerd").arg(containerd.socket());
        if unpacked.is_some() {
            command.arg("--userland-proxy-path").arg(path("sbin/docker-proxy"));
            command.arg("--init-path").arg(path("bin/docker-init"));
        }
        logging_to(&mut command, "docker.log")?.spawn().context("cannot start dockerd")?;
        let engine = Self {
            words: vec![client.into()],
            environment: vec![("DOCKER_HOST", socket.into()), ("DOCKER_CONFIG", STATE.into())],
            kind: Kind::Docker,
        };
        lab::wait_until(lab::patience(STARTED), "dockerd does not start: see docker.log", || {
            Ok(engine.run(["info"])?.status.success())
        })?;
        engine.load()?;
        Ok(engine)
    }

    fn load(&self) -> Result<()> {
        for image in [images::app()?, images::vpn_exec()?] {
            self.succeed([OsStr::new("load"), OsStr::new("-q"), OsStr::new("-i"), image.as_os_str()])?;
        }
        Ok(())
    }

    /// Returns a command of the engine, such as `ps`.
    pub(crate) fn command<I: IntoIterator<Item: AsRef<OsStr>>>(&self, words: I) -> Command {
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]).args(words).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null());
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
    /// be appended. It has no CAP_NET_RAW, as documented: no packet rule stops raw sockets.
    pub(crate) fn application(&self, options: &[&str]) -> Command {
        let agent = agent_binary().display();
        let mut command = self.command(["run", "--rm", "-i", "--cap-drop=NET_RAW", "-v", "/usr:/usr:ro"]);
        command.arg("-v").arg(format!("{agent}:{agent}:ro"));
        for name in [variables::PATIENCE, variables::STAGE] {
            command.args(["-e", name]);
        }
        command.args(options).arg(images::APP);
        command
    }

    /// Runs a command of vpn-exec in a container with CAP_NET_ADMIN alone. `options` are for `run`.
    pub(crate) fn vpn_exec(&self, options: &[&str], words: &[&str]) -> Command {
        let mut command = self.command(["run", "--read-only", "--security-opt=no-new-privileges"]);
        command.args(["--cap-drop=ALL", "--cap-add=NET_ADMIN", "--device=/dev/net/tun"]);
        command.args(options).arg(images::VPN_EXEC).args(words);
        command
    }

    /// Starts the agent as the application.
    pub(crate) fn agent(&self, options: &[&str]) -> Result<Agent> {
        Agent::start(&mut self.application(options))?.begun()
    }
}
