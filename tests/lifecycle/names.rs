//! A name belongs to one tunnel at a time, and determines the addresses of the tunnel's veth.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::Snapshot;
use nix::sys::signal::Signal;
use vpn_exec::linux::netlink::Netlink;

use crate::support::{
    CONFIG_TEXT, PATIENCE, Running, assert_refused, assert_unchanged, ended, errors, is_there, output_of, prepare, run,
    send, start, vpn_exec, write_config,
};

#[test]
fn a_running_tunnel_accepts_the_same_configuration_and_refuses_another() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        let running = start("used", "wait")?;
        let during = Snapshot::take()?;
        let second = start("used", "wait")?;
        assert_eq!(second.program.namespace, running.program.namespace);
        assert_eq!(second.state.keeper, running.state.keeper);

        write_config(&CONFIG_TEXT.replace("192.0.2.1:51820", "192.0.2.9:51820"))?;
        let message = assert_refused(&run(vpn_exec("used", "exit 0"))?);
        assert!(message.contains("192.0.2.1:51820 there, 192.0.2.9:51820 here"), "{message}");
        assert!(message.contains("reload") && message.contains("--name"), "{message}");
        write_config(CONFIG_TEXT)?;

        running.end()?;
        // The state lists the holders of leases, which have changed. The first view helper ends a moment after its
        // launcher, and the second program has started a view server.
        let begin = Instant::now();
        loop {
            let mut changes = during.changes_within(Duration::ZERO)?;
            changes.retain(|change| {
                !["state", "view"].iter().any(|file| change.contains(&format!("/vpn-exec/used/{file}")))
            });
            if changes.is_empty() {
                break;
            }
            assert!(begin.elapsed() < lab::patience(PATIENCE), "the second was disturbed: {changes:#?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        second.end()?;
        let output = run(vpn_exec("used", "exit 0"))?;
        assert_eq!(ended(output.status), Ok(0), "{}", errors(&output));
        assert_unchanged(&before, "at the end")
    });
}

#[test]
fn a_name_can_be_reused_at_once() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        for round in 0..20 {
            let output = run(vpn_exec("again", "exit 0"))?;
            assert_eq!(ended(output.status), Ok(0), "round {round}: {}", errors(&output));
        }
        assert_unchanged(&before, "after many")
    });
}

#[test]
fn a_start_waits_for_the_end_of_a_tunnel_whose_launcher_was_killed() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        let running = start("abandoned", "wait")?;
        // A stopped keeper notices late, as on a busy machine.
        send(running.keeper(), Signal::SIGSTOP)?;
        send(running.launcher(), Signal::SIGKILL)?;
        let keeper = running.keeper();
        // Not until the end of its output, which the keeper has open, too.
        let mut child = running.child;
        child.wait()?;
        let next = vpn_exec("abandoned", "exit 0").spawn()?;
        std::thread::sleep(Duration::from_millis(500));
        send(keeper, Signal::SIGCONT)?;
        let output = output_of(next)?;
        assert_eq!(ended(output.status), Ok(0), "{}", errors(&output));
        assert_unchanged(&before, "at the end")
    });
}

#[test]
fn simultaneous_starts_of_one_name_all_work() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        for round in 0..5 {
            let children = (0..6).map(|_| vpn_exec("race", "nap").spawn()).collect::<std::io::Result<Vec<_>>>()?;
            for child in children {
                let output = output_of(child)?;
                assert_eq!(ended(output.status), Ok(0), "round {round}: {}", errors(&output));
            }
            assert_unchanged(&before, "after a race")?;
        }
        Ok(())
    });
}

fn addresses_of(running: &Running) -> Result<Vec<String>> {
    let mut netlink = Netlink::open()?;
    let index = running.host_link()?.index;
    let own = netlink.addresses()?.into_iter().filter(|(of, _)| *of == index);
    Ok(own.map(|(_, address)| address.to_string()).collect())
}

#[test]
fn many_tunnels_run_side_by_side() {
    lab::world::test(|| {
        lab::tunnel::needs_root("a rootless tunnel has no link to the host")?;
        prepare()?;
        let before = Snapshot::take()?;
        let names: Vec<String> = (0..8).map(|number| format!("side{number}")).collect();
        let running = std::thread::scope(|scope| {
            let starts: Vec<_> = names.iter().map(|name| scope.spawn(move || start(name, "wait"))).collect();
            starts.into_iter().map(|start| start.join().expect("no panic")).collect::<Result<Vec<_>>>()
        })?;
        let mut addresses = Vec::new();
        let mut namespaces = Vec::new();
        for one in &running {
            let own = addresses_of(one)?;
            assert_eq!(own.len(), 2, "IPv4 and IPv6: {own:?}");
            addresses.extend(own);
            namespaces.push(one.program.namespace);
        }
        addresses.sort();
        addresses.dedup();
        assert_eq!(addresses.len(), 16, "{addresses:?}");
        namespaces.sort_unstable();
        namespaces.dedup();
        assert_eq!(namespaces.len(), 8);

        // They also end at the same time, so that several may take themselves for the last one.
        for one in &running {
            send(one.program.pid, Signal::SIGTERM)?;
        }
        for one in running {
            assert_eq!(ended(output_of(one.child)?.status), Err(Signal::SIGTERM));
        }
        assert!(!is_there("/run/netns") && !is_there("/run/vpn-exec"));
        assert_unchanged(&before, "after eight")
    });
}

#[test]
fn many_tunnels_that_start_and_end_at_once_leave_nothing() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        let names: Vec<String> = (0..6).map(|number| format!("crowd{number}")).collect();
        std::thread::scope(|scope| {
            let crowd: Vec<_> = names
                .iter()
                .map(|name| {
                    scope.spawn(move || -> Result<()> {
                        for _ in 0..4 {
                            let output = run(vpn_exec(name, "exit 0"))?;
                            ensure!(ended(output.status) == Ok(0), "{name}: {}", errors(&output));
                        }
                        Ok(())
                    })
                })
                .collect();
            crowd.into_iter().try_for_each(|one| one.join().expect("no panic"))
        })?;
        assert_unchanged(&before, "after the crowd")
    });
}

#[test]
fn a_name_always_gets_the_same_addresses() {
    lab::world::test(|| {
        lab::tunnel::needs_root("a rootless tunnel has no link to the host")?;
        prepare()?;
        let mut seen = Vec::new();
        for _ in 0..3 {
            let running = start("stable", "wait")?;
            seen.push(addresses_of(&running)?);
            running.end()?;
        }
        assert!(seen[0].len() == 2 && seen.iter().all(|addresses| *addresses == seen[0]), "{seen:?}");
        let other = start("other", "wait")?;
        assert_ne!(addresses_of(&other)?, seen[0]);
        other.end()?;
        Ok(())
    });
}

#[test]
fn the_longest_name_works_and_a_longer_one_is_refused() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        let running = start(&"n".repeat(64), "wait")?;
        assert!(lab::tunnel::exists(&"n".repeat(64))?);
        assert!(lab::tunnel::is_rootless() || running.host_link()?.name.len() <= 15);
        running.end()?;
        let output = run(vpn_exec(&"n".repeat(65), "exit 0"))?;
        assert_eq!(ended(output.status), Ok(125));
        assert!(errors(&output).contains("65 characters") && errors(&output).contains("64"), "{}", errors(&output));
        assert_unchanged(&before, "at the end")
    });
}
