//! Hooks of the configuration file: run only with --allow-hooks, inside the namespace, in their order and with few
//! privileges.

use std::fs;

use anyhow::Result;
use lab::surroundings::Surroundings;
use lab::{Snapshot, variables};
use nix::sys::signal::Signal;

use crate::support::{
    CONFIG_TEXT, Running, assert_refused, assert_unchanged, ended, errors, is_there, launcher, prepare, run, started,
    with_task, write_config,
};

const SEEN: &str = "/run/lab/hooks";

/// CAP_NET_ADMIN and CAP_NET_RAW (capabilities(7)).
const FOR_NETWORKS: u64 = 1 << 12 | 1 << 13;

/// Writes a configuration in which each of the given hooks records its surroundings, and which has further lines.
fn write_hooks(kinds: &[&str], further: &str) -> Result<()> {
    let task = lab::agent::task(&format!("hook {SEEN}"));
    let task: Vec<String> = task.iter().map(|word| format!("'{}'", word.to_string_lossy())).collect();
    let line = |kind: &&str| format!("{kind} = {}={kind} {} >/dev/null\n", variables::HOOK, task.join(" "));
    let lines: String = kinds.iter().map(line).collect();
    write_config(&CONFIG_TEXT.replacen("[Peer]", &format!("{lines}{further}[Peer]"), 1))
}

fn seen() -> Result<Vec<Surroundings>> {
    fs::read_to_string(SEEN)?.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

fn with_hooks(task: &str) -> std::process::Command {
    with_task(launcher("hooks").option("--allow-hooks"), task)
}

const ALL: [&str; 4] = ["PreUp", "PostUp", "PreDown", "PostDown"];

#[test]
fn hooks_do_not_run_without_their_option() {
    lab::world::test(|| {
        prepare()?;
        write_hooks(&ALL, "")?;
        let output = run(crate::support::vpn_exec("hooks", "exit 0"))?;
        assert_eq!(ended(output.status), Ok(0), "{}", errors(&output));
        assert!(
            errors(&output).contains("--allow-hooks"),
            "no message says that hooks are set aside: {}",
            errors(&output)
        );
        assert!(!is_there(SEEN), "{:?}", seen()?);
        Ok(())
    });
}

#[test]
fn hooks_run_inside_in_their_order_with_few_privileges() {
    lab::world::test(|| {
        lab::tunnel::needs_root("hooks")?;
        prepare()?;
        write_hooks(&ALL, "")?;
        let before = Snapshot::take()?;
        let Running { program, child, .. } = started(with_hooks("wait"), "hooks")?;
        crate::support::send(program.pid, Signal::SIGTERM)?;
        let output = crate::support::output_of(child)?;
        assert_eq!(ended(output.status), Err(Signal::SIGTERM), "{}", errors(&output));

        let seen = seen()?;
        assert_eq!(seen.iter().map(|hook| hook.hook.as_str()).collect::<Vec<_>>(), ALL);
        for hook in &seen {
            assert_eq!(hook.namespace, program.namespace, "{} is run outside", hook.hook);
            let is_up = hook.interfaces.iter().find(|(name, _)| name == "wg0").map(|(_, up)| *up);
            assert_eq!(is_up, Some(hook.hook != "PreUp"), "{}", hook.hook);
            for (set, capabilities) in &hook.capabilities {
                assert_eq!(capabilities & !FOR_NETWORKS, 0, "{}: {set} {capabilities:x}", hook.hook);
            }
            let (_, effective) = hook.capabilities.iter().find(|(set, _)| set == "CapEff").expect("the effective set");
            assert_eq!(*effective, FOR_NETWORKS, "{} can configure the network", hook.hook);
            let ours: Vec<_> = hook.descriptors.iter().filter(|(number, _)| *number > 2).collect();
            assert!(ours.is_empty(), "{} has descriptors of the keeper's: {ours:?}", hook.hook);
        }
        fs::remove_file(SEEN)?;
        assert_unchanged(&before, "at the end")
    });
}

#[test]
fn a_hook_that_fails_before_the_program_undoes_the_tunnel() {
    lab::world::test(|| {
        lab::tunnel::needs_root("hooks")?;
        prepare()?;
        for (kind, then) in [("PreUp", &["PreUp"] as &[&str]), ("PostUp", &["PreUp", "PostUp", "PreDown", "PostDown"])]
        {
            write_hooks(&ALL, &format!("{kind} = echo a-secret-word >/dev/null; exit 7\n"))?;
            let before = Snapshot::take()?;
            let message = assert_refused(&run(with_hooks("exit 0"))?);
            assert!(message.contains(kind) && message.contains('7'), "{message}");
            assert!(!message.contains("a-secret-word"), "its text may hold a secret: {message}");
            let names: Vec<String> = seen()?.into_iter().map(|hook| hook.hook).collect();
            assert_eq!(names, then, "{kind}");
            fs::remove_file(SEEN)?;
            assert_unchanged(&before, kind)?;
        }
        Ok(())
    });
}

#[test]
fn a_hook_that_fails_after_the_program_is_reported_and_keeps_nothing() {
    lab::world::test(|| {
        lab::tunnel::needs_root("hooks")?;
        prepare()?;
        for kind in ["PreDown", "PostDown"] {
            write_hooks(&[], &format!("{kind} = exit 7\n"))?;
            let before = Snapshot::take()?;
            let output = run(with_hooks("exit 3"))?;
            assert_eq!(ended(output.status), Ok(3), "the program's own status: {}", errors(&output));
            assert!(errors(&output).contains(kind), "no message about the failure: {:?}", errors(&output));
            assert_unchanged(&before, kind)?;
        }
        Ok(())
    });
}
