//! Local networks behind the host's interfaces.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::Echo;
use lab::{
    HOST_ON_LAN, HOST_ON_PRIVATE_LAN, LAN, Lab, PRIVATE_LAN, PROVIDER, Peer, TUNNEL_CLIENT, TUNNEL_RESOLVER, WEB,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::link::TargetNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::linux::sysctl as parameters;
use vpn_exec::names::InterfaceName;
use vpn_exec::registry;

use super::{
    WORKS, assert_untouched, file, finish, inside, keeper_of, local_networks, reachable, sysctl, untouched, url,
    vpn_exec, works,
};

#[test]
fn a_program_reaches_the_opened_network_and_no_other() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("rules and forwarding of the host")?;
        lab.join_private_lan()?;
        let echo = Echo::start(&lab.lan, 7)?;
        let before = untouched(lab)?;
        let mut agent = inside(lab, &[local_networks(), &["--name", "local"]].concat())?;
        for address in reachable(PRIVATE_LAN) {
            let page = agent.succeed(&format!("get {}", url(address, 80)))?;
            ensure!(page == "a page in the local network", "{page}");
            agent.succeed(&format!("echo {} 100", SocketAddr::new(address, 7)))?;
        }
        // The neighbour needs no route back, as it sees the host's address.
        let callers = lab.lan_page.clients();
        ensure!(callers == reachable(HOST_ON_PRIVATE_LAN), "{callers:?}");
        for address in LAN.both() {
            agent.fail(&format!("get {}", url(address, 80)))?;
        }
        let reached = reachable(PRIVATE_LAN).len();
        ensure!(lab.lan_page.clients().len() == reached && echo.seen().len() == reached);
        let seen = agent.succeed_within(WORKS, &format!("get {}", url(WEB.ipv4, 80)))?;
        ensure!(seen == PROVIDER.ipv4.to_string(), "{seen}");

        // Forwarding is on for single interfaces only, and only for packets of tunnels.
        ensure!(sysctl("net/ipv4/ip_forward")? == "0" && sysctl("net/ipv6/conf/all/forwarding")? == "0");
        ensure!(sysctl("net/ipv4/conf/lan0/forwarding")? == "1" && sysctl("net/ipv4/conf/eth0/forwarding")? == "0");
        ask_host_to_forward(lab)?;
        finish(agent)?;
        // Packets in the private network are expected. All others must be encrypted.
        let leaks: Vec<_> =
            lab.capture.uplink()?.into_iter().filter(|packet| !packet.is_expected_on_uplink()).collect();
        ensure!(leaks.is_empty(), "{leaks:#?}");
        assert_untouched(&before)
    });
}

/// Lets a neighbour use the host as its router.
fn ask_host_to_forward(lab: &Lab) -> Result<()> {
    lab.lan.run(|| {
        let mut netlink = Netlink::open()?;
        let index = netlink.link_index(&"eth0".parse().expect("a name"))?;
        let routers = [HOST_ON_LAN.ipv4.into(), HOST_ON_LAN.ipv6.into()];
        let nets = ["203.0.113.0/26", "2001:db8:4::/64"].map(|net| net.parse().expect("a network"));
        let routes =
            nets.into_iter().zip(routers).map(|(net, by)| NetlinkRequest::add_route(index, "eth0", net, Some(by)));
        netlink.execute(routes.collect())?;
        for address in WEB.both() {
            let socket = std::net::UdpSocket::bind(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            socket.send_to(b"forward this", (address, 7))?;
        }
        Ok(())
    })?;
    Ok(())
}

/// The twin of the test above: forwarding on the interface alone makes the host the neighbour's router.
#[test]
fn without_rules_the_host_would_be_a_router() {
    lab::test(Peer::Ours, |lab| {
        vpn_exec::linux::sysctl::set("net/ipv4/conf/lan0/forwarding", "1")?;
        ask_host_to_forward(lab)?;
        std::thread::sleep(lab::patience(Duration::from_millis(200)));
        let leaks = lab.capture.uplink()?.into_iter().filter(|packet| !packet.is_expected_on_uplink()).count();
        ensure!(leaks > 0, "nothing was forwarded");
        Ok(())
    });
}

/// Creates a container on the host, with a link named as systemd-nspawn(1) does and a socket that receives packets.
fn container() -> Result<(NetworkNamespace, UdpSocket)> {
    let (inside, mut netlink) = NetworkNamespace::create(Netlink::open)?;
    let mut host = Netlink::open()?;
    let (outer, inner): (InterfaceName, InterfaceName) = ("ve-box".parse()?, "host0".parse()?);
    host.execute_one(NetlinkRequest::add_veth(&outer, &inner, TargetNamespace::Other(inside.as_fd())))?;
    for (netlink, name, address) in [(&mut host, &outer, "10.99.0.1/24"), (&mut netlink, &inner, "10.99.0.2/24")] {
        let index = netlink.link_index(name)?;
        netlink.execute_one(NetlinkRequest::add_address(index, name.as_str(), address.parse()?))?;
        netlink.execute_one(NetlinkRequest::set_up(index, name.as_str()))?;
    }
    let heard = inside.run(|| UdpSocket::bind("0.0.0.0:7"))?;
    heard.set_read_timeout(Some(lab::patience(Duration::from_millis(500))))?;
    Ok((inside, heard))
}

/// The names of a tunnel's and of a container's interfaces have the same beginning.
#[test]
fn the_host_does_not_forward_to_other_containers() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let (_container, heard) = container()?;
        let send = || {
            lab.lan.run(|| UdpSocket::bind("0.0.0.0:0")?.send_to(b"forward this", "10.99.0.2:7"))?;
            Ok::<_, anyhow::Error>(heard.recv(&mut [0; 16]).is_ok())
        };
        lab.lan.run(|| {
            let mut netlink = Netlink::open()?;
            let link = netlink.route_to(HOST_ON_PRIVATE_LAN.ipv4.into())?.interface.unwrap_or_default();
            let (net, by) = ("10.99.0.0/24".parse().expect("a network"), HOST_ON_PRIVATE_LAN.ipv4.into());
            Ok(netlink.execute_one(NetlinkRequest::add_route(link, "the link", net, Some(by)))?)
        })?;
        let agent = inside(lab, &[local_networks(), &["--name", "beside"]].concat())?;
        ensure!(!send()?, "a neighbour has reached it");
        finish(agent)?;
        // A host that forwards IPv4 already continues to, whatever IPv6 needs.
        vpn_exec::linux::sysctl::set("net/ipv4/ip_forward", "1")?;
        let agent = inside(lab, &[local_networks(), &["--name", "beside"]].concat())?;
        ensure!(send()?, "others' packets are not forwarded any more");
        finish(agent)?;
        vpn_exec::linux::sysctl::set("net/ipv4/ip_forward", "0")?;
        ensure!(!send()?);
        // The twin: with forwarding alone, the container is reached.
        vpn_exec::linux::sysctl::set("net/ipv4/conf/lan0/forwarding", "1")?;
        ensure!(send()?, "nothing was forwarded");
        Ok(())
    });
}

#[test]
fn the_option_lan_opens_all_private_networks_of_the_host() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("rules and forwarding of the host")?;
        lab.join_private_lan()?;
        let file = file(lab)?;
        // Not local networks: a multicast group, the host's own addresses, an unreachable one, and networks behind
        // routers.
        for route in [
            "multicast 10.83.0.0/16 dev lan0",
            "local 10.84.0.0/16 dev lan0 table 78",
            "blackhole 10.85.0.0/16",
            "10.86.0.0/16 via 192.168.7.77",
            "10.87.0.0/16 via inet6 fd07::77 dev lan0",
        ] {
            let status = Command::new("ip").args(["route", "add"]).args(route.split(' ')).status()?;
            ensure!(status.success(), "{route}");
        }
        let plan = works(&["plan", "--config", file, "--lan", "--json"])?;
        let plan: serde_json::Value = serde_json::from_slice(&plan.stdout)?;
        let networks: Vec<&str> = local_networks().iter().copied().filter(|word| *word != "--local").collect();
        ensure!(plan["local"]["networks"] == serde_json::json!(networks), "{}", plan["local"]);
        ensure!(plan["local"]["interfaces"] == serde_json::json!(["lan0"]), "{}", plan["local"]);
        let mut agent = inside(lab, &["--lan"])?;
        for address in reachable(PRIVATE_LAN) {
            agent.succeed(&format!("get {}", url(address, 80)))?;
        }
        finish(agent)?;
        Ok(())
    });
}

/// The host would answer a packet from the tunnel's inner address by its own default route: in the clear.
#[test]
fn packets_to_the_host_never_have_the_tunnels_inner_address() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("a rootless tunnel has no link to the host")?;
        for (parameter, value) in [("all/rp_filter", "2"), ("default/rp_filter", "2")] {
            // systemd's setting.
            parameters::set(&format!("net/ipv4/conf/{parameter}"), value)?;
        }
        // For both families.
        echo("[::]:7".parse()?)?;
        works(&["up", file(lab)?, "--name", "asked", "--backend", lab::backend()])?;
        let link = registry::read_plan(&"asked".parse()?)?.context("there is a plan")?.veth.context("a link")?;
        let namespace = lab::tunnel::namespace("asked")?;
        let ask = |from: IpAddr, to: IpAddr| -> std::io::Result<()> {
            let socket = namespace.run(|| UdpSocket::bind((from, 0)))?;
            socket.set_read_timeout(Some(lab::patience(Duration::from_secs(1))))?;
            socket.send_to(b"to be said again", (to, 7))?;
            socket.recv(&mut [0; 100]).map(drop)
        };
        let host = [Some(IpAddr::from(link.host_ipv4)), link.host_ipv6.map(IpAddr::from)].into_iter().flatten();
        let inner = [Some(IpAddr::from(link.inner_ipv4)), link.inner_ipv6.map(IpAddr::from)].into_iter().flatten();
        lab.capture.forget()?;
        for ((to, from), of_tunnel) in host.zip(inner).zip(TUNNEL_CLIENT.both()) {
            ask(from, to).with_context(|| format!("{from} asks {to}"))?;
            ensure!(ask(of_tunnel, to).is_err(), "{of_tunnel} is answered by {to}");
        }
        let plain: Vec<_> =
            lab.capture.uplink()?.into_iter().filter(|packet| !packet.is_expected_on_uplink()).collect();
        ensure!(plain.is_empty(), "{plain:#?}");
        drop(namespace);
        works(&["down", "asked"])?;
        Ok(())
    });
}

/// Echoes datagrams, on the host.
fn echo(address: SocketAddr) -> std::io::Result<()> {
    let socket = UdpSocket::bind(address)?;
    std::thread::spawn(move || {
        let mut buffer = [0; 100];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
    Ok(())
}

/// An opened network may contain another tunnel's link, whose program the host reaches.
#[test]
fn a_program_does_not_reach_a_program_in_another_tunnel() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("rootless tunnels are not connected")?;
        lab.join_private_lan()?;
        works(&["up", file(lab)?, "--name", "other", "--backend", lab::backend()])?;
        let other = registry::read_plan(&"other".parse()?)?.context("there is a plan")?.veth.context("a link")?;
        let namespace = lab::tunnel::namespace("other")?;
        let program = namespace.run(|| UdpSocket::bind("0.0.0.0:7"))?;
        program.set_read_timeout(Some(lab::patience(Duration::from_millis(500))))?;
        let mut heard = [0; 100];
        // The host reaches it.
        UdpSocket::bind("0.0.0.0:0")?.send_to(b"from the host", (other.inner_ipv4, 7))?;
        program.recv(&mut heard)?;
        let wide = format!("{}/8", std::net::Ipv4Addr::new(other.inner_ipv4.octets()[0], 0, 0, 0));
        let mut agent = inside(lab, &["--local", &wide, "--local", "192.168.7.0/24", "--name", "wide"])?;
        agent.succeed(&format!("get {}", url(PRIVATE_LAN.ipv4, 80)))?;
        agent.fail(&format!("send {}", SocketAddr::new(other.inner_ipv4.into(), 7)))?;
        ensure!(program.recv(&mut heard).is_err(), "the program of another tunnel is heard");
        finish(agent)?;
        drop((program, namespace));
        works(&["down", "other"])?;
        Ok(())
    });
}

/// The opened network contains the provider's resolver, and the file routes everything. DNS stays in the tunnel, even
/// if that is gone.
#[test]
fn the_tunnel_takes_precedence_over_a_local_network() {
    lab::test(Peer::Ours, |lab| {
        let checked = works(&["check", "--config", file(lab)?, "--local", "10.0.0.0/8"])?;
        let said = String::from_utf8(checked.stdout)?;
        ensure!(said.contains("DNS server 10.64.0.1") && said.contains("is reached through the tunnel"), "{said}");
        ensure!(said.contains("10.64.0.2/32 is reached through the tunnel"), "{said}");

        let mut agent = inside(lab, &["--local", "10.0.0.0/8", "--name", "wins"])?;
        let lookup = format!("lookup {} web.example", TUNNEL_RESOLVER.ipv4);
        agent.succeed_within(WORKS, &lookup)?;
        lab.capture.forget()?;
        // A stopped keeper does not notice that the interface is gone.
        let keeper = keeper_of("wins")?;
        kill(Pid::from_raw(keeper), Signal::SIGSTOP)?;
        let namespace = lab::tunnel::namespace("wins")?;
        namespace.run(|| {
            let mut netlink = Netlink::open()?;
            let index = netlink.link_index(&"wg0".parse().expect("a name"))?;
            Ok(netlink.execute_one(NetlinkRequest::delete_link(index, "wg0"))?)
        })?;
        agent.fail(&lookup)?;
        agent.fail(&format!("get {}", url(TUNNEL_RESOLVER.ipv4, 80)))?;
        let plain: Vec<_> =
            lab.capture.uplink()?.into_iter().filter(|packet| !packet.is_expected_on_uplink()).collect();
        ensure!(plain.is_empty(), "{plain:#?}");
        kill(Pid::from_raw(keeper), Signal::SIGCONT)?;
        // It notices now, and ends the program.
        let (status, _) = agent.end()?;
        ensure!(!status.success(), "the tunnel has ended");
        Ok(())
    });
}

#[test]
fn local_networks_change_while_programs_run() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let before = untouched(lab)?;
        let file = file(lab)?;
        let all = |command, more: &[&str]| {
            works(&[&[command, file, "--name", "changing", "--backend", lab::backend()], more].concat())
        };
        all("up", &[])?;
        let namespace = lab::tunnel::namespace("changing")?;
        let get_within = |usual, address| {
            let url = url(address, 80);
            namespace.run(|| lab::http::get(&url, lab::patience(usual)))
        };
        let get = |address| get_within(WORKS, address);
        let get_in_vain = |address| get_within(Duration::from_millis(700), address).is_err();
        ensure!(get_in_vain(PRIVATE_LAN.both()[0]));
        let changed = all("reload", local_networks())?;
        ensure!(String::from_utf8(changed.stdout)?.contains("local networks"));
        for address in reachable(PRIVATE_LAN) {
            get(address)?;
        }
        all("reload", &local_networks()[..2])?;
        ensure!(get_in_vain(PRIVATE_LAN.both()[1]), "IPv6 was taken back");
        get(PRIVATE_LAN.both()[0])?;
        all("reload", &[])?;
        ensure!(get_in_vain(PRIVATE_LAN.both()[0]));
        ensure!(sysctl("net/ipv4/conf/lan0/forwarding")? == "0");
        works(&["down", "changing"])?;
        assert_untouched(&before)
    });
}

/// Before Linux 6.17, a kernel forwards IPv6 on all interfaces or on none.
#[test]
fn an_ipv6_network_is_refused_if_the_kernel_would_forward_on_all_interfaces() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("rules and forwarding of the host")?;
        lab.join_private_lan()?;
        if lab::forwards_ipv6_by_interface() {
            // As on such a kernel.
            let flags = rustix::mount::MountFlags::empty();
            rustix::mount::mount("lab-older", "/proc/sys/net/ipv6/conf/default", c"tmpfs", flags, None)?;
        }
        ensure!(!lab::forwards_ipv6_by_interface());
        let before = untouched(lab)?;
        let local = ["--config", file(lab)?, "--backend", lab::backend(), "--local", "192.168.7.0/24"];
        let refused = vpn_exec(&[&local[..], &["--local", "fd07::/64", "--", "true"]].concat())?;
        let said = String::from_utf8(refused.stderr)?;
        ensure!(refused.status.code() == Some(125) && said.contains("fd07::/64 cannot be a local network"), "{said}");
        ensure!(said.contains("Linux 6.17") && said.contains("net.ipv6.conf.all.forwarding=1"), "{said}");
        assert_untouched(&before)?;
        // --lan opens the IPv4 networks, with a warning.
        let plan = works(&["plan", "--config", file(lab)?, "--lan"])?;
        let said = String::from_utf8(plan.stdout)?;
        ensure!(said.contains("fd07::/64 cannot be a local network"), "{said}");

        // A host that forwards already needs no change.
        parameters::set("net/ipv6/conf/all/forwarding", "1")?;
        let mut agent = inside(lab, &["--local", "fd07::/64"])?;
        agent.succeed(&format!("get {}", url(PRIVATE_LAN.ipv6, 80)))?;
        finish(agent)?;
        Ok(())
    });
}

#[test]
fn networks_that_are_not_local_are_refused() {
    lab::test(Peer::Ours, |lab| {
        let file = file(lab)?;
        for (network, reason) in [
            ("0.0.0.0/0", "the whole Internet"),
            ("192.168.1.7/24", "non-zero host part"),
            ("8.0.0.0/7", "larger than any private network"),
            ("127.0.0.0/8", "loopback"),
            ("224.0.0.0/4", "multicast"),
            ("169.254.0.0/16", "link-local"),
            ("10.64.0.2/32", "routed into the tunnel"),
        ] {
            let output = vpn_exec(&["check", "--config", file, "--local", network])?;
            let said = String::from_utf8(output.stderr)?;
            ensure!(!output.status.success() && said.contains(reason), "{network}: {said}");
        }
        Ok(())
    });
}
