//! The first invariant, with real packets: a program in a tunnel has a way out by the tunnel, and never one by anything else.
//! What the program says is evidence of what works. Of leaks only the capture at the host's interfaces is, and each test that
//! finds none has a twin in which the same acts, done without vpn-exec, are seen there.

mod closed;
mod hostile;
mod instants;
mod neighbours;
mod way_out;

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use lab::agent::Agent;
use lab::{Lab, Launcher};

/// Runs the agent in a tunnel, and waits for it to begin.
fn inside(lab: &Lab, wg_quick: &str, options: &[&str]) -> Result<Agent> {
    Launcher::new(lab.file(wg_quick)?).options(options).start_agent()?.begun()
}

/// Runs the agent on the host, without vpn-exec.
fn outside() -> Result<Agent> {
    Agent::on_host()?.begun()
}

/// Ends the agent; it, and vpn-exec, must end well.
fn finish(agent: Agent) -> Result<()> {
    let (status, complaints) = agent.finish()?;
    ensure!(status.success(), "{status}: {complaints}");
    Ok(())
}

/// Nothing but encrypted packets to the provider, and the neighbourhood's own traffic, went over the host's interfaces.
fn assert_no_leak(lab: &Lab) -> Result<()> {
    let found = lab.capture.leaks()?;
    ensure!(found.is_empty(), "leaks on the uplink and the local network: {found:#?}");
    Ok(())
}

fn url(address: impl Into<IpAddr>) -> String {
    format!("http://{}/", SocketAddr::new(address.into(), 80))
}

/// Replaces a line of a text, found by how it begins.
fn with_line(text: &str, begin: &str, line: &str) -> String {
    assert!(text.lines().any(|old| old.starts_with(begin)), "no line begins with {begin:?}");
    text.lines().map(|old| if old.starts_with(begin) { line } else { old }).map(|line| format!("{line}\n")).collect()
}
