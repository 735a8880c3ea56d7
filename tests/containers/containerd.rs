//! containerd, for Docker and for its own CRI.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::engine::{STARTED, logging_to};

/// A running containerd.
#[derive(Debug)]
pub(crate) struct Containerd {
    socket: PathBuf,
}

impl Containerd {
    /// Starts it with `more` in its configuration.
    pub(crate) fn start(state: &Path, more: &str) -> Result<Self> {
        let socket = state.join("containerd.sock");
        let at = state.display();
        let text = format!(
            "version = 2\nroot = \"{at}/containerd\"\nstate = \"{at}/containerd-state\"\n\
             [grpc]\naddress = \"{}\"\n{more}",
            socket.display()
        );
        let file = state.join("containerd.toml");
        fs::write(&file, text)?;
        let mut command = Command::new("containerd");
        command.arg("-c").arg(&file);
        logging_to(&mut command, "containerd.log")?.spawn().context("cannot start containerd")?;
        lab::wait_until(lab::patience(STARTED), "containerd does not start: see containerd.log", || {
            Ok(std::os::unix::net::UnixStream::connect(&socket).is_ok())
        })?;
        Ok(Self { socket })
    }

    /// Returns the socket of its API.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }
}
