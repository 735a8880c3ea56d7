//! `/run/netns` is shared with others: with ip-netns(8), with whoever is inside, and with other mount namespaces.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Result, ensure};
use lab::Snapshot;
use nix::sys::signal::Signal;
use rustix::mount::{MountPropagationFlags, mount_change};
use vpn_exec::linux::namespace::{self, NameLookup, NetworkNamespace};
use vpn_exec::linux::netlink::Netlink;

use crate::support::{PATIENCE, assert_unchanged, ended, errors, is_there, prepare, run, start, vpn_exec};

#[test]
fn no_mount_remains_whether_mounts_are_shared_or_private() {
    lab::world::test(|| {
        prepare()?;
        for propagation in [MountPropagationFlags::SHARED, MountPropagationFlags::PRIVATE] {
            mount_change("/", propagation | MountPropagationFlags::REC)?;
            let before = Snapshot::take()?;
            assert_eq!(ended(run(vpn_exec("mounts", "exit 0"))?.status), Ok(0));
            assert_unchanged(&before, format_args!("{propagation:?}"))?;
            // The same where the directory is there already, and is no mount.
            fs::create_dir("/run/netns")?;
            let before = Snapshot::take()?;
            assert_eq!(ended(run(vpn_exec("mounts", "exit 0"))?.status), Ok(0));
            assert_unchanged(&before, format_args!("{propagation:?} with a directory"))?;
            fs::remove_dir("/run/netns")?;
        }
        Ok(())
    });
}

#[test]
fn a_name_removed_is_removed_in_other_mount_namespaces() {
    lab::world::test(|| {
        prepare()?;
        let running = start("mounts", "wait")?;
        // The program's own mount namespace has the mount, as everybody's has that was made since.
        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", running.program.pid))?;
        assert!(mounts.contains(" /run/netns/mounts "), "{mounts}");
        let other = start("other", "wait")?;
        running.end()?;
        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", other.program.pid))?;
        assert!(!mounts.contains(" /run/netns/mounts "), "the namespace lives on by it: {mounts}");
        other.end()?;
        Ok(())
    });
}

#[test]
fn names_that_others_add_meanwhile_survive_and_can_be_seen() {
    lab::world::test(|| {
        prepare()?;
        let running = start("ours", "wait")?;
        let (foreign, ()) = NetworkNamespace::create(|| Ok(()))?;
        namespace::bind_name(&foreign, "/run/netns/theirs".as_ref(), "")?;
        running.end()?;
        let is_theirs = || -> Result<bool> {
            Ok(
                matches!(namespace::look_up("/run/netns/theirs".as_ref())?, NameLookup::Namespace(there) if there.id()? == foreign.id()?),
            )
        };
        assert!(is_theirs()?, "their name is gone, or hidden");
        assert!(!is_there("/run/netns/ours"));
        assert!(!is_there("/run/vpn-exec"));

        // Others still find them, and us.
        let running = start("ours", "wait")?;
        assert!(is_theirs()? && is_there("/run/netns/ours"));
        running.end()?;
        assert!(is_theirs()?);
        namespace::remove_name("/run/netns/theirs".as_ref())?;
        Ok(())
    });
}

#[test]
fn ip_netns_accepts_the_namespace() {
    lab::world::test(|| {
        prepare()?;
        let ip = |arguments: &[&str]| Command::new("ip").args(arguments).stdin(Stdio::null()).output();
        if let Err(error) = ip(&["-Version"]) {
            return Err(lab::Skip::error(format!("ip cannot be run: {error}"), lab::variables::REQUIRE_PEERS));
        }
        let running = start("accepted", "wait")?;
        let list = ip(&["netns", "list"])?;
        assert!(String::from_utf8_lossy(&list.stdout).lines().any(|line| line.starts_with("accepted")), "{list:?}");
        let inside = ip(&["netns", "exec", "accepted", "ip", "-o", "link"])?;
        let links = String::from_utf8_lossy(&inside.stdout).into_owned();
        assert!(inside.status.success(), "{inside:?}");
        assert_eq!(links.lines().count(), 3, "lo, wg0 and host0: {links}");
        running.end()?;
        assert!(!ip(&["netns", "exec", "accepted", "true"])?.status.success());
        Ok(())
    });
}

/// Somebody's shell in the namespace, as `ip netns exec` starts it: no child of ours.
fn visitor(name: &str) -> Result<std::process::Child> {
    let path = namespace::path_of(name);
    let NameLookup::Namespace(inside) = namespace::look_up(&path)? else { anyhow::bail!("{} is gone", path.display()) };
    Ok(inside.run(|| lab::agent::task_on_host("wait").spawn())?)
}

#[test]
fn a_visitor_outlives_the_tunnel_but_has_no_link_any_more() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        let running = start("visited", "daemon")?;
        let mut visitor = visitor("visited")?;
        let pid = visitor.id().cast_signed();
        let until = Instant::now() + lab::patience(PATIENCE);
        // It is a visitor once it is a program of its own.
        while crate::support::doing("wait")?.is_empty() {
            ensure!(Instant::now() < until, "the visitor never comes");
        }
        // Its daemon would keep the tunnel up; who ends both ends the tunnel in order.
        for daemon in crate::support::doing("daemonized")? {
            crate::support::send(daemon, Signal::SIGTERM)?;
        }
        let output = running.end()?;
        assert_eq!(ended(output.status), Err(Signal::SIGTERM), "{}", errors(&output));
        assert!(!is_there("/run/netns/visited") && !is_there("/run/vpn-exec"));
        assert!(visitor.try_wait()?.is_none(), "an orderly end kills nobody but its own");

        // The namespace lives on with its visitor, closed.
        let until = Instant::now() + lab::patience(PATIENCE);
        loop {
            let inside =
                NetworkNamespace::from(std::os::fd::OwnedFd::from(fs::File::open(format!("/proc/{pid}/ns/net"))?));
            let links = inside.run(|| Netlink::open()?.links())?;
            if links.len() == 1 {
                break;
            }
            ensure!(Instant::now() < until, "{links:?} are left");
        }
        // Nobody waits for the visitor: the name can be used again meanwhile.
        assert_eq!(ended(run(vpn_exec("visited", "exit 0"))?.status), Ok(0));
        visitor.kill()?;
        visitor.wait()?;
        assert_unchanged(&before, "when the visitor is gone, too")
    });
}

#[test]
fn a_visitor_ends_with_an_abandoned_tunnel() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        let running = start("visited", "wait")?;
        let mut visitor = visitor("visited")?;
        crate::support::send(running.launcher(), Signal::SIGKILL)?;
        crate::support::output_of(running.child)?;
        let until = Instant::now() + lab::patience(PATIENCE);
        while visitor.try_wait()?.is_none() {
            ensure!(Instant::now() < until, "the visitor lives on in what nobody holds");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_unchanged(&before, "after an abandoned tunnel")
    });
}

/// A peer answers whichever of two interfaces with one key it has heard last.
#[test]
fn a_private_key_that_two_tunnels_share_is_said() {
    lab::world::test(|| {
        prepare()?;
        let words = "the tunnel one has the same private key and peer";
        let one = start("one", "wait")?;
        let said = errors(&run(vpn_exec("two", "exit 0"))?);
        ensure!(said.contains(words), "{said}");
        one.end()?;
        let said = errors(&run(vpn_exec("two", "exit 0"))?);
        ensure!(!said.contains("same private key"), "{said}");
        Ok(())
    });
}
