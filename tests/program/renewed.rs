//! The program's view of /run and /etc is the host's of this instant, not of its start; and what is hidden stays so.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::stand_in::StandIn;
use nix::sys::signal::Signal;

use crate::hidden::{SOCKETS, listen, visible};
use crate::support::*;

/// What the host makes, replaces and removes at the top of /run and /etc while the program runs.
#[test]
fn what_becomes_of_run_and_etc_is_seen() {
    test_with_file(|config| {
        if !loosen_etc()? {
            return Ok(());
        }
        let mut shell = Shell::start(&config, &[])?;
        let seen = |shell: &mut Shell, question: &str, answer: &str| {
            wait_until(question, || Ok(shell.say(question)? == answer))
        };
        // A daemon that is started later, with a directory of its own (RuntimeDirectory= of systemd.exec(5)).
        let daemon = listen("/run/later/socket")?;
        seen(&mut shell, "[ -S /run/later/socket ] && echo there", "there\n")?;
        fs::write("/run/later/file", "one")?;
        ensure!(shell.say("cat /run/later/file")? == "one");
        // A user who logs in later: a file system in a directory that is new.
        fs::create_dir_all("/run/user/1000")?;
        vpn_exec::linux::mounts::mount_tmpfs(Path::new("/run/user/1000"))?;
        fs::write("/run/user/1000/bus", "")?;
        seen(&mut shell, "ls /run/user/1000", "bus\n")?;
        // Files that are replaced, as by passwd(1) and package managers; each is always there.
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
        ensure!(!Path::new("/run/later/gaps").exists(), "at some instant it was not there");
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
        // What is gone is gone, and what is of another kind is that.
        drop(daemon);
        fs::remove_dir_all("/run/later")?;
        fs::write("/run/later", "a file")?;
        seen(&mut shell, "cat /run/later", "a file")?;
        fs::remove_file("/run/later")?;
        seen(&mut shell, "ls /run/later 2>&1 | grep -c 'cannot access'", "1\n")?;
        // Of many changes at once, none is missed.
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
    });
}

/// Nothing of ours, and nothing that the host hides, is shown by way of what is made later.
#[test]
fn what_is_hidden_stays_so_whatever_is_made_later() {
    test_with_file(|config| {
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
        // A whole directory is replaced by another that has them.
        fs::rename("/run/systemd", "/run/systemd.old")?;
        fs::create_dir("/run/systemd")?;
        let again = listen("/run/systemd/resolve/io.systemd.Resolve")?;
        fs::create_dir("/run/systemd/again")?;
        wait_until("the new one is seen", || Ok(shell.say("ls /run/systemd")? == "again\n"))?;
        ensure!(visible(&mut shell)?.is_empty(), "{}", visible(&mut shell)?);
        // Who listened in the old one still does.
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
    });
}

/// The process that does all this may mount, and no more; it ends with the program, and with a killed launcher.
#[test]
fn who_keeps_the_view_may_do_little_and_ends_in_time() {
    test_with_file(|config| {
        for killed in [false, true] {
            let mut shell = Shell::start(&config, &[])?;
            let (launcher, inside, viewer) = viewer_of(&mut shell)?;
            // It has begun a little before the program, and gives up what it has of it meanwhile.
            wait_until("it may mount, and no more", || {
                let status = fs::read_to_string(format!("/proc/{viewer}/status"))?;
                Ok(bits(&status, "CapPrm")? == 1 << 21 && field(&status, "Seccomp")? == "2")
            })?;
            let open =
                fs::read_dir(format!("/proc/{viewer}/fd"))?.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
            let open: Vec<String> = open.map(|target| target.display().to_string()).collect();
            ensure!(!open.iter().any(|target| target.starts_with("pipe:")), "it keeps nobody's output open: {open:?}");
            ensure!(!children_of(inside)?.contains(&viewer), "the program has a child that it does not know");
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

/// A program that runs as root may kill it. Then another process may have its number, and nothing is done to that.
#[test]
fn who_has_the_number_of_a_killed_one_is_left_alone() {
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

/// The launcher of a shell's, the shell itself, and the process that keeps its view.
fn viewer_of(shell: &mut Shell) -> Result<(i32, i32, i32)> {
    let inside: i32 = shell.say("echo $$")?.trim().parse()?;
    let launcher = shell.launcher();
    let mounts = mounts_of(inside)?;
    let viewer = children_of(launcher)?
        .into_iter()
        .find(|pid| *pid != inside && mounts_of(*pid).is_ok_and(|other| other == mounts));
    Ok((launcher, inside, viewer.context("a sibling in the program's mount namespace")?))
}

fn children_of(pid: i32) -> Result<Vec<i32>> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    text.split_ascii_whitespace().map(|number| Ok(number.parse()?)).collect()
}

fn mounts_of(pid: i32) -> Result<u64> {
    Ok(fs::metadata(format!("/proc/{pid}/ns/mnt"))?.ino())
}

fn is_running(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}
