//! The gateway of a rootless tunnel, the barrier behind the packet rules and the routes inside: nothing leaves it but
//! what the relay passes on.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::slice::from_mut;

use anyhow::Result;
use lab::{Lab, Launcher, PRIVATE_LAN, Peer, Reach, tunnel};

use crate::judge::{Judge, Verdict};
use crate::stages::{Expected, InheritedSocket, NAME, NONE, allow_pings, inside_by, judged};

/// The directory of the tunnels' files, where the other tests' tunnels are root's.
const RUNTIME_DIRECTORY: &str = "/run/user/gateway";

/// Judges the program of a rootless tunnel without packet rules and with all of its routes to the link, and, besides,
/// without other protections. The private local network is open.
fn judge_without(lab: &Lab, others: &str, expected: Expected) -> Result<Verdict> {
    allow_pings()?;
    lab.join_private_lan()?;
    let judge = Judge::new(lab, None)?;
    let mut launcher = Launcher::new(lab.wg_quick_file(Reach::Ipv4)?).options(["--name", NAME]);
    if !tunnel::is_rootless() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(RUNTIME_DIRECTORY)?;
        launcher = launcher.option("--rootless").env("XDG_RUNTIME_DIR", RUNTIME_DIRECTORY);
    }
    let launcher = launcher.options(["--local", "192.168.7.0/24", "--local", "fd07::/64"]);
    let mut agent = inside_by(launcher, &InheritedSocket::new()?, "up", &format!("rules,routes{others}"))?;
    let verdict = judged(from_mut(&mut agent), &judge, "up", expected)?;
    if others.is_empty() {
        // The relay works, so packets do reach the gateway.
        agent.succeed(&format!("get http://{}/", PRIVATE_LAN.ipv4))?;
    }
    agent.finish()?;
    Ok(verdict)
}

#[test]
fn a_gateway_leads_nowhere_even_without_rules_and_routes_inside() {
    lab::test(Peer::Ours, |lab| judge_without(lab, "", NONE)?.expect_no_leak());
}

#[test]
fn without_the_gateway_a_program_reaches_the_host() {
    let sent: Expected = |vector| {
        ["udp4-internet", "udp6-internet", "tcp4-host", "dns-udp4-gateway", "dns-udp4-neighbour", "mdns4", "broadcast"]
            .contains(&vector.name.as_str())
    };
    lab::test(Peer::Ours, move |lab| judge_without(lab, ",gateway,user-namespace", sent)?.expect_leaks(sent));
}
