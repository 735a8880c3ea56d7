//! Tunnels of the host that engines put into containers: the OCI hook and the CDI device under podman, and the CNI
//! plugin under containerd. The container has neither a key nor a capability.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::launcher::{binary, run, stdout, text_of};
use lab::{HOST, HOST_ON_PRIVATE_LAN, Lab, PRIVATE_LAN, PROVIDER, Peer, Reach, TUNNEL_RESOLVER, WEB, vpn_exec};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use vpn_exec::registry;

use crate::cri::Cri;
use crate::engine::{Engine, Runtime};
use crate::images::APP;

/// The profile.
pub(crate) const NAME: &str = "pods";

/// The device of [`NAME`], as engines name it.
pub(crate) const DEVICE: &str = "--device=vpn-exec.io/tunnel=pods";

/// The option for the strict reverse path filter (`rp_filter` of the kernel's ip-sysctl.rst).
const STRICT: &str = "--sysctl=net.ipv4.conf.all.rp_filter=1";

const HOOKS: &str = "/run/lab/hooks.d";

/// The time in which a tunnel ends after its container, on an ordinary machine.
const SOON: Duration = Duration::from_secs(10);

/// Gives the world an `/etc` of its own with a profile for the provider, and the files for the engines.
pub(crate) fn furnish(lab: &Lab) -> Result<()> {
    lab.join_private_lan()?;
    let own = Path::new("/run/lab/etc");
    fs::create_dir(own)?;
    let mut copy = Command::new("cp");
    stdout({
        copy.args(["-a", "/etc/.", "/run/lab/etc"]);
        copy
    })?;
    for directory in ["vpn-exec", "cdi"] {
        // Those of the machine, if there are any.
        let _ = fs::remove_dir_all(own.join(directory));
        fs::create_dir(own.join(directory))?;
    }
    vpn_exec::linux::mounts::bind(own, Path::new("/etc"))?;
    let file = lab.wg_quick_file(Reach::Ipv4)?;
    let text = format!(
        "wireguard = \"{}\"\nbackend = \"userspace\"\ncontainers = true\n[local]\nnetworks = [\"192.168.7.0/24\"]\n",
        file.display()
    );
    fs::write(format!("/etc/vpn-exec/{NAME}.toml"), text)?;
    fs::create_dir(HOOKS)?;
    for stage in ["createRuntime", "poststop"] {
        let hook = json!({
            "version": "1.0.0",
            "hook": { "path": binary(), "args": ["vpn-exec", "oci-hook", stage], "timeout": 10 },
            "when": { "annotations": { "^vpn-exec\\.tunnel$": ".*" } },
            "stages": [stage],
        });
        fs::write(format!("{HOOKS}/{stage}.json"), hook.to_string())?;
    }
    fs::write("/etc/cdi/vpn-exec.json", stdout(vpn_exec(["cdi"]))?)?;
    Ok(())
}

fn get(address: impl std::fmt::Display) -> String {
    format!("get http://{address}/")
}

/// Requires that the application has sent nothing but to the provider since the capture began. The provider's probes
/// of the host, and the host's answers, are none of its packets.
fn expect_no_leaks(lab: &Lab) -> Result<()> {
    std::thread::sleep(lab::patience(Duration::from_millis(100)));
    let uplink = lab.capture.uplink()?;
    let direct: Vec<_> = uplink
        .iter()
        .filter(|packet| packet.outgoing && !packet.is_expected_on_uplink())
        .filter(|packet| !packet.flow.as_ref().is_some_and(|flow| PROVIDER.both().contains(&flow.destination.ip())))
        .collect();
    ensure!(direct.is_empty(), "the application leaks: {direct:#?}");
    Ok(())
}

/// Requires that the application has the tunnel and the local network, and that its published port is reached.
pub(crate) fn expect_the_tunnel(lab: &Lab, application: &mut Agent) -> Result<()> {
    assert_eq!(application.succeed(&get(WEB.ipv4))?, PROVIDER.ipv4.to_string());
    application.succeed("resolve web.example")?;
    application.succeed("begin-stage hook")?;
    application.succeed("complete-stage hook")?;
    expect_no_leaks(lab)?;
    assert_eq!(application.succeed(&get(PRIVATE_LAN.ipv4))?, "a page in the local network");
    application.succeed("serve 80 page")?;
    for (site, at) in [(&lab.lan, HOST_ON_PRIVATE_LAN), (&lab.web_site, HOST)] {
        let url = format!("http://{}:8080/", at.ipv4);
        assert_eq!(site.run(|| lab::http::get(&url, lab::patience(Duration::from_secs(10))))?, "page", "{url}");
    }
    lab.capture.forget()
}

/// Requires that nothing leaves once the keeper is killed.
fn expect_closed_without_a_keeper(lab: &Lab, application: &mut Agent) -> Result<()> {
    let keeper = registry::read(&NAME.parse()?)?.context("a state")?.keeper.cast_signed();
    kill(Pid::from_raw(keeper), Signal::SIGKILL)?;
    application.fail(&get(WEB.ipv4))?;
    application.fail("resolve web.example")?;
    application.succeed("begin-stage killed")?;
    application.succeed("complete-stage killed")?;
    expect_no_leaks(lab)?;
    // Another keeper takes the tunnel over.
    stdout(vpn_exec(["up", NAME]))?;
    assert_eq!(application.succeed(&get(WEB.ipv4))?, PROVIDER.ipv4.to_string());
    Ok(())
}

/// Requires that `option` gives containers of an engine the tunnel of [`furnish`]. `says_why` is whether the engine
/// shows the messages of hooks.
pub(crate) fn has_the_tunnel(lab: &Lab, engine: &Engine, option: &str, says_why: bool) -> Result<()> {
    let resolver = format!("--dns={}", TUNNEL_RESOLVER.ipv4);
    // Twice: nothing of the first container is in the way of the second.
    for name in ["first", "second"] {
        let mut application = engine.agent(&[option, &resolver, STRICT, "--publish=8080:80", "--name", name])?;
        expect_the_tunnel(lab, &mut application)?;
        let status = stdout(vpn_exec(["status", NAME]))?;
        ensure!(status.contains("container"), "{status}");
        // One key cannot serve two containers.
        let refused = engine.fail(["run", "--rm", option, APP, "true"])?;
        ensure!(!says_why || refused.contains("serves the container"), "it does not show the reason: {refused}");
        let refused = engine.fail(["run", "--rm", "--network=host", option, APP, "true"])?;
        ensure!(!says_why || refused.contains("shares the host's network"), "it does not show the reason: {refused}");
        if name == "second" {
            expect_closed_without_a_keeper(lab, &mut application)?;
        }
        application.finish()?;
        lab::wait_until(lab::patience(SOON), "the tunnel stays", || Ok(!Path::new("/run/vpn-exec/pods").exists()))?;
    }
    // Other containers are as before.
    let mut application = engine.agent(&[])?;
    assert_eq!(application.succeed(&get(WEB.ipv4))?, HOST.ipv4.to_string());
    application.finish().map(drop)
}

fn has_the_tunnel_in_podman(runtime: Runtime, option: &str) {
    lab::test(Peer::Ours, |lab| {
        let engine = Engine::podman(runtime)?;
        furnish(lab)?;
        let hooks = format!("--hooks-dir={HOOKS}");
        let engine = engine.with_options(&[&hooks]);
        has_the_tunnel(lab, &engine, option, runtime == Runtime::Runc)?;
        let refused = engine.fail(["run", "--rm", "--annotation=vpn-exec.tunnel=none", APP, "true"])?;
        ensure!(runtime == Runtime::Crun || refused.contains("there is no profile 'none'"), "{refused}");
        Ok(())
    });
}

#[test]
fn the_hook_gives_containers_of_runc_the_tunnel() {
    has_the_tunnel_in_podman(Runtime::Runc, "--annotation=vpn-exec.tunnel=pods");
}

#[test]
fn the_hook_gives_containers_of_crun_the_tunnel() {
    has_the_tunnel_in_podman(Runtime::Crun, "--annotation=vpn-exec.tunnel=pods");
}

#[test]
fn a_device_gives_containers_of_podman_the_tunnel() {
    has_the_tunnel_in_podman(Runtime::Runc, DEVICE);
}

#[test]
fn the_network_plugin_gives_pods_of_containerd_the_tunnel() {
    lab::test(Peer::Ours, |lab| {
        let plugin = json!({
            "type": "vpn-exec-cni",
            "capabilities": { "io.kubernetes.cri.pod-annotations": true },
        });
        let cri = Cri::start(&[plugin])?;
        furnish(lab)?;
        let resolver = TUNNEL_RESOLVER.ipv4.to_string();
        let pod = cri.run_pod(&[("vpn-exec.tunnel", NAME)], &[&resolver])?;
        let application = pod.start_application("app", &["sleep", "1000"], &[])?;
        let curl = |to: &str| pod.execute(&application, &["curl", "-sS", "-m5", &format!("http://{to}/")]);
        assert_eq!(curl(&WEB.ipv4.to_string())?.output, PROVIDER.ipv4.to_string());
        assert_eq!(curl("web.example")?.output, PROVIDER.ipv4.to_string());
        lab.provider.stop()?;
        assert_ne!(curl(&WEB.ipv4.to_string())?.status, 0);
        assert_eq!(lab.capture.leaks()?, []);
        assert_eq!(curl(&PRIVATE_LAN.ipv4.to_string())?.output, "a page in the local network");
        let refused = run(vpn_exec(["down", NAME]))?;
        ensure!(!refused.status.success(), "{}", text_of(&refused));
        pod.remove()?;
        lab::wait_until(lab::patience(SOON), "the tunnel stays", || Ok(!Path::new("/run/vpn-exec/pods").exists()))?;

        // The twin: a pod without the annotation.
        lab.capture.forget()?;
        let pod = cri.run_pod(&[], &[&resolver])?;
        let application = pod.start_application("other", &["sleep", "1000"], &[])?;
        let url = format!("http://{}/", WEB.ipv4);
        assert_eq!(pod.execute(&application, &["curl", "-sS", "-m5", &url])?.output, HOST.ipv4.to_string());
        ensure!(!lab.capture.leaks()?.is_empty(), "the capture does not see a pod");
        pod.remove()
    });
}
