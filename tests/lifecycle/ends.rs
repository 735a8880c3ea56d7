//! The state of the host while a tunnel is up, and after each way in which it ends.

use std::os::unix::fs::PermissionsExt;

use lab::Snapshot;
use nix::sys::signal::Signal;
use vpn_exec::linux::netlink::Netlink;

use crate::support::{
    assert_none_soon, assert_refused, assert_unchanged, ended, errors, launcher, output_of, prepare, run, send, start,
    vpn_exec, with_pipes,
};

#[test]
fn the_host_is_unchanged_however_the_program_ends() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        for (task, expected) in [
            ("exit 0", Ok(0)),
            ("exit 3", Ok(3)),
            ("die-by 15", Err(Signal::SIGTERM)),
            ("die-by 9", Err(Signal::SIGKILL)),
            ("die-by 6", Err(Signal::SIGABRT)),
        ] {
            let output = run(vpn_exec("ends", task))?;
            assert_eq!(ended(output.status), expected, "{task}: {}", errors(&output));
            assert_unchanged(&before, format_args!("after a program's {task:?}"))?;
        }
        Ok(())
    });
}

#[test]
fn the_host_is_unchanged_if_the_program_cannot_be_executed() {
    lab::world::test(|| {
        prepare()?;
        std::fs::write("/run/lab/script", "#!/no/such/interpreter\n")?;
        std::fs::write("/run/lab/data", "no program\n")?;
        std::fs::set_permissions("/run/lab/script", PermissionsExt::from_mode(0o755))?;
        let before = Snapshot::take()?;
        for (program, expected) in [
            ("no-such-program", 127),
            ("/no/such/program", 127),
            ("/run/lab/script", 127),
            ("/run/lab/data", 126),
            ("/run", 126),
        ] {
            // An unsearchable folder in PATH would turn "not found" into "not permitted" (execvp(3)).
            let launcher = launcher("ends").program([program]).env("PATH", "/usr/bin:/bin");
            let output = run(with_pipes(launcher))?;
            assert_eq!(ended(output.status), Ok(expected), "{program}: {}", errors(&output));
            assert!(errors(&output).contains(program), "{program}: {}", errors(&output));
            assert_unchanged(&before, program)?;
        }
        Ok(())
    });
}

#[test]
fn signals_to_vpn_exec_end_the_program_and_the_tunnel() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            let running = start("ends", "wait")?;
            send(running.launcher(), signal)?;
            assert_eq!(ended(output_of(running.child)?.status), Err(signal));
            assert_unchanged(&before, signal)?;
        }
        Ok(())
    });
}

#[test]
fn removing_the_wireguard_interface_ends_the_program_and_the_tunnel() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        let running = start("ends", "daemon")?;
        // A privileged process inside removes the WireGuard interface.
        let inside = lab::tunnel::namespace("ends")?;
        inside.run(|| {
            let mut netlink = Netlink::open()?;
            let index = netlink.link_index(&"wg0".parse().map_err(std::io::Error::other)?)?;
            Ok(netlink.execute_one(vpn_exec::linux::netlink::NetlinkRequest::delete_link(index, "wg0"))?)
        })?;
        drop(inside);
        let output = output_of(running.child)?;
        assert!(assert_refused(&output).contains("WireGuard"), "{}", errors(&output));
        assert_none_soon(&["daemon", "daemonized"], "after the loss of the device")?;
        assert_unchanged(&before, "after the loss of the device")
    });
}

#[test]
fn a_running_tunnel_changes_only_its_own_objects() {
    lab::world::test(|| {
        lab::tunnel::needs_root("a rootless tunnel has no link to the host")?;
        prepare()?;
        let before = Snapshot::take()?;
        let running = start("differ", "wait")?;
        let during = Snapshot::take()?;
        let link = running.host_link()?;
        assert_eq!(link.name, "ve-differ");
        let index = link.index;

        let own = |change: &str| -> bool {
            let Some((section, what)) = change.strip_prefix("+ ").and_then(|new| new.split_once(": ")) else {
                return false;
            };
            match section {
                "link" => what.starts_with("ve-differ "),
                "address" => what.contains(&format!("index: {index} }}, attributes")),
                "route" => what.contains(&format!("Oif({index})")),
                "sysctl" => ["ipv4/conf", "ipv4/neigh", "ipv6/conf", "ipv6/neigh"]
                    .iter()
                    .any(|place| what.starts_with(&format!("/proc/sys/net/{place}/ve-differ"))),
                "mount" => what.contains(" /run/netns ") || what.contains(" /run/netns/differ "),
                "run" => ["/run/netns", "/run/vpn-exec"].iter().any(|directory| what.starts_with(directory)),
                "program" => ["vpn-exec", "lab-agent"].contains(&what),
                _ => false,
            }
        };
        let changes = before.changes_to(&during);
        let foreign: Vec<&String> = changes.iter().filter(|change| !own(change)).collect();
        assert!(foreign.is_empty(), "{foreign:#?}");
        // The snapshots differ at all.
        for section in ["link", "address", "route", "sysctl", "mount", "run", "program"] {
            assert!(changes.iter().any(|change| change.starts_with(&format!("+ {section}: "))), "{section}");
        }
        running.end()?;
        assert_unchanged(&before, "at the end")
    });
}

#[test]
fn a_refused_configuration_changes_nothing() {
    lab::world::test(|| {
        prepare()?;
        crate::support::write_config("[Interface]\n")?;
        let before = Snapshot::take()?;
        let output = run(vpn_exec("ends", "exit 0"))?;
        assert_eq!(ended(output.status), Ok(125), "{}", errors(&output));
        assert_eq!(before.changes_to(&Snapshot::take()?), Vec::<String>::new());
        Ok(())
    });
}
