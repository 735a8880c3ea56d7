//! A hostile program without capabilities that tries to leave the tunnel by everything that needs none. The host is
//! badly configured, as a router with proxy ARP. The provider is silent, so any packet that arrives has found another
//! way.

use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::agent::{Agent, Echo};
use lab::launcher::agent_binary;
use lab::{HOST, HOST_ON_LAN, LAN, Lab, Launcher, Peer, ROUTER, Reach, WEB, variables};
use vpn_exec::linux::{mounts, sysctl};

use super::{assert_no_leak, finish, outside};

/// The UDP port on which the host answers.
const ECHO: u16 = 7;

/// The time in which an action succeeds that works at all.
const WORKS: Duration = Duration::from_secs(10);

/// The time that a packet may take to the host's interfaces.
const SOON: Duration = Duration::from_millis(200);

/// Returns addresses that the program must not reach: the Internet, neighbours, and the host's other addresses.
fn out_of_bounds() -> Vec<SocketAddr> {
    let far = [WEB, ROUTER, LAN].into_iter().flat_map(lab::Addresses::both).map(|to| SocketAddr::new(to, 80));
    let host = [HOST, HOST_ON_LAN].into_iter().flat_map(lab::Addresses::both).map(|to| SocketAddr::new(to, ECHO));
    far.chain(host).collect()
}

/// Returns acts that send past the tunnel by an interface.
fn escapes(interface: &str) -> Vec<String> {
    let mut acts = Vec::new();
    for to in out_of_bounds() {
        acts.push(format!("bound-send {interface} {to}"));
        acts.push(format!("bound-connect {interface} {to}"));
        acts.push(format!("packetinfo-send {interface} {to}"));
        acts.push(format!("unrouted-send {to}"));
        if to.is_ipv4() {
            acts.push(format!("unicast-interface-send {interface} {to}"));
        }
    }
    acts
}

/// Returns acts that send by multicast or broadcast, which may reach the host, but no neighbour.
fn multicasts(interface: &str) -> Vec<String> {
    [
        "224.0.0.251:5353",
        "239.255.255.250:1900",
        "255.255.255.255:7",
        "[ff02::fb]:5353",
        "[ff05::c]:1900",
        "[ff0e::114]:7",
    ]
    .map(|to| format!("bound-send {interface} {to}"))
    .into()
}

/// Makes the host forward, answer by proxy ARP, and accept source routes.
fn misconfigure_host() -> Result<()> {
    for parameter in ["ipv4/ip_forward", "ipv4/conf/all/proxy_arp", "ipv4/conf/all/accept_source_route"] {
        sysctl::set(&format!("net/{parameter}"), "1")?;
    }
    sysctl::set("net/ipv6/conf/all/forwarding", "1")?;
    // A change of the global switch, as while the tunnel is up, applies to every interface.
    sysctl::set("net/ipv4/ip_forward", "0")?;
    Ok(sysctl::set("net/ipv4/ip_forward", "1")?)
}

/// Names the host's network namespace, as a careless administrator might.
fn name_hosts_namespace() -> Result<PathBuf> {
    let path = Path::new(lab::world::FILES).join("host");
    File::create(&path)?;
    mounts::bind(Path::new("/proc/thread-self/ns/net"), &path)?;
    Ok(path)
}

fn forbidden_acts(host: &Path) -> Vec<String> {
    let mut acts: Vec<String> =
        ["ipv4", "ipv6", "packet", "packets"].map(|family| format!("raw-socket {family}")).into();
    for interface in ["host0", "wg0", "lo"] {
        acts.push(format!("add-route {interface} 198.51.100.64/26"));
        acts.push(format!("add-route {interface} 2001:db8:9::/64"));
        acts.push(format!("add-address {interface} 192.0.2.40/32"));
        acts.push(format!("set-mtu {interface} 1300"));
    }
    acts.push("new-network".into());
    acts.push(format!("join {}", host.display()));
    acts.push("join /proc/1/ns/net".into());
    acts.push(format!("join /proc/{}/ns/net", std::process::id()));
    acts
}

fn stays_inside(lab: &Lab, start: impl FnOnce(Launcher) -> Result<Agent>, options: &[&str]) -> Result<()> {
    lab.provider.stop()?;
    let echo = Echo::start(&lab.host, ECHO)?;
    let host = name_hosts_namespace()?;
    misconfigure_host()?;
    let launcher = Launcher::new(lab.wg_quick_file(Reach::Ipv4)?).options(options);
    let mut agent = start(launcher)?.begun()?;

    let hosts = agent.succeed("resolve host.internal")?;
    for round in ["a router from the beginning", "a router since the tunnel is up"] {
        for act in escapes("host0") {
            agent.fail(&act)?;
        }
        for host in hosts.split(' ').filter(|host| !host.contains(':')) {
            agent.fail(&format!("source-routed-send {host} {}", SocketAddr::new(WEB.ipv4.into(), 80)))?;
            agent.fail(&format!("source-routed-send {host} {}", SocketAddr::new(HOST.ipv4.into(), ECHO)))?;
        }
        for act in multicasts("host0") {
            // The host may receive it.
            let _ = agent.act(&act)?;
        }
        // A packet that waits for the address of a neighbour is sent a little later.
        std::thread::sleep(lab::patience(SOON));
        assert_no_leak(lab).map_err(|error| error.context(round))?;
        misconfigure_host()?;
    }
    for act in forbidden_acts(&host) {
        let error = agent.fail(&act)?;
        ensure!(["EPERM", "EACCES"].contains(&error.as_str()), "{act}: {error}");
    }
    for host in hosts.split(' ') {
        // The link to the host works, or silence would prove nothing.
        let to = SocketAddr::new(host.parse()?, ECHO);
        agent.succeed_within(WORKS, &format!("bound-send host0 {to}"))?;
    }
    finish(agent)?;

    let forbidden: Vec<String> = out_of_bounds().iter().map(|to| format!("to {to}")).collect();
    let seen = echo.seen();
    assert!(seen.len() >= 2, "{seen:?}");
    assert_eq!(seen.iter().filter(|text| forbidden.contains(text)).collect::<Vec<_>>(), [""; 0]);
    assert_eq!((lab.web.clients(), lab.lan_page.clients()), (vec![], vec![]));
    assert_no_leak(lab)
}

#[test]
fn root_without_capabilities_stays_inside() {
    // A rootless tunnel's link leads to the host by ports that were asked for only.
    let options: &[&str] = if lab::tunnel::is_rootless() { &["--host-port", "7/udp"] } else { &[] };
    lab::test(Peer::Ours, |lab| stays_inside(lab, Launcher::start_agent, options));
}

#[test]
fn another_user_stays_inside() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("another user for the program")?;
        lab::require_users()?;
        // A copy that every user can execute, wherever the project was built.
        let executable = Path::new(lab::world::FILES).join("agent");
        fs::copy(agent_binary(), &executable)?;
        stays_inside(lab, |launcher| launcher.start_agent_at(&executable), &["--user", "65534", "--group", "65534"])
    });
}

/// A process that creates a user namespace has all capabilities in it, but none over the network namespace that it came
/// from.
#[test]
fn root_of_its_own_user_namespace_stays_inside() {
    lab::test(Peer::Ours, |lab| {
        lab::require_program("unshare", variables::REQUIRE_PEERS)?;
        lab.provider.stop()?;
        let echo = Echo::start(&lab.host, ECHO)?;
        let host = name_hosts_namespace()?;
        misconfigure_host()?;
        let launcher = Launcher::new(lab.wg_quick_file(Reach::Ipv4)?).program(["unshare", "--user", "--keep-caps"]);
        let mut agent = Agent::start(&mut launcher.command())?.begun()?;
        assert_eq!(agent.succeed("new-network")?, "made", "it must have capabilities in its own namespace");
        for act in forbidden_acts(&host).iter().filter(|act| *act != "new-network") {
            let error = agent.fail(act)?;
            ensure!(["EPERM", "EACCES"].contains(&error.as_str()), "{act}: {error}");
        }
        for act in escapes("host0") {
            agent.fail(&act)?;
        }
        let table = agent.succeed("run unshare --net cat /proc/net/dev")?;
        assert!(table.contains("lo:") && !table.contains("wg0") && !table.contains("host0"), "{table}");
        finish(agent)?;
        assert_eq!(echo.seen(), [""; 0]);
        assert_no_leak(lab)
    });
}

/// Repeats an act without an answer until the capture sees its packet. The first packet waits for the neighbour's
/// address, which may take longer than the act.
fn must_be_seen(lab: &Lab, agent: &mut Agent, act: &str) -> Result<()> {
    lab.capture.forget()?;
    let deadline = Instant::now() + lab::patience(WORKS);
    loop {
        agent.fail(act)?;
        if assert_no_leak(lab).is_err() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{act} is not seen");
    }
}

/// The twin of the tests above.
#[test]
fn on_the_host_the_same_acts_succeed_and_are_seen() {
    lab::test(Peer::Ours, |lab| {
        let host = name_hosts_namespace()?;
        let mut agent = outside()?;
        for to in WEB.both().map(|to: IpAddr| SocketAddr::new(to, 80)) {
            must_be_seen(lab, &mut agent, &format!("bound-send eth0 {to}"))?;
            lab.capture.forget()?;
            agent.succeed_within(WORKS, &format!("bound-connect eth0 {to}"))?;
            assert_no_leak(lab).expect_err("connected by its device");
            must_be_seen(lab, &mut agent, &format!("packetinfo-send eth0 {to}"))?;
        }
        let router = SocketAddr::new(ROUTER.ipv4.into(), 80);
        must_be_seen(lab, &mut agent, &format!("unicast-interface-send eth0 {router}"))?;
        must_be_seen(lab, &mut agent, &format!("unrouted-send {router}"))?;
        for act in multicasts("lan0") {
            must_be_seen(lab, &mut agent, &act)?;
        }
        for act in forbidden_acts(&host).iter().filter(|act| !act.contains("host0") && !act.contains("wg0")) {
            // "join" succeeds: the agent is in that namespace already.
            agent.succeed(act)?;
        }
        finish(agent)
    });
}
