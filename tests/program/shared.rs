//! The view of files that the programs of a tunnel share: when it is used, and that programs do not meet there.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::Launcher;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rustix::mount::{MountPropagationFlags, mount_change};
use vpn_exec::linux::mounts;

use crate::support::*;

/// Returns the process IDs of the view servers: those with a watch of directories and an open mount namespace.
fn servers() -> Result<Vec<i32>> {
    let is_server = |pid: &i32| {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
        let targets: Vec<String> = open
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .map(|it| it.display().to_string())
            .collect();
        targets.iter().any(|target| target.contains("inotify"))
            && targets.iter().any(|target| target.starts_with("mnt:"))
    };
    let pids = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    Ok(pids.filter(is_server).collect())
}

fn server() -> Result<i32> {
    let all = servers()?;
    ensure!(all.len() == 1, "{} view servers", all.len());
    all.first().copied().context("a view server")
}

fn signal(pid: i32, signal: Signal) -> Result<()> {
    Ok(nix::sys::signal::kill(Pid::from_raw(pid), signal)?)
}

#[test]
fn programs_share_one_view_server_that_may_only_mount_and_ends_with_the_tunnel() {
    test_with_file(|config| {
        up(&config)?;
        ensure!(servers()?.is_empty(), "before the first program");
        let mut one = Shell::start(&config, &[])?;
        let pid = server()?;
        let mut other = Shell::start(&config, &[])?;
        ensure!(server()? == pid);
        for launcher in [one.launcher(), other.launcher()] {
            // The program and its socket guard; the first launcher has started the server.
            let children = crate::renewed::children_of(launcher)?.len();
            ensure!(children == if launcher == one.launcher() { 3 } else { 2 }, "{children} children");
        }
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        ensure!(bits(&status, "CapPrm")? == 1 << 21 | 1 << 18 && bits(&status, "CapBnd")? == 0, "{status}");
        ensure!(field(&status, "Seccomp")? == "2" && field(&status, "NoNewPrivs")? == "1", "{status}");
        // The first program, whose launcher has started the server, may end first.
        fs::create_dir("/run/later")?;
        for shell in [&mut one, &mut other] {
            wait_until("a new entry", || Ok(shell.say("[ -d /run/later ] && echo there")? == "there\n"))?;
        }
        one.end()?;
        fs::create_dir("/run/even-later")?;
        wait_until("a new entry", || Ok(other.say("[ -d /run/even-later ] && echo there")? == "there\n"))?;
        other.end()?;
        ensure!(server()? == pid, "it waits for the next program");
        down()?;
        wait_until("the server has ended", || Ok(servers()?.is_empty()))
    });
}

#[test]
fn programs_that_share_a_view_do_not_see_what_each_other_writes() {
    with_shared_view(|config| {
        let mut one = Shell::start(&config, &[])?;
        let mut other = Shell::start(&config, &[])?;
        ensure!(one.say("echo mine >/run/program.pid; cat /run/program.pid")? == "mine\n", "/run is not writable");
        ensure!(other.say("ls /run/program.pid 2>/dev/null")?.is_empty());
        ensure!(!Path::new("/run/program.pid").exists());
        for directory in ["/etc", "/var/lib/sss"] {
            let written = one.say(&format!("[ ! -d {directory} ] || touch {directory}/x || echo refused"))?;
            ensure!(written.is_empty() || written.contains("refused"), "{directory}: {written}");
        }
        let mounts = other.say("readlink /proc/self/ns/mnt")?;
        ensure!(one.say("readlink /proc/self/ns/mnt")? != mounts, "one mount namespace");
        one.end()?;
        other.end()
    });
}

/// A program's resolvers do not change with the host's, but the rest of `/etc/hosts` is as it was when it started.
#[test]
fn a_changed_file_of_the_host_is_seen_by_the_next_program() {
    with_shared_view(|config| {
        if !loosen_etc()? {
            return Ok(());
        }
        let hosts = || Launcher::new(&config).program(["cat", "/etc/hosts"]).stdout();
        ensure!(!hosts()?.contains("later.example"));
        let mut text = fs::read_to_string("/etc/hosts")?;
        text.push_str("192.0.2.7 later.example\n");
        // The world does not own the file itself.
        fs::write("/etc/hosts.new", text)?;
        fs::rename("/etc/hosts.new", "/etc/hosts")?;
        ensure!(hosts()?.contains("later.example"));
        Ok(())
    });
}

#[test]
fn a_program_with_mounts_of_its_own_keeps_them() {
    with_shared_view(|config| {
        let first = Shell::start(&config, &[])?;
        // As a unit with TemporaryFileSystem=.
        fs::create_dir("/run/lab/own")?;
        let launcher = Launcher::new(&config).program(["sh", "-c", "ls /run/lab/own; ls /etc/own"]).line();
        let script = format!(
            "mount -t tmpfs own /run/lab/own && touch /run/lab/own/inside && mount -t tmpfs own /etc && \
             echo 'hosts: files' >/etc/nsswitch.conf && touch /etc/own && {launcher}"
        );
        let output = lab::launcher::run({
            let mut command = Command::new("unshare");
            command.args(["-m", "sh", "-c", &script]);
            command
        })?;
        ensure!(text_of(&output).ends_with("inside\n/etc/own\n"), "{}", text_of(&output));
        // And one with another root directory.
        fs::create_dir("/run/lab/root")?;
        let script = format!("mount --rbind / /run/lab/root && exec chroot /run/lab/root {launcher}");
        let mut command = Command::new("unshare");
        let output = lab::launcher::run({
            command.args(["-m", "sh", "-c", &script]);
            command
        })?;
        ensure!(
            text_of(&output).contains("No such file") && !text_of(&output).contains("inside"),
            "{}",
            text_of(&output)
        );
        first.end()
    });
}

/// Mounts of the host that do not spread to other namespaces are missing in a template from before.
#[test]
fn a_mount_of_the_host_is_seen_by_the_next_program() {
    with_shared_view(|config| {
        let disk = Path::new("/run/lab/disk");
        fs::create_dir(disk)?;
        mounts::mount_tmpfs(disk)?;
        mount_change(disk, MountPropagationFlags::PRIVATE)?;
        fs::create_dir(disk.join("part"))?;
        let list = || Launcher::new(&config).program(["ls", "/run/lab/disk/part"]).stdout();
        ensure!(list()?.is_empty());
        mounts::mount_tmpfs(&disk.join("part"))?;
        fs::write("/run/lab/disk/part/file", "")?;
        ensure!(list()? == "file\n");
        Ok(())
    });
}

#[test]
fn programs_start_and_stay_confined_without_their_view_server() {
    with_shared_view(|config| {
        let mut left = Shell::start(&config, &[])?;
        let pid = server()?;
        // One that does not answer.
        signal(pid, Signal::SIGSTOP)?;
        let mut own = Shell::start(&config, &[])?;
        ensure!(crate::hidden::visible(&mut own)?.is_empty() && own.say("cat /etc/resolv.conf")?.contains("10.64.0.1"));
        signal(pid, Signal::SIGKILL)?;
        wait_until("it has ended", || Ok(!servers()?.contains(&pid)))?;
        let sockets = crate::hidden::SOCKETS.map(crate::hidden::listen).into_iter().collect::<Result<Vec<_>>>()?;
        for shell in [&mut left, &mut own] {
            let visible = crate::hidden::visible(shell)?;
            ensure!(visible.is_empty(), "{visible}");
        }
        let mut next = Shell::start(&config, &[])?;
        ensure!(crate::hidden::visible(&mut next)?.is_empty());
        fs::create_dir("/run/later")?;
        wait_until("a new entry", || Ok(next.say("[ -d /run/later ] && echo there")? == "there\n"))?;
        for shell in [left, own, next] {
            shell.end()?;
        }
        drop(sockets);
        Ok(())
    });
}

#[test]
fn a_program_that_may_mount_has_a_view_of_its_own() {
    with_shared_view(|config| {
        lab::tunnel::needs_root("capabilities for the program")?;
        let mut shell = Shell::start(&config, &["--keep-cap", "SYS_ADMIN"])?;
        ensure!(servers()?.is_empty());
        shell.say("true")?;
        shell.end()
    });
}

/// The end of a service must not take the views of other programs along, nor theirs its own.
#[test]
fn a_service_has_a_view_of_its_own() {
    with_shared_view(|config| {
        let line = Launcher::new(&config).program(["cat", "/etc/resolv.conf"]).line();
        let mut service = Command::new("sh");
        service.args(["-c", &format!("export SYSTEMD_EXEC_PID=$$; exec {line}")]);
        ensure!(lab::launcher::stdout(service)?.contains("nameserver 10.64.0.1"));
        ensure!(servers()?.is_empty());
        Launcher::new(&config).program(["true"]).stdout()?;
        server().map(drop)
    });
}

/// The server has the limits of the launcher that has started it.
#[test]
fn a_program_with_other_limits_has_another_server() {
    with_shared_view(|config| {
        let first = Shell::start(&config, &[])?;
        let line = Launcher::new(&config).program(["cat", "/etc/resolv.conf"]).line();
        for (limit, count) in [("-f unlimited", 1), ("-f 1000000", 2)] {
            let mut limited = Command::new("sh");
            limited.args(["-c", &format!("ulimit {limit}; {line}")]);
            ensure!(lab::launcher::stdout(limited)?.contains("nameserver 10.64.0.1"));
            ensure!(servers()?.len() == count, "{limit}: {} view servers", servers()?.len());
        }
        first.end()
    });
}

/// The successor of a keeper knows no server: its programs stay with it, and the next ones get another.
#[test]
fn programs_keep_their_view_server_when_their_keeper_is_killed() {
    with_shared_view(|config| {
        let mut before = Shell::start(&config, &[])?;
        let pid = server()?;
        let former = keeper()?;
        signal(former, Signal::SIGKILL)?;
        wait_until("a successor", || Ok(keeper().is_ok_and(|keeper| keeper != former)))?;
        let mut after = Shell::start(&config, &[])?;
        ensure!(servers()?.len() == 2 && servers()?.contains(&pid), "{:?}", servers()?);
        fs::create_dir("/run/later")?;
        for shell in [&mut before, &mut after] {
            wait_until("a new entry", || Ok(shell.say("[ -d /run/later ] && echo there")? == "there\n"))?;
        }
        before.end()?;
        wait_until("it ends with its last program", || Ok(!servers()?.contains(&pid)))?;
        after.end()
    });
}

/// A directory is renamed away and back while many programs watch it.
#[test]
fn a_directory_that_is_renamed_and_returns_is_still_followed() {
    with_shared_view(|config| {
        fs::create_dir_all("/run/systemd/resolve")?;
        let mut shells = (0..4).map(|_| Shell::start(&config, &[])).collect::<Result<Vec<_>>>()?;
        for _ in 0..50 {
            fs::rename("/run/systemd", "/run/elsewhere")?;
            fs::rename("/run/elsewhere", "/run/systemd")?;
        }
        fs::create_dir("/run/systemd/later")?;
        for shell in &mut shells {
            wait_until("a new entry", || Ok(shell.say("[ -d /run/systemd/later ] && echo there")? == "there\n"))?;
        }
        shells.into_iter().try_for_each(Shell::end)
    });
}

/// Returns the process ID of the tunnel's keeper.
fn keeper() -> Result<i32> {
    let output = lab::launcher::stdout(lab::vpn_exec(["status", "nowhere", "--json"]))?;
    let status: serde_json::Value = serde_json::from_str(&output)?;
    let keeper = status["keeper"].as_i64().context("a keeper")?;
    Ok(keeper.try_into()?)
}
