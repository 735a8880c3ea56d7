//! What a program may do, and as whom; and what our own processes may.

use std::fs::{self};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use lab::Launcher;

use crate::support::*;

const CAP_NET_RAW: u64 = 1 << 13;

#[test]
fn the_program_has_no_privileges_and_no_way_to_any() {
    test_with_file(|config| {
        let status = Launcher::new(&config).program(["cat", "/proc/self/status"]).stdout()?;
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure!(bits(&status, set)? == 0, "{set} is {}", field(&status, set)?);
        }
        ensure!(field(&status, "NoNewPrivs")? == "1");
        // The twin: without vpn-exec there would have been some.
        let status = fs::read_to_string("/proc/self/status")?;
        ensure!(bits(&status, "CapEff")? != 0);
        Ok(())
    });
}

#[test]
fn root_keeps_what_was_asked_for_and_no_more() {
    test_with_file(|config| {
        let program = ["sh", "-c", "cat /proc/self/status"];
        let status = Launcher::new(&config).options(["--keep-cap", "net_raw"]).program(&program).stdout()?;
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            ensure!(bits(&status, set)? == CAP_NET_RAW, "{set} is {}", field(&status, set)?);
        }
        ensure!(bits(&status, "CapAmb")? == 0, "root needs no ambient capability");
        let status = Launcher::new(&config).options(["--new-privs"]).program(["cat", "/proc/self/status"]).stdout()?;
        ensure!(field(&status, "NoNewPrivs")? == "0");
        // CAP_CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID and AUDIT_WRITE: none for networks, mounts or namespaces.
        ensure!(bits(&status, "CapBnd")? == 0x2000_00fb, "{status}");
        Ok(())
    });
}

#[test]
fn the_secure_bits_are_locked() {
    test_with_file(|config| {
        let report: String = report(&config, &[], "secure-bits")?;
        // NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE, all locked (linux/securebits.h). KEEP_CAPS brings nothing.
        ensure!(report == "0xcf", "{report}");
        Ok(())
    });
}

/// The kernel has a program of the host's make a key that is not there, outside of all namespaces; one that makes keys of the kind
/// "dns_resolver" asks the host's resolvers. The kind that is asked for here is none, so that nobody is called.
#[test]
fn no_program_of_the_host_is_called_to_make_a_key() {
    test_with_file(|config| {
        let [refused, missing] =
            [libc::EPERM, libc::ENOKEY].map(|number| std::io::Error::from_raw_os_error(number).to_string());
        for options in [&[][..], &["--new-privs"], &["--keep-cap", "sys_admin"]] {
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

/// The permitted and the effective capabilities of all threads of a process, each once.
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
fn each_process_may_do_what_its_next_step_takes() {
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
        // Each raises what it has for the instant in which it takes that, as when it looks for the program's mounts.
        let rests_with = |who, pid, wanted: &[(u64, u64)]| {
            wait_until(&format!("{who} with {wanted:x?} alone"), || Ok(capabilities_of(pid)? == wanted))
        };
        rests_with("the launcher", child.id(), &[(all, KILL)])?;
        // The thread of the data path, and the one that watches the tunnel.
        rests_with("the keeper", state.keeper, &[(0, 0), (all, NET_ADMIN)])?;
        let keeper = fs::read_to_string(format!("/proc/{}/status", state.keeper))?;
        ensure!(bits(&keeper, "CapBnd")? == 0, "{keeper}");
        // The process that keeps the view and the gate are neither the keeper nor the program, which is another one by now.
        let name = |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let mut children = String::new();
        wait_until("the program", || {
            children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id()))?;
            Ok(children.split_ascii_whitespace().any(|pid| name(pid) == "sleep\n"))
        })?;
        let mut found = Vec::new();
        for pid in children.split_ascii_whitespace().filter(|pid| **pid != state.keeper.to_string()) {
            if name(pid) != "sleep\n" {
                // Each has dropped what it does not need once it has begun with its work.
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
fn another_user_has_its_own_identity_and_what_it_keeps() {
    test_with_file(|config| {
        lab::require_users()?;
        let options = ["--user", "4321", "--group", "8765", "--keep-cap", "CAP_NET_RAW"];
        let status = Launcher::new(&config).options(&options).program(["cat", "/proc/self/status"]).stdout()?;
        ensure!(field(&status, "Uid")? == "4321\t4321\t4321\t4321");
        ensure!(field(&status, "Gid")? == "8765\t8765\t8765\t8765");
        ensure!(field(&status, "Groups")? == "8765", "no group of the caller's stays");
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
fn under_sudo_the_program_is_its_caller() {
    test_with_file(|config| {
        lab::require_users()?;
        let mut command =
            Launcher::new(&config).program(["sh", "-c", "id -u; id -g; echo $HOME; echo ${SUDO_UID-none}"]).command();
        let nobody = rustix::process::getuid();
        command.env("SUDO_UID", "65534").env("SUDO_USER", "nobody").env("HOME", "/root");
        let text = stdout(command)?;
        let lines: Vec<&str> = text.lines().collect();
        ensure!(lines[0] == "65534" && lines[3] == "none", "{nobody:?}: {text}");
        ensure!(lines[2] != "/root", "HOME is the caller's: {text}");
        let mut command = Launcher::new(&config).options(["--user", "0"]).program(["id", "-u"]).command();
        command.env("SUDO_UID", "65534");
        ensure!(stdout(command)? == "0\n", "--user goes before sudo");
        Ok(())
    });
}

#[test]
fn sudos_caller_finds_the_sockets_of_its_desktop() {
    test_with_file(|config| {
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
        // Filtered, it is at a place of the program's own, for every program of that user.
        for (name, value, options) in [("SUDO_UID", "65534", &[][..]), ("NOTHING", "", &["--user", "65534"])] {
            ensure!(under(name, value, options)? == "unix:path=/run/vpn-exec.bus unset\n", "{name}");
        }
        let whole = ["--user", "65534", "--dbus", "session"];
        ensure!(under("NOTHING", "", &whole)? == " unset\n", "nobody has called");
        Ok(())
    });
}

#[test]
fn only_the_standard_descriptors_and_those_of_listen_fds_pass_on() {
    test_with_file(|config| {
        // Which descriptors of the program lead to the file that its callers have open.
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
        ensure!(others == pair("1", ""), "they are somebody else's: {others:?}");
        Ok(())
    });
}
