//! A program that wants out: it has no capability, but asks for everything that one may ask for without. The host is set up as
//! badly as hosts are, as a router that answers for others; and the provider is silent, so that whatever arrives anywhere has
//! found another way.

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

/// The port at which the host answers whoever reaches it.
const ECHO: u16 = 7;

/// How long something may take that works.
const WORKS: Duration = Duration::from_secs(10);

/// How long a packet may take to the host's interfaces.
const SOON: Duration = Duration::from_millis(200);

/// All that the program must not reach: the Internet, the neighbours, and the host by its other addresses.
fn out_of_bounds() -> Vec<SocketAddr> {
    let far = [WEB, ROUTER, LAN].into_iter().flat_map(lab::Addresses::both).map(|to| SocketAddr::new(to, 80));
    let host = [HOST, HOST_ON_LAN].into_iter().flat_map(lab::Addresses::both).map(|to| SocketAddr::new(to, ECHO));
    far.chain(host).collect()
}

/// Attempts to send past the tunnel, by `device`.
fn escapes(device: &str) -> Vec<String> {
    let mut acts = Vec::new();
    for to in out_of_bounds() {
        acts.push(format!("bound-send {device} {to}"));
        acts.push(format!("bound-connect {device} {to}"));
        acts.push(format!("packetinfo-send {device} {to}"));
        acts.push(format!("unrouted-send {to}"));
        if to.is_ipv4() {
            acts.push(format!("unicast-interface-send {device} {to}"));
        }
    }
    acts
}

/// What is sent to everybody on the link may reach the host, but nobody behind it.
fn calls_to_all(device: &str) -> Vec<String> {
    [
        "224.0.0.251:5353",
        "239.255.255.250:1900",
        "255.255.255.255:7",
        "[ff02::fb]:5353",
        "[ff05::c]:1900",
        "[ff0e::114]:7",
    ]
    .map(|to| format!("bound-send {device} {to}"))
    .into()
}

/// A host that forwards, answers for others, and takes the routes that senders wish for.
fn misconfigure_host() -> Result<()> {
    for parameter in ["ipv4/ip_forward", "ipv4/conf/all/proxy_arp", "ipv4/conf/all/accept_source_route"] {
        sysctl::set(&format!("net/{parameter}"), "1")?;
    }
    sysctl::set("net/ipv6/conf/all/forwarding", "1")?;
    // As when the switch is thrown while the tunnel is up: it then is thrown on every interface.
    sysctl::set("net/ipv4/ip_forward", "0")?;
    Ok(sysctl::set("net/ipv4/ip_forward", "1")?)
}

/// The host's own namespace under a name, as a careless administrator would have it.
fn name_hosts_namespace() -> Result<PathBuf> {
    let path = Path::new(lab::world::FILES).join("host");
    File::create(&path)?;
    mounts::bind(Path::new("/proc/thread-self/ns/net"), &path)?;
    Ok(path)
}

fn what_must_be_refused(host: &Path) -> Vec<String> {
    let mut acts: Vec<String> =
        ["ipv4", "ipv6", "packet", "packets"].map(|family| format!("raw-socket {family}")).into();
    for device in ["host0", "wg0", "lo"] {
        acts.push(format!("add-route {device} 198.51.100.64/26"));
        acts.push(format!("add-route {device} 2001:db8:9::/64"));
        acts.push(format!("add-address {device} 192.0.2.40/32"));
        acts.push(format!("set-mtu {device} 1300"));
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
        for act in calls_to_all("host0") {
            // Whether it is heard by the host is not the question here.
            let _ = agent.act(&act)?;
        }
        // What waits for a neighbour's address may be sent a little later.
        std::thread::sleep(lab::patience(SOON));
        assert_no_leak(lab).map_err(|error| error.context(round))?;
        misconfigure_host()?;
    }
    for act in what_must_be_refused(&host) {
        let error = agent.fail(&act)?;
        ensure!(["EPERM", "EACCES"].contains(&error.as_str()), "{act}: {error}");
    }
    for host in hosts.split(' ') {
        // That the host is heard at all by this link, or silence would prove nothing.
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
fn root_without_capabilities() {
    lab::test(Peer::Ours, |lab| stays_inside(lab, Launcher::start_agent, &[]));
}

#[test]
fn another_user() {
    lab::test(Peer::Ours, |lab| {
        lab::require_users()?;
        // Where everybody can execute it, wherever the project was built.
        let executable = Path::new(lab::world::FILES).join("agent");
        fs::copy(agent_binary(), &executable)?;
        stays_inside(lab, |launcher| launcher.start_agent_at(&executable), &["--user", "65534", "--group", "65534"])
    });
}

/// Who makes a user namespace has all capabilities in it, and none over the network that it came with.
#[test]
fn root_of_a_user_namespace_of_its_own() {
    lab::test(Peer::Ours, |lab| {
        lab::require_program("unshare", variables::REQUIRE_PEERS)?;
        lab.provider.stop()?;
        let echo = Echo::start(&lab.host, ECHO)?;
        let host = name_hosts_namespace()?;
        misconfigure_host()?;
        let launcher = Launcher::new(lab.wg_quick_file(Reach::Ipv4)?).program(["unshare", "--user", "--keep-caps"]);
        let mut agent = Agent::start(&mut launcher.command())?.begun()?;
        assert_eq!(agent.succeed("new-network")?, "made", "it has capabilities in its own namespace");
        for act in what_must_be_refused(&host).iter().filter(|act| *act != "new-network") {
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

/// Has the agent try something that brings no answer until the capture sees it: the first packet waits for its neighbour to be found, and
/// the agent has given it up by then.
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

/// The twin of all above: on the host, the same acts succeed, and are seen.
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
        for act in calls_to_all("lan0") {
            must_be_seen(lab, &mut agent, &act)?;
        }
        for act in what_must_be_refused(&host).iter().filter(|act| !act.contains("host0") && !act.contains("wg0")) {
            // Joined is only who leaves: this one is at home, which is no error.
            agent.succeed(act)?;
        }
        finish(agent)
    });
}
