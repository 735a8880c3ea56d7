//! Local networks: a program reaches those that were opened and no others, and sends no DNS there. Only opened ports
//! accept inbound connections, and the host forwards no other packets than before.

mod inbound;
mod names;
mod neighbours;
mod others;
mod rules;
mod split_dns;

use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::{Addresses, Lab, Launcher, Reach, Skip, Snapshot, local_networks};
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::registry;

/// The time in which an action succeeds that works at all.
const WORKS: Duration = Duration::from_secs(10);

/// Returns the addresses of a place in the private network that this kernel can open: IPv4, or both.
fn reachable(at: Addresses) -> Vec<IpAddr> {
    at.both()[..local_networks().len() / 2].to_vec()
}

/// Returns the path of the provider's file, which is written once.
fn file(lab: &Lab) -> Result<&'static str> {
    static FILE: OnceLock<String> = OnceLock::new();
    if let Some(file) = FILE.get() {
        return Ok(file);
    }
    let path = lab.wg_quick_file(Reach::Ipv4)?;
    Ok(FILE.get_or_init(|| path.display().to_string()))
}

/// Returns the state of the host before there is a tunnel.
fn untouched(lab: &Lab) -> Result<Snapshot> {
    file(lab)?;
    Snapshot::take()
}

fn assert_untouched(before: &Snapshot) -> Result<()> {
    let changes = before.changes_within(WORKS)?;
    ensure!(changes.is_empty(), "{changes:#?}");
    Ok(())
}

/// Starts the agent in a tunnel, and waits until it runs.
fn inside(lab: &Lab, options: &[&str]) -> Result<Agent> {
    Launcher::new(file(lab)?).options(options).start_agent()?.begun()
}

/// Ends the agent. It and vpn-exec must succeed. Returns their standard error.
fn finish(agent: Agent) -> Result<String> {
    agent.finish_well()
}

fn vpn_exec(arguments: &[&str]) -> Result<Output> {
    Ok(lab::vpn_exec(arguments).output()?)
}

fn works(arguments: &[&str]) -> Result<Output> {
    let output = vpn_exec(arguments)?;
    ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output)
}

/// Runs nft(8) in a namespace, and returns its output.
fn nft(site: &NetworkNamespace, arguments: &[&str]) -> Result<String> {
    let output = match site.run(|| Command::new("nft").args(arguments).output()) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let reason = "nft is not installed";
            return Err(Skip::error(reason, lab::variables::REQUIRE_PEERS));
        }
        other => other?,
    };
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "nft {arguments:?}: {errors}");
    Ok(text.into_owned())
}

fn url(address: impl Into<IpAddr>, port: u16) -> String {
    format!("http://{}/", SocketAddr::new(address.into(), port))
}

fn sysctl(parameter: &str) -> Result<String> {
    vpn_exec::linux::sysctl::get(parameter).with_context(|| parameter.to_owned())
}

fn keeper_of(name: &str) -> Result<i32> {
    let state = registry::read(&name.parse()?)?.context("there is a tunnel")?;
    Ok(state.keeper.cast_signed())
}
