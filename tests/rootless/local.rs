//! Local networks of a rootless tunnel: the relay reaches those that were opened and no others.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, Echo};
use lab::dns::DnsServer;
use lab::{
    HOST_ON_PRIVATE_LAN, LAN, Lab, Launcher, PRIVATE_LAN, PROVIDER, Peer, Reach, TUNNEL_RESOLVER, WEB, variables,
    vpn_exec,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vpn_exec::lease::status::Status;
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::plan::RELAY_ADDRESSES;
use vpn_exec::registry;

use super::{PATIENCE, serve};

/// The directory of the user's tunnels.
const RUNTIME: &str = lab::world::FILES;

/// The networks of [`Lab::join_private_lan`]. The host's kernel needs no forwarding for them.
const LOCAL: [&str; 4] = ["--local", "192.168.7.0/24", "--local", "fd07::/64"];

const PAGE: &str = "a page in the local network";

fn rootless(lab: &Lab) -> Result<Launcher> {
    let launcher = Launcher::new(lab.wg_quick_file(Reach::Ipv4)?).options(option());
    Ok(launcher.env("XDG_RUNTIME_DIR", RUNTIME))
}

fn inside(lab: &Lab, options: &[&str]) -> Result<Agent> {
    rootless(lab)?.options(options).start_agent()?.begun()
}

/// Starts the agent in a tunnel whose namespace has no packet rules, so that those of the gateway decide alone.
fn inside_without_rules(lab: &Lab, options: &[&str]) -> Result<Agent> {
    rootless(lab)?.options(options).env(variables::BREAK, "rules").start_agent()?.begun()
}

fn url(address: impl Into<IpAddr>, port: u16) -> String {
    format!("http://{}/", SocketAddr::new(address.into(), port))
}

fn status(name: &str) -> Result<Status> {
    let output = user(vpn_exec(["status", name, "--json"])).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn user(mut command: Command) -> Command {
    command.env("XDG_RUNTIME_DIR", RUNTIME);
    command
}

/// Returns the option by which vpn-exec needs no root, unless the lab adds it.
fn option() -> &'static [&'static str] {
    if lab::tunnel::is_rootless() { &[] } else { &["--rootless"] }
}

/// Returns the namespace of an agent in a tunnel.
fn namespace_of(agent: &mut Agent) -> Result<NetworkNamespace> {
    let pid = agent.succeed("pid")?;
    Ok(NetworkNamespace::from(OwnedFd::from(File::open(format!("/proc/{pid}/ns/net"))?)))
}

fn assert_no_leaks(lab: &Lab) -> Result<()> {
    let leaks: Vec<_> = lab.capture.uplink()?.into_iter().filter(|packet| !packet.is_expected_on_uplink()).collect();
    ensure!(leaks.is_empty(), "{leaks:#?}");
    Ok(())
}

#[test]
fn a_program_reaches_the_opened_networks_and_no_others() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let echo = Echo::start(&lab.lan, 7)?;
        let mut agent = inside(lab, &LOCAL)?;
        for address in PRIVATE_LAN.both() {
            assert_eq!(agent.succeed(&format!("get {}", url(address, 80)))?, PAGE);
            for size in [100, 1400] {
                agent.succeed(&format!("echo {} {size}", SocketAddr::new(address, 7)))?;
            }
            // The relay has accepted the connection before it finds that the neighbour does not.
            assert_eq!(agent.fail(&format!("get {}", url(address, 81)))?, "ECONNRESET");
        }
        let callers = lab.lan_page.clients();
        ensure!(callers == HOST_ON_PRIVATE_LAN.both(), "{callers:?}");
        for address in LAN.both() {
            agent.fail(&format!("get {}", url(address, 80)))?;
            agent.fail(&format!("echo {} 100", SocketAddr::new(address, 7)))?;
        }
        ensure!(lab.lan_page.clients().len() == 2 && echo.seen().len() == 4, "{:?}", echo.seen());
        let seen = agent.succeed_within(PATIENCE, &format!("get {}", url(WEB.ipv4, 80)))?;
        ensure!(seen == PROVIDER.ipv4.to_string(), "{seen}");
        agent.finish_well()?;
        assert_no_leaks(lab)
    });
}

/// The link is then within a local network.
#[test]
fn a_program_reaches_networks_that_cover_all_private_addresses() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let _echo = Echo::start(&lab.lan, 7)?;
        let all = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fd00::/8"];
        let options: Vec<&str> = all.iter().flat_map(|net| ["--local", net]).collect();
        let mut agent = inside(lab, &options)?;
        for address in PRIVATE_LAN.both() {
            assert_eq!(agent.succeed(&format!("get {}", url(address, 80)))?, PAGE);
            agent.succeed(&format!("echo {} 100", SocketAddr::new(address, 7)))?;
        }
        agent.finish_well().map(drop)
    });
}

/// The keeper connects from the host's namespace, where it could reach much more.
#[test]
fn the_hosts_own_addresses_are_reached_and_its_loopback_is_not() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let relay = RELAY_ADDRESSES[0].port();
        for address in HOST_ON_PRIVATE_LAN.both() {
            serve(address, 8000)?;
        }
        serve(Ipv4Addr::LOCALHOST.into(), 8001)?;
        serve(Ipv4Addr::LOCALHOST.into(), relay)?;
        serve(Ipv4Addr::LOCALHOST.into(), 8002)?;
        let mut agent = inside(lab, &[&LOCAL[..], &["--host-port", "8002"]].concat())?;
        for address in HOST_ON_PRIVATE_LAN.both() {
            assert_eq!(agent.succeed(&format!("get {}", url(address, 8000)))?, "the host");
            agent.fail(&format!("get {}", url(address, 8001)))?;
        }
        assert_eq!(agent.succeed("get http://host.internal:8002/")?, "the host");
        for port in [8001, relay] {
            assert_eq!(agent.fail(&format!("get http://host.internal:{port}/"))?, "ECONNREFUSED");
        }
        agent.finish_well().map(drop)
    });
}

#[test]
fn no_question_reaches_a_resolver_in_the_local_network_unless_it_is_configured() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let neighbours = DnsServer::start(&lab.lan, PRIVATE_LAN)?;
        neighbours.set("web.example", &WEB.both());
        let _echo = Echo::start(&lab.lan, 7)?;
        for start in [inside, inside_without_rules] {
            let mut agent = start(lab, &LOCAL)?;
            for address in PRIVATE_LAN.both() {
                agent.fail(&format!("lookup {address} web.example"))?;
                agent.fail(&format!("get {}", url(address, 853)))?;
                agent.succeed(&format!("echo {} 100", SocketAddr::new(address, 7)))?;
            }
            agent.finish_well()?;
            ensure!(neighbours.questions().is_empty(), "{:?}", neighbours.questions());
        }
        let named: Vec<String> = PRIVATE_LAN.both().iter().map(|address| address.to_string()).collect();
        let options = named.iter().flat_map(|address| ["--dns", address, "--local", address]).collect::<Vec<_>>();
        let mut agent = inside(lab, &options)?;
        for address in &named {
            agent.succeed(&format!("lookup {address} web.example"))?;
        }
        agent.finish_well()?;
        ensure!(neighbours.questions().len() == named.len(), "{:?}", neighbours.questions());
        Ok(())
    });
}

/// Neither routes nor rules of the tunnel's namespace keep the program from the network.
#[test]
fn the_gateway_relays_to_no_other_network() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let echo = Echo::start(&lab.lan, 7)?;
        let other = ["--local", "192.0.2.64/26", "--local", "2001:db8:2::/64"];
        ensure!(other[1].parse::<ipnet::IpNet>()?.contains(&IpAddr::from(LAN.ipv4)), "the LAN is {LAN:?}");
        for (options, is_reached) in [(&LOCAL[..], false), (&[&LOCAL[..], &other].concat(), true)] {
            let mut agent = inside_without_rules(lab, options)?;
            let namespace = namespace_of(&mut agent)?;
            let hosts = agent.succeed("resolve host.internal")?;
            namespace.run(|| {
                let mut netlink = Netlink::open()?;
                let index = netlink.link_index(&"host0".parse().expect("a name"))?;
                let add = |(to, by): (IpAddr, &str)| {
                    let by = by.parse().expect("an address");
                    NetlinkRequest::add_route(index, "host0", to.into(), Some(by))
                };
                Ok(netlink.execute(LAN.both().into_iter().zip(hosts.split(' ')).map(add).collect())?)
            })?;
            for address in LAN.both() {
                let get = format!("get {}", url(address, 80));
                let send = format!("echo {} 100", SocketAddr::new(address, 7));
                assert_eq!(agent.act(&get)?.is_ok(), is_reached, "{address}");
                assert_eq!(agent.act(&send)?.is_ok(), is_reached, "{address}");
            }
            agent.finish_well()?;
            assert_eq!(echo.seen().len(), if is_reached { 2 } else { 0 });
            assert_eq!(lab.lan_page.clients().len(), if is_reached { 2 } else { 0 });
        }
        Ok(())
    });
}

#[test]
fn the_tunnel_takes_precedence_over_a_local_network() {
    lab::test(Peer::Ours, |lab| {
        for start in [inside, inside_without_rules] {
            let mut agent = start(lab, &["--local", "10.0.0.0/8", "--name", "wins"])?;
            let lookup = format!("lookup {} web.example", TUNNEL_RESOLVER.ipv4);
            agent.succeed_within(PATIENCE, &lookup)?;
            lab.capture.forget()?;
            // A stopped keeper does not notice that the interface is gone. Its relay does not run, either, but it
            // continues afterwards with what has arrived.
            let keeper = Pid::from_raw(status("wins")?.keeper.cast_signed());
            kill(keeper, Signal::SIGSTOP)?;
            namespace_of(&mut agent)?.run(|| {
                let mut netlink = Netlink::open()?;
                let index = netlink.link_index(&"wg0".parse().expect("a name"))?;
                Ok(netlink.execute_one(NetlinkRequest::delete_link(index, "wg0"))?)
            })?;
            agent.fail(&lookup)?;
            agent.fail(&format!("get {}", url(TUNNEL_RESOLVER.ipv4, 80)))?;
            kill(keeper, Signal::SIGCONT)?;
            let (status, _) = agent.end()?;
            ensure!(!status.success(), "the tunnel has ended");
            assert_no_leaks(lab)?;
        }
        Ok(())
    });
}

#[test]
fn a_reload_opens_and_closes_networks_while_programs_run() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let _echo = Echo::start(&lab.lan, 7)?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let file = file.to_str().context("a path")?;
        let run = |command: &str, more: &[&str]| -> Result<()> {
            let options = [&[command, file, "--name", "changing"], option(), more].concat();
            let output = user(vpn_exec(options)).output()?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        };
        run("up", &[])?;
        let launcher = Launcher::with_tunnel("changing").options(option()).env("XDG_RUNTIME_DIR", RUNTIME);
        let mut agent = launcher.start_agent()?.begun()?;
        let namespace = namespace_of(&mut agent)?;
        let mut streams = Vec::new();
        for options in [&[][..], &LOCAL[..2], &LOCAL, &LOCAL[2..], &[]] {
            run("reload", options)?;
            if options.len() == LOCAL.len() {
                for address in PRIVATE_LAN.both() {
                    streams.push(namespace.run(|| TcpStream::connect((address, 80)))?);
                }
            } else if let [ipv4, ipv6] = &mut streams[..] {
                // The connection to the closed network is reset, and the other one continues.
                ipv4.set_read_timeout(Some(lab::patience(PATIENCE)))?;
                let error = ipv4.read(&mut [0]).expect_err("the connection is reset");
                assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
                ipv6.set_read_timeout(Some(lab::patience(PATIENCE)))?;
                ipv6.write_all(b"GET / HTTP/1.1\r\nHost: lan\r\n\r\n")?;
                ensure!(ipv6.read(&mut [0; 100])? > 0);
                streams.clear();
            }
            for address in PRIVATE_LAN.both() {
                let is_open = options.iter().any(|net| net.starts_with(if address.is_ipv4() { "192" } else { "fd07" }));
                let page = agent.act(&format!("get {}", url(address, 80)))?;
                assert_eq!(page == Ok(PAGE.into()), is_open, "{page:?} of {address} with {options:?}");
                let echo = agent.act(&format!("echo {} 100", SocketAddr::new(address, 7)))?;
                assert_eq!(echo.is_ok(), is_open, "{echo:?} of {address} with {options:?}");
            }
        }
        agent.finish_well()?;
        let output = user(vpn_exec(["down", "changing"])).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    });
}

/// A program in another tunnel accepts what comes from the host's address on its link.
#[test]
fn a_program_does_not_reach_a_program_in_the_machines_tunnel() {
    lab::test(Peer::Ours, |lab| {
        if lab::tunnel::is_rootless() {
            return Err(lab::Skip::error("only root makes tunnels of the machine", variables::REQUIRE_PEERS));
        }
        lab.join_private_lan()?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let file = file.to_str().context("a path")?;
        let output = vpn_exec(["up", file, "--name", "other", "--backend", lab::backend()]).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let link = registry::read_plan(&"other".parse()?)?.context("a plan")?.veth.context("a link")?;
        let namespace = lab::tunnel::namespace("other")?;
        let echo = Echo::start(&namespace, 7)?;
        let to = SocketAddr::new(link.inner_ipv4.into(), 7);
        UdpSocket::bind("0.0.0.0:0")?.send_to(b"from the host", to)?;
        lab::wait_until(lab::patience(PATIENCE), "the host does not reach it", || Ok(!echo.seen().is_empty()))?;
        let wide = format!("{}/8", Ipv4Addr::new(link.inner_ipv4.octets()[0], 0, 0, 0));
        for start in [inside, inside_without_rules] {
            let mut agent = start(lab, &["--local", &wide, "--local", "192.168.7.0/24"])?;
            assert_eq!(agent.succeed(&format!("get {}", url(PRIVATE_LAN.ipv4, 80)))?, PAGE);
            agent.fail(&format!("echo {to} 100"))?;
            assert_eq!(echo.seen(), ["from the host"]);
            agent.finish_well()?;
        }
        drop(namespace);
        ensure!(vpn_exec(["down", "other", "--force"]).output()?.status.success());
        Ok(())
    });
}

/// As after a laptop has moved to another network.
#[test]
fn the_hosts_networks_are_followed() {
    lab::test(Peer::Ours, |lab| {
        let mut agent = inside(lab, &["--lan"])?;
        let get = |address| format!("get {}", url(address, 80));
        agent.fail(&get(PRIVATE_LAN.ipv4.into()))?;
        lab.join_private_lan()?;
        for address in PRIVATE_LAN.both() {
            let mut page = String::new();
            lab::wait_until(lab::patience(PATIENCE), "the network is not reached", || {
                page = agent.act(&get(address))?.unwrap_or_default();
                Ok(page == PAGE)
            })?;
        }
        agent.finish_well().map(drop)
    });
}

#[test]
fn the_successor_of_a_killed_keeper_relays_to_the_same_networks() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let _echo = Echo::start(&lab.lan, 7)?;
        let mut agent = inside(lab, &[&LOCAL[..], &["--name", "kept"]].concat())?;
        let check = |agent: &mut Agent| -> Result<()> {
            for address in PRIVATE_LAN.both() {
                assert_eq!(agent.succeed_within(PATIENCE, &format!("get {}", url(address, 80)))?, PAGE);
                agent.succeed_within(PATIENCE, &format!("echo {} 100", SocketAddr::new(address, 7)))?;
            }
            Ok(())
        };
        check(&mut agent)?;
        let keeper = status("kept")?.keeper;
        kill(Pid::from_raw(keeper.cast_signed()), Signal::SIGKILL)?;
        check(&mut agent)?;
        ensure!(status("kept")?.keeper != keeper);
        agent.finish_well().map(drop)
    });
}
