//! `/run/netns` is shared with ip-netns(8), with processes in the namespaces, and with other mount namespaces; the CPUs
//! with all of the machine.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use lab::Snapshot;
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rustix::mount::{MountPropagationFlags, mount_change};
use vpn_exec::linux::namespace::{self, NameLookup, NetworkNamespace};
use vpn_exec::linux::netlink::Netlink;

use crate::support::{PATIENCE, assert_unchanged, ended, errors, is_there, prepare, run, start, vpn_exec};

#[test]
fn no_mount_remains_with_shared_or_private_mounts() {
    lab::world::test(|| {
        prepare()?;
        for propagation in [MountPropagationFlags::SHARED, MountPropagationFlags::PRIVATE] {
            mount_change("/", propagation | MountPropagationFlags::REC)?;
            let before = Snapshot::take()?;
            assert_eq!(ended(run(vpn_exec("mounts", "exit 0"))?.status), Ok(0));
            assert_unchanged(&before, format_args!("{propagation:?}"))?;
            // Also if the directory exists already and is not a mount.
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
fn a_removed_name_vanishes_in_other_mount_namespaces() {
    lab::world::test(|| {
        lab::tunnel::needs_root("the namespace of a rootless tunnel has no name")?;
        prepare()?;
        let running = start("mounts", "wait")?;
        // The program's mount namespace has the mount, as has any that was created since.
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
fn names_that_other_programs_add_survive_and_are_visible() {
    lab::world::test(|| {
        lab::tunnel::needs_root("the namespace of a rootless tunnel has no name")?;
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

        // Other programs still find these names, and the tunnel's.
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
        lab::tunnel::needs_root("the namespace of a rootless tunnel has no name")?;
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

/// Starts a process in the namespace, as `ip netns exec` does, which is not a child of vpn-exec.
fn guest(name: &str) -> Result<std::process::Child> {
    let path = namespace::path_of(name);
    let NameLookup::Namespace(inside) = namespace::look_up(&path)? else { anyhow::bail!("{} is gone", path.display()) };
    Ok(inside.run(|| lab::agent::task_on_host("wait").spawn())?)
}

#[test]
fn a_foreign_process_outlives_the_tunnel_without_a_link() {
    lab::world::test(|| {
        lab::tunnel::needs_root("the namespace of a rootless tunnel has no name")?;
        prepare()?;
        let before = Snapshot::take()?;
        let running = start("visited", "daemon")?;
        let mut guest = guest("visited")?;
        let pid = guest.id().cast_signed();
        let until = Instant::now() + lab::patience(PATIENCE);
        // Until it has executed the agent.
        while crate::support::doing("wait")?.is_empty() {
            ensure!(Instant::now() < until, "the process does not start");
        }
        // The daemon would keep the tunnel up. Ending it and the program ends the tunnel regularly.
        for daemon in crate::support::doing("daemonized")? {
            crate::support::send(daemon, Signal::SIGTERM)?;
        }
        let output = running.end()?;
        assert_eq!(ended(output.status), Err(Signal::SIGTERM), "{}", errors(&output));
        assert!(!is_there("/run/netns/visited") && !is_there("/run/vpn-exec"));
        assert!(guest.try_wait()?.is_none(), "a regular end has killed a foreign process");

        // The namespace lives on with the process, closed.
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
        // The name can be reused meanwhile.
        assert_eq!(ended(run(vpn_exec("visited", "exit 0"))?.status), Ok(0));
        guest.kill()?;
        guest.wait()?;
        assert_unchanged(&before, "when the guest is gone, too")
    });
}

#[test]
fn reclaiming_an_abandoned_tunnel_ends_foreign_processes_in_it() {
    lab::world::test(|| {
        lab::tunnel::needs_root("the namespace of a rootless tunnel has no name")?;
        prepare()?;
        let before = Snapshot::take()?;
        let running = start("visited", "wait")?;
        let mut guest = guest("visited")?;
        crate::support::send(running.launcher(), Signal::SIGKILL)?;
        crate::support::output_of(running.child)?;
        let until = Instant::now() + lab::patience(PATIENCE);
        while guest.try_wait()?.is_none() {
            ensure!(Instant::now() < until, "the foreign process lives on in an abandoned namespace");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_unchanged(&before, "after an abandoned tunnel")
    });
}

/// A peer answers only the interface with a key that it has heard last.
#[test]
fn a_private_key_of_two_tunnels_is_warned_about() {
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

#[test]
fn a_keeper_may_use_the_same_cpus_as_its_launcher() {
    lab::world::test(|| {
        prepare()?;
        let allowed = |pid: i32| -> Result<String> {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let line = status.lines().find(|line| line.starts_with("Cpus_allowed:"));
            Ok(line.context("the kernel lists the CPUs")?.to_owned())
        };
        let own = allowed(std::process::id().cast_signed())?;
        let running = start("all", "wait")?;
        assert_eq!(allowed(running.keeper())?, own);
        running.end()?;
        // A user's choice (taskset(1)) holds for the keeper as well.
        let mut one = CpuSet::new();
        one.set(sched_getcpu()?)?;
        sched_setaffinity(Pid::from_raw(0), &one)?;
        let running = start("one", "wait")?;
        assert_eq!(allowed(running.keeper())?, allowed(running.launcher())?);
        running.end()?;
        Ok(())
    });
}
