//! The program's view of /run and /etc follows changes on the host, and hidden files stay hidden.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::stand_in::StandIn;
use nix::sys::signal::Signal;

use crate::hidden::{SOCKETS, listen, visible};
use crate::support::*;

#[test]
fn the_program_sees_files_that_the_host_creates_replaces_and_removes() {
    test_with_file(follow_the_host);
}

#[test]
fn programs_that_share_a_view_see_files_that_the_host_creates_replaces_and_removes() {
    with_shared_view(follow_the_host);
}

fn follow_the_host(config: PathBuf) -> Result<()> {
    if !loosen_etc()? {
        return Ok(());
    }
    let mut shell = Shell::start(&config, &[])?;
    let seen =
        |shell: &mut Shell, question: &str, answer: &str| wait_until(question, || Ok(shell.say(question)? == answer));
    // A daemon that starts later, with its own directory (RuntimeDirectory= of systemd.exec(5)).
    let daemon = listen("/run/later/socket")?;
    seen(&mut shell, "[ -S /run/later/socket ] && echo there", "there\n")?;
    fs::write("/run/later/file", "one")?;
    ensure!(shell.say("cat /run/later/file")? == "one");
    // A user who logs in later: a file system in a new directory.
    fs::create_dir_all("/run/user/1000")?;
    vpn_exec::linux::mounts::mount_tmpfs(Path::new("/run/user/1000"))?;
    fs::write("/run/user/1000/bus", "")?;
    seen(&mut shell, "ls /run/user/1000", "bus\n")?;
    // Files that are replaced, as by passwd(1) and package managers. Each exists at every moment.
    fs::write("/etc/shells.new", "one\n")?;
    fs::rename("/etc/shells.new", "/etc/shells")?;
    seen(&mut shell, "cat /etc/shells", "one\n")?;
    let watch = "(while :; do [ -s /etc/shells ] || echo >>/run/later/gaps; done) & echo $!";
    let watcher: i32 = shell.say(watch)?.trim().parse()?;
    for text in ["two\n", "three\n", "four\n"] {
        fs::write("/etc/shells.new", text)?;
        fs::rename("/etc/shells.new", "/etc/shells")?;
        seen(&mut shell, "cat /etc/shells", text)?;
    }
    shell.say(&format!("kill {watcher}"))?;
    ensure!(!Path::new("/run/later/gaps").exists(), "at some moment the file did not exist");
    for number in 0..20 {
        let text = format!("{number}\n");
        fs::write("/etc/shells.new", &text)?;
        fs::rename("/etc/shells.new", "/etc/shells")?;
        seen(&mut shell, "cat /etc/shells", &text)?;
    }
    ensure!(shell.say("grep -c ' /etc/shells ' /proc/self/mountinfo")? == "1\n", "mounts pile up");
    std::os::unix::fs::symlink("one", "/run/link")?;
    seen(&mut shell, "readlink /run/link", "one\n")?;
    fs::remove_file("/run/link")?;
    std::os::unix::fs::symlink("two", "/run/link")?;
    seen(&mut shell, "readlink /run/link", "two\n")?;
    // Removed files, and files of another type in their place.
    drop(daemon);
    fs::remove_dir_all("/run/later")?;
    fs::write("/run/later", "a file")?;
    seen(&mut shell, "cat /run/later", "a file")?;
    fs::remove_file("/run/later")?;
    seen(&mut shell, "ls /run/later 2>&1 | grep -c 'cannot access'", "1\n")?;
    // Many changes at once.
    for number in 0..3000 {
        fs::write(format!("/run/many{number}"), "")?;
    }
    seen(&mut shell, "ls -d /run/many* | wc -l", "3000\n")?;
    for number in 0..3000 {
        fs::remove_file(format!("/run/many{number}"))?;
    }
    seen(&mut shell, "ls -d /run/many* 2>/dev/null | wc -l", "0\n")?;
    shell.end()?;
    Ok(())
}

#[test]
fn hidden_sockets_stay_hidden_when_the_host_creates_or_replaces_directories() {
    test_with_file(keep_sockets_hidden);
}

#[test]
fn hidden_sockets_stay_hidden_from_programs_that_share_a_view() {
    with_shared_view(keep_sockets_hidden);
}

fn keep_sockets_hidden(config: PathBuf) -> Result<()> {
    if !loosen_etc()? {
        return Ok(());
    }
    let mut shell = Shell::start(&config, &[])?;
    let later = SOCKETS.map(listen).into_iter().collect::<Result<Vec<_>>>()?;
    fs::create_dir_all("/run/systemd/notify-later")?;
    wait_until("what is beside is seen", || {
        Ok(shell.say("ls -d /run/systemd/notify-later")? == "/run/systemd/notify-later\n")
    })?;
    ensure!(visible(&mut shell)?.is_empty(), "{}", visible(&mut shell)?);
    // A whole directory is replaced by one with a resolver's socket.
    fs::rename("/run/systemd", "/run/systemd.old")?;
    fs::create_dir("/run/systemd")?;
    let again = listen("/run/systemd/resolve/io.systemd.Resolve")?;
    fs::create_dir("/run/systemd/again")?;
    wait_until("the new one is seen", || Ok(shell.say("ls /run/systemd")? == "again\n"))?;
    ensure!(visible(&mut shell)?.is_empty(), "{}", visible(&mut shell)?);
    // The old directory still has a listening socket, under another name.
    let elsewhere = shell.say("find /run -name io.systemd.Resolve 2>/dev/null")?;
    ensure!(elsewhere.is_empty(), "{elsewhere}");
    for (name, text) in [("resolv.conf", "nameserver 192.0.2.1\n"), ("hosts", "192.0.2.9 web.example\n")] {
        fs::write(format!("/etc/{name}.new"), text)?;
        fs::rename(format!("/etc/{name}.new"), format!("/etc/{name}"))?;
    }
    fs::write("/etc/beside", "")?;
    wait_until("what is beside is seen", || Ok(shell.say("ls /etc/beside")? == "/etc/beside\n"))?;
    ensure!(!shell.say("cat /etc/resolv.conf /etc/hosts")?.contains("192.0.2"));
    shell.end()?;
    let asked: Vec<usize> = later.iter().chain([&again]).map(StandIn::clients).collect();
    ensure!(asked.iter().all(|count| *count == 0), "asked: {asked:?}");
    Ok(())
}

#[test]
fn the_view_helper_may_only_mount_and_ends_with_the_program_or_launcher() {
    test_with_file(|config| {
        for killed in [false, true] {
            let mut shell = Shell::start(&config, &[])?;
            let (launcher, inside, viewer) = viewer_of(&mut shell)?;
            // It drops its other privileges while the program starts.
            wait_until("it may mount, and no more", || {
                let status = fs::read_to_string(format!("/proc/{viewer}/status"))?;
                Ok(bits(&status, "CapPrm")? == 1 << 21 && field(&status, "Seccomp")? == "2")
            })?;
            let open =
                fs::read_dir(format!("/proc/{viewer}/fd"))?.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
            let open: Vec<String> = open.map(|target| target.display().to_string()).collect();
            ensure!(
                !open.iter().any(|target| target.starts_with("pipe:")),
                "it holds another process's output open: {open:?}"
            );
            ensure!(
                !children_of(inside)?.contains(&viewer),
                "the helper is a child of the program, which does not know it"
            );
            if killed {
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(launcher), Signal::SIGKILL)?;
                shell.abandon()?;
            } else {
                shell.end()?;
            }
            wait_until("it has ended", || Ok(!is_running(viewer)))?;
        }
        Ok(())
    });
}

/// A program that runs as root may kill the view helper. Another process may get its process ID.
#[test]
fn a_process_with_the_id_of_a_killed_view_helper_is_not_killed() {
    test_with_file(|config| {
        let mut shell = Shell::start(&config, &[])?;
        let (.., viewer) = viewer_of(&mut shell)?;
        shell.say(&format!("kill -KILL {viewer}"))?;
        let mut other = None;
        wait_until("its number is another's", || {
            if !Path::new(&format!("/proc/{viewer}")).exists() {
                fs::write("/proc/sys/kernel/ns_last_pid", (viewer - 1).to_string())?;
                let mut started = Command::new("sleep").arg("1000").spawn()?;
                if started.id().cast_signed() == viewer {
                    other = Some(started);
                    return Ok(true);
                }
                started.kill()?;
                started.wait()?;
            }
            Ok(false)
        })?;
        let mut other = other.context("a process")?;
        shell.end()?;
        ensure!(other.try_wait()?.is_none(), "it was killed");
        other.kill()?;
        other.wait()?;
        Ok(())
    });
}

/// Returns the process IDs of a shell's launcher, the shell itself, and its view helper.
fn viewer_of(shell: &mut Shell) -> Result<(i32, i32, i32)> {
    let inside: i32 = shell.say("echo $$")?.trim().parse()?;
    let launcher = shell.launcher();
    let mounts = mounts_of(inside)?;
    let viewer = children_of(launcher)?
        .into_iter()
        .find(|pid| *pid != inside && mounts_of(*pid).is_ok_and(|other| other == mounts));
    Ok((launcher, inside, viewer.context("a sibling in the program's mount namespace")?))
}

pub(crate) fn children_of(pid: i32) -> Result<Vec<i32>> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    text.split_ascii_whitespace().map(|number| Ok(number.parse()?)).collect()
}

pub(crate) fn mounts_of(pid: i32) -> Result<u64> {
    Ok(fs::metadata(format!("/proc/{pid}/ns/mnt"))?.ino())
}

fn is_running(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}
