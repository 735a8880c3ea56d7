//! Tunnels without root: an ordinary user makes them in a user namespace.

mod local;

use std::time::Duration;

use anyhow::Result;
use lab::{Lab, Launcher, PROVIDER, Peer, Reach, WEB};

/// The time in which a tunnel carries its first packet, with the handshake.
const BEGIN: Duration = Duration::from_secs(20);

/// The directory of the user's tunnels in a test's world.
const RUNTIME: &str = "/run/lab";

fn rootless(lab: &Lab, reach: Reach) -> Result<Launcher> {
    let launcher = Launcher::new(lab.file(&lab.wg_quick_text(reach))?).env("XDG_RUNTIME_DIR", RUNTIME);
    Ok(if lab::tunnel::is_rootless() { launcher } else { launcher.option("--rootless") })
}

#[test]
fn a_program_is_in_a_tunnel_without_privileges() {
    lab::test(Peer::Ours, |lab| {
        let mut agent = rootless(lab, Reach::Ipv4)?.start_agent()?.begun()?;
        let page = agent.succeed_within(BEGIN, &format!("get http://{}/", WEB.ipv4))?;
        assert_eq!(page, PROVIDER.ipv4.to_string());
        agent.finish_well().map(drop)
    });
}
