//! Which tunnels a container can have: by an annotation, and by the hooks of a CDI file.

use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use lab::vpn_exec;
use serde_json::{Value, json};

use crate::support::{
    Container, NAME, hook, refused, require_no_leaks, require_nothing_left, require_tunnel, succeed, test,
};

#[test]
fn only_profiles_of_the_machine_can_be_named() {
    test(|lab, pod| {
        let container = Container::start(pod, "c1")?;
        let annotated = |name| container.create(name);
        refused(&annotated("other")?, "there is no profile 'other'")?;
        refused(&annotated("../etc/passwd")?, "does not name a tunnel")?;
        refused(&annotated("/run/lab/wg0.conf")?, "does not name a tunnel")?;
        refused(&annotated("")?, "does not name a tunnel")?;
        succeed(hook(&["poststop"], &container.state(Some("../x")), &[])?)?;
        // A tunnel of the machine's own programs, also if a device or the engine's configuration names it.
        for (name, reason) in [("host", "there is no profile 'host'"), ("private", "add the line `containers = true`")]
        {
            refused(&annotated(name)?, reason)?;
            refused(&hook(&["createRuntime", name], &container.state(None), &[])?, reason)?;
            refused(&vpn_exec(["cdi", name]).output()?, reason)?;
        }
        succeed(hook(&["createRuntime"], &container.state(None), &[])?)?;
        ensure!(!Path::new("/run/vpn-exec").exists(), "a container without the annotation gets nothing");
        let shared = json!({"id": "c3", "pid": std::process::id(), "annotations": {"vpn-exec.tunnel": NAME}});
        refused(&hook(&["createRuntime"], &shared, &[])?, "shares the host's network")?;
        let early = json!({"id": "c4", "pid": 0, "annotations": {"vpn-exec.tunnel": NAME}});
        refused(&hook(&["createRuntime"], &early, &[])?, "has no process ID")?;
        // Docker 20.10 passes no annotations in the state.
        fs::write("/run/lab/bundle/config.json", r#"{"annotations": {"vpn-exec.tunnel": "other"}}"#)?;
        refused(&hook(&["createRuntime"], &container.state(None), &[])?, "there is no profile 'other'")?;
        require_nothing_left()?;
        succeed(hook(&["createRuntime", NAME], &container.state(None), &[])?)?;
        require_tunnel(pod)?;
        container.end()?;
        require_no_leaks(lab)
    });
}

#[test]
fn the_hooks_of_the_cdi_file_make_the_tunnel() {
    test(|lab, pod| {
        fs::write("/etc/vpn-exec/broken.toml", "wireguard = \"/nonexistent\"\ncontainers = true\n")?;
        let mut command = vpn_exec(["cdi", "--resolv-conf-dir", "/run/lab/cdi"]);
        let text = succeed(command.output()?)?;
        let file: Value = serde_json::from_str(&text)?;
        ensure!(file["kind"] == "vpn-exec.io/tunnel" && file["devices"].as_array().map(Vec::len) == Some(1), "{text}");
        let edits = &file["devices"][0]["containerEdits"];
        let resolv_conf = fs::read_to_string(edits["mounts"][0]["hostPath"].as_str().context("a path")?)?;
        ensure!(resolv_conf.contains("nameserver 10.64.0.1"), "{resolv_conf}");
        let container = Container::start(pod, "c1")?;
        let create = &edits["hooks"][0];
        ensure!(create["path"].as_str().is_some_and(|path| path.starts_with('/')), "{create}");
        let arguments: Vec<&str> =
            create["args"].as_array().context("arguments")?.iter().skip(2).filter_map(Value::as_str).collect();
        succeed(hook(&arguments, &container.state(None), &[])?)?;
        require_tunnel(pod)?;
        refused(&vpn_exec(["cdi", "broken"]).output()?, "/nonexistent")?;
        fs::remove_file("/etc/vpn-exec/broken.toml")?;
        fs::remove_file(format!("/etc/vpn-exec/{NAME}.toml"))?;
        refused(&vpn_exec(["cdi"]).output()?, "no profile in /etc/vpn-exec is for containers")?;
        container.end()?;
        require_no_leaks(lab)
    });
}
