//! The kill switch: without a working tunnel, or outside of its networks, a program gets errors and never the host's
//! network.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use lab::{LAN, Lab, PROVIDER, Peer, ROUTER, Reach, TUNNEL_CLIENT, TUNNEL_RESOLVER, WEB};

use super::{assert_no_leak, finish, inside, outside, url, with_line};

/// The time in which traffic flows again. WireGuard retries a handshake every 5 s.
const FLOWS: Duration = Duration::from_secs(30);

/// Returns acts that ordinary programs perform.
fn ordinary_acts() -> Vec<String> {
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
    for act in ordinary_acts() {
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
fn without_vpn_exec_all_acts_succeed_and_are_seen() {
    lab::test(Peer::Ours, |lab| {
        let mut agent = outside()?;
        let passed = ordinary_acts().into_iter().filter(|act| agent.act(act).is_ok_and(|done| done.is_ok())).count();
        assert_eq!(passed, 3, "two pages and a look-up");
        finish(agent)?;
        assert_no_leak(lab).expect_err("it is seen");
        Ok(())
    });
}

#[test]
fn nothing_passes_while_the_provider_never_answers() {
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
fn nothing_passes_while_the_provider_is_gone_over_ipv4() {
    lab::test(Peer::Ours, |lab| a_provider_goes_and_comes_back(lab, Reach::Ipv4));
}

#[test]
fn nothing_passes_while_the_provider_is_gone_over_ipv6() {
    lab::test(Peer::Ours, |lab| a_provider_goes_and_comes_back(lab, Reach::Ipv6));
}

#[test]
fn nothing_passes_while_wireguard_go_is_gone() {
    lab::test(Peer::WireguardGo, |lab| a_provider_goes_and_comes_back(lab, Reach::Ipv4));
}

#[test]
fn nothing_passes_while_the_endpoints_name_is_unknown() {
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
fn a_program_in_a_tunnel_without_ipv6_has_no_ipv6() {
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
fn a_program_in_a_tunnel_without_ipv4_has_no_ipv4() {
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
fn addresses_outside_of_a_split_tunnel_are_unreachable() {
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

/// The program's /etc/resolv.conf names the provider's resolver, which is silent here.
#[test]
fn dns_goes_through_the_tunnel_or_fails() {
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
