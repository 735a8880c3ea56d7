//! The first invariant, with real packets: a program in a tunnel sends through the tunnel, and never by any other way.
//! The program's answers prove what works. Leaks are judged by the capture on the host's interfaces, and each test
//! without a leak has a twin in which the capture sees the same acts without vpn-exec.

mod closed;
mod hostile;
mod moments;
mod neighbours;
mod traffic;

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use lab::agent::Agent;
use lab::{Lab, Launcher};

/// Starts the agent in a tunnel, and waits until it runs.
fn inside(lab: &Lab, wg_quick: &str, options: &[&str]) -> Result<Agent> {
    Launcher::new(lab.file(wg_quick)?).options(options).start_agent()?.begun()
}

/// Starts the agent on the host, without vpn-exec.
fn outside() -> Result<Agent> {
    Agent::on_host()?.begun()
}

/// Ends the agent. It and vpn-exec must succeed.
fn finish(agent: Agent) -> Result<()> {
    agent.finish_well().map(drop)
}

/// Requires that the host's interfaces carried only encrypted packets to the provider, and neighbour discovery.
fn assert_no_leak(lab: &Lab) -> Result<()> {
    let found = lab.capture.leaks()?;
    ensure!(found.is_empty(), "leaks on the uplink and the local network: {found:#?}");
    Ok(())
}

fn url(address: impl Into<IpAddr>) -> String {
    format!("http://{}/", SocketAddr::new(address.into(), 80))
}

/// Replaces the lines of a text that have a certain beginning.
fn with_line(text: &str, begin: &str, line: &str) -> String {
    assert!(text.lines().any(|old| old.starts_with(begin)), "no line begins with {begin:?}");
    text.lines().map(|old| if old.starts_with(begin) { line } else { old }).map(|line| format!("{line}\n")).collect()
}
