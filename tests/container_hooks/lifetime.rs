//! When a container's tunnel begins and ends, and what is left after crashes.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{PROVIDER, Peer, Pod, ROUTER, Reach, TUNNEL_CLIENT, vpn_exec};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vpn_exec::fault;
use vpn_exec::linux::netlink::Netlink;
use vpn_exec::registry;

use crate::support::{
    Container, NAME, PATIENCE, furnish, hook, refused, require_closed, require_no_leaks, require_nothing_left,
    require_tunnel, status, succeed, test,
};

#[test]
fn a_container_has_the_tunnel_of_its_annotation_as_long_as_it_runs() {
    test(|lab, pod| {
        let container = Container::start(pod, "c1")?;
        succeed(container.create(NAME)?)?;
        require_tunnel(pod)?;
        let status = status()?;
        ensure!(status["container"]["id"] == "c1" && status["container"]["pid"] == container.init.id(), "{status}");
        ensure!(status["link"].is_null() && status["standing"] == true, "{status}");
        let listed = succeed(vpn_exec(["list"]).output()?)?;
        ensure!(listed.contains("CONTAINER") && listed.contains("c1"), "{listed}");
        let addresses = pod.namespace.run(|| Netlink::open()?.addresses())?;
        ensure!(addresses.iter().any(|(_, net)| net.addr() == TUNNEL_CLIENT.ipv6), "{addresses:?}");

        let first = container.poststop()?;
        succeed(first)?;
        require_nothing_left()?;
        succeed(container.poststop()?)?;
        require_closed(lab, pod)?;
        container.end()
    });
}

#[test]
fn a_tunnel_ends_with_its_container_also_if_the_runtime_crashes() {
    test(|lab, pod| {
        let container = Container::start(pod, "c1")?;
        succeed(container.create(NAME)?)?;
        require_tunnel(pod)?;
        container.end()?;
        require_nothing_left()?;
        require_closed(lab, pod)?;
        // The next container in the same namespace gets the tunnel again.
        let next = Container::start(pod, "c2")?;
        succeed(next.create(NAME)?)?;
        require_tunnel(pod)?;
        next.end()?;
        require_nothing_left()?;
        require_no_leaks(lab)
    });
}

#[test]
fn a_tunnel_serves_one_container_and_nothing_else() {
    test(|lab, pod| {
        let (mut container, second) = (Container::start(pod, "c1")?, Container::start(pod, "c2")?);
        succeed(container.create(NAME)?)?;
        refused(&second.create(NAME)?, "the tunnel pods serves the container c1")?;
        refused(&vpn_exec([NAME, "--", "true"]).output()?, "serves the container c1")?;
        refused(&vpn_exec(["up", NAME]).output()?, "serves the container c1")?;
        refused(&vpn_exec(["down", NAME]).output()?, "the container c1 is running in the tunnel pods")?;
        require_tunnel(pod)?;
        succeed(second.poststop()?)?;
        require_tunnel(pod)?;
        succeed(vpn_exec(["down", NAME, "--force"]).output()?)?;
        require_nothing_left()?;
        ensure!(container.is_running()?, "the keeper must not kill a container's processes");
        require_closed(lab, pod)?;
        // A tunnel of this machine's own programs has the key as well.
        succeed(vpn_exec(["up", NAME]).output()?)?;
        refused(&second.create(NAME)?, "is up for programs of this machine")?;
        succeed(vpn_exec(["down", NAME]).output()?)?;
        container.end()?;
        second.end()
    });
}

#[test]
fn a_killed_keeper_leaves_the_container_closed_until_another_takes_over() {
    test(|lab, pod| {
        let mut container = Container::start(pod, "c1")?;
        succeed(container.create(NAME)?)?;
        require_tunnel(pod)?;
        let keeper = registry::read(&NAME.parse()?)?.context("a state")?.keeper.cast_signed();
        kill(Pid::from_raw(keeper), Signal::SIGKILL)?;
        if lab::backend() == "kernel" {
            // The kernel's WireGuard needs no process.
            require_tunnel(pod)?;
            require_no_leaks(lab)?;
        } else {
            require_closed(lab, pod)?;
        }
        ensure!(status()?["container"]["id"] == "c1", "the container is known without a keeper");
        refused(&vpn_exec(["down", NAME]).output()?, "the container c1 is running in the tunnel pods")?;
        succeed(vpn_exec(["up", NAME]).output()?)?;
        require_tunnel(pod)?;
        ensure!(container.is_running()?, "a successor leaves the container alone");
        succeed(vpn_exec(["reload", NAME]).output()?)?;
        require_tunnel(pod)?;

        // Killed again, and the container ends before anything else happens.
        let keeper = registry::read(&NAME.parse()?)?.context("a state")?.keeper.cast_signed();
        kill(Pid::from_raw(keeper), Signal::SIGKILL)?;
        let id = container.id;
        container.end()?;
        let next = Container { id, ..Container::start(pod, "c2")? };
        succeed(next.create(NAME)?)?;
        require_tunnel(pod)?;
        // Killed once more: poststop removes what is left.
        let keeper = registry::read(&NAME.parse()?)?.context("a state")?.keeper.cast_signed();
        kill(Pid::from_raw(keeper), Signal::SIGKILL)?;
        succeed(next.poststop()?)?;
        require_nothing_left()?;
        require_closed(lab, pod)?;
        next.end()
    });
}

/// The plan knows no route to an endpoint that is a name, but the keeper does.
#[test]
fn a_reload_keeps_the_mtu_that_fits_the_path() {
    test(|lab, pod| {
        for (to, by) in PROVIDER.both().into_iter().zip(ROUTER.both()) {
            let narrow = lab.host.run(|| {
                let [to, by] = [to.to_string(), by.to_string()];
                Command::new("ip").args(["route", "add", &to, "via", &by, "mtu", "1400"]).status()
            })?;
            ensure!(narrow.success(), "{narrow}");
        }
        let profile = format!("/etc/vpn-exec/{NAME}.toml");
        let file = lab.wg_quick_file(Reach::Name)?;
        let text = format!("wireguard = \"{}\"\nbackend = \"{}\"\n", file.display(), lab::backend());
        fs::write(&profile, format!("{text}containers = true\n"))?;
        let container = Container::start(pod, "c1")?;
        succeed(container.create(NAME)?)?;
        let interface = vpn_exec::plan::shared_namespace::interface();
        let mtu = || -> Result<u32> {
            let link = pod.namespace.run(|| Netlink::open()?.link(interface.as_str()))?;
            Ok(link.context("an interface")?.mtu)
        };
        lab::wait_until(lab::patience(PATIENCE), "the MTU does not follow the route", || Ok(mtu()? == 1320))?;
        require_tunnel(pod)?;
        fs::write(&profile, format!("{text}open = [\"51413\"]\n"))?;
        let changes = succeed(vpn_exec(["reload", NAME]).output()?)?;
        ensure!(changes.contains("51413") && mtu()? == 1320, "{}: {changes}", mtu()?);
        require_tunnel(pod)?;
        container.end()
    });
}

#[test]
fn nothing_is_left_after_a_failure_or_a_kill_at_any_step() {
    lab::test_within(Duration::from_secs(300), Peer::Ours, |lab| {
        furnish(lab)?;
        let pod = Pod::start(lab)?;
        for point in fault::SET_UP {
            for fault in [point.to_owned(), format!("kill:{point}")] {
                let container = Container::start(&pod, "c1")?;
                let environment = [("VPN_EXEC_TEST_FAIL", fault.as_str())];
                let output = hook(&["createRuntime"], &container.state(Some(NAME)), &environment)?;
                ensure!(!output.status.success(), "{fault}: the container would start");
                require_nothing_left().context(fault.clone())?;
                // Its name is free, also for the same namespace.
                succeed(container.create(NAME)?).context(fault.clone())?;
                require_tunnel(&pod).context(fault)?;
                container.end()?;
                require_nothing_left()?;
            }
        }
        require_no_leaks(lab)
    });
}

#[test]
fn poststop_completes_the_end_that_a_killed_keeper_has_begun() {
    test(|lab, pod| {
        for point in fault::TAKE_DOWN {
            let container = Container::start(pod, "c1")?;
            let fault = format!("kill:{point}");
            let environment = [("VPN_EXEC_TEST_FAIL", fault.as_str())];
            succeed(hook(&["createRuntime"], &container.state(Some(NAME)), &environment)?)?;
            require_tunnel(pod)?;
            succeed(container.poststop()?).context(fault.clone())?;
            require_nothing_left().context(fault)?;
            container.end()?;
        }
        require_closed(lab, pod)
    });
}

/// A dead provider must not keep the engine waiting: its patience with hooks is limited.
#[test]
fn a_container_starts_closed_if_the_provider_does_not_answer() {
    test(|lab, pod| {
        lab.provider.stop()?;
        let container = Container::start(pod, "c1")?;
        succeed(container.create(NAME)?)?;
        ensure!(status()?["state"] == "connecting");
        require_closed(lab, pod)?;
        container.end()?;
        require_nothing_left()
    });
}
