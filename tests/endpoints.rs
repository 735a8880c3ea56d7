//! The search for a provider's endpoint: several addresses, a name that is unknown yet, a neighbour, and a peer that
//! moves; and the moment at which the program starts. Time limits are generous, so that only hanging fails.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lab::agent::Agent;
use lab::{HOST, HOST_ON_LAN, LAN, Lab, Launcher, PROVIDER, PROVIDER_PORT, Packet, Peer, Reach, TUNNEL_CLIENT, WEB};
use vpn_exec::keys::{PrivateKey, PublicKey};
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::wireguard::userspace::{Sockets, UserspaceDevice};
use vpn_exec::wireguard::{Device, DeviceConfig, PeerConfig};

/// The time in which an action succeeds that works at all.
const WORKS: Duration = Duration::from_secs(60);

/// Unused addresses: routers answer with ICMP errors, if at all.
const DEAD_IPV4: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 33));
const DEAD_IPV6: IpAddr = IpAddr::V6(std::net::Ipv6Addr::new(0x2001, 0xdb8, 3, 0, 0, 0, 0, 0x33));

/// Starts the agent in a tunnel, without waiting for it.
fn start(lab: &Lab, wg_quick: &str, options: &[&str]) -> Result<Agent> {
    Launcher::new(lab.file(wg_quick)?).options(options).start_agent()
}

fn finish(agent: Agent) -> Result<()> {
    agent.finish_well().map(drop)
}

fn get(address: impl Into<IpAddr>) -> String {
    format!("get http://{}/", SocketAddr::new(address.into(), 80))
}

/// Waits until a condition holds.
fn eventually(what: &str, is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    lab::wait_until(lab::patience(WORKS), &format!("{what} does not happen"), is_so)
}

/// Counts handshake initiations that the host has sent to an address (the kernel's `MESSAGE_HANDSHAKE_INITIATION` is
/// 1).
fn initiations(packets: &[Packet], to: IpAddr) -> usize {
    let flows = packets.iter().filter(|packet| packet.outgoing).filter_map(|packet| packet.flow.as_ref());
    flows.filter(|flow| flow.destination.ip() == to && flow.payload.starts_with(&[1, 0, 0, 0])).count()
}

/// Counts questions to the host's resolver for the provider's IPv4 addresses. musl, the C library of a static build,
/// always asks both of the resolver's addresses, so only questions over IPv4 count.
fn questions(lab: &Lab) -> usize {
    let questions = lab.resolver.questions();
    let counts = |question: &&lab::dns::Question| question.kind == lab::dns::RecordType::A && question.from.is_ipv4();
    questions.iter().filter(|question| question.name == "vpn.example").filter(counts).count()
}

fn a_dead_address_leads_to_the_next(lab: &Lab, dead: IpAddr, living: IpAddr) -> Result<()> {
    lab.resolver.set("vpn.example", &[dead, living]);
    let mut agent = start(lab, &lab.wg_quick_text(Reach::Name), &["--wait", "60"])?.begun()?;
    assert_eq!(agent.succeed_within(WORKS, &get(WEB.ipv4))?, PROVIDER.ipv4.to_string());
    finish(agent)?;
    assert!(initiations(&lab.capture.uplink()?, living) > 0);
    Ok(())
}

#[test]
fn a_dead_address_leads_to_the_next_of_the_same_family() {
    lab::test(Peer::Ours, |lab| {
        a_dead_address_leads_to_the_next(lab, DEAD_IPV4, PROVIDER.ipv4.into())?;
        let tried = initiations(&lab.capture.uplink()?, DEAD_IPV4);
        assert!(tried > 0, "the dead address is the first, and was not tried");
        Ok(())
    });
}

/// The C library decides which family is tried first. One of these two tests begins with the dead address.
#[test]
fn a_dead_ipv6_address_leads_to_the_ipv4_address() {
    lab::test(Peer::Ours, |lab| a_dead_address_leads_to_the_next(lab, DEAD_IPV6, PROVIDER.ipv4.into()));
}

#[test]
fn a_dead_ipv4_address_leads_to_the_ipv6_address() {
    lab::test(Peer::Ours, |lab| a_dead_address_leads_to_the_next(lab, DEAD_IPV4, PROVIDER.ipv6.into()));
}

#[test]
fn a_dead_address_leads_to_wireguard_go() {
    lab::test(Peer::WireguardGo, |lab| a_dead_address_leads_to_the_next(lab, DEAD_IPV4, PROVIDER.ipv4.into()));
}

#[test]
fn a_name_is_resolved_again_when_all_its_addresses_are_dead() {
    lab::test(Peer::Ours, |lab| {
        lab.resolver.set("vpn.example", &[DEAD_IPV4]);
        let mut agent = start(lab, &lab.wg_quick_text(Reach::Name), &[])?.begun()?;
        eventually("a handshake with the dead address", || Ok(initiations(&lab.capture.uplink()?, DEAD_IPV4) > 0))?;
        lab.resolver.set("vpn.example", &PROVIDER.both());
        assert_eq!(agent.succeed_within(WORKS, &get(WEB.ipv4))?, PROVIDER.ipv4.to_string());
        assert!(questions(lab) >= 2);
        finish(agent)
    });
}

#[test]
fn an_unknown_name_is_resolved_again_with_growing_delays() {
    lab::test(Peer::Ours, |lab| {
        lab.resolver.forget("vpn.example");
        let begin = Instant::now();
        let mut agent = start(lab, &lab.wg_quick_text(Reach::Name), &[])?.begun()?;
        // At 0, 1, 3, 7 and 15 s, and once more if the lab's network is still changing. Without growing delays, there
        // would be as many questions as seconds.
        eventually("a fourth question", || Ok(questions(lab) >= 4))?;
        std::thread::sleep(Duration::from_secs(8).saturating_sub(begin.elapsed()));
        let (asked, elapsed) = (questions(lab), begin.elapsed().as_secs());
        assert!(asked <= (elapsed + 1).ilog2() as usize + 2, "{asked} questions within {elapsed} s");
        assert_eq!(initiations(&lab.capture.uplink()?, PROVIDER.ipv4.into()), 0);
        agent.fail(&get(WEB.ipv6))?;

        lab.resolver.set("vpn.example", &PROVIDER.both());
        assert_eq!(agent.succeed_within(WORKS, &get(WEB.ipv4))?, PROVIDER.ipv4.to_string());
        let asked = questions(lab);
        std::thread::sleep(Duration::from_secs(2));
        assert_eq!(questions(lab), asked, "the name was resolved again although the provider has answered");
        finish(agent)
    });
}

#[test]
fn the_endpoint_is_resolved_by_the_hosts_resolver_only() {
    lab::test(Peer::Ours, |lab| {
        let mut agent = start(lab, &lab.wg_quick_text(Reach::Name), &["--wait", "60"])?.begun()?;
        agent.succeed("resolve web.example")?;
        finish(agent)?;
        let asked_by = |question: &lab::dns::Question| HOST.both().contains(&question.from);
        let hosts = lab.resolver.questions();
        assert!(
            !hosts.is_empty() && hosts.iter().all(|question| question.name == "vpn.example" && asked_by(question)),
            "{hosts:?}"
        );
        let inside = lab.tunnel_resolver.questions();
        assert!(!inside.is_empty() && inside.iter().all(|question| question.name == "web.example"), "{inside:?}");
        assert_eq!(lab.capture.leaks()?, []);
        Ok(())
    });
}

#[test]
fn without_wait_the_program_starts_at_once() {
    lab::test(Peer::Ours, |lab| {
        lab.provider.stop()?;
        lab.resolver.forget("vpn.example");
        finish(start(lab, &lab.wg_quick_text(Reach::Name), &[])?.begun()?)
    });
}

#[test]
fn with_wait_the_program_starts_after_the_handshake() {
    lab::test(Peer::Ours, |lab| {
        lab.provider.stop()?;
        let agent = start(lab, &lab.wg_quick_text(Reach::Ipv4), &["--wait", "100"])?;
        eventually("a handshake", || Ok(initiations(&lab.capture.uplink()?, PROVIDER.ipv4.into()) > 0))?;
        assert!(!agent.begins_within(Duration::from_secs(1)), "the program began before an answer");
        lab.provider.restart()?;
        let mut agent = agent.begun()?;
        // Without a retry.
        assert_eq!(agent.succeed(&get(WEB.ipv4))?, PROVIDER.ipv4.to_string());
        finish(agent)
    });
}

/// Requires that vpn-exec fails with one error before the program begins. Returns the error.
fn gives_up(lab: &Lab, reach: Reach) -> Result<String> {
    let agent = start(lab, &lab.wg_quick_text(reach), &["--wait", "2", "--quiet"])?;
    assert!(!agent.begins_within(Duration::from_secs(1)));
    let (status, complaints) = agent.end()?;
    assert_eq!(status.code(), Some(125), "{complaints}");
    assert_eq!(complaints.matches("no handshake with any peer within 2 s").count(), 1, "{complaints}");
    let errors = complaints.lines().filter(|line| line.contains("error")).count();
    assert!(errors <= 1, "more than one error: {complaints}");
    assert!(!std::path::Path::new("/run/vpn-exec").exists(), "something is left");
    Ok(complaints)
}

#[test]
fn wait_gives_up_without_an_answer() {
    lab::test(Peer::Ours, |lab| {
        lab.provider.stop()?;
        gives_up(lab, Reach::Ipv4).map(drop)
    });
}

#[test]
fn wait_gives_up_when_the_name_remains_unknown() {
    lab::test(Peer::Ours, |lab| {
        lab.resolver.forget("vpn.example");
        let said = gives_up(lab, Reach::Name)?;
        assert!(said.contains("cannot resolve the endpoint vpn.example"), "{said}");
        Ok(())
    });
}

/// A WireGuard peer that a test makes by hand, on the neighbour.
struct Neighbour {
    private: PrivateKey,
    customer: PrivateKey,
}

impl Neighbour {
    fn new() -> Self {
        // Fixed keys, which protect nothing here.
        Self { private: PrivateKey::from([7; 32]), customer: PrivateKey::from([9; 32]) }
    }

    /// Listens on a port of a namespace. If `customer` is known, begins the handshake.
    fn listen(&self, site: &NetworkNamespace, port: u16, customer: Option<SocketAddr>) -> Result<UserspaceDevice> {
        let key: PublicKey = self.customer.public_key();
        let peer = PeerConfig {
            public_key: key,
            preshared_key: None,
            allowed_ips: vec!["10.64.0.0/24".parse()?],
            persistent_keepalive: None,
            endpoint: customer,
        };
        let mtu = 1420;
        let config =
            DeviceConfig { private_key: self.private.clone(), listen_port: port, fwmark: 0, mtu, peers: vec![peer] };
        let (tun, sockets) = site.run(|| {
            let wg0 = "wg0".parse().map_err(std::io::Error::other)?;
            let tun = lab::passing_tun(&wg0)?;
            let mut netlink = Netlink::open()?;
            let index = netlink.link_index(&wg0)?;
            let network = "10.64.0.1/24".parse().map_err(std::io::Error::other)?;
            let requests =
                vec![NetlinkRequest::add_address(index, "wg0", network), NetlinkRequest::set_up(index, "wg0")];
            netlink.execute(requests)?;
            Ok((tun, Sockets::bind(port, 0)?))
        })?;
        let device = UserspaceDevice::start(&config, tun, sockets, || Ok(()))?;
        if customer.is_some() {
            device.initiate_handshake(&key)?;
        }
        Ok(device)
    }

    fn wg_quick(&self, endpoint: &str) -> String {
        use base64::Engine;
        format!(
            "[Interface]\nPrivateKey = {}\nAddress = {}/24\n[Peer]\nPublicKey = {}\nAllowedIPs = 10.64.0.0/24\nEndpoint = {endpoint}\n",
            base64::engine::general_purpose::STANDARD.encode(self.customer.as_bytes()),
            TUNNEL_CLIENT.ipv4,
            self.private.public_key(),
        )
    }
}

/// A link-local address needs a zone, the interface.
#[test]
fn a_link_local_endpoint_with_a_zone_is_reached() {
    lab::test(Peer::Ours, |lab| {
        let addresses = lab.lan.run(|| Netlink::open()?.addresses())?;
        let mut link_local = addresses.iter().map(|(_, net)| net.addr()).filter_map(|address| match address {
            IpAddr::V6(address) if address.is_unicast_link_local() => Some(address),
            _ => None,
        });
        let address = link_local.next().context("the neighbour has a link-local address")?;
        let neighbour = Neighbour::new();
        let _device = neighbour.listen(&lab.lan, PROVIDER_PORT, None)?;
        let text = neighbour.wg_quick(&format!("[{address}%lan0]:{PROVIDER_PORT}"));
        let mut agent = start(lab, &text, &["--wait", "60"])?.begun()?;
        assert_eq!(agent.succeed("get http://10.64.0.1/")?, "a page in the local network");
        finish(agent)?;
        assert!(initiations(&lab.capture.lan()?, address.into()) > 0);
        Ok(())
    });
}

/// WireGuard's roaming: packets go to the address and the port from which the peer sent last.
#[test]
fn a_peer_that_moves_is_followed() {
    lab::test(Peer::Ours, |lab| {
        let neighbour = Neighbour::new();
        let device = neighbour.listen(&lab.lan, PROVIDER_PORT, None)?;
        let text = neighbour.wg_quick(&format!("{}:{PROVIDER_PORT}", LAN.ipv4));
        let mut agent = start(lab, &text, &["--wait", "60"])?.begun()?;
        agent.succeed("get http://10.64.0.1/")?;
        let sent_from = lab.capture.lan()?.into_iter().filter(|packet| packet.outgoing).find_map(|packet| {
            packet.flow.filter(|flow| flow.destination.port() == PROVIDER_PORT).map(|flow| flow.source)
        });
        let customer = sent_from.context("the host has sent to the neighbour")?;

        drop(device);
        lab.capture.forget()?;
        let _moved = neighbour.listen(&lab.lan, PROVIDER_PORT + 1, Some(customer))?;
        let page = agent.succeed_within(WORKS, "get http://10.64.0.1/")?;
        assert_eq!(page, "a page in the local network");
        finish(agent)?;
        let to_new_port = lab.capture.lan()?.iter().any(|packet| {
            let flow = packet.flow.as_ref().filter(|_| packet.outgoing);
            flow.is_some_and(|flow| {
                flow.destination.port() == PROVIDER_PORT + 1 && flow.payload.starts_with(&[4, 0, 0, 0])
            })
        });
        assert!(to_new_port, "the packets go where the peer is now");
        Ok(())
    });
}

/// A peer without an endpoint begins the handshake itself.
#[test]
fn a_handshake_from_the_peer_ends_the_wait() {
    lab::test(Peer::Ours, |lab| {
        let neighbour = Neighbour::new();
        let port = PROVIDER_PORT + 7;
        let text = neighbour.wg_quick("").replace("Endpoint = \n", "");
        let text = text.replace("[Peer]", &format!("ListenPort = {port}\n[Peer]"));
        let agent = start(lab, &text, &["--wait", "60"])?;
        eventually("the tunnel", || Ok(std::fs::exists("/run/netns/wg0")?))?;
        let _device = neighbour.listen(&lab.lan, PROVIDER_PORT, Some((HOST_ON_LAN.ipv4, port).into()))?;
        let mut agent = agent.begun()?;
        assert_eq!(agent.succeed("get http://10.64.0.1/")?, "a page in the local network");
        finish(agent)
    });
}
