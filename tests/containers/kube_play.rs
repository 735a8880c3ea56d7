//! `podman kube play` of deploy/podman/pod.yaml: an init container closes the namespace, and the tunnel's container
//! runs beside the application. podman 4.3 leaves the values of Secrets encoded, so a directory takes the place of the
//! Secret.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::agent::Agent;
use lab::launcher::agent_binary;
use lab::world::FILES;
use lab::{HOST, HOST_ON_PRIVATE_LAN, Lab, PRIVATE_LAN, PROVIDER, Peer, Reach, WEB};

use crate::engine::{Engine, Runtime};
use crate::images::{APP, BINARY, VPN_EXEC};

/// Returns deploy/podman/pod.yaml for the lab: with its images, its network, and the application of the tests.
fn manifest(file: &str) -> Result<String> {
    let agent = agent_binary().display();
    let deployed = concat!("localhost/vpn-exec:", env!("CARGO_PKG_VERSION"));
    let app = format!("image: {APP}\n    command: [sleep, \"1000\"]\n");
    let downloads = "    volumeMounts:\n    - name: downloads\n";
    let mounts = format!(
        "    volumeMounts:\n    \
         - {{ name: usr, mountPath: /usr, readOnly: true }}\n    \
         - {{ name: agent, mountPath: {agent}, readOnly: true }}\n    \
         - name: downloads\n"
    );
    let volumes = format!(
        "    hostPath: {{ path: {file}, type: Directory }}\n  \
         - name: usr\n    hostPath: {{ path: /usr, type: Directory }}\n  \
         - name: agent\n    hostPath: {{ path: {agent}, type: File }}\n"
    );
    let secret =
        "    secret:\n      secretName: wg\n      optional: false\n      # Octal 0400.\n      defaultMode: 256\n";
    let mut text = include_str!("../../deploy/podman/pod.yaml").to_owned();
    for (old, new) in [
        (deployed, VPN_EXEC),
        ("192.168.1.0/24", "192.168.7.0/24"),
        ("image: lscr.io/linuxserver/transmission:4.0.6\n", &app),
        (downloads, &mounts),
        ("9091", "80"),
        ("hostPort: 80", "hostPort: 8080"),
        (secret, &volumes),
    ] {
        ensure!(text.contains(old), "deploy/podman/pod.yaml has no {old:?}: adapt this test");
        text = text.replace(old, new);
    }
    Ok(text)
}

fn play(lab: &Lab, engine: &Engine) -> Result<Agent> {
    lab.join_private_lan()?;
    let secret = Path::new(FILES).join("secret");
    fs::create_dir(&secret)?;
    fs::rename(lab.wg_quick_file(Reach::Ipv4)?, secret.join("wg0.conf"))?;
    let manifest = lab.file(&manifest(&secret.to_string_lossy())?)?;
    engine.succeed(["kube", "play", "--network=podman", &manifest.to_string_lossy()])?;
    let check = ["exec", "torrent-vpn-exec", BINARY, "attach", "--check"];
    lab::wait_until(lab::patience(Duration::from_secs(20)), "the tunnel does not come up", || {
        Ok(engine.run(check)?.status.success())
    })?;
    Agent::start(&mut engine.command(["exec", "-i", "torrent-transmission"]))?.begun()
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
            assert_eq!(site.run(|| lab::http::get(&url, lab::patience(Duration::from_secs(10))))?, "page");
        }
        assert_eq!(application.succeed(&format!("get http://{}/", PRIVATE_LAN.ipv4))?, "a page in the local network");
        lab.capture.forget()?;

        engine.succeed(["kill", "torrent-vpn-exec"])?;
        // podman may start it again at once: `restartPolicy: Always`.
        for _ in 0..5 {
            let page = application.act(&web)?.unwrap_or_default();
            ensure!(page.is_empty() || page == PROVIDER.ipv4.to_string(), "the server saw {page}");
        }
        application.finish()?;
        assert_eq!(lab.capture.leaks()?, []);
        Ok(())
    });
}
