//! Files, working directory and umask of a program.

use std::fs::{self};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::ensure;
use lab::Launcher;

use crate::support::*;

#[test]
fn a_line_for_host_internal_in_the_hosts_hosts_file_is_overridden() {
    test_with_file(|config| {
        let before = fs::read_to_string("/etc/hosts")?;
        fs::write("/etc/hosts", format!("203.0.113.99 host.internal\n{before}"))?;
        let text = Launcher::new(&config).program(["getent", "ahostsv4", "host.internal"]).stdout()?;
        ensure!(text.starts_with("10."), "{text}");
        Ok(())
    });
}

#[test]
fn the_program_has_name_files_of_its_own() {
    test_with_file(|config| {
        let script = "cat /etc/resolv.conf; echo ---; cat /etc/hosts; echo ---; cat /etc/nsswitch.conf; echo ---; \
                      ls /sys/class/net | tr '\\n' ' '; echo; echo x 2>&- >/etc/resolv.conf && echo written; true";
        let before = fs::read_to_string("/etc/resolv.conf")?;
        let text = Launcher::new(&config).program(["sh", "-c", script]).stdout()?;
        let parts: Vec<&str> = text.split("---\n").collect();
        let servers: Vec<&str> = parts[0].lines().filter(|line| line.starts_with("nameserver")).collect();
        ensure!(servers == ["nameserver 10.64.0.1"], "{text}");
        ensure!(parts[0].contains("search vpn.example"), "{text}");
        ensure!(parts[1].contains("127.0.0.1 localhost"), "a line of the host's file is missing: {text}");
        ensure!(parts[1].lines().filter(|line| line.ends_with(" host.internal")).count() == 2, "{text}");
        ensure!(parts[2].lines().filter(|line| line.starts_with("hosts:")).eq(["hosts: files dns"]), "{text}");
        ensure!(parts[3].lines().eq(["host0 lo wg0 "]), "{text}");
        ensure!(fs::read_to_string("/etc/resolv.conf")? == before, "the host's file has changed");
        Ok(())
    });
}

#[test]
fn a_host_without_resolv_conf_works() {
    test_with_file(|config| {
        if !loosen_etc()? {
            return Ok(());
        }
        for dangling in [false, true] {
            fs::remove_file("/etc/resolv.conf")?;
            if dangling {
                std::os::unix::fs::symlink("../run/nowhere/resolv.conf", "/etc/resolv.conf")?;
            }
            let text = Launcher::new(&config).program(["cat", "/etc/resolv.conf", "/etc/hosts"]).stdout()?;
            ensure!(text.contains("nameserver 10.64.0.1") && text.contains("host.internal"), "{text}");
            ensure!(!Path::new("/etc/resolv.conf").exists(), "the host's file has changed");
            if !dangling {
                fs::write("/etc/resolv.conf", "")?;
            }
        }
        Ok(())
    });
}

#[test]
fn special_files_in_place_of_the_hosts_name_files_are_ignored() {
    test_with_file(|config| {
        if !loosen_etc()? {
            return Ok(());
        }
        type Plant = fn(&str) -> std::io::Result<()>;
        let kinds: [(&str, Plant); 4] = [
            ("a link to a directory", |path| std::os::unix::fs::symlink("/", path)),
            ("a link in a circle", |path| std::os::unix::fs::symlink(path, path)),
            ("a pipe", |path| Ok(nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU)?)),
            ("a link to /dev/null", |path| std::os::unix::fs::symlink("/dev/null", path)),
        ];
        for file in ["/etc/hosts", "/etc/nsswitch.conf", "/etc/resolv.conf"] {
            let before = fs::read_to_string(file)?;
            for (what, plant) in kinds {
                fs::remove_file(file)?;
                plant(file)?;
                let text = Launcher::new(&config)
                    .program(["sh", "-c", "cd /etc; cat resolv.conf hosts nsswitch.conf"])
                    .stdout()?;
                for line in ["nameserver 10.64.0.1", " host.internal", "hosts: files dns"] {
                    ensure!(text.contains(line), "{file} is {what}: {text}");
                }
                fs::remove_file(file)?;
                fs::write(file, &before)?;
            }
        }
        Ok(())
    });
}

#[test]
fn the_program_keeps_working_directory_and_umask() {
    test_with_file(|config| {
        let line = Launcher::new(&config).program(["sh", "-c", "pwd; umask"]).line();
        let mut command = Command::new("sh");
        let script = format!("umask 031; cd /usr/lib; exec {line}");
        command.args(["-c", &script]).stdin(Stdio::null());
        ensure!(stdout(command)? == "/usr/lib\n0031\n");
        Ok(())
    });
}

#[test]
fn a_strict_umask_hides_nothing_from_the_program() {
    test_with_file(|config| {
        let files = ["/etc/resolv.conf", "/etc/hosts", "/run/vpn-exec"];
        // The files of a rootless tunnel are elsewhere, and hidden.
        let seen = if lab::tunnel::is_rootless() { 2 } else { 3 };
        let line = Launcher::new(&config).program(["stat", "-c", "%a"].iter().chain(&files[..seen])).line();
        let mut command = Command::new("sh");
        let script = format!("umask 077; exec {line}");
        command.args(["-c", &script]).stdin(Stdio::null());
        ensure!(stdout(command)? == "644\n644\n711\n"[..4 * seen]);
        Ok(())
    });
}

#[test]
fn a_large_hosts_file_is_complete() {
    test_with_file(|config| {
        let before = fs::read_to_string("/etc/hosts")?;
        let many: String = (0..100_000).map(|number| format!("0.0.0.0 advertisement-{number}.example\n")).collect();
        fs::write("/etc/hosts", before + &many)?;
        let text = Launcher::new(&config).program(["cat", "/etc/hosts"]).stdout()?;
        ensure!(
            text.lines().next().is_some_and(|first| first.ends_with(" host.internal")),
            "our lines must come first to take effect"
        );
        ensure!(text.ends_with("advertisement-99999.example\n"));
        Ok(())
    });
}

/// As with the kernel parameter `ipv6.disable=1`.
#[test]
fn a_kernel_without_ipv6_works() {
    test_with_file(|config| {
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("without-ipv6", "/proc/sys/net/ipv6", c"tmpfs", flags, None)?;
        let output = Launcher::new(&config).program(["cat", "/proc/net/if_inet6", "/etc/hosts"]).run()?;
        let text = text_of(&output);
        ensure!(output.status.success() && text.contains("This kernel has no IPv6"), "{text}");
        ensure!(
            !text.contains("fc00bbbb") && text.lines().filter(|line| line.ends_with(" host.internal")).count() == 1,
            "{text}"
        );
        Ok(())
    });
}
