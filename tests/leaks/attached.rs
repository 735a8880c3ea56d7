//! A pod with a tunnel in its own namespace (`vpn-exec attach`), seen from the application's container. The host that
//! the judge watches is the pod's: all of the pod's packets pass its interface `pod0`.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::slice::from_mut;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::launcher::{binary, stdout};
use lab::stamp::Protection;
use lab::{CLUSTER_SERVICE, Lab, PRIVATE_LAN, PROVIDER, Peer, Pod, Reach, TUNNEL_CLIENT, WEB, variables};
use nix::sys::signal::Signal;
use vpn_exec::fault;
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::link::TargetNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};

use crate::judge::{Judge, Verdict};
use crate::stages::{NONE, SOON, judged, send, wait_until};
use crate::vectors::Vector;

/// A time after which a handshake is stale.
const STALE: Duration = Duration::from_secs(137);

/// Returns whether a vector applies to a container. Its files are the image's, and it inherits no descriptors.
fn applies(vector: &Vector) -> bool {
    use Protection::{Library, Namespace, Privileges, Rules};

    matches!(vector.protection, Namespace | Rules | Library | Privileges)
}

/// Returns whether a vector leaves a pod without a tunnel. The host's loopback addresses and abstract sockets are not
/// in reach of another network namespace.
fn leaves_a_pod(vector: &Vector) -> bool {
    applies(vector) && !vector.name.ends_with("-stub") && vector.name != "abstract"
}

/// Returns a command line of vpn-exec in the sidecar's container.
fn in_sidecar(pod: &Pod, words: &[&str]) -> Command {
    let mut command = pod.sidecar([binary()]);
    command.args(words).stdin(Stdio::null());
    command
}

/// Returns the command line that attaches the tunnel of a file.
fn attach(pod: &Pod, file: &Path, options: &[&str]) -> Command {
    let mut command = in_sidecar(pod, &["attach"]);
    command.arg(file).args(["--backend", "userspace"]).args(options);
    command
}

fn start_sidecar(pod: &Pod, file: &Path, options: &[&str]) -> Result<Child> {
    let sidecar = attach(pod, file, options).spawn().context("cannot start the sidecar")?;
    wait_until("the sidecar is up", || Ok(in_sidecar(pod, &["attach", "--check"]).output()?.status.success()))?;
    Ok(sidecar)
}

fn end(mut sidecar: Child, signal: Signal) -> Result<()> {
    send(sidecar.id().cast_signed(), signal)?;
    sidecar.wait()?;
    Ok(())
}

/// Makes a pod whose namespace is closed before the application starts, as by a first init container.
fn closed_pod(lab: &Lab, file: &Path) -> Result<(Pod, Agent)> {
    let pod = Pod::start(lab)?;
    stdout(attach(&pod, file, &["--closed"]))?;
    let mut command = pod.application(["env"]);
    let application = Agent::start(command.env(variables::STAGE, "closed"))?.begun()?;
    Ok((pod, application))
}

/// Judges a pod from its closed namespace over the tunnel's life to the sidecar's end.
fn judge_pod(lab: &Lab, judge: &Judge<'_>) -> Result<Vec<Verdict>> {
    lab.join_private_lan()?;
    let file = lab.wg_quick_file(Reach::Ipv4)?;
    let (pod, mut application) = closed_pod(lab, &file)?;
    let mut verdicts = Vec::new();
    let mut stage = |application: &mut Agent, name: &str| -> Result<()> {
        verdicts.push(judged(from_mut(application), judge, name, NONE)?);
        Ok(())
    };
    stage(&mut application, "closed")?;
    let sidecar = start_sidecar(&pod, &file, &[])?;
    stage(&mut application, "up")?;
    lab.provider.stop()?;
    stage(&mut application, "provider-dead")?;
    end(sidecar, Signal::SIGKILL)?;
    stage(&mut application, "killed")?;
    lab.provider.restart()?;
    let sidecar = start_sidecar(&pod, &file, &[])?;
    stage(&mut application, "restarted")?;
    end(sidecar, Signal::SIGTERM)?;
    stage(&mut application, "ended")?;

    // One local network with no resolver of the tunnel, and the cluster's.
    let networks = ["--local", "192.168.7.0/24", "--local", "fd07::/64", "--local", "10.43.0.0/24"];
    let sidecar = start_sidecar(&pod, &file, &networks)?;
    stage(&mut application, "local-networks")?;
    for address in [PRIVATE_LAN.ipv4, CLUSTER_SERVICE.ipv4] {
        application.succeed(&format!("get http://{address}/"))?;
    }
    std::thread::sleep(lab::patience(SOON));
    lab.capture.forget()?;
    stage(&mut application, "still-local-networks")?;
    end(sidecar, Signal::SIGKILL)?;

    let text = lab.wg_quick_text(Reach::Ipv4).replace(&format!(", {}/128", TUNNEL_CLIENT.ipv6), "");
    let sidecar = start_sidecar(&pod, &lab.file(&text)?, &[])?;
    stage(&mut application, "without-ipv6-addresses")?;
    end(sidecar, Signal::SIGKILL)?;

    // The sidecar looks the provider's name up again and again, past the tunnel.
    let mut sidecar = attach(&pod, &lab.wg_quick_file(Reach::Name)?, &[]).spawn()?;
    stage(&mut application, "endpoint-unresolved")?;
    sidecar.kill()?;
    sidecar.wait()?;

    application.finish()?;
    Ok(verdicts)
}

#[test]
fn a_pod_with_an_attached_tunnel_leaks_nothing_in_any_stage() {
    lab::test(Peer::Ours, |lab| {
        let judge = Judge::of_network(lab)?;
        for verdict in judge_pod(lab, &judge)? {
            verdict.expect_no_leak_by(applies)?;
        }
        assert!(lab.web.clients().contains(&PROVIDER.both()[0]), "no request reached the server through the tunnel");
        Ok(())
    });
}

/// Judges the application while the sidecar is stopped at each point of its start.
#[test]
fn nothing_leaks_at_any_point_of_attaching() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let judge = Judge::of_network(lab)?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let pod = Pod::start(lab)?;
        let sidecar = attach(&pod, &file, &["--local", "192.168.7.0/24"]).env(variables::FAIL, "stop").spawn()?;
        let pid = sidecar.id().cast_signed();
        // No application runs before the first point: it would not be in a closed namespace.
        let mut application = None;
        for point in fault::ATTACHING {
            wait_until(&format!("the sidecar stops at {point:?}"), || is_stopped(pid))?;
            let stage = point.replace(' ', "-");
            if application.is_none() {
                let mut command = pod.application(["env"]);
                application = Some(Agent::start(command.env(variables::STAGE, &stage))?.begun()?);
            }
            let application = application.as_mut().context("the application runs")?;
            judged(from_mut(application), &judge, &stage, NONE)?.expect_no_leak_by(applies)?;
            send(pid, Signal::SIGCONT)?;
        }
        let application = application.context("the application runs")?;
        end(sidecar, Signal::SIGKILL)?;
        application.finish()?;
        Ok(())
    });
}

/// Kills the first sidecar of a pod at a point of its start. Judges the application then, and while the next sidecar
/// starts and runs.
fn nothing_leaks_after_a_kill(point: &str) {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let judge = Judge::of_network(lab)?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let pod = Pod::start(lab)?;
        let mut sidecar = attach(&pod, &file, &[]).env(variables::FAIL, format!("kill:{point}")).spawn()?;
        ensure!(sidecar.wait()?.signal() == Some(Signal::SIGKILL as i32), "it was not killed {point}");
        let mut command = pod.application(["env"]);
        let mut application = Agent::start(command.env(variables::STAGE, "killed"))?.begun()?;
        judged(from_mut(&mut application), &judge, "killed", NONE)?.expect_no_leak_by(applies)?;
        let sidecar = start_sidecar(&pod, &file, &[])?;
        judged(from_mut(&mut application), &judge, "restarted", NONE)?.expect_no_leak_by(applies)?;
        end(sidecar, Signal::SIGTERM)?;
        application.finish()?;
        Ok(())
    });
}

#[test]
fn nothing_leaks_after_a_kill_with_the_rules_loaded() {
    nothing_leaks_after_a_kill("after the attached rules");
}

#[test]
fn nothing_leaks_after_a_kill_with_the_namespace_closed() {
    nothing_leaks_after_a_kill("after closing the namespace");
}

#[test]
fn nothing_leaks_after_a_kill_with_a_device() {
    nothing_leaks_after_a_kill("after the attached device");
}

#[test]
fn nothing_leaks_after_a_kill_with_routes() {
    nothing_leaks_after_a_kill("after the attached routes");
}

#[test]
fn nothing_leaks_after_a_kill_with_resolvers() {
    nothing_leaks_after_a_kill("after the resolvers");
}

fn is_stopped(pid: i32) -> Result<bool> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    Ok(stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')))
}

/// With the kernel's WireGuard, no process stays: an init container is enough.
#[test]
fn an_init_container_with_the_kernels_wireguard_leaks_nothing() {
    lab::test(Peer::Ours, |lab| {
        require_kernel_wireguard()?;
        lab.join_private_lan()?;
        let judge = Judge::of_network(lab)?;
        let pod = Pod::start(lab)?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let mut init = in_sidecar(&pod, &["attach"]);
        init.arg(&file).args(["--backend", "kernel", "--local", "192.168.7.0/24"]);
        stdout(init)?;
        let mut command = pod.application(["env"]);
        let mut application = Agent::start(command.env(variables::STAGE, "kernel"))?.begun()?;
        judged(from_mut(&mut application), &judge, "kernel", NONE)?.expect_no_leak_by(applies)?;
        assert_eq!(application.succeed(&format!("get http://{}/", WEB.ipv4))?, PROVIDER.ipv4.to_string());
        assert_eq!(application.succeed(&format!("get http://[{}]/", WEB.ipv6))?, PROVIDER.ipv6.to_string());
        stdout(in_sidecar(&pod, &["attach", "--check"]))?;
        lab.provider.stop()?;
        judged(from_mut(&mut application), &judge, "kernel-provider-dead", NONE)?.expect_no_leak_by(applies)?;
        application.finish()?;
        Ok(())
    });
}

/// WireGuard makes no handshake while a tunnel is idle, unless a check starts one.
#[test]
fn an_init_container_stays_up_while_its_tunnel_is_idle() {
    lab::test_within(STALE * 3, Peer::Ours, |lab| {
        require_kernel_wireguard()?;
        let pod = Pod::start(lab)?;
        let mut init = in_sidecar(&pod, &["attach"]);
        init.arg(&lab.wg_quick_file(Reach::Ipv4)?).args(["--backend", "kernel"]);
        stdout(init)?;
        let check = || in_sidecar(&pod, &["attach", "--check"]);
        wait_until("the tunnel is up", || Ok(check().output()?.status.success()))?;
        std::thread::sleep(STALE);
        let status = stdout(in_sidecar(&pod, &["status"]))?;
        ensure!(status.contains(": stale"), "{status}");
        stdout(check())?;
        lab.provider.stop()?;
        std::thread::sleep(Duration::from_secs(2));
        let output = check().env(variables::STALE, "1").output()?;
        assert_eq!(String::from_utf8(output.stdout)?, "stale\n");
        Ok(())
    });
}

/// Requires the kernel's WireGuard.
fn require_kernel_wireguard() -> Result<()> {
    let made = NetworkNamespace::create(|| {
        let name = "wg0".parse().map_err(std::io::Error::other)?;
        Ok(Netlink::open()?.execute_one(NetlinkRequest::add_wireguard(&name, TargetNamespace::Current))?)
    });
    made.map(drop).map_err(|error| {
        let reason = format!("this kernel has no WireGuard: {error}");
        lab::Skip::error(reason, variables::REQUIRE_KERNEL_WIREGUARD)
    })
}

/// The twin of all stages: a privileged container in a pod without a tunnel.
#[test]
fn the_judge_sees_every_vector_of_a_pod_without_a_tunnel() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let judge = Judge::of_network(lab)?;
        let pod = Pod::start(lab)?;
        let mut agent = Agent::start(&mut pod.container("+all", ["env"]))?.begun()?;
        judged(from_mut(&mut agent), &judge, "pod", leaves_a_pod)?.expect_leaks(leaves_a_pod)?;
        agent.finish()?;
        Ok(())
    });
}
