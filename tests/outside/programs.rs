//! Programs that run without a display, from Debian's packages.

use anyhow::ensure;

use crate::support::*;

#[test]
fn tmux_does_not_run_a_command_in_the_hosts_server() {
    test_at_desk(|desk| {
        require("tmux")?;
        let started = run(desk.on_host(&["tmux", "new-session", "-d", "-s", "host", "sleep 1000"]))?;
        ensure!(started.status.success(), "{}", said(&started));
        let before = inode("/tmp/tmux-0/default")?;
        let said = desk.expect_refusal("tmux new-window \"ERRAND\"")?;
        ensure!(said.contains("tmux") && said.contains("--socket /tmp/tmux-0/default"), "{said}");
        ensure!(inode("/tmp/tmux-0/default")? == before, "the host's socket is another one");
        let sessions = run(desk.on_host(&["tmux", "list-sessions"]))?;
        ensure!(sessions.status.success(), "the host's server has ended: {}", said);
        Ok(())
    });
}

/// As the advice says.
#[test]
fn a_tmux_server_inside_works_for_all_programs_of_the_tunnel() {
    test_at_desk(|desk| {
        require("tmux")?;
        let script = "tmux -L own new-session -d 'readlink /proc/self/ns/net >/tmp/home/server; sleep 1000'; \
                      until [ -s /tmp/home/server ]; do sleep 0.01; done; \
                      tmux -L own new-window 'readlink /proc/self/ns/net >/tmp/home/window; sleep 1000'; \
                      until [ -s /tmp/home/window ]; do sleep 0.01; done; \
                      tmux -L own kill-server; readlink /proc/self/ns/net; cat server window";
        let output = run(desk.inside(&[], &["sh", "-c", script]))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        ensure!(lines.len() == 3 && lines.iter().all(|line| *line == lines[0]), "{}", said(&output));
        ensure!(!said(&output).contains("outside the tunnel"), "{}", said(&output));
        Ok(())
    });
}
