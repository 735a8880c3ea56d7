//! Closed whenever the tunnel is not there, not yet there, or not meant: errors, and never the host's network.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use lab::{LAN, Lab, PROVIDER, Peer, ROUTER, Reach, TUNNEL_CLIENT, TUNNEL_RESOLVER, WEB};

use super::{assert_no_leak, finish, inside, outside, url, with_line};

/// How long traffic may take to flow (again): WireGuard retries a handshake every 5 s.
const FLOWS: Duration = Duration::from_secs(30);

/// What programs do all day.
fn everyday() -> Vec<String> {
    let mut acts = Vec::new();
    for address in WEB.both() {
        acts.push(format!("get {}", url(address)));
        acts.push(format!("send {}", SocketAddr::new(address, 443)));
    }
    for resolver in [TUNNEL_RESOLVER.ipv4, ROUTER.ipv4] {
        acts.push(format!("lookup {resolver} web.example"));
    }
    acts
}

fn nothing_passes(agent: &mut lab::agent::Agent) -> Result<()> {
    for act in everyday() {
        agent.fail(&act)?;
    }
    Ok(())
}

fn encrypted_packets_sent(lab: &Lab) -> Result<usize> {
    let to_provider = |packet: &lab::Packet| {
        packet.outgoing && packet.flow.as_ref().is_some_and(|flow| PROVIDER.both().contains(&flow.destination.ip()))
    };
    Ok(lab.capture.uplink()?.iter().filter(|packet| to_provider(packet)).count())
}

#[test]
fn without_vpn_exec_everything_passes_and_is_seen() {
    lab::test(Peer::Ours, |lab| {
        let mut agent = outside()?;
        let passed = everyday().into_iter().filter(|act| agent.act(act).is_ok_and(|done| done.is_ok())).count();
        assert_eq!(passed, 3, "two pages and a look-up");
        finish(agent)?;
        assert_no_leak(lab).expect_err("it is seen");
        Ok(())
    });
}

#[test]
fn a_provider_that_never_answers() {
    lab::test(Peer::Ours, |lab| {
        lab.provider.stop()?;
        for reach in [Reach::Ipv4, Reach::Name] {
            let mut agent = inside(lab, &lab.wg_quick_text(reach), &[])?;
            nothing_passes(&mut agent)?;
            finish(agent)?;
        }
        assert!(encrypted_packets_sent(lab)? > 0, "it was tried");
        assert_eq!(lab.web.clients().len(), 0);
        assert_no_leak(lab)
    });
}

fn a_provider_goes_and_comes_back(lab: &Lab, reach: Reach) -> Result<()> {
    let mut agent = inside(lab, &lab.wg_quick_text(reach), &["--wait", "30"])?;
    let get = format!("get {}", url(WEB.ipv4));
    assert_eq!(agent.succeed(&get)?, PROVIDER.ipv4.to_string());
    lab.provider.stop()?;
    lab.capture.forget()?;
    nothing_passes(&mut agent)?;
    assert!(encrypted_packets_sent(lab)? > 0, "the tunnel still tries");
    assert_eq!(lab.web.clients(), [PROVIDER.both()[0]]);
    assert_no_leak(lab)?;

    lab.provider.restart()?;
    assert_eq!(agent.succeed_within(FLOWS, &get)?, PROVIDER.ipv4.to_string());
    finish(agent)?;
    assert_no_leak(lab)
}

#[test]
fn a_provider_that_goes_and_comes_back() {
    lab::test(Peer::Ours, |lab| a_provider_goes_and_comes_back(lab, Reach::Ipv4));
}

#[test]
fn a_provider_that_goes_and_comes_back_by_ipv6() {
    lab::test(Peer::Ours, |lab| a_provider_goes_and_comes_back(lab, Reach::Ipv6));
}

#[test]
fn wireguard_go_that_goes_and_comes_back() {
    lab::test(Peer::WireguardGo, |lab| a_provider_goes_and_comes_back(lab, Reach::Ipv4));
}

#[test]
fn an_endpoint_whose_name_is_not_known_yet() {
    lab::test(Peer::Ours, |lab| {
        lab.resolver.forget("vpn.example");
        let mut agent = inside(lab, &lab.wg_quick_text(Reach::Name), &[])?;
        nothing_passes(&mut agent)?;
        assert_eq!(encrypted_packets_sent(lab)?, 0);
        lab.resolver.set("vpn.example", &PROVIDER.both());
        let seen = agent.succeed_within(FLOWS, &format!("get {}", url(WEB.ipv4)))?;
        assert_eq!(seen, PROVIDER.ipv4.to_string());
        finish(agent)?;
        assert_no_leak(lab)
    });
}

#[test]
fn a_tunnel_without_ipv6_leaves_no_ipv6() {
    lab::test(Peer::Ours, |lab| {
        let text =
            with_line(&lab.wg_quick_text(Reach::Ipv4), "Address", &format!("Address = {}/32", TUNNEL_CLIENT.ipv4));
        let mut agent = inside(lab, &text, &["--wait", "30"])?;
        assert_eq!(agent.succeed(&format!("get {}", url(WEB.ipv4)))?, PROVIDER.ipv4.to_string());
        let error = agent.fail(&format!("get {}", url(WEB.ipv6)))?;
        assert!(["ENETUNREACH", "EADDRNOTAVAIL"].contains(&error.as_str()), "{error}");
        let (routes, addresses) = (agent.succeed("routes")?, agent.succeed("addresses")?);
        for found in [&routes, &addresses] {
            let beside_lo: Vec<&str> =
                found.split(", ").filter(|line| line.contains(':') && !line.starts_with("lo ")).collect();
            assert_eq!(beside_lo, [""; 0], "of {found}");
        }
        assert!(routes.contains("wg0 0.0.0.0/0"), "{routes}");
        assert!(addresses.contains("lo ::1/128"), "{addresses}");
        finish(agent)?;
        assert_no_leak(lab)
    });
}

#[test]
fn a_tunnel_without_ipv4_leaves_no_way_by_ipv4() {
    lab::test(Peer::Ours, |lab| {
        let text =
            with_line(&lab.wg_quick_text(Reach::Ipv6), "Address", &format!("Address = {}/128", TUNNEL_CLIENT.ipv6));
        let mut agent = inside(lab, &text, &["--wait", "30"])?;
        assert_eq!(agent.succeed(&format!("get {}", url(WEB.ipv6)))?, PROVIDER.ipv6.to_string());
        assert_eq!(agent.fail(&format!("get {}", url(WEB.ipv4)))?, "ENETUNREACH");
        let routes = agent.succeed("routes")?;
        let by_ipv4: Vec<&str> = routes.split(", ").filter(|line| line.contains('.')).collect();
        assert!(by_ipv4.len() == 1 && by_ipv4[0].starts_with("host0 ") && by_ipv4[0].ends_with("/31"), "{routes}");
        finish(agent)?;
        assert_no_leak(lab)
    });
}

#[test]
fn what_a_split_tunnel_does_not_cover_is_unreachable() {
    lab::test(Peer::Ours, |lab| {
        let allowed = format!("AllowedIPs = {}/32, {}/128", WEB.ipv4, TUNNEL_RESOLVER.ipv6);
        let text = with_line(&lab.wg_quick_text(Reach::Ipv4), "AllowedIPs", &allowed);
        let mut agent = inside(lab, &text, &["--wait", "30"])?;
        assert_eq!(agent.succeed(&format!("get {}", url(WEB.ipv4)))?, PROVIDER.ipv4.to_string());
        let looked_up = agent.succeed(&format!("lookup {} web.example", TUNNEL_RESOLVER.ipv6))?;
        assert_eq!(looked_up, format!("[{}]", WEB.ipv4));
        for address in
            [IpAddr::from(WEB.ipv6), ROUTER.ipv4.into(), ROUTER.ipv6.into(), LAN.ipv4.into(), PROVIDER.ipv4.into()]
        {
            assert_eq!(agent.fail(&format!("get {}", url(address)))?, "ENETUNREACH", "{address}");
        }
        finish(agent)?;
        assert_no_leak(lab)
    });
}

/// The program's own names file sends it to the provider's resolver, which is silent: nothing goes to the host's.
#[test]
fn names_are_looked_up_in_the_tunnel_or_not_at_all() {
    lab::test(Peer::Ours, |lab| {
        let mut agent = inside(lab, &lab.wg_quick_text(Reach::Ipv4), &["--wait", "30"])?;
        assert_eq!(agent.succeed("resolve web.example")?, format!("{} {}", WEB.ipv4, WEB.ipv6));
        let first = lab.tunnel_resolver.questions().into_iter().next().context("the provider's resolver was asked")?;
        assert_eq!(first.name, "web.example");
        lab.provider.stop()?;
        agent.fail("resolve web.example")?;
        finish(agent)?;
        assert_eq!(lab.resolver.questions(), []);
        assert_no_leak(lab)
    });
}
