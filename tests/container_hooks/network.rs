//! What a container with a tunnel reaches, and by which way.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use hickory_proto::rr::RecordType;
use ipnet::IpNet;
use lab::dns::DnsServer;
use lab::http::{Page, WebServer};
use lab::{
    CLUSTER_RESOLVER, CLUSTER_SERVICE, Lab, POD, POD_GATEWAY, PROVIDER, Pod, Reach, TUNNEL_CLIENT, TUNNEL_RESOLVER,
    WEB, pod, vpn_exec,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::net::sockopt::Timeout;
use rustix::net::{AddressFamily, SocketType};
use vpn_exec::linux::netlink::rule::Selector;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::linux::nftables::Nftables;
use vpn_exec::registry;

use crate::support::{
    BRIEFLY, Container, NAME, PATIENCE, hook, require_no_leaks, require_nothing_left, require_tunnel, succeed, test,
};

/// The default routes of both families.
const EVERYWHERE: [&str; 2] = ["0.0.0.0/0", "::/0"];

/// Takes all addresses and default routes from a pod's interface `eth0`, as before an engine connects it. Returns the
/// addresses.
fn disconnect(pod: &Pod) -> Result<Vec<IpNet>> {
    let taken = pod.namespace.run(|| {
        let mut netlink = Netlink::open()?;
        let index = netlink.link_index(&"eth0".parse().map_err(io::Error::other)?)?;
        let is_link_local = |net: &IpNet| matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local());
        let present = netlink.addresses()?.into_iter().filter(|(of, net)| *of == index && !is_link_local(net));
        let present: Vec<IpNet> = present.map(|(_, net)| net).collect();
        let routes = EVERYWHERE.into_iter().filter_map(|net| net.parse().ok());
        let routes = routes.map(|net: IpNet| NetlinkRequest::delete_route(index, "eth0", net));
        let addresses = present.iter().map(|net| NetlinkRequest::delete_address(index, "eth0", *net));
        netlink.execute(routes.chain(addresses).collect())?;
        Ok(present)
    })?;
    ensure!(taken.len() == 2, "{taken:?}");
    Ok(taken)
}

/// Gives a pod's interface an address and a default gateway.
fn connect(pod: &Pod, net: IpNet) -> Result<()> {
    let gateway = if net.addr().is_ipv4() { POD_GATEWAY.ipv4.into() } else { IpAddr::from(POD_GATEWAY.ipv6) };
    let everywhere: IpNet = EVERYWHERE[usize::from(net.addr().is_ipv6())].parse()?;
    pod.namespace.run(|| {
        let mut netlink = Netlink::open()?;
        let index = netlink.link_index(&"eth0".parse().map_err(io::Error::other)?)?;
        netlink.execute_one(NetlinkRequest::add_address(index, "eth0", net))?;
        // Docker lets the kernel choose the interface of the default route, by the gateway's address.
        let by = netlink.route_to(gateway)?.interface.unwrap_or(0);
        Ok(netlink.execute_one(NetlinkRequest::add_route(by, "eth0", everywhere, Some(gateway)))?)
    })?;
    Ok(())
}

/// Requires that the web site reaches a web server in a pod at an address, and gets an answer.
fn require_served(lab: &Lab, at: IpAddr) -> Result<()> {
    let (url, client) = match at {
        IpAddr::V4(_) => (format!("http://{at}/"), IpAddr::from(WEB.ipv4)),
        IpAddr::V6(_) => (format!("http://[{at}]/"), WEB.ipv6.into()),
    };
    let seen = lab.web_site.run(|| lab::http::get(&url, lab::patience(PATIENCE))).with_context(|| url.clone())?;
    ensure!(seen.trim() == client.to_string(), "the container saw {seen:?}");
    Ok(())
}

/// Docker runs createRuntime before the container has an interface, with IPv6 switched off.
#[test]
fn a_container_whose_network_comes_later_has_the_tunnel_from_its_first_packet() {
    test(|lab, pod| {
        let own = disconnect(pod)?;
        pod.namespace.run(|| {
            vpn_exec::linux::sysctl::set("net/ipv6/conf/all/disable_ipv6", "1")?;
            vpn_exec::linux::sysctl::set("net/ipv6/conf/default/disable_ipv6", "1")
        })?;
        let container = Container::start(pod, "c1")?;
        succeed(container.create(NAME)?)?;
        own.iter().filter(|net| net.addr().is_ipv4()).try_for_each(|net| connect(pod, *net))?;
        require_tunnel(pod)?;
        let page = pod.namespace.run(|| lab::http::get(&format!("http://[{}]/", WEB.ipv6), lab::patience(PATIENCE)))?;
        ensure!(page.trim() == PROVIDER.ipv6.to_string(), "IPv6 works in the tunnel: {page}");
        require_no_leaks(lab)?;
        // Replies to inbound connections leave as they came in. Their packets are no leaks.
        let _service = WebServer::start(&pod.namespace, 80, Page::ClientAddress)?;
        require_served(lab, POD.ipv4.into())?;
        container.end()
    });
}

/// A cluster's network may cover the provider's resolver. The tunnel's routes to it go before the container's.
#[test]
fn a_route_of_the_container_takes_no_resolver_out_of_the_tunnel() {
    test(|lab, pod| {
        pod.namespace.run(|| {
            let mut netlink = Netlink::open()?;
            let index = netlink.link_index(&"eth0".parse().map_err(io::Error::other)?)?;
            let net: IpNet = IpNet::new(TUNNEL_RESOLVER.ipv4.into(), 16).map_err(io::Error::other)?.trunc();
            Ok(netlink.execute_one(NetlinkRequest::add_route(index, "eth0", net, Some(POD_GATEWAY.ipv4.into())))?)
        })?;
        let container = Container::start(pod, "c1")?;
        succeed(container.create(NAME)?)?;
        require_tunnel(pod)?;
        let patience = lab::patience(PATIENCE);
        let look_up = || lab::dns::lookup(TUNNEL_RESOLVER.ipv4.into(), "web.example", RecordType::A, patience);
        ensure!(pod.namespace.run(look_up)? == [IpAddr::from(WEB.ipv4)], "another address");
        require_no_leaks(lab)?;
        container.end()
    });
}

/// With `rp_filter=1`, an inbound packet needs a route back by its interface, which the rules for the container's own
/// addresses give. They follow the addresses.
#[test]
fn a_container_serves_the_internet_at_addresses_that_come_later() {
    test(|lab, pod| {
        let own = disconnect(pod)?;
        pod.namespace.run(|| {
            let set = |interface| vpn_exec::linux::sysctl::set(&format!("net/ipv4/conf/{interface}/rp_filter"), "1");
            ["all", "eth0"].into_iter().try_for_each(set)
        })?;
        let own_rules = || -> Result<Vec<Selector>> {
            let rules = pod.namespace.run(|| Netlink::open()?.policy_rules())?;
            let own = rules.into_iter().map(|rule| rule.selector).filter(|of| matches!(of, Selector::From(_)));
            Ok(own.collect())
        };
        let container = Container::start(pod, "c1")?;
        succeed(container.create(NAME)?)?;
        ensure!(own_rules()?.is_empty(), "{:?}", own_rules());
        own.iter().try_for_each(|net| connect(pod, *net))?;
        require_tunnel(pod)?;
        require_no_leaks(lab)?;
        let _service = WebServer::start(&pod.namespace, 80, Page::ClientAddress)?;
        POD.both().into_iter().try_for_each(|address| require_served(lab, address))?;
        let expected = POD.both().map(|address| Selector::From(address.into()));
        lab::wait_until(lab::patience(PATIENCE), "the rules do not follow", || Ok(own_rules()? == expected))?;

        // A successor of the keeper finds the change that it has missed.
        let keeper = registry::read(&NAME.parse()?)?.context("a state")?.keeper.cast_signed();
        kill(Pid::from_raw(keeper), Signal::SIGKILL)?;
        disconnect(pod)?;
        succeed(vpn_exec(["up", NAME]).output()?)?;
        lab::wait_until(lab::patience(PATIENCE), "a rule is left", || Ok(own_rules()?.is_empty()))?;
        own.iter().try_for_each(|net| connect(pod, *net))?;
        lab::wait_until(lab::patience(PATIENCE), "the successor does not follow", || Ok(own_rules()? == expected))?;
        POD.both().into_iter().try_for_each(|address| require_served(lab, address))?;
        container.end()
    });
}

/// A program tries the next address at once (RFC 8305), instead of waiting for a timeout.
#[test]
fn connections_that_the_tunnel_cannot_carry_are_refused_at_once() {
    test(|lab, pod| {
        // A provider without IPv6, and a pod with it.
        let text = lab.wg_quick_text(Reach::Ipv4).replace(&format!(", {}/128", TUNNEL_CLIENT.ipv6), "");
        let file = lab.file(&text.replace(", ::/0", ""))?;
        let text = format!("wireguard = \"{}\"\nbackend = \"{}\"\n", file.display(), lab::backend());
        fs::write(format!("/etc/vpn-exec/{NAME}.toml"), text + "containers = true\n")?;
        let container = Container::start(pod, "c1")?;
        succeed(container.create(NAME)?)?;
        require_tunnel(pod)?;
        for (from, to) in [
            (None, WEB.ipv6.into()),
            (Some(POD.ipv6.into()), WEB.ipv6.into()),
            (Some(POD.ipv4.into()), IpAddr::from(WEB.ipv4)),
        ] {
            let (stream, datagram) = pod.namespace.run(|| Ok((connect_from(from, to)?, send_from(from, to)?)))?;
            let reason = stream.as_ref().err().map(io::Error::kind);
            ensure!(reason == Some(io::ErrorKind::ConnectionRefused), "from {from:?} to {to}: {stream:?}");
            ensure!(datagram.is_err(), "from {from:?} to {to}: {datagram:?}");
        }
        require_no_leaks(lab)?;
        require_tunnel(pod)?;
        container.end()
    });
}

/// Opens a TCP connection to a port, from an address if one is given.
fn connect_from(from: Option<IpAddr>, to: IpAddr) -> io::Result<io::Result<()>> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket(family, SocketType::STREAM, None)?;
    // Longer than the test may take to notice that the connection waits for its timeout.
    rustix::net::sockopt::set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
    if let Some(from) = from {
        rustix::net::bind(&socket, &SocketAddr::new(from, 0))?;
    }
    Ok(rustix::net::connect(&socket, &SocketAddr::new(to, 80)).map_err(io::Error::from))
}

/// Sends a datagram, from an address if one is given.
fn send_from(from: Option<IpAddr>, to: IpAddr) -> io::Result<io::Result<usize>> {
    let any = if to.is_ipv4() { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((from.unwrap_or(any), 0))?;
    Ok(socket.send_to(b"leak", (to, 443)))
}

/// The guilty twins: without the packet rules, packets from the container's own address leave by its interface.
#[test]
fn without_its_protections_a_container_leaks() {
    test(|lab, pod| {
        for (broken, is_guilty) in [("", false), ("routes", false), ("rules", true), ("rules,routes", true)] {
            let container = Container::start(pod, "c1")?;
            let environment = [("VPN_EXEC_TEST_BREAK", broken)];
            let output = hook(&["createRuntime"], &container.state(Some(NAME)), &environment)?;
            succeed(output)?;
            lab.capture.forget()?;
            pod.namespace.run(|| {
                let socket = UdpSocket::bind((POD.ipv4, 0))?;
                // The rules refuse the packet with an error.
                let _ = socket.send_to(b"leak", (WEB.ipv4, 9));
                Ok(())
            })?;
            let leaks = lab.capture.leaks()?;
            ensure!(leaks.is_empty() != is_guilty, "broken: {broken:?}: {leaks:?}");
            container.end()?;
            require_nothing_left()?;
            // The rules of the last container stay, so the twin needs them gone.
            if !broken.contains("rules") {
                pod.namespace.run(|| Nftables::open()?.delete("vpn-exec"))?;
            }
        }
        Ok(())
    });
}

#[test]
fn a_container_resolves_the_names_of_its_cluster_and_all_others_through_the_tunnel() {
    test(|lab, pod| {
        let profile = format!("/etc/vpn-exec/{NAME}.toml");
        let text = fs::read_to_string(&profile)?;
        let networks = pod::CLUSTER_NETWORKS.map(|net| format!("\"{net}\"")).join(", ");
        fs::write(
            &profile,
            format!(
                "{text}[dns]\nfor = {{ \"cluster.local\" = [\"{}\"] }}\n[local]\nnetworks = [{networks}]\n",
                CLUSTER_RESOLVER.ipv4
            ),
        )?;
        let container = Container::start(pod, "c1")?;
        succeed(container.create(NAME)?)?;
        require_tunnel(pod)?;
        let lookup = |server: IpAddr, name: &str| {
            let found = pod.namespace.run(|| lab::dns::lookup(server, name, RecordType::A, BRIEFLY * 3));
            found.map_err(|error| anyhow::anyhow!("{name}: {error}"))
        };
        let forwarder = vpn_exec::plan::FORWARDER_ADDRESSES[0];
        ensure!(lookup(forwarder, pod::SERVICE_NAME)? == [IpAddr::from(CLUSTER_SERVICE.ipv4)]);
        ensure!(lookup(forwarder, "web.example")? == [IpAddr::from(WEB.ipv4)]);
        let asked = |server: &DnsServer| server.questions().iter().map(|question| question.name.clone()).collect();
        let (cluster, tunnel): (Vec<String>, Vec<String>) = (asked(&pod.cluster_resolver), asked(&lab.tunnel_resolver));
        ensure!(cluster.iter().all(|name| name.starts_with("service.")) && !cluster.is_empty(), "{cluster:?}");
        ensure!(tunnel.iter().all(|name| name.starts_with("web.")) && !tunnel.is_empty(), "{tunnel:?}");
        for server in [CLUSTER_RESOLVER, POD_GATEWAY] {
            ensure!(lookup(server.ipv4.into(), "web.example").is_err(), "a DNS leak to {server:?}");
        }
        let page = pod
            .namespace
            .run(|| lab::http::get(&format!("http://{}/", CLUSTER_SERVICE.ipv4), lab::patience(PATIENCE)))?;
        ensure!(page.contains("cluster"), "{page}");
        container.end()?;
        require_no_leaks(lab)
    });
}
