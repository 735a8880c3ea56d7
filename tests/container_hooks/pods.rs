//! The network plugin for pods.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use lab::launcher::text_of;
use lab::{Pod, vpn_exec};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use vpn_exec::linux::namespace::{bind_name, remove_name};
use vpn_exec::registry;

use crate::support::{
    NAME, refused, require_closed, require_no_leaks, require_nothing_left, require_tunnel, run_with_input, status, test,
};

/// Returns the engine's path of a pod's network namespace.
fn pod_path(id: &str) -> PathBuf {
    format!("/run/lab/cni-{id}").into()
}

/// Runs the network plugin as a runtime does. Returns its answer if it succeeds.
fn cni(command: &str, id: &str, pod: &Pod, more: Value) -> Result<Result<String, Value>> {
    cni_with(&[], command, id, pod, more)
}

/// [`cni`] with more environment variables.
fn cni_with(
    environment: &[(&str, &str)],
    command: &str,
    id: &str,
    pod: &Pod,
    more: Value,
) -> Result<Result<String, Value>> {
    let mut configuration = json!({
        "cniVersion": "1.1.0", "name": "cluster", "type": "vpn-exec-cni",
        "prevResult": {"cniVersion": "1.1.0", "ips": [{"address": "10.42.0.2/24"}]},
    });
    for (key, value) in more.as_object().context("an object")? {
        configuration[key] = value.clone();
    }
    let mut plugin = vpn_exec(["cni"]);
    plugin
        .env_clear()
        .envs(environment.iter().copied())
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", id)
        .env("CNI_IFNAME", "eth0");
    if command == "ADD" || command == "CHECK" {
        let path = pod_path(id);
        plugin.env("CNI_NETNS", &path);
        if !path.exists() {
            bind_name(&pod.namespace, &path, "")?;
        }
    }
    let output = run_with_input(plugin, &configuration.to_string())?;
    let answer = String::from_utf8(output.stdout.clone())?;
    match output.status.success() {
        true => Ok(Ok(answer)),
        false => Ok(Err(serde_json::from_str(&answer).with_context(|| text_of(&output))?)),
    }
}

fn annotated(name: &str) -> Value {
    json!({"runtimeConfig": {"io.kubernetes.cri.pod-annotations": {"vpn-exec.tunnel": name}}})
}

#[test]
fn a_pod_has_the_tunnel_of_its_annotation_until_its_network_is_removed() {
    test(|lab, pod| {
        let previous = json!({"cniVersion": "1.1.0", "ips": [{"address": "10.42.0.2/24"}]});
        let done = |answer: Result<String, Value>| answer.map_err(|error| anyhow::anyhow!("{error}"));
        let without = done(cni("ADD", "pod0", pod, json!({}))?)?;
        ensure!(serde_json::from_str::<Value>(&without)? == previous && !Path::new("/run/vpn-exec").exists());

        for _ in 0..2 {
            let added = done(cni("ADD", "pod1", pod, annotated(NAME))?)?;
            ensure!(serde_json::from_str::<Value>(&added)? == previous, "{added}");
        }
        require_tunnel(pod)?;
        ensure!(done(cni("CHECK", "pod1", pod, annotated(NAME))?)?.is_empty());
        let status = status()?;
        ensure!(status["container"]["id"] == "pod1" && status["container"]["network"] == "cluster", "{status}");
        let error = cni("ADD", "pod2", pod, annotated(NAME))?.expect_err("a second pod");
        ensure!(error["code"] == 100 && error["msg"].to_string().contains("serves the pod pod1"), "{error}");
        refused(&vpn_exec(["down", NAME]).output()?, "the pod pod1 is running in the tunnel pods")?;
        ensure!(done(cni("DEL", "pod2", pod, annotated(NAME))?)?.is_empty());
        require_tunnel(pod)?;

        for _ in 0..2 {
            ensure!(done(cni("DEL", "pod1", pod, annotated("../x"))?)?.is_empty());
            require_nothing_left()?;
        }
        require_closed(lab, pod)?;
        let error = cni("CHECK", "pod1", pod, annotated(NAME))?.expect_err("removed");
        ensure!(error["code"] == 100, "{error}");
        let error = cni("ADD", "pod1", pod, annotated("other"))?.expect_err("no such profile");
        ensure!(error["msg"].to_string().contains("there is no profile 'other'"), "{error}");
        let error = cni("ADD", "pod1", pod, annotated("private"))?.expect_err("not for containers");
        ensure!(error.to_string().contains("add the line `containers = true`"), "{error}");
        require_nothing_left()?;
        require_no_leaks(lab)
    });
}

/// An engine repeats ADD if it was interrupted. The keeper may have been killed meanwhile.
#[test]
fn a_repeated_request_brings_back_the_tunnel_of_a_killed_keeper() {
    test(|lab, pod| {
        let done = |answer: Result<String, Value>| answer.map_err(|error| anyhow::anyhow!("{error}"));
        let killed = ("VPN_EXEC_TEST_FAIL", "kill:after the routes");
        cni_with(&[killed], "ADD", "pod1", pod, annotated(NAME))?.expect_err("its keeper was killed");
        let first = done(cni("ADD", "pod1", pod, annotated(NAME))?)?;
        require_tunnel(pod)?;
        let before = registry::read(&NAME.parse()?)?.context("a state")?;
        kill(Pid::from_raw(before.keeper.cast_signed()), Signal::SIGKILL)?;
        require_closed(lab, pod)?;
        ensure!(cni("CHECK", "pod1", pod, annotated(NAME))?.is_err(), "the check tells of the killed keeper");
        let error = cni("ADD", "pod2", pod, annotated(NAME))?.expect_err("another pod");
        ensure!(error["msg"].to_string().contains("serves the pod pod1"), "{error}");
        ensure!(done(cni("ADD", "pod1", pod, annotated(NAME))?)? == first, "the same result");
        require_tunnel(pod)?;
        ensure!(done(cni("CHECK", "pod1", pod, annotated(NAME))?)?.is_empty());
        let after = registry::read(&NAME.parse()?)?.context("a state")?;
        ensure!((after.mark, after.container) == (before.mark, before.container), "the tunnel is taken over");
        // The keeper that lives is left alone.
        done(cni("ADD", "pod1", pod, annotated(NAME))?)?;
        ensure!(registry::read(&NAME.parse()?)?.context("a state")?.keeper == after.keeper);
        done(cni("DEL", "pod1", pod, annotated(NAME))?)?;
        require_nothing_left()?;
        require_no_leaks(lab)
    });
}

#[test]
fn the_tunnel_of_a_pod_that_is_gone_does_not_stay() {
    test(|lab, pod| {
        let done = |answer: Result<String, Value>| answer.map_err(|error| anyhow::anyhow!("{error}"));
        done(cni("ADD", "pod1", pod, annotated(NAME))?)?;
        // The engine removes the pod, and crashes before DEL. The next pod need not wait for the keeper.
        remove_name(&pod_path("pod1"))?;
        done(cni("ADD", "pod2", pod, annotated(NAME))?)?;
        require_tunnel(pod)?;
        ensure!(status()?["container"]["id"] == "pod2");
        remove_name(&pod_path("pod2"))?;
        require_nothing_left()?;
        require_closed(lab, pod)
    });
}

#[test]
fn garbage_collection_removes_the_tunnels_of_unknown_attachments() {
    test(|lab, pod| {
        let done = |answer: Result<String, Value>| answer.map_err(|error| anyhow::anyhow!("{error}"));
        let valid = |id: &str| json!({"cni.dev/valid-attachments": [{"containerID": id, "ifname": "eth0"}]});
        done(cni("ADD", "pod1", pod, annotated(NAME))?)?;
        done(cni("GC", "", pod, valid("pod1"))?)?;
        let mut other = valid("pod7");
        other["name"] = json!("another network");
        done(cni("GC", "", pod, other)?)?;
        require_tunnel(pod)?;
        done(cni("GC", "", pod, valid("pod7"))?)?;
        require_nothing_left()?;
        done(cni("STATUS", "", pod, json!({"tunnel": NAME}))?)?;
        for (name, reason) in [("other", "there is no profile"), ("private", "is not for containers")] {
            let error = cni("STATUS", "", pod, json!({"tunnel": name}))?.expect_err(name);
            ensure!(error["code"] == 50 && error["msg"].to_string().contains(reason), "{error}");
        }
        let versions = done(cni("VERSION", "", pod, json!({}))?)?;
        ensure!(versions.contains("\"1.1.0\"") && versions.contains("\"1.0.0\""), "{versions}");
        require_no_leaks(lab)
    });
}
