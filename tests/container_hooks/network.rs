//! What a container with a tunnel reaches, and by which way.

use std::fs;
use std::net::IpAddr;

use anyhow::ensure;
use hickory_proto::rr::RecordType;
use lab::dns::DnsServer;
use lab::http::{Page, WebServer};
use lab::{CLUSTER_RESOLVER, CLUSTER_SERVICE, POD, POD_GATEWAY, PROVIDER, WEB, pod};
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::linux::nftables::Nftables;

use crate::support::{
    BRIEFLY, Container, NAME, PATIENCE, hook, require_no_leaks, require_nothing_left, require_tunnel, succeed, test,
};

/// Docker runs createRuntime before the container has an interface, with IPv6 switched off.
#[test]
fn a_container_whose_network_comes_later_has_the_tunnel_from_its_first_packet() {
    test(|lab, pod| {
        let everywhere = "0.0.0.0/0".parse()?;
        let index = pod.namespace.run(|| {
            vpn_exec::linux::sysctl::set("net/ipv6/conf/all/disable_ipv6", "1")?;
            vpn_exec::linux::sysctl::set("net/ipv6/conf/default/disable_ipv6", "1")?;
            let mut netlink = Netlink::open()?;
            let index = netlink.link("eth0")?.map_or(0, |link| link.index);
            netlink.execute_one(NetlinkRequest::delete_route(index, "eth0", everywhere))?;
            netlink.execute_one(NetlinkRequest::delete_address(index, "eth0", address(POD.ipv4)))?;
            Ok(index)
        })?;
        let container = Container::start(pod, "c1")?;
        succeed(container.create(NAME)?)?;
        pod.namespace.run(|| {
            let router = Some(POD_GATEWAY.ipv4.into());
            let mut netlink = Netlink::open()?;
            netlink.execute_one(NetlinkRequest::add_address(index, "eth0", address(POD.ipv4)))?;
            // Docker lets the kernel choose the interface of the default route, by the gateway's address.
            let by = netlink.route_to(POD_GATEWAY.ipv4.into())?.interface.unwrap_or(0);
            Ok(netlink.execute_one(NetlinkRequest::add_route(by, "eth0", everywhere, router))?)
        })?;
        require_tunnel(pod)?;
        let page = pod.namespace.run(|| lab::http::get(&format!("http://[{}]/", WEB.ipv6), lab::patience(PATIENCE)))?;
        ensure!(page.trim() == PROVIDER.ipv6.to_string(), "IPv6 works in the tunnel: {page}");
        require_no_leaks(lab)?;

        // Replies to inbound connections leave as they came in. Their packets are no leaks.
        let _service = WebServer::start(&pod.namespace, 80, Page::ClientAddress)?;
        let url = format!("http://{}/", POD.ipv4);
        let seen = lab.web_site.run(|| lab::http::get(&url, lab::patience(PATIENCE)))?;
        ensure!(seen.trim() == WEB.ipv4.to_string(), "the container saw {seen:?}");
        container.end()
    });
}

fn address(ipv4: std::net::Ipv4Addr) -> ipnet::IpNet {
    ipnet::Ipv4Net::new_assert(ipv4, 24).into()
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
                let socket = std::net::UdpSocket::bind((POD.ipv4, 0))?;
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
