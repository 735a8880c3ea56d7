//! A changed configuration: reload, options beside the file, and files that change meanwhile.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use lab::Snapshot;
use nix::sys::signal::Signal;
use rustix::mount::MountFlags;
use vpn_exec::lease::status::Condition;
use vpn_exec::linux::netlink::Netlink;
use vpn_exec::registry;

use crate::support::{
    CONFIG, CONFIG_TEXT, assert_refused, assert_unchanged, command, doing, ended, errors, joined, keeper,
    kill_keeper_of_stopped, prepare, reload, run, send, started, status, up, vpn_exec, wait_for, works, write_config,
};

#[test]
fn the_mtu_option_overrides_the_file_at_start_reload_and_takeover() {
    lab::world::test(|| {
        prepare()?;
        write_config(&CONFIG_TEXT.replace("DNS =", "MTU = 1400\nDNS ="))?;
        let mtu = || Ok::<_, anyhow::Error>(status()?.living.context("a keeper")?.interface.mtu);
        works(&[up().as_slice(), &["--mtu", "1380"]].concat())?;
        assert_eq!(mtu()?, 1380);
        assert_eq!(works(&reload())?, "MTU: was 1380, is now 1400\n");
        assert_eq!(mtu()?, 1400);
        let wider = [reload().as_slice(), &["--mtu", "1410"]].concat();
        assert_eq!(works(&wider)?, "MTU: was 1400, is now 1410\n");
        assert_eq!(works(&wider)?, "nothing has changed\n");
        let other = assert_refused(&run(command(&up()))?);
        assert!(other.contains("MTU: 1410 there, 1400 here"), "{other}");
        let joined = assert_refused(&run(command(&["--tunnel", "stays", "--mtu", "1380", "--", "true"]))?);
        assert!(joined.contains("--mtu") && joined.contains("cannot be applied"), "{joined}");

        // The endpoint's address is known later than the plan. Its route determines only a computed MTU.
        write_config(&CONFIG_TEXT.replace("192.0.2.1:51820", "127.0.0.1:51820"))?;
        works(&wider)?;
        assert_eq!(mtu()?, 1410);
        let former = keeper()?;
        send(former, Signal::SIGKILL)?;
        works(&[up().as_slice(), &["--mtu", "1410"]].concat())?;
        assert_ne!(keeper()?, former);
        assert_eq!(mtu()?, 1410);
        works(&["down", "stays"]).map(drop)
    });
}

#[test]
fn a_changed_file_is_applied_without_interruption_or_refused_completely() {
    lab::world::test(|| {
        prepare()?;
        works(&up())?;
        let running = started(joined("wait"), "stays")?;
        assert_eq!(works(&reload())?, "nothing has changed\n");
        let changed = CONFIG_TEXT
            .replace("10.64.0.2/32, fd64::2/128", "10.64.0.2/32, 10.64.0.7/32, fd64::2/128")
            .replace("DNS = 10.64.0.1", "DNS = 10.64.0.53\nMTU = 1300\nListenPort = 40123")
            .replace("0.0.0.0/0, ::/0", "10.0.0.0/8, ::/0")
            .replace("192.0.2.1:51820", "192.0.2.9:51820");
        write_config(&changed)?;
        let said = works(&reload())?;
        for word in ["Address", "DNS servers", "MTU", "ListenPort", "AllowedIPs", "is now 192.0.2.9:51820"] {
            assert!(said.contains(word), "{word}: {said}");
        }
        // The program is in the same namespace, and sees the changes.
        let inside = format!("/proc/{}", running.program.pid);
        assert_eq!(fs::metadata(format!("{inside}/ns/net"))?.ino(), running.program.namespace);
        let names = fs::read_to_string(format!("{inside}/root/etc/resolv.conf"))?;
        assert!(names.contains("nameserver 10.64.0.53\n") && !names.contains("10.64.0.1\n"), "{names}");
        let there = lab::tunnel::namespace("stays")?;
        let (links, addresses, routes) = there.run(|| {
            let mut netlink = Netlink::open()?;
            Ok((netlink.links()?, netlink.addresses()?, netlink.routes()?))
        })?;
        let wg0 = links.iter().find(|link| link.name == "wg0").context("wg0")?;
        assert_eq!(wg0.mtu, 1300);
        assert!(addresses.iter().any(|(_, address)| address.to_string() == "10.64.0.7/32"));
        let destinations: Vec<String> = routes.iter().map(|route| route.destination.to_string()).collect();
        assert!(destinations.contains(&"10.0.0.0/8".into()) && !destinations.contains(&"0.0.0.0/0".into()));

        // Removing IPv6 would need another namespace.
        write_config(&changed.replace(", fd64::2/128", "").replace("MTU = 1300", "MTU = 1310"))?;
        let message = assert_refused(&run(command(&reload()))?);
        assert!(message.contains("IPv6") && message.contains("vpn-exec down stays"), "{message}");
        assert_eq!(status()?.living.context("a keeper")?.interface.mtu, 1300, "nothing has changed");
        // Another launcher joins with the applied configuration.
        write_config(&changed)?;
        let output = run(vpn_exec("stays", "exit 0"))?;
        assert_eq!(ended(output.status), Ok(0), "{}", errors(&output));
        running.end()?;
        works(&["down", "stays"]).map(drop)
    });
}

#[test]
fn a_file_that_is_replaced_during_a_start_is_read_in_one_of_its_versions() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        let others = [CONFIG_TEXT.replace("10.64.0.2", "10.64.0.9"), "[Interface]\n".to_owned(), String::new()];
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for text in others.iter().map(String::as_str).chain([CONFIG_TEXT]).cycle() {
                    if stop.load(std::sync::atomic::Ordering::Relaxed) {
                        break;
                    }
                    // As editors and secret stores do, and as a plain copy does.
                    let _ = fs::write(format!("{CONFIG}.new"), text)
                        .and_then(|()| fs::rename(format!("{CONFIG}.new"), CONFIG));
                    let _ = fs::write(CONFIG, CONFIG_TEXT);
                }
            });
            let outcome = (0..30).try_for_each(|_| {
                let output = run(vpn_exec("stays", "exit 3"))?;
                if ended(output.status) != Ok(3) {
                    // The report has all errors of a file, so it may be long.
                    let text = errors(&output);
                    ensure!(ended(output.status) == Ok(125) && text.contains(CONFIG), "{text}");
                }
                Ok(())
            });
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            outcome
        })?;
        fs::remove_file(CONFIG)?;
        write_config(CONFIG_TEXT)?;
        assert_unchanged(&before, "after starts from a changing file")
    });
}

/// Replaces /run by a small file system.
fn limit_run() -> Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    Ok(rustix::mount::mount_remount("/run", flags, c"size=4m")?)
}

/// Fills a small /run, and returns the file that does.
fn fill_run() -> Result<std::path::PathBuf> {
    let filler = std::path::PathBuf::from("/run/lab/filler");
    let mut file = fs::File::create(&filler)?;
    while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
    Ok(filler)
}

#[test]
fn on_a_full_run_a_reload_changes_nothing_and_programs_continue() {
    lab::world::test(|| {
        prepare()?;
        limit_run()?;
        let before = Snapshot::take()?;
        works(&up())?;
        let running = started(joined("wait"), "stays")?;
        let changed = CONFIG_TEXT.replace("10.64.0.2/32", "10.64.0.7/32").replace("0.0.0.0/0", "10.0.0.0/8");
        write_config(&changed)?;
        let filler = fill_run()?;
        let message = assert_refused(&run(command(&reload()))?);
        assert!(message.contains("No space left"), "{message}");
        let there = lab::tunnel::namespace("stays")?;
        let has = |address: &str| -> Result<bool> {
            let addresses = there.run(|| Netlink::open()?.addresses())?;
            Ok(addresses.iter().any(|(_, there)| there.to_string() == address))
        };
        assert!(has("10.64.0.2/32")? && !has("10.64.0.7/32")?, "nothing has changed");

        // Programs also continue if the successor of a killed keeper cannot be recorded.
        let first = keeper()?;
        send(first, Signal::SIGKILL)?;
        wait_for("no keeper takes over", || Ok(status()?.state == Condition::Connecting))?;
        assert_eq!(doing("wait")?, [running.program.pid], "the program goes on");

        fs::remove_file(filler)?;
        works(&reload())?;
        assert!(has("10.64.0.7/32")? && !has("10.64.0.2/32")?);
        drop(there);
        running.end()?;
        works(&["down", "stays"])?;
        write_config(CONFIG_TEXT)?;
        assert_unchanged(&before, "at the end")
    });
}

#[test]
fn a_keeper_in_the_background_refuses_to_reload_by_itself() {
    lab::world::test(|| {
        prepare()?;
        works(&up())?;
        let message = assert_refused(&run(command(&["reload", "--by-keeper", "stays"]))?);
        assert!(message.contains("this tunnel's keeper cannot read its configuration again"), "{message}");
        assert!(message.contains("vpn-exec reload NAME"), "{message}");
        works(&["down", "stays"]).map(drop)
    });
}

#[test]
fn a_keeper_that_was_killed_during_a_reload_gets_a_successor() {
    lab::world::test(|| {
        lab::tunnel::needs_root("only the launchers of a rootless tunnel know its plan")?;
        prepare()?;
        works(&up())?;
        let running = started(joined("wait"), "stays")?;
        // The state is ahead of the tunnel, as if the keeper was killed in between.
        kill_keeper_of_stopped(&running)?;
        let plan = &registry::path_of(&"stays".parse()?).join("plan");
        let text = fs::read_to_string(plan)?;
        fs::write(plan, text.replace("10.64.0.2/32", "10.64.0.7/32").replace("0.0.0.0/0", "10.0.0.0/8"))?;
        send(running.launcher(), Signal::SIGCONT)?;
        wait_for("no keeper takes over", || Ok(status()?.state == Condition::Connecting))?;
        assert_eq!(doing("wait")?, [running.program.pid], "the program goes on");
        let there = lab::tunnel::namespace("stays")?;
        let (addresses, routes) = there.run(|| {
            let mut netlink = Netlink::open()?;
            Ok((netlink.addresses()?, netlink.routes()?))
        })?;
        assert!(addresses.iter().any(|(_, address)| address.to_string() == "10.64.0.7/32"));
        assert!(routes.iter().any(|route| route.destination.to_string() == "10.0.0.0/8"));
        running.end()?;
        works(&["down", "stays"]).map(drop)
    });
}
