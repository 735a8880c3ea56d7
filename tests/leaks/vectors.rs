//! The vectors as the judge knows them: their names, and the protections that stop them. The attempts are the agent's,
//! in `tests/agent/vectors.rs`, which has the list.

use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow};
use lab::launcher::agent_binary;
use lab::stamp::Protection;

/// A way by which a program may try to send past the tunnel or to look up a name.
#[derive(Debug)]
pub(crate) struct Vector {
    pub(crate) name: String,
    /// The protection that stops it.
    pub(crate) protection: Protection,
}

/// Returns all vectors of the agent.
pub(crate) fn all() -> Result<&'static [Vector]> {
    static VECTORS: OnceLock<Vec<Vector>> = OnceLock::new();
    if let Some(vectors) = VECTORS.get() {
        return Ok(vectors);
    }
    let mut command = std::process::Command::new(agent_binary());
    command.arg("vectors");
    let listed = lab::launcher::stdout(command)?;
    let vectors = listed.lines().map(|line| {
        let (name, protection) = line.split_once(' ').with_context(|| format!("invalid line {line:?}"))?;
        Ok(Vector { name: name.to_owned(), protection: protection.parse().map_err(|error: String| anyhow!(error))? })
    });
    let vectors = vectors.collect::<Result<Vec<_>>>()?;
    Ok(VECTORS.get_or_init(|| vectors))
}
