//! What is particular to Docker: the sidecar owns the namespace, as in deploy/compose.yaml, and networks of users have
//! a resolver of Docker's at 127.0.0.11.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{HOST, PROVIDER, Peer, Reach, TUNNEL_RESOLVER, WEB};

use crate::engine::Engine;
use crate::images::BINARY;

const UP: Duration = Duration::from_secs(20);

/// Starts a sidecar `vpn` that owns the namespace, with options for `run`.
fn start_sidecar(lab: &lab::Lab, engine: &Engine, options: &[&str]) -> Result<()> {
    let file = lab.wg_quick_file(Reach::Ipv4)?;
    let mount = format!("--volume={}:/wg0.conf:ro", file.display());
    let options = [&["--detach", "--name=vpn", &mount][..], options].concat();
    lab::launcher::stdout(engine.vpn_exec(&options, &["attach", "-v", "/wg0.conf"]))?;
    wait(engine)
}

fn wait(engine: &Engine) -> Result<()> {
    lab::wait_until(lab::patience(UP), "the sidecar does not come up", || {
        Ok(engine.run(["exec", "vpn", BINARY, "attach", "--check"])?.status.success())
    })
}

const JOIN: &str = "--network=container:vpn";

/// A restarted sidecar gets a new namespace: the application stays in the old one, which has no way out.
#[test]
fn the_application_of_a_killed_owner_has_no_network() {
    lab::test(Peer::Ours, |lab| {
        let engine = Engine::docker()?;
        start_sidecar(lab, &engine, &[&format!("--dns={}", TUNNEL_RESOLVER.ipv4)])?;
        let web = format!("get http://{}/", WEB.ipv4);
        let mut application = engine.agent(&[JOIN])?;
        assert_eq!(application.succeed(&web)?, PROVIDER.ipv4.to_string());
        application.succeed("resolve web.example")?;
        // Docker has switched IPv6 off, and /proc/sys is read-only.
        let log = engine.run(["logs", "vpn"])?;
        let log = String::from_utf8_lossy(&log.stderr).into_owned();
        assert_eq!(log.matches("IPv6 is switched off").count(), 1, "{log}");
        ensure!(!log.contains("resolv.conf"), "the file names the tunnel's resolver: {log}");

        lab.capture.forget()?;
        engine.succeed(["kill", "vpn"])?;
        application.fail(&web)?;
        engine.succeed(["start", "vpn"])?;
        wait(&engine)?;
        application.fail(&web)?;
        assert_eq!(lab.capture.leaks()?, []);
        application.finish()?;
        let mut again = engine.agent(&[JOIN])?;
        assert_eq!(again.succeed(&web)?, PROVIDER.ipv4.to_string());
        again.finish()?;
        Ok(())
    });
}

#[test]
fn dockers_own_resolver_is_not_asked() {
    lab::test(Peer::Ours, |lab| {
        let engine = Engine::docker()?;
        engine.succeed(["network", "create", "lan"])?;
        let lookup = |name: &str| format!("lookup 127.0.0.11 {name}");
        // The twin: without a tunnel, it asks the host's resolver.
        let mut application = engine.agent(&["--network=lan"])?;
        lab.resolver.set("twin.example", &WEB.both());
        application.succeed(&lookup("twin.example"))?;
        application.finish()?;
        let asked = |name: &str| lab.resolver.questions().iter().any(|question| question.name == name);
        ensure!(asked("twin.example"), "the host's resolver was not asked");

        start_sidecar(lab, &engine, &["--network=lan"])?;
        lab.capture.forget()?;
        let mut application = engine.agent(&[JOIN])?;
        application.fail(&lookup("leak.example"))?;
        // The file that names it is read-only in the sidecar.
        application.fail("resolve web.example")?;
        let log = engine.run(["logs", "vpn"])?;
        let log = String::from_utf8_lossy(&log.stderr).into_owned();
        ensure!(log.contains("--dns 10.64.0.1"), "the message does not say what to set: {log}");
        ensure!(!asked("leak.example") && !asked("web.example"), "the host's resolver was asked");
        assert_eq!(lab.capture.leaks()?, [], "from {}", HOST.ipv4);
        application.finish()?;
        Ok(())
    });
}
