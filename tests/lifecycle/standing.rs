//! Standing tunnels: up, join, status, reload, takeover and down.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{Launcher, Snapshot};
use nix::sys::signal::Signal;
use rustix::mount::MountFlags;
use vpn_exec::lease::status::{Condition, Status};
use vpn_exec::linux::local_socket;
use vpn_exec::linux::netlink::Netlink;
use vpn_exec::registry;

use crate::support::{
    CONFIG, CONFIG_TEXT, PATIENCE, assert_none_soon, assert_refused, assert_unchanged, doing, ended, errors, output_of,
    prepare, run, send, started, vpn_exec, with_task, write_config,
};

/// Returns a command line of vpn-exec with its output in pipes.
fn command(arguments: &[&str]) -> Command {
    let mut command = lab::vpn_exec(arguments);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    command
}

/// Runs a command that must succeed, and returns its standard output.
fn works(arguments: &[&str]) -> Result<String> {
    let output = run(command(arguments))?;
    ensure!(ended(output.status) == Ok(0), "{arguments:?}: {}", errors(&output));
    Ok(String::from_utf8(output.stdout)?)
}

/// The time to wait for a keeper whose queue of connections is full.
const BRIEFLY: Duration = Duration::from_millis(10);

fn up() -> [&'static str; 6] {
    ["up", CONFIG, "--backend", lab::backend(), "--name", "stays"]
}

fn reload() -> [&'static str; 6] {
    ["reload", CONFIG, "--backend", lab::backend(), "--name", "stays"]
}

fn status() -> Result<Status> {
    Ok(serde_json::from_str(&works(&["status", "stays", "--json"])?)?)
}

/// Joins the standing tunnel by its name alone.
fn joined(task: &str) -> Command {
    with_task(Launcher::with_tunnel("stays"), task)
}

fn keeper() -> Result<i32> {
    Ok(registry::read(&"stays".parse()?)?.context("a tunnel that stays has a state")?.keeper.cast_signed())
}

fn wait_for(what: &str, is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    lab::wait_until(lab::patience(PATIENCE), what, is_so)
}

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
        // A running launcher would take over at once.
        send(running.launcher(), Signal::SIGSTOP)?;
        send(keeper()?, Signal::SIGKILL)?;
        wait_for("a killed keeper is not told", || Ok(status()?.state == Condition::Failed))?;
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
                let output = run(crate::support::vpn_exec("stays", "exit 3"))?;
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
        send(running.launcher(), Signal::SIGSTOP)?;
        send(keeper()?, Signal::SIGKILL)?;
        wait_for("a killed keeper is not told", || Ok(status()?.state == Condition::Failed))?;
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
        // A running launcher would take over at once.
        send(running.launcher(), Signal::SIGSTOP)?;
        send(keeper()?, Signal::SIGKILL)?;
        wait_for("a killed keeper is not told", || Ok(status()?.state == Condition::Failed))?;
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
            output_of(running.child)?;
            ensure!(!lab::tunnel::exists("stays")?, "it is taken down");
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
