//! A keeper as a service: its messages to the service manager, whose socket is the test's. `tests/vm` has a real
//! systemd.

use std::os::unix::net::UnixDatagram;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::vpn_exec;
use nix::sys::signal::Signal;

use crate::support::{
    CONFIG, CONFIG_TEXT, PATIENCE, assert_refused, ended, errors, output_of, prepare, send, write_config,
};

const SOCKET: &str = "/run/lab/notify";

/// The service manager's side of the notification socket (sd_notify(3)).
struct Manager {
    socket: UnixDatagram,
}

impl Manager {
    fn new() -> Result<Self> {
        let socket = UnixDatagram::bind(SOCKET)?;
        socket.set_read_timeout(Some(lab::patience(PATIENCE)))?;
        Ok(Self { socket })
    }

    /// Starts a keeper as a service of this manager.
    fn start(&self, variables: &[(&str, &str)], arguments: &[&str]) -> Result<Child> {
        let up = ["up", "--foreground", CONFIG, "--backend", "userspace", "--name", "service"];
        let mut command = vpn_exec(up.iter().chain(arguments));
        command.env("NOTIFY_SOCKET", SOCKET).envs(variables.iter().copied());
        Ok(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
    }

    /// Returns the next message.
    fn hear(&self) -> Result<String> {
        let mut buffer = [0; 4096];
        let length = self.socket.recv(&mut buffer).context("the keeper sends no message")?;
        Ok(String::from_utf8(buffer[..length].to_vec())?)
    }

    /// Reads messages until one has a line with this beginning, and returns the rest of the line.
    fn hear_of(&self, beginning: &str) -> Result<String> {
        let until = Instant::now() + lab::patience(PATIENCE);
        while Instant::now() < until {
            let message = self.hear()?;
            if let Some(rest) = message.lines().find_map(|line| line.strip_prefix(beginning)) {
                return Ok(rest.to_owned());
            }
        }
        bail!("nothing of {beginning}")
    }
}

#[test]
fn a_keeper_notifies_the_service_manager_of_its_states() {
    lab::world::test(|| {
        prepare()?;
        let manager = Manager::new()?;
        let child = manager.start(&[], &[])?;
        let first = manager.hear()?;
        assert_eq!(first, "READY=1\nSTATUS=Connecting, no handshake yet");
        ensure!(lab::tunnel::exists("service")?, "ready before the tunnel exists");

        let before = vpn_exec::linux::service_manager::monotonic_usec();
        send(child.id().cast_signed(), Signal::SIGHUP)?;
        let reloading = manager.hear()?;
        let usec = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").context("it says that it reads again")?;
        let after = vpn_exec::linux::service_manager::monotonic_usec();
        ensure!((before..=after).contains(&usec.parse()?), "{before} {usec} {after}");
        assert_eq!(manager.hear()?, "READY=1");

        // A refused configuration leaves the service ready.
        write_config("[Interface]\n")?;
        send(child.id().cast_signed(), Signal::SIGHUP)?;
        ensure!(manager.hear()?.starts_with("RELOADING=1\n"), "it says that it reads again");
        assert_eq!(manager.hear()?, "READY=1");

        send(child.id().cast_signed(), Signal::SIGTERM)?;
        assert_eq!(manager.hear_of("STOPPING=")?, "1");
        let output = output_of(child)?;
        assert_eq!(ended(output.status), Ok(0), "{}", errors(&output));
        ensure!(!lab::tunnel::exists("service")?, "it has taken the tunnel down");
        Ok(())
    });
}

/// As a unit's `ExecReload=` does.
#[test]
fn a_keeper_reloads_its_own_configuration_on_request() {
    lab::world::test(|| {
        prepare()?;
        let manager = Manager::new()?;
        let child = manager.start(&[], &["--dns", "192.0.2.77"])?;
        manager.hear_of("READY=1")?;
        let reload = |more: &[&str]| {
            lab::launcher::run(vpn_exec(["reload", "--by-keeper", CONFIG, "--name", "service"].iter().chain(more)))
        };
        let names = || {
            Ok::<_, anyhow::Error>(std::fs::read_to_string(
                vpn_exec::registry::path_of(&"service".parse()?).join("resolv.conf"),
            )?)
        };
        let output = reload(&[])?;
        assert_eq!(
            (ended(output.status), &*output.stdout),
            (Ok(0), &b"nothing has changed\n"[..]),
            "{}",
            errors(&output)
        );

        write_config(&CONFIG_TEXT.replace("[Peer]", "MTU = 1300\n[Peer]"))?;
        let output = reload(&[])?;
        ensure!(String::from_utf8_lossy(&output.stdout).contains("1300"), "{}", errors(&output));
        ensure!(names()?.contains("192.0.2.77"), "the options that it was started with hold on: {}", names()?);

        write_config("[Interface]\n")?;
        let refused = reload(&[])?;
        assert_eq!(ended(refused.status), Ok(125));
        assert!(errors(&refused).contains("there is no private key"), "{}", errors(&refused));
        let message = assert_refused(&reload(&["--lan"])?);
        assert!(message.contains("its keeper reads the configuration with its own options"), "{message}");
        send(child.id().cast_signed(), Signal::SIGTERM)?;
        output_of(child).map(drop)
    });
}

#[test]
fn a_keeper_feeds_its_own_watchdog_only() {
    lab::world::test(|| {
        prepare()?;
        let manager = Manager::new()?;
        let child = manager.start(&[("WATCHDOG_USEC", "200000")], &[])?;
        let begin = Instant::now();
        for _ in 0..20 {
            manager.hear_of("WATCHDOG=1")?;
        }
        // This takes 2 s. At the rate of the status messages, it would take 200 s.
        ensure!(
            begin.elapsed() < lab::patience(PATIENCE),
            "the watchdog is fed too rarely: 20 times in {:?}",
            begin.elapsed()
        );
        send(child.id().cast_signed(), Signal::SIGTERM)?;
        manager.hear_of("STOPPING=")?;
        output_of(child)?;

        let child = manager.start(&[("WATCHDOG_USEC", "200000"), ("WATCHDOG_PID", "1")], &[])?;
        manager.hear_of("READY=1")?;
        manager.socket.set_read_timeout(Some(Duration::from_millis(400)))?;
        ensure!(manager.hear().is_err(), "the watchdog is another process's");
        send(child.id().cast_signed(), Signal::SIGTERM)?;
        output_of(child).map(drop)
    });
}

#[test]
fn a_keeper_that_waits_for_its_peer_is_ready_after_the_first_handshake() {
    lab::test(lab::Peer::Ours, |lab| {
        prepare()?;
        write_config(&lab.wg_quick_text(lab::Reach::Ipv4))?;
        let manager = Manager::new()?;
        let child = manager.start(&[], &["--wait", "7"])?;
        assert_eq!(manager.hear()?, "EXTEND_TIMEOUT_USEC=37000000");
        manager.hear_of("READY=1")?;
        let status = vpn_exec(["status", "service"]).output()?;
        ensure!(String::from_utf8(status.stdout)?.contains("up"), "it has had a handshake");
        send(child.id().cast_signed(), Signal::SIGTERM)?;
        output_of(child).map(drop)
    });
}
