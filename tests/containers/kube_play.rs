//! `podman kube play`, in two steps: an init container closes the namespace, and the tunnel's container runs beside the
//! application. podman 4 knows no native sidecars, and leaves the values of Secrets encoded: the file is mounted.

use anyhow::Result;
use lab::agent::Agent;
use lab::launcher::agent_binary;
use lab::{HOST, HOST_ON_PRIVATE_LAN, Lab, PRIVATE_LAN, PROVIDER, Peer, Reach, TUNNEL_RESOLVER, WEB};
use serde_json::{Value, json};

use crate::engine::{Engine, Runtime};
use crate::images::{APP, BINARY, VPN_EXEC};

/// Returns the manifest of the pod.
fn manifest(file: &str) -> Value {
    let agent = agent_binary().to_string_lossy();
    let tunnel = |name: &str, options: &[&str]| {
        let arguments = [&["attach", "/etc/wireguard/wg0.conf", "--local", "192.168.7.0/24"], options].concat();
        json!({
            "name": name, "image": VPN_EXEC, "imagePullPolicy": "Never", "args": arguments,
            "securityContext": {
                "readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false,
                "capabilities": { "drop": ["ALL"], "add": ["NET_ADMIN"] },
            },
            "volumeMounts": [
                { "name": "wireguard", "mountPath": "/etc/wireguard/wg0.conf", "readOnly": true },
                { "name": "tun", "mountPath": "/dev/net/tun" },
            ],
        })
    };
    let app = json!({
        "name": "app", "image": APP, "imagePullPolicy": "Never", "command": ["sleep", "1000"],
        "ports": [{ "containerPort": 80, "hostPort": 8080 }],
        "securityContext": { "capabilities": { "drop": ["NET_RAW"] } },
        "volumeMounts": [
            { "name": "usr", "mountPath": "/usr", "readOnly": true },
            { "name": "agent", "mountPath": agent, "readOnly": true },
        ],
    });
    let volume =
        |name: &str, path: &str, kind: &str| json!({ "name": name, "hostPath": { "path": path, "type": kind } });
    json!({
        "apiVersion": "v1", "kind": "Pod",
        // Otherwise podman 4.3 removes the init container at its end, and sometimes too early.
        "metadata": { "name": "something", "annotations": { "io.podman.annotations.init.container.type": "always" } },
        "spec": {
            "dnsPolicy": "None", "dnsConfig": { "nameservers": [TUNNEL_RESOLVER.ipv4] },
            "initContainers": [tunnel("close", &["--closed"])],
            "containers": [tunnel("vpn", &[]), app],
            "volumes": [
                volume("wireguard", file, "File"),
                volume("tun", "/dev/net/tun", "CharDevice"),
                volume("usr", "/usr", "Directory"),
                volume("agent", &agent, "File"),
            ],
        },
    })
}

fn play(lab: &Lab, engine: &Engine) -> Result<Agent> {
    lab.join_private_lan()?;
    let file = lab.wg_quick_file(Reach::Ipv4)?;
    let manifest = lab.file(&manifest(&file.to_string_lossy()).to_string())?;
    engine.succeed(["kube", "play", "--network=podman", &manifest.to_string_lossy()])?;
    let check = ["exec", "something-vpn", BINARY, "attach", "--check"];
    lab::wait_until(lab::patience(std::time::Duration::from_secs(20)), "the tunnel does not come up", || {
        Ok(engine.run(check)?.status.success())
    })?;
    Agent::start(&mut engine.command(["exec", "-i", "something-app"]))?.begun()
}

#[test]
fn a_pod_of_kube_play_in_two_steps_is_in_the_tunnel() {
    lab::test(Peer::Ours, |lab| {
        let engine = Engine::podman(Runtime::Runc)?;
        let mut application = play(lab, &engine)?;
        let web = format!("get http://{}/", WEB.ipv4);
        assert_eq!(application.succeed(&web)?, PROVIDER.ipv4.to_string());
        application.succeed("resolve web.example")?;
        assert_eq!(lab.capture.leaks()?, [], "nothing has left since the pod was made");

        application.succeed("serve 80 page")?;
        for (site, at) in [(&lab.lan, HOST_ON_PRIVATE_LAN), (&lab.web_site, HOST)] {
            let url = format!("http://{}:8080/", at.ipv4);
            assert_eq!(site.run(|| lab::http::get(&url, lab::patience(std::time::Duration::from_secs(10))))?, "page");
        }
        assert_eq!(application.succeed(&format!("get http://{}/", PRIVATE_LAN.ipv4))?, "a page in the local network");
        lab.capture.forget()?;

        engine.succeed(["kill", "something-vpn"])?;
        application.fail(&web)?;
        application.finish()?;
        assert_eq!(lab.capture.leaks()?, []);
        Ok(())
    });
}
