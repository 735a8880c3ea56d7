//! Traffic of the application's container: through the tunnel, to local networks, as a reply to an inbound connection,
//! and nothing else.

use std::fs;
use std::net::SocketAddr;

use lab::agent::Echo;
use lab::dns::DnsServer;
use lab::launcher::{errors_of, run};
use lab::{
    CLUSTER_RESOLVER, CLUSTER_SERVICE, Lab, POD, POD_GATEWAY, PROVIDER, Peer, Pod, Reach, Result, TUNNEL_CLIENT, WEB,
};
use nix::sys::signal::Signal;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::linux::sysctl;

use crate::support::{Sidecar, WORKS, application, cluster, get, require_closed, wait_until_up};

/// A pod with a tunnel by this endpoint, and local networks of the cluster.
fn in_pod(peer: Peer, reach: Reach, test: impl FnOnce(&Lab, &Pod, &DnsServer) -> Result<()>) {
    lab::test(peer, |lab| {
        let pod = Pod::start(lab)?;
        let gateway_resolver = Pod::start_gateway_resolver(lab)?;
        // The strictest setting, which asks for src_valid_mark with other programs.
        pod.namespace.run(|| {
            sysctl::set("net/ipv4/conf/all/rp_filter", "1")?;
            sysctl::set("net/ipv4/conf/default/rp_filter", "1")?;
            sysctl::set("net/ipv4/conf/eth0/rp_filter", "1")
        })?;
        let _sidecar = Sidecar::start(&pod, &lab.wg_quick_file(reach)?, &cluster())?;
        wait_until_up(&pod)?;
        lab.capture.forget()?;
        test(lab, &pod, &gateway_resolver)
    });
}

fn everything_works(lab: &Lab, pod: &Pod, gateway_resolver: &DnsServer) -> Result<()> {
    let mut app = application(pod)?;
    // The Internet, under the provider's address.
    assert_eq!(app.succeed_within(WORKS, &get(WEB.ipv4))?, PROVIDER.ipv4.to_string());
    assert_eq!(app.succeed_within(WORKS, &get(WEB.ipv6))?, PROVIDER.ipv6.to_string());
    // Names, by the tunnel's resolver.
    assert!(fs::read_to_string(&pod.resolv_conf)?.contains("nameserver 10.64.0.1"));
    assert_eq!(app.succeed("get http://web.example/")?, PROVIDER.ipv4.to_string());
    // The cluster, under the pod's own address.
    for address in CLUSTER_SERVICE.both() {
        assert_eq!(app.succeed(&get(address))?, "a service of the cluster");
    }
    require_closed(lab, &CLUSTER_SERVICE.both())?;
    assert!(gateway_resolver.questions().is_empty() && pod.cluster_resolver.questions().is_empty());
    app.finish_well().map(drop)
}

#[test]
fn the_application_has_the_tunnel_and_the_cluster() {
    in_pod(Peer::WireguardGo, Reach::Ipv4, everything_works);
}

#[test]
fn the_endpoint_may_be_an_ipv6_address() {
    in_pod(Peer::Ours, Reach::Ipv6, everything_works);
}

#[test]
fn resolvers_in_reach_get_no_query() {
    in_pod(Peer::Ours, Reach::Ipv4, |lab, pod, gateway_resolver| {
        let mut app = application(pod)?;
        for resolver in POD_GATEWAY.both().into_iter().chain(CLUSTER_RESOLVER.both()) {
            app.fail(&format!("lookup {resolver} web.example"))?;
        }
        assert!(gateway_resolver.questions().is_empty(), "{:?}", gateway_resolver.questions());
        assert!(pod.cluster_resolver.questions().is_empty(), "{:?}", pod.cluster_resolver.questions());
        require_closed(lab, &[])?;
        app.finish_well().map(drop)
    });
}

/// The twin: the cluster's resolver answers if it is the configured one.
#[test]
fn a_configured_resolver_in_a_local_network_is_asked() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let resolver = CLUSTER_RESOLVER.ipv4.to_string();
        let options = ["--dns", &resolver, "--local", &format!("{resolver}/32")];
        let _sidecar = Sidecar::start(&pod, &lab.wg_quick_file(Reach::Ipv4)?, &options)?;
        wait_until_up(&pod)?;
        let mut app = application(&pod)?;
        app.succeed(&format!("lookup {resolver} web.example"))?;
        assert!(!pod.cluster_resolver.questions().is_empty());
        app.finish_well().map(drop)
    });
}

#[test]
fn inbound_connections_of_any_network_are_answered() {
    in_pod(Peer::Ours, Reach::Ipv4, |lab, pod, _| {
        let mut app = application(pod)?;
        app.succeed("serve 8080 published")?;
        for (name, site) in [("the Internet", &lab.web_site), ("the host", &lab.host)] {
            for address in POD.both() {
                let url = format!("http://{}/", SocketAddr::new(address, 8080));
                let page = site.run(|| lab::http::get(&url, lab::patience(WORKS)));
                assert_eq!(page.map_err(|error| format!("{name}: {error}")).as_deref(), Ok("published"), "{name}");
            }
        }
        // The tunnel's own addresses are not reached by the pod's interface, nor open ports through the tunnel.
        lab.host.run(|| {
            let mut netlink = Netlink::open()?;
            let index = netlink.link_index(&"pod0".parse().expect("a name"))?;
            for (own, pod) in TUNNEL_CLIENT.both().into_iter().zip(POD.both()) {
                netlink.execute_one(NetlinkRequest::add_route(index, "pod0", own.into(), Some(pod)))?;
            }
            Ok(())
        })?;
        for address in TUNNEL_CLIENT.both() {
            let url = format!("http://{}/", SocketAddr::new(address, 8080));
            assert!(lab.host.run(|| lab::http::get(&url, std::time::Duration::from_secs(1))).is_err(), "{url}");
            let through_tunnel = lab.provider.site().run(|| lab::http::get(&url, std::time::Duration::from_secs(1)));
            assert!(through_tunnel.is_err(), "{url}");
        }
        // A datagram needs no reply.
        let echo = Echo::start(&pod.namespace, 9000)?;
        let send = |to: std::net::IpAddr, text: &'static str| {
            lab.host.run(|| {
                let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                std::net::UdpSocket::bind(any)?.send_to(text.as_bytes(), (to, 9000)).map(drop)
            })
        };
        for (own, pod) in TUNNEL_CLIENT.both().into_iter().zip(POD.both()) {
            send(own, "to the tunnel")?;
            send(pod, "to the pod")?;
        }
        lab::wait_until(lab::patience(WORKS), "no datagram arrives", || Ok(echo.seen().len() >= 2))?;
        assert_eq!(echo.seen(), ["to the pod", "to the pod"]);
        app.finish_well().map(drop)
    });
}

#[test]
fn an_opened_port_is_reached_through_the_tunnel() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let _sidecar = Sidecar::start(&pod, &lab.wg_quick_file(Reach::Ipv4)?, &["--open", "8080"])?;
        wait_until_up(&pod)?;
        let mut app = application(&pod)?;
        app.succeed("serve 8080 opened")?;
        let url = format!("http://{}/", SocketAddr::new(TUNNEL_CLIENT.ipv4.into(), 8080));
        let page = lab.provider.site().run(|| lab::http::get(&url, lab::patience(WORKS)))?;
        assert_eq!(page, "opened");
        app.finish_well().map(drop)
    });
}

#[test]
fn a_killed_sidecar_leaves_the_pod_closed_and_a_new_one_opens_it() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let first = Sidecar::start(&pod, &file, &cluster())?;
        wait_until_up(&pod)?;
        let mut app = application(&pod)?;
        assert_eq!(app.succeed_within(WORKS, &get(WEB.ipv4))?, PROVIDER.ipv4.to_string());
        first.end_by(Signal::SIGKILL)?;
        lab.capture.forget()?;
        for address in WEB.both() {
            app.fail(&get(address))?;
        }
        assert_eq!(app.succeed(&get(CLUSTER_SERVICE.ipv4))?, "a service of the cluster");
        require_closed(lab, &CLUSTER_SERVICE.both())?;
        let _second = Sidecar::start(&pod, &file, &cluster())?;
        assert_eq!(app.succeed_within(WORKS, &get(WEB.ipv4))?, PROVIDER.ipv4.to_string());
        app.finish_well().map(drop)
    });
}

#[test]
fn with_a_dead_provider_nothing_leaves_the_pod() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        lab.provider.stop()?;
        lab.capture.forget()?;
        let sidecar = Sidecar::start(&pod, &lab.wg_quick_file(Reach::Ipv4)?, &cluster())?;
        lab::wait_until(lab::patience(WORKS), "the pod is not closed", || {
            Ok(crate::support::check(&pod)? == ("connecting".to_owned(), Some(3)))
        })?;
        let mut app = application(&pod)?;
        app.fail(&get(WEB.ipv4))?;
        app.fail(&get(WEB.ipv6))?;
        require_closed(lab, &[])?;
        lab.provider.restart()?;
        assert_eq!(app.succeed_within(WORKS, &get(WEB.ipv4))?, PROVIDER.ipv4.to_string());
        app.finish_well()?;
        drop(sidecar);
        Ok(())
    });
}

/// The twin of all others: without a tunnel, the pod reaches everything.
#[test]
fn without_a_tunnel_the_pod_is_open() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let _gateway_resolver = Pod::start_gateway_resolver(lab)?;
        let mut app = application(&pod)?;
        app.succeed_within(WORKS, &get(WEB.ipv4))?;
        app.succeed(&format!("lookup {} web.example", POD_GATEWAY.ipv4))?;
        assert!(require_closed(lab, &[]).is_err());
        app.finish_well().map(drop)
    });
}

/// A program that sends by the pod's interface: bound to its name, or to its address. It prints whether it connected.
const BOUND: &str = "import socket, sys
family = socket.AF_INET6 if ':' in sys.argv[2] else socket.AF_INET
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    s = socket.socket(family, kind)
    s.settimeout(1)
    if sys.argv[1] == 'device':
        s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth0')
    else:
        s.bind((sys.argv[1], 0))
    try:
        s.connect((sys.argv[2], 80))
        s.send(b'leak')
        print('sent')
    except OSError as error:
        print('refused:', error.errno)
";

/// Tries to send by the pod's interface to the Internet in all ways.
fn try_bound(pod: &Pod) -> Result<()> {
    for (bound, to) in [
        ("device".to_owned(), WEB.ipv4.to_string()),
        ("device".to_owned(), WEB.ipv6.to_string()),
        (POD.ipv4.to_string(), WEB.ipv4.to_string()),
        (POD.ipv6.to_string(), WEB.ipv6.to_string()),
    ] {
        let output = run(pod.application(["/usr/bin/python3", "-I", "-S", "-c", BOUND, &bound, &to]))?;
        lab::ensure!(output.stdout.iter().filter(|byte| **byte == b'\n').count() == 2, "{}", errors_of(&output));
    }
    Ok(())
}

#[test]
fn a_program_bound_to_the_pods_interface_or_address_sends_nothing() {
    in_pod(Peer::Ours, Reach::Ipv4, |lab, pod, _| {
        try_bound(pod)?;
        require_closed(lab, &[])
    });
}

/// The twin: without the packet rules, these packets leave the pod. So routes alone do not close it.
#[test]
fn without_the_rules_bound_programs_leak() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let _sidecar = Sidecar::broken(&pod, &lab.wg_quick_file(Reach::Ipv4)?, "rules")?;
        let mut app = application(&pod)?;
        lab::wait_until(lab::patience(WORKS), "the tunnel is not up", || {
            Ok(app.act(&get(WEB.ipv4))? == Ok(PROVIDER.ipv4.to_string()))
        })?;
        app.finish_well()?;
        lab.capture.forget()?;
        try_bound(&pod)?;
        assert!(require_closed(lab, &[]).is_err());
        Ok(())
    });
}

/// The twin: without the routes, nothing goes into the tunnel, and the rules drop all packets.
#[test]
fn without_the_routes_the_rules_alone_close_the_pod() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let _sidecar = Sidecar::broken(&pod, &lab.wg_quick_file(Reach::Ipv4)?, "routes")?;
        lab::wait_until(lab::patience(WORKS), "the rules are not loaded", || {
            Ok(crate::support::check(&pod)?.0 == "damaged")
        })?;
        lab.capture.forget()?;
        let mut app = application(&pod)?;
        app.fail(&get(WEB.ipv4))?;
        app.finish_well()?;
        try_bound(&pod)?;
        require_closed(lab, &[])
    });
}
