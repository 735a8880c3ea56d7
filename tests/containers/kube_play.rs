//! `podman kube play` of deploy/podman/pod.yaml: an init container closes the namespace, and the tunnel's container
//! runs beside the application. podman 4.3 leaves the values of Secrets encoded, so a directory takes the place of the
//! Secret there.

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

/// Returns deploy/podman/pod.yaml for the lab: with its images, its network, and the application of the tests. The
/// directory `in_place_of_secret` replaces the Secret.
fn manifest(in_place_of_secret: Option<&str>) -> Result<String> {
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
    let secret =
        "    secret:\n      secretName: wg\n      optional: false\n      # Octal 0400.\n      defaultMode: 256\n";
    let directory = in_place_of_secret.map(|path| format!("    hostPath: {{ path: {path}, type: Directory }}\n"));
    let volumes = format!(
        "{}  - name: usr\n    hostPath: {{ path: /usr, type: Directory }}\n  \
         - name: agent\n    hostPath: {{ path: {agent}, type: File }}\n",
        directory.as_deref().unwrap_or(secret),
    );
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

/// Plays a manifest.
pub(crate) fn play(lab: &Lab, engine: &Engine, manifest: &str) -> Result<()> {
    engine.succeed(["kube", "play", "--network=podman", &lab.file(manifest)?.to_string_lossy()]).map(drop)
}

/// Requires that the application of a pod is in the tunnel, and leaks nothing once the tunnel's container is killed.
pub(crate) fn is_in_the_tunnel(
    lab: &Lab,
    engine: &Engine,
    pod: &str,
    more: impl FnOnce(&mut Agent) -> Result<()>,
) -> Result<()> {
    let tunnel = format!("{pod}-vpn-exec");
    lab::wait_until(lab::patience(Duration::from_secs(20)), "the tunnel does not come up", || {
        Ok(engine.run(["exec", &tunnel, BINARY, "attach", "--check"])?.status.success())
    })?;
    let mut application = Agent::start(&mut engine.command(["exec", "-i", &format!("{pod}-transmission")]))?.begun()?;
    let web = format!("get http://{}/", WEB.ipv4);
    assert_eq!(application.succeed(&web)?, PROVIDER.ipv4.to_string());
    application.succeed("resolve web.example")?;
    assert_eq!(lab.capture.leaks()?, [], "nothing has left since the pod was made");
    more(&mut application)?;
    lab.capture.forget()?;

    engine.succeed(["kill", &tunnel])?;
    // podman may start it again at once: `restartPolicy: Always`.
    for _ in 0..5 {
        let page = application.act(&web)?.unwrap_or_default();
        ensure!(page.is_empty() || page == PROVIDER.ipv4.to_string(), "the server saw {page}");
    }
    application.finish()?;
    assert_eq!(lab.capture.leaks()?, []);
    Ok(())
}

/// Requires that the pod of deploy/podman/pod.yaml is in the tunnel, and that its port and the local network work.
pub(crate) fn the_deployed_pod_is_in_the_tunnel(lab: &Lab, engine: &Engine, secret: Option<&str>) -> Result<()> {
    lab.join_private_lan()?;
    play(lab, engine, &manifest(secret)?)?;
    is_in_the_tunnel(lab, engine, "torrent", |application| {
        application.succeed("serve 80 page")?;
        for (site, at) in [(&lab.lan, HOST_ON_PRIVATE_LAN), (&lab.web_site, HOST)] {
            let url = format!("http://{}:8080/", at.ipv4);
            assert_eq!(site.run(|| lab::http::get(&url, lab::patience(Duration::from_secs(10))))?, "page");
        }
        assert_eq!(application.succeed(&format!("get http://{}/", PRIVATE_LAN.ipv4))?, "a page in the local network");
        Ok(())
    })
}

#[test]
fn a_pod_of_kube_play_in_two_steps_is_in_the_tunnel() {
    lab::test(Peer::Ours, |lab| {
        let engine = Engine::podman(Runtime::Runc)?;
        let secret = Path::new(FILES).join("secret");
        fs::create_dir(&secret)?;
        fs::rename(lab.wg_quick_file(Reach::Ipv4)?, secret.join("wg0.conf"))?;
        the_deployed_pod_is_in_the_tunnel(lab, &engine, Some(&secret.to_string_lossy()))
    });
}
