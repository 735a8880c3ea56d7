//! Names in a pod: those of endpoints, which the container's own resolvers look up before and after the tunnel is
//! attached, and split DNS.

use std::fs;

use lab::pod::SERVICE_NAME;
use lab::{CLUSTER_RESOLVER, Lab, PROVIDER, Peer, Pod, Reach, Result, WEB};
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
