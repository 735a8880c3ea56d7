//! Tunnels that stay: up, joined, asked, changed, taken over and down.

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
use vpn_exec::linux::namespace::{self, NameLookup};
use vpn_exec::linux::netlink::Netlink;
use vpn_exec::registry;

use crate::support::{
    CONFIG, CONFIG_TEXT, PATIENCE, assert_none_soon, assert_refused, assert_unchanged, doing, ended, errors, is_there,
    output_of, prepare, run, send, started, vpn_exec, with_task, write_config,
};

/// Returns a command line of vpn-exec with its output in pipes.
fn command(arguments: &[&str]) -> Command {
    let mut command = lab::vpn_exec(arguments);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    command
}

/// Runs a command that must work, and returns what it prints.
fn works(arguments: &[&str]) -> Result<String> {
    let output = run(command(arguments))?;
    ensure!(ended(output.status) == Ok(0), "{arguments:?}: {}", errors(&output));
    Ok(String::from_utf8(output.stdout)?)
}

/// How long to wait for a keeper that has no room.
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
fn a_tunnel_stays_until_it_is_taken_down() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        assert!(assert_refused(&run(command(&["status", "stays"]))?).contains("there is no tunnel stays"));
        assert!(assert_refused(&run(command(&["down", "stays"]))?).contains("there is no tunnel stays"));
        works(&up())?;
        // Once more is no harm.
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
        assert!(is_there("/run/netns/stays"), "what was refused has changed nothing");
        works(&["down", "stays", "--force"])?;
        let output = output_of(running.child)?;
        assert!(assert_refused(&output).contains("taken down"), "{}", errors(&output));
        assert_unchanged(&before, "after it was taken down")?;
        assert_eq!(works(&["list"])?, "no tunnel is up\n");
        Ok(())
    });
}

/// Beside the file's own, which stays as the provider has it: from the start, by a reload, and by a successor of the keeper's.
#[test]
fn an_mtu_beside_the_file_is_the_tunnels() {
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

        // The endpoint's name is known later than the plan, and the way to it decides about a computed MTU alone.
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
fn nobody_waits_for_the_output_of_a_keeper_in_the_background() {
    lab::world::test(|| {
        prepare()?;
        // Its output ends when `up` does, or this hangs.
        works(&up())?;
        works(&["down", "stays"]).map(drop)
    });
}

#[test]
fn a_killed_launcher_takes_its_program_and_nobody_elses() {
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
fn a_changed_file_is_applied_alive_or_refused_as_a_whole() {
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
        // The program is where it was, and sees what is new there.
        let inside = format!("/proc/{}", running.program.pid);
        assert_eq!(fs::metadata(format!("{inside}/ns/net"))?.ino(), running.program.namespace);
        let names = fs::read_to_string(format!("{inside}/root/etc/resolv.conf"))?;
        assert!(names.contains("nameserver 10.64.0.53\n") && !names.contains("10.64.0.1\n"), "{names}");
        let NameLookup::Namespace(there) = namespace::look_up("/run/netns/stays".as_ref())? else {
            anyhow::bail!("the name is a namespace's")
        };
        let (links, addresses, routes) = there.run(|| {
            let mut netlink = Netlink::open()?;
            Ok((netlink.links()?, netlink.addresses()?, netlink.routes()?))
        })?;
        let wg0 = links.iter().find(|link| link.name == "wg0").context("wg0")?;
        assert_eq!(wg0.mtu, 1300);
        assert!(addresses.iter().any(|(_, address)| address.to_string() == "10.64.0.7/32"));
        let destinations: Vec<String> = routes.iter().map(|route| route.destination.to_string()).collect();
        assert!(destinations.contains(&"10.0.0.0/8".into()) && !destinations.contains(&"0.0.0.0/0".into()));

        // Without IPv6 the namespace would be another.
        write_config(&changed.replace(", fd64::2/128", "").replace("MTU = 1300", "MTU = 1310"))?;
        let message = assert_refused(&run(command(&reload()))?);
        assert!(message.contains("IPv6") && message.contains("vpn-exec down stays"), "{message}");
        assert_eq!(status()?.living.context("a keeper")?.interface.mtu, 1300, "nothing has changed");
        // Others join by what is in force.
        write_config(&changed)?;
        let output = run(vpn_exec("stays", "exit 0"))?;
        assert_eq!(ended(output.status), Ok(0), "{}", errors(&output));
        running.end()?;
        works(&["down", "stays"]).map(drop)
    });
}

#[test]
fn a_killed_or_replaced_keeper_has_a_successor() {
    lab::world::test(|| {
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

        // Of a standing tunnel that nobody is in, too, what a killed keeper has left can be taken away.
        running.end()?;
        send(third, Signal::SIGKILL)?;
        wait_for("a killed keeper is not told", || Ok(status()?.state == Condition::Failed))?;
        works(&["down", "stays"])?;
        assert_unchanged(&before, "at the end")
    });
}

#[test]
fn what_is_not_as_it_was_is_never_taken_over() {
    lab::world::test(|| {
        prepare()?;
        works(&up())?;
        let running = started(joined("wait"), "stays")?;
        // The launcher would take over at once.
        send(running.launcher(), Signal::SIGSTOP)?;
        send(keeper()?, Signal::SIGKILL)?;
        wait_for("a killed keeper is not told", || Ok(status()?.state == Condition::Failed))?;
        let NameLookup::Namespace(there) = namespace::look_up("/run/netns/stays".as_ref())? else {
            anyhow::bail!("the name is a namespace's")
        };
        there.run(|| {
            let mut netlink = Netlink::open()?;
            let host0 = "host0".parse().map_err(std::io::Error::other)?;
            let index = netlink.link_index(&host0)?;
            let leak = "198.51.100.0/24".parse().map_err(std::io::Error::other)?;
            Ok(netlink.execute_one(vpn_exec::linux::netlink::NetlinkRequest::add_route(index, "host0", leak, None))?)
        })?;
        let message = assert_refused(&run(command(&up()))?);
        assert!(message.contains("routes 198.51.100.0/24 by host0"), "{message}");
        // What cannot be trusted is ended.
        assert_none_soon(&["wait"], "after it could not be taken over")?;
        send(running.launcher(), Signal::SIGCONT)?;
        assert!(assert_refused(&output_of(running.child)?).contains("tunnel has ended"));
        assert!(!is_there("/run/netns/stays") && !is_there("/run/vpn-exec"));
        Ok(())
    });
}

#[test]
fn in_the_foreground_it_lasts_until_it_is_told_to_end() {
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
fn with_wait_it_is_up_or_gone() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        let message = assert_refused(&run(command(&[up().as_slice(), &["--wait", "1"]].concat()))?);
        assert!(message.contains("no handshake"), "{message}");
        assert_unchanged(&before, "after nobody has answered")
    });
}

#[test]
fn a_keeper_that_hangs_does_not_keep_others_from_being_listed() {
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
fn those_who_connect_and_say_nothing_keep_nobody_out() {
    lab::world::test(|| {
        prepare()?;
        works(&up())?;
        let socket = registry::socket_of(&"stays".parse()?);
        // More than a keeper hears at once. It hangs up on whoever says nothing, or nothing that it knows.
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
fn a_file_that_is_replaced_during_a_start_counts_as_it_was_or_as_it_is() {
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
                    // As editors and secret stores do it, and as a careless copy does.
                    let _ = fs::write(format!("{CONFIG}.new"), text)
                        .and_then(|()| fs::rename(format!("{CONFIG}.new"), CONFIG));
                    let _ = fs::write(CONFIG, CONFIG_TEXT);
                }
            });
            let outcome = (0..30).try_for_each(|_| {
                let output = run(crate::support::vpn_exec("stays", "exit 3"))?;
                if ended(output.status) != Ok(3) {
                    // It tells all that is wrong with a file, so it may be long.
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

/// Gives /run little room.
fn limit_run() -> Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    Ok(rustix::mount::mount_remount("/run", flags, c"size=4m")?)
}

/// Leaves no room on a /run that has little, and returns what takes it.
fn fill_run() -> Result<std::path::PathBuf> {
    let filler = std::path::PathBuf::from("/run/lab/filler");
    let mut file = fs::File::create(&filler)?;
    while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
    Ok(filler)
}

#[test]
fn without_room_nothing_is_changed_and_nothing_is_lost() {
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
        let NameLookup::Namespace(there) = namespace::look_up("/run/netns/stays".as_ref())? else {
            anyhow::bail!("the name is a namespace's")
        };
        let has = |address: &str| -> Result<bool> {
            let addresses = there.run(|| Netlink::open()?.addresses())?;
            Ok(addresses.iter().any(|(_, there)| there.to_string() == address))
        };
        assert!(has("10.64.0.2/32")? && !has("10.64.0.7/32")?, "nothing has changed");

        // Nor is it a reason to end programs that the successor of a killed keeper cannot be written down.
        let first = keeper()?;
        send(first, Signal::SIGKILL)?;
        wait_for("nobody takes over", || Ok(status()?.state == Condition::Connecting))?;
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
fn a_keeper_in_the_background_cannot_read_its_configuration_again() {
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
fn a_keeper_that_was_killed_while_it_reloaded_has_a_successor() {
    lab::world::test(|| {
        prepare()?;
        works(&up())?;
        let running = started(joined("wait"), "stays")?;
        // What was written down is not done yet: as if it was killed in between.
        send(running.launcher(), Signal::SIGSTOP)?;
        send(keeper()?, Signal::SIGKILL)?;
        wait_for("a killed keeper is not told", || Ok(status()?.state == Condition::Failed))?;
        let plan = "/run/vpn-exec/stays/plan";
        let text = fs::read_to_string(plan)?;
        fs::write(plan, text.replace("10.64.0.2/32", "10.64.0.7/32").replace("0.0.0.0/0", "10.0.0.0/8"))?;
        send(running.launcher(), Signal::SIGCONT)?;
        wait_for("nobody takes over", || Ok(status()?.state == Condition::Connecting))?;
        assert_eq!(doing("wait")?, [running.program.pid], "the program goes on");
        let NameLookup::Namespace(there) = namespace::look_up("/run/netns/stays".as_ref())? else {
            anyhow::bail!("the name is a namespace's")
        };
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
fn a_keeper_is_not_replaced_by_one_of_another_mind() {
    lab::world::test(|| {
        prepare()?;
        works(&up())?;
        let running = started(joined("wait"), "stays")?;
        let first = keeper()?;
        let before = status()?;
        // Another peer could be had, but not another kind of namespace: so neither.
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
fn a_keeper_gives_way_to_nobody_who_has_gone() {
    lab::world::test(|| {
        prepare()?;
        works(&up())?;
        let first = keeper()?;
        send(first, Signal::SIGSTOP)?;
        let mut impatient = command(&[up().as_slice(), &["--replace"]].concat()).spawn()?;
        // It waits for the answer by then; where it is later, there is nothing to be seen here.
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
fn one_tunnel_that_cannot_be_asked_does_not_keep_others_from_being_listed() {
    lab::world::test(|| {
        prepare()?;
        works(&up())?;
        works(&["up", CONFIG, "--backend", lab::backend(), "--name", "answers"])?;
        // Nobody is let in any more.
        send(keeper()?, Signal::SIGSTOP)?;
        let (socket, patience) = (registry::socket_of(&"stays".parse()?), Duration::from_millis(10));
        let connect = || vpn_exec::linux::local_socket::connect(&socket, patience).ok();
        let waiting: Vec<_> = std::iter::from_fn(connect).collect();
        // And this is no tunnel at all.
        fs::create_dir("/run/vpn-exec/broken")?;
        fs::write("/run/vpn-exec/broken/state", "x")?;
        let listed: Vec<Status> = serde_json::from_str(&works(&["list", "--json"])?)?;
        let states: Vec<_> = listed.iter().map(|status| (status.name.as_str(), status.state)).collect();
        assert_eq!(states, [("answers", Condition::Connecting), ("stays", Condition::Failed)]);
        assert!(assert_refused(&run(command(&["status", "broken"]))?).contains("broken/state"));
        fs::remove_dir_all("/run/vpn-exec/broken")?;
        drop(waiting);
        send(keeper()?, Signal::SIGCONT)?;
        works(&["down", "stays"])?;
        works(&["down", "answers"]).map(drop)
    });
}

#[test]
fn who_comes_between_a_killed_keeper_and_its_successor_waits() {
    lab::world::test(|| {
        prepare()?;
        works(&up())?;
        let running = started(joined("wait"), "stays")?;
        // The launcher would take over at once.
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
            ensure!(!is_there("/run/netns/stays") && !is_there("/run/vpn-exec"), "it is taken down");
        }
        Ok(())
    });
}

#[test]
fn whoever_waits_for_a_keeper_that_hangs_can_be_interrupted() {
    lab::world::test(|| {
        prepare()?;
        works(&up())?;
        let running = started(joined("wait"), "stays")?;
        let keeper = keeper()?;
        send(keeper, Signal::SIGSTOP)?;
        // One that comes, and one that goes.
        let coming = joined("exit 0").spawn()?;
        send(running.program.pid, Signal::SIGKILL)?;
        for mut waiting in [coming, running.child] {
            wait_for("nobody can end who waits", || {
                let _ = send(waiting.id().cast_signed(), Signal::SIGINT);
                Ok(waiting.try_wait()?.is_some())
            })?;
        }
        send(keeper, Signal::SIGCONT)?;
        works(&["down", "stays", "--force"]).map(drop)
    });
}
