//! The end of the process, its privileges, repetitions, and what a container may lack.

use std::fs;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::process::Command;

use lab::launcher::{binary, errors_of, run};
use lab::{Context, Peer, Pod, Reach, Result, WEB};
use nix::sys::signal::Signal;
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::link::TargetNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::names::InterfaceName;

use crate::support::{Sidecar, WORKS, application, check, cluster, get, sidecar_runs, wait_until_up};

/// Returns the hexadecimal capability set of a thread.
fn capabilities(thread: &std::path::Path, set: &str) -> Result<u64> {
    let status = fs::read_to_string(thread.join("status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(set)).context("a set")?;
    Ok(u64::from_str_radix(line.trim_start_matches(':').trim(), 16)?)
}

#[test]
fn no_thread_keeps_a_capability_or_can_call_more_than_it_needs() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let sidecar = Sidecar::start(&pod, &lab.wg_quick_file(Reach::Ipv4)?, &[])?;
        wait_until_up(&pod)?;
        let threads = fs::read_dir(format!("/proc/{}/task", sidecar.pid()))?;
        let threads: Vec<_> = threads.collect::<std::io::Result<Vec<_>>>()?;
        assert!(threads.len() >= 2, "{threads:?}");
        for thread in threads {
            let path = thread.path();
            let name = fs::read_to_string(path.join("comm"))?;
            for set in ["CapPrm", "CapEff", "CapInh", "CapAmb"] {
                assert_eq!(capabilities(&path, set)?, 0, "{set} of {name}");
            }
            assert!(fs::read_to_string(path.join("status"))?.contains("Seccomp:\t2"), "{name}");
        }
        Ok(())
    });
}

#[test]
fn sigterm_ends_it_cleanly_and_opens_nothing() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            let sidecar = Sidecar::start(&pod, &lab.wg_quick_file(Reach::Ipv4)?, &[])?;
            wait_until_up(&pod)?;
            let (code, messages) = sidecar.end_by(signal)?;
            assert_eq!(code, Some(0), "{messages}");
            assert_eq!(check(&pod)?, ("closed".into(), Some(3)));
            let mut app = application(&pod)?;
            app.fail(&get(WEB.ipv4))?;
            app.fail(&get(WEB.ipv6))?;
            app.finish_well()?;
        }
        Ok(())
    });
}

/// Returns what the tunnel consists of in the pod, without counters.
fn state(pod: &Pod) -> Result<String> {
    let commands = [
        "nft -s list table inet vpn-exec",
        "ip rule",
        "ip -6 rule",
        "ip route show table 30309",
        "ip -6 route show table 30309",
        "ip -o address show dev wg0 scope global",
    ];
    let outputs = commands.map(|command| {
        let output = run(pod.sidecar(command.split(' ')))?;
        lab::ensure!(output.status.success(), "{command}: {}", errors_of(&output));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    });
    Ok(outputs.into_iter().collect::<Result<Vec<_>>>()?.join("\n"))
}

#[test]
fn attaching_again_gives_the_same_result() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let first = Sidecar::start(&pod, &file, &cluster())?;
        wait_until_up(&pod)?;
        let (before, resolvers) = (state(&pod)?, fs::read_to_string(&pod.resolv_conf)?);
        first.end_by(Signal::SIGKILL)?;
        // Another configuration, and the first one again.
        let other = lab.file(&fs::read_to_string(&file)?.replace("10.64.0.2/32", "10.64.0.2/24"))?;
        let second = Sidecar::start(&pod, &other, &["--local", "192.168.0.0/16", "--local", "fd99::/64"])?;
        wait_until_up(&pod)?;
        assert_ne!(state(&pod)?, before);
        second.end_by(Signal::SIGTERM)?;
        let _third = Sidecar::start(&pod, &file, &cluster())?;
        wait_until_up(&pod)?;
        assert_eq!(state(&pod)?, before);
        assert_eq!(fs::read_to_string(&pod.resolv_conf)?, resolvers);
        Ok(())
    });
}

#[test]
fn two_at_once_are_refused() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let _first = Sidecar::start(&pod, &file, &[])?;
        wait_until_up(&pod)?;
        let second = sidecar_runs(&pod, &["attach", file.to_str().context("a path")?, "--backend", lab::backend()])?;
        assert_eq!(second.status.code(), Some(125));
        // Both are processes of one container here.
        assert!(errors_of(&second).contains("has attached the tunnel"), "{}", errors_of(&second));
        let mut app = application(&pod)?;
        app.succeed_within(WORKS, &get(WEB.ipv4))?;
        app.finish_well().map(drop)
    });
}

#[test]
fn without_ipv6_in_the_namespace_it_goes_on_with_ipv4_and_says_so() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        pod.namespace.run(|| {
            vpn_exec::linux::sysctl::set("net/ipv6/conf/all/disable_ipv6", "1")?;
            vpn_exec::linux::sysctl::set("net/ipv6/conf/default/disable_ipv6", "1")
        })?;
        let sidecar = Sidecar::start(&pod, &lab.wg_quick_file(Reach::Ipv4)?, &[])?;
        wait_until_up(&pod)?;
        let mut app = application(&pod)?;
        app.succeed_within(WORKS, &get(WEB.ipv4))?;
        app.fail(&get(WEB.ipv6))?;
        app.finish_well()?;
        let (_, messages) = sidecar.end_by(Signal::SIGTERM)?;
        assert_eq!(messages.matches("IPv6 is switched off").count(), 1, "{messages}");
        Ok(())
    });
}

#[test]
fn each_missing_thing_is_named_with_the_line_to_add() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let words = [binary().to_str().context("a path")?, "attach", file.to_str().context("a path")?];
        let output = run(pod.application(words))?;
        assert_eq!(output.status.code(), Some(125));
        assert!(errors_of(&output).contains("capabilities: {add: [NET_ADMIN]}"), "{}", errors_of(&output));
        assert_eq!(check(&pod)?.0, "open", "nothing was changed");

        // Without the device, and with a file that is not the device.
        for make in ["true", "touch /dev/net/tun"] {
            let script = format!("mount -t tmpfs none /dev/net && {make} && exec \"$@\"");
            let mut command = Command::new("unshare");
            command.args(["-m", "sh", "-c", &script, "sh", "nsenter"]).arg(format!("--net={}", pod.path().display()));
            command.args(["setpriv", "--bounding-set=-all,+net_admin", "--inh-caps=-all"]).args(words);
            command.args(["--backend", "userspace"]);
            let output = run(command)?;
            assert_eq!(output.status.code(), Some(125));
            let errors = errors_of(&output);
            assert!(errors.contains("--device /dev/net/tun") && !errors.contains("as root"), "{errors}");
        }
        assert_eq!(check(&pod)?.0, "closed", "the namespace was closed first");
        Ok(())
    });
}

/// Docker connects a container to several networks, each with a namespace of its own at the other end (overlays).
#[test]
fn a_container_in_several_networks_is_no_machine() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let others = [NetworkNamespace::create(|| Ok(()))?.0, NetworkNamespace::create(|| Ok(()))?.0];
        pod.namespace.run(|| {
            let mut netlink = Netlink::open()?;
            for (number, other) in (1..).zip(&others) {
                let name: InterfaceName = format!("eth{number}").parse().map_err(std::io::Error::other)?;
                let inner = "inner".parse().map_err(std::io::Error::other)?;
                netlink.execute_one(NetlinkRequest::add_veth(&name, &inner, TargetNamespace::Other(other.as_fd())))?;
                let index = netlink.link_index(&name)?;
                let net = format!("10.99.{number}.2/24").parse().map_err(std::io::Error::other)?;
                netlink.execute_one(NetlinkRequest::add_address(index, name.as_str(), net))?;
                netlink.execute_one(NetlinkRequest::set_up(index, name.as_str()))?;
            }
            Ok(())
        })?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let _sidecar = Sidecar::start(&pod, &file, &[])?;
        wait_until_up(&pod)
    });
}

/// The machine's own network namespace is recognized by a parameter that no other has. It is not tried for real.
#[test]
fn a_container_is_told_from_the_machine() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let parameter = std::path::Path::new("/proc/sys/net/core/dev_weight");
        assert!(pod.namespace.run(|| Ok(!parameter.exists()))?);
        Ok(())
    });
}

#[test]
fn as_the_first_process_it_reaps_orphans_and_obeys_sigterm() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let words = [binary().to_str().context("a path")?, "attach", file.to_str().context("a path")?];
        // The shell leaves an orphan behind, and becomes vpn-exec.
        let script = "(sleep 1 & exit); exec \"$@\"";
        let pid1 = ["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh"];
        let mut command = pod.container("+all", pid1);
        command.args(["setpriv", "--bounding-set=-all,+net_admin", "--inh-caps=-all"]).args(words);
        command.args(["--backend", lab::backend()]);
        let mut child = command.stderr(std::process::Stdio::null()).spawn()?;
        let outer = child.id().cast_signed();
        wait_until_up_by_handshake(&pod)?;
        let first = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children"))?;
        let first: i32 = first.split_whitespace().next().context("the first process")?.parse()?;
        // Its only child is the orphan, which is gone once it was reaped.
        let children = format!("/proc/{first}/task/{first}/children");
        lab::wait_until(lab::patience(WORKS), "the orphan is not reaped", || {
            Ok(fs::read_to_string(&children)?.trim().is_empty())
        })?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(first), Signal::SIGTERM)?;
        assert_eq!(lab::launcher::wait_for_end(&mut child)?.code(), Some(0));
        assert_eq!(check(&pod)?, ("closed".into(), Some(3)));
        Ok(())
    });
}

/// Waits until the application reaches the Internet. A check from outside of the PID namespace would not be answered.
fn wait_until_up_by_handshake(pod: &Pod) -> Result<()> {
    let mut app = application(pod)?;
    lab::wait_until(lab::patience(WORKS), "the pod is not closed", || Ok(check(pod)?.0 != "open"))?;
    app.succeed_within(WORKS, &get(WEB.ipv4))?;
    app.finish_well().map(drop)
}

/// A process that was killed before the namespace was closed leaves the rest to the next one.
#[test]
fn connections_from_before_are_ended_after_a_kill_while_closing() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let former = pod.namespace.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect((WEB.ipv4, 7777))?;
            Ok(socket)
        })?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let words = [binary().to_str().context("a path")?, "attach", file.to_str().context("a path")?, "--closed"];
        let mut killed = pod.sidecar(words);
        killed.env("VPN_EXEC_TEST_FAIL", "kill:after the attached rules");
        assert!(!run(killed)?.status.success(), "it was not killed");
        assert!(former.peer_addr().is_ok(), "the connection was not ended before");
        let output = run(pod.sidecar(words))?;
        assert!(output.status.success(), "{}", errors_of(&output));
        assert!(former.peer_addr().is_err() || former.take_error()?.is_some(), "the connection goes on");
        Ok(())
    });
}
