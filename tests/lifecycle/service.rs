//! A keeper that is a service: what it tells its manager. Here a socket of the test's is the manager's; `tests/vm` has the real one.

use std::os::unix::net::UnixDatagram;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::vpn_exec;
use nix::sys::signal::Signal;

use crate::support::{
    CONFIG, CONFIG_TEXT, PATIENCE, assert_refused, ended, errors, is_there, output_of, prepare, send, write_config,
};

const SOCKET: &str = "/run/lab/notify";

/// The manager's side.
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

    /// The next message.
    fn hear(&self) -> Result<String> {
        let mut buffer = [0; 4096];
        let length = self.socket.recv(&mut buffer).context("the manager hears nothing")?;
        Ok(String::from_utf8(buffer[..length].to_vec())?)
    }

    /// Hears messages until one has a line that begins so; returns that line's rest.
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
fn a_service_manager_hears_of_a_keepers_life() {
    lab::world::test(|| {
        prepare()?;
        let manager = Manager::new()?;
        let child = manager.start(&[], &[])?;
        let first = manager.hear()?;
        assert_eq!(first, "READY=1\nSTATUS=Connecting, no handshake yet");
        ensure!(is_there("/run/netns/service"), "it is ready only when the tunnel is there");

        let before = vpn_exec::linux::service_manager::monotonic_usec();
        send(child.id().cast_signed(), Signal::SIGHUP)?;
        let reloading = manager.hear()?;
        let usec = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").context("it says that it reads again")?;
        let after = vpn_exec::linux::service_manager::monotonic_usec();
        ensure!((before..=after).contains(&usec.parse()?), "{before} {usec} {after}");
        assert_eq!(manager.hear()?, "READY=1");

        // A configuration that is refused leaves the service as ready as it was.
        write_config("[Interface]\n")?;
        send(child.id().cast_signed(), Signal::SIGHUP)?;
        ensure!(manager.hear()?.starts_with("RELOADING=1\n"), "it says that it reads again");
        assert_eq!(manager.hear()?, "READY=1");

        send(child.id().cast_signed(), Signal::SIGTERM)?;
        assert_eq!(manager.hear_of("STOPPING=")?, "1");
        let output = output_of(child)?;
        assert_eq!(ended(output.status), Ok(0), "{}", errors(&output));
        ensure!(!is_there("/run/netns/service"), "it has taken the tunnel down");
        Ok(())
    });
}

/// What a unit's `ExecReload=` does.
#[test]
fn a_keeper_reads_its_own_configuration_again_when_asked() {
    lab::world::test(|| {
        prepare()?;
        let manager = Manager::new()?;
        let child = manager.start(&[], &["--dns", "192.0.2.77"])?;
        manager.hear_of("READY=1")?;
        let reload = |more: &[&str]| {
            lab::launcher::run(vpn_exec(["reload", "--by-keeper", CONFIG, "--name", "service"].iter().chain(more)))
        };
        let names = || std::fs::read_to_string("/run/vpn-exec/service/resolv.conf");
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
fn a_watchdog_is_fed_by_whom_it_watches() {
    lab::world::test(|| {
        prepare()?;
        let manager = Manager::new()?;
        let child = manager.start(&[("WATCHDOG_USEC", "200000")], &[])?;
        let begin = Instant::now();
        for _ in 0..20 {
            manager.hear_of("WATCHDOG=1")?;
        }
        // It takes 2 s; as rarely as the status is told, it would take 200 s.
        ensure!(begin.elapsed() < lab::patience(PATIENCE), "it is fed too rarely: 20 times in {:?}", begin.elapsed());
        send(child.id().cast_signed(), Signal::SIGTERM)?;
        manager.hear_of("STOPPING=")?;
        output_of(child)?;

        let child = manager.start(&[("WATCHDOG_USEC", "200000"), ("WATCHDOG_PID", "1")], &[])?;
        manager.hear_of("READY=1")?;
        manager.socket.set_read_timeout(Some(Duration::from_millis(400)))?;
        ensure!(manager.hear().is_err(), "it is somebody else's watchdog");
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
