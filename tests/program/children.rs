//! A process in the place of an init process waits for children that it has not started.

use std::process::Command;
use std::time::Duration;

use anyhow::ensure;
use lab::{wait_until, world};
use vpn_exec::linux::children::{EndedChild, reap};
use vpn_exec::linux::process::become_subreaper;

#[test]
fn orphans_are_waited_for() {
    world::test(|| {
        ensure!(reap()?.is_empty(), "a process without children");
        become_subreaper()?;
        // The shell ends at once and leaves two orphans, one of which kills itself.
        let script = "(sleep 0.2; exit 5) & (sleep 0.2; kill -TERM $(exec sh -c 'echo $PPID')) & exit 3";
        let shell = Command::new("sh").args(["-c", script]).spawn()?.id().cast_signed();
        let mut ended: Vec<EndedChild> = Vec::new();
        wait_until(Duration::from_secs(10), "not all three have ended", || {
            ended.extend(reap()?);
            Ok(ended.len() >= 3)
        })?;
        ensure!(ended.contains(&EndedChild { pid: shell, code: 3 }), "{ended:?}");
        let mut codes: Vec<i32> = ended.iter().map(|child| child.code).collect();
        codes.sort_unstable();
        ensure!(codes == [3, 5, 128 + libc::SIGTERM], "{ended:?}");
        std::thread::sleep(Duration::from_millis(50));
        ensure!(reap()?.is_empty(), "none is left");
        Ok(())
    });
}
