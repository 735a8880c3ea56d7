//! A failure and a kill after every step. The steps are those of [`fault`], so a new step is tested automatically.

use std::process::Command;
use std::time::Instant;

use anyhow::ensure;
use lab::{Snapshot, variables};
use nix::sys::signal::Signal;
use vpn_exec::fault;

use crate::support::{
    PATIENCE, assert_none_soon, assert_refused, assert_unchanged, ended, errors, launcher, prepare, run, send,
    with_task,
};

/// Returns a command for a tunnel with every option that adds a step.
fn whole(options: &[&str], task: &str) -> Command {
    with_task(launcher("faults").options(lab::local_networks()).options(options), task)
}

#[test]
fn a_failure_after_any_step_is_reported_and_undone() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        for point in fault::SET_UP {
            let mut command = whole(&[], "exit 0");
            command.env(variables::FAIL, point);
            let output = run(command)?;
            let message = assert_refused(&output);
            assert!(message.contains(point), "{message}");
            assert_unchanged(&before, point)?;
        }
        let output = run(whole(&[], "exit 0"))?;
        assert_eq!(ended(output.status), Ok(0), "{}", errors(&output));
        Ok(())
    });
}

#[test]
fn a_kill_of_the_keeper_after_any_step_is_reported_and_undone() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        for point in fault::SET_UP {
            let mut command = whole(&[], "exit 0");
            command.env(variables::FAIL, format!("kill:{point}"));
            let message = assert_refused(&run(command)?);
            assert!(message.contains("killed"), "{point}: {message}");
            assert_unchanged(&before, point)?;
        }
        // Once the program has ended, its status is the result, even if the keeper is killed.
        for point in fault::TAKE_DOWN {
            let mut command = whole(&["-vv"], "exit 3");
            command.env(variables::FAIL, format!("kill:{point}"));
            let output = run(command)?;
            assert_eq!(ended(output.status), Ok(3), "{point}: {}", errors(&output));
            assert!(errors(&output).contains("the keeper is gone"), "{point} is never passed: {}", errors(&output));
            assert_unchanged(&before, point)?;
        }
        Ok(())
    });
}

#[test]
fn a_failure_or_a_kill_after_the_announcement_leaves_nothing_behind() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        for point in fault::ANNOUNCED {
            // The program runs already, or its process is being prepared, and ends with the tunnel.
            let mut command = whole(&[], "nap");
            command.env(variables::FAIL, point);
            assert_refused(&run(command)?);
            assert_none_soon(&["nap"], point)?;
            assert_unchanged(&before, point)?;
            // The tunnel is complete, so another keeper takes it over.
            let mut command = whole(&["-vv"], "exit 3");
            command.env(variables::FAIL, format!("kill:{point}"));
            let output = run(command)?;
            assert_eq!(ended(output.status), Ok(3), "{}", errors(&output));
            assert_unchanged(&before, point)?;
        }
        Ok(())
    });
}

#[test]
fn when_launcher_and_keeper_are_killed_after_any_step_the_next_start_reclaims_the_tunnel() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        for point in fault::SET_UP.into_iter().chain(fault::ANNOUNCED).chain(fault::TAKE_DOWN) {
            let mut command = whole(&[], "nap");
            command.env(variables::FAIL, format!("kill:{point}"));
            let mut child = command.spawn()?;
            let launcher = child.id().cast_signed();
            // The killed keeper is a zombie until the launcher reaps it. A launcher that is faster than this test has
            // cleaned up, which is right, too.
            let deadline = Instant::now() + lab::patience(PATIENCE);
            while !has_dead_child(launcher) && child.try_wait()?.is_none() {
                ensure!(Instant::now() < deadline, "{point}: the keeper is never killed");
            }
            let _ = send(launcher, Signal::SIGKILL);
            child.wait()?;
            assert_none_soon(&["nap"], point)?;
            let output = run(whole(&[], "exit 0"))?;
            assert_eq!(ended(output.status), Ok(0), "{point}: {}", errors(&output));
            assert_unchanged(&before, format_args!("after {point:?} and another start"))?;
        }
        Ok(())
    });
}

fn has_dead_child(launcher: i32) -> bool {
    let children = std::fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).unwrap_or_default();
    children.split_ascii_whitespace().any(|child| {
        std::fs::read_to_string(format!("/proc/{child}/stat"))
            .is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')))
    })
}
