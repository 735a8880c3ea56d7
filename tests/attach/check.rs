//! `attach --check`, `attach --closed`, `status` and `plan --attach`.

use std::process::Output;

use lab::launcher::{binary, errors_of, run};
use lab::{Context, Peer, Pod, Reach, Result, WEB};

use crate::support::{Sidecar, application, check, get, require_closed, sidecar_runs, wait_until_up};

/// Returns the standard output of a process that has succeeded.
fn printed(output: Output) -> Result<String> {
    lab::ensure!(output.status.success(), "{}", errors_of(&output));
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn the_check_tells_an_open_a_closed_and_a_working_pod_apart() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        assert_eq!(check(&pod)?, ("open".into(), Some(4)));
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let closed = sidecar_runs(&pod, &["attach", file.to_str().context("a path")?, "--closed"])?;
        assert_eq!(closed.status.code(), Some(0), "{}", errors_of(&closed));
        assert_eq!(check(&pod)?, ("closed".into(), Some(3)));
        let mut app = application(&pod)?;
        lab.capture.forget()?;
        for address in WEB.both() {
            app.fail(&get(address))?;
        }
        require_closed(lab, &[])?;

        let sidecar = Sidecar::start(&pod, &file, &[])?;
        wait_until_up(&pod)?;
        assert_eq!(check(&pod)?, ("up".into(), Some(0)));
        let quiet = sidecar_runs(&pod, &["attach", "--check", "-q"])?;
        assert!(quiet.status.success() && quiet.stdout.is_empty());
        // Another program changes the rules, or removes the rule that leads into the tunnel.
        let nft = |words: &str| run(pod.sidecar(["nft", words]));
        assert!(nft("add rule inet vpn-exec output accept")?.status.success());
        assert_eq!(check(&pod)?, ("damaged".into(), Some(3)));
        drop(sidecar);
        let _again = Sidecar::start(&pod, &file, &[])?;
        wait_until_up(&pod)?;
        assert!(run(pod.sidecar(["ip", "rule", "del", "priority", "30431"]))?.status.success());
        assert_eq!(check(&pod)?, ("damaged".into(), Some(3)));
        app.finish_well().map(drop)
    });
}

#[test]
fn the_check_needs_the_capability() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let output = run(pod.application([binary().to_str().context("a path")?, "attach", "--check"]))?;
        assert_eq!(output.status.code(), Some(125));
        assert!(errors_of(&output).contains("capabilities: {add: [NET_ADMIN]}"), "{}", errors_of(&output));
        Ok(())
    });
}

#[test]
fn status_shows_the_attached_tunnel() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let _sidecar = Sidecar::start(&pod, &lab.wg_quick_file(Reach::Ipv4)?, &["--name", "mullvad"])?;
        wait_until_up(&pod)?;
        let text = printed(sidecar_runs(&pod, &["status"])?)?;
        assert!(text.starts_with("mullvad: up (attached to this network namespace"), "{text}");
        let json = printed(sidecar_runs(&pod, &["status", "mullvad", "--json"])?)?;
        assert!(json.contains("\"state\": \"up\"") && !json.contains("PrivateKey"), "{json}");
        let host = printed(run(lab::vpn_exec(["status"]))?)?;
        assert_eq!(host.trim(), "no tunnel is up");
        Ok(())
    });
}

#[test]
fn the_plan_is_what_the_kernel_gets() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let file = file.to_str().context("a path")?;
        let plan = || -> Result<String> { printed(sidecar_runs(&pod, &["plan", "--attach", file])?) };
        let before = plan()?;
        assert!(before.contains("ip daddr 198.51.100.2") && before.contains("lookup 30309"), "{before}");
        assert_eq!(check(&pod)?.0, "open", "planning changes nothing");
        let _sidecar = Sidecar::start(&pod, lab.file(&std::fs::read_to_string(file)?)?.as_path(), &[])?;
        wait_until_up(&pod)?;
        assert_eq!(plan()?, before, "the plan of an attached tunnel is the same again");
        Ok(())
    });
}

/// Any process of the namespace may take the address of the status. One of another PID namespace is not believed.
#[test]
fn a_stranger_at_the_status_socket_is_not_believed() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let _sidecar = Sidecar::start(&pod, &lab.wg_quick_file(Reach::Ipv4)?, &["--name", "mullvad"])?;
        wait_until_up(&pod)?;
        let program = binary().to_str().context("a path")?;
        let apart = ["unshare", "--pid", "--fork", program, "status"];
        let text = printed(run(pod.container("+all", apart))?)?;
        assert_eq!(text.trim(), "no tunnel is up");
        Ok(())
    });
}
