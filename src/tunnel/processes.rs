//! Kills the processes in a tunnel.

use std::io;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::linux::namespace::NamespaceId;
use crate::linux::process;

/// How long processes that were killed may take to end.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// The delay between two rounds of killing.
const KILL_INTERVAL: Duration = Duration::from_millis(1);

/// Kills all processes in a network namespace until there are none.
///
/// In a rootless tunnel, this process cannot look into one that has executed a file which the user may not read (mode
/// 0711, for example), and so does not find it. Such a process stays, confined to a namespace without any interface but
/// `lo`: the tunnel's device has ended with the keeper, and the link with the gateway.
pub(super) fn kill_all(namespace: NamespaceId) -> io::Result<()> {
    kill_until_none(|| process::in_namespace(namespace))
}

/// Kills the processes in a network namespace that are in a mount namespace, and their descendants, until there are
/// none.
pub(super) fn kill_left_behind(namespace: NamespaceId, mounts: NamespaceId) -> io::Result<()> {
    kill_until_none(|| {
        let mut inside = process::in_namespace(namespace)?;
        let mut found: Vec<i32> = Vec::new();
        loop {
            let belongs = |pid: &i32| {
                let parent = process::parent_of(*pid);
                NamespaceId::of_mounts(*pid).is_ok_and(|of| of == mounts)
                    || parent.is_some_and(|of| found.contains(&of))
            };
            let (more, others): (Vec<i32>, Vec<i32>) = inside.into_iter().partition(belongs);
            if more.is_empty() {
                return Ok(found);
            }
            found.extend(more);
            inside = others;
        }
    })
}

fn kill_until_none(find: impl Fn() -> io::Result<Vec<i32>>) -> io::Result<()> {
    let begin = Instant::now();
    loop {
        let processes = find()?;
        if processes.is_empty() {
            return Ok(());
        }
        if begin.elapsed() > KILL_TIMEOUT {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("the processes {processes:?} did not end")));
        }
        for pid in processes {
            process::kill(pid, Signal::SIGKILL)?;
        }
        std::thread::sleep(KILL_INTERVAL);
    }
}
