//! Names in a pod: those of endpoints, which the container's own resolvers look up before and after the tunnel is
//! attached, and split DNS.

use std::fs;
use std::net::UdpSocket;
use std::process::Stdio;
use std::time::Duration;

use lab::launcher::{binary, run};
use lab::pod::SERVICE_NAME;
use lab::{CLUSTER_RESOLVER, Context, Lab, PROVIDER, Peer, Pod, Reach, Result, WEB, variables};
use nix::sys::signal::Signal;
use vpn_exec::linux::sysctl;

use crate::support::{Sidecar, WORKS, application, cluster, get, require_closed, wait_until_up};

#[test]
fn an_endpoints_name_is_looked_up_and_followed() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let gateway_resolver = Pod::start_gateway_resolver(lab)?;
        gateway_resolver.set("vpn.example", &[PROVIDER.ipv4.into()]);
        let file = lab.wg_quick_file(Reach::Name)?;
        let first = Sidecar::start(&pod, &file, &cluster())?;
        wait_until_up(&pod)?;
        let mut app = application(&pod)?;
        assert_eq!(app.succeed_within(WORKS, &get(WEB.ipv4))?, PROVIDER.ipv4.to_string());
        // A program cannot ask the same resolver.
        lab.capture.forget()?;
        app.fail(&format!("lookup {} web.example", lab::POD_GATEWAY.ipv4))?;
        require_closed(lab, &[])?;

        // A restart finds the former nameserver, which the file does not name any more.
        first.end_by(Signal::SIGKILL)?;
        assert!(!fs::read_to_string(&pod.resolv_conf)?.contains("nameserver 10.42.0.1"));
        gateway_resolver.set("vpn.example", &[PROVIDER.ipv6.into()]);
        let _second = Sidecar::start(&pod, &file, &cluster())?;
        wait_until_up(&pod)?;
        assert_eq!(app.succeed_within(WORKS, &get(WEB.ipv4))?, PROVIDER.ipv4.to_string());
        let asked: Vec<String> = gateway_resolver.questions().into_iter().map(|asked| asked.name).collect();
        assert!(asked.iter().all(|name| name == "vpn.example") && asked.len() >= 4, "{asked:?}");
        app.finish_well().map(drop)
    });
}

/// A program that writes the pod's resolv.conf does not learn the pod's address from a look-up of a restarted sidecar.
#[test]
fn a_restart_asks_no_resolver_that_a_program_has_chosen() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let gateway_resolver = Pod::start_gateway_resolver(lab)?;
        gateway_resolver.set("vpn.example", &[PROVIDER.ipv4.into()]);
        let file = lab.wg_quick_file(Reach::Name)?;
        let first = Sidecar::start(&pod, &file, &[])?;
        wait_until_up(&pod)?;
        first.end_by(Signal::SIGKILL)?;
        let written = fs::read_to_string(&pod.resolv_conf)?;
        let former = "# Former nameservers, which vpn-exec asks for the names of endpoints:";
        for chosen in [format!("{written}\n{former} {}\n", WEB.ipv4), format!("nameserver {}\n", WEB.ipv4)] {
            fs::write(&pod.resolv_conf, chosen)?;
            lab.capture.forget()?;
            let next = Sidecar::start(&pod, &file, &[])?;
            wait_until_up(&pod)?;
            require_closed(lab, &[lab::POD_GATEWAY.ipv4.into()])?;
            let rules = run(pod.sidecar(["nft", "list", "table", "inet", "vpn-exec"]))?;
            let rules = String::from_utf8(rules.stdout)?;
            assert!(
                rules.contains(&lab::POD_GATEWAY.ipv4.to_string()) && !rules.contains(&WEB.ipv4.to_string()),
                "{rules}"
            );
            next.end_by(Signal::SIGKILL)?;
        }
        Ok(())
    });
}

#[test]
fn a_name_that_does_not_resolve_yet_keeps_the_pod_closed() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let gateway_resolver = Pod::start_gateway_resolver(lab)?;
        gateway_resolver.forget("vpn.example");
        lab.capture.forget()?;
        let _sidecar = Sidecar::start(&pod, &lab.wg_quick_file(Reach::Name)?, &[])?;
        lab::wait_until(lab::patience(WORKS), "the pod is not closed", || {
            Ok(crate::support::check(&pod)?.0 == "connecting")
        })?;
        let mut app = application(&pod)?;
        app.fail(&get(WEB.ipv4))?;
        require_closed(lab, &[lab::POD_GATEWAY.ipv4.into()])?;
        // The dead address comes first; the rules follow the search.
        gateway_resolver.set("vpn.example", &["198.51.100.33".parse()?, PROVIDER.ipv4.into()]);
        assert_eq!(app.succeed_within(WORKS, &get(WEB.ipv4))?, PROVIDER.ipv4.to_string());
        app.finish_well().map(drop)
    });
}

#[test]
fn names_of_the_cluster_are_answered_by_its_resolver_and_no_others() {
    lab::test(Peer::Ours, |lab| split_dns(lab, "0"));
}

/// In containers of podman, and in pods of older containerd.
#[test]
fn split_dns_needs_no_privilege_for_port_53() {
    lab::test(Peer::Ours, |lab| split_dns(lab, "1024"));
}

fn split_dns(lab: &Lab, first_unprivileged_port: &str) -> Result<()> {
    let pod = Pod::start(lab)?;
    pod.namespace.run(|| sysctl::set("net/ipv4/ip_unprivileged_port_start", first_unprivileged_port))?;
    let domain = format!("cluster.local={}", CLUSTER_RESOLVER.ipv4);
    let options = [cluster().as_slice(), &["--dns-for", &domain]].concat();
    let sidecar = Sidecar::start(&pod, &lab.wg_quick_file(Reach::Ipv4)?, &options)?;
    wait_until_up(&pod)?;
    let mut app = application(&pod)?;
    let service = app.succeed_within(WORKS, &format!("get http://{SERVICE_NAME}/"))?;
    assert_eq!(service, "a service of the cluster");
    assert_eq!(app.succeed("get http://web.example/")?, PROVIDER.ipv4.to_string());
    app.succeed(&format!("lookup ::1 {SERVICE_NAME}"))?;
    let asked: Vec<String> = pod.cluster_resolver.questions().into_iter().map(|asked| asked.name).collect();
    assert!(!asked.is_empty() && asked.iter().all(|name| name == SERVICE_NAME), "{asked:?}");
    let through_tunnel = lab.tunnel_resolver.questions();
    assert!(through_tunnel.iter().all(|asked| asked.name != SERVICE_NAME), "{through_tunnel:?}");
    // Only the forwarder may ask the cluster's resolver.
    app.fail(&format!("lookup {} {SERVICE_NAME}", CLUSTER_RESOLVER.ipv4))?;
    app.finish_well()?;
    let (code, messages) = sidecar.end_by(Signal::SIGTERM)?;
    assert_eq!(code, Some(0), "{messages}");
    Ok(())
}

/// A program of the pod has the forwarder's port when the sidecar starts. The tunnel works meanwhile, no name leaks,
/// and the forwarder takes the port as soon as it is free.
#[test]
fn a_forwarder_waits_for_its_port() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let taken = pod.namespace.run(|| UdpSocket::bind("127.0.0.1:53"))?;
        let domain = format!("cluster.local={}", CLUSTER_RESOLVER.ipv4);
        let options = [cluster().as_slice(), &["--dns-for", &domain]].concat();
        let sidecar = Sidecar::start(&pod, &lab.wg_quick_file(Reach::Ipv4)?, &options)?;
        wait_until_up(&pod)?;
        let mut app = application(&pod)?;
        lab.capture.forget()?;
        assert_eq!(app.succeed_within(WORKS, &get(WEB.ipv4))?, PROVIDER.ipv4.to_string());
        app.fail(&format!("lookup {} {SERVICE_NAME}", CLUSTER_RESOLVER.ipv4))?;
        app.fail("get http://web.example/")?;
        require_closed(lab, &[])?;
        assert!(pod.cluster_resolver.questions().is_empty());
        // Longer than the time after which it warns.
        std::thread::sleep(Duration::from_secs(3));
        drop(taken);
        let service = app.succeed_within(WORKS, &format!("get http://{SERVICE_NAME}/"))?;
        assert_eq!(service, "a service of the cluster");
        assert_eq!(app.succeed("get http://web.example/")?, PROVIDER.ipv4.to_string());
        app.finish_well()?;
        let status = fs::read_to_string(format!("/proc/{}/status", sidecar.pid()))?;
        assert!(status.contains("CapPrm:\t0000000000000000"), "{status}");
        let (code, messages) = sidecar.end_by(Signal::SIGTERM)?;
        assert_eq!(code, Some(0), "{messages}");
        assert_eq!(
            messages.matches("another program of the container or the pod uses the port").count(),
            1,
            "{messages}"
        );
        Ok(())
    });
}

/// Where port 53 needs CAP_NET_BIND_SERVICE, the sidecar keeps that until it has the port.
#[test]
fn a_forwarder_that_waits_keeps_the_capability_for_its_port() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let taken = pod.namespace.run(|| {
            sysctl::set("net/ipv4/ip_unprivileged_port_start", "1024")?;
            UdpSocket::bind("127.0.0.1:53")
        })?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let domain = format!("cluster.local={}", CLUSTER_RESOLVER.ipv4);
        let mut words = vec![binary().to_str().context("a path")?, "attach", file.to_str().context("a path")?];
        words.extend(["--backend", lab::backend(), "--dns-for", &domain]);
        words.extend(cluster());
        let mut command = pod.container("-all,+net_admin,+net_bind_service", words);
        let sidecar = Sidecar(Some(command.stderr(Stdio::piped()).spawn()?));
        wait_until_up(&pod)?;
        let status = || Ok::<_, lab::Error>(fs::read_to_string(format!("/proc/{}/status", sidecar.pid()))?);
        lab::wait_until(lab::patience(WORKS), "it keeps too much", || {
            Ok(status()?.contains("CapPrm:\t0000000000000400"))
        })?;
        drop(taken);
        lab::wait_until(lab::patience(WORKS), "it keeps the capability", || {
            Ok(status()?.contains("CapPrm:\t0000000000000000"))
        })?;
        let mut app = application(&pod)?;
        assert_eq!(app.succeed_within(WORKS, &format!("get http://{SERVICE_NAME}/"))?, "a service of the cluster");
        app.finish_well().map(drop)
    });
}

/// Without its forwarder a pod has no names, so the sidecar ends. The engine starts it again.
#[test]
fn a_forwarder_that_fails_ends_the_sidecar_with_an_error() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let domain = format!("cluster.local={}", CLUSTER_RESOLVER.ipv4);
        let options = [cluster().as_slice(), &["--dns-for", &domain]].concat();
        let sidecar = Sidecar::start_with(&pod, &file, &options, (variables::FAIL, "in the DNS forwarder"))?;
        wait_until_up(&pod)?;
        let mut app = application(&pod)?;
        lab.capture.forget()?;
        app.fail("get http://web.example/")?;
        let (code, messages) = sidecar.end()?;
        assert_eq!(code, Some(125), "{messages}");
        assert!(messages.contains("its DNS forwarder has ended"), "{messages}");
        require_closed(lab, &[])?;
        assert!(pod.cluster_resolver.questions().is_empty());
        let _second = Sidecar::start(&pod, &file, &options)?;
        assert_eq!(app.succeed_within(WORKS, "get http://web.example/")?, PROVIDER.ipv4.to_string());
        app.finish_well().map(drop)
    });
}
