//! Privileges and identity of the program, and of vpn-exec's own processes.

use std::fs::{self};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use lab::Launcher;

use crate::support::*;

const CAP_NET_RAW: u64 = 1 << 13;

#[test]
fn the_program_has_no_capabilities_and_cannot_gain_any() {
    test_with_file(|config| {
        let status = Launcher::new(&config).program(["cat", "/proc/self/status"]).stdout()?;
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure!(bits(&status, set)? == 0, "{set} is {}", field(&status, set)?);
        }
        ensure!(field(&status, "NoNewPrivs")? == "1");
        // The twin: the test itself has some.
        let status = fs::read_to_string("/proc/self/status")?;
        ensure!(bits(&status, "CapEff")? != 0);
        Ok(())
    });
}

#[test]
fn root_keeps_only_the_capabilities_of_keep_cap() {
    test_with_file(|config| {
        let program = ["sh", "-c", "cat /proc/self/status"];
        let status = Launcher::new(&config).options(["--keep-cap", "net_raw"]).program(&program).stdout()?;
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            ensure!(bits(&status, set)? == CAP_NET_RAW, "{set} is {}", field(&status, set)?);
        }
        ensure!(bits(&status, "CapAmb")? == 0, "root needs no ambient capability");
        let status = Launcher::new(&config).options(["--new-privs"]).program(["cat", "/proc/self/status"]).stdout()?;
        ensure!(field(&status, "NoNewPrivs")? == "0");
        // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, AUDIT_WRITE: none for networks, mounts or
        // namespaces.
        ensure!(bits(&status, "CapBnd")? == 0x2000_00fb, "{status}");
        Ok(())
    });
}

#[test]
fn the_secure_bits_are_locked() {
    test_with_file(|config| {
        let report: String = report(&config, &[], "secure-bits")?;
        // NOROOT, NO_SETUID_FIXUP and NO_CAP_AMBIENT_RAISE, all of them locked (linux/securebits.h). KEEP_CAPS has no
        // effect.
        ensure!(report == "0xcf", "{report}");
        Ok(())
    });
}

/// For a key that is missing, the kernel runs a program on the host, outside of all namespaces (request-key(8)). For
/// keys of the type "dns_resolver", that program asks the host's resolvers. The type here does not exist, so no program
/// runs.
#[test]
fn a_program_cannot_make_the_kernel_run_request_key() {
    test_with_file(|config| {
        let [refused, missing] =
            [libc::EPERM, libc::ENOKEY].map(|number| std::io::Error::from_raw_os_error(number).to_string());
        let all = [&[][..], &["--new-privs"], &["--keep-cap", "sys_admin"]];
        // The last one needs root.
        for options in all.into_iter().take(if lab::tunnel::is_rootless() { 2 } else { 3 }) {
            let seen: [String; 2] = report(&config, options, "request-key")?;
            ensure!(seen == [missing.clone(), refused.clone()], "{options:?}: {seen:?}");
        }
        // The twin: on the host, both requests look for the program.
        let mut child = lab::agent::task_on_host("request-key").stdout(Stdio::piped()).spawn()?;
        let outside: Option<[String; 2]> = lab::agent::report_of(&mut child)?;
        wait_for_end(&mut child)?;
        ensure!(outside == Some([missing.clone(), missing]), "{outside:?}");
        Ok(())
    });
}

/// Returns the report of the agent's task in a tunnel.
fn report<T: serde::de::DeserializeOwned>(config: &Path, options: &[&str], task: &str) -> Result<T> {
    let mut child = Launcher::new(config).options(options).program(lab::agent::task(task)).start()?;
    let report = lab::agent::report_of(&mut child)?;
    ensure!(wait_for_end(&mut child)?.success());
    report.context("a report")
}

/// Returns the distinct pairs of permitted and effective capabilities of a process's threads.
fn capabilities_of(pid: u32) -> Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        let sets = (bits(&status, "CapPrm")?, bits(&status, "CapEff")?);
        if !found.contains(&sets) {
            found.push(sets);
        }
    }
    found.sort_unstable();
    Ok(found)
}

#[test]
fn each_process_has_only_the_capabilities_of_its_next_steps() {
    const KILL: u64 = 1 << 5;
    const NET_ADMIN: u64 = 1 << 12;
    const SYS_PTRACE: u64 = 1 << 19;
    const SYS_ADMIN: u64 = 1 << 21;
    test_with_file(|config| {
        let mut child = Launcher::new(&config).program(["sh", "-c", "echo up; exec sleep 1000"]).start()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("piped")?).read_line(&mut line)?;
        let state = vpn_exec::registry::read(&"nowhere".parse()?)?.context("a state")?;
        let all = KILL | NET_ADMIN | SYS_PTRACE | SYS_ADMIN;
        // A process raises a permitted capability for the moment in which it needs that, so this waits.
        let comes_to_rest_with = |who, pid, wanted: &[(u64, u64)]| {
            wait_until(&format!("{who} with {wanted:x?} alone"), || Ok(capabilities_of(pid)? == wanted))
        };
        comes_to_rest_with("the launcher", child.id(), &[(all, KILL)])?;
        // The data path's thread, and the main thread.
        comes_to_rest_with("the keeper", state.keeper, &[(0, 0), (all, NET_ADMIN)])?;
        let keeper = fs::read_to_string(format!("/proc/{}/status", state.keeper))?;
        ensure!(bits(&keeper, "CapBnd")? == 0, "{keeper}");
        // The other children are the view helper and the socket guard.
        let name = |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let mut children = String::new();
        wait_until("the program", || {
            children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id()))?;
            Ok(children.split_ascii_whitespace().any(|pid| name(pid) == "sleep\n"))
        })?;
        let mut found = Vec::new();
        for pid in children.split_ascii_whitespace().filter(|pid| **pid != state.keeper.to_string()) {
            if name(pid) != "sleep\n" {
                // Each has dropped other capabilities once it has begun its work.
                let pid_number = pid.parse()?;
                wait_until("a helper with one capability alone", || {
                    let sets = capabilities_of(pid_number)?;
                    Ok([SYS_ADMIN, SYS_PTRACE].iter().any(|one| sets == [(*one, *one)]))
                })?;
                let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
                ensure!(bits(&status, "CapBnd")? == 0 && field(&status, "NoNewPrivs")? == "1", "{status}");
                found.push(capabilities_of(pid_number)?);
            }
        }
        found.sort_unstable();
        ensure!(found == [[(SYS_PTRACE, SYS_PTRACE)], [(SYS_ADMIN, SYS_ADMIN)]], "{found:?}");
        kill(child.id(), "TERM")?;
        wait_for_end(&mut child)?;
        Ok(())
    });
}

#[test]
fn a_program_of_another_user_has_its_ids_and_kept_capabilities() {
    test_with_file(|config| {
        lab::tunnel::needs_root("another user for the program")?;
        lab::require_users()?;
        let options = ["--user", "4321", "--group", "8765", "--keep-cap", "CAP_NET_RAW"];
        let status = Launcher::new(&config).options(&options).program(["cat", "/proc/self/status"]).stdout()?;
        ensure!(field(&status, "Uid")? == "4321\t4321\t4321\t4321");
        ensure!(field(&status, "Gid")? == "8765\t8765\t8765\t8765");
        ensure!(field(&status, "Groups")? == "8765", "a group of the caller stays");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure!(bits(&status, set)? == CAP_NET_RAW, "{set} is {}", field(&status, set)?);
        }
        let status =
            Launcher::new(&config).options(["--user", "4321"]).program(["cat", "/proc/self/status"]).stdout()?;
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure!(bits(&status, set)? == 0, "{set} is {}", field(&status, set)?);
        }
        Ok(())
    });
}

#[test]
fn under_sudo_the_program_runs_as_the_caller() {
    test_with_file(|config| {
        lab::tunnel::needs_root("vpn-exec under sudo")?;
        lab::require_users()?;
        let mut command =
            Launcher::new(&config).program(["sh", "-c", "id -u; id -g; echo $HOME; echo ${SUDO_UID-none}"]).command();
        command.env("SUDO_UID", "65534").env("SUDO_USER", "nobody").env("HOME", "/root");
        let text = stdout(command)?;
        let lines: Vec<&str> = text.lines().collect();
        ensure!(lines[0] == "65534" && lines[3] == "none", "{text}");
        ensure!(lines[2] != "/root", "HOME is the caller's: {text}");
        let mut command = Launcher::new(&config).options(["--user", "0"]).program(["id", "-u"]).command();
        command.env("SUDO_UID", "65534");
        ensure!(stdout(command)? == "0\n", "--user must take precedence over sudo");
        Ok(())
    });
}

#[test]
fn under_sudo_the_program_finds_the_callers_desktop_sockets() {
    test_with_file(|config| {
        lab::tunnel::needs_root("vpn-exec under sudo")?;
        lab::require_users()?;
        let runtime = Path::new("/run/user/65534");
        fs::create_dir_all(runtime)?;
        let _bus = std::os::unix::net::UnixListener::bind(runtime.join("bus"))?;
        let _other = std::os::unix::net::UnixListener::bind(runtime.join("wayland-0"))?;
        for path in [runtime, &runtime.join("bus")] {
            std::os::unix::fs::chown(path, Some(65534), None)?;
        }
        fs::set_permissions(runtime, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        let print = ["sh", "-c", "echo \"$DBUS_SESSION_BUS_ADDRESS\" \"${WAYLAND_DISPLAY-unset}\""];
        let under = |name: &str, value: &str, options: &[&str]| {
            let mut command = Launcher::new(&config).options(options).program(&print).command();
            command.env_remove("DBUS_SESSION_BUS_ADDRESS").env_remove("WAYLAND_DISPLAY").env(name, value);
            stdout(command)
        };
        ensure!(
            under("SUDO_UID", "65534", &["--dbus", "session"])? == "unix:path=/run/user/65534/bus unset\n",
            "root's socket is left out"
        );
        // The filtered bus has a socket of the program's own, for every program of that user.
        for (name, value, options) in [("SUDO_UID", "65534", &[][..]), ("NOTHING", "", &["--user", "65534"])] {
            ensure!(under(name, value, options)? == "unix:path=/run/vpn-exec.bus unset\n", "{name}");
        }
        let whole = ["--user", "65534", "--dbus", "session"];
        ensure!(under("NOTHING", "", &whole)? == " unset\n", "the program has no caller");
        Ok(())
    });
}

#[test]
fn the_program_inherits_only_standard_descriptors_and_listen_fds() {
    test_with_file(|config| {
        // Lists the program's descriptors of the file that the caller has open.
        let list = "ls -l /proc/$$/fd | sed -n 's|.* \\([0-9]*\\) -> .*/nowhere.conf|\\1|p' | tr '\\n' ' '";
        let inherit = |setup: &str| -> Result<(String, String)> {
            let program = "if [ \"$LISTEN_PID\" = $$ ]; then echo mine; else echo \"$LISTEN_PID\"; fi; eval \"$LIST\"";
            let line = Launcher::new(&config).program(["sh", "-c", program]).line();
            let config = config.display();
            let script = format!("exec 3<{config} 4<{config} 7<{config}; {setup} exec {line}");
            let mut command = Command::new("bash");
            command.args(["-c", &script]).env("LIST", list).stdin(Stdio::null());
            let text = stdout(command)?;
            let (listen, descriptors) = text.split_once('\n').context("two lines")?;
            Ok((listen.to_owned(), descriptors.trim_end().to_owned()))
        };
        let pair = |listen: &str, descriptors: &str| (listen.to_owned(), descriptors.to_owned());
        ensure!(inherit("")? == pair("", ""));
        let passed = inherit("LISTEN_FDS=2 LISTEN_PID=$$")?;
        ensure!(passed == pair("mine", "3 4"), "{passed:?}");
        let others = inherit("LISTEN_FDS=2 LISTEN_PID=1")?;
        ensure!(others == pair("1", ""), "they belong to another process: {others:?}");
        Ok(())
    });
}
