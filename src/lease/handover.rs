//! The configuration that a keeper hands to every lease holder, with its keys.
//!
//! It is a sealed file in memory (memfd_create(2)), which nothing can change. If the keeper is killed, any lease holder
//! can start a successor with it. Reading the user's file again would not do, because it may have changed or be gone.
//! Launchers hold only the descriptor, and have no copy of the keys in their memory.
//!
//! The file of a rootless tunnel contains the [`Plan`] as well. The copy on the disk can be replaced by any program of
//! the user, and a keeper does for its tunnel what the plan says.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::config::{BackendChoice, Config, Dns, Local, MAX_BYTES, Mtu, OpenPorts, wg_quick};
use crate::linux::memory_file;
use crate::names::TunnelName;
use crate::plan::Plan;

/// The most bytes of the settings besides the `wg-quick` file. They come from a profile of at most [`MAX_BYTES`] and
/// from the command line.
const MAX_SETTINGS: usize = 4 * MAX_BYTES;

/// The most bytes of a plan, which has several lines for each network of the file.
const MAX_PLAN: usize = 64 * MAX_BYTES;

/// The configuration of a tunnel, to be handed over.
pub struct Handover {
    settings: Settings,
    contents: Zeroizing<Vec<u8>>,
}

/// The settings besides the `wg-quick` file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    name: TunnelName,
    /// The name of the `wg-quick` file in messages.
    file: String,
    backend: BackendChoice,
    mtu: Option<Mtu>,
    dns: Dns,
    local: Local,
    open: Vec<OpenPorts>,
    allow_hooks: bool,
    /// The plan of a running rootless tunnel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    plan: Option<Box<Plan>>,
}

impl std::fmt::Debug for Handover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handover").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Handover {
    /// Combines a configuration with the `wg-quick` file that it was read from: the file's name for messages, and its
    /// contents.
    pub fn new(config: &Config, file: &str, contents: &[u8]) -> Self {
        let settings = Settings {
            name: config.name.clone(),
            file: file.to_owned(),
            backend: config.backend,
            mtu: config.mtu,
            dns: config.dns.clone(),
            local: config.local.clone(),
            open: config.open.clone(),
            allow_hooks: config.allow_hooks,
            plan: None,
        };
        Self { settings, contents: Zeroizing::new(contents.to_vec()) }
    }

    /// Writes the configuration into a sealed file in memory, without a plan.
    ///
    /// # Errors
    /// If the file cannot be created.
    pub fn seal(&self) -> io::Result<OwnedFd> {
        self.write(None)
    }

    /// Writes the configuration of a running tunnel into a sealed file in memory, with its plan if it is rootless.
    ///
    /// # Errors
    /// If the file cannot be created.
    pub fn seal_with(&self, plan: &Plan) -> io::Result<OwnedFd> {
        self.write(plan.rootless.then(|| Box::new(plan.clone())))
    }

    fn write(&self, plan: Option<Box<Plan>>) -> io::Result<OwnedFd> {
        let mut text = Zeroizing::new(Vec::new());
        let settings = serde_json::to_vec(&Settings { plan, ..self.settings.clone() })?;
        text.reserve_exact(settings.len() + 1 + self.contents.len());
        text.extend_from_slice(&settings);
        text.push(b'\n');
        text.extend_from_slice(&self.contents);
        memory_file::seal(&text)
    }

    /// Reads the configuration from a sealed file in memory.
    ///
    /// # Errors
    /// If the file is not sealed, or does not contain a configuration.
    pub fn open(file: BorrowedFd<'_>) -> io::Result<Self> {
        let text = memory_file::read(file, MAX_SETTINGS + MAX_PLAN + MAX_BYTES)?;
        let invalid = || {
            io::Error::new(io::ErrorKind::InvalidData, "the file does not contain a configuration that was handed over")
        };
        let end = text.iter().position(|byte| *byte == b'\n').ok_or_else(invalid)?;
        let settings = serde_json::from_slice(&text[..end]).map_err(|_| invalid())?;
        Ok(Self { settings, contents: Zeroizing::new(text[end + 1..].to_vec()) })
    }

    /// Returns the plan of the running tunnel, if it is rootless.
    pub fn plan(&self) -> Option<&Plan> {
        self.settings.plan.as_deref()
    }

    /// Returns the configuration, without the program's options.
    ///
    /// # Errors
    /// If the `wg-quick` file is invalid. The report contains no secrets.
    pub fn config(&self) -> Result<Config, String> {
        let settings = self.settings.clone();
        let (wireguard, _) = wg_quick::parse(&settings.file, &self.contents).map_err(|found| found.render(false))?;
        let Settings { name, backend, mtu, dns, local, open, allow_hooks, .. } = settings;
        Ok(Config { backend, mtu, dns, local, open, allow_hooks, ..Config::new(name, wireguard) })
    }
}
