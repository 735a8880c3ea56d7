//! What a successor of a keeper needs and what is written down nowhere: the configuration with its keys.
//!
//! It is a sealed file in memory (memfd_create(2)) that nobody can change any more. The keeper hands it to every holder
//! of a lease, and whoever finds the keeper killed can start another one with it, without reading the user's file
//! again: that may be another by now, or none. The launchers hold it by its descriptor alone.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::config::{BackendChoice, Config, Dns, Local, MAX_BYTES, Mtu, OpenPorts, wg_quick};
use crate::linux::memory_file;
use crate::names::TunnelName;

/// The most bytes that the settings besides the `wg-quick` file may have: a profile has no more than [`MAX_BYTES`], nor
/// has a command line.
const MAX_SETTINGS: usize = 4 * MAX_BYTES;

/// A tunnel's configuration, to be handed to a keeper.
pub struct Handover {
    settings: Settings,
    contents: Zeroizing<Vec<u8>>,
}

/// What there is besides the `wg-quick` file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    name: TunnelName,
    /// What the `wg-quick` file is called in messages.
    file: String,
    backend: BackendChoice,
    mtu: Option<Mtu>,
    dns: Dns,
    local: Local,
    open: Vec<OpenPorts>,
    allow_hooks: bool,
}

impl std::fmt::Debug for Handover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handover").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Handover {
    /// A configuration, with the `wg-quick` file that it was read from: its name for messages, and its contents.
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
        };
        Self { settings, contents: Zeroizing::new(contents.to_vec()) }
    }

    /// Puts it into a file in memory.
    pub fn seal(&self) -> io::Result<OwnedFd> {
        let mut text = Zeroizing::new(Vec::new());
        let settings = serde_json::to_vec(&self.settings)?;
        text.reserve_exact(settings.len() + 1 + self.contents.len());
        text.extend_from_slice(&settings);
        text.push(b'\n');
        text.extend_from_slice(&self.contents);
        memory_file::seal(&text)
    }

    /// Reads it from a file in memory.
    ///
    /// # Errors
    /// Also if it is no such file, or one that could still be changed.
    pub fn open(file: BorrowedFd<'_>) -> io::Result<Self> {
        let text = memory_file::read(file, MAX_SETTINGS + MAX_BYTES)?;
        let invalid = || io::Error::new(io::ErrorKind::InvalidData, "this is no configuration that was handed over");
        let end = text.iter().position(|byte| *byte == b'\n').ok_or_else(invalid)?;
        let settings = serde_json::from_slice(&text[..end]).map_err(|_| invalid())?;
        Ok(Self { settings, contents: Zeroizing::new(text[end + 1..].to_vec()) })
    }

    /// Returns the configuration, without the program's options.
    ///
    /// # Errors
    /// If the `wg-quick` file in it is none: a report, without secrets.
    pub fn config(&self) -> Result<Config, String> {
        let settings = self.settings.clone();
        let (wireguard, _) = wg_quick::parse(&settings.file, &self.contents).map_err(|found| found.render(false))?;
        let Settings { name, backend, mtu, dns, local, open, allow_hooks, .. } = settings;
        Ok(Config { backend, mtu, dns, local, open, allow_hooks, ..Config::new(name, wireguard) })
    }
}
