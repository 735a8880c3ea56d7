//! The host and the program reach each other. The program reaches no other neighbour of the host.

use anyhow::{Context, Result};
use lab::http::{self, Page, WebServer};
use lab::{LAN, PROVIDER, Peer, Reach, WEB};

use super::{assert_no_leak, finish, inside, url};

/// Returns the addresses of an interface, without their prefix lengths.
fn addresses_of(agent: &mut lab::agent::Agent, interface: &str) -> Result<Vec<String>> {
    let all = agent.succeed("addresses")?;
    let of = all.split(", ").filter_map(|line| line.strip_prefix(interface)?.trim().split_once('/'));
    Ok(of.map(|(address, _)| address.to_owned()).collect())
}

fn page(address: &str, port: u16) -> String {
    if address.contains(':') { format!("http://[{address}]:{port}/") } else { format!("http://{address}:{port}/") }
}

#[test]
fn host_and_program_reach_each_other() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("the host reaches a rootless tunnel's programs by published ports only")?;
        let server = WebServer::start(&lab.host, 8080, Page::ClientAddress)?;
        // Also while the provider does not answer.
        lab.provider.stop()?;
        let mut agent = inside(lab, &lab.wg_quick_text(Reach::Ipv4), &[])?;
        let own = addresses_of(&mut agent, "host0")?;
        assert_eq!(own.len(), 2, "one of each family: {own:?}");

        let hosts = agent.succeed("resolve host.internal")?;
        let hosts: Vec<&str> = hosts.split(' ').collect();
        assert_eq!(hosts.len(), 2, "one of each family: {hosts:?}");
        for host in &hosts {
            let seen = agent.succeed(&format!("get {}", page(host, 8080)))?;
            assert!(own.contains(&seen), "the host sees {seen}, not one of {own:?}");
        }
        assert_eq!(agent.succeed("get http://host.internal:8080/")?, server.clients()[2].to_string());

        agent.succeed("serve 8081 inside")?;
        for address in &own {
            let answer = http::get(&page(address, 8081), std::time::Duration::from_secs(5));
            assert_eq!(answer.with_context(|| format!("at {address}"))?, "inside");
        }
        finish(agent)?;
        assert_no_leak(lab)
    });
}

#[test]
fn the_program_does_not_reach_the_local_network() {
    lab::test(Peer::Ours, |lab| {
        let mut agent = inside(lab, &lab.wg_quick_text(Reach::Ipv4), &["--wait", "30"])?;
        assert_eq!(agent.succeed(&format!("get {}", url(WEB.ipv4)))?, PROVIDER.ipv4.to_string());
        for address in LAN.both() {
            agent.fail(&format!("get {}", url(address)))?;
        }
        finish(agent)?;
        assert_eq!(lab.lan_page.clients().len(), 0);
        assert_no_leak(lab)?;

        let mut agent = super::outside()?;
        assert_eq!(agent.succeed(&format!("get {}", url(LAN.ipv4)))?, "a page in the local network");
        assert_no_leak(lab).expect_err("the capture sees the local network, too");
        finish(agent)
    });
}
