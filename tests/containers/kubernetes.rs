//! A pod as the kubelet makes it, by containerd's CRI: a native sidecar, its probes, and the application.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::launcher::agent_binary;
use lab::{HOST, Lab, PRIVATE_LAN, PROVIDER, Peer, Reach, TUNNEL_RESOLVER, WEB};

use crate::cri::{Container, Cri, Executed, Pod};
use crate::images::{BINARY, VPN_EXEC};

/// The time in which the sidecar has a handshake on an ordinary machine.
const UP: Duration = Duration::from_secs(20);

/// The command of the probes.
const PROBE: [&str; 3] = [BINARY, "attach", "--check"];

fn start_sidecar(pod: &Pod<'_>, name: &str, file: &str, options: &[&str]) -> Result<String> {
    let command = [&[BINARY, "attach", "/etc/wireguard/wg0.conf", "--local", "192.168.7.0/24"], options].concat();
    pod.start(&Container {
        name,
        image: VPN_EXEC,
        command,
        environment: Vec::new(),
        // The kubelet mounts a Secret and a hostPath like this.
        mounts: vec![(file, "/etc/wireguard/wg0.conf"), ("/dev/net/tun", "/dev/net/tun")],
        capabilities: vec!["NET_ADMIN"],
    })
}

fn wait_for_probe(pod: &Pod<'_>, sidecar: &str) -> Result<()> {
    let otherwise = "the startup probe does not succeed";
    lab::wait_until(lab::patience(UP), otherwise, || Ok(pod.execute(sidecar, &PROBE)?.status == 0))
}

/// Runs curl(1) in the application's container.
fn curl(pod: &Pod<'_>, application: &str, address: &str) -> Result<Executed> {
    pod.execute(application, &["curl", "-sS", "-m5", &format!("http://{address}/")])
}

/// Starts an application that tries all leak vectors all the time.
fn start_application(pod: &Pod<'_>, stage: &str) -> Result<String> {
    let line = format!("sleep 1000 | {} act", agent_binary().display());
    pod.start_application(stage, &["sh", "-c", &line], &[("VPN_EXEC_TEST_STAGE", stage)])
}

/// Requires that no stamped packet has left by the uplink since the last call, but those that come back from the
/// provider.
fn expect_no_leak(lab: &Lab) -> Result<()> {
    std::thread::sleep(lab::patience(Duration::from_secs(2)));
    let leaks = lab.capture.leaks()?;
    let direct: Vec<_> = leaks
        .iter()
        .filter(|packet| packet.outgoing && packet.flow.as_ref().is_some_and(|flow| flow.source.ip() == HOST.ipv4))
        .filter(|packet| {
            let flow = packet.flow.as_ref();
            !flow.is_some_and(|flow| PROVIDER.both().contains(&flow.destination.ip()))
        })
        .collect();
    ensure!(direct.is_empty(), "the application leaks: {direct:#?}");
    lab.capture.forget()?;
    Ok(())
}

#[test]
fn a_native_sidecar_of_containerd_keeps_its_promises() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let cri = Cri::start(&[])?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let file = file.to_str().expect("the lab's paths are UTF-8");
        // `dnsPolicy: None`, as the kubelet gives it to containerd.
        let pod = cri.run_pod(&[], &[&TUNNEL_RESOLVER.ipv4.to_string()])?;
        let web = WEB.ipv4.to_string();

        // The twin: without the sidecar, the capture sees the application.
        let application = start_application(&pod, "open")?;
        assert_eq!(curl(&pod, &application, &web)?.output, HOST.ipv4.to_string());
        ensure!(expect_no_leak(lab).is_err(), "the capture does not see the application");
        pod.stop(&application, 0)?;
        lab.capture.forget()?;

        // The kubelet starts the application after the startup probe of a native sidecar.
        let sidecar = start_sidecar(&pod, "vpn", file, &[])?;
        wait_for_probe(&pod, &sidecar)?;
        let application = start_application(&pod, "up")?;
        assert_eq!(curl(&pod, &application, &web)?.output, PROVIDER.ipv4.to_string());
        assert_eq!(curl(&pod, &application, &format!("[{}]", WEB.ipv6))?.output, PROVIDER.ipv6.to_string());
        assert_eq!(curl(&pod, &application, "web.example")?.output, PROVIDER.ipv4.to_string());
        expect_no_leak(lab)?;
        assert_eq!(curl(&pod, &application, &PRIVATE_LAN.ipv4.to_string())?.output, "a page in the local network");
        let bound = ["curl", "-sS", "-m2", "--interface", "eth0", &format!("http://{web}/")];
        assert_ne!(pod.execute(&application, &bound)?.status, 0);

        // Probes by HTTP come from the node.
        let server = "import http.server as s; s.test(s.SimpleHTTPRequestHandler, s.ThreadingHTTPServer, port=8080)";
        let mut words = vec!["sh", "-c"];
        let line = format!("cd /dev/shm; /usr/bin/python3 -c '{server}' >/dev/null 2>&1 &");
        words.push(&line);
        assert_eq!(pod.execute(&application, &words)?.status, 0);
        let url = format!("http://{}:8080/", pod.address()?);
        lab::wait_until(lab::patience(UP), "the node does not reach the pod", || {
            let mut client = Command::new("curl");
            Ok(client.args(["-sf", "-m2", "-o", "/dev/null", &url]).status()?.success())
        })?;

        lab.capture.forget()?;
        pod.stop(&sidecar, 0)?;
        assert_ne!(curl(&pod, &application, &web)?.status, 0);
        expect_no_leak(lab)?;
        // The kubelet restarts it.
        let sidecar = start_sidecar(&pod, "vpn-again", file, &[])?;
        wait_for_probe(&pod, &sidecar)?;
        assert_eq!(curl(&pod, &application, &web)?.output, PROVIDER.ipv4.to_string());
        lab.provider.stop()?;
        assert_ne!(curl(&pod, &application, &web)?.status, 0);
        expect_no_leak(lab)?;
        // At the end of the pod, the sidecar ends at once.
        pod.stop(&application, 0)?;
        pod.stop(&sidecar, 20)?;
        assert_eq!(pod.exit_status(&sidecar)?, Some(0));
        pod.remove()
    });
}

/// Where native sidecars do not exist: a first init container closes the namespace.
#[test]
fn an_init_container_of_containerd_closes_the_namespace() {
    lab::test(Peer::Ours, |lab| {
        let cri = Cri::start(&[])?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let file = file.to_str().expect("the lab's paths are UTF-8");
        let pod = cri.run_pod(&[], &[&TUNNEL_RESOLVER.ipv4.to_string()])?;
        let init = start_sidecar(&pod, "close", file, &["--closed"])?;
        lab::wait_until(lab::patience(UP), "the init container does not end", || {
            Ok(pod.exit_status(&init)?.is_some())
        })?;
        assert_eq!(pod.exit_status(&init)?, Some(0));
        let application = start_application(&pod, "closed")?;
        assert_ne!(curl(&pod, &application, &WEB.ipv4.to_string())?.status, 0);
        expect_no_leak(lab)?;
        let sidecar = start_sidecar(&pod, "vpn", file, &[])?;
        wait_for_probe(&pod, &sidecar)?;
        assert_eq!(curl(&pod, &application, &WEB.ipv4.to_string())?.output, PROVIDER.ipv4.to_string());
        expect_no_leak(lab)?;
        pod.remove()
    });
}
