//! Traffic through the tunnel: servers see the provider's address, and data arrives complete.

use std::time::Duration;

use anyhow::Result;
use lab::agent::Echo;
use lab::http::digest;
use lab::http::{Page, WebServer};
use lab::{HOST, Lab, PROVIDER, Peer, Reach, TUNNEL_RESOLVER, WEB};
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};

use super::{assert_no_leak, finish, inside, outside, url, with_line};

/// The time in which a tunnel carries its first packet, with the handshake.
const BEGIN: Duration = Duration::from_secs(10);

fn servers_see_the_provider(lab: &Lab, reach: Reach) -> Result<()> {
    let mut agent = inside(lab, &lab.wg_quick_text(reach), &[])?;
    assert_eq!(agent.succeed_within(BEGIN, &format!("get {}", url(WEB.ipv4)))?, PROVIDER.ipv4.to_string());
    assert_eq!(agent.succeed_within(BEGIN, &format!("get {}", url(WEB.ipv6)))?, PROVIDER.ipv6.to_string());
    let lookup = agent.succeed(&format!("lookup {} web.example", TUNNEL_RESOLVER.ipv4))?;
    assert_eq!(lookup, format!("[{}]", WEB.ipv4));
    finish(agent)?;
    assert_no_leak(lab)?;
    assert_eq!(lab.web.clients(), PROVIDER.both());

    // The twin: without vpn-exec, servers see the host, and the capture sees the packets.
    let mut agent = outside()?;
    assert_eq!(agent.succeed(&format!("get {}", url(WEB.ipv4)))?, HOST.ipv4.to_string());
    assert_eq!(agent.succeed(&format!("get {}", url(WEB.ipv6)))?, HOST.ipv6.to_string());
    finish(agent)?;
    assert_no_leak(lab).expect_err("the host's own traffic is no secret to the capture");
    Ok(())
}

#[test]
fn servers_see_the_provider_over_ipv4() {
    lab::test(Peer::Ours, |lab| servers_see_the_provider(lab, Reach::Ipv4));
}

#[test]
fn servers_see_the_provider_over_ipv6() {
    lab::test(Peer::Ours, |lab| servers_see_the_provider(lab, Reach::Ipv6));
}

#[test]
fn servers_see_the_provider_with_an_endpoint_by_name() {
    lab::test(Peer::Ours, |lab| servers_see_the_provider(lab, Reach::Name));
}

#[test]
fn servers_see_wireguard_go_over_ipv4() {
    lab::test(Peer::WireguardGo, |lab| servers_see_the_provider(lab, Reach::Ipv4));
}

#[test]
fn servers_see_wireguard_go_over_ipv6() {
    lab::test(Peer::WireguardGo, |lab| servers_see_the_provider(lab, Reach::Ipv6));
}

/// The lab's provider always has a preshared key, so the tests above show that the right one works.
#[test]
fn a_wrong_preshared_key_connects_to_nothing() {
    lab::test(Peer::WireguardGo, |lab| {
        let wrong = "PresharedKey = FpCyhws9cxwWoV4xELtfJvjJN+zQVRPISllRWgeopVE=";
        let text = with_line(&lab.wg_quick_text(Reach::Ipv4), "PresharedKey", wrong);
        let mut agent = inside(lab, &text, &[])?;
        agent.fail(&format!("get {}", url(WEB.ipv4)))?;
        finish(agent)?;
        assert_eq!(lab.web.clients().len(), 0);
        assert_no_leak(lab)
    });
}

/// Transfers several megabytes, and datagrams as large as the MTU allows. The capture would report fragments as leaks.
fn data_arrives_complete(lab: &Lab, reach: Reach, mtu: usize) -> Result<()> {
    let page: String = (0..800_000).map(|number| format!("{number:06}")).collect();
    let expected = digest(&page);
    let _server = WebServer::start(&lab.web_site, 8000, Page::Text(page.leak()))?;
    let _echo = Echo::start(&lab.web_site, 7)?;
    let mut agent = inside(lab, &lab.wg_quick_text(reach), &["--wait", "30"])?;
    assert!(
        agent.succeed("links")?.split(", ").any(|link| link == format!("wg0 {mtu}")),
        "{}",
        agent.succeed("links")?
    );
    for (address, headers) in [(WEB.both()[0], 28), (WEB.both()[1], 48)] {
        let fetched = agent.succeed(&format!("digest http://{}/", std::net::SocketAddr::new(address, 8000)))?;
        assert_eq!(fetched, expected, "from {address}");
        let to = std::net::SocketAddr::new(address, 7);
        for size in [0, 1, 15, 16, 17, mtu - headers - 1, mtu - headers] {
            assert_eq!(agent.succeed_within(BEGIN, &format!("echo {to} {size}"))?, "the same", "{size} bytes to {to}");
        }
        assert_eq!(agent.fail(&format!("echo {to} {}", mtu - headers + 1))?, "EMSGSIZE");
    }
    finish(agent)?;
    assert_no_leak(lab)
}

#[test]
fn data_arrives_complete_by_ipv4() {
    lab::test(Peer::Ours, |lab| data_arrives_complete(lab, Reach::Ipv4, 1420));
}

#[test]
fn data_arrives_complete_by_ipv6() {
    lab::test(Peer::Ours, |lab| data_arrives_complete(lab, Reach::Ipv6, 1420));
}

#[test]
fn data_arrives_complete_by_wireguard_go() {
    lab::test(Peer::WireguardGo, |lab| data_arrives_complete(lab, Reach::Ipv6, 1420));
}

/// On an uplink with a small MTU, the tunnel gets a smaller MTU, so that its packets are not fragmented.
#[test]
fn data_arrives_complete_by_a_narrow_uplink() {
    lab::test(Peer::Ours, |lab| {
        let mut netlink = Netlink::open()?;
        let uplink = netlink.link_index(&"eth0".parse()?)?;
        netlink.execute_one(NetlinkRequest::set_mtu(uplink, "eth0", 1400))?;
        // Not by IPv6: the lab's provider does not know the small MTU, and pads its packets to a multiple of 16 bytes.
        data_arrives_complete(lab, Reach::Ipv4, 1320)
    });
}
