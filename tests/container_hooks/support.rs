//! A container as its runtime sees it, and what the tests expect of it.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::launcher::text_of;
use lab::{Lab, PROVIDER, Peer, Pod, Reach, WEB, vpn_exec};
use serde_json::{Value, json};
use vpn_exec::linux::namespace::NamespaceId;

/// The profile that the tests use.
pub(crate) const NAME: &str = "pods";

/// The time after which something is taken for hanging.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// How long a page is waited for that must not come.
pub(crate) const BRIEFLY: Duration = Duration::from_millis(700);

/// Gives the world an `/etc` of its own with profiles for the provider: [`NAME`], and `private`, which is not for
/// containers. Nothing of the machine's changes.
pub(crate) fn furnish(lab: &Lab) -> Result<()> {
    let own = Path::new("/run/lab/etc");
    fs::create_dir(own)?;
    // An ordinary user cannot read all of it, and need not.
    std::process::Command::new("cp").args(["-a", "/etc/.", "/run/lab/etc"]).stderr(Stdio::null()).status()?;
    ensure!(own.join("passwd").exists(), "cannot copy /etc");
    for directory in ["vpn-exec", "wireguard"] {
        let _ = fs::remove_dir_all(own.join(directory));
        fs::create_dir(own.join(directory))?;
    }
    fs::write(own.join("wireguard/host.conf"), lab.wg_quick_text(Reach::Ipv4))?;
    vpn_exec::linux::mounts::bind(own, Path::new("/etc"))?;
    fs::create_dir("/run/lab/bundle")?;
    fs::write("/run/lab/bundle/config.json", r#"{"ociVersion": "1.0.2", "linux": {}}"#)?;
    let file = lab.wg_quick_file(Reach::Ipv4)?;
    let text = format!("wireguard = \"{}\"\nbackend = \"{}\"\n", file.display(), lab::backend());
    fs::write("/etc/vpn-exec/private.toml", &text)?;
    Ok(fs::write(format!("/etc/vpn-exec/{NAME}.toml"), text + "containers = true\n")?)
}

/// Runs a test with a lab, a pod and a profile.
pub(crate) fn test(body: impl FnOnce(&Lab, &Pod) -> Result<()>) {
    lab::test(Peer::Ours, |lab| {
        furnish(lab)?;
        body(lab, &Pod::start(lab)?)
    });
}

/// A container: a process in the namespace of a pod.
pub(crate) struct Container {
    pub(crate) id: &'static str,
    pub(crate) init: Child,
}

impl Container {
    pub(crate) fn start(pod: &Pod, id: &'static str) -> Result<Self> {
        let mut command = pod.application(["sleep", "1000"]);
        let init = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let inside = pod.namespace.id()?;
        let pid = init.id().cast_signed();
        lab::wait_until(lab::patience(PATIENCE), "the container did not start", || {
            Ok(NamespaceId::of_process(pid).is_ok_and(|of| of == inside))
        })?;
        Ok(Self { id, init })
    }

    /// The state that a runtime passes to hooks.
    pub(crate) fn state(&self, tunnel: Option<&str>) -> Value {
        let annotations = tunnel.map(|name| json!({"vpn-exec.tunnel": name})).unwrap_or_else(|| json!({}));
        json!({"ociVersion": "1.0.2", "id": self.id, "status": "creating", "pid": self.init.id(),
               "bundle": "/run/lab/bundle", "annotations": annotations})
    }

    pub(crate) fn create(&self, tunnel: &str) -> Result<Output> {
        hook(&["createRuntime"], &self.state(Some(tunnel)), &[])
    }

    pub(crate) fn poststop(&self) -> Result<Output> {
        let state = json!({"ociVersion": "1.0.2", "id": self.id, "status": "stopped", "pid": 0, "bundle": "/gone"});
        hook(&["poststop"], &state, &[])
    }

    pub(crate) fn is_running(&mut self) -> Result<bool> {
        Ok(self.init.try_wait()?.is_none())
    }

    pub(crate) fn end(mut self) -> Result<()> {
        self.init.kill()?;
        self.init.wait()?;
        Ok(())
    }
}

/// Runs the hook as a runtime does: with an empty environment and the state on standard input.
pub(crate) fn hook(arguments: &[&str], state: &Value, environment: &[(&str, &str)]) -> Result<Output> {
    let mut command = vpn_exec(["oci-hook"]);
    command.args(arguments).env_clear().envs(environment.iter().copied()).current_dir("/");
    run_with_input(command, &state.to_string())
}

pub(crate) fn run_with_input(mut command: std::process::Command, input: &str) -> Result<Output> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("a pipe")?.write_all(input.as_bytes())?;
    Ok(child.wait_with_output()?)
}

pub(crate) fn succeed(output: Output) -> Result<String> {
    ensure!(output.status.success(), "{}", text_of(&output));
    Ok(String::from_utf8(output.stdout)?)
}

/// Fails unless a command has failed with a text in its messages.
pub(crate) fn refused(output: &Output, text: &str) -> Result<()> {
    ensure!(!output.status.success() && text_of(output).contains(text), "{text:?} expected: {}", text_of(output));
    Ok(())
}

pub(crate) fn status() -> Result<Value> {
    Ok(serde_json::from_str(&succeed(vpn_exec(["status", NAME, "--json"]).output()?)?)?)
}

/// Returns the address under which the web server sees a process of the container.
pub(crate) fn seen_from(pod: &Pod, patience: Duration) -> Result<String, String> {
    let page = pod.namespace.run(|| lab::http::get(&format!("http://{}/", WEB.ipv4), patience));
    page.map(|page| page.trim().to_owned()).map_err(|error| error.to_string())
}

pub(crate) fn require_tunnel(pod: &Pod) -> Result<()> {
    let seen = seen_from(pod, lab::patience(PATIENCE));
    ensure!(seen.as_deref() == Ok(&PROVIDER.ipv4.to_string()), "the server saw {seen:?}");
    Ok(())
}

pub(crate) fn require_closed(lab: &Lab, pod: &Pod) -> Result<()> {
    let seen = seen_from(pod, BRIEFLY);
    ensure!(seen.is_err(), "the server saw {seen:?}");
    require_no_leaks(lab)
}

pub(crate) fn require_no_leaks(lab: &Lab) -> Result<()> {
    let leaks = lab.capture.leaks()?;
    ensure!(leaks.is_empty(), "leaks: {leaks:?}");
    Ok(())
}

pub(crate) fn require_nothing_left() -> Result<()> {
    lab::wait_until(lab::patience(PATIENCE), "something is left of the tunnel", || {
        Ok(!Path::new("/run/vpn-exec").exists() && !Path::new("/run/netns").join(NAME).exists())
    })
}
