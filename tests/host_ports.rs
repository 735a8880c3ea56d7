//! Host ports: a program reaches services on the host's loopback at `host.internal` if that was requested, and no other
//! client reaches them that way.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::{HOST_ON_LAN, Lab, Launcher, Peer, Reach, Snapshot, vpn_exec};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vpn_exec::lease::status::{self, HostLink};
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::registry;

const NAME: &str = "back";

/// How long an operation may take before the test fails.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long to wait for a reply that must not arrive.
const SILENCE: Duration = Duration::from_millis(500);

fn up(file: &Path, ports: &[&str]) -> Result<Output> {
    let mut command = vpn_exec(["up"]);
    command.arg(file).args(["--name", NAME, "--backend", lab::backend()]);
    for port in ports {
        command.args(["--host-port", port]);
    }
    Ok(command.output()?)
}

fn works(output: &Output) -> Result<()> {
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn down() -> Result<()> {
    works(&vpn_exec(["down", NAME]).output()?)
}

fn inside() -> Result<Agent> {
    Launcher::with_tunnel(NAME).start_agent()?.begun()
}

fn finish(agent: Agent) -> Result<()> {
    agent.finish_well().map(drop)
}

fn link() -> Result<HostLink> {
    let status = status::of(&NAME.parse()?)?.context("a tunnel")?;
    status.living.context("a keeper")?.link.context("a link")
}

/// Returns the host's addresses on the link.
fn addresses(link: &HostLink) -> Result<[IpAddr; 2]> {
    Ok([link.host_ipv4.into(), link.host_ipv6.context("IPv6")?.into()])
}

fn url(address: IpAddr, port: u16) -> String {
    format!("http://{}/", SocketAddr::new(address, port))
}

/// Serves a page on the host.
fn page(address: impl Into<IpAddr>, port: u16, text: &'static str) -> Result<()> {
    let listener = TcpListener::bind((address.into(), port))?;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut lines = BufReader::new(&stream).lines();
            while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
            let answer =
                format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}", text.len());
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    Ok(())
}

/// Sends datagrams back.
fn echo(address: impl Into<IpAddr>, port: u16) -> Result<()> {
    let socket = UdpSocket::bind((address.into(), port))?;
    std::thread::spawn(move || {
        let mut buffer = [0; 65536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
    Ok(())
}

/// How a service was reached.
#[derive(Debug, PartialEq, Eq)]
struct Reached {
    connected: bool,
    tcp_answers: bool,
    udp_answers: bool,
}

fn reaches(from: &NetworkNamespace, to: SocketAddr, patience: Duration) -> Result<Reached> {
    Ok(from.run(|| {
        let stream = TcpStream::connect_timeout(&to, patience);
        let connected = stream.is_ok();
        let answer = stream.and_then(|mut stream| {
            stream.set_read_timeout(Some(patience))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            stream.read_exact(&mut [0])
        });
        let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(patience))?;
        let answered = socket.send(b"hello").and_then(|_| socket.recv(&mut [0; 16]));
        Ok(Reached { connected, tcp_answers: answer.is_ok(), udp_answers: answered.is_ok() })
    })?)
}

/// Routes the host's addresses on the link from the LAN to the host.
fn route_from_lan(lab: &Lab, link: &HostLink) -> Result<()> {
    let to = addresses(link)?;
    lab.lan.run(|| {
        let mut netlink = Netlink::open()?;
        let index = netlink.link("eth0")?.map_or(0, |link| link.index);
        let routes = to.into_iter().zip(HOST_ON_LAN.both());
        Ok(netlink.execute(
            routes.map(|(to, gateway)| NetlinkRequest::add_route(index, "eth0", to.into(), Some(gateway))).collect(),
        )?)
    })?;
    Ok(())
}

#[test]
fn a_program_reaches_requested_ports_of_the_hosts_loopback_and_no_other_client_does() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("other clients have no way to the gateway of a rootless tunnel")?;
        page(Ipv4Addr::LOCALHOST, 5432, "over IPv4")?;
        page(Ipv6Addr::LOCALHOST, 5433, "over IPv6")?;
        page(Ipv4Addr::LOCALHOST, 5434, "not requested")?;
        echo(Ipv4Addr::LOCALHOST, 5432)?;
        echo(Ipv6Addr::LOCALHOST, 5433)?;
        echo(Ipv4Addr::LOCALHOST, 5434)?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let before = Snapshot::take()?;
        works(&up(&file, &["5432-5433", "5432/udp", "5433/udp"])?)?;
        let link = link()?;
        let mut agent = inside()?;
        for (port, text) in [(5432, "over IPv4"), (5433, "over IPv6")] {
            assert_eq!(agent.succeed(&format!("get http://host.internal:{port}/"))?, text);
            for address in addresses(&link)? {
                assert_eq!(agent.succeed(&format!("get {}", url(address, port)))?, text);
                assert_eq!(agent.succeed(&format!("echo {} 1200", SocketAddr::new(address, port)))?, "the same");
            }
        }
        for address in addresses(&link)? {
            assert_eq!(agent.fail(&format!("get {}", url(address, 5434)))?, "ECONNREFUSED");
            assert_eq!(agent.fail(&format!("echo {} 16", SocketAddr::new(address, 5434)))?, "ECONNREFUSED");
        }
        // Other clients have a route to these addresses, but cannot use the ports.
        route_from_lan(lab, &link)?;
        page(link.host_ipv4, 8000, "for all")?;
        page(link.host_ipv6.context("IPv6")?, 8000, "for all")?;
        echo(link.host_ipv4, 8000)?;
        echo(link.host_ipv6.context("IPv6")?, 8000)?;
        for address in addresses(&link)? {
            for (who, from) in [("the LAN", &lab.lan), ("the host", &lab.host)] {
                let reached = reaches(from, SocketAddr::new(address, 8000), PATIENCE)?;
                ensure!(reached.tcp_answers && reached.udp_answers, "{who} has no route to {address}: {reached:?}");
                for port in [5432, 5433] {
                    let reached = reaches(from, SocketAddr::new(address, port), SILENCE)?;
                    let answered = reached.tcp_answers || reached.udp_answers;
                    // Programs of the host are only told from the program inside once they are connected.
                    let connected = reached.connected && who != "the host";
                    ensure!(!answered && !connected, "{who} reaches {address} {port}: {reached:?}");
                }
            }
        }
        finish(agent)?;
        down()?;
        let changes = before.changes_within(PATIENCE)?;
        ensure!(changes.is_empty(), "{changes:#?}");
        Ok(())
    });
}

#[test]
fn a_service_on_all_addresses_is_reached_without_a_relay() {
    lab::test(Peer::Ours, |lab| {
        // One service for both families, and one for IPv4 only.
        page(Ipv6Addr::UNSPECIFIED, 5432, "for both")?;
        page(Ipv4Addr::UNSPECIFIED, 5433, "for IPv4")?;
        echo(Ipv4Addr::UNSPECIFIED, 5433)?;
        works(&up(&lab.wg_quick_file(Reach::Ipv4)?, &["5432", "5433", "5433/udp"])?)?;
        let mut agent = inside()?;
        for address in addresses(&link()?)? {
            assert_eq!(agent.succeed(&format!("get {}", url(address, 5432)))?, "for both");
            assert_eq!(agent.succeed(&format!("get {}", url(address, 5433)))?, "for IPv4");
            assert_eq!(agent.succeed(&format!("echo {} 16", SocketAddr::new(address, 5433)))?, "the same");
        }
        finish(agent)?;
        down()
    });
}

#[test]
fn a_port_that_is_bound_without_a_listener_is_an_error_and_nothing_is_left() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("the ports of a rootless tunnel are bound in a namespace of their own")?;
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, socket};
        use std::os::fd::AsRawFd;

        let taken = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None)?;
        bind(taken.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, 5432))?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let before = Snapshot::take()?;
        let output = up(&file, &["5432"])?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(125), "{text}");
        ensure!(text.contains("TCP port 5432") && text.contains("stop the program that uses the port"), "{text}");
        let changes = before.changes_within(PATIENCE)?;
        ensure!(changes.is_empty(), "{changes:#?}");
        Ok(())
    });
}

#[test]
fn the_successor_of_a_killed_keeper_relays_the_same_host_ports() {
    lab::test(Peer::Ours, |lab| {
        page(Ipv4Addr::LOCALHOST, 5432, "still there")?;
        echo(Ipv4Addr::LOCALHOST, 5432)?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        works(&up(&file, &["5432", "5432/udp"])?)?;
        let mut agent = inside()?;
        let act = "get http://host.internal:5432/";
        assert_eq!(agent.succeed(act)?, "still there");
        let keeper = registry::read(&NAME.parse()?)?.context("a state")?.keeper.cast_signed();
        kill(Pid::from_raw(keeper), Signal::SIGKILL)?;
        // The program's launcher starts the successor.
        assert_eq!(agent.succeed_within(PATIENCE, act)?, "still there");
        let host = link()?.host_ipv4;
        assert_eq!(agent.succeed(&format!("echo {} 16", SocketAddr::new(host.into(), 5432)))?, "the same");
        let successor = registry::read(&NAME.parse()?)?.context("a state")?.keeper.cast_signed();
        ensure!(successor != keeper);
        finish(agent)?;
        down()
    });
}

#[test]
fn plan_and_status_show_host_ports() {
    lab::test(Peer::Ours, |lab| {
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let plan = vpn_exec(["plan", "--host-port", "631", "--config"]).arg(&file).output()?;
        works(&plan)?;
        let text = String::from_utf8_lossy(&plan.stdout).into_owned();
        ensure!(text.contains("host ports      631/tcp"), "{text}");
        // A port below 1024.
        page(Ipv4Addr::LOCALHOST, 631, "a printer")?;
        works(&up(&file, &["631"])?)?;
        let mut agent = inside()?;
        assert_eq!(agent.succeed("get http://host.internal:631/")?, "a printer");
        let status = vpn_exec(["status", NAME]).output()?;
        let text = String::from_utf8_lossy(&status.stdout).into_owned();
        ensure!(text.contains("host ports     631/tcp"), "{text}");
        finish(agent)?;
        down()
    });
}

#[test]
fn a_reload_changes_host_ports() {
    lab::test(Peer::Ours, |lab| {
        page(Ipv4Addr::LOCALHOST, 5432, "one")?;
        page(Ipv4Addr::LOCALHOST, 5433, "another")?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        works(&up(&file, &[])?)?;
        let mut agent = inside()?;
        let mut reload = |ports: &[&str]| -> Result<String> {
            let mut command = vpn_exec(["reload"]);
            command.arg(&file).args(["--name", NAME, "--backend", lab::backend()]);
            for port in ports {
                command.args(["--host-port", port]);
            }
            let output = command.output()?;
            works(&output)?;
            let mut outcome = String::from_utf8(output.stdout)?;
            for port in [5432, 5433] {
                let seen = agent.act(&format!("get http://host.internal:{port}/"))?;
                outcome += &format!("{port}: {}\n", seen.unwrap_or_else(|error| error));
            }
            Ok(outcome)
        };
        let (one, another) = ("5432: one\n", "5433: another\n");
        let (no_one, no_other) = ("5432: ECONNREFUSED\n", "5433: ECONNREFUSED\n");
        assert_eq!(reload(&[])?, format!("nothing has changed\n{no_one}{no_other}"));
        assert_eq!(reload(&["5432"])?, format!("host ports: was none, is now 5432/tcp\n{one}{no_other}"));
        let said = "host ports: was 5432/tcp, is now 5433/tcp\n";
        assert_eq!(reload(&["5433"])?, format!("{said}{no_one}{another}"));
        assert_eq!(reload(&[])?, format!("host ports: was 5433/tcp, is now none\n{no_one}{no_other}"));
        finish(agent)?;
        down()
    });
}
