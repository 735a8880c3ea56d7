//! A name is one tunnel's at a time, and a tunnel's addresses are its name's.

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
fn a_tunnel_in_use_is_shared_by_who_wants_the_same_and_refused_to_others() {
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
        // Who holds a lease is written down, and is another now. What kept the first one's view ends a moment after its launcher.
        let begin = Instant::now();
        loop {
            let mut changes = during.changes_within(Duration::ZERO)?;
            changes.retain(|change| !change.contains("/run/vpn-exec/used/state"));
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
fn a_name_can_be_used_again_at_once() {
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
fn a_start_waits_for_a_tunnel_whose_launcher_was_killed() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        let running = start("abandoned", "wait")?;
        // A keeper that takes its time, as on a busy machine, to notice.
        send(running.keeper(), Signal::SIGSTOP)?;
        send(running.launcher(), Signal::SIGKILL)?;
        let keeper = running.keeper();
        // Not until its output ends: that of the keeper is the same.
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
fn many_starts_of_a_name_at_once_all_work() {
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
fn many_tunnels_stand_side_by_side() {
    lab::world::test(|| {
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

        // They go all at once, too, so that several believe to be the last.
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
fn crowds_that_come_and_go_leave_nothing() {
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
fn a_names_addresses_are_the_same_each_time() {
    lab::world::test(|| {
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
        assert!(is_there(format!("/run/netns/{}", "n".repeat(64))));
        assert!(running.host_link()?.name.len() <= 15);
        running.end()?;
        let output = run(vpn_exec(&"n".repeat(65), "exit 0"))?;
        assert_eq!(ended(output.status), Ok(125));
        assert!(errors(&output).contains("65 characters") && errors(&output).contains("64"), "{}", errors(&output));
        assert_unchanged(&before, "at the end")
    });
}
