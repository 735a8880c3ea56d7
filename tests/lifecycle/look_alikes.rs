//! Objects that only look like a tunnel's are never touched: the mark alone identifies a tunnel's objects.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use anyhow::{Context, Result};
use lab::Snapshot;
use vpn_exec::linux::mounts;
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::link::TargetNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::linux::process;

use crate::support::{
    assert_refused, assert_unchanged, doing, ended, errors, is_there, prepare, run, send, start, vpn_exec,
};

/// Creates `/run/netns` as ip-netns(8) does.
pub(crate) fn make_names() -> Result<()> {
    fs::create_dir("/run/netns")?;
    rustix::mount::mount_bind("/run/netns", "/run/netns")?;
    Ok(rustix::mount::mount_change("/run/netns", rustix::mount::MountPropagationFlags::SHARED)?)
}

/// Names a namespace as ip-netns(8) does.
fn name(namespace: &NetworkNamespace, name: &str) -> Result<()> {
    let path = Path::new("/run/netns").join(name);
    fs::File::create_new(&path)?;
    Ok(rustix::mount::mount_bind(format!("/proc/self/fd/{}", namespace.as_fd().as_raw_fd()), &path)?)
}

fn with_alias_of_lo(alias: &str) -> Result<NetworkNamespace> {
    let (namespace, ()) = NetworkNamespace::create(|| {
        let mut netlink = Netlink::open()?;
        Ok(netlink.execute(vec![NetlinkRequest::set_alias(1, "lo", alias), NetlinkRequest::set_up(1, "lo")])?)
    })?;
    Ok(namespace)
}

fn forge_state(name: &str, mark: &str, namespace: &NetworkNamespace, wrong_by: u64) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let found = fs::metadata(format!("/proc/self/fd/{}", namespace.as_fd().as_raw_fd()))?;
    let directory = Path::new("/run/vpn-exec").join(name);
    fs::create_dir_all(&directory)?;
    let state = serde_json::json!({
        "mark": mark,
        "namespace": { "device": found.dev(), "inode": found.ino() + wrong_by },
        "keeper": std::process::id(),
        "made": null,
        "standing": false,
        "holders": [],
    });
    fs::write(directory.join("state"), state.to_string())?;
    // vpn-exec must be able to read the state, or the test would prove nothing.
    vpn_exec::registry::read(&name.parse()?)?.context("a forged state that can be read")?;
    Ok(())
}

#[test]
fn a_foreign_namespace_of_the_same_name_is_not_touched() {
    lab::world::test(|| {
        lab::tunnel::needs_root("the namespace of a rootless tunnel has no name")?;
        prepare()?;
        make_names()?;
        let (foreign, ()) = NetworkNamespace::create(|| Ok(()))?;
        name(&foreign, "taken")?;
        let before = Snapshot::take()?;
        let message = assert_refused(&run(vpn_exec("taken", "exit 0"))?);
        assert!(message.contains("/run/netns/taken") && message.contains("already exists"), "{message}");
        assert_unchanged(&before, "after the refusal")
    });
}

#[test]
fn a_forged_state_does_not_expose_a_foreign_namespace() {
    lab::world::test(|| {
        lab::tunnel::needs_root("the namespace of a rootless tunnel has no name")?;
        prepare()?;
        make_names()?;
        let mark = format!("vpn-exec:taken:{}", "0123456789abcdef".repeat(2));
        for (alias, wrong_by, what) in [
            ("vpn-exec:taken:another", 0, "the right namespace with another mark"),
            ("", 0, "the right namespace without a mark"),
            (mark.as_str(), 1, "the right mark in another namespace"),
        ] {
            let foreign = with_alias_of_lo(alias)?;
            name(&foreign, "taken")?;
            let mut occupant = foreign.run(|| lab::agent::task_on_host("wait").spawn())?;
            let before = Snapshot::take()?;
            forge_state("taken", &mark, &foreign, wrong_by)?;
            let message = assert_refused(&run(vpn_exec("taken", "exit 0"))?);
            assert!(message.contains("already exists"), "{what}: {message}");
            assert!(occupant.try_wait()?.is_none(), "{what}: a process inside was killed");
            assert_unchanged(&before, what)?;

            occupant.kill()?;
            occupant.wait()?;
            vpn_exec::linux::namespace::remove_name("/run/netns/taken".as_ref())?;
        }
        // The twin: a namespace with the complete mark is removed.
        let ours = with_alias_of_lo(&mark)?;
        name(&ours, "taken")?;
        forge_state("taken", &mark, &ours, 0)?;
        let output = run(vpn_exec("taken", "exit 0"))?;
        assert_eq!(ended(output.status), Ok(0), "{}", errors(&output));
        assert!(!is_there("/run/netns/taken"));
        Ok(())
    });
}

#[test]
fn a_foreign_file_or_link_of_the_same_name_is_not_touched() {
    lab::world::test(|| {
        lab::tunnel::needs_root("the namespace of a rootless tunnel has no name")?;
        prepare()?;
        make_names()?;
        fs::write("/run/lab/target", "foreign")?;
        type Plant = fn() -> std::io::Result<()>;
        let plant: [(&str, Plant); 4] = [
            ("a file", || fs::write("/run/netns/taken", "foreign")),
            ("an empty file, as ip-netns(8) makes it first", || fs::write("/run/netns/taken", "")),
            ("a symbolic link", || std::os::unix::fs::symlink("/run/lab/target", "/run/netns/taken")),
            ("a symbolic link to nowhere", || std::os::unix::fs::symlink("/run/lab/none", "/run/netns/taken")),
        ];
        for (what, plant) in plant {
            plant()?;
            let before = Snapshot::take()?;
            let message = assert_refused(&run(vpn_exec("taken", "exit 0"))?);
            assert!(message.contains("/run/netns/taken"), "{what}: {message}");
            assert_unchanged(&before, what)?;
            fs::remove_file("/run/netns/taken")?;
        }
        Ok(())
    });
}

fn add_veth(name: &str, peer: &str) -> Result<u32> {
    let mut netlink = Netlink::open()?;
    netlink.execute_one(NetlinkRequest::add_veth(&name.parse()?, &peer.parse()?, TargetNamespace::Current))?;
    Ok(netlink.link_index(&name.parse()?)?)
}

/// Creates objects whose names and marks are similar to those of a tunnel `tune`.
pub(crate) fn plant_neighbours(suffix: &str) -> Result<()> {
    let (foreign, ()) = NetworkNamespace::create(|| Ok(()))?;
    for similar in ["tun", "tune1", "tune.", "tune:", "Tune"] {
        name(&foreign, &format!("{similar}{suffix}"))?;
    }
    fs::write(format!("/run/netns/tun-{suffix}.file"), "foreign")?;
    fs::create_dir_all(format!("/run/vpn-exec/other{suffix}"))?;
    fs::write(format!("/run/vpn-exec/other{suffix}/state"), "foreign")?;
    fs::create_dir_all(format!("/run/lab/mounts{suffix}/vpn-exec/tune"))?;
    mounts::mount_tmpfs(format!("/run/lab/mounts{suffix}/vpn-exec/tune").as_ref())?;
    lab::nat::add_table(&format!("vpn-exec-tune{suffix}"))?;
    // A veth of the same name, one with another tunnel's mark, one whose mark only has the same beginning.
    let veths =
        [("ve-tune", ""), ("ve-tun", "vpn-exec:tun:1"), ("ve-tunes", "vpn-exec:tunes:1"), ("ve-x", "vpn-exec:tune")];
    for (number, (veth, alias)) in veths.into_iter().enumerate() {
        let veth = if suffix.is_empty() { veth.to_owned() } else { format!("{veth}{suffix}") };
        let index = add_veth(&veth, &format!("p{number}{suffix}"))?;
        Netlink::open()?.execute_one(NetlinkRequest::set_alias(index, &veth, alias))?;
    }
    Ok(())
}

#[test]
fn objects_with_similar_names_are_not_touched() {
    lab::world::test(|| {
        lab::tunnel::needs_root("a rootless tunnel has no link to the host")?;
        prepare()?;
        make_names()?;
        plant_neighbours("")?;
        let before = Snapshot::take()?;
        let running = start("tune", "wait")?;
        assert_ne!(running.host_link()?.name, "ve-tune", "that is somebody's");
        let output = running.end()?;
        assert_eq!(ended(output.status), Err(nix::sys::signal::Signal::SIGTERM), "{}", errors(&output));
        assert_unchanged(&before, "after a tunnel")?;

        // Also after a kill, when the next start must identify the tunnel's objects.
        let running = start("tune", "daemon")?;
        for victim in [running.launcher(), running.keeper()] {
            send(victim, nix::sys::signal::Signal::SIGKILL)?;
        }
        crate::support::output_of(running.child)?;
        assert_eq!(ended(run(vpn_exec("tune", "exit 0"))?.status), Ok(0));
        assert!(doing("daemonized")?.is_empty());
        assert_unchanged(&before, "after a killed tunnel")
    });
}

#[test]
fn objects_that_appear_while_a_tunnel_is_up_are_not_touched() {
    lab::world::test(|| {
        prepare()?;
        make_names()?;
        // The expected state: the same objects without a tunnel.
        let running = start("tune", "wait")?;
        let with_tunnel = Snapshot::take()?;
        plant_neighbours("2")?;
        let planted = with_tunnel.changes_to(&Snapshot::take()?);
        running.end()?;

        let without = Snapshot::take()?;
        let names = |lines: &[String]| -> Vec<String> { lines.iter().map(|line| line[2..].to_owned()).collect() };
        let there = format!("{without:?}");
        let gone: Vec<String> = names(&planted)
            .into_iter()
            .filter(|line| !line.starts_with("link: ") && !there.lines().any(|other| other == line))
            .collect();
        assert!(gone.is_empty(), "{gone:#?}");
        for link in ["ve-tune2", "ve-tun2", "ve-tunes2", "ve-x2"] {
            assert!(Netlink::open()?.link(link)?.is_some(), "{link}");
        }
        Ok(())
    });
}

#[test]
fn a_process_that_takes_over_the_name_keeps_it() {
    lab::world::test(|| {
        prepare()?;
        make_names()?;
        let running = start("taken", "wait")?;
        vpn_exec::linux::namespace::remove_name("/run/netns/taken".as_ref())?;
        let (foreign, ()) = NetworkNamespace::create(|| Ok(()))?;
        name(&foreign, "taken")?;
        running.end()?;
        let vpn_exec::linux::namespace::NameLookup::Namespace(there) =
            vpn_exec::linux::namespace::look_up("/run/netns/taken".as_ref())?
        else {
            anyhow::bail!("the name is gone")
        };
        assert_eq!(there.id()?, foreign.id()?);
        assert!(process::in_namespace(foreign.id()?)?.is_empty());
        Ok(())
    });
}
