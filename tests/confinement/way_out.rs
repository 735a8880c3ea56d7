//! The way out: servers see the provider, and everything arrives, whole.

use std::time::Duration;

use anyhow::Result;
use lab::agent::Echo;
use lab::http::digest;
use lab::http::{Page, WebServer};
use lab::{HOST, Lab, PROVIDER, Peer, Reach, TUNNEL_RESOLVER, WEB};
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};

use super::{assert_no_leak, finish, inside, outside, url, with_line};

/// How long a tunnel may take for its first packet, the handshake included.
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

    // The same without vpn-exec: the servers see the host, and so does the judge.
    let mut agent = outside()?;
    assert_eq!(agent.succeed(&format!("get {}", url(WEB.ipv4)))?, HOST.ipv4.to_string());
    assert_eq!(agent.succeed(&format!("get {}", url(WEB.ipv6)))?, HOST.ipv6.to_string());
    finish(agent)?;
    assert_no_leak(lab).expect_err("the host's own traffic is no secret to the capture");
    Ok(())
}

#[test]
fn over_ipv4() {
    lab::test(Peer::Ours, |lab| servers_see_the_provider(lab, Reach::Ipv4));
}

#[test]
fn over_ipv6() {
    lab::test(Peer::Ours, |lab| servers_see_the_provider(lab, Reach::Ipv6));
}

#[test]
fn to_a_name() {
    lab::test(Peer::Ours, |lab| servers_see_the_provider(lab, Reach::Name));
}

#[test]
fn over_ipv4_to_wireguard_go() {
    lab::test(Peer::WireguardGo, |lab| servers_see_the_provider(lab, Reach::Ipv4));
}

#[test]
fn over_ipv6_to_wireguard_go() {
    lab::test(Peer::WireguardGo, |lab| servers_see_the_provider(lab, Reach::Ipv6));
}

/// The lab's provider always has a preshared key, so the tests above show that the right one works.
#[test]
fn a_wrong_preshared_key_is_no_way_out() {
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

/// Several megabytes, and single datagrams as large as the MTU allows. Fragments would be found: the capture knows none that
/// could be expected.
fn everything_arrives_whole(lab: &Lab, reach: Reach, mtu: usize) -> Result<()> {
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
fn everything_arrives_whole_by_ipv4() {
    lab::test(Peer::Ours, |lab| everything_arrives_whole(lab, Reach::Ipv4, 1420));
}

#[test]
fn everything_arrives_whole_by_ipv6() {
    lab::test(Peer::Ours, |lab| everything_arrives_whole(lab, Reach::Ipv6, 1420));
}

#[test]
fn everything_arrives_whole_by_wireguard_go() {
    lab::test(Peer::WireguardGo, |lab| everything_arrives_whole(lab, Reach::Ipv6, 1420));
}

/// A narrow way to the provider: the tunnel is made narrower, instead of its packets being cut.
#[test]
fn everything_arrives_whole_by_a_narrow_uplink() {
    lab::test(Peer::Ours, |lab| {
        let mut netlink = Netlink::open()?;
        let uplink = netlink.link_index(&"eth0".parse()?)?;
        netlink.execute_one(NetlinkRequest::set_mtu(uplink, "eth0", 1400))?;
        // Not by IPv6: the lab's provider does not know of the narrow cable, and fills its packets up to a multiple of 16 bytes.
        everything_arrives_whole(lab, Reach::Ipv4, 1320)
    });
}
