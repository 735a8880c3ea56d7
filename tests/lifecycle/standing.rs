//! Standing tunnels: up, join, status, reload, takeover and down.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::Snapshot;
use nix::sys::signal::Signal;
use vpn_exec::lease::status::{Condition, Status};
use vpn_exec::linux::local_socket;
use vpn_exec::linux::netlink::Netlink;
use vpn_exec::registry;

use crate::support::{
    CONFIG, CONFIG_TEXT, PATIENCE, assert_none_soon, assert_refused, assert_unchanged, command, doing, ended, errors,
    joined, keeper, kill_keeper_of_stopped, output_of, prepare, reload, run, send, started, status, up, wait_for,
    works, write_config,
};

/// The time to wait for a keeper whose queue of connections is full.
const BRIEFLY: Duration = Duration::from_millis(10);

#[test]
fn a_standing_tunnel_stays_until_down() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        assert!(assert_refused(&run(command(&["status", "stays"]))?).contains("there is no tunnel stays"));
        assert!(assert_refused(&run(command(&["down", "stays"]))?).contains("there is no tunnel stays"));
        works(&up())?;
        // `up` again has no effect.
        works(&up())?;
        let first = keeper()?;
        for _ in 0..2 {
            let output = run(joined("exit 7"))?;
            assert_eq!(ended(output.status), Ok(7), "{}", errors(&output));
        }
        assert_eq!(keeper()?, first);
        let seen = status()?;
        assert!(seen.standing && seen.state == Condition::Connecting && seen.leases == 0 && seen.programs.is_empty());

        let running = started(joined("wait"), "stays")?;
        let seen = status()?;
        assert_eq!((seen.leases, seen.programs.len()), (1, 1), "{seen:?}");
        assert_eq!(seen.programs[0].pid, running.program.pid);
        let living = seen.living.context("a living keeper")?;
        assert_eq!(living.peers.len(), 1);
        assert_eq!(living.peers[0].configured_endpoint.as_deref(), Some("192.0.2.1:51820"));
        assert_eq!(living.dns.servers, ["10.64.0.1".parse::<std::net::IpAddr>()?]);
        assert!(works(&["list"])?.contains("stays") && works(&["status"])?.contains("connecting"));

        let message = assert_refused(&run(command(&["down", "stays"]))?);
        assert!(message.contains(&running.program.pid.to_string()) && message.contains("--force"), "{message}");
        assert!(lab::tunnel::exists("stays")?, "what was refused has changed nothing");
        works(&["down", "stays", "--force"])?;
        let output = output_of(running.child)?;
        assert!(assert_refused(&output).contains("taken down"), "{}", errors(&output));
        assert_unchanged(&before, "after it was taken down")?;
        assert_eq!(works(&["list"])?, "no tunnel is up\n");
        Ok(())
    });
}

#[test]
fn the_port_is_free_as_soon_as_the_tunnel_is_down() {
    // The kernel's device keeps its port until the kernel has removed it.
    if lab::backend() == "kernel" {
        return;
    }
    lab::world::test(|| {
        prepare()?;
        write_config(&CONFIG_TEXT.replace("[Interface]", "[Interface]\nListenPort = 51900"))?;
        for _ in 0..10 {
            works(&up())?;
            works(&["down", "stays"])?;
            std::net::UdpSocket::bind(("0.0.0.0", 51900)).context("the tunnel's port")?;
        }
        Ok(())
    });
}

#[test]
fn a_keeper_in_the_background_closes_its_output() {
    lab::world::test(|| {
        prepare()?;
        // Hangs if the output does not end with `up`.
        works(&up())?;
        works(&["down", "stays"]).map(drop)
    });
}

#[test]
fn a_killed_launcher_ends_only_its_own_program() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        works(&up())?;
        let one = started(joined("daemon"), "stays")?;
        let other = started(joined("wait"), "stays")?;
        send(one.launcher(), Signal::SIGKILL)?;
        output_of(one.child)?;
        assert_none_soon(&["daemon", "daemonized"], "after the launcher was killed")?;
        assert_eq!(doing("wait")?, [other.program.pid]);
        other.end()?;
        works(&["down", "stays"])?;
        assert_unchanged(&before, "at the end")
    });
}

#[test]
fn a_killed_or_replaced_keeper_gets_a_successor() {
    lab::world::test(|| {
        lab::tunnel::needs_root("without a program inside, a rootless tunnel ends with its keeper")?;
        prepare()?;
        let before = Snapshot::take()?;
        works(&up())?;
        let first = keeper()?;
        let namespace = registry::read(&"stays".parse()?)?.context("a state")?.namespace;
        send(first, Signal::SIGKILL)?;
        wait_for("a killed keeper is not told", || Ok(status()?.state == Condition::Failed))?;
        works(&up())?;
        let second = keeper()?;
        assert_ne!(second, first);

        let running = started(joined("wait"), "stays")?;
        works(&[up().as_slice(), &["--replace"]].concat())?;
        let third = keeper()?;
        assert!(third != second && status()?.standing);
        wait_for("the launcher does not come back", || Ok(status()?.leases == 1))?;
        assert_eq!(doing("wait")?, [running.program.pid], "the program goes on");
        assert_eq!(registry::read(&"stays".parse()?)?.context("a state")?.namespace, namespace);

        // `down` also removes a standing tunnel without programs whose keeper was killed.
        running.end()?;
        send(third, Signal::SIGKILL)?;
        wait_for("a killed keeper is not told", || Ok(status()?.state == Condition::Failed))?;
        works(&["down", "stays"])?;
        assert_unchanged(&before, "at the end")
    });
}

#[test]
fn a_tunnel_that_was_tampered_with_is_not_taken_over() {
    lab::world::test(|| {
        lab::tunnel::needs_root("only the launchers of a rootless tunnel know its plan")?;
        prepare()?;
        works(&up())?;
        let running = started(joined("wait"), "stays")?;
        kill_keeper_of_stopped(&running)?;
        let there = lab::tunnel::namespace("stays")?;
        there.run(|| {
            let mut netlink = Netlink::open()?;
            let host0 = "host0".parse().map_err(std::io::Error::other)?;
            let index = netlink.link_index(&host0)?;
            let leak = "198.51.100.0/24".parse().map_err(std::io::Error::other)?;
            Ok(netlink.execute_one(vpn_exec::linux::netlink::NetlinkRequest::add_route(index, "host0", leak, None))?)
        })?;
        let message = assert_refused(&run(command(&up()))?);
        assert!(message.contains("routes 198.51.100.0/24 through host0"), "{message}");
        // The programs in it are ended.
        assert_none_soon(&["wait"], "after it could not be taken over")?;
        send(running.launcher(), Signal::SIGCONT)?;
        assert!(assert_refused(&output_of(running.child)?).contains("tunnel has ended"));
        assert!(!lab::tunnel::exists("stays")?);
        Ok(())
    });
}

#[test]
fn a_keeper_in_the_foreground_runs_until_a_signal_or_down() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        let up = [up().as_slice(), &["--foreground", "-v"]].concat();
        let mut child = command(&up).spawn()?;
        wait_for("it does not come up", || Ok(registry::read(&"stays".parse()?)?.is_some_and(|state| state.standing)))?;
        assert!(assert_refused(&run(command(&up))?).contains("held by another process"));
        let running = started(joined("wait"), "stays")?;
        write_config(&CONFIG_TEXT.replace("DNS = 10.64.0.1", "DNS = 10.64.0.53"))?;
        send(child.id().cast_signed(), Signal::SIGHUP)?;
        let names = format!("/proc/{}/root/etc/resolv.conf", running.program.pid);
        wait_for("SIGHUP is not heard", || Ok(fs::read_to_string(&names)?.contains("10.64.0.53")))?;
        assert!(child.try_wait()?.is_none());
        send(child.id().cast_signed(), Signal::SIGTERM)?;
        let output = output_of(child)?;
        assert_eq!(ended(output.status), Ok(0), "{}", errors(&output));
        assert!(assert_refused(&output_of(running.child)?).contains("taken down"));
        write_config(CONFIG_TEXT)?;
        assert_unchanged(&before, "at the end")
    });
}

#[test]
fn up_with_wait_fails_without_a_handshake_and_leaves_nothing() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        let message = assert_refused(&run(command(&[up().as_slice(), &["--wait", "1"]].concat()))?);
        assert!(message.contains("no handshake"), "{message}");
        assert_unchanged(&before, "after no peer has answered")
    });
}

#[test]
fn list_shows_other_tunnels_if_one_keeper_hangs() {
    lab::world::test(|| {
        prepare()?;
        works(&up())?;
        works(&["up", CONFIG, "--backend", lab::backend(), "--name", "answers"])?;
        send(keeper()?, Signal::SIGSTOP)?;
        let listed: Vec<Status> = serde_json::from_str(&works(&["list", "--json"])?)?;
        let states: Vec<_> = listed.iter().map(|status| (status.name.as_str(), status.state)).collect();
        assert_eq!(states, [("answers", Condition::Connecting), ("stays", Condition::Failed)]);
        send(keeper()?, Signal::SIGCONT)?;
        works(&["down", "stays"])?;
        works(&["down", "answers"]).map(drop)
    });
}

#[test]
fn silent_clients_do_not_block_others() {
    lab::world::test(|| {
        prepare()?;
        works(&up())?;
        let socket = registry::socket_of(&"stays".parse()?);
        // More clients than a keeper serves at once. It disconnects those that send nothing or an invalid request.
        let silent: Vec<_> = (0..200).filter_map(|_| local_socket::connect(&socket, BRIEFLY).ok()).collect();
        for garbage in [b"{}".as_slice(), b"\xff\x00", &[b'['; 8000]] {
            if let Ok(connection) = local_socket::connect(&socket, BRIEFLY) {
                let _ = local_socket::send(&connection, garbage, None);
            }
        }
        let begin = Instant::now();
        let output = loop {
            let output = run(joined("exit 4"))?;
            if ended(output.status) == Ok(4) || begin.elapsed() > lab::patience(PATIENCE) {
                break output;
            }
        };
        assert_eq!(ended(output.status), Ok(4), "{}", errors(&output));
        drop(silent);
        works(&["down", "stays"]).map(drop)
    });
}

#[test]
fn a_keeper_is_not_replaced_by_one_with_an_incompatible_configuration() {
    lab::world::test(|| {
        prepare()?;
        works(&up())?;
        let running = started(joined("wait"), "stays")?;
        let first = keeper()?;
        let before = status()?;
        // The peer could be changed, but not the kind of namespace, so neither is.
        let changed = CONFIG_TEXT
            .replace(", fd64::2/128", "")
            .replace("xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=", "yTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=");
        write_config(&changed)?;
        for more in [&["--replace"][..], &["--replace", "--foreground"]] {
            let message = assert_refused(&run(command(&[up().as_slice(), more].concat()))?);
            assert!(message.contains("IPv6") && message.contains("vpn-exec down stays"), "{message}");
        }
        assert_eq!(keeper()?, first);
        let peers = |status: &Status| status.living.as_ref().map(|living| living.peers[0].public_key.clone());
        assert_eq!(peers(&status()?), peers(&before), "nothing has changed");
        running.end()?;
        if lab::tunnel::is_rootless() {
            // Without a program inside, such a tunnel ends with its keeper.
            return works(&["down", "stays"]).map(drop);
        }
        send(first, Signal::SIGKILL)?;
        wait_for("a killed keeper is not told", || Ok(status()?.state == Condition::Failed))?;
        assert!(assert_refused(&run(command(&up()))?).contains("IPv6"));
        write_config(CONFIG_TEXT)?;
        works(&up())?;
        assert_eq!(peers(&status()?), peers(&before));
        works(&["down", "stays"]).map(drop)
    });
}

#[test]
fn a_keeper_stays_if_its_would_be_successor_has_gone() {
    lab::world::test(|| {
        prepare()?;
        works(&up())?;
        let first = keeper()?;
        send(first, Signal::SIGSTOP)?;
        let mut impatient = command(&[up().as_slice(), &["--replace"]].concat()).spawn()?;
        // It waits for the answer by now. If it is later, the test sees nothing, and passes.
        std::thread::sleep(Duration::from_millis(300));
        impatient.kill()?;
        impatient.wait()?;
        send(first, Signal::SIGCONT)?;
        wait_for("it does not answer", || Ok(status()?.state == Condition::Connecting))?;
        assert_eq!(keeper()?, first);
        works(&["down", "stays"]).map(drop)
    });
}

#[test]
fn list_shows_other_tunnels_if_one_cannot_be_queried() {
    lab::world::test(|| {
        prepare()?;
        works(&up())?;
        works(&["up", CONFIG, "--backend", lab::backend(), "--name", "answers"])?;
        // The socket accepts no more connections.
        send(keeper()?, Signal::SIGSTOP)?;
        let (socket, patience) = (registry::socket_of(&"stays".parse()?), Duration::from_millis(10));
        let connect = || vpn_exec::linux::local_socket::connect(&socket, patience).ok();
        let waiting: Vec<_> = std::iter::from_fn(connect).collect();
        // A directory without a tunnel.
        let broken = registry::path_of(&"broken".parse()?);
        fs::create_dir(&broken)?;
        fs::write(broken.join("state"), "x")?;
        let listed: Vec<Status> = serde_json::from_str(&works(&["list", "--json"])?)?;
        let states: Vec<_> = listed.iter().map(|status| (status.name.as_str(), status.state)).collect();
        assert_eq!(states, [("answers", Condition::Connecting), ("stays", Condition::Failed)]);
        assert!(assert_refused(&run(command(&["status", "broken"]))?).contains("broken/state"));
        fs::remove_dir_all(broken)?;
        drop(waiting);
        send(keeper()?, Signal::SIGCONT)?;
        works(&["down", "stays"])?;
        works(&["down", "answers"]).map(drop)
    });
}

#[test]
fn a_client_between_a_killed_keeper_and_its_successor_waits() {
    lab::world::test(|| {
        prepare()?;
        works(&up())?;
        let running = started(joined("wait"), "stays")?;
        kill_keeper_of_stopped(&running)?;
        let second = joined("exit 7").spawn()?;
        let third = command(&reload()).spawn()?;
        std::thread::sleep(Duration::from_millis(300));
        send(running.launcher(), Signal::SIGCONT)?;
        let output = output_of(second)?;
        assert_eq!(ended(output.status), Ok(7), "{}", errors(&output));
        let output = output_of(third)?;
        assert_eq!(ended(output.status), Ok(0), "{}", errors(&output));
        running.end()?;
        works(&["down", "stays"])?;

        for _ in 0..20 {
            works(&up())?;
            let running = started(joined("wait"), "stays")?;
            send(keeper()?, Signal::SIGKILL)?;
            works(&["down", "stays", "--force"])?;
            let output = output_of(running.child)?;
            ensure!(!lab::tunnel::exists("stays")?, "it is taken down: {}", errors(&output));
        }
        Ok(())
    });
}

#[test]
fn a_client_that_waits_for_a_hanging_keeper_can_be_interrupted() {
    lab::world::test(|| {
        prepare()?;
        works(&up())?;
        let running = started(joined("wait"), "stays")?;
        let keeper = keeper()?;
        send(keeper, Signal::SIGSTOP)?;
        // A client that joins, and one that leaves.
        let coming = joined("exit 0").spawn()?;
        send(running.program.pid, Signal::SIGKILL)?;
        for mut waiting in [coming, running.child] {
            wait_for("the waiting client cannot be interrupted", || {
                let _ = send(waiting.id().cast_signed(), Signal::SIGINT);
                Ok(waiting.try_wait()?.is_some())
            })?;
        }
        send(keeper, Signal::SIGCONT)?;
        works(&["down", "stays", "--force"]).map(drop)
    });
}
