//! Local networks of a rootless tunnel: the relay reaches those that were opened and no others.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use lab::agent::{Agent, Echo};
use lab::{HOST_ON_PRIVATE_LAN, LAN, Lab, PRIVATE_LAN, PROVIDER, Peer, Reach, WEB};

use super::{BEGIN, rootless};

const LOCAL: [&str; 4] = ["--local", "192.168.7.0/24", "--local", "fd07::/64"];

fn inside(lab: &Lab, options: &[&str]) -> Result<Agent> {
    rootless(lab, Reach::Ipv4)?.options(options).start_agent()?.begun()
}

fn url(address: impl Into<IpAddr>, port: u16) -> String {
    format!("http://{}/", SocketAddr::new(address.into(), port))
}

#[test]
fn a_program_reaches_the_opened_networks_and_no_others() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let echo = Echo::start(&lab.lan, 7)?;
        let mut agent = inside(lab, &LOCAL)?;
        for address in PRIVATE_LAN.both() {
            let page = agent.succeed(&format!("get {}", url(address, 80)))?;
            ensure!(page == "a page in the local network", "{page}");
            for size in [100, 1400] {
                agent.succeed(&format!("echo {} {size}", SocketAddr::new(address, 7)))?;
            }
        }
        let callers = lab.lan_page.clients();
        ensure!(callers == HOST_ON_PRIVATE_LAN.both(), "{callers:?}");
        for address in LAN.both() {
            agent.fail(&format!("get {}", url(address, 80)))?;
            agent.fail(&format!("echo {} 100", SocketAddr::new(address, 7)))?;
        }
        ensure!(lab.lan_page.clients().len() == 2 && echo.seen().len() == 4, "{:?}", echo.seen());
        let seen = agent.succeed_within(BEGIN, &format!("get {}", url(WEB.ipv4, 80)))?;
        ensure!(seen == PROVIDER.ipv4.to_string(), "{seen}");
        agent.finish_well()?;
        let leaks: Vec<_> =
            lab.capture.uplink()?.into_iter().filter(|packet| !packet.is_expected_on_uplink()).collect();
        ensure!(leaks.is_empty(), "{leaks:#?}");
        Ok(())
    });
}
