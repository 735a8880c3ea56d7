//! The newest engines: podman 5, and Docker 28 with devices by CDI. `tests/containers/setup` makes a `usr` with them,
//! which replaces the world's. Skipped without the variable `VPN_EXEC_ENGINES`, which names that directory.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::launcher::{agent_binary, stdout};
use lab::{Lab, Peer, Reach, Skip, variables};
use serde_json::{Value, json};

use crate::engine::{Engine, Runtime};
use crate::images::{APP, VPN_EXEC};
use crate::{hooks, kube_play};

/// Puts the newest engines, and the system that they belong to, over the world's `/usr`.
fn use_newest() -> Result<()> {
    lab::require_users()?;
    let Some(made) = std::env::var_os(variables::ENGINES).map(PathBuf::from) else {
        return Err(Skip::error("VPN_EXEC_ENGINES is not set: see tests/containers/setup", variables::ENGINES));
    };
    let usr = made.join("root/usr");
    ensure!(usr.join("bin/podman").exists(), "{}: tests/containers/setup has not made it", made.display());
    // Where `/bin` is a directory of its own, programs of two systems would mix.
    ensure!(Path::new("/bin").is_symlink(), "the newest engines need a system whose /bin is a link into /usr");
    vpn_exec::linux::mounts::bind(&usr, Path::new("/usr")).context("cannot replace /usr")
}

fn with_a_device(engine: impl FnOnce() -> Result<Engine>) {
    lab::test(Peer::Ours, |lab| {
        use_newest()?;
        let engine = engine()?;
        hooks::furnish(lab)?;
        hooks::has_the_tunnel(lab, &engine, hooks::DEVICE, true)
    });
}

#[test]
fn a_device_gives_containers_of_podman_5_the_tunnel() {
    with_a_device(|| Engine::podman(Runtime::Runc));
}

/// Docker runs the hook before it gives the container a network.
#[test]
fn a_device_gives_containers_of_docker_28_the_tunnel() {
    with_a_device(Engine::installed_docker);
}

/// Gives podman the Secret of the guide. Unlike podman 4.3, podman 5 mounts its values decoded.
fn play_the_secret(lab: &Lab, engine: &Engine) -> Result<()> {
    let values = json!({ "wg0.conf": lab.wg_quick_text(Reach::Ipv4) });
    let secret = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "wg" }, "stringData": values });
    kube_play::play(lab, engine, &secret.to_string())
}

#[test]
fn a_pod_of_kube_play_of_podman_5_is_in_the_tunnel() {
    lab::test(Peer::Ours, |lab| {
        use_newest()?;
        let engine = Engine::podman(Runtime::Runc)?;
        play_the_secret(lab, &engine)?;
        kube_play::the_deployed_pod_is_in_the_tunnel(lab, &engine, None)
    });
}

/// Returns the YAML of a file of deploy/kubernetes.
fn deployed(file: &str) -> Result<Value> {
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout)"]);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/kubernetes").join(file);
    command.stdin(std::fs::File::open(&path).with_context(|| path.display().to_string())?);
    Ok(serde_json::from_str(&stdout(command)?)?)
}

/// Returns the Deployment in two steps, as kustomize makes it of the base and the component, for the lab: with its
/// images and the application of the tests. Without probes: podman has systemd run them.
fn two_steps() -> Result<Value> {
    const POD: &str = "/spec/template/spec";
    let mut deployment = deployed("base/deployment.yaml")?;
    let mut patch = deployed("components/two-step/patch.yaml")?;
    let patch = patch.pointer_mut(POD).context("a pod")?;
    let pod = deployment.pointer_mut(POD).context("a pod")?;
    let [deleted, close] = patch["initContainers"]
        .take()
        .as_array()
        .cloned()
        .unwrap_or_default()
        .try_into()
        .ok()
        .context("two init containers")?;
    ensure!(deleted == json!({ "name": "vpn-exec", "$patch": "delete" }), "another patch: adapt this test");
    ensure!(pod["initContainers"].as_array().is_some_and(|all| all.len() == 1), "another base: adapt this test");
    pod["initContainers"] = json!([close]);
    let mut containers = patch["containers"].take();
    let all = containers.as_array_mut().context("containers")?;
    all.extend(pod["containers"].as_array().cloned().unwrap_or_default());
    let agent = agent_binary();
    for container in all.iter_mut().chain(pod["initContainers"].as_array_mut().into_iter().flatten()) {
        let container = container.as_object_mut().context("a container")?;
        let is_ours = container["image"].as_str().is_some_and(|image| image.contains("vpn-exec"));
        container.insert("image".to_owned(), json!(if is_ours { VPN_EXEC } else { APP }));
        for probe in ["startupProbe", "livenessProbe"] {
            container.remove(probe);
        }
        if !is_ours {
            container.insert("command".to_owned(), json!(["sleep", "1000"]));
            let mounts = container["volumeMounts"].as_array_mut().context("mounts")?;
            mounts.push(json!({ "name": "usr", "mountPath": "/usr", "readOnly": true }));
            mounts.push(json!({ "name": "agent", "mountPath": agent, "readOnly": true }));
        }
    }
    pod["containers"] = containers;
    let volumes = pod["volumes"].as_array_mut().context("volumes")?;
    volumes.push(json!({ "name": "usr", "hostPath": { "path": "/usr", "type": "Directory" } }));
    volumes.push(json!({ "name": "agent", "hostPath": { "path": agent, "type": "File" } }));
    Ok(deployment)
}

#[test]
fn a_deployment_in_two_steps_of_podman_5_is_in_the_tunnel() {
    lab::test(Peer::Ours, |lab| {
        // Before Python disappears.
        let deployment = two_steps()?;
        use_newest()?;
        let engine = Engine::podman(Runtime::Runc)?;
        play_the_secret(lab, &engine)?;
        kube_play::play(lab, &engine, &deployment.to_string())?;
        kube_play::is_in_the_tunnel(lab, &engine, "torrent-pod", |_| Ok(()))
    });
}
